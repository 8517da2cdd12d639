package vault_test

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"conseal/agent/vault"
	"conseal/internal/secret"
)

func (v *testVault) stageOwn(id vault.KeyID, n vault.Number) error {
	share := secret.Copy(content(id, n))
	defer share.Wipe()
	return v.Stage(v.t.Context(), vault.Own, id, n, output(id, n), vault.Origin{}, public(id, n), share)
}

func (v *testVault) reseal(class vault.Class, ids ...vault.KeyID) error {
	want := map[vault.KeyID]vault.Class{}
	for _, id := range ids {
		want[id] = class
	}
	return v.Reseal(v.t.Context(), want)
}

// openings records which keys the hardware is asked for from now on.
func (v *testVault) openings() *[]string {
	ids := &[]string{}
	v.hw.onOpen = func(id string) error { *ids = append(*ids, id); return nil }
	return ids
}

// TestOwnShareOpensThroughTheHardwareEachTime, and a held one once, with the vault.
func TestOwnShareOpensThroughTheHardwareEachTime(t *testing.T) {
	v := newVault(t)
	must(t, v.stageOwn(payments, n11))
	must(t, v.stage(backups, n11))
	asked := v.openings()
	for range 3 {
		v.wantLends(payments, n11)
		v.wantLends(backups, n11)
	}
	if want := slices.Repeat([]string{"share/own/web1/1/1.1/payments"}, 3); !slices.Equal(*asked, want) {
		t.Errorf("the hardware was asked for %q, want %q", *asked, want)
	}
	if n := v.Opened(); n != 1 {
		t.Errorf("the vault keeps %d opened shares, want that of %s", n, backups.Name)
	}
}

// TestOwnShareWithoutTheHardware has all that a running agent has in memory and on
// disk: it opens what is held, and nothing else.
func TestOwnShareWithoutTheHardware(t *testing.T) {
	v := newVault(t)
	must(t, v.stageOwn(payments, n11))
	must(t, v.stage(backups, n11))
	v.hw.onOpen = func(string) error { return errHardware }
	wantError(t, v.lends(payments, n11), errHardware, `"payments"`, "1.1")
	v.wantLends(backups, n11)
	held, err := v.OpenWithClassKey(backups, n11) // the control
	must(t, err)
	held.Wipe()
	if own, err := v.OpenWithClassKey(payments, n11); err == nil {
		own.Wipe()
		t.Error("the class key opens a share that rests under a key of its own")
	}
	v.hw.onOpen = nil
	v.wantLends(payments, n11)
}

// TestStageOwnReadsBack: what the hardware does not give back is not staged, nor
// voted for.
func TestStageOwnReadsBack(t *testing.T) {
	v := newVault(t)
	v.hw.onOpen = func(string) error { return errHardware }
	wantError(t, v.stageOwn(payments, n11), errHardware, "reading it back")
	if r, found := v.Record(payments); found {
		t.Errorf("it is staged: %+v", r)
	}
	v.hw.onOpen = nil
	must(t, v.stageOwn(payments, n11))
	v.hw.onOpen = func(string) error { return errHardware }
	wantError(t, v.vote(payments, n11), errHardware)
	if r, _ := v.Record(payments); r.Voted != nil {
		t.Error("it voted for a share that does not open")
	}
}

// TestReseal moves shares from class to class: under one root for all, none if there
// is nothing to do, and with nothing else changed.
func TestReseal(t *testing.T) {
	v := newVault(t)
	v.born(payments, n11)
	must(t, v.stage(payments, n12))
	v.born(backups, n11)
	before, roots := v.Keys(), v.Stats().Roots
	old := []string{v.ShareFile(payments, n11), v.ShareFile(payments, n12), v.ShareFile(backups, n11)}
	for i, class := range []vault.Class{vault.Own, vault.Held} {
		must(t, v.reseal(class, payments, backups, key("unknown", 1)))
		must(t, v.reseal(class, payments, backups))
		if got, want := v.Stats().Roots, roots+uint64(i)+1; got != want {
			t.Errorf("after resealing %d times: %d roots, want %d", i+1, got, want)
		}
		for _, path := range old {
			if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("%s is still there: %v", filepath.Base(path), err)
			}
		}
		old = []string{v.ShareFile(payments, n11), v.ShareFile(payments, n12), v.ShareFile(backups, n11)}
		for range 2 {
			v.wantLends(payments, n11, n12)
			v.wantLends(backups, n11)
			if own := len(v.Own(payments)) + len(v.Own(backups)); own != 3*(1-i) {
				t.Errorf("resealed as %s, %d rest under keys of their own", class, own)
			}
			if got := v.Keys(); !sameRecords(got, before) {
				t.Errorf("the records changed: %+v, want %+v", got, before)
			}
			v.reopen()
		}
	}
}

