//go:build cgo

package hsm_test

import (
	"errors"
	"fmt"
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

// run is a new process in a role.
func (s spied) run(t *testing.T, role string) error {
	t.Helper()
	out, err := childCommand(t, role, s.cfg, s.env...).CombinedOutput()
	if err != nil {
		return errors.New(string(out))
	}
	return nil
}

func (s spied) logins(t *testing.T) int {
	t.Helper()
	b, err := os.ReadFile(s.log)
	if err != nil {
		t.Fatal(err)
	}
	return strings.Count(string(b), ": C_Login\n")
}

// opened opens the host's token in a new process.
func (f *faulty) opened() error {
	f.t.Helper()
	out, err := childCommand(f.t, "open", f.cfg).CombinedOutput()
	if err != nil {
		return fmt.Errorf("%s", out)
	}
	return nil
}

// newLogin is a provisioned host, and what counts its logins from now on.
func newLogin(t *testing.T) (f *faulty, logins func() int) {
	t.Helper()
	f = newFaulty(t)
	provision(t, f.cfg).Close()
	before := f.calls()["C_Login"]
	return f, func() int { return f.calls()["C_Login"] - before }
}

// TestAWrongPINIsSentOnce counts C_Login where the module is entered.
func TestAWrongPINIsSentOnce(t *testing.T) {
	s, logins := newLogin(t)
	right := s.cfg.PINSource
	wrong := writeFile(t, "pin", "wrong", 0o600)
	s.cfg.PINSource = wrong
	for n := range 4 {
		err := s.opened()
		if err == nil || !strings.Contains(err.Error(), "refused the PIN") || strings.Contains(err.Error(), "wrong") {
			t.Errorf("process %d: %v", n, err)
		}
		if got := logins(); got != 1 {
			t.Fatalf("after %d processes the PIN was sent %d times", n+1, got)
		}
	}
	s.cfg.PINSource = right
	for n := range 2 {
		if err := s.opened(); err != nil {
			t.Fatalf("with the right PIN: %v", err)
		}
		if got := logins(); got != 2+n {
			t.Errorf("C_Login was called %d times", got)
		}
	}
	s.cfg.PINSource = wrong
	for range 2 {
		if s.opened() == nil {
			t.Error("opened with a wrong PIN")
		}
	}
	if got := logins(); got != 4 { // the success forgot the old refusal
		t.Errorf("C_Login was called %d times", got)
	}
	if err := hsm.ClearLatch(s.cfg.StateDir); err != nil {
		t.Fatal(err)
	}
	if s.opened() == nil || logins() != 5 {
		t.Errorf("after ClearLatch C_Login was called %d times", logins())
	}
}

// TestNoPINForATokenAboutToLock: the token is asked before the PIN is sent.
func TestNoPINForATokenAboutToLock(t *testing.T) {
	s, logins := newLogin(t)
	for flags, want := range map[uint]string{
		pkcs11.CKF_USER_PIN_FINAL_TRY:                                 "one more wrong PIN locks the token",
		pkcs11.CKF_USER_PIN_FINAL_TRY | pkcs11.CKF_USER_PIN_COUNT_LOW: "one more wrong PIN locks the token",
		pkcs11.CKF_USER_PIN_LOCKED:                                    "is locked",
	} {
		r := s.set("C_GetTokenInfo", testenv.Flags, flags, 0, 0)
		_, err := hsm.Open(t.Context(), s.cfg)
		s.end(r, want)
		if hsm.ClassOf(err) != hsm.ClassAuth || !strings.Contains(err.Error(), want) {
			t.Errorf("flags %#x: %v", flags, err)
		}
		if n := logins(); n != 0 {
			t.Fatalf("flags %#x: the PIN was sent", flags)
		}
	}
	r := s.set("C_GetTokenInfo", testenv.Flags, pkcs11.CKF_USER_PIN_COUNT_LOW, 0, 0)
	open(t, s.cfg)
	s.end(r, "count low")
	if n := logins(); n != 1 {
		t.Errorf("with tries to spare, C_Login was called %d times", n)
	}
}

// TestARefusedPINIsNotSentByLaterOperations: the token forgets its login and then does not
// take the PIN any more.
func TestARefusedPINIsNotSentByLaterOperations(t *testing.T) {
	for value, want := range map[uint]string{
		pkcs11.CKR_PIN_INCORRECT: "put the right PIN there", pkcs11.CKR_PIN_LOCKED: "is locked", pkcs11.CKR_GENERAL_ERROR: "not sent again",
	} {
		s := newSweep(t)
		before := s.calls()["C_Login"]
		lost := s.set("C_FindObjectsInit", testenv.LoseSessions, 0, 1, 0)
		refused := s.set("C_Login", testenv.ReturnValue, value, 0, 0)
		for n := range 6 {
			err := s.open(t.Context())
			if hsm.ClassOf(err) != hsm.ClassAuth || n == 0 && !strings.Contains(err.Error(), want) {
				t.Errorf("%#x, operation %d: %v", value, n, err)
			}
		}
		if n := s.calls()["C_Login"] - before; n != 1 {
			t.Errorf("%#x: six operations made %d logins", value, n)
		}
		s.end(lost, "lost")
		s.end(refused, "refused")
		if err := s.open(t.Context()); hsm.ClassOf(err) != hsm.ClassAuth || !strings.Contains(err.Error(), "not sent again") {
			t.Errorf("%#x: once the token would take it: %v", value, err)
		}
		s.settle("the latch was cleared")
	}
}
