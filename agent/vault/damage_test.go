package vault_test

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"conseal/agent/vault"
	"conseal/internal/secret"
)

// damaged lends fn each of some damages to a file: sampled bit flips, truncations,
// an addition, and the file's absence as nil.
func damaged(b []byte, fn func(spoiled []byte)) {
	for i := 0; i < len(b); i += 1 + len(b)/40 {
		spoiled := bytes.Clone(b)
		spoiled[i] ^= 1 << (i % 8)
		fn(spoiled)
		fn(bytes.Clone(b[:i]))
	}
	last := bytes.Clone(b)
	last[len(last)-1] ^= 0x80
	fn(last)
	fn(bytes.Clone(b[:len(b)-1]))
	fn(append(bytes.Clone(b), 0))
}

func TestDamagedManifest(t *testing.T) {
	v := newVault(t)
	v.born(payments, n11) // both slots are of the present root
	v.Close()
	v.Vault = nil
	before := files(t, v.dir)
	if len(slotsIn(before)) != 2 {
		t.Fatalf("the test means to damage two slots: %v", slotsIn(before))
	}
	for _, slot := range slotsIn(before) {
		path := filepath.Join(v.dir, slot)
		damaged(before[slot], func(spoiled []byte) {
			must(t, os.WriteFile(path, spoiled, 0o600))
			opened, err := vault.Open(t.Context(), v.dir, host, v.hw)
			if err == nil {
				opened.Close()
				t.Errorf("%s: a damaged manifest opens", slot)
				return
			}
			version := len(spoiled) > 16 && spoiled[16] != before[slot][16]
			if !errors.Is(err, vault.ErrDamaged) && !(version && strings.Contains(err.Error(), "format version")) {
				t.Errorf("%s: %v", slot, err)
			}
			if !strings.Contains(err.Error(), slot) {
				t.Errorf("it does not say that it is %s: %v", slot, err)
			}
			wantError(t, vault.Create(t.Context(), v.dir, host, v.hw), nil)
			must(t, os.WriteFile(path, before[slot], 0o600))
		})
		wantSameFiles(t, v.dir, before)
	}
	v.reopen()
	v.wantLends(payments, n11)
}

// TestFIFOForAFile: what is put in a file's place is named, and waited for by nobody.
func TestFIFOForAFile(t *testing.T) {
	v := newVault(t)
	v.born(payments, n11)
	path := v.ShareFile(payments, n11)
	must(t, os.Remove(path))
	must(t, unix.Mkfifo(path, 0o600))
	writer, err := os.OpenFile(path, os.O_RDWR, 0) // somebody holds it open
	must(t, err)
	defer writer.Close()
	v.reopen()
	wantError(t, v.lends(payments, n11), vault.ErrDamaged, "not a regular file")
}

// TestUnknownVersion: what a newer program wrote is left alone.
func TestUnknownVersion(t *testing.T) {
	v := newVault(t)
	v.born(payments, n11)
	v.Close()
	v.Vault = nil
	slot := slotsIn(files(t, v.dir))[0]
	path := filepath.Join(v.dir, slot)
	b, err := os.ReadFile(path)
	must(t, err)
	b[len("conseal manifest")] = 3
	must(t, os.WriteFile(path, b, 0o600))
	before := files(t, v.dir)
	v.wantOpenError(nil, "version 3", "leaves it alone")
	wantError(t, vault.Create(t.Context(), v.dir, host, v.hw), nil, "version 3")
	wantSameFiles(t, v.dir, before)
}

func TestDamagedShare(t *testing.T) {
	for _, class := range []vault.Class{vault.Held, vault.Own} {
		t.Run(class.String(), func(t *testing.T) { testDamagedShare(t, class) })
	}
}

