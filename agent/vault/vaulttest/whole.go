package vaulttest

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"path/filepath"
	"sync/atomic"
	"testing"

	"conseal/agent/vault"
	"conseal/internal/secret"
)

const host = "web1"

var (
	payments = vault.KeyID{Name: "payments", Incarnation: 1}
	first    = vault.Number{Roster: 1, Attempt: 1}
	second   = vault.Number{Roster: 1, Attempt: 2}
	third    = vault.Number{Roster: 2, Attempt: 1}
)

// content is what the tests stage as the share of an epoch.
func content(n vault.Number) []byte {
	b := sha256.Sum256([]byte("share " + n.String()))
	return b[:]
}

func output(n vault.Number) vault.Output {
	return sha256.Sum256([]byte("output " + n.String()))
}

func create(t *testing.T, h Host) (dir string, v *vault.Vault) {
	t.Helper()
	dir = filepath.Join(t.TempDir(), "vault")
	must(t, vault.Create(t.Context(), dir, host, h.Protector))
	return dir, openVault(t, dir, h.Protector)
}

func openVault(t *testing.T, dir string, p vault.Protector) *vault.Vault {
	t.Helper()
	v, err := vault.Open(t.Context(), dir, host, p)
	must(t, err)
	t.Cleanup(v.Close)
	return v
}

func stage(t *testing.T, v *vault.Vault, class vault.Class, n vault.Number) {
	t.Helper()
	share := secret.Copy(content(n))
	defer share.Wipe()
	must(t, v.Stage(t.Context(), class, payments, n, output(n), vault.Origin{}, []byte("public "+n.String()), share))
}

func wantLends(t *testing.T, v *vault.Vault, n vault.Number) {
	t.Helper()
	must(t, v.Lend(t.Context(), payments, n, func(b []byte) error {
		if !bytes.Equal(b, content(n)) {
			t.Errorf("epoch %s: it is another share", n)
		}
		return nil
	}))
}

// wantGone shows that a share is neither lent nor known.
func wantGone(t *testing.T, v *vault.Vault, n vault.Number) {
	t.Helper()
	err := v.Lend(t.Context(), payments, n, func([]byte) error {
		t.Errorf("epoch %s was lent", n)
		return nil
	})
	if !errors.Is(err, vault.ErrNoShare) {
		t.Errorf("epoch %s: %v, want ErrNoShare", n, err)
	}
}

func testVault(t *testing.T, newHost func(t *testing.T) Host) {
	h := newHost(t)
	dir := filepath.Join(t.TempDir(), "vault")
	if _, err := vault.Open(t.Context(), dir, host, h.Protector); !errors.Is(err, vault.ErrNotProvisioned) {
		t.Errorf("opening nothing: %v", err)
	}
	must(t, vault.Create(t.Context(), dir, host, h.Protector))
	if err := vault.Create(t.Context(), dir, host, h.Protector); !errors.Is(err, vault.ErrExists) {
		t.Errorf("creating it twice: %v", err)
	}
	v := openVault(t, dir, h.Protector)
	must(t, v.See(t.Context(), payments, output(first)))
	stage(t, v, vault.Held, first)
	stage(t, v, vault.Held, second)
	must(t, v.Vote(t.Context(), payments, second, output(second)))
	must(t, v.Activate(t.Context(), payments, second, []byte("certificate")))
	wantLends(t, v, first)
	must(t, v.Drop(t.Context(), []vault.Drop{{Key: payments, Number: first}}))
	wantGone(t, v, first)
	wantLends(t, v, second)
	want, _ := v.Record(payments)
	v.Close()

	v = openVault(t, dir, h.Reopen())
	got, ok := v.Record(payments)
	if !ok || got.Active != second || *got.Voted != *want.Voted || len(got.Staged) != 1 || got.Entry != want.Entry {
		t.Errorf("after opening again: %+v, want %+v", got, want)
	}
	if s := v.Stats(); s.Keys != 1 || s.Roots != 3 {
		t.Errorf("%d keys, %d roots, want 1, and 3 for Create, Vote and Drop", s.Keys, s.Roots)
	}
	wantGone(t, v, first)
	wantLends(t, v, second)
	certificate, err := v.Certificate(payments)
	if err != nil || string(certificate) != "certificate" {
		t.Errorf("certificate %q: %v", certificate, err)
	}
	public, err := v.Public(payments, second)
	if err != nil || string(public) != "public "+second.String() {
		t.Errorf("public output %q: %v", public, err)
	}
}

// testOtherHost copies a host's folder to hardware that has a root of its own, and
// to hardware that has none. It is refused and stays as it is.
func testOtherHost(t *testing.T, newHost func(t *testing.T) Host) {
	h, other := newHost(t), newHost(t)
	dir, v := create(t, h)
	stage(t, v, vault.Held, first)
	v.Close()

	stolen := save(t, dir)
	if _, err := vault.Open(t.Context(), stolen, host, other.Protector); !errors.Is(err, vault.ErrNoRoot) {
		t.Errorf("on hardware without a root: %v", err)
	}
	if err := vault.Create(t.Context(), stolen, host, other.Protector); !errors.Is(err, vault.ErrNoRoot) {
		t.Errorf("creating one over it: %v", err)
	}
	_, mine := create(t, other)
	mine.Close()
	if _, err := vault.Open(t.Context(), stolen, host, other.Protector); !errors.Is(err, vault.ErrStale) {
		t.Errorf("on hardware with another root: %v", err)
	}
	if err := vault.Create(t.Context(), stolen, host, other.Protector); !errors.Is(err, vault.ErrStale) {
		t.Errorf("creating one over it: %v", err)
	}
	wantLends(t, openVault(t, stolen, h.Reopen()), first) // the copy was whole, and nothing was done to it
}

