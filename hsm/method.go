//go:build cgo

package hsm

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha1"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"math/big"
	"slices"

	"github.com/miekg/pkcs11"
)

// method is one way in which a token guards 32 bytes. It binds them to a context:
// they come back under the same context only.
//
//   - aes-gcm encrypts them in the token, with the context as associated data.
//   - The others have no associated data in the token. There the token guards a
//     fresh 32-byte key, and that key encrypts the 32 bytes by AES-256-GCM in this
//     process, with the context and the token's part as associated data.
//   - hmac-sha256-prf gets that key as HMAC(K, salt || context), which binds twice.
//   - Whoever knows the public half can encrypt by RSA-OAEP. So that nobody can plant
//     a root or a key that he knows, the host's identity key signs context and body.
type method struct {
	name      string
	mechanism uint // CKM_ of what the key does
	flags     uint // CKF_ that the token must advertise for it
	key       keyKind
	objects   bool // wrapping makes objects in the session, see HSM.change
	signed    bool // by the identity key

	wrap func(s *session, key pkcs11.ObjectHandle, bind, plain []byte) (body []byte, err error)
	// unwrap undoes wrap. The caller wipes what it returns.
	unwrap func(s *session, key pkcs11.ObjectHandle, bind, body []byte) (plain []byte, err error)
}

// keyKind is the kind of a method's keys.
type keyKind struct {
	class    uint // CKO_ of the half that unwraps
	kind     uint // CKK_
	generate uint // CKM_ that makes it
	usage    []property
}

const (
	// ckmKWP is RFC 5649 (PKCS#11 v3.0 section 2.14). Of CKM_AES_KEY_WRAP_PAD, 0x210A,
	// tokens think differently.
	ckmKWP = 0x210B

	ivSize      = 12
	tagSize     = 16
	wrappedSize = keySize + 8 // RFC 3394, and RFC 5649 for 32 bytes
	saltSize    = 32
	minRSA      = 2048 // bits
)

// methods are all methods, in the order of [Methods].
func methods() []method {
	encrypt := keyKind{pkcs11.CKO_SECRET_KEY, pkcs11.CKK_AES, pkcs11.CKM_AES_KEY_GEN, usages(pkcs11.CKA_ENCRYPT, pkcs11.CKA_DECRYPT)}
	wrap := keyKind{pkcs11.CKO_SECRET_KEY, pkcs11.CKK_AES, pkcs11.CKM_AES_KEY_GEN, usages(pkcs11.CKA_WRAP, pkcs11.CKA_UNWRAP)}
	sign := keyKind{pkcs11.CKO_SECRET_KEY, pkcs11.CKK_GENERIC_SECRET, pkcs11.CKM_GENERIC_SECRET_KEY_GEN, usages(pkcs11.CKA_SIGN)}
	const crypt, wraps = pkcs11.CKF_ENCRYPT | pkcs11.CKF_DECRYPT, pkcs11.CKF_WRAP | pkcs11.CKF_UNWRAP
	all := []method{
		{name: "aes-gcm", mechanism: pkcs11.CKM_AES_GCM, flags: crypt, key: encrypt, wrap: wrapGCM, unwrap: unwrapGCM},
		keyEncrypt().method("aes-kw-enc", pkcs11.CKM_AES_KEY_WRAP, crypt, encrypt),
		keyWrap(pkcs11.CKM_AES_KEY_WRAP).method("aes-kw", pkcs11.CKM_AES_KEY_WRAP, wraps, wrap),
		keyWrap(ckmKWP).method("aes-kwp", ckmKWP, wraps, wrap),
		oaep("rsa-oaep-sha256", sha256.New, pkcs11.CKM_SHA256, pkcs11.CKG_MGF1_SHA256),
		prf().method("hmac-sha256-prf", pkcs11.CKM_SHA256_HMAC, pkcs11.CKF_SIGN, sign),
		oaep(onlyByName, sha1.New, pkcs11.CKM_SHA_1, pkcs11.CKG_MGF1_SHA1),
	}
	for i := range all {
		all[i].objects = all[i].flags == wraps
	}
	return all
}

// methodOf gives a method by its name, which was checked.
func methodOf(name string) *method {
	all := methods()
	return &all[slices.IndexFunc(all, func(m method) bool { return m.name == name })]
}

