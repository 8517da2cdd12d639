package tpm_test

import (
	"bytes"
	"errors"
	"strings"
	"testing"

	"github.com/google/go-tpm/tpm2"

	"conseal/testenv"
	"conseal/tpm"
)

func lockout(t *testing.T, cfg tpm.Config) string {
	t.Helper()
	steps, err := tpm.Lockout(t.Context(), cfg, "")
	if err != nil || len(steps) != 1 {
		t.Fatal(steps, err)
	}
	return steps[0]
}

func wantWords(t *testing.T, got string, want ...string) {
	t.Helper()
	for _, w := range want {
		if !strings.Contains(got, w) {
			t.Errorf("%q lacks %q", got, w)
		}
	}
}

func setAuth(t *testing.T, h *host, hierarchy tpm2.TPMHandle, old, next string) {
	t.Helper()
	_, err := tpm2.HierarchyChangeAuth{
		AuthHandle: tpm2.AuthHandle{Handle: hierarchy, Auth: tpm2.PasswordAuth([]byte(old))}, NewAuth: tpm2.TPM2BAuth{Buffer: []byte(next)},
	}.Execute(h.tap)
	if err != nil {
		t.Fatal(err)
	}
}

// guess tries a wrong PIN on an object that counts tries.
func guess(t *testing.T, h *host) {
	t.Helper()
	template := tpm2.ECCSRKTemplate
	template.ObjectAttributes.NoDA = false
	made, err := tpm2.CreatePrimary{
		PrimaryHandle: tpm2.TPMRHOwner, InPublic: tpm2.New2B(template),
		InSensitive: tpm2.TPM2BSensitiveCreate{Sensitive: &tpm2.TPMSSensitiveCreate{UserAuth: tpm2.TPM2BAuth{Buffer: []byte("right")}}},
	}.Execute(h.tap)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if _, err := (tpm2.FlushContext{FlushHandle: made.ObjectHandle}).Execute(h.tap); err != nil {
			t.Error(err)
		}
	}()
	for err = tpm2.TPMRCRetry; errors.Is(err, tpm2.TPMRCRetry); { // the first use since it started is told to come again
		_, err = tpm2.Create{
			ParentHandle: tpm2.AuthHandle{Handle: made.ObjectHandle, Name: made.Name, Auth: tpm2.PasswordAuth([]byte("wrong"))},
			InPublic:     tpm2.New2B(tpm2.ECCSRKTemplate),
		}.Execute(h.tap)
	}
	if err == nil {
		t.Fatal("a wrong PIN was taken")
	}
}

func TestLockoutIsSaidAndLeftAlone(t *testing.T) {
	h := newHost(t)
	wantWords(t, lockout(t, h.cfg), "locks at 3 failed tries, 3 are left", "every 16m40s", "for 16m40s", "no lockout authorization is set: root")
	guess(t, h)
	guess(t, h)
	wantWords(t, lockout(t, h.cfg), "3 failed tries, 1 are left")
	guess(t, h)
	if said := lockout(t, h.cfg); !strings.Contains(said, " 0 are left") || !strings.Contains(said, "it is locked now") {
		t.Errorf("after the third: %s", said)
	}
	setAuth(t, h, tpm2.TPMRHLockout, "", "somebody's")
	setAuth(t, h, tpm2.TPMRHOwner, "", "somebody's")
	setAuth(t, h, tpm2.TPMRHEndorsement, "", "somebody's")
	wantWords(t, lockout(t, h.cfg), "a lockout authorization is set: who has it", "an owner authorization is set", "an endorsement authorization is set")

	h.tap.Intercept(func(cmd []byte, next testenv.Exchange) ([]byte, error) {
		answer, err := next(cmd)
		if i := bytes.Index(answer, []byte{0, 0, 2, 0x0e}); i >= 0 { // TPM_PT_LOCKOUT_COUNTER
			answer[i+7] = 0
		}
		return answer, err
	})
	if _, err := tpm.Lockout(t.Context(), h.cfg, ""); err == nil {
		t.Error("altered on the bus, and believed")
	}
	h.tap.Intercept(nil)
	wantNoHandles(t, h.tap)
}
