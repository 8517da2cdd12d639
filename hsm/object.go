//go:build cgo

package hsm

import (
	"cmp"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"

	"github.com/miekg/pkcs11"
)

// Objects of a host, by label:
//
//	conseal/<name>/wrap      key of the method's kind that wraps the keys of shares
//	conseal/<name>/root      key of the method's kind that wraps the root, one a generation
//	conseal/<name>/identity  P-256 key pair
//	conseal/<name>/sentinel  private data object, made last; a key if the token takes no data
//
// The sentinel tells a lost key from a token whose storage is away: SoftHSM,
// for one, then finds nothing and reports no error.
func label(name, what string) string { return "conseal/" + name + "/" + what }

func attr(kind uint, value any) *pkcs11.Attribute { return pkcs11.NewAttribute(kind, value) }

// label is what an object of this host is found by: its label, or what [Config] says of
// a key that somebody else made.
func (s *session) label(what string) string {
	return cmp.Or(s.cfg.given(what), label(s.cfg.Name, what))
}

// named is the attribute by which an object is found.
func named(label string) *pkcs11.Attribute {
	if id, ok := givenID(label); ok {
		return attr(pkcs11.CKA_ID, id)
	}
	return attr(pkcs11.CKA_LABEL, label)
}

// anyClass finds objects of all classes.
const anyClass = ^uint(0)

// find gives all token objects of a class under a label. Whoever concludes
// anything from an empty answer calls sentinel first.
func (s *session) find(class uint, label string, more ...*pkcs11.Attribute) ([]pkcs11.ObjectHandle, error) {
	return s.findAny(class, label, append(slices.Clip(more), attr(pkcs11.CKA_TOKEN, true))...)
}

// findAny gives session objects too.
func (s *session) findAny(class uint, label string, more ...*pkcs11.Attribute) ([]pkcs11.ObjectHandle, error) {
	template := append(slices.Clone(more), named(label))
	if class != anyClass {
		template = append(template, attr(pkcs11.CKA_CLASS, class))
	}
	return s.search(template)
}

// search gives all objects that fit a template; of an empty answer see find.
func (s *session) search(template []*pkcs11.Attribute) ([]pkcs11.ObjectHandle, error) {
	if err := s.p.FindObjectsInit(s.h, template); err != nil {
		return nil, failed("C_FindObjectsInit", err)
	}
	var all []pkcs11.ObjectHandle
	for {
		some, _, err := s.p.FindObjects(s.h, 64)
		if err != nil {
			return nil, failed("C_FindObjects", err) // the session is closed, and the search with it
		}
		if len(some) == 0 {
			break
		}
		all = append(all, some...)
	}
	return all, failed("C_FindObjectsFinal", s.p.FindObjectsFinal(s.h))
}

// one finds the single object of a class under a label.
func (s *session) one(class uint, label string, more ...*pkcs11.Attribute) (pkcs11.ObjectHandle, error) {
	all, err := s.find(class, label, more...)
	switch {
	case err != nil:
		return 0, err
	case len(all) == 0:
		return 0, errMissing
	case len(all) > 1:
		return 0, &Error{Class: ClassPolicy, What: fmt.Sprintf("%d objects of one kind are called %s: remove what this host did not make", len(all), label)}
	}
	return all[0], nil
}

// key finds the single object that [Provision] or SetRoot made; if it is not
// there, the error says whether it is lost.
func (s *session) key(class uint, label string, more ...*pkcs11.Attribute) (pkcs11.ObjectHandle, error) {
	h, err := s.one(class, label, more...)
	if !errors.Is(err, errMissing) {
		return h, err
	}
	if err := s.sentinel(); err != nil {
		return 0, err
	}
	return 0, fmt.Errorf("%s: %w", label, ErrLost)
}

// sentinel is nil if the session sees the host's private objects: only then does
// an object that is not found not exist.
func (s *session) sentinel() error {
	err := s.loggedIn()
	if err != nil {
		return err
	}
	if _, err = s.one(anyClass, s.label("sentinel")); !errors.Is(err, errMissing) {
		return err
	}
	return &Error{Class: ClassToken, What: fmt.Sprintf("object %s is not in the token: its storage is away, or it was never provisioned for this host", s.label("sentinel"))}
}

// loggedIn asks the token: a session that was logged out finds no private
// object and reports no error.
func (s *session) loggedIn() error {
	si, err := s.p.GetSessionInfo(s.h)
	if err == nil && s.asks && si.State != pkcs11.CKS_RW_USER_FUNCTIONS && si.State != pkcs11.CKS_RO_USER_FUNCTIONS {
		err = pkcs11.Error(pkcs11.CKR_USER_NOT_LOGGED_IN)
	}
	return failed("C_GetSessionInfo", err)
}

