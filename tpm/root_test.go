package tpm_test

import (
	"context"
	"encoding/binary"
	"errors"
	"net"
	"sync/atomic"
	"testing"

	"github.com/google/go-tpm/tpm2"

	"conseal/agent/vault"
	"conseal/internal/secret"
	"conseal/testenv"
	"conseal/tpm"
)

// code is the command code of a command.
func code(cmd []byte) tpm2.TPMCC { return tpm2.TPMCC(binary.BigEndian.Uint32(cmd[6:])) }

func TestRoot(t *testing.T) {
	h := newHost(t)
	_, err := h.Root(t.Context())
	var none vault.NoRoot
	if !errors.As(err, &none) || !none.NoRoot() {
		t.Fatalf("before the first: %v", err)
	}
	for _, n := range []int{0, 31, 33} {
		if err := h.SetRoot(t.Context(), secret.Random(n)); err == nil {
			t.Errorf("a root of %d bytes was taken", n)
		}
	}
	first := setRoot(t, h.TPM)
	wantRoot(t, h.TPM, first)
	second := setRoot(t, h.TPM)
	wantRoot(t, h.TPM, second)

	h.device.Kill() // power cut
	h.reboot(t)
	wantRoot(t, open(t, h.cfg), second)
}

func TestRootAcknowledgementLost(t *testing.T) {
	h := newHost(t)
	errCut := net.ErrClosed
	for name, c := range map[string]struct {
		intercept func(cmd []byte, next testenv.Exchange) ([]byte, error)
		written   bool
	}{
		"cut after": {func(cmd []byte, next testenv.Exchange) ([]byte, error) {
			if _, err := next(cmd); err != nil {
				return nil, err
			}
			return nil, errCut
		}, true},
		"cut before": {func([]byte, testenv.Exchange) ([]byte, error) { return nil, errCut }, false},
		"answer altered": {func(cmd []byte, next testenv.Exchange) ([]byte, error) {
			answer, err := next(cmd)
			if err == nil {
				answer[len(answer)-1] ^= 1
			}
			return answer, err
		}, true},
		"refusal forged": {func(cmd []byte, next testenv.Exchange) ([]byte, error) {
			_, err := next(cmd)
			return []byte{0x80, 0x01, 0, 0, 0, 10, 0, 0, 0x01, 0x01}, err
		}, true},
		"command altered": {func(cmd []byte, next testenv.Exchange) ([]byte, error) {
			cmd[len(cmd)-5] ^= 1
			return next(cmd)
		}, false},
		"success forged": {func(cmd []byte, _ testenv.Exchange) ([]byte, error) {
			return []byte{0x80, 0x02, 0, 0, 0, 10, 0, 0, 0, 0}, nil
		}, false},
	} {
		t.Run(name, func(t *testing.T) {
			old, next := setRoot(t, h.TPM), secret.Random(tpm.KeySize)
			var hit atomic.Bool
			h.tap.Intercept(func(cmd []byte, pass testenv.Exchange) ([]byte, error) {
				if code(cmd) != tpm2.TPMCCNVWrite || hit.Swap(true) {
					return pass(cmd)
				}
				return c.intercept(cmd, pass)
			})
			err := h.SetRoot(t.Context(), next)
			if !hit.Load() {
				t.Fatal("the write did not come by")
			}
			if c.written {
				if err != nil {
					t.Fatalf("it was written: %v", err)
				}
				wantRoot(t, h.TPM, next)
				return
			}
			if err == nil {
				t.Fatal("not written, and no error")
			}
			wantRoot(t, h.TPM, old)
		})
	}
}

// A write that was sent is seen through, although the caller's time is up.
func TestRootWriteOutlastsItsContext(t *testing.T) {
	h := newHost(t)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	h.tap.Intercept(func(cmd []byte, next testenv.Exchange) ([]byte, error) {
		if code(cmd) == tpm2.TPMCCNVWrite {
			cancel()
		}
		return next(cmd)
	})
	root := secret.Random(tpm.KeySize)
	if err := h.SetRoot(ctx, root); err != nil {
		t.Fatal(err)
	}
	wantRoot(t, h.TPM, root)
	wantNoHandles(t, h.tap)
}

