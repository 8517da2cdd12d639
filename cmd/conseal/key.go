package main

import (
	"encoding/hex"
	"encoding/pem"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"conseal/agent/api"
	"conseal/agent/api/apipb"
)

func keyCommand(e *env) *cobra.Command {
	c := groups(&cobra.Command{Use: "key", Short: "One key"})
	var asPEM bool
	var wait time.Duration
	show := &cobra.Command{
		Use:   "show KEY",
		Short: "Describe a key, or print its public key",
		Example: `  conseal key show release
  conseal key show release --pem > release.pem
  conseal key show release --wait 30s`,
		Args: args(1, 1),
		RunE: func(c *cobra.Command, args []string) error {
			client, err := e.dial()
			if err != nil {
				return err
			}
			defer client.Close()
			k, err := waitReady(c.Context(), client, args[0], wait)
			if err != nil {
				return err
			}
			switch {
			case asPEM && len(k.PublicKey) == 0:
				return fmt.Errorf("key %q has no public key yet: %s: %s", k.Name, k.Condition, k.Detail)
			case asPEM:
				return pem.Encode(e.out, &pem.Block{Type: "PUBLIC KEY", Bytes: k.PublicKey})
			case e.json:
				return printJSON(e.out, k)
			}
			return printKey(e.out, k)
		},
	}
	e.socketFlag(show, "CONSEAL_SIGN_SOCKET", api.SignSocket)
	show.Flags().BoolVar(&asPEM, "pem", false, "print the public key only, as PEM")
	show.Flags().DurationVar(&wait, "wait", 0, "wait this long for the key to be ready")
	c.AddCommand(show, keyRefresh(e))
	return c
}

func keyRefresh(e *env) *cobra.Command {
	c := &cobra.Command{
		Use:   "refresh KEY",
		Short: "Give a key new shares under the same public key (admin socket)",
		Long: `Give a key new shares under the same public key. All its hosts must be there. The key
goes on signing meanwhile; when the hosts have the new shares, the old ones are erased and
are of no use to anybody. It also gives a share to a host that has lost its own.`,
		Args: args(1, 1),
		RunE: func(c *cobra.Command, args []string) error {
			client, err := e.dial()
			if err != nil {
				return err
			}
			defer client.Close()
			k, err := client.Refresh(c.Context(), args[0])
			if err != nil {
				return err
			}
			if e.json {
				return printJSON(e.out, k)
			}
			_, err = fmt.Fprintf(e.out, "key %s is at epoch %d.%d\n", k.Name, k.EpochRoster, k.EpochAttempt)
			return err
		},
	}
	e.socketFlag(c, "CONSEAL_ADMIN_SOCKET", api.AdminSocket)
	return c
}

func printKey(w io.Writer, k *apipb.Key) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	line := func(name, format string, args ...any) { fmt.Fprintf(t, name+"\t"+format+"\n", args...) }
	line("key", "%s, incarnation %d", k.Name, k.Incarnation)
	line("purpose", "%s", k.Purpose)
	line("scheme", "%s", k.Scheme)
	line("quorum", "%d of %d: %s", k.Quorum, len(k.Hosts), strings.Join(k.Hosts, ", "))
	line("there now", "%s", strings.Join(k.Live, ", "))
	line("state", "%s by the roster", k.State)
	line("opened", "%s", opened(k.Open))
	line("condition", "%s", k.Condition)
	if k.Detail != "" {
		line("", "%s", k.Detail)
	}
	if len(k.PublicKey) > 0 {
		line("public key", "%s", hex.EncodeToString(k.PublicKey))
	}
	if k.EpochRoster > 0 {
		line("epoch", "%d.%d since %s, certificate %s", k.EpochRoster, k.EpochAttempt, k.Since, short(k.Certificate))
	}
	if k.Next != "" {
		line("next epoch", "%s", k.Next)
	}
	for _, r := range k.Receipts {
		line("receipt", "%s", describeReceipt(r))
	}
	if len(k.ReceiptsMissing) > 0 {
		line("no receipt of", "%s", strings.Join(k.ReceiptsMissing, ", "))
	}
	return t.Flush()
}

// describeReceipt says in words what a host signed when it had erased a key.
func describeReceipt(r *apipb.Receipt) string {
	held := fmt.Sprintf("erased %d shares", r.Shares)
	switch r.Shares {
	case 0:
		held = "held no share"
	case 1:
		held = "erased its share"
	}
	proof := "its hardware certifies nothing"
	if len(r.Proof) > 0 {
		proof = fmt.Sprintf("certified by its %s (%d bytes, in --json)", r.Protector, len(r.Proof))
	}
	return fmt.Sprintf("%s %s at %s, root %d became %d; signed by the host, %s", r.Host, held, r.Time, r.RootsBefore, r.RootsAfter, proof)
}

// opened says in words how long a share stays opened.
func opened(open string) string {
	switch open {
	case "held":
		return "held while the agent runs"
	case "each":
		return "through the hardware for each use"
	}
	return "through the hardware, for " + open
}