func testDamagedShare(t *testing.T, class vault.Class) {
	v := newVault(t)
	v.born(payments, n11)
	must(t, v.Reseal(t.Context(), map[vault.KeyID]vault.Class{payments: class}))
	v.born(backups, n11)
	must(t, v.stage(payments, n12))
	path := v.ShareFile(payments, n11)
	good, err := os.ReadFile(path)
	must(t, err)
	damaged(good, func(spoiled []byte) {
		must(t, os.WriteFile(path, spoiled, 0o600))
		wantError(t, v.lends(payments, n11), vault.ErrDamaged, `"payments"`, "1.1", filepath.Base(path))
		if opened, err := v.OpenShareFile(t.Context(), payments, n11); err == nil { // behind the digest
			opened.Wipe()
			t.Error("a damaged share is authentic")
		}
		_, err := v.Public(payments, n11)
		wantError(t, err, vault.ErrDamaged)
		v.wantLends(payments, n12)
		v.wantLends(backups, n11)
	})
	v.reopen() // still damaged: the vault opens, and the file stays
	wantError(t, v.lends(payments, n11), vault.ErrDamaged)
	v.wantLends(backups, n11)
	must(t, os.Remove(path))
	v.reopen()
	wantError(t, v.lends(payments, n11), fs.ErrNotExist)
	if r, _ := v.Record(payments); len(r.Staged) != 2 || r.Active != n11 {
		t.Errorf("a lost file changed the record: %+v", r)
	}
	must(t, os.WriteFile(path, good, 0o600))
	v.wantLends(payments, n11, n12)
}

// TestMovedShare puts one share's file, with its own keys, in the place of another.
func TestMovedShare(t *testing.T) {
	for _, class := range []vault.Class{vault.Held, vault.Own} {
		t.Run(class.String(), func(t *testing.T) { testMovedShare(t, class) })
	}
}

func testMovedShare(t *testing.T, class vault.Class) {
	v := newVault(t)
	must(t, v.stage(payments, n11))
	must(t, v.stage(payments, n12))
	must(t, v.stage(backups, n11))
	must(t, v.stage(key("payments", 2), n11))
	must(t, v.Reseal(t.Context(), map[vault.KeyID]vault.Class{payments: class, backups: class, key("payments", 2): class}))
	target := v.ShareFile(payments, n11)
	good, err := os.ReadFile(target)
	must(t, err)
	for _, from := range []string{v.ShareFile(payments, n12), v.ShareFile(backups, n11), v.ShareFile(key("payments", 2), n11)} {
		b, err := os.ReadFile(from)
		must(t, err)
		must(t, os.WriteFile(target, b, 0o600))
		wantError(t, v.lends(payments, n11), vault.ErrDamaged)
		_, err = v.OpenShareFile(t.Context(), payments, n11)
		wantError(t, err, vault.ErrDamaged, "about another share")
	}
	must(t, os.WriteFile(target, good, 0o600))
	v.wantLends(payments, n11, n12)
}

func TestDamagedClassKey(t *testing.T) {
	v := newVault(t)
	v.born(payments, n11)
	v.Close()
	v.Vault = nil
	before := files(t, v.dir)
	path := filepath.Join(v.dir, "class-held.sealed")
	damaged(before["class-held.sealed"], func(spoiled []byte) {
		must(t, os.WriteFile(path, spoiled, 0o600))
		v.wantOpenError(nil, "class-held.sealed")
		wantError(t, vault.Create(t.Context(), v.dir, host, v.hw), nil, "class-held.sealed")
	})
	must(t, os.Remove(path))
	v.wantOpenError(fs.ErrNotExist, "class-held.sealed")
	wantError(t, vault.Create(t.Context(), v.dir, host, v.hw), fs.ErrNotExist)
	putBack(t, v.dir, before)
	v.reopen()
	v.wantLends(payments, n11)
}

func TestDamagedCertificate(t *testing.T) {
	v := newVault(t)
	v.born(payments, n11)
	v.born(backups, n11)
	all := files(t, v.dir)
	for name, b := range all {
		if !bytes.Equal(b, certificate(payments, n11)) {
			continue
		}
		damaged(b, func(spoiled []byte) {
			must(t, os.WriteFile(filepath.Join(v.dir, name), spoiled, 0o600))
			_, err := v.Certificate(payments)
			wantError(t, err, vault.ErrDamaged)
		})
		must(t, os.Remove(filepath.Join(v.dir, name)))
	}
	v.reopen()
	_, err := v.Certificate(payments)
	wantError(t, err, fs.ErrNotExist)
	v.wantLends(payments, n11)
	got, err := v.Certificate(backups)
	if err != nil || !bytes.Equal(got, certificate(backups, n11)) {
		t.Errorf("%q, %v", got, err)
	}
	must(t, v.activate(payments, n11)) // comes again from the others
	if got, err := v.Certificate(payments); err != nil || !bytes.Equal(got, certificate(payments, n11)) {
		t.Errorf("%q, %v", got, err)
	}
}

