//go:build cgo

package hsm

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"github.com/miekg/pkcs11"

	"conseal/internal/disk"
)

// Provision makes what a host needs in its token, unless it is there already: the
// identity key pair, the wrapping key, and last the sentinel, which says that all
// was made and works. It makes no root: SetRoot does. Before a wrapping key is made,
// the method shows with a throw-away key that it works on this token; if it does
// not, the error says which method would.
//
// If the sentinel is there and a key is not, the key is lost. Provision then makes
// nothing: a new key under an old name would hide the loss. If a key is there and
// does not work, and the sentinel is not there, Provision was interrupted while the
// token made it: then it is made again, for [Open] never let anybody use it.
// In the second of two tokens it makes no key: see [Config.Second]. If the state folder has
// a root and the token does not show the sentinel, it makes nothing either.
func Provision(ctx context.Context, cfg Config) (Provisioned, error) {
	h, err := connect(ctx, cfg)
	if err != nil {
		return Provisioned{}, err
	}
	defer h.Close()
	p := Provisioned{Token: h.uri.path()}
	if err := h.rightToken(ctx); err != nil {
		return p, fmt.Errorf("hsm: provisioning %s: %w", h.Name(), err)
	}
	for _, o := range h.objects() {
		step := Step{Object: o.name + " " + label(cfg.Name, o.what)}
		if step.Done, err = h.ensure(ctx, o); err != nil {
			return p, fmt.Errorf("hsm: provisioning %s: %s: %w", h.Name(), step.Object, err)
		}
		p.Steps = append(p.Steps, step)
	}
	var r Report
	err = h.do(ctx, func(s *session) error { r = Report{}; return r.identify(s) })
	if err != nil {
		return p, fmt.Errorf("hsm: provisioning %s: asking what it is: %w", h.Name(), err)
	}
	p.Erasure, p.ErasureWhy = r.Erasure, r.ErasureWhy
	return p, nil
}

// rightToken is nil unless the state folder has a root, of this host in some token, and
// this one does not show the sentinel: a token in its place, or one whose storage is away.
func (h *HSM) rightToken(ctx context.Context) error {
	files, err := readRootFiles(h.cfg.StateDir)
	if err != nil || !slices.ContainsFunc(files, func(f rootFile) bool { return !f.plan() }) {
		return err
	}
	if err = h.do(ctx, (*session).sentinel); err != nil {
		err = fmt.Errorf("%s has a root of this host's, so its keys must be in the token: %w; if they are gone for good, empty that folder and do this again", h.cfg.StateDir, err)
	}
	return err
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
		{"identity key pair", "identity", pkcs11.CKO_PRIVATE_KEY, (*session).generateIdentity,
			func(ctx context.Context) error { _, err := h.Identity(ctx); return err }},
		{"wrapping key", "wrap", h.method.key.class, (*session).generateWrap,
			func(ctx context.Context) error { _, err := h.checkWrap(ctx); return err }},
		{"sentinel", "sentinel", anyClass, (*session).makeSentinel,
			func(ctx context.Context) error { return h.do(ctx, (*session).sentinel) }},
	}
}

