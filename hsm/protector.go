//go:build cgo

package hsm

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/sha256"
	"fmt"
	"slices"

	"github.com/miekg/pkcs11"

	"conseal/internal/secret"
)

const maxID = 1024 // bytes of an id that is bound into a blob

// Name says which token it is: "hsm pkcs11:token=conseal;serial=1234".
func (h *HSM) Name() string { return "hsm " + h.uri.path() }

// Kind is "hsm".
func (h *HSM) Kind() string { return "hsm" }

// Seal makes a fresh 32-byte key and the blob from which only this token gets it
// back. id says what the key is for, 1 to 1024 bytes, and is bound in.
func (h *HSM) Seal(ctx context.Context, id string) (*secret.Bytes, []byte, error) {
	key := secret.Random(keySize)
	blob, err := h.sealShare(ctx, id, key)
	if err != nil {
		key.Wipe()
		return nil, nil, fmt.Errorf("hsm: sealing a key for %q: %w", id, err)
	}
	return key, blob, nil
}

func (h *HSM) sealShare(ctx context.Context, id string, key *secret.Bytes) ([]byte, error) {
	if err := checkID(id); err != nil {
		return nil, err
	}
	e := h.envelope(kindShare, h.wrap)
	if err := h.seal(ctx, e, "wrap", id, key); err != nil {
		return nil, err
	}
	return e.encode(), nil
}

// Open gives back the key of a blob that Seal made under the same id.
func (h *HSM) Open(ctx context.Context, id string, blob []byte) (*secret.Bytes, error) {
	if err := checkID(id); err != nil {
		return nil, fmt.Errorf("hsm: %w", err)
	}
	e, err := decodeEnvelope(blob)
	if err != nil || e.kind != kindShare || e.key != h.wrap {
		return nil, fmt.Errorf("hsm: opening the key for %q: %w", id, ErrNotAuthentic)
	}
	key, err := h.open(ctx, e, "wrap", id)
	if err != nil {
		return nil, fmt.Errorf("hsm: opening the key for %q: %w", id, err)
	}
	return key, nil
}

func checkID(id string) error {
	if id == "" || len(id) > maxID {
		return fmt.Errorf("a key's id has %d bytes: must be 1 to %d", len(id), maxID)
	}
	return nil
}

func (h *HSM) envelope(kind byte, key keyID) *envelope {
	return &envelope{method: methodNumber(h.method.name), kind: kind, key: key}
}

// checkWrap finds the wrapping key and shows that it cannot leave the token,
// gives back what it wrapped, and refuses what was changed.
func (h *HSM) checkWrap(ctx context.Context) (id keyID, err error) {
	if h.method.signed {
		if h.signer, err = h.loadIdentity(ctx); err != nil {
			return id, err
		}
	}
	err = h.do(ctx, func(s *session) error {
		k, err := s.wrapKey(nil)
		if err != nil {
			return err
		}
		if s.cfg.Wrap != "" {
			id, err = s.foreignID(k)
		} else {
			id, err = s.keyID(k)
		}
		if err != nil {
			return err
		}
		return s.checkKind(k, s.label("wrap"))
	})
	if err != nil {
		return id, err
	}
	return id, h.canary(ctx, h.envelope(kindShare, id), "wrap")
}

// with runs fn with the key that e and its label name.
func (h *HSM) with(ctx context.Context, e *envelope, what string, fn func(s *session, key pkcs11.ObjectHandle) error) error {
	run := h.do
	if h.method.objects {
		run = h.change
	}
	return run(ctx, func(s *session) error {
		var k pkcs11.ObjectHandle
		var err error
		if what == "wrap" {
			k, err = s.wrapKey(&e.key)
		} else {
			k, err = s.key(s.method.key.class, s.label(what), attr(pkcs11.CKA_ID, e.key[:]))
		}
		if err != nil {
			return err
		}
		return fn(s, k)
	})
}

