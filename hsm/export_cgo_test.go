//go:build cgo

package hsm

import (
	"context"
	"crypto"
	"crypto/rand"
	"errors"
	"slices"

	"github.com/miekg/pkcs11"

	"conseal/internal/secret"
)

// RootSteps is the number of steps of SetRoot.
var RootSteps = len((&rootChange{}).steps())

// CrashInSetRoot does the first n steps of SetRoot and stops, as a crash would.
func (h *HSM) CrashInSetRoot(ctx context.Context, next *secret.Bytes, n int) error {
	c := &rootChange{h: h, next: next}
	for _, step := range c.steps()[:n] {
		if err := step(ctx); err != nil {
			return err
		}
	}
	return nil
}

// FailInSetRoot does the first n steps of SetRoot and then fails, as a full disk would.
func (h *HSM) FailInSetRoot(ctx context.Context, next *secret.Bytes, n int) error {
	c := &rootChange{h: h, next: next}
	defer c.giveUp(ctx)
	for _, step := range c.steps()[:n] {
		if err := step(ctx); err != nil {
			return err
		}
	}
	return nil
}

// StepsOfSetRoot are the steps of one SetRoot, for others to happen between them.
func (h *HSM) StepsOfSetRoot(next *secret.Bytes) []func(context.Context) error {
	return (&rootChange{h: h, next: next}).steps()
}

// RootKeys counts the root keys in the token.
func (h *HSM) RootKeys(ctx context.Context) (int, error) {
	keys, err := h.rootKeys(ctx)
	return len(keys), err
}

// Session lends a logged-in session for calls that the package does not make.
func (h *HSM) Session(ctx context.Context, fn func(p *pkcs11.Ctx, sh pkcs11.SessionHandle, slot uint) error) error {
	return h.do(ctx, func(s *session) error { return fn(s.p, s.h, s.slot) })
}

// ParsePoint parses CKA_EC_POINT.
var ParsePoint = parsePoint

// Restart starts a module again, so that it sees tokens that were made meanwhile.
func Restart(path string) error {
	m, err := loadModule(path, nil, "")
	if err != nil {
		return err
	}
	return m.restart(m.epoch)
}

// SetPIN changes the user PIN of the token that a key of [OpenKey] is in.
func SetPIN(key crypto.Signer, from, to string) error {
	k := key.(*tokenKey)
	sh, err := k.mod.openSession(k.s.slot)
	if err != nil {
		return err
	}
	return errors.Join(k.mod.p.SetPIN(sh, from, to), k.mod.p.CloseSession(sh))
}

// MakeObject tries to make an object in the token with the session of a key of [OpenKey].
func MakeObject(key crypto.Signer) error {
	s := key.(*tokenKey).s
	s.cfg = &Config{Name: "nobody"}
	return s.makeData()
}

// SmallRSA makes RSA keys of 2048 bits, which take a fifth of the time, until its
// result is called.
func SmallRSA() (restore func()) {
	sizes := rsaSizes
	rsaSizes = sizes[1:]
	return func() { rsaSizes = sizes }
}

// ForgeRoot makes the file of a root under the key of another root's file, signed by
// anybody.
func (h *HSM) ForgeRoot(ctx context.Context, file []byte, root *secret.Bytes, signer crypto.Signer) ([]byte, error) {
	e, err := decodeEnvelope(file)
	if err != nil {
		return nil, err
	}
	bind := e.bind(label(h.cfg.Name, "root"), "root")
	err = h.with(ctx, e, "root", func(s *session, key pkcs11.ObjectHandle) error {
		return root.Use(func(b []byte) (err error) {
			e.body, err = s.method.wrap(s, key, bind, b)
			return err
		})
	})
	if err != nil {
		return nil, err
	}
	der, err := signer.Sign(rand.Reader, signedDigest(bind, e.body), crypto.SHA256)
	e.body = slices.Concat([]byte{byte(len(der))}, der, e.body)
	return e.encode(), err
}

// Wrap is one half of a method, without the session and the key.
type Wrap = func(bind, in []byte) ([]byte, error)

// SelfTest tries a method whose halves spoil makes of those of aes-gcm.
func (h *HSM) SelfTest(ctx context.Context, spoil func(wrap, unwrap Wrap) (Wrap, Wrap)) error {
	return h.change(ctx, func(s *session) error {
		m, spoilt := methodOf("aes-gcm"), *methodOf("aes-gcm")
		halves := func(s *session, key pkcs11.ObjectHandle) (Wrap, Wrap) {
			return spoil(func(bind, in []byte) ([]byte, error) { return m.wrap(s, key, bind, in) },
				func(bind, in []byte) ([]byte, error) { return m.unwrap(s, key, bind, in) })
		}
		spoilt.wrap = func(s *session, key pkcs11.ObjectHandle, bind, in []byte) ([]byte, error) {
			wrap, _ := halves(s, key)
			return wrap(bind, in)
		}
		spoilt.unwrap = func(s *session, key pkcs11.ObjectHandle, bind, in []byte) ([]byte, error) {
			_, unwrap := halves(s, key)
			return unwrap(bind, in)
		}
		other := *s
		other.method = &spoilt
		return other.selfTest(nil)
	})
}
