package main

import (
	"context"

	"github.com/spf13/cobra"

	"conseal/agent/api"
	"conseal/agent/api/apipb"
)

func resumeCommand(e *env) *cobra.Command {
	c := suspensionCommand(e, "resume", "every suspension on this host, also those of single keys", func(ctx context.Context, client *api.Client, key string, all bool) (*apipb.SuspensionResponse, error) {
		return client.Resume(ctx, key, all)
	})
	c.Short = "Have this host sign again with a key that it suspended (admin socket)"
	c.Long = `Have this host sign again with a key that was suspended on it.

The hardware has to be there: its manifest keeps the suspension. What the roster
suspends, only a newer roster resumes.`
	return c
}
