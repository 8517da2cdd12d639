package main

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"conseal/agent/api"
	"conseal/agent/api/apipb"
)

func suspendCommand(e *env) *cobra.Command {
	var reason string
	c := suspensionCommand(e, "suspend", "with every key, also those that the roster adds later", func(ctx context.Context, client *api.Client, key string, all bool) (*apipb.SuspensionResponse, error) {
		return client.Suspend(ctx, key, all, reason)
	})
	c.Short = "Have this host sign nothing more with a key (admin socket)"
	c.Long = `Have this host sign nothing more with a key, or with any.

It holds when the command returns, needs no other host, and outlasts restarts, new
epochs and new rosters. Signatures under way on this host end; the other hosts
may go on: suspend on enough of them, or in the roster, to stop them all. Shares are
still renewed. What is signed is in the audit log before, and nothing after.`
	c.Example = `  conseal suspend release --reason "key ceremony 12"
  conseal suspend --all`
	c.Flags().StringVar(&reason, "reason", "", "why, for people; at most 200 bytes")
	return c
}

// suspensionCommand is a verb about one key or --all.
func suspensionCommand(e *env, verb, what string, do func(context.Context, *api.Client, string, bool) (*apipb.SuspensionResponse, error)) *cobra.Command {
	var all bool
	c := &cobra.Command{
		Use:  verb + " KEY|--all",
		Args: args(0, 1),
		RunE: func(c *cobra.Command, args []string) error {
			if all == (len(args) == 1) || !all && args[0] == "" {
				return usageError{errors.New("name one key, or give --all")}
			}
			client, err := e.dial()
			if err != nil {
				return err
			}
			defer client.Close()
			r, err := do(c.Context(), client, append(args, "")[0], all)
			if err != nil {
				return err
			}
			if e.json {
				return printJSON(e.out, r)
			}
			return printSuspension(e.out, r, all && verb == "suspend")
		},
	}
	c.Flags().BoolVar(&all, "all", false, what)
	e.socketFlag(c, "CONSEAL_ADMIN_SOCKET", api.AdminSocket)
	return c
}

func printSuspension(w io.Writer, r *apipb.SuspensionResponse, all bool) error {
	for _, k := range r.Keys {
		does := "this host signs with it"
		if k.Condition == "suspended" {
			does = "this host signs nothing with it, " + k.Detail
		}
		able := fmt.Sprintf("%d of its %d hosts can sign, and it takes %d", len(k.Live), len(k.Hosts), k.Quorum)
		if len(k.Live) < int(k.Quorum) {
			able += ": the fleet cannot sign with it"
		}
		if _, err := fmt.Fprintf(w, "key %s: %s; %s\n", k.Name, does, able); err != nil {
			return err
		}
	}
	if all {
		fmt.Fprintln(w, "and with no key that the roster adds later")
	}
	if r.Warning != "" {
		fmt.Fprintln(w, "warning:", r.Warning)
	}
	return nil
}