func sameRecords(a, b []vault.Record) bool {
	return slices.EqualFunc(a, b, func(x, y vault.Record) bool {
		return x.Key == y.Key && x.Active == y.Active && *x.Voted == *y.Voted && slices.Equal(x.Staged, y.Staged)
	})
}

// TestResealForgetsTheOldFile puts the held file and its folder back after a key came
// to rest under a key of its own: nothing opens the file any more, not the class key
// either.
func TestResealForgetsTheOldFile(t *testing.T) {
	v := newVault(t)
	v.born(payments, n11)
	before := files(t, v.dir)
	must(t, v.reseal(vault.Own, payments))
	after := files(t, v.dir)
	v.Close()
	v.Vault = nil
	putBack(t, v.dir, before)
	v.wantOpenError(vault.ErrStale)
	putBack(t, v.dir, after)
	for name, b := range before {
		if strings.HasSuffix(name, ".share") {
			must(t, os.WriteFile(filepath.Join(v.dir, name), b, 0o600))
		}
	}
	v.reopen() // and sweeps the old file
	wantSameFiles(t, v.dir, after)
	v.hw.onOpen = func(string) error { return errHardware }
	wantError(t, v.lends(payments, n11), errHardware)
}

// TestResealDoesWhatItCan: a share that is damaged, or that the hardware does not
// open, does not stop the others, and stays as it was.
func TestResealDoesWhatItCan(t *testing.T) {
	v := newVault(t)
	v.born(payments, n11)
	v.born(backups, n11)
	path := v.ShareFile(backups, n11)
	flip(t, path, -1)
	wantError(t, v.reseal(vault.Own, payments, backups), vault.ErrDamaged, `"backups"`)
	_, err := v.Rests(backups, n11)
	wantError(t, err, vault.ErrDamaged, `"backups"`)
	flip(t, path, -1)
	for id, want := range map[vault.KeyID]vault.Class{payments: vault.Own, backups: vault.Held} {
		if class, err := v.Rests(id, n11); err != nil || class != want {
			t.Errorf("the share of %q rests as %q: %v", id.Name, class, err)
		}
	}
	if len(v.Own(payments)) != 1 || len(v.Own(backups)) != 0 {
		t.Errorf("own: %v and %v, want that of %s", v.Own(payments), v.Own(backups), payments.Name)
	}
	v.hw.onOpen = func(id string) error {
		if strings.Contains(id, "backups") {
			return errHardware
		}
		return nil
	}
	wantError(t, v.reseal(vault.Own, payments, backups), errHardware, `"backups"`)
	v.hw.onOpen = nil
	v.hw.onSetRoot = func(func()) error { return errHardware }
	wantError(t, v.reseal(vault.Held, payments), errHardware)
	v.hw.onSetRoot = nil
	v.wantLends(payments, n11)
	v.wantLends(backups, n11)
	if len(v.Own(payments)) != 1 || len(v.Own(backups)) != 0 {
		t.Errorf("after failures, own: %v and %v", v.Own(payments), v.Own(backups))
	}
	v.reopen()
	v.wantLends(payments, n11)
	must(t, v.reseal(vault.Own, payments, backups))
	v.wantLends(backups, n11)
}

// TestFirstVersionOpens opens a vault that was written before there were two classes,
// and moves its shares.
func TestFirstVersionOpens(t *testing.T) {
	dir := t.TempDir()
	must(t, os.CopyFS(dir, os.DirFS("testdata/v1")))
	hw, err := hardwareIn(filepath.Join(dir, "hardware.json"))
	must(t, err)
	v := &testVault{t: t, dir: filepath.Join(dir, "vault"), hw: hw}
	v.reopen()
	defer func() { v.Close() }()
	v.wantLends(payments, n11, n12)
	must(t, v.reseal(vault.Own, payments))
	v.reopen()
	v.wantLends(payments, n11, n12)
	if own := v.Own(payments); len(own) != 2 {
		t.Errorf("own: %v, want both", own)
	}
}

// TestUnknownShareVersion: what a newer program wrote is not opened, and stays.
func TestUnknownShareVersion(t *testing.T) {
	v := newVault(t)
	must(t, v.stage(payments, n11))
	path := v.ShareFile(payments, n11)
	b, err := os.ReadFile(path)
	must(t, err)
	for _, version := range []byte{0, 2, 3} {
		b[len("conseal share")] = version
		must(t, os.WriteFile(path, b, 0o600))
		_, err := v.OpenShareFile(t.Context(), payments, n11)
		wantError(t, err, vault.ErrDamaged, "of a version that this program does not know")
	}
	b[len("conseal share")] = 1
	must(t, os.WriteFile(path, b, 0o600))
	v.wantLends(payments, n11)
}
