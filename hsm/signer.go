//go:build cgo

package hsm

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"

	"github.com/miekg/pkcs11"

	"conseal/internal/pin"
	"conseal/internal/secret"
)

// tokenKey signs for a tool with a key that somebody else made. It logs in once and
// repairs nothing: after a failure it does not go on, for another login would be
// another try of the PIN.
type tokenKey struct {
	cfg KeyConfig
	uri *URI
	mod *module

	mu      sync.Mutex // guards what follows: one signature at a time
	s       session    // read-only, so that the token lets it make nothing
	private pkcs11.ObjectHandle
	always  bool          // the key wants the PIN before each signature
	pin     *secret.Bytes // kept for that; else nil
	public  *ecdsa.PublicKey
	err     error // what ended it
}

// OpenKey logs in to a token and gives a signer of SHA-256 digests with a key pair
// in it, ECDSA on P-256. It makes nothing in the token. The public key is that of
// the public key object or certificate with the private key's CKA_ID, and has to
// verify a signature of the private one. The caller calls the function when it is
// done with the signer.
//
// It is for a tool that runs for a person. The PIN is sent once, and once more
// before each signature if the key asks for that (CKA_ALWAYS_AUTHENTICATE). There is
// no latch: after a PIN was refused, by the token's own account, the next one has to
// be entered by hand; the last try before the token locks is refused. A login that
// another part of this process already made is used, whatever the PIN.
func OpenKey(cfg KeyConfig) (crypto.Signer, func(), error) {
	uri, err := cfg.validate()
	if err != nil {
		return nil, nil, err
	}
	mod, err := loadModule(uri.ModulePath, nil, "")
	if err != nil {
		return nil, nil, err
	}
	k := &tokenKey{cfg: cfg, uri: uri, mod: mod}
	if err := k.open(); err != nil {
		k.close()
		return nil, nil, fmt.Errorf("hsm: key %s: %w", uri.path(), err)
	}
	return k, k.close, nil
}

func (k *tokenKey) open() error {
	k.mod.mu.RLock()
	defer k.mod.mu.RUnlock()
	slot, info, err := k.mod.findToken(k.uri)
	if err != nil {
		return err
	}
	sh, err := k.mod.p.OpenSession(slot, pkcs11.CKF_SERIAL_SESSION)
	if err != nil {
		return failed("C_OpenSession", err)
	}
	k.s = session{p: k.mod.p, h: sh, slot: slot, asks: info.Flags&pkcs11.CKF_LOGIN_REQUIRED != 0}
	if err = k.s.loggedIn(); ClassOf(err) == ClassLogin {
		err = k.logIn(pkcs11.CKU_USER)
	}
	if err == nil {
		err = k.find()
	}
	if err == nil {
		err = k.prove()
	}
	if !k.always {
		k.pin.Wipe()
	}
	return err
}

func (k *tokenKey) close() {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.mod.mu.RLock()
	defer k.mod.mu.RUnlock()
	if k.s.h != 0 {
		_ = k.s.p.CloseSession(k.s.h) // it may be gone already
	}
	k.s.h, k.err = 0, errors.New("hsm: the key was used after it was closed")
	k.pin.Wipe()
}

// logIn sends the PIN once: as the user's, or for one signature.
func (k *tokenKey) logIn(user uint) error {
	info, err := k.mod.p.GetTokenInfo(k.s.slot) // the flags of this moment
	if err != nil {
		return failed("C_GetTokenInfo", err)
	}
	if err := mayTry(info.Flags); err != nil {
		return err
	}
	if k.pin == nil {
		if k.pin, err = k.cfg.readPIN(k.uri, info.Flags&pkcs11.CKF_USER_PIN_COUNT_LOW != 0); err != nil {
			return err
		}
	}
	err = k.mod.logIn(k.s.h, user, k.pin)
	switch {
	case errors.Is(err, pkcs11.Error(pkcs11.CKR_USER_ALREADY_LOGGED_IN)): // somebody else in the process was faster
		return nil
	case errors.Is(err, pkcs11.Error(pkcs11.CKR_PIN_LOCKED)):
		return fmt.Errorf("%w, which is locked (%w): unlock it with the security officer's PIN", pin.ErrRefused, err)
	case ClassOf(failed("C_Login", err)) == ClassAuth:
		return fmt.Errorf("%w (%w): it was sent once, and no second try is made", pin.ErrRefused, err)
	}
	return failed("C_Login", err)
}