// ensure makes an object that is not there and says what it did.
func (h *HSM) ensure(ctx context.Context, o object) (done string, err error) {
	var complete, there bool
	err = h.do(ctx, func(s *session) (err error) {
		if complete, err = s.has(anyClass, "sentinel"); err == nil {
			there, err = s.has(o.class, o.what)
		}
		return err
	})
	if err != nil {
		return "", err
	}
	copied := h.cfg.Second && o.what != "sentinel"
	given := h.cfg.given(o.what)
	switch {
	case complete && !there:
		return "", fmt.Errorf("this host was provisioned before: %w", ErrLost)
	case given != "" && !there:
		return "", fmt.Errorf("no key %q of this kind is in the token: make it there first, or let this host make its own", given)
	case given != "":
		return "already there, as " + given, h.checkGiven(ctx, o)
	case copied && !there:
		return "", errors.New("it is not in the second token: copy it there from the first by the vendor's means, with its label and id, and do this again")
	case copied:
		return "already there", o.check(ctx)
	}
	if there {
		err := o.check(ctx)
		if complete || !unable(err) {
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

// checkGiven checks a key that somebody else made, and that the host can make the root
// keys, which it makes in any case.
func (h *HSM) checkGiven(ctx context.Context, o object) error {
	if err := o.check(ctx); err != nil || o.what != "wrap" {
		return err
	}
	err := h.change(ctx, func(s *session) error { return s.selfTest(nil) })
	if err != nil {
		return fmt.Errorf("the host makes a key for each root, and cannot: %w", err)
	}
	return nil
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
	return s.destroyAll(s.find(anyClass, s.label(o.what)))
}

func (s *session) destroyAll(all []pkcs11.ObjectHandle, err error) error {
	for _, x := range all {
		if err == nil {
			err = failed("C_DestroyObject", s.p.DestroyObject(s.h, x))
		}
	}
	return err
}

func (s *session) generateWrap() error {
	if err := s.selfTest(nil); err != nil {
		return s.otherMethod(err)
	}
	return s.makeKey(s.label("wrap"), randomID())
}

func randomID() (id keyID) {
	rand.Read(id[:])
	return id
}

// makeSentinel makes a data object, or a key where the token takes none, as NSS and,
// by their documents, CloudHSM do not.
func (s *session) makeSentinel() error {
	err := s.aside((*session).makeData)
	if !unable(err) {
		return err
	}
	if made, err := s.has(anyClass, "sentinel"); made || err != nil {
		return err // it came to be all the same, and over two every later run would fail
	}
	_, err = s.generate(s.label("sentinel"), randomID(), true)
	return err
}

func (s *session) makeData() error {
	return s.frozen(s.label("sentinel"), nil, func(extra []*pkcs11.Attribute) error {
		_, err := s.p.CreateObject(s.h, append([]*pkcs11.Attribute{
			attr(pkcs11.CKA_CLASS, pkcs11.CKO_DATA), attr(pkcs11.CKA_TOKEN, true), attr(pkcs11.CKA_PRIVATE, true),
			attr(pkcs11.CKA_LABEL, s.label("sentinel")), attr(pkcs11.CKA_APPLICATION, "conseal"),
			attr(pkcs11.CKA_VALUE, []byte("conseal hsm v1"))}, extra...))
		return failed("C_CreateObject", err)
	})
}

// Withdraw destroys what [Provision] and SetRoot made in the token: objects with this
// host's labels, and no others; keys of somebody else stay. A copy of the other token's root
// keys goes as well. The sentinel goes last, after the wrapped roots in the state folder: while
// those are there and the sentinel is not, this is not the token that is meant, and Withdraw
// fails. It may be repeated.
func Withdraw(ctx context.Context, cfg Config) (Provisioned, error) {
	h, err := connect(ctx, cfg)
	if err != nil {
		return Provisioned{}, err
	}
	defer h.Close()
	p := Provisioned{Token: h.uri.path()}
	fail := func(what string, err error) (Provisioned, error) {
		return p, fmt.Errorf("hsm: withdrawing from %s: %s%w", h.Name(), what, err)
	}
	if err := h.rightToken(ctx); err != nil {
		return fail("", err)
	}
	for _, what := range []string{cfg.rootName(), cfg.otherRootName(), "wrap", "identity", "sentinel"} {
		if what == "sentinel" {
			if err := h.removeRootFiles(); err != nil {
				return fail("", err)
			}
		}
		step := Step{Object: label(cfg.Name, what)}
		if step.Done, err = h.withdraw(ctx, step.Object); err != nil {
			return fail(step.Object+": ", err)
		}
		p.Steps = append(p.Steps, step)
	}
	return p, nil
}

func (h *HSM) removeRootFiles() error {
	files, err := readRootFiles(h.cfg.StateDir)
	for _, f := range files {
		if err == nil {
			err = os.Remove(filepath.Join(h.cfg.StateDir, rootFileName(f.generation)))
		}
	}
	if err == nil {
		err = disk.Sync(h.cfg.StateDir)
	}
	return err
}

// withdraw destroys all objects of a label, sees that they are gone, and says what it
// did.
func (h *HSM) withdraw(ctx context.Context, label string) (done string, err error) {
	destroyed := 0
	err = h.change(ctx, func(s *session) error {
		if err := s.loggedIn(); err != nil {
			return err
		}
		all, err := s.find(anyClass, label)
		if err := s.destroyAll(all, err); err != nil {
			return err
		}
		destroyed += len(all)
		if all, err = s.find(anyClass, label); err == nil && len(all) > 0 {
			err = &Error{Class: ClassPolicy, What: fmt.Sprintf("%d objects are still in the token after they were destroyed", len(all))}
		}
		return err
	})
	if destroyed == 0 {
		return "not there", err
	}
	return fmt.Sprintf("destroyed, %d of them", destroyed), err
}
