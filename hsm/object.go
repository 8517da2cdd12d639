//go:build cgo

package hsm

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/miekg/pkcs11"
)

// Objects of a host, by label:
//
//	conseal/<name>/wrap      AES-256 key that wraps the keys of shares
//	conseal/<name>/root      AES-256 key that wraps the root, one a generation
//	conseal/<name>/identity  P-256 key pair
//	conseal/<name>/sentinel  private data object, made last
//
// The sentinel tells a lost key from a token whose storage is away: SoftHSM,
// for one, then finds nothing and reports no error.
func label(name, what string) string { return "conseal/" + name + "/" + what }

func attr(kind uint, value any) *pkcs11.Attribute { return pkcs11.NewAttribute(kind, value) }

func (s *session) label(what string) string { return label(s.name, what) }

// find gives all token objects of a class under a label. Whoever concludes
// anything from an empty answer calls absent first.
func (s *session) find(class uint, label string, more ...*pkcs11.Attribute) ([]pkcs11.ObjectHandle, error) {
	return s.search(append([]*pkcs11.Attribute{
		attr(pkcs11.CKA_CLASS, class), attr(pkcs11.CKA_TOKEN, true), attr(pkcs11.CKA_LABEL, label)}, more...))
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
	if _, err = s.one(pkcs11.CKO_DATA, s.label("sentinel")); !errors.Is(err, errMissing) {
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
		{pkcs11.CKA_TOKEN, "TOKEN", true}, {pkcs11.CKA_PRIVATE, "PRIVATE", true},
		{pkcs11.CKA_SENSITIVE, "SENSITIVE", true}, {pkcs11.CKA_EXTRACTABLE, "EXTRACTABLE", false},
	}, usage...)
}

func aesProperties() []property {
	return guarded(
		property{pkcs11.CKA_ENCRYPT, "ENCRYPT", true}, property{pkcs11.CKA_DECRYPT, "DECRYPT", true},
		property{pkcs11.CKA_WRAP, "WRAP", false}, property{pkcs11.CKA_UNWRAP, "UNWRAP", false},
		property{pkcs11.CKA_SIGN, "SIGN", false}, property{pkcs11.CKA_VERIFY, "VERIFY", false},
		property{pkcs11.CKA_DERIVE, "DERIVE", false})
}

// template makes a template of properties.
func template(properties []property, more ...*pkcs11.Attribute) []*pkcs11.Attribute {
	for _, p := range properties {
		more = append(more, attr(p.kind, p.want))
	}
	return more
}

// frozen calls generate with what keeps a key from being changed or copied, and
// with less where the token does not know that.
func frozen(generate func(extra []*pkcs11.Attribute) error) (err error) {
	unmodifiable, uncopyable := attr(pkcs11.CKA_MODIFIABLE, false), attr(pkcs11.CKA_COPYABLE, false)
	for _, extra := range [][]*pkcs11.Attribute{{unmodifiable, uncopyable}, {unmodifiable}, nil} {
		if err = generate(extra); ClassOf(err) != ClassPolicy {
			return err
		}
	}
	return err
}

// checkProperties reads a key's properties back; the token may have ignored the
// template, or somebody may have made the key otherwise.
func (s *session) checkProperties(h pkcs11.ObjectHandle, label string, properties []property) error {
	never := []property{ // PKCS#11 v2.40 section 4.9: since its birth
		{pkcs11.CKA_ALWAYS_SENSITIVE, "ALWAYS_SENSITIVE", true}, {pkcs11.CKA_NEVER_EXTRACTABLE, "NEVER_EXTRACTABLE", true}}
	for _, p := range append(never, properties...) {
		b, err := s.value(h, p.kind)
		if err != nil {
			return fmt.Errorf("reading CKA_%s of %s: %w", p.name, label, err)
		}
		if len(b) != 1 || (b[0] != 0) != p.want {
			return &Error{Class: ClassPolicy, What: fmt.Sprintf("key %s: CKA_%s is not %t", label, p.name, p.want)}
		}
	}
	return nil
}

