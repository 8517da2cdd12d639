package main

import (
	"encoding/json"
	"fmt"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"conseal/agent/api"
	"conseal/config"
)

func rosterCommand(e *env) *cobra.Command {
	c := groups(&cobra.Command{Use: "roster", Short: "Rosters"})
	c.AddCommand(&cobra.Command{
		Use:   "check FILE",
		Short: "Check a roster, and print its digest and what it says",
		Long: `Check a roster, and print its digest and what it says. All that is wrong is
listed at once.`,
		Args: args(1, 1),
		RunE: func(_ *cobra.Command, args []string) error {
			r, err := config.LoadRoster(args[0])
			if err != nil {
				return err
			}
			digest := r.Digest()
			if e.json {
				return json.NewEncoder(e.out).Encode(map[string]any{
					"fleet": r.Fleet, "version": r.Version, "digest": fmt.Sprintf("%x", digest), "hosts": len(r.Hosts), "keys": len(r.Keys),
				})
			}
			t := tabwriter.NewWriter(e.out, 0, 0, 2, ' ', 0)
			fmt.Fprintf(t, "fleet %s, version %d\ndigest %x\n\nHOST\tADDRESS\tPROTECTOR\tIDENTITY\n", r.Fleet, r.Version, digest)
			for _, h := range r.Hosts {
				fmt.Fprintf(t, "%s\t%s\t%s\t%s\n", h.Name, h.Address, h.Protector, h.Identity)
			}
			fmt.Fprintf(t, "\nKEY\tSCHEME\tQUORUM\tHOSTS\tSTATE\tPURPOSE\n")
			for _, k := range r.Keys {
				fmt.Fprintf(t, "%s\t%s\t%d of %d\t%s\t%s\t%s\n", k.Name, k.Scheme, k.Quorum, len(k.Hosts), strings.Join(k.Hosts, ","), k.State, k.Purpose)
			}
			return t.Flush()
		},
	})
	c.AddCommand(rosterLoad(e))
	return c
}

func rosterLoad(e *env) *cobra.Command {
	c := &cobra.Command{
		Use:   "load",
		Short: "Have this host's agent read its roster's file again (admin socket)",
		Long: `Have this host's agent read its roster's file again, and take it up if it is newer
and allowed. Keys go on signing meanwhile. "systemctl reload conseald" does the same.
If the file is not taken up, the present roster stays in force.`,
		Args: args(0, 0),
		RunE: func(c *cobra.Command, _ []string) error {
			client, err := e.dial()
			if err != nil {
				return err
			}
			defer client.Close()
			r, err := client.LoadRoster(c.Context())
			if err != nil {
				return err
			}
			if e.json {
				return printJSON(e.out, r)
			}
			text := "version %d is in force already\n"
			if r.Changed {
				text = "version %d is in force\n"
			}
			_, err = fmt.Fprintf(e.out, text, r.Version)
			return err
		},
	}
	e.socketFlag(c, "CONSEAL_ADMIN_SOCKET", api.AdminSocket)
	return c
}