// foreignID stands for the id of a key that somebody else made: it names that key in
// blobs as keyID does ours.
func (s *session) foreignID(h pkcs11.ObjectHandle) (id keyID, err error) {
	b, err := s.value(h, pkcs11.CKA_ID)
	sum := sha256.Sum256(append([]byte("conseal hsm key v1"), b...))
	copy(id[:], sum[:])
	return id, err
}

// wrapKey finds the wrapping key, or only that one whose id is given.
func (s *session) wrapKey(id *keyID) (pkcs11.ObjectHandle, error) {
	class, label := s.method.key.class, s.label("wrap")
	if s.cfg.Wrap == "" && id != nil {
		return s.key(class, label, attr(pkcs11.CKA_ID, id[:]))
	}
	key, err := s.key(class, label)
	if err != nil || id == nil {
		return key, err
	}
	if got, err := s.foreignID(key); err != nil || got != *id {
		return 0, cmp.Or(err, fmt.Errorf("%s: another key has its name now: %w", label, ErrLost))
	}
	return key, nil
}

// keyID reads an object's id, which must be one of ours.
func (s *session) keyID(h pkcs11.ObjectHandle) (keyID, error) {
	b, err := s.value(h, pkcs11.CKA_ID)
	if err != nil {
		return keyID{}, err
	}
	if len(b) != len(keyID{}) {
		return keyID{}, &Error{Class: ClassPolicy, What: fmt.Sprintf("an object with one of this host's labels has an id of %d bytes: remove what this host did not make", len(b))}
	}
	return keyID(b), nil
}

// value reads one attribute. One at a time, for a token that lacks one of
// several may answer none.
func (s *session) value(h pkcs11.ObjectHandle, kind uint) ([]byte, error) {
	a, err := s.p.GetAttributeValue(s.h, h, []*pkcs11.Attribute{attr(kind, nil)})
	if err != nil {
		return nil, failed("C_GetAttributeValue", err)
	}
	return a[0].Value, nil
}

// property is a boolean attribute that a key must have.
type property struct {
	kind uint
	name string
	want bool
}

// guarded are the properties of every secret and private key of ours.
func guarded(usage ...property) []property {
	return append([]property{
		{pkcs11.CKA_PRIVATE, "PRIVATE", true}, {pkcs11.CKA_SENSITIVE, "SENSITIVE", true}, {pkcs11.CKA_EXTRACTABLE, "EXTRACTABLE", false},
	}, usage...)
}

// template makes a template of properties.
func template(properties []property, more ...*pkcs11.Attribute) []*pkcs11.Attribute {
	for _, p := range properties {
		more = append(more, attr(p.kind, p.want))
	}
	return more
}

// frozen calls generate with what keeps an object from being changed or copied, and
// with less where the token does not know that, or fails over it as NSS does over
// CKA_COPYABLE. A token may fail after it has made the object: that is destroyed, by
// its label and by what else is its own.
func (s *session) frozen(label string, own []*pkcs11.Attribute, generate func(extra []*pkcs11.Attribute) error) (err error) {
	unmodifiable, uncopyable := attr(pkcs11.CKA_MODIFIABLE, false), attr(pkcs11.CKA_COPYABLE, false)
	for _, extra := range [][]*pkcs11.Attribute{{unmodifiable, uncopyable}, {unmodifiable}, nil} {
		if err = generate(extra); !unable(err) {
			return err
		}
		made := s.aside(func(s *session) error { return s.destroyAll(s.findAny(anyClass, label, own...)) })
		if made != nil {
			return errors.Join(err, made)
		}
	}
	return err
}

// unable tells whether a token failed at what it was asked, rather than was away.
func unable(err error) bool {
	c := ClassOf(err)
	return c == ClassPolicy || c == ClassAmbiguous
}

// checkProperties reads a key's properties back; the token may have ignored the
// template, or somebody may have made the key otherwise.
func (s *session) checkProperties(h pkcs11.ObjectHandle, label string, properties []property) error {
	never := []property{ // PKCS#11 v2.40 section 4.9: since its birth
		{pkcs11.CKA_ALWAYS_SENSITIVE, "ALWAYS_SENSITIVE", true}, {pkcs11.CKA_NEVER_EXTRACTABLE, "NEVER_EXTRACTABLE", true}}
	for _, p := range append(never, properties...) {
		if s.tolerated(label, p) {
			continue
		}
		if err := s.checkProperty(h, label, p); err != nil {
			return err
		}
	}
	return nil
}

