package main

import (
	"fmt"
	"io"
	"strings"
	"text/tabwriter"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	"conseal/agent/api"
	"conseal/agent/api/apipb"
)

func recoveryCommand(e *env) *cobra.Command {
	c := groups(&cobra.Command{Use: "recovery", Short: "What the loss of hosts would do"})
	drill := &cobra.Command{
		Use:   "drill",
		Short: "Whether each key would survive the loss of each host (admin socket)",
		Long: `Whether each key of this host would survive the loss of each of its hosts, and how
many more. It changes nothing.

It goes by what the hosts said on the connections that are up now; of a host that is not
connected it only knows that it had a share once. Of this host's own share it reads the
file. A host with role "recovery" counts as one that has a share and does not sign.

The exit code is 6 if a key is lost, or would be with one host more; else 4 if this host
cannot tell of one of its keys, or has none to tell of.`,
		Args: args(0, 0),
		RunE: func(c *cobra.Command, _ []string) error {
			client, err := e.dial()
			if err != nil {
				return err
			}
			defer client.Close()
			r, err := client.Drill(c.Context())
			if err != nil {
				return err
			}
			if e.json {
				err = printJSON(e.out, r)
			} else {
				err = printDrill(e.out, r)
			}
			if err != nil {
				return err
			}
			return drillVerdict(r)
		},
	}
	e.socketFlag(drill, "CONSEAL_ADMIN_SOCKET", api.AdminSocket)
	c.AddCommand(drill)
	return c
}

func printDrill(w io.Writer, r *apipb.DrillResponse) error {
	fmt.Fprintf(w, "as host %s sees it, by roster %d and what the hosts said last on the connections that are up\n", r.Host, r.RosterVersion)
	for _, k := range r.Keys {
		fmt.Fprintln(w)
		if len(k.Hosts) > 0 {
			fmt.Fprintf(w, "key %s, epoch %d.%d: quorum %d of %d hosts; %d have a share, %d could sign now\n", k.Name, k.EpochRoster, k.EpochAttempt,
				k.Quorum, len(k.Hosts), k.Shares, k.Live)
			fmt.Fprintf(w, "  %s\n", spare(k))
		}
		if k.Problem != "" {
			fmt.Fprintf(w, "key %s: CANNOT TELL: %s\n", k.Name, k.Problem)
		}
		for _, note := range k.Notes {
			fmt.Fprintf(w, "  %s\n", note)
		}
		if len(k.Hosts) == 0 {
			continue
		}
		t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
		fmt.Fprintf(t, "  HOST\tNOW\tIF IT IS LOST, THE KEY\n")
		for _, h := range k.Hosts {
			fmt.Fprintf(t, "  %s\t%s\t%s\n", h.Name, h.State, h.Text)
		}
		if err := t.Flush(); err != nil {
			return err
		}
	}
	if len(r.Elsewhere) > 0 {
		fmt.Fprintf(w, "\nnot told of, as other hosts have them: %s\n", strings.Join(r.Elsewhere, ", "))
	}
	return nil
}

// spare says how many hosts may be lost.
func spare(k *apipb.DrilledKey) string {
	switch {
	case k.SpareShares < 0:
		return fmt.Sprintf("LOST: it takes %d more with a share", -k.SpareShares)
	case k.SpareLive < 0:
		return fmt.Sprintf("cannot sign: %d more have to be there; %d shares may be lost before it is lost for good", -k.SpareLive, k.SpareShares)
	}
	return fmt.Sprintf("%d may be lost before it cannot sign, %d shares before it is lost for good", k.SpareLive, k.SpareShares)
}

// atRiskError is a key that does not survive the loss of a host.
type atRiskError struct{ error }

// drillVerdict is an error if not all is well.
func drillVerdict(r *apipb.DrillResponse) error {
	var risks, unknown []string
	for _, k := range r.Keys {
		if k.Problem != "" {
			unknown = append(unknown, k.Name)
		}
		for _, h := range k.Hosts {
			if h.Loss == "lost" {
				risks = append(risks, fmt.Sprintf("%s with %s", k.Name, h.Name))
			}
		}
	}
	later := func(text string) error {
		return &api.Error{Code: connect.CodeUnavailable, Reason: "KEY_NOT_READY", Text: text, Next: "ask on another host of the key, or mend what it says and ask again"}
	}
	switch {
	case len(risks) > 0:
		return atRiskError{fmt.Errorf("would be lost for good: %s; give such keys more hosts or a lower quorum, and hosts that lost their shares new ones (docs/operations.md)", strings.Join(risks, ", "))}
	case len(unknown) > 0:
		return later("cannot tell of " + strings.Join(unknown, ", "))
	case len(r.Keys) == 0:
		return later("this host has no key to tell of")
	}
	return nil
}