func TestRootLateWriteHasNoEffect(t *testing.T) {
	h := newHost(t)
	old := setRoot(t, h.TPM)
	var kept []byte
	h.tap.Intercept(func(cmd []byte, next testenv.Exchange) ([]byte, error) {
		if code(cmd) == tpm2.TPMCCNVWrite && kept == nil {
			kept = append([]byte(nil), cmd...)
			return nil, net.ErrClosed
		}
		return next(cmd)
	})
	if err := h.SetRoot(t.Context(), secret.Random(tpm.KeySize)); err == nil {
		t.Fatal("no error")
	}
	answer, err := h.tap.Send(kept)
	if err != nil {
		t.Fatal(err)
	}
	if code(answer) == 0 {
		t.Error("the TPM took a write that was already given up")
	}
	wantRoot(t, h.TPM, old)
}

func TestOwnerCannotReadOrWriteRoot(t *testing.T) {
	h := newHost(t)
	root := setRoot(t, h.TPM)
	public, err := tpm2.NVReadPublic{NVIndex: tpm2.TPMHandle(tpm.DefaultNVRoot)}.Execute(h.tap)
	if err != nil {
		t.Fatal(err)
	}
	index := tpm2.NamedHandle{Handle: tpm.DefaultNVRoot, Name: public.NVName}
	for name, auth := range map[string]tpm2.AuthHandle{
		"owner": {Handle: tpm2.TPMRHOwner, Auth: tpm2.PasswordAuth(nil)},
		"index": {Handle: index.Handle, Name: index.Name, Auth: tpm2.PasswordAuth(nil)},
	} {
		if _, err := (tpm2.NVRead{AuthHandle: auth, NVIndex: index, Size: 32}).Execute(h.tap); err == nil {
			t.Errorf("%s can read the root", name)
		}
		_, err := tpm2.NVWrite{AuthHandle: auth, NVIndex: index, Data: tpm2.TPM2BMaxNVBuffer{Buffer: make([]byte, 32)}}.Execute(h.tap)
		if err == nil {
			t.Errorf("%s can write the root", name)
		}
	}
	wantRoot(t, h.TPM, root)

	// The owner can take the index away, and must not get a root by putting an open one there.
	_, err = tpm2.NVUndefineSpace{AuthHandle: tpm2.TPMRHOwner, NVIndex: index}.Execute(h.tap)
	if err != nil {
		t.Fatal(err)
	}
	_, err = h.Root(t.Context())
	wantClass(t, err, tpm.ClassLost)
	_, err = tpm.Provision(t.Context(), h.cfg)
	wantClass(t, err, tpm.ClassLost)
	weak, err := public.NVPublic.Contents()
	if err != nil {
		t.Fatal(err)
	}
	weak.Attributes.OwnerRead, weak.Attributes.Written = true, false
	_, err = tpm2.NVDefineSpace{AuthHandle: tpm2.TPMRHOwner, PublicInfo: tpm2.New2B(*weak)}.Execute(h.tap)
	if err != nil {
		t.Fatal(err)
	}
	wantClass(t, h.SetRoot(t.Context(), secret.Random(tpm.KeySize)), tpm.ClassLost)
	_, err = tpm.Open(t.Context(), h.cfg)
	wantClass(t, err, tpm.ClassLost)
}

// The loss of a root is said by each later run of Provision too, with and without signed
// policies.
func TestLostRootIsNotMadeAnew(t *testing.T) {
	for name, h := range map[string]*host{"fixed": newHost(t, 4), "governed": newGovernedHost(t, newTeam(t), 4)} {
		undefine(t, h, tpm.DefaultNVRoot)
		for range 2 {
			p, err := tpm.Provision(t.Context(), h.cfg)
			if tpm.ClassOf(err) != tpm.ClassLost {
				t.Errorf("%s: %q, %v", name, p.Steps, err)
			}
		}
		if _, err := tpm.Withdraw(t.Context(), h.cfg); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		fresh := h.cfg
		fresh.SRKName, fresh.PCRWanted, fresh.Identity = nil, nil, nil
		provision(t, fresh)
	}
}