// tolerated are usages that a key of somebody else may have besides its own, for other
// tools leave those to the token. They open nothing that the key's own do not, but
// deriving: that makes keys which can leave.
func (s *session) tolerated(label string, p property) bool {
	usages := []uint{pkcs11.CKA_ENCRYPT, pkcs11.CKA_DECRYPT, pkcs11.CKA_WRAP, pkcs11.CKA_UNWRAP, pkcs11.CKA_SIGN, pkcs11.CKA_SIGN_RECOVER, pkcs11.CKA_VERIFY}
	return (label == s.cfg.Identity || label == s.cfg.Wrap) && !p.want && slices.Contains(usages, p.kind)
}

func (s *session) checkProperty(h pkcs11.ObjectHandle, label string, p property) error {
	b, err := s.value(h, p.kind)
	if err != nil {
		return fmt.Errorf("reading CKA_%s of %s: %w", p.name, label, err)
	}
	if len(b) != 1 || (b[0] != 0) != p.want {
		return &Error{Class: ClassPolicy, What: fmt.Sprintf("key %s: CKA_%s is not %t", label, p.name, p.want)}
	}
	return nil
}

// makeKey makes a key of the method's kind, unless one with this id exists, and
// checks it.
func (s *session) makeKey(label string, id keyID) error {
	_, err := s.one(s.method.key.class, label, attr(pkcs11.CKA_ID, id[:]))
	if errors.Is(err, errMissing) {
		_, err = s.generate(label, id, true)
	}
	if err == nil {
		err = s.checkKey(label, id)
	}
	return err
}

// generate makes a key of the method's kind in the token or, to be thrown away, in
// the session.
func (s *session) generate(label string, id keyID, token bool) (key pkcs11.ObjectHandle, err error) {
	kind := s.method.key
	name := []*pkcs11.Attribute{attr(pkcs11.CKA_LABEL, label), attr(pkcs11.CKA_ID, id[:]), attr(pkcs11.CKA_TOKEN, token)}
	err = s.frozen(label, name[1:2], func(extra []*pkcs11.Attribute) error {
		own := template(guarded(kind.usage...), append(extra, name...)...)
		if kind.class == pkcs11.CKO_PRIVATE_KEY {
			key, err = s.generateRSA(kind, own)
			return err
		}
		key, err = s.p.GenerateKey(s.h, []*pkcs11.Mechanism{pkcs11.NewMechanism(kind.generate, nil)}, append(own,
			attr(pkcs11.CKA_CLASS, kind.class), attr(pkcs11.CKA_KEY_TYPE, kind.kind), attr(pkcs11.CKA_VALUE_LEN, keySize)))
		return failed("C_GenerateKey", err)
	})
	return key, err
}

// rsaSizes are tried in this order, in bits.
var rsaSizes = []int{3072, minRSA}

// generateRSA makes a key pair. Nobody needs the public half, which goes at once.
func (s *session) generateRSA(kind keyKind, private []*pkcs11.Attribute) (key pkcs11.ObjectHandle, err error) {
	var half pkcs11.ObjectHandle
	for _, bits := range rsaSizes {
		public := []*pkcs11.Attribute{attr(pkcs11.CKA_TOKEN, false), attr(pkcs11.CKA_ENCRYPT, true),
			attr(pkcs11.CKA_MODULUS_BITS, bits), attr(pkcs11.CKA_PUBLIC_EXPONENT, rsaExponent().Bytes())}
		half, key, err = s.p.GenerateKeyPair(s.h, []*pkcs11.Mechanism{pkcs11.NewMechanism(kind.generate, nil)}, public, private)
		if err = failed("C_GenerateKeyPair", err); !unable(err) {
			break
		}
	}
	if err != nil {
		return 0, err
	}
	return key, failed("C_DestroyObject", s.p.DestroyObject(s.h, half))
}

// checkKey finds a key of the method's kind and checks what it may do.
func (s *session) checkKey(label string, id keyID) error {
	h, err := s.key(s.method.key.class, label, attr(pkcs11.CKA_ID, id[:]))
	if err != nil {
		return err
	}
	return s.checkKind(h, label)
}

func (s *session) checkKind(h pkcs11.ObjectHandle, label string) error {
	kind := s.method.key
	numbers := map[uint]uint{pkcs11.CKA_KEY_TYPE: kind.kind}
	if kind.class == pkcs11.CKO_SECRET_KEY {
		numbers[pkcs11.CKA_VALUE_LEN] = keySize
	} else if _, err := s.rsaPublic(h); err != nil {
		return err
	}
	for attribute, want := range numbers {
		b, err := s.value(h, attribute)
		if err != nil {
			return err
		}
		if len(b) != 8 || binary.NativeEndian.Uint64(b) != uint64(want) { // a CK_ULONG
			return &Error{Class: ClassPolicy, What: fmt.Sprintf("key %s is not of the kind that method %s needs", label, s.method.name)}
		}
	}
	return s.checkProperties(h, label, guarded(kind.usage...))
}
