//go:build cgo

package helper_test

import (
	"context"
	"crypto"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"conseal/hsm"
	"conseal/hsm/helper"
	"conseal/internal/pin"
	"conseal/internal/secret"
	"conseal/testenv"
)

// newFaulty is a host that was not provisioned, behind a module that can fail.
func newFaulty(t *testing.T) (helper.Config, *testenv.FaultModule) {
	t.Helper()
	cfg := newConfig(t)
	uri, err := hsm.ParseURI(cfg.HSM.URI)
	must(t, err)
	m, err := testenv.NewFaultModule(t.Context(), t.TempDir(), uri.ModulePath)
	must(t, err)
	cfg.HSM.URI = strings.Replace(cfg.HSM.URI, uri.ModulePath, m.Path, 1)
	return cfg, m
}

// TestAStopDuringTheLogin: who stops an agent that starts must not find the PIN refused at
// the next start, for the helper was killed with its PIN sent.
func TestAStopDuringTheLogin(t *testing.T) {
	cfg, m := newFaulty(t)
	_, err := helper.Provision(t.Context(), cfg)
	must(t, err)
	latch := filepath.Join(cfg.HSM.StateDir, "hsm-pin.latch")
	armed := func() bool { _, err := os.Stat(latch); return err == nil }
	logsIn := hang(t, m, "C_Login")
	ctx, stop := newAsked(t)
	done := make(chan error, 1)
	go func() { _, err := helper.Open(ctx, cfg); done <- err }()
	logsIn()
	if !armed() {
		t.Error("the PIN is sent and not in the latch")
	}
	stop()
	<-ctx.done // it knows
	must(t, m.Clear())
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Errorf("opening: %v", err)
	}
	if left := children(t, os.Getpid()); armed() || len(left) != 0 {
		t.Errorf("the PIN is sent and not judged: %t; helpers are left: %v", armed(), left)
	}
	open(t, cfg)
}

// hang lets the next call of a function hang, and returns what waits for that.
func hang(t *testing.T, m *testenv.FaultModule, call string) (hangs func()) {
	t.Helper()
	rule, err := m.Set(testenv.Fault{Call: call, Do: testenv.Hang, Times: 1})
	must(t, err)
	return func() {
		t.Helper()
		until(t, call+" hangs", func() bool {
			hits, err := m.Hits(rule)
			must(t, err)
			return hits == 1
		})
	}
}

// TestACrashInsideTheLoginCountsAsARefusal kills a helper with its PIN sent and not judged.
func TestACrashInsideTheLoginCountsAsARefusal(t *testing.T) {
	cfg, m := newFaulty(t)
	_, err := helper.Provision(t.Context(), cfg)
	must(t, err)
	h := open(t, cfg)
	logsIn := hang(t, m, "C_Login")
	must(t, unix.Kill(theHelper(t), unix.SIGKILL))
	done := make(chan error, 1)
	go func() { _, _, err := h.Seal(t.Context(), "k"); done <- err }()
	logsIn()
	must(t, unix.Kill(theHelper(t), unix.SIGKILL))
	if err := <-done; hsm.ClassOf(err) != hsm.ClassCrash || !strings.Contains(err.Error(), "counts as refused") {
		t.Errorf("the call: %v", err)
	}
	must(t, m.Clear())
	until(t, "the next helper is tried", func() bool { // after a pause
		if _, _, err = h.Seal(t.Context(), "k"); err == nil {
			t.Fatal("the PIN was sent again")
		}
		return !strings.Contains(err.Error(), "not tried again before")
	})
	if !errors.Is(err, pin.ErrRefused) || hsm.ClassOf(err) != hsm.ClassAuth || !strings.Contains(err.Error(), "before that") {
		t.Errorf("with the latch armed: %v", err)
	}
	must(t, hsm.ClearLatch(cfg.HSM.StateDir))
	until(t, "it works again", func() bool { _, _, err := h.Seal(t.Context(), "k"); return err == nil })
}

// TestAModuleThatFails has the library itself crash, abort, hang or wait, at a call of each
// operation: the agent lives, what may be repeated comes, and nothing is lost.
func TestAModuleThatFails(t *testing.T) {
	cfg, m := newFaulty(t)
	_, err := helper.Provision(t.Context(), cfg)
	must(t, err)
	h := open(t, cfg)
	root := secret.Random(32)
	must(t, h.SetRoot(t.Context(), root))
	key, blob, err := h.Seal(t.Context(), "k")
	must(t, err)
	identity, err := h.Identity(t.Context())
	must(t, err)
	digest := make([]byte, 32)
	operations := map[string]struct {
		call string
		do   func() error
	}{
		"seal": {"C_Encrypt", func() error { _, _, err := h.Seal(t.Context(), "another"); return err }},
		"open": {"C_Decrypt", func() error {
			got, err := h.Open(t.Context(), "k", blob)
			if err == nil && !got.Equal(key) {
				t.Error("another key opens")
			}
			return err
		}},
		"root": {"C_DecryptInit", func() error {
			got, err := h.Root(t.Context())
			if err == nil && !got.Equal(root) {
				t.Error("another root")
			}
			return err
		}},
		"sign": {"C_Sign", func() error { _, err := identity.Sign(nil, digest, crypto.SHA256); return err }},
	}
	for _, action := range []testenv.Action{testenv.Segv, testenv.Abort, testenv.Hang, testenv.Slow} {
		for name, o := range operations {
			t.Run(name+"/"+string(action), func(t *testing.T) {
				rule, err := m.Set(testenv.Fault{Call: o.call, Do: action, Value: 20, Times: 1})
				must(t, err)
				done := make(chan error, 1)
				go func() { done <- o.do() }()
				if action == testenv.Hang { // no less: a short timeout would end others on a slow machine
					until(t, "it hangs", func() bool { hits, err := m.Hits(rule); must(t, err); return hits == 1 })
					h.Expire()
				}
				err = <-done
				switch hang := hsm.ClassOf(err) == hsm.ClassHang; {
				case action == testenv.Hang && !hang:
					t.Errorf("it hung: %v", err)
				case action != testenv.Hang && err != nil:
					t.Errorf("not repeated: %v", err)
				}
				if hits, err := m.Hits(rule); err != nil || hits != 1 {
					t.Errorf("%d hits, %v", hits, err)
				}
				must(t, m.Clear())
				for name, o := range operations { // all of it works afterwards
					if err := o.do(); err != nil {
						t.Errorf("%s afterwards: %v", name, err)
					}
				}
			})
		}
	}
	for _, call := range []string{"C_GenerateKey", "C_Encrypt", "C_DestroyObject"} {
		t.Run("set root/"+call, func(t *testing.T) {
			rule, err := m.Set(testenv.Fault{Call: call, Do: testenv.Segv, Times: 1})
			must(t, err)
			next := secret.Random(32)
			err = h.SetRoot(t.Context(), next)
			if hits, hitErr := m.Hits(rule); hitErr != nil || hits != 1 {
				t.Fatalf("%d hits, %v", hits, hitErr)
			}
			must(t, m.Clear())
			got, rootErr := h.Root(t.Context())
			must(t, rootErr)
			switch {
			case got.Equal(next):
				root = next
			case err == nil || !got.Equal(root):
				t.Errorf("SetRoot says %v, and the root is neither the old nor the new one, or not the one it said", err)
			}
		})
	}
}
