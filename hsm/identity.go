//go:build cgo

package hsm

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"encoding/asn1"
	"errors"
	"fmt"
	"io"
	"math/big"

	"github.com/miekg/pkcs11"
)

// identity signs with the host's P-256 key in the token. The key can do nothing
// else, and signs nothing but SHA-256 digests: TLS, and what this package signs, each
// with words of its own in front.
type identity struct {
	h      *HSM
	id     []byte
	public *ecdsa.PublicKey
}

// oidP256 is the DER of prime256v1's object identifier (RFC 5480 section 2.1.1.1).
func oidP256() []byte { return []byte{0x06, 0x08, 0x2A, 0x86, 0x48, 0xCE, 0x3D, 0x03, 0x01, 0x07} }

func identityProperties() []property {
	return guarded(
		property{pkcs11.CKA_SIGN, "SIGN", true}, property{pkcs11.CKA_SIGN_RECOVER, "SIGN_RECOVER", false},
		property{pkcs11.CKA_DECRYPT, "DECRYPT", false}, property{pkcs11.CKA_UNWRAP, "UNWRAP", false},
		property{pkcs11.CKA_DERIVE, "DERIVE", false})
}

// Identity gives the host's key, ECDSA on P-256: a signer of SHA-256 digests, good
// for TLS and for certificate requests. It shows by a signature that the private
// key in the token belongs to the public one, which labels do not. The signer
// waits for a free session without limit, for [crypto.Signer] has no context.
func (h *HSM) Identity(ctx context.Context) (crypto.Signer, error) {
	i, err := h.loadIdentity(ctx)
	if err != nil {
		return nil, fmt.Errorf("hsm: identity in %s: %w", h.Name(), err)
	}
	return i, nil
}

func (h *HSM) loadIdentity(ctx context.Context) (*identity, error) {
	i := &identity{h: h}
	if err := h.do(ctx, i.load); err != nil {
		return nil, err
	}
	digest := sha256.Sum256(append([]byte("conseal hsm identity proof v1"), rand.Text()...))
	_, err := i.sign(ctx, digest[:])
	return i, err
}

func (i *identity) load(s *session) error {
	label := s.label("identity")
	private, err := s.key(pkcs11.CKO_PRIVATE_KEY, label)
	if err != nil {
		return err
	}
	if i.id, err = s.value(private, pkcs11.CKA_ID); err != nil {
		return err
	}
	if len(i.id) == 0 {
		return &Error{Class: ClassPolicy, What: "key pair " + label + " has no id, by which its halves belong together"}
	}
	if err := s.checkProperties(private, label, identityProperties()); err != nil {
		return err
	}
	public, err := s.one(pkcs11.CKO_PUBLIC_KEY, label, attr(pkcs11.CKA_ID, i.id))
	if errors.Is(err, errMissing) {
		return &Error{Class: ClassPolicy, What: "key pair " + label + " lacks its public half"}
	}
	if err != nil {
		return err
	}
	for _, k := range []pkcs11.ObjectHandle{private, public} {
		curve, err := s.value(k, pkcs11.CKA_EC_PARAMS)
		if err != nil {
			return err
		}
		if !bytes.Equal(curve, oidP256()) {
			return &Error{Class: ClassPolicy, What: "key " + label + " is not on P-256"}
		}
	}
	point, err := s.value(public, pkcs11.CKA_EC_POINT)
	if err != nil {
		return err
	}
	i.public, err = parsePoint(point)
	return err
}

// parsePoint takes an uncompressed point, in a DER OCTET STRING as PKCS#11 v2.40
// section 2.3.3 has it or bare as some tokens do. Its length tells them apart: of 256
// bare points one can be read as an OCTET STRING too.
func parsePoint(b []byte) (*ecdsa.PublicKey, error) {
	const bare = 1 + 2*32
	var inner []byte
	if rest, err := asn1.Unmarshal(b, &inner); len(b) != bare && err == nil && len(rest) == 0 {
		b = inner
	}
	public, err := ecdsa.ParseUncompressedPublicKey(elliptic.P256(), b)
	if err != nil {
		return nil, &Error{Class: ClassPolicy, What: "CKA_EC_POINT is no point of P-256"}
	}
	return public, nil
}

// Public is an [*ecdsa.PublicKey].
func (i *identity) Public() crypto.PublicKey { return i.public }

// Sign signs a SHA-256 digest and gives the signature in DER. The token draws its
// own randomness.
func (i *identity) Sign(_ io.Reader, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	if opts == nil || opts.HashFunc() != crypto.SHA256 || len(digest) != sha256.Size {
		return nil, errors.New("hsm: the identity key signs SHA-256 digests of 32 bytes only")
	}
	der, err := i.sign(context.Background(), digest)
	if err != nil {
		return nil, fmt.Errorf("hsm: signing as %s in %s: %w", i.h.cfg.Name, i.h.Name(), err)
	}
	return der, nil
}

func (i *identity) sign(ctx context.Context, digest []byte) (der []byte, err error) {
	err = i.h.do(ctx, func(s *session) error {
		k, err := s.key(pkcs11.CKO_PRIVATE_KEY, s.label("identity"), attr(pkcs11.CKA_ID, i.id))
		if err != nil {
			return err
		}
		if der, err = s.sign(k, digest, func() error { return nil }); err == nil && !ecdsa.VerifyASN1(i.public, digest, der) {
			err = &Error{Class: ClassPolicy, What: "C_Sign: the signature does not verify under " + s.label("identity")}
		}
		return err
	})
	return der, err
}

// sign signs a digest by ECDSA and gives the signature in DER. login is called when
// a key that asks for a login of its own waits for it.
func (s *session) sign(key pkcs11.ObjectHandle, digest []byte, login func() error) ([]byte, error) {
	if err := s.p.SignInit(s.h, []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_ECDSA, nil)}, key); err != nil {
		return nil, failed("C_SignInit", err)
	}
	if err := login(); err != nil {
		return nil, err
	}
	raw, err := s.p.Sign(s.h, digest)
	if err != nil {
		return nil, failed("C_Sign", err)
	}
	return signatureDER(raw)
}

// signatureDER makes an Ecdsa-Sig-Value (RFC 3279 section 2.2.3) of r||s.
func signatureDER(raw []byte) ([]byte, error) {
	if len(raw) != 64 {
		return nil, &Error{Class: ClassPolicy, What: fmt.Sprintf("C_Sign: the signature has %d bytes, not 64", len(raw))}
	}
	return asn1.Marshal(struct{ R, S *big.Int }{new(big.Int).SetBytes(raw[:32]), new(big.Int).SetBytes(raw[32:])})
}

// generateIdentity makes the host's key pair.
func (s *session) generateIdentity() error {
	var id keyID
	rand.Read(id[:])
	name := []*pkcs11.Attribute{attr(pkcs11.CKA_LABEL, s.label("identity")), attr(pkcs11.CKA_ID, id[:])}
	return s.frozen(s.label("identity"), name[1:], func(extra []*pkcs11.Attribute) error {
		public := append([]*pkcs11.Attribute{
			attr(pkcs11.CKA_TOKEN, true), attr(pkcs11.CKA_PRIVATE, false), attr(pkcs11.CKA_VERIFY, true),
			attr(pkcs11.CKA_EC_PARAMS, oidP256())}, append(name, extra...)...)
		private := template(identityProperties(), append(name, append(extra, attr(pkcs11.CKA_TOKEN, true))...)...)
		_, _, err := s.p.GenerateKeyPair(s.h,
			[]*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_EC_KEY_PAIR_GEN, nil)}, public, private)
		return failed("C_GenerateKeyPair", err)
	})
}
