package main

import (
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"conseal/hsm"
)

func hsmCommand(out io.Writer) *cobra.Command {
	c := &cobra.Command{
		Use: "hsm", Short: "PKCS#11 tokens: what one can, before a host uses it", Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error { return c.Help() },
	}
	c.AddCommand(hsmProbe(out))
	return c
}

func hsmProbe(out io.Writer) *cobra.Command {
	var cfg hsm.Config
	var asJSON bool
	c := &cobra.Command{
		Use:   "probe URI",
		Short: "Say what a PKCS#11 token can, and which protector.hsm.method to set",
		Long: `Say what a PKCS#11 token can, and which protector.hsm.method to set.

URI names the token and its module (RFC 7512). Each method is tried with a key that
is made for it in the session and thrown away: nothing is left in the token, and
nothing that is there is touched. What the token says it can is not believed.

The PIN is sent once. If the token refuses it, it is not sent again; the folder that
remembers that is named in the error.`,
		Example: `  conseald hsm probe "pkcs11:token=conseal?module-path=/usr/lib/softhsm/libsofthsm2.so" --pin file:/etc/conseal/hsm.pin`,
		Args:    cobra.ExactArgs(1),
		RunE: func(c *cobra.Command, a []string) (err error) {
			if err := protectProcess(); err != nil { // the PIN is in it, and a library that may crash
				return err
			}
			cfg.URI = a[0]
			if cfg.StateDir, err = probeFolder(cfg.URI); err != nil {
				return err
			}
			r, err := hsm.Probe(c.Context(), cfg)
			if err != nil {
				return err
			}
			if asJSON {
				return json.NewEncoder(out).Encode(r)
			}
			return printReport(out, r)
		},
	}
	c.Flags().StringVar(&cfg.PINSource, "pin", "", "where the PIN is: file:/PATH, fd:N or cred:NAME; else the URI's pin-source says it")
	c.Flags().BoolVar(&asJSON, "json", false, "print JSON, for programs")
	c.Flags().StringVar(&cfg.InitArgs, "init-args", "", "what C_Initialize gets, as protector.hsm.init_args")
	return c
}

// probeFolder is where the PINs are remembered that this token refused from us.
func probeFolder(uri string) (string, error) {
	cache, err := os.UserCacheDir()
	if err != nil {
		return "", fmt.Errorf("no folder to remember a refused PIN in: %w: set XDG_CACHE_HOME", err)
	}
	if u, err := hsm.ParseURI(uri); err == nil { // else Probe says what is wrong
		u.PINSource = ""
		uri = u.String()
	}
	dir := filepath.Join(cache, "conseal", fmt.Sprintf("probe-%.8x", sha256.Sum256([]byte(uri))))
	return dir, os.MkdirAll(dir, 0o700)
}

func printReport(out io.Writer, r *hsm.Report) error {
	t := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintf(t, "token\t%s\n", r.Token)
	fmt.Fprintf(t, "made by\t%s, model %s, serial %s\n", r.Manufacturer, r.Model, r.Serial)
	fmt.Fprintf(t, "library\t%s\n", r.Library)
	fmt.Fprintf(t, "\nMECHANISM\tNUMBER\tKEYS\tUSES\n")
	for _, m := range r.Mechanisms {
		if !m.Offered {
			fmt.Fprintf(t, "%s\t%#x\t-\tnot offered\n", m.Name, m.Number)
			continue
		}
		where := ""
		if m.Hardware {
			where = " (hardware)"
		}
		fmt.Fprintf(t, "%s\t%#x\t%d-%d\t%s%s\n", m.Name, m.Number, m.MinKey, m.MaxKey, strings.Join(m.Uses, ", "), where)
	}
	fmt.Fprintf(t, "\nMETHOD\tPASSED\tSEAL\tOPEN\tNEW KEY\tWHY NOT\n")
	for _, m := range r.Methods {
		if m.Passed {
			fmt.Fprintf(t, "%s\tyes\t%v\t%v\t%v\t\n", m.Name, m.Seal.Round(time.Microsecond), m.Open.Round(time.Microsecond), m.NewKey.Round(time.Microsecond))
		} else {
			fmt.Fprintf(t, "%s\tNO\t-\t-\t-\t%s\n", m.Name, m.Why)
		}
	}
	fmt.Fprintf(t, "\nATTRIBUTE\tHONOURED\tDETAIL\n")
	for _, a := range r.Attributes {
		fmt.Fprintf(t, "%s\t%s\t%s\n", a.Name, map[bool]string{true: "yes", false: "NO"}[a.Honoured], a.Detail)
	}
	if err := t.Flush(); err != nil {
		return err
	}
	fmt.Fprintf(out, "\nerasure = %s (a guess: %s)\n", r.Erasure, r.ErasureWhy)
	for _, w := range r.Warnings {
		fmt.Fprintln(out, "warning:", w)
	}
	if r.Recommended == "" {
		return errors.New("this token is of no use: " + r.Why)
	}
	_, err := fmt.Fprintf(out, "\nTo be set for the host (%s):\n\n[protector.hsm]\nmethod = %q\n", r.Why, r.Recommended)
	return err
}
