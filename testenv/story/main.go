// Command story runs one story and prints each step as it happens:
//
//	go run ./testenv/story demo
//
// It ends with "NAME: ok", or with the reason and status 1.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strings"

	"github.com/rogpeppe/go-internal/testscript"
	"golang.org/x/sys/unix"

	"conseal/testenv"
)

const dir = "cmd/conseal/testdata"

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, unix.SIGTERM)
	err := run(ctx, os.Args[1:])
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "story:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) error {
	stories, _ := filepath.Glob(filepath.Join(dir, "*.txtar"))
	if len(args) != 1 {
		return fmt.Errorf("usage: make story NAME=...; there are: %s", names(stories))
	}
	file := filepath.Join(dir, args[0]+".txtar")
	if _, err := os.Stat(file); err != nil {
		return fmt.Errorf("no story %q; there are: %s", args[0], names(stories))
	}
	bin, err := testenv.Build(ctx)
	if err != nil {
		return err
	}
	defer testenv.Clean()
	p, ended := testenv.Stories(ctx, bin, "", os.Stdout)
	p.Files = []string{file}
	t := &runner{}
	t.Run(args[0], func(t testscript.T) { testscript.RunT(t, p) })
	switch {
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case t.failed || ended() != 1:
		return fmt.Errorf("%s failed", args[0])
	}
	fmt.Printf("\n%s: ok\n", args[0])
	return nil
}

func names(stories []string) string {
	var out []string
	for _, s := range stories {
		out = append(out, strings.TrimSuffix(filepath.Base(s), ".txtar"))
	}
	return strings.Join(out, ", ")
}

var errFailed = errors.New("failed")

// runner is testscript's T outside of a test. FailNow unwinds by a panic that
// Run recovers, as testing does by ending the goroutine.
type runner struct{ failed bool }

func (r *runner) Skip(...any) { r.FailNow() }
func (r *runner) Fatal(args ...any) {
	fmt.Fprintln(os.Stderr, args...)
	r.FailNow()
}
func (r *runner) Parallel() {}
func (r *runner) Log(args ...any) {
	if r.failed {
		fmt.Fprintln(os.Stderr, args...)
	}
}
func (r *runner) FailNow() {
	r.failed = true
	panic(errFailed)
}
func (r *runner) Verbose() bool { return false }
func (r *runner) Run(_ string, fn func(testscript.T)) {
	defer func() {
		if v := recover(); v != nil && v != any(errFailed) {
			panic(v)
		}
	}()
	fn(r)
}