// testOlderFolder puts a folder back that was saved before a vote.
func testOlderFolder(t *testing.T, newHost func(t *testing.T) Host) {
	h := newHost(t)
	dir, v := create(t, h)
	stage(t, v, vault.Held, first)
	before := save(t, dir)
	must(t, v.Vote(t.Context(), payments, first, output(first)))
	v.Close()
	after := save(t, dir)

	putBack(t, dir, before)
	if _, err := vault.Open(t.Context(), dir, host, h.Protector); !errors.Is(err, vault.ErrStale) {
		t.Errorf("a folder that forgot a vote: %v", err)
	}
	if err := vault.Create(t.Context(), dir, host, h.Protector); !errors.Is(err, vault.ErrStale) {
		t.Errorf("creating one over it: %v", err)
	}
	putBack(t, dir, after)
	v = openVault(t, dir, h.Reopen())
	if r, _ := v.Record(payments); r.Voted == nil || r.Voted.Number != first {
		t.Errorf("the vote is gone: %+v", r)
	}
	wantLends(t, v, first)
}

// testErasedShare puts back, one after the other, every state of the disk from
// before an erasure, the protector's own files too.
func testErasedShare(t *testing.T, newHost func(t *testing.T) Host) {
	h := newHost(t)
	dir, v := create(t, h)
	type copies struct{ vault, state string }
	var saved []copies
	remember := func() { saved = append(saved, copies{save(t, dir), save(t, h.State)}) }
	stage(t, v, vault.Held, first)
	remember()
	stage(t, v, vault.Held, second)
	remember()
	stage(t, v, vault.Held, third)
	must(t, v.Vote(t.Context(), payments, second, output(second)))
	must(t, v.Activate(t.Context(), payments, second, []byte("certificate")))
	remember()
	wantLends(t, v, first)
	must(t, v.Drop(t.Context(), []vault.Drop{{Key: payments, Number: first}}))
	v.Close()
	present := copies{save(t, dir), save(t, h.State)}

	for i, c := range saved {
		for _, state := range []string{present.state, c.state} {
			putBack(t, dir, c.vault)
			putBack(t, h.State, state)
			if v, err := vault.Open(t.Context(), dir, host, h.Reopen()); err == nil {
				t.Errorf("copy %d opens", i)
				v.Close()
			} else if (h.State == "" || state == present.state) && !errors.Is(err, vault.ErrStale) {
				t.Errorf("copy %d: %v, want ErrStale", i, err)
			}
		}
	}
	putBack(t, dir, present.vault)
	putBack(t, h.State, present.state)
	v = openVault(t, dir, h.Reopen())
	wantGone(t, v, first)
	wantLends(t, v, second)
	wantLends(t, v, third)
}

// counting counts how often the hardware is asked for a sealed key.
type counting struct {
	vault.Protector
	opened atomic.Int64
}

func (c *counting) Open(ctx context.Context, id string, blob []byte) (*secret.Bytes, error) {
	c.opened.Add(1)
	return c.Protector.Open(ctx, id, blob)
}

// testOwnShare has shares rest under keys of their own, staged so or moved, and puts
// the folder back in which one of them still rested under the class key.
func testOwnShare(t *testing.T, newHost func(t *testing.T) Host) {
	h := newHost(t)
	p := &counting{Protector: h.Protector}
	h.Protector = p
	dir, v := create(t, h)
	stage(t, v, vault.Own, first)
	stage(t, v, vault.Held, second)
	before := save(t, dir)
	for _, c := range []struct {
		n    vault.Number
		asks int64
	}{{first, 3}, {second, 0}} {
		asked := p.opened.Load()
		for range 3 {
			wantLends(t, v, c.n)
		}
		if got := p.opened.Load() - asked; got != c.asks {
			t.Errorf("epoch %s was lent three times: the hardware was asked %d times, want %d", c.n, got, c.asks)
		}
	}
	must(t, v.Reseal(t.Context(), map[vault.KeyID]vault.Class{payments: vault.Own}))
	asked := p.opened.Load()
	wantLends(t, v, second)
	if p.opened.Load() != asked+1 {
		t.Error("what was sealed anew opened without the hardware")
	}
	v.Close()
	after := save(t, dir)

	putBack(t, dir, before)
	if _, err := vault.Open(t.Context(), dir, host, p); !errors.Is(err, vault.ErrStale) {
		t.Errorf("a folder from before a share was sealed anew: %v", err)
	}
	putBack(t, dir, after)
	v = openVault(t, dir, h.Reopen())
	wantLends(t, v, first)
	wantLends(t, v, second)
	must(t, v.Reseal(t.Context(), map[vault.KeyID]vault.Class{payments: vault.Held}))
	wantLends(t, v, first)
}
