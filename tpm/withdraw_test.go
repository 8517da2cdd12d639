package tpm_test

import (
	"fmt"
	"strings"
	"testing"

	"github.com/google/go-tpm/tpm2"

	"conseal/testenv"
	"conseal/tpm"
)

// A host that leaves takes its root with it, and nothing of anybody else.
func TestWithdraw(t *testing.T) {
	m := newTeam(t)
	h := newGovernedHost(t, m, 4)
	m.allow(t, h, "now")
	setRoot(t, h.TPM)
	neighbour := h.cfg
	neighbour.NVRoot, neighbour.NVReceipts, neighbour.Authority, neighbour.SRKName, neighbour.Identity = 0x01800700, 0x01800702, nil, nil, nil
	neighbour = remember(neighbour, provision(t, neighbour))
	d := open(t, neighbour)
	root := setRoot(t, d)

	stranger := neighbour // its record, with our index
	stranger.NVRoot = h.cfg.NVRoot
	if _, err := tpm.Withdraw(t.Context(), stranger); err == nil {
		t.Error("an index of another was removed")
	}
	for _, word := range []string{"removed", "already gone"} {
		steps, err := tpm.Withdraw(t.Context(), h.cfg)
		if err != nil {
			t.Fatal(err)
		}
		if n := strings.Count(fmt.Sprint(steps), word); n != 3 {
			t.Errorf("%d of three indices %s: %q", n, word, steps)
		}
	}
	_, err := h.Root(t.Context())
	wantClass(t, err, tpm.ClassLost)
	wantRoot(t, d, root)
	wantNoHandles(t, h.tap)
}

// Somebody on the bus says that the root is gone already. It is not, and not said to be.
func TestWithdrawOverABadBus(t *testing.T) {
	h := newHost(t, 4)
	root := setRoot(t, h.TPM)
	hit := false
	h.tap.Intercept(func(cmd []byte, next testenv.Exchange) ([]byte, error) {
		if code(cmd) == tpm2.TPMCCNVReadPublic {
			hit = true
			return []byte{0x80, 0x01, 0, 0, 0, 10, 0, 0, 0x01, 0x8b}, nil // TPM_RC_HANDLE
		}
		return next(cmd)
	})
	steps, err := tpm.Withdraw(t.Context(), h.cfg)
	_, readErr := h.Root(t.Context())
	h.tap.Intercept(nil)
	if !hit || err == nil || len(steps) > 0 {
		t.Errorf("it says %q, %v", steps, err)
	}
	wantClass(t, err, tpm.ClassReset)
	wantClass(t, readErr, tpm.ClassReset) // not lost
	wantRoot(t, h.TPM, root)
	wantNoHandles(t, h.tap)
}

// What Withdraw leaves: blobs that somebody kept. One that signed policies govern does not
// open, also not by a policy that the counter has left behind when it is made again.
func TestKeptBlobsAfterWithdraw(t *testing.T) {
	m := newTeam(t)
	for name, h := range map[string]*host{"fixed": newHost(t, 4), "governed": newGovernedHost(t, m, 4)} {
		if name == "governed" {
			m.allow(t, h, "now")
		}
		key, blob := seal(t, h.TPM, "k")
		wantOpens(t, h.TPM, "k", blob, key)
		if _, err := tpm.Withdraw(t.Context(), h.cfg); err != nil {
			t.Fatal(err)
		}
		if _, err := h.Identity(t.Context(), h.made.Identity); err != nil {
			t.Errorf("%s: the documentation says that the identity key signs: %v", name, err)
		}
		again := h.cfg
		again.SRKName, again.PCRWanted, again.Identity = nil, nil, nil
		for _, when := range []string{"after", "initialised again"} {
			got, err := h.Open(t.Context(), "k", blob)
			if opens := err == nil && got.Equal(key); opens != (name == "fixed") {
				t.Errorf("%s, %s: opens: %t, %v", name, when, opens, err)
			}
			provision(t, again)
		}
	}
}
