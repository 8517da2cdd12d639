package tpm_test

import (
	"bytes"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-tpm/tpm2"

	"conseal/testenv"
	"conseal/tpm"
)

// own runs what --own-lockout does.
func own(t *testing.T, h *host, file string) []string {
	t.Helper()
	steps, err := tpm.Lockout(t.Context(), h.cfg, file)
	if err != nil || len(steps) != 2 {
		t.Fatal(steps, err)
	}
	return steps
}

func read(t *testing.T, file string) []byte {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func write(t *testing.T, file string, b []byte) {
	t.Helper()
	if err := os.WriteFile(file, b, 0o600); err != nil {
		t.Fatal(err)
	}
}

// tool runs one of tpm2-tools, as an operator would. It needs the TPM for itself.
func (h *host) tool(t *testing.T, args ...string) error {
	t.Helper()
	if err := testenv.Need(args[0], "tpm2-tools"); err != nil {
		t.Fatal(err)
	}
	h.tap.Connect(h.device)
	said, err := exec.Command(args[0], append(args[1:], "-T", "swtpm:path="+strings.TrimPrefix(h.device.Address(), "unix:"))...).CombinedOutput()
	if err != nil {
		t.Logf("%q: %v: %s", args, err, said)
	}
	return err
}

func TestOwnLockout(t *testing.T) {
	h := newHost(t)
	file := filepath.Join(t.TempDir(), "lockout")
	steps := own(t, h, file)
	wantWords(t, steps[0], file, "made")
	wantWords(t, steps[1], "locks at 32 failed tries, 32 are left", "every 10m0s", "for 10m0s", "a lockout authorization is set")
	auth := read(t, file)
	if info, err := os.Stat(file); err != nil || info.Mode() != 0o600 || len(auth) != 32 {
		t.Fatalf("the file: %v, %d bytes, %v", info.Mode(), len(auth), err)
	}
	guess(t, h)
	guess(t, h)
	for range 2 {
		steps = own(t, h, file)
		wantWords(t, steps[0], "already there")
		wantWords(t, steps[1], "32 failed tries, 30 are left", "is set")
	}
	if !bytes.Equal(read(t, file), auth) {
		t.Error("the file was changed")
	}
	if err := h.tool(t, "tpm2_dictionarylockout", "-c", "-p", "file:"+file); err != nil {
		t.Error("what docs/tpm.md says does not reset the count")
	}
	wantWords(t, lockout(t, h.cfg), "32 are left")
	h.reboot(t)
	wantWords(t, lockout(t, h.cfg), "locks at 32", "is set")

	withdrawn, err := tpm.Withdraw(t.Context(), h.cfg)
	if err != nil {
		t.Fatal(err)
	}
	wantWords(t, withdrawn[len(withdrawn)-1], "left", "tpm2_changeauth -c lockout -p file:FILE")
	wantWords(t, lockout(t, h.cfg), "locks at 32", "is set")

	// Root without the file can no longer clear the TPM, and a wrong try blocks it.
	if _, err := (tpm2.Clear{AuthHandle: tpm2.AuthHandle{Handle: tpm2.TPMRHLockout, Auth: tpm2.PasswordAuth(nil)}}).Execute(h.tap); err == nil {
		t.Error("the TPM was cleared without the authorization")
	}
	_, err = tpm.Lockout(t.Context(), h.cfg, file)
	wantClass(t, err, tpm.ClassLockout)
	if !bytes.Equal(read(t, file), auth) {
		t.Error("the file was changed, while its authorization was not even tried")
	}
	wantNoHandles(t, h.tap)
}

func TestLockoutIsGivenBack(t *testing.T) {
	h := newHost(t)
	file := filepath.Join(t.TempDir(), "lockout")
	own(t, h, file)
	if err := h.tool(t, "tpm2_changeauth", "-c", "lockout", "-p", "file:"+file); err != nil {
		t.Error("what withdraw says does not take the authorization away")
	}
	wantWords(t, lockout(t, h.cfg), "no lockout authorization is set")
}

func TestOwnLockoutCutShort(t *testing.T) {
	for name, c := range map[string]struct {
		command tpm2.TPMCC
		arrives bool
		answer  func(cmd []byte) []byte
	}{
		"before the parameters":          {command: tpm2.TPMCCDictionaryAttackParameters},
		"after the parameters":           {command: tpm2.TPMCCDictionaryAttackParameters, arrives: true},
		"before the authorization":       {command: tpm2.TPMCCHierarchyChanegAuth},
		"after the authorization":        {command: tpm2.TPMCCHierarchyChanegAuth, arrives: true},
		"success of parameters forged":   {command: tpm2.TPMCCDictionaryAttackParameters, answer: func(cmd []byte) []byte { return forgedSuccess(cmd, 1) }},
		"an answer that is a header":     {command: tpm2.TPMCCDictionaryAttackParameters, answer: func([]byte) []byte { return []byte{0x80, 2, 0, 0, 0, 10, 0, 0, 0, 0} }},
		"an answer with a parameter":     {command: tpm2.TPMCCDictionaryAttackParameters, answer: func([]byte) []byte { return append([]byte{0x80, 2, 0, 0, 0, 18, 0, 0, 0, 0, 0, 0, 0, 4}, 1, 2, 3, 4) }},
		"a refusal, which may be forged": {command: tpm2.TPMCCDictionaryAttackParameters, answer: func([]byte) []byte { return []byte{0x80, 1, 0, 0, 0, 10, 0, 0, 1, 1} }},
	} {
		t.Run(name, func(t *testing.T) {
			h := newHost(t)
			file := filepath.Join(t.TempDir(), "lockout")
			hits := 0
			h.tap.Intercept(func(cmd []byte, next testenv.Exchange) ([]byte, error) {
				if code(cmd) != c.command {
					return next(cmd)
				}
				hits++
				if c.arrives {
					if _, err := next(cmd); err != nil {
						return nil, err
					}
				}
				if c.answer != nil {
					return c.answer(cmd), nil
				}
				return nil, net.ErrClosed
			})
			_, err := tpm.Lockout(t.Context(), h.cfg, file)
			h.tap.Intercept(nil)
			if hits != 1 || err == nil {
				t.Fatalf("interrupted %d times: %v", hits, err)
			}
			auth := read(t, file)
			wantWords(t, own(t, h, file)[1], "locks at 32 failed tries, 32 are left", "is set")
			wantWords(t, own(t, h, file)[0], "already there")
			if !bytes.Equal(read(t, file), auth) {
				t.Error("another authorization was made")
			}
			wantNoHandles(t, h.tap)
		})
	}
}

// uses counts the commands that use the lockout authorization.
func (h *host) uses(fn func()) (n int) {
	h.tap.Intercept(func(cmd []byte, next testenv.Exchange) ([]byte, error) {
		if bytes.HasPrefix(cmd[10:], []byte{0x40, 0, 0, 0x0a}) { // TPM_RH_LOCKOUT
			n++
		}
		return next(cmd)
	})
	fn()
	h.tap.Intercept(nil)
	return n
}

// One wrong try blocks the hierarchy, so nothing is tried that is not known to be ours.
func TestForeignLockoutAuthIsNotTried(t *testing.T) {
	h, other := newHost(t), newHost(t)
	dir := t.TempDir()
	path := func(name string) string { return filepath.Join(dir, name) }
	own(t, other, path("another TPM's"))
	ours := path("ours")
	if n := h.uses(func() { own(t, h, ours) }); n != 2 {
		t.Fatalf("the control: %d uses", n)
	}
	auth := read(t, ours)
	flipped, swapped := bytes.Clone(auth), bytes.Clone(auth)
	flipped[31] ^= 1
	swapped[0] ^= 1
	write(t, path("a letter changed"), flipped)
	write(t, path("another"), swapped)
	write(t, path("cut short"), auth[:20])
	write(t, path("empty"), nil)
	write(t, path("a byte more"), append(bytes.Clone(auth), '\n'))
	write(t, path("of others"), auth)
	if err := os.Chmod(path("of others"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(ours, path("a link")); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(path("a folder"), 0o700); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{
		"a folder": "is no file", "another TPM's": "Nothing was tried", "a letter changed": "Nothing was tried", "another": "Nothing was tried", "cut short": "Nothing was tried",
		"empty": "remove it", "a byte more": "Nothing was tried", "of others": "0600", "a link": "nothing was tried", ".": "nothing was tried",
		"not there": "does not exist. Nothing was tried", "no/folder": "Nothing was tried",
	} {
		n := h.uses(func() {
			if _, err := tpm.Lockout(t.Context(), h.cfg, path(name)); err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("%s: got %v, want %q", name, err, want)
			}
		})
		if n != 0 {
			t.Errorf("%s: tried", name)
		}
	}
	if _, err := os.Stat(path("not there")); err == nil {
		t.Error("a file was made for an authorization that was not set")
	}

	// Made here for this TPM, and no longer what is set: once, and never again.
	setAuth(t, h, tpm2.TPMRHLockout, string(auth), "somebody's")
	n := h.uses(func() {
		_, err := tpm.Lockout(t.Context(), h.cfg, ours)
		wantClass(t, err, tpm.ClassAuth)
		wantWords(t, err.Error(), "is blocked", ours+".refused")
	})
	if n != 1 {
		t.Errorf("tried %d times", n)
	}
	wantNoHandles(t, h.tap)
	n = h.uses(func() {
		_, err := tpm.Lockout(t.Context(), h.cfg, ours)
		wantClass(t, err, tpm.ClassAuth)
	})
	if n != 0 || !bytes.Equal(read(t, ours+".refused"), auth) {
		t.Errorf("tried %d times after it was refused", n)
	}
	wantNoHandles(t, h.tap)
}

// A file that is there before the TPM has an authorization is not overwritten.
func TestOwnLockoutOverwritesNothing(t *testing.T) {
	h := newHost(t)
	file := filepath.Join(t.TempDir(), "notes")
	write(t, file, []byte("something dear"))
	n := h.uses(func() {
		_, err := tpm.Lockout(t.Context(), h.cfg, file)
		wantClass(t, err, tpm.ClassAuth)
	})
	if n != 0 || string(read(t, file)) != "something dear" {
		t.Errorf("%d uses, the file has %q", n, read(t, file))
	}
	if _, err := tpm.Lockout(t.Context(), h.cfg, filepath.Join(file, "below")); err == nil {
		t.Error("a file below a file was made")
	}
	wantWords(t, lockout(t, h.cfg), "locks at 3 ", "no lockout authorization")
}

func TestLockoutAuthStaysOffTheBus(t *testing.T) {
	h := newHost(t)
	file := filepath.Join(t.TempDir(), "lockout")
	var bus bytes.Buffer
	h.tap.Record(&bus)
	own(t, h, file) // sets it
	own(t, h, file) // uses it
	h.tap.Record(nil)
	auth := read(t, file)
	if bus.Len() < 2000 || bytes.Contains(bus.Bytes(), auth) || bytes.Contains(bus.Bytes(), auth[:26]) {
		t.Errorf("the authorization was on the bus, or only %d bytes were recorded", bus.Len())
	}
	h.tap.Record(&bus)
	d := dialTap(t, h.tap) // the control: who sends it without a session is seen
	_, err := tpm2.HierarchyChangeAuth{
		AuthHandle: tpm2.AuthHandle{Handle: tpm2.TPMRHLockout, Auth: tpm2.PasswordAuth(auth)}, NewAuth: tpm2.TPM2BAuth{Buffer: []byte("the next one")},
	}.Execute(d)
	h.tap.Record(nil)
	if err != nil || !bytes.Contains(bus.Bytes(), auth) || !bytes.Contains(bus.Bytes(), []byte("the next one")) {
		t.Errorf("the recorder misses what is on the bus, or the authorization was not in the file: %v", err)
	}
}

// Authorizations of the other hierarchies that somebody set are said, with what to do.
func TestForeignHierarchyAuths(t *testing.T) {
	h := newHost(t)
	setAuth(t, h, tpm2.TPMRHEndorsement, "", "somebody's")
	_, err := h.Receipt(t.Context(), []byte("a"))
	wantClass(t, err, tpm.ClassAuth)
	wantWords(t, err.Error(), "endorsement", "tpm2_getcap properties-variable", "ask who owns the TPM")
	setAuth(t, h, tpm2.TPMRHEndorsement, "somebody's", "")

	undefine(t, h, tpm.DefaultNVReceipts)
	setAuth(t, h, tpm2.TPMRHOwner, "", "somebody's")
	_, err = tpm.Provision(t.Context(), h.cfg)
	wantClass(t, err, tpm.ClassAuth)
	wantWords(t, err.Error(), "of receipts", "tpm2_getcap properties-variable", "ask who owns the TPM")
	wantRoot(t, h.TPM, setRoot(t, h.TPM)) // what is there goes on
	fresh := h.cfg
	fresh.SRKName, fresh.PCRWanted, fresh.Identity = nil, nil, nil
	_, err = tpm.Provision(t.Context(), fresh)
	wantClass(t, err, tpm.ClassAuth)
	file := filepath.Join(t.TempDir(), "lockout")
	wantWords(t, own(t, h, file)[1], "an owner authorization is set, and not by us")
	wantNoHandles(t, h.tap)
}