// usages are the properties of a secret key that may do what is listed and nothing else.
func usages(allowed ...uint) []property {
	all := []property{
		{pkcs11.CKA_ENCRYPT, "ENCRYPT", false}, {pkcs11.CKA_DECRYPT, "DECRYPT", false},
		{pkcs11.CKA_WRAP, "WRAP", false}, {pkcs11.CKA_UNWRAP, "UNWRAP", false},
		{pkcs11.CKA_SIGN, "SIGN", false}, {pkcs11.CKA_VERIFY, "VERIFY", false},
		{pkcs11.CKA_DERIVE, "DERIVE", false}}
	for i := range all {
		all[i].want = slices.Contains(allowed, all[i].kind)
	}
	return all
}

// wrapGCM makes IV | ciphertext | tag (PKCS#11 v2.40 section 2.11.3). With random IVs
// of 96 bits one key is good for 2^32 blobs (NIST SP 800-38D section 8.3).
//
// CloudHSM takes no IV but zeros, writes one of its own in their place, and says so in
// its parameters; Luna in FIPS mode ignores the IV and appends its own after the tag.
func wrapGCM(s *session, key pkcs11.ObjectHandle, bind, plain []byte) ([]byte, error) {
	iv := make([]byte, ivSize)
	rand.Read(iv)
	body, err := s.encryptGCM(key, iv, bind, plain)
	var e *Error
	if errors.As(err, &e) && (e.Code == pkcs11.CKR_MECHANISM_PARAM_INVALID || e.Code == pkcs11.CKR_ARGUMENTS_BAD) {
		if again, e := s.encryptGCM(key, make([]byte, ivSize), bind, plain); e == nil {
			return again, nil
		}
	}
	return body, err
}

func (s *session) encryptGCM(key pkcs11.ObjectHandle, iv, bind, plain []byte) ([]byte, error) {
	params := pkcs11.NewGCMParams(iv, bind, 8*tagSize)
	defer params.Free()
	ct, err := s.encrypt(pkcs11.CKM_AES_GCM, params, key, plain)
	if err != nil {
		return nil, err
	}
	used := params.IV()
	const whole = keySize + tagSize
	if n := len(ct) - whole; n == ivSize || n == 16 {
		used, ct = ct[whole:], ct[:whole]
	}
	if len(ct) != whole || bytes.Count(used, []byte{0}) == len(used) { // zeros that nobody replaced must not leave
		return nil, &Error{Class: ClassPolicy, What: fmt.Sprintf("C_Encrypt: AES-GCM of %d bytes gave %d, or no IV", len(plain), len(ct))}
	}
	return slices.Concat(used, ct), nil
}

func unwrapGCM(s *session, key pkcs11.ObjectHandle, bind, body []byte) ([]byte, error) {
	n := len(body) - keySize - tagSize
	if n != ivSize && n != 16 {
		return nil, ErrNotAuthentic
	}
	params := pkcs11.NewGCMParams(body[:n], bind, 8*tagSize)
	defer params.Free()
	return s.decrypt(pkcs11.CKM_AES_GCM, params, key, body[n:])
}

// inner is how the token guards the fresh key of a method without associated data.
type inner struct {
	size  int // of the token's part, 0 if that is the key's business
	fresh func(s *session, key pkcs11.ObjectHandle, bind []byte) (k, part []byte, err error)
	again func(s *session, key pkcs11.ObjectHandle, bind, part []byte) (k []byte, err error)
}

func (i inner) method(name string, mechanism, flags uint, kind keyKind) method {
	return method{name: name, mechanism: mechanism, flags: flags, key: kind, wrap: i.wrap, unwrap: i.unwrap}
}

// sealedSize is what wrap appends to the token's part: IV, 32 bytes and tag.
const sealedSize = ivSize + keySize + tagSize

func (i inner) wrap(s *session, key pkcs11.ObjectHandle, bind, plain []byte) ([]byte, error) {
	k, part, err := i.fresh(s, key, bind)
	defer clear(k)
	if err != nil {
		return nil, err
	}
	if i.size != 0 && len(part) != i.size {
		return nil, &Error{Class: ClassPolicy, What: fmt.Sprintf("the token wraps %d bytes to %d, not %d", keySize, len(part), i.size)}
	}
	aead, err := newAEAD(k)
	if err != nil {
		return nil, err
	}
	return aead.Seal(part, nil, plain, slices.Concat(bind, part)), nil
}