// TestSweep: what a crash left goes, and nothing else does.
func TestSweep(t *testing.T) {
	v := newVault(t)
	v.born(payments, n11)
	must(t, v.stage(payments, n12))
	v.Close()
	v.Vault = nil
	before := files(t, v.dir)
	for _, name := range []string{"manifest.0.new", "class-held.sealed.new", "shares/ff.share", "shares/ff.share.new", "certs/ff.cert", "certs/ff.cert.new"} {
		must(t, os.WriteFile(filepath.Join(v.dir, name), []byte("left"), 0o600))
	}
	notes := filepath.Join(v.dir, "shares", "README")
	must(t, os.WriteFile(notes, []byte("of the operator"), 0o600))
	v.reopen()
	must(t, os.Remove(notes))
	wantSameFiles(t, v.dir, before)
	v.wantLends(payments, n11, n12)
}

// TestSymbolicLinks: the vault neither reads nor writes through one.
func TestSymbolicLinks(t *testing.T) {
	v := newVault(t)
	must(t, v.stage(payments, n11))
	outside := filepath.Join(t.TempDir(), "outside")
	must(t, os.WriteFile(outside, []byte("precious"), 0o600))
	slot := slotsIn(files(t, v.dir))
	for _, s := range append(slot, "manifest.0", "manifest.1") {
		_ = os.Symlink(outside, filepath.Join(v.dir, s+".new"))
	}
	if err := errors.Join(v.see(payments, 1), v.see(backups, 1)); err == nil {
		t.Error("it wrote through a symbolic link")
	}
	if b, err := os.ReadFile(outside); err != nil || string(b) != "precious" {
		t.Errorf("%q, %v", b, err)
	}
	v.reopen() // sweeps them
	must(t, v.see(payments, 1))
	v.wantLends(payments, n11)
}

// TestNoSecretInFiles looks for each secret in each file, and for a secret that it
// put there itself.
func TestNoSecretInFiles(t *testing.T) {
	v := newVault(t)
	v.born(payments, n11)
	must(t, v.stage(payments, n12))
	must(t, v.stage(backups, n11))
	must(t, v.drop(payments, n12))
	must(t, v.stage(payments, n13))
	must(t, v.stageOwn(backups, n13))
	planted := bytes.Repeat([]byte("planted secret! "), 2)
	secrets := v.Secrets()
	for _, s := range []struct {
		id vault.KeyID
		n  vault.Number
	}{{payments, n11}, {payments, n12}, {payments, n13}, {backups, n11}, {backups, n13}} {
		secrets["share "+s.id.Name+" "+s.n.String()] = content(s.id, s.n)
	}
	if len(secrets) != 2+4+5 {
		t.Fatalf("%d secrets to look for, want root, class key, 4 erasure keys, 5 shares", len(secrets))
	}
	for name, s := range secrets {
		if where := find(t, v.dir, s); len(where) > 0 {
			t.Errorf("%s is in %v", name, where)
		}
	}
	// The search finds what is there: in the middle of a file, and in a file that
	// the vault wrote with what it shows to everybody.
	must(t, os.WriteFile(filepath.Join(v.dir, "shares", "x"), append([]byte("before"), planted...), 0o600))
	if where := find(t, v.dir, planted); len(where) != 1 {
		t.Errorf("the search found %v", where)
	}
	share := secret.Copy(planted)
	must(t, v.Stage(t.Context(), vault.Held, backups, n12, vault.Output{}, vault.Origin{}, planted, share))
	if where := find(t, v.dir, planted); len(where) != 2 {
		t.Errorf("the search found %v", where)
	}
	shown := output(payments, n11)
	if where := find(t, v.dir, shown[:]); len(where) != 1 {
		t.Errorf("the output is in the share's header alone: %v", where)
	}
}

// find tells which files hold a secret or, so that no encoding hides it, 16 bytes
// of its beginning or end in plain or in hexadecimal digits.
func find(t *testing.T, dir string, s []byte) (where []string) {
	t.Helper()
	if len(s) < 32 {
		t.Fatalf("a secret of %d bytes: nothing to look for", len(s))
	}
	for name, b := range files(t, dir) {
		for _, part := range [][]byte{s[:16], s[len(s)-16:]} {
			if bytes.Contains(b, part) || bytes.Contains(bytes.ToLower(b), hexadecimal(part)) {
				where = append(where, name)
				break
			}
		}
	}
	return where
}