// find finds the private key and checks what it is.
func (k *tokenKey) find() error {
	template := []*pkcs11.Attribute{attr(pkcs11.CKA_CLASS, pkcs11.CKO_PRIVATE_KEY), attr(pkcs11.CKA_TOKEN, true)}
	if k.uri.Object != "" {
		template = append(template, attr(pkcs11.CKA_LABEL, k.uri.Object))
	}
	if k.uri.ID != nil {
		template = append(template, attr(pkcs11.CKA_ID, k.uri.ID))
	}
	all, err := k.s.search(template)
	if err == nil && len(all) == 0 {
		if err = k.s.loggedIn(); err == nil {
			err = errors.New("the token has no such private key: `pkcs11-tool --login --list-objects` lists what it has")
		}
	}
	if err == nil && len(all) > 1 {
		err = k.s.ambiguous(all)
	}
	if err != nil {
		return err
	}
	k.private = all[0]
	if err := k.s.onP256(k.private); err != nil {
		return err
	}
	always, err := k.s.value(k.private, pkcs11.CKA_ALWAYS_AUTHENTICATE)
	if ClassOf(err) == ClassPolicy { // a token that does not know the attribute
		err = nil
	}
	k.always = len(always) == 1 && always[0] != 0
	return err
}

// ambiguous says how to tell several private keys apart.
func (s *session) ambiguous(keys []pkcs11.ObjectHandle) error {
	var ids []string
	for _, key := range keys {
		id, err := s.value(key, pkcs11.CKA_ID)
		if err != nil {
			return err
		}
		ids = append(ids, "id="+escapeAll(id))
	}
	slices.Sort(ids)
	return fmt.Errorf("%d private keys match (%s): name one by its id, which no other may have", len(keys), strings.Join(ids, ", "))
}

func (s *session) onP256(key pkcs11.ObjectHandle) error {
	kind, err := s.value(key, pkcs11.CKA_KEY_TYPE)
	if err != nil {
		return err
	}
	var curve []byte
	if len(kind) == 8 && binary.NativeEndian.Uint64(kind) == pkcs11.CKK_EC { // a CK_ULONG
		if curve, err = s.value(key, pkcs11.CKA_EC_PARAMS); err != nil {
			return err
		}
	}
	if !bytes.Equal(curve, oidP256()) {
		return errors.New("not ECDSA on P-256, which every TPM has: make one with `pkcs11-tool --keypairgen --key-type EC:prime256v1`")
	}
	return nil
}

// prove finds the public key that verifies what the private key signs. Neither
// labels nor ids show that two objects belong together.
func (k *tokenKey) prove() error {
	id, err := k.s.value(k.private, pkcs11.CKA_ID)
	if err != nil {
		return err
	}
	digest := sha256.Sum256(append([]byte("conseal hsm key proof v1"), rand.Text()...))
	der, err := k.sign(digest[:])
	if err != nil {
		return err
	}
	for _, from := range []struct {
		class, kind uint
		parse       func([]byte) (*ecdsa.PublicKey, error)
	}{
		{pkcs11.CKO_PUBLIC_KEY, pkcs11.CKA_EC_POINT, parsePoint},
		{pkcs11.CKO_CERTIFICATE, pkcs11.CKA_VALUE, certified},
		{pkcs11.CKO_PRIVATE_KEY, pkcs11.CKA_EC_POINT, parsePoint}, // of tokens that add it
	} {
		all, err := k.s.search([]*pkcs11.Attribute{attr(pkcs11.CKA_CLASS, from.class), attr(pkcs11.CKA_ID, id)})
		if err != nil {
			return err
		}
		for _, o := range all {
			b, err := k.s.value(o, from.kind)
			if err != nil && ClassOf(err) != ClassPolicy { // that is an object without the attribute
				return err
			}
			if public, err := from.parse(b); err == nil && ecdsa.VerifyASN1(public, digest[:], der) {
				k.public = public
				return nil
			}
		}
	}
	return fmt.Errorf("no public key or certificate with its id=%s verifies what it signs: put its own into the token", escapeAll(id))
}

// certified is the public key of an X.509 certificate.
func certified(der []byte) (*ecdsa.PublicKey, error) {
	c, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, err
	}
	public, ok := c.PublicKey.(*ecdsa.PublicKey)
	if !ok || public.Curve != elliptic.P256() {
		return nil, errors.New("not on P-256")
	}
	return public, nil
}

// Public is an [*ecdsa.PublicKey].
func (k *tokenKey) Public() crypto.PublicKey { return k.public }

// Sign signs a SHA-256 digest and gives the signature in DER. The token draws its
// own randomness.
func (k *tokenKey) Sign(_ io.Reader, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	if opts == nil || opts.HashFunc() != crypto.SHA256 || len(digest) != sha256.Size {
		return nil, errors.New("hsm: a key signs SHA-256 digests of 32 bytes only")
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	k.mod.mu.RLock()
	defer k.mod.mu.RUnlock()
	if k.err != nil {
		return nil, k.err
	}
	der, err := k.sign(digest)
	if err == nil && !ecdsa.VerifyASN1(k.public, digest, der) {
		err = &Error{Class: ClassPolicy, What: "C_Sign: the signature does not verify"}
	}
	if err != nil {
		k.err = fmt.Errorf("hsm: signing with %s: %w", k.uri.path(), err)
	}
	return der, k.err
}

func (k *tokenKey) sign(digest []byte) ([]byte, error) {
	return k.s.sign(k.private, digest, func() error {
		if !k.always {
			return nil
		}
		return k.logIn(pkcs11.CKU_CONTEXT_SPECIFIC)
	})
}
