//go:build cgo

package hsm_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/miekg/pkcs11"

	"conseal/hsm"
	"conseal/testenv"
)

// spied is a program whose module is pkcs11-spy, which logs each call.
type spied struct {
	cfg hsm.Config
	log string
	env []string
}

func newSpied(t *testing.T) spied {
	t.Helper()
	_, cfg := newHost(t)
	s := newSpy(t, cfg.URI)
	cfg.URI, cfg.PINSource = s.cfg.URI, writeFile(t, "pin", "wrong", 0o600)
	s.cfg = cfg
	return s
}

// newSpy puts pkcs11-spy between a URI and its module.
func newSpy(t *testing.T, of string) spied {
	t.Helper()
	uri, err := hsm.ParseURI(of)
	if err != nil {
		t.Fatal(err)
	}
	spy, err := testenv.Spy()
	if err != nil {
		t.Fatal(err)
	}
	log := filepath.Join(t.TempDir(), "spy.log")
	env := []string{"PKCS11SPY=" + uri.ModulePath, "PKCS11SPY_OUTPUT=" + log}
	uri.ModulePath = spy
	return spied{hsm.Config{URI: uri.String()}, log, env}
}

// open opens the token in a new process.
func (s spied) open(t *testing.T) error {
	t.Helper()
	return s.run(t, "open")
}

// run is a new process in a role.
func (s spied) run(t *testing.T, role string) error {
	t.Helper()
	out, err := childCommand(t, role, s.cfg, s.env...).CombinedOutput()
	if err != nil {
		return &childError{string(out)}
	}
	return nil
}

type childError struct{ text string }

func (e *childError) Error() string { return e.text }

func (s spied) logins(t *testing.T) int {
	t.Helper()
	b, err := os.ReadFile(s.log)
	if err != nil {
		t.Fatal(err)
	}
	return strings.Count(string(b), ": C_Login\n")
}

// TestAWrongPINIsSentOnce counts C_Login where the module is entered.
func TestAWrongPINIsSentOnce(t *testing.T) {
	s := newSpied(t)
	for n := range 4 {
		err := s.open(t)
		if err == nil || !strings.Contains(err.Error(), "refused the PIN") || strings.Contains(err.Error(), "wrong") {
			t.Errorf("process %d: %v", n, err)
		}
		if got := s.logins(t); got != 1 {
			t.Fatalf("after %d processes the PIN was sent %d times", n+1, got)
		}
	}
	uri, err := hsm.ParseURI(s.cfg.URI)
	if err != nil {
		t.Fatal(err)
	}
	wrong := s.cfg.PINSource
	s.cfg.PINSource = uri.PINSource // the right one
	for n := range 2 {
		if err := s.open(t); err != nil {
			t.Fatalf("with the right PIN: %v", err)
		}
		if got := s.logins(t); got != 2+n {
			t.Errorf("C_Login was called %d times", got)
		}
	}
	s.cfg.PINSource = wrong
	for range 2 {
		if s.open(t) == nil {
			t.Error("opened with a wrong PIN")
		}
	}
	if got := s.logins(t); got != 4 { // the success forgot the old refusal
		t.Errorf("C_Login was called %d times", got)
	}
	if err := hsm.ClearLatch(s.cfg.StateDir); err != nil {
		t.Fatal(err)
	}
	if s.open(t) == nil || s.logins(t) != 5 {
		t.Errorf("after ClearLatch C_Login was called %d times", s.logins(t))
	}
}

func TestNoPINForATokenAboutToLock(t *testing.T) {
	for flags, want := range map[uint]bool{
		0: true, pkcs11.CKF_USER_PIN_COUNT_LOW: true,
		pkcs11.CKF_USER_PIN_FINAL_TRY: false, pkcs11.CKF_USER_PIN_LOCKED: false,
		pkcs11.CKF_USER_PIN_FINAL_TRY | pkcs11.CKF_USER_PIN_COUNT_LOW: false,
	} {
		err := hsm.MayTry(flags)
		if (err == nil) != want || (err != nil && hsm.ClassOf(err) != hsm.ClassAuth) {
			t.Errorf("flags %#x: %v", flags, err)
		}
	}
}