// seal wraps a secret into e by the key that e and label name. Nothing of a try is
// used again in another.
func (h *HSM) seal(ctx context.Context, e *envelope, what, id string, plain *secret.Bytes) error {
	bind := e.bind(label(h.cfg.Name, what), id)
	err := h.with(ctx, e, what, func(s *session, key pkcs11.ObjectHandle) error {
		return plain.Use(func(b []byte) (err error) {
			e.body, err = s.method.wrap(s, key, bind, b)
			return err
		})
	})
	if err != nil || !h.method.signed {
		return err
	}
	der, err := h.signer.sign(ctx, signedDigest(bind, e.body))
	e.body = slices.Concat([]byte{byte(len(der))}, der, e.body)
	return err
}

// signedDigest is what the identity key signs of an envelope.
func signedDigest(bind, body []byte) []byte {
	h := sha256.New()
	h.Write([]byte("conseal hsm envelope v1"))
	h.Write(bind) // says where it ends
	h.Write(body)
	return h.Sum(nil)
}

// verified takes the signature off a body.
func (h *HSM) verified(bind, body []byte) ([]byte, error) {
	if n := 1 + int(body[0]); n < len(body) && ecdsa.VerifyASN1(h.signer.public, signedDigest(bind, body[n:]), body[1:n]) {
		return body[n:], nil
	}
	return nil, ErrNotAuthentic
}

// open unwraps e. Some tokens do not say whether the data or they are at fault, and
// one that says so may be wrong: the key has to show that it works, and the data gets
// one more chance. Much hangs on it, for a root that is not authentic makes way for
// an older one.
func (h *HSM) open(ctx context.Context, e *envelope, what, id string) (*secret.Bytes, error) {
	if err := e.made(methodNumber(h.method.name)); err != nil {
		return nil, err
	}
	plain, err := h.unwrap(ctx, e, what, id)
	if !blamesData(err) {
		return plain, err
	}
	if canary := h.canary(ctx, e, what); canary != nil {
		return nil, fmt.Errorf("%v; and the key's self-test: %w", err, canary)
	}
	if plain, err = h.unwrap(ctx, e, what, id); blamesData(err) {
		return nil, ErrNotAuthentic
	}
	return plain, err
}

// blamesData tells whether it may be the data's fault.
func blamesData(err error) bool {
	c := ClassOf(err)
	return c == ClassData || c == ClassAmbiguous
}

func (h *HSM) unwrap(ctx context.Context, e *envelope, what, id string) (plain *secret.Bytes, err error) {
	bind, body := e.bind(label(h.cfg.Name, what), id), e.body
	if h.method.signed {
		if body, err = h.verified(bind, body); err != nil {
			return nil, err
		}
	}
	err = h.with(ctx, e, what, func(s *session, key pkcs11.ObjectHandle) error {
		b, err := s.method.unwrap(s, key, bind, body)
		if err == nil {
			plain = secret.Take(b)
		}
		return err
	})
	return plain, err
}

// canary shows that the key which like names works: it wraps, unwraps, and does
// not unwrap what was changed.
func (h *HSM) canary(ctx context.Context, like *envelope, what string) error {
	e := h.envelope(like.kind, like.key)
	key := secret.Random(keySize)
	defer key.Wipe()
	if err := h.seal(ctx, e, what, "canary", key); err != nil {
		return err
	}
	got, err := h.unwrap(ctx, e, what, "canary")
	if err != nil {
		return err
	}
	defer got.Wipe()
	if !got.Equal(key) {
		return &Error{Class: ClassPolicy, What: "self-test of " + label(h.cfg.Name, what) + ": the token gives back another key"}
	}
	for _, id := range []string{"canary", "another"} { // the ciphertext, then the id
		changed := *e
		if id == "canary" {
			changed.body = bytes.Clone(e.body)
			changed.body[len(e.body)-1] ^= 1
		}
		got, err := h.unwrap(ctx, &changed, what, id)
		got.Wipe()
		switch {
		case err == nil:
			return &Error{Class: ClassPolicy, What: "self-test of " + label(h.cfg.Name, what) + ": the token does not authenticate"}
		case !blamesData(err):
			return err // something else failed: nothing was shown
		}
	}
	return nil
}
