package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/hex"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	"conseal/agent/api"
	"conseal/agent/api/apipb"
)

func statusCommand(e *env) *cobra.Command {
	var watch bool
	c := &cobra.Command{
		Use:   "status",
		Short: "How the agent, its hardware, its peers and its keys are (admin socket)",
		Args:  args(0, 0),
		RunE: func(c *cobra.Command, _ []string) error {
			client, err := e.dial()
			if err != nil {
				return err
			}
			defer client.Close()
			show := func() ([]byte, error) {
				s, err := client.Status(c.Context())
				if err != nil {
					return nil, err
				}
				var b bytes.Buffer
				if e.json {
					err = printJSON(&b, s)
				} else {
					err = printStatus(&b, s)
				}
				return b.Bytes(), err
			}
			if watch {
				return watchStatus(c.Context(), e.out, show)
			}
			b, err := show()
			if err != nil {
				return err
			}
			_, err = e.out.Write(b)
			return err
		},
	}
	c.Flags().BoolVarP(&watch, "watch", "w", false, "show it again whenever it changes, until interrupted")
	e.socketFlag(c, "CONSEAL_ADMIN_SOCKET", api.AdminSocket)
	return c
}

// watchEvery is how often a watched status is asked for.
const watchEvery = 300 * time.Millisecond

// watchStatus shows the status whenever it changes, until ctx ends.
func watchStatus(ctx context.Context, w io.Writer, show func() ([]byte, error)) error {
	var last []byte
	for {
		b, err := show()
		switch {
		case ctx.Err() != nil:
			return nil
		case err != nil:
			return err
		}
		if !bytes.Equal(b, last) {
			if last != nil {
				b = append([]byte("\n"), b...)
			}
			if _, err := w.Write(b); err != nil {
				return err
			}
			last = bytes.TrimPrefix(b, []byte("\n"))
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(watchEvery):
		}
	}
}

func printStatus(w io.Writer, s *apipb.StatusResponse) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintf(t, "host\t%s of fleet %s\n", s.Host, s.Fleet)
	fmt.Fprintf(t, "version\t%s, running since %s\n", s.Version, s.Started)
	fmt.Fprintf(t, "roster\tversion %d, digest %s\n", s.RosterVersion, short(s.RosterDigest))
	if s.ProtectorError == "" {
		fmt.Fprintf(t, "protector\t%s: open, %d roots written\n", s.Protector, s.Roots)
	} else {
		fmt.Fprintf(t, "protector\t%s: CLOSED: %s\n", s.Protector, s.ProtectorError)
	}
	if s.ErasureWhy != "" { // not of a TPM
		fmt.Fprintf(t, "erasure\t%s: %s\n", cmp.Or(s.Erasure, "not known"), s.ErasureWhy)
	}
	fmt.Fprintf(t, "\nPEER\tADDRESS\tSTATE\tSINCE\tROSTER\n")
	for _, p := range s.Peers {
		if p.Connected {
			fmt.Fprintf(t, "%s\t%s\tconnected\t%s\t%d\n", p.Name, p.Address, p.Since, p.RosterVersion)
		} else {
			fmt.Fprintf(t, "%s\t%s\tDOWN: %s\t%s\t\n", p.Name, p.Address, p.Error, p.Since)
		}
	}
	fmt.Fprintln(t)
	printKeys(t, s.Keys)
	printed := false
	for _, k := range s.Keys {
		for _, p := range k.Presignatures {
			if !printed {
				fmt.Fprintf(t, "\nPRESIGNATURES\tSIGNERS\tREADY\n")
				printed = true
			}
			fmt.Fprintf(t, "%s\t%s\t%d of %d\n", k.Name, strings.Join(p.Signers, ","), p.Ready, p.Wanted)
		}
	}
	return t.Flush()
}

func printKeys(t io.Writer, keys []*apipb.Key) {
	fmt.Fprintf(t, "KEY\tSCHEME\tQUORUM\tHOSTS\tSTATE\tCONDITION\n")
	for _, k := range keys {
		condition := k.Condition
		if k.Detail != "" {
			condition += ": " + k.Detail
		}
		if k.Next != "" && !strings.Contains(k.Detail, k.Next) {
			condition += "; next epoch: " + k.Next
		}
		fmt.Fprintf(t, "%s\t%s\t%d of %d\t%s\t%s\t%s\n", k.Name, k.Scheme, k.Quorum, len(k.Hosts), strings.Join(k.Hosts, ","), k.State, condition)
	}
}

func keysCommand(e *env) *cobra.Command {
	c := &cobra.Command{
		Use:   "keys",
		Short: "List the keys that you may use",
		Args:  args(0, 0),
		RunE: func(c *cobra.Command, _ []string) error {
			client, err := e.dial()
			if err != nil {
				return err
			}
			defer client.Close()
			keys, err := client.ListKeys(c.Context())
			if err != nil {
				return err
			}
			if e.json {
				return printJSON(e.out, &apipb.ListKeysResponse{Keys: keys})
			}
			if len(keys) == 0 {
				_, err := fmt.Fprintln(e.out, "no key of this host's roster lists you among its users")
				return err
			}
			t := tabwriter.NewWriter(e.out, 0, 0, 2, ' ', 0)
			printKeys(t, keys)
			return t.Flush()
		},
	}
	e.socketFlag(c, "CONSEAL_SIGN_SOCKET", api.SignSocket)
	return c
}

func printJSON(w io.Writer, m proto.Message) error {
	b, err := protojson.MarshalOptions{UseProtoNames: true, EmitUnpopulated: true}.Marshal(m)
	if err != nil {
		return err
	}
	_, err = fmt.Fprintln(w, string(b))
	return err
}

func short(b []byte) string {
	if len(b) > 8 {
		return hex.EncodeToString(b[:8]) + "..."
	}
	return hex.EncodeToString(b)
}
