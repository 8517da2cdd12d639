package tpm_test

import (
	"fmt"
	"strings"
	"testing"

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
