package main_test

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"testing"

	"conseal/testenv"
)

// TestALostDisk is how a host whose state folder is gone comes back on its own hardware,
// as docs/operations.md says: undone with what is left, and initialised anew.
func TestALostDisk(t *testing.T) {
	defer testenv.Clean()
	t.Run("hsm", func(t *testing.T) {
		h := newHSMHost(t)
		lostDisk(t, h)
	})
	t.Run("tpm", func(t *testing.T) {
		bin, err := testenv.Build(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		h := &hsmHost{bin: bin, dir: t.TempDir(), token: &testenv.Token{}}
		swtpm, err := testenv.StartTPM(t.Context(), filepath.Join(h.dir, "tpm"))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(swtpm.Kill)
		text := fmt.Sprintf("name = 'alpha'\nstate = %q\nprotector.kind = 'tpm'\nprotector.tpm.device = %q\n", h.state(), swtpm.Address())
		if err := os.WriteFile(filepath.Join(h.dir, "conseal.toml"), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		lostDisk(t, h)
	})
}

func lostDisk(t *testing.T, h *hsmHost) {
	t.Helper()
	pin := regexp.MustCompile(`identity = "sha256:[0-9a-f]{64}"`)
	identity := func() string {
		out, err := h.run(t.Context(), "init")
		if err != nil || !pin.MatchString(out) {
			t.Fatalf("init: %v: %s", err, out)
		}
		return pin.FindString(out)
	}
	before := identity()
	if err := os.RemoveAll(h.state()); err != nil {
		t.Fatal(err)
	}
	h.fails(t, []string{"init"}, "older") // it is not taken for a new host
	h.must(t, []string{"init", "--undo", "--confirm", "alpha"}, "removed")
	if after := identity(); after == before {
		t.Error("the host has the identity of before: the roster would not have to pin another")
	}
}
