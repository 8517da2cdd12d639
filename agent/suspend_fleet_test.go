package agent_test

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// TestSuspensionOutlastsProcesses kills hosts as soon as they have said that they are
// suspended, and puts older folders back, on both kinds of hardware.
func TestSuspensionOutlastsProcesses(t *testing.T) {
	ctx, f := newFleet(t)
	must(t, f.Start(ctx))
	must(t, f.WaitReady(ctx, "first"))
	must(t, f.Stop(ctx))
	for _, name := range []string{"alpha", "gamma"} { // a TPM and an HSM
		h := f.Host(name)
		older := filepath.Join(f.Dir, "older-"+name)
		copyFolder(t, h.State(), older)
		must(t, f.Start(ctx))
		must(t, f.WaitReady(ctx, "first"))
		before := time.Now().Add(-time.Second)
		r, err := h.Client().Suspend(ctx, "first", false, "an alarm")
		must(t, err)
		h.Kill()
		if k := r.Keys[0]; r.Warning != "" || k.Condition != "suspended" || len(k.Live) != 2 {
			t.Errorf("%s answered %v", name, r)
		}
		for range 2 {
			must(t, h.Start(ctx))
			waitCondition(ctx, t, h, "first", "suspended", "on this host: an alarm")
			_, err = h.Client().Sign(ctx, "first", []byte("m"))
			if reason(err) != "KEY_SUSPENDED" || !strings.Contains(err.Error(), fmt.Sprint(before.UTC().Year())) {
				t.Errorf("asked on %s: %v", name, err)
			}
			waitCondition(ctx, t, f.Host("beta"), "first", "ready", "")
			signed, err := f.Host("beta").Client().Sign(ctx, "first", []byte("m"))
			must(t, err)
			if slices.Contains(signed.Signers, name) {
				t.Errorf("%s signed", name)
			}
			must(t, h.Stop(ctx))
		}
		// Without the marker the manifest has it; the folder of before does not open.
		must(t, os.Remove(filepath.Join(h.State(), "suspended")))
		must(t, h.Start(ctx))
		waitCondition(ctx, t, h, "first", "suspended", "only the manifest had it")
		must(t, h.Stop(ctx))
		now := filepath.Join(f.Dir, "now-"+name)
		copyFolder(t, h.State(), now)
		copyFolder(t, older, h.State())
		if err := h.Start(ctx); err == nil {
			if _, err := h.Client().Sign(ctx, "first", []byte("m")); reason(err) != "KEY_NOT_READY" {
				t.Errorf("%s with the folder of before: %v", name, err)
			}
			must(t, h.Stop(ctx))
		}
		copyFolder(t, now, h.State())
		must(t, h.Start(ctx))
		waitCondition(ctx, t, h, "first", "suspended", "on this host")
		_, err = h.Client().Resume(ctx, "first", false)
		must(t, err)
		h.Kill()
		must(t, h.Start(ctx))
		must(t, f.WaitReady(ctx, "first"))
		checkKey(ctx, t, f, "first")
		must(t, f.Stop(ctx))
	}
}