// generateAES makes an AES-256 key, unless one with this id exists, and checks it.
func (s *session) generateAES(label string, id keyID) error {
	_, err := s.one(pkcs11.CKO_SECRET_KEY, label, attr(pkcs11.CKA_ID, id[:]))
	if errors.Is(err, errMissing) {
		err = frozen(func(extra []*pkcs11.Attribute) error {
			_, err := s.p.GenerateKey(s.h, []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_AES_KEY_GEN, nil)},
				template(aesProperties(), append(extra,
					attr(pkcs11.CKA_CLASS, pkcs11.CKO_SECRET_KEY), attr(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_AES),
					attr(pkcs11.CKA_VALUE_LEN, keySize), attr(pkcs11.CKA_LABEL, label), attr(pkcs11.CKA_ID, id[:]))...))
			return failed("C_GenerateKey", err)
		})
	}
	if err == nil {
		_, err = s.aesKey(label, id)
	}
	return err
}

// aesKey finds an AES key and checks what it may do.
func (s *session) aesKey(label string, id keyID) (pkcs11.ObjectHandle, error) {
	h, err := s.key(pkcs11.CKO_SECRET_KEY, label, attr(pkcs11.CKA_ID, id[:]))
	if err != nil {
		return 0, err
	}
	for _, want := range []struct{ kind, value uint }{{pkcs11.CKA_KEY_TYPE, pkcs11.CKK_AES}, {pkcs11.CKA_VALUE_LEN, keySize}} {
		b, err := s.value(h, want.kind)
		if err != nil {
			return 0, err
		}
		if len(b) != 8 || binary.NativeEndian.Uint64(b) != uint64(want.value) { // a CK_ULONG
			return 0, &Error{Class: ClassPolicy, What: fmt.Sprintf("key %s is not an AES-256 key", label)}
		}
	}
	return h, s.checkProperties(h, label, aesProperties())
}

// seal wraps 32 bytes by AES-GCM inside the token (PKCS#11 v2.40 section 2.11.3). With
// random IVs of 96 bits one key is good for 2^32 blobs (NIST SP 800-38D section 8.3).
func (s *session) seal(key pkcs11.ObjectHandle, e *envelope, aad, plain []byte) error {
	params := pkcs11.NewGCMParams(e.iv[:], aad, 8*tagSize)
	defer params.Free()
	if err := s.p.EncryptInit(s.h, []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_AES_GCM, params)}, key); err != nil {
		return failed("C_EncryptInit", err)
	}
	ct, err := s.p.Encrypt(s.h, plain)
	if err != nil {
		return failed("C_Encrypt", err)
	}
	if string(params.IV()) != string(e.iv[:]) || len(ct) != len(e.ct) {
		return &Error{Class: ClassPolicy, What: "C_Encrypt: the token replaces the IV of AES-GCM"}
	}
	e.ct = [keySize + tagSize]byte(ct)
	return nil
}

// open undoes seal. The caller wipes what it returns.
func (s *session) open(key pkcs11.ObjectHandle, e *envelope, aad []byte) ([]byte, error) {
	params := pkcs11.NewGCMParams(e.iv[:], aad, 8*tagSize)
	defer params.Free()
	if err := s.p.DecryptInit(s.h, []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_AES_GCM, params)}, key); err != nil {
		return nil, failed("C_DecryptInit", err)
	}
	plain, err := s.p.Decrypt(s.h, e.ct[:])
	if err != nil {
		return nil, failed("C_Decrypt", err)
	}
	if len(plain) != keySize {
		clear(plain)
		return nil, &Error{Class: ClassPolicy, What: fmt.Sprintf("C_Decrypt: the token gave %d bytes for %d", len(plain), keySize)}
	}
	return plain, nil
}