func (i inner) unwrap(s *session, key pkcs11.ObjectHandle, bind, body []byte) ([]byte, error) {
	n := len(body) - sealedSize
	if n <= 0 || i.size != 0 && n != i.size {
		return nil, ErrNotAuthentic
	}
	part, sealed := body[:n:n], body[n:]
	k, err := i.again(s, key, bind, part)
	defer clear(k)
	if err != nil {
		return nil, err
	}
	aead, err := newAEAD(k)
	if err != nil {
		return nil, err
	}
	plain, err := aead.Open(nil, nil, sealed, slices.Concat(bind, part))
	if err != nil {
		return nil, ErrNotAuthentic
	}
	return plain, nil
}

func newAEAD(k []byte) (cipher.AEAD, error) {
	if len(k) != keySize {
		return nil, &Error{Class: ClassPolicy, What: fmt.Sprintf("the token gave a key of %d bytes for %d", len(k), keySize)}
	}
	block, err := aes.NewCipher(k)
	if err != nil {
		return nil, err
	}
	return cipher.NewGCMWithRandomNonce(block)
}

// keyEncrypt is RFC 3394 through C_Encrypt.
func keyEncrypt() inner {
	return inner{
		size: wrappedSize,
		fresh: func(s *session, key pkcs11.ObjectHandle, _ []byte) (k, part []byte, err error) {
			k = random()
			part, err = s.encrypt(pkcs11.CKM_AES_KEY_WRAP, nil, key, k)
			return k, part, err
		},
		again: func(s *session, key pkcs11.ObjectHandle, _, part []byte) ([]byte, error) {
			return s.decrypt(pkcs11.CKM_AES_KEY_WRAP, nil, key, part)
		},
	}
}

// keyWrap is RFC 3394 or 5649 through C_WrapKey: the fresh key is an object of the
// session for a moment.
func keyWrap(mechanism uint) inner {
	mechanisms := []*pkcs11.Mechanism{pkcs11.NewMechanism(mechanism, nil)}
	template := func(more ...*pkcs11.Attribute) []*pkcs11.Attribute {
		return append(more, attr(pkcs11.CKA_CLASS, pkcs11.CKO_SECRET_KEY), attr(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_GENERIC_SECRET),
			attr(pkcs11.CKA_TOKEN, false), attr(pkcs11.CKA_PRIVATE, true), attr(pkcs11.CKA_EXTRACTABLE, true))
	}
	return inner{
		size: wrappedSize,
		fresh: func(s *session, key pkcs11.ObjectHandle, _ []byte) (k, part []byte, err error) {
			k = random()
			o, err := s.p.CreateObject(s.h, template(attr(pkcs11.CKA_SENSITIVE, true), attr(pkcs11.CKA_VALUE, k)))
			if err != nil {
				return k, nil, failed("C_CreateObject", err)
			}
			part, err = s.p.WrapKey(s.h, mechanisms, key, o)
			return k, part, errors.Join(failed("C_WrapKey", err), failed("C_DestroyObject", s.p.DestroyObject(s.h, o)))
		},
		again: func(s *session, key pkcs11.ObjectHandle, _, part []byte) ([]byte, error) {
			o, err := s.p.UnwrapKey(s.h, mechanisms, key, part, template(attr(pkcs11.CKA_SENSITIVE, false)))
			if err != nil {
				return nil, failed("C_UnwrapKey", err)
			}
			k, err := s.value(o, pkcs11.CKA_VALUE)
			return k, errors.Join(err, failed("C_DestroyObject", s.p.DestroyObject(s.h, o)))
		},
	}
}

// prf is HMAC-SHA-256 as a key derivation (NIST SP 800-108r1 section 4, one block).
func prf() inner {
	again := func(s *session, key pkcs11.ObjectHandle, bind, salt []byte) ([]byte, error) {
		if err := s.p.SignInit(s.h, []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_SHA256_HMAC, nil)}, key); err != nil {
			return nil, failed("C_SignInit", err)
		}
		k, err := s.p.Sign(s.h, slices.Concat([]byte("conseal hsm prf v1"), salt, bind))
		return k, failed("C_Sign", err)
	}
	return inner{
		size: saltSize,
		fresh: func(s *session, key pkcs11.ObjectHandle, bind []byte) (k, salt []byte, err error) {
			salt = random()
			k, err = again(s, key, bind, salt)
			return k, salt, err
		},
		again: again,
	}
}

