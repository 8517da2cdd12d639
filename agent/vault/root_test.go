package vault_test

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"conseal/agent/vault"
)

var errHardware = errors.New("the hardware says no")

// TestSetRootFails: for each way in which a root may be set or not, a vote and an
// erasure happened or did not, whole, and Vault and disk agree.
func TestSetRootFails(t *testing.T) {
	for name, c := range map[string]struct {
		take, fail, happens bool
	}{
		"error but took effect":  {take: true, fail: true, happens: true},
		"error without effect":   {fail: true},
		"success without effect": {}, // a lie
	} {
		t.Run(name, func(t *testing.T) {
			v := newVault(t)
			must(t, v.stage(payments, n11))
			must(t, v.stage(payments, n12))
			v.hw.onSetRoot = func(take func()) error {
				if c.take {
					take()
				}
				if c.fail {
					return errHardware
				}
				return nil
			}
			for what, err := range map[string]error{"vote": v.vote(payments, n11), "drop": v.drop(payments, n12)} {
				if (err == nil) != c.happens || c.fail && err != nil && !errors.Is(err, errHardware) {
					t.Errorf("%s: %v", what, err)
				}
			}
			v.hw.onSetRoot = nil
			for range 2 {
				r, _ := v.Record(payments)
				if (r.Voted != nil) != c.happens || (len(r.Staged) == 1) != c.happens {
					t.Errorf("%+v", r)
				}
				v.wantLends(payments, n11)
				if !c.happens {
					v.wantLends(payments, n12)
				}
				v.reopen()
			}
			must(t, v.vote(payments, n11))
			must(t, v.drop(payments, n12))
			v.wantGone(payments, n12)
		})
	}
}

// TestUnsure: the hardware takes a root or does not, and then does not say which it
// has. Nothing is written until it does, and what it says decides.
func TestUnsure(t *testing.T) {
	for name, took := range map[string]bool{"took it": true, "did not": false} {
		for _, restart := range []bool{false, true} {
			t.Run(name, func(t *testing.T) {
				v := newVault(t)
				must(t, v.stage(payments, n11))
				must(t, v.stage(payments, n12))
				v.hw.onSetRoot = func(take func()) error {
					if took {
						take()
					}
					return errHardware
				}
				v.hw.onRoot = func() error { return errHardware }
				wantError(t, v.drop(payments, n12), vault.ErrUnsure)
				v.hw.onSetRoot = nil

				before, root := files(t, v.dir), v.hw.root()
				wantError(t, v.see(payments, 1), vault.ErrUnsure)
				wantError(t, v.stage(payments, n13), vault.ErrUnsure)
				wantError(t, v.vote(payments, n11), vault.ErrUnsure)
				wantError(t, v.activate(payments, n11), vault.ErrUnsure)
				wantError(t, v.drop(payments, n11), vault.ErrUnsure)
				wantSameFiles(t, v.dir, before)
				if !bytes.Equal(root, v.hw.root()) {
					t.Error("a root was set while it was unsure which there is")
				}
				v.wantLends(payments, n11) // signing goes on

				v.hw.onRoot = nil
				if restart {
					v.reopen()
				}
				must(t, v.vote(payments, n11))
				if took {
					v.wantGone(payments, n12)
				} else {
					v.wantLends(payments, n12)
				}
				v.reopen()
				v.wantLends(payments, n11)
				if r, _ := v.Record(payments); (len(r.Staged) == 1) != took || r.Voted == nil {
					t.Errorf("%+v", r)
				}
			})
		}
	}
}

// TestStrangeRoot: somebody else wrote the hardware's root.
func TestStrangeRoot(t *testing.T) {
	v := newVault(t)
	must(t, v.stage(payments, n11))
	v.hw.onSetRoot = func(func()) error {
		v.hw.held.Root = bytes.Repeat([]byte{7}, 32)
		return nil
	}
	wantError(t, v.vote(payments, n11), vault.ErrUnsure, "another agent")
	v.hw.onSetRoot = nil
	before := files(t, v.dir)
	wantError(t, v.vote(payments, n11), vault.ErrUnsure, "another agent")
	wantError(t, v.stage(payments, n12), vault.ErrUnsure)
	wantSameFiles(t, v.dir, before)
	v.wantOpenError(vault.ErrStale)
	wantSameFiles(t, v.dir, before)
}

