//go:build cgo

package hsm

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"

	"github.com/miekg/pkcs11"
)

// Provision makes what a host needs in its token, unless it is there already: the
// wrapping key, the identity key pair, and last the sentinel, which says that all
// was made and works. It makes no root: SetRoot does.
//
// If the sentinel is there and a key is not, the key is lost. Provision then makes
// nothing: a new key under an old name would hide the loss. If a key is there and
// does not work, and the sentinel is not there, Provision was interrupted while the
// token made it: then it is made again, for [Open] never let anybody use it.
func Provision(ctx context.Context, cfg Config) (Provisioned, error) {
	h, err := connect(ctx, cfg)
	if err != nil {
		return Provisioned{}, err
	}
	defer h.Close()
	p := Provisioned{Token: h.uri.path()}
	for _, o := range h.objects() {
		step := Step{Object: o.name + " " + label(cfg.Name, o.what)}
		if step.Done, err = h.ensure(ctx, o); err != nil {
			return p, fmt.Errorf("hsm: provisioning %s: %s: %w", h.Name(), step.Object, err)
		}
		p.Steps = append(p.Steps, step)
	}
	return p, nil
}

// object is something that a host needs in its token.
type object struct {
	name  string // for people
	what  string // in the label
	class uint
	make  func(*session) error
	check func(context.Context) error // that it works
}

func (h *HSM) objects() []object {
	return []object{
		{"wrapping key", "wrap", pkcs11.CKO_SECRET_KEY, (*session).generateWrap,
			func(ctx context.Context) error { _, err := h.checkWrap(ctx); return err }},
		{"identity key pair", "identity", pkcs11.CKO_PRIVATE_KEY, (*session).generateIdentity,
			func(ctx context.Context) error { _, err := h.Identity(ctx); return err }},
		{"sentinel", "sentinel", pkcs11.CKO_DATA, (*session).makeSentinel,
			func(ctx context.Context) error { return h.do(ctx, (*session).sentinel) }},
	}
}

// ensure makes an object that is not there and says what it did.
func (h *HSM) ensure(ctx context.Context, o object) (done string, err error) {
	var complete, there bool
	err = h.do(ctx, func(s *session) (err error) {
		if complete, err = s.has(pkcs11.CKO_DATA, "sentinel"); err == nil {
			there, err = s.has(o.class, o.what)
		}
		return err
	})
	if err != nil {
		return "", err
	}
	if complete && !there {
		return "", fmt.Errorf("this host was provisioned before: %w", ErrLost)
	}
	if there {
		err := o.check(ctx)
		if c := ClassOf(err); complete || c != ClassPolicy && c != ClassAmbiguous {
			return "already there", err
		}
		if err := h.change(ctx, func(s *session) error { return s.remove(o) }); err != nil {
			return "", err
		}
	}
	err = h.change(ctx, func(s *session) error {
		if made, err := s.has(o.class, o.what); made || err != nil {
			return err // by the try before this one
		}
		return o.make(s)
	})
	if err != nil {
		return "", err
	}
	return "made", o.check(ctx)
}

// has tells whether a private object is there.
func (s *session) has(class uint, what string) (bool, error) {
	_, err := s.one(class, s.label(what))
	if errors.Is(err, errMissing) {
		return false, s.loggedIn()
	}
	return err == nil, err
}

// remove destroys an object that was half made, and the public half of a key pair.
func (s *session) remove(o object) error {
	for _, class := range []uint{o.class, pkcs11.CKO_PUBLIC_KEY} {
		all, err := s.find(class, s.label(o.what))
		if err != nil {
			return err
		}
		for _, x := range all {
			if err := s.p.DestroyObject(s.h, x); err != nil {
				return failed("C_DestroyObject", err)
			}
		}
	}
	return nil
}

func (s *session) generateWrap() error {
	var id keyID
	rand.Read(id[:])
	return s.generateAES(s.label("wrap"), id)
}

func (s *session) makeSentinel() error {
	return frozen(func(extra []*pkcs11.Attribute) error {
		_, err := s.p.CreateObject(s.h, append([]*pkcs11.Attribute{
			attr(pkcs11.CKA_CLASS, pkcs11.CKO_DATA), attr(pkcs11.CKA_TOKEN, true), attr(pkcs11.CKA_PRIVATE, true),
			attr(pkcs11.CKA_LABEL, s.label("sentinel")), attr(pkcs11.CKA_APPLICATION, "conseal"),
			attr(pkcs11.CKA_VALUE, []byte("conseal hsm v1"))}, extra...))
		return failed("C_CreateObject", err)
	})
}
