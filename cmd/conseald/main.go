// Command conseald is the agent of a host: it joins configuration and hardware,
// and runs.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"conseal/agent"
	"conseal/config"
	"conseal/hsm"
	"conseal/hsm/helper"
	"conseal/tpm"
)

// version is set by the linker.
var version = "devel"

func main() {
	if helper.Called() {
		os.Exit(helper.Main())
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, unix.SIGTERM)
	err := command(os.Stdout, os.Stderr).ExecuteContext(ctx)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "conseald:", err)
		os.Exit(1)
	}
}

const defaultConfig = "/etc/conseal/conseal.toml"

func command(out, logs io.Writer) *cobra.Command {
	var file string
	root := &cobra.Command{
		Use:   "conseald",
		Short: "The agent of a host that holds shares of signing keys",
		Long: `The agent of a host that holds shares of signing keys.

Without a command it runs until it is told to stop. On a new host: write the
configuration, ` + "`conseald check`" + ` it, run ` + "`conseald init`" + ` once, put the
line that it prints into the roster, and start conseald.`,
		Version: version, SilenceUsage: true, SilenceErrors: true, Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error { return run(c.Context(), file, logs) },
	}
	root.SetOut(out)
	root.PersistentFlags().StringVar(&file, "config", defaultConfig, "the host's configuration")
	root.AddCommand(
		&cobra.Command{
			Use: "check", Short: "Say everything that is wrong with the configuration and the roster", Args: cobra.NoArgs,
			RunE: func(*cobra.Command, []string) error { return check(file, out) },
		},
		&cobra.Command{
			Use: "config", Short: "Print the configuration in effect, and where each value comes from", Args: cobra.NoArgs,
			RunE: func(*cobra.Command, []string) error {
				c, err := config.Load(file)
				if err != nil {
					return err
				}
				return c.Print(out)
			},
		},
		initCommand(&file, out),
		hsmCommand(out),
		&cobra.Command{
			Use: "clear-pin-latch", Short: "Let the PIN of the HSM or TPM be tried again after it was refused", Args: cobra.NoArgs,
			Long: `Let the PIN of the HSM or TPM be tried again after it was refused.

A PIN that was refused is never sent again by itself, not even after a restart,
so that no loop of restarts locks the token or the TPM. Correct the PIN file first:
a PIN that changed needs this only after several failures, or, with a token, after a
crash inside a login.`,
			RunE: func(*cobra.Command, []string) error {
				c, err := config.Load(file)
				if err != nil {
					return err
				}
				if c.Protector.Kind == "tpm" {
					return tpm.ClearLatch(c.State)
				}
				err = hsm.ClearLatch(hsmFolder(c))
				if c.Protector.HSM.SecondURI != "" {
					err = errors.Join(err, hsm.ClearLatch(secondFolder(c)))
				}
				return err
			},
		},
	)
	return root
}

// run is the agent's life.
func run(ctx context.Context, file string, logs io.Writer) error {
	c, err := config.Load(file)
	if err != nil {
		return err
	}
	roster, err := config.LoadRoster(c.Roster)
	if err != nil {
		return err
	}
	log := logger(c, logs)
	if err := protectProcess(); err != nil {
		return err
	}
	hw, err := openHardware(ctx, c, log)
	if err != nil {
		return err
	}
	options := agent.Options{Config: c, Roster: roster, Protector: hw.protector, Identity: hw.identity, Version: version, Log: log}
	if hw.seal != nil {
		options.Seal = hw.seal
	}
	if c.Protector.Kind == "hsm" {
		options.Erasure, options.ErasureWhy = erasure(c)
	}
	a, err := agent.New(options)
	if err == nil {
		defer reload(a, log)()
		err = a.Run(ctx)
	}
	return errors.Join(err, hw.close())
}

// reload has the agent read its roster again at each SIGHUP, until the returned function
// is called.
func reload(a *agent.Agent, log *slog.Logger) (stop func()) {
	hup, done := make(chan os.Signal, 1), make(chan struct{})
	signal.Notify(hup, unix.SIGHUP)
	go func() {
		for {
			select {
			case <-done:
				return
			case <-hup:
				if _, err := a.LoadRoster(); err != nil {
					log.Error("the roster is not taken up", "error", err)
				}
			}
		}
	}()
	return func() { signal.Stop(hup); close(done) }
}

// protectProcess keeps the secrets in this process's memory from core files and
// from other processes of the same user.
func protectProcess() error {
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return fmt.Errorf("making the process non-dumpable: %w", err)
	}
	if err := unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{}); err != nil {
		return fmt.Errorf("forbidding core files: %w", err)
	}
	return nil
}

func logger(c *config.Host, w io.Writer) *slog.Logger {
	var level slog.Level
	_ = level.UnmarshalText([]byte(c.Log.Level)) // checked by config
	options := &slog.HandlerOptions{Level: level}
	if c.Log.Format == "json" {
		return slog.New(slog.NewJSONHandler(w, options))
	}
	return slog.New(slog.NewTextHandler(w, options))
}

// check reads both files, so that all that is wrong in either is said at once.
func check(file string, out io.Writer) error {
	c, err := config.Load(file)
	if c == nil {
		return err
	}
	roster, rosterErr := config.LoadRoster(c.Roster)
	if err := errors.Join(err, rosterErr); err != nil {
		return err
	}
	if _, ok := roster.Host(c.Name); !ok {
		return fmt.Errorf("%s has no host %q: `conseald init` prints the entry for it", c.Roster, c.Name)
	}
	_, err = fmt.Fprintf(out, "%s: good\n%s: good: fleet %s, version %d, %d hosts, %d keys\n",
		file, c.Roster, roster.Fleet, roster.Version, len(roster.Hosts), len(roster.Keys))
	return err
}