// TestCallerLeaves: the caller's context ends inside SetRoot. Which root it is, is
// asked all the same.
func TestCallerLeaves(t *testing.T) {
	v := newVault(t)
	must(t, v.stage(payments, n11))
	ctx, cancel := context.WithCancel(t.Context())
	v.hw.onSetRoot = func(take func()) error {
		take()
		cancel()
		return ctx.Err()
	}
	must(t, v.Vote(ctx, payments, n11, output(payments, n11)))
	v.hw.onSetRoot = nil
	must(t, v.stage(payments, n12))
	wantError(t, v.Drop(ctx, []vault.Drop{{Key: payments, Number: n12}}), context.Canceled)
	v.wantLends(payments, n12)
	v.reopen()
	v.wantLends(payments, n11, n12)
	must(t, v.vote(payments, n11))
}

func TestCreateFails(t *testing.T) {
	for name, c := range map[string]struct{ take, unsure bool }{
		"took it":           {take: true},
		"did not":           {},
		"took it, not said": {take: true, unsure: true},
		"did not, not said": {unsure: true},
	} {
		t.Run(name, func(t *testing.T) {
			hw, dir := newHardware(), filepath.Join(t.TempDir(), "vault")
			asked := 0
			hw.onRoot = func() error {
				if asked++; c.unsure && asked > 1 {
					return errHardware
				}
				return nil
			}
			hw.onSetRoot = func(take func()) error {
				if c.take {
					take()
				}
				return errHardware
			}
			err := vault.Create(t.Context(), dir, host, hw)
			if (err == nil) != (c.take && !c.unsure) {
				t.Errorf("the first Create: %v", err)
			}
			if c.unsure {
				wantError(t, err, vault.ErrUnsure)
			}
			hw.onRoot, hw.onSetRoot = nil, nil
			if !c.take {
				_, err := vault.Open(t.Context(), dir, host, hw)
				wantError(t, err, vault.ErrNotProvisioned)
			}
			if err := vault.Create(t.Context(), dir, host, hw); errors.Is(err, vault.ErrExists) != c.take || err != nil && !c.take {
				t.Errorf("the second Create: %v", err)
			}
			v := &testVault{t: t, dir: dir, hw: hw}
			v.reopen()
			v.born(payments, n11)
			v.Close()
			if _, err := os.Stat(filepath.Join(dir, "unfinished")); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("the mark of an unfinished vault is there: %v", err)
			}
		})
	}
}

// TestNoRoot: the hardware was cleared or replaced. Nothing is overwritten.
func TestNoRoot(t *testing.T) {
	v := newVault(t)
	v.born(payments, n11)
	must(t, v.stage(payments, n12))
	v.Close()
	v.Vault = nil
	root, before := v.hw.root(), files(t, v.dir)
	v.hw.setRootTo(nil)
	v.wantOpenError(vault.ErrNoRoot, "recovered by the others")
	wantError(t, vault.Create(t.Context(), v.dir, host, v.hw), vault.ErrNoRoot)
	if len(slotsIn(before)) != 2 {
		t.Fatalf("the test means to take away one of two slots: %v", slotsIn(before))
	}
	for _, slot := range slotsIn(before) { // one alone is a vault too
		must(t, os.Remove(filepath.Join(v.dir, slot)))
		wantError(t, vault.Create(t.Context(), v.dir, host, v.hw), vault.ErrNoRoot)
		must(t, os.WriteFile(filepath.Join(v.dir, slot), before[slot], 0o600))
	}
	wantSameFiles(t, v.dir, before)
	if v.hw.root() != nil {
		t.Error("a root was set")
	}
	v.hw.setRootTo(root) // the old hardware was found
	v.reopen()
	v.wantLends(payments, n11, n12)
}

func slotsIn(files map[string][]byte) (out []string) {
	for _, slot := range []string{"manifest.0", "manifest.1"} {
		if _, ok := files[slot]; ok {
			out = append(out, slot)
		}
	}
	return out
}

// TestEmptyFolderOnUsedHardware: the state folder is not mounted. Nothing is made,
// so that the root, and with it the real folder, survives.
func TestEmptyFolderOnUsedHardware(t *testing.T) {
	v := newVault(t)
	v.born(payments, n11)
	root := v.hw.root()
	wantError(t, vault.Create(t.Context(), filepath.Join(t.TempDir(), "vault"), host, v.hw), vault.ErrStale)
	if !bytes.Equal(root, v.hw.root()) {
		t.Error("the root was replaced")
	}
	v.reopen()
	v.wantLends(payments, n11)
}
