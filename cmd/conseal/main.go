// Command conseal is what people and scripts type: it asks the agent's sockets,
// or works on files.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"conseal/agent/api"
)

// version is set by the linker.
var version = "devel"

// Exit codes, as `conseal help exit-codes` explains them.
const (
	exitError   = 1 // anything else
	exitUsage   = 2 // the command line is wrong
	exitRefused = 3 // the agent refused: not allowed, unknown key, wrong input
	exitNotNow  = 4 // the agent or a quorum is not there now: try again later
	exitInvalid = 5 // verify: the signature is not valid
	exitAtRisk  = 6 // recovery drill: the loss of one host would lose a key
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, unix.SIGTERM)
	err := command(os.Stdin, os.Stdout).ExecuteContext(ctx)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "conseal:", err)
	}
	os.Exit(exitCode(err))
}

// usageError is a command line that is wrong.
type usageError struct{ error }

// invalidError is a signature that does not verify.
type invalidError struct{ error }

func exitCode(err error) int {
	var agent *api.Error
	switch {
	case err == nil:
		return 0
	case errors.As(err, &usageError{}):
		return exitUsage
	case errors.As(err, &invalidError{}):
		return exitInvalid
	case errors.As(err, &atRiskError{}):
		return exitAtRisk
	case errors.As(err, &agent):
		switch agent.Code {
		case connect.CodeUnavailable, connect.CodeDeadlineExceeded, connect.CodeResourceExhausted, connect.CodeCanceled:
			return exitNotNow
		case connect.CodeInternal, connect.CodeUnknown:
			return exitError
		}
		return exitRefused
	}
	return exitError
}

// env is what all verbs share.
type env struct {
	in     io.Reader
	out    io.Writer
	socket string // of the verb that runs
	json   bool
}

func command(in io.Reader, out io.Writer) *cobra.Command {
	e := &env{in: in, out: out}
	root := &cobra.Command{
		Use:   "conseal",
		Short: "Sign with keys that several hosts hold together",
		Long: `Sign with keys that several hosts hold together.

conseal asks the agent of this host (conseald) over its unix sockets. Services
and people who sign use the sign socket; who may use which key is in the roster.`,
		Version:       version,
		SilenceUsage:  true,
		SilenceErrors: true,
	}
	groups(root)
	root.SetOut(out)
	root.SetFlagErrorFunc(func(c *cobra.Command, err error) error {
		return usageError{fmt.Errorf("%w; see `%s --help`", err, c.CommandPath())}
	})
	root.PersistentFlags().BoolVar(&e.json, "json", false, "print JSON, for programs")
	root.AddCommand(statusCommand(e), keysCommand(e), keyCommand(e), signCommand(e), verifyCommand(e), rosterCommand(e), recoveryCommand(e), sealCommand(e), suspendCommand(e), resumeCommand(e), exitCodesTopic())
	return root
}

// groups makes a command that only groups others refuse what is none of them.
func groups(c *cobra.Command) *cobra.Command {
	c.Args = func(c *cobra.Command, a []string) error {
		if len(a) > 0 {
			return usageError{fmt.Errorf("unknown command %q; see `%s --help`", a[0], c.CommandPath())}
		}
		return nil
	}
	c.RunE = func(c *cobra.Command, _ []string) error { return c.Help() }
	return c
}

// socketFlag adds --socket; CONSEAL_SIGN_SOCKET or CONSEAL_ADMIN_SOCKET in the
// environment sets its default.
func (e *env) socketFlag(c *cobra.Command, variable, fallback string) {
	if s := os.Getenv(variable); s != "" {
		fallback = s
	}
	socket := c.Flags().String("socket", fallback, "the agent's socket; "+variable+" sets the default")
	c.PreRun = func(*cobra.Command, []string) { e.socket = *socket }
}

// dial refuses a path that is no socket with words that help.
func (e *env) dial() (*api.Client, error) {
	info, err := os.Stat(e.socket)
	switch {
	case errors.Is(err, os.ErrNotExist):
		return nil, &api.Error{Code: connect.CodeUnavailable, Reason: "NO_AGENT", Text: "no agent: there is no socket " + e.socket,
			Next: "start conseald, or name its socket with --socket"}
	case errors.Is(err, os.ErrPermission):
		return nil, &api.Error{Code: connect.CodePermissionDenied, Reason: "NOT_ALLOWED", Text: err.Error(),
			Next: "run as a user of the socket's group (sign socket) or as root (admin socket)"}
	case err != nil:
		return nil, err
	case info.Mode().Type() != os.ModeSocket:
		return nil, usageError{fmt.Errorf("%s is no socket", e.socket)}
	}
	return api.Dial(e.socket), nil
}

// args refuses another number of arguments than the verb takes.
func args(least, most int) cobra.PositionalArgs {
	return func(c *cobra.Command, a []string) error {
		if len(a) < least || len(a) > most {
			return usageError{fmt.Errorf("usage: %s", c.UseLine())}
		}
		return nil
	}
}

func exitCodesTopic() *cobra.Command {
	return &cobra.Command{
		Use:   "exit-codes",
		Short: "What conseal's exit codes mean",
		Long: `0  done
1  something else failed; the message says what
2  the command line is wrong
3  the agent refused: not allowed, unknown key, unusable input
4  the agent, or a quorum of hosts, is not there now: try again later
5  verify: the signature is not valid
6  recovery drill: the loss of one host would lose a key for good`,
	}
}