// oaep is RSA-OAEP (RFC 8017 section 7.1) without a label, which tokens fail on. The
// encryption needs no token. Its modulus is read from the private key: anybody might
// have put another public key object next to it, without the PIN. What cannot be a
// ciphertext under the modulus (section 5.1.2) is kept from the token: NSS calls it
// CKR_ARGUMENTS_BAD, as it would our own mistakes.
func oaep(name string, newHash func() hash.Hash, hashMechanism, mgf uint) method {
	i := inner{
		fresh: func(s *session, key pkcs11.ObjectHandle, _ []byte) (k, part []byte, err error) {
			public, err := s.rsaPublic(key)
			if err != nil {
				return nil, nil, err
			}
			k = random()
			part, err = rsa.EncryptOAEP(newHash(), rand.Reader, public, k, nil)
			return k, part, err
		},
		again: func(s *session, key pkcs11.ObjectHandle, _, part []byte) ([]byte, error) {
			public, err := s.rsaPublic(key)
			if err != nil {
				return nil, err
			}
			if len(part) != public.Size() || new(big.Int).SetBytes(part).Cmp(public.N) >= 0 {
				return nil, ErrNotAuthentic
			}
			return s.decrypt(pkcs11.CKM_RSA_PKCS_OAEP, pkcs11.NewOAEPParams(hashMechanism, mgf, pkcs11.CKZ_DATA_SPECIFIED, nil), key, part)
		},
	}
	usage := []property{
		{pkcs11.CKA_DECRYPT, "DECRYPT", true}, {pkcs11.CKA_UNWRAP, "UNWRAP", false},
		{pkcs11.CKA_SIGN, "SIGN", false}, {pkcs11.CKA_SIGN_RECOVER, "SIGN_RECOVER", false}, {pkcs11.CKA_DERIVE, "DERIVE", false}}
	m := i.method(name, pkcs11.CKM_RSA_PKCS_OAEP, pkcs11.CKF_DECRYPT,
		keyKind{pkcs11.CKO_PRIVATE_KEY, pkcs11.CKK_RSA, pkcs11.CKM_RSA_PKCS_KEY_PAIR_GEN, usage})
	m.signed = true
	return m
}

// rsaExponent is the public exponent of all our RSA keys.
func rsaExponent() *big.Int { return big.NewInt(65537) }

func (s *session) rsaPublic(private pkcs11.ObjectHandle) (*rsa.PublicKey, error) {
	b, err := s.value(private, pkcs11.CKA_MODULUS)
	if err != nil {
		return nil, err
	}
	public := &rsa.PublicKey{N: new(big.Int).SetBytes(b), E: int(rsaExponent().Int64())}
	if public.N.BitLen() < minRSA {
		return nil, &Error{Class: ClassPolicy, What: fmt.Sprintf("an RSA key of %d bits: must have %d", public.N.BitLen(), minRSA)}
	}
	return public, nil
}

func random() []byte {
	b := make([]byte, keySize)
	rand.Read(b)
	return b
}

func (s *session) encrypt(mechanism uint, params any, key pkcs11.ObjectHandle, plain []byte) ([]byte, error) {
	if err := s.p.EncryptInit(s.h, []*pkcs11.Mechanism{pkcs11.NewMechanism(mechanism, params)}, key); err != nil {
		return nil, failed("C_EncryptInit", err)
	}
	ct, err := s.p.Encrypt(s.h, plain)
	return ct, failed("C_Encrypt", err)
}

// decrypt gives 32 bytes. The caller wipes what it returns.
func (s *session) decrypt(mechanism uint, params any, key pkcs11.ObjectHandle, ct []byte) ([]byte, error) {
	if err := s.p.DecryptInit(s.h, []*pkcs11.Mechanism{pkcs11.NewMechanism(mechanism, params)}, key); err != nil {
		return nil, failed("C_DecryptInit", err)
	}
	plain, err := s.p.Decrypt(s.h, ct)
	if err != nil {
		return nil, failed("C_Decrypt", err)
	}
	if len(plain) != keySize {
		clear(plain)
		return nil, &Error{Class: ClassPolicy, What: fmt.Sprintf("C_Decrypt: the token gave %d bytes for %d", len(plain), keySize)}
	}
	return plain, nil
}
