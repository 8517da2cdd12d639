package main_test

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
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
}
