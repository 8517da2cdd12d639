package main_test

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"conseal/testenv"
)

// hsmHost is a host with a token, configured and not initialised.
type hsmHost struct {
	bin   testenv.Binaries
	dir   string
	token *testenv.Token
}

func newHSMHost(t *testing.T) *hsmHost {
	t.Helper()
	bin, err := testenv.Build(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	h := &hsmHost{bin: bin, dir: t.TempDir()}
	if h.token, err = testenv.NewToken(t.Context(), h.dir); err != nil {
		t.Fatal(err)
	}
	h.configure(t)
	return h
}

func (h *hsmHost) state() string { return filepath.Join(h.dir, "state") }

// configure writes the configuration, with more in the end.
func (h *hsmHost) configure(t *testing.T, more ...string) {
	t.Helper()
	text := fmt.Sprintf("name = 'alpha'\nstate = %q\nprotector.kind = 'hsm'\n[protector.hsm]\nuri = %q\nmodules = [%q]\n%s\n",
		h.state(), h.token.URI, h.token.Module, strings.Join(more, "\n"))
	if err := os.WriteFile(filepath.Join(h.dir, "conseal.toml"), []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

// run runs conseald, and gives what it said.
func (h *hsmHost) run(ctx context.Context, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, h.bin.Agent, append(args, "--config", filepath.Join(h.dir, "conseal.toml"))...)
	cmd.Env = append(os.Environ(), h.token.Env()...)
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// must runs conseald, which succeeds and says all of what is wanted.
func (h *hsmHost) must(t *testing.T, args []string, want ...string) {
	t.Helper()
	out, err := h.run(t.Context(), args...)
	h.wants(t, out, want)
	if err != nil {
		t.Fatalf("conseald %q: %v: %s", args, err, out)
	}
}

// fails runs conseald, which fails and says all of what is wanted.
func (h *hsmHost) fails(t *testing.T, args []string, want ...string) {
	t.Helper()
	out, err := h.run(t.Context(), args...)
	h.wants(t, out, want)
	if err == nil {
		t.Fatalf("conseald %q: %s", args, out)
	}
}

func (h *hsmHost) wants(t *testing.T, out string, want []string) {
	t.Helper()
	for _, w := range want {
		if !strings.Contains(out, w) {
			t.Errorf("no %q in: %s", w, out)
		}
	}
}

// TestUndoTouchesNothingElse leaves another host's objects, and says what is wrong if
// there is no module.
func TestUndoTouchesNothingElse(t *testing.T) {
	defer testenv.Clean()
	h := newHSMHost(t)
	h.must(t, []string{"init"}, "erasure: host-file, a guess: it calls itself SoftHSM")
	conf := filepath.Join(h.dir, "conseal.toml")
	text, err := os.ReadFile(conf)
	if err != nil {
		t.Fatal(err)
	}
	write := func(replaced ...string) {
		t.Helper()
		if err := os.WriteFile(conf, []byte(strings.NewReplacer(replaced...).Replace(string(text))), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write(h.token.Module, "/usr/lib/none.so")
	h.fails(t, []string{"init", "--undo", "--confirm", "alpha"}, "/usr/lib/none.so")
	write("'alpha'", "'beta'") // this folder is alpha's
	h.fails(t, []string{"init", "--undo", "--confirm", "beta"}, "object conseal/beta/sentinel is not in the token", "empty that folder")
	h.fails(t, []string{"init"}, "object conseal/beta/sentinel is not in the token")
	if _, err := os.Stat(filepath.Join(h.state(), "vault", "class-held.sealed")); err != nil {
		t.Errorf("alpha's vault: %v", err)
	}
	write("'alpha'", "'beta'", h.state(), h.state()+"-of-beta")
	h.must(t, []string{"init", "--undo", "--confirm", "beta"}, "conseal/beta/wrap: not there")
	if left := h.objects(t); len(left) != 5 {
		t.Errorf("%d objects of the other host are left, want 5: %q", len(left), left)
	}
}

// objects are the files of all objects in the host's tokens.
func (h *hsmHost) objects(t *testing.T) []string {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(h.token.Store, "*", "*.object"))
	if err != nil {
		t.Fatal(err)
	}
	return slices.DeleteFunc(files, func(f string) bool { return filepath.Base(f) == "token.object" })
}

// TestInitWithTwoTokens follows the operator of a pair: the first token, copied, and
// both.
func TestInitWithTwoTokens(t *testing.T) {
	defer testenv.Clean()
	h := newHSMHost(t)
	first := *h.token
	other, err := testenv.NewToken(t.Context(), h.dir)
	if err != nil {
		t.Fatal(err)
	}
	h.configure(t, fmt.Sprintf("second_uri = %q", other.URI))
	h.fails(t, []string{"init"}, "identity key pair conseal/alpha/identity: it is not in the second token: copy it there")
	second, err := first.Copy()
	if err != nil {
		t.Fatal(err)
	}
	h.configure(t, fmt.Sprintf("second_uri = %q", second.URI))
	for _, vault := range []string{"made", "already there"} {
		h.must(t, []string{"init"}, "wrapping key conseal/alpha/wrap: already there", "vault "+h.state()+"/vault: "+vault, "identity = \"")
	}
	back, err := second.Take()
	if err != nil {
		t.Fatal(err)
	}
	h.fails(t, []string{"init"}, second.Serial)
	if err := back(); err != nil {
		t.Fatal(err)
	}
	h.must(t, []string{"clear-pin-latch"})
	h.configure(t) // the second is forgotten, and has the root
	for _, args := range [][]string{{"init"}, {"init", "--undo", "--confirm", "alpha"}} {
		h.fails(t, args, "second_uri is empty", "conseal/alpha/root-second")
	}
	h.configure(t, fmt.Sprintf("second_uri = %q", second.URI))

	h.fails(t, []string{"init", "--undo"}, "for good", "--confirm alpha")
	gone := []string{"conseal/alpha/identity: destroyed, 2 of them", "conseal/alpha/root: destroyed, 1 of them", "conseal/alpha/root-second: destroyed, 1 of them", "/vault: removed", "/hsm: removed", "/hsm-second: removed"}
	h.must(t, []string{"init", "--undo", "--confirm", "alpha"}, gone...)
	h.must(t, []string{"init", "--undo", "--confirm", "alpha"}, "conseal/alpha/sentinel: not there") // nothing is left
	if left := h.objects(t); len(left) > 0 {
		t.Errorf("left in the tokens: %q", left)
	}
}
