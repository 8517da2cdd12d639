package tpm

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"encoding/asn1"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/big"

	keyfile "github.com/foxboron/go-tpm-keyfiles"
	"github.com/google/go-tpm/tpm2"
)

// identity is the host's key: ECDSA on P-256, made in the TPM and never outside.
// It implements [crypto.Signer]; its methods may be called by several goroutines.
type identity struct {
	t      *TPM
	blob   tss2
	area   tpm2.TPMTPublic
	public *ecdsa.PublicKey
}

// coordinate is the length of one of a P-256 point.
const coordinate = 32

// Identity gives the key of a blob that [Provision] made, after it has signed
// something. It signs SHA-256 digests, as TLS 1.3 does with
// ecdsa_secp256r1_sha256.
func (t *TPM) Identity(ctx context.Context, blob []byte) (crypto.Signer, error) {
	k, err := decodeIdentity(blob)
	if err == nil {
		k.t = t
		err = t.transact(ctx, "loading the identity key", k.prove)
		return k, err
	}
	return nil, fmt.Errorf("%s: loading the identity key: %w", t.Name(), err)
}

// Public is an *ecdsa.PublicKey.
func (k *identity) Public() crypto.PublicKey { return k.public }

// Sign signs a SHA-256 digest; the signature is in ASN.1 DER. The randomness is
// the TPM's. It has no context: it waits for other uses of the TPM for as long as
// some of them may take, and no longer.
func (k *identity) Sign(_ io.Reader, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	if opts == nil || opts.HashFunc() != crypto.SHA256 || len(digest) != sha256.Size {
		return nil, errors.New("tpm: the identity key signs SHA-256 digests only")
	}
	const queue = 10 // time-outs, of which a transaction in front of us would use several
	ctx, cancel := context.WithTimeout(context.Background(), queue*k.t.cfg.Timeout)
	defer cancel()
	var signature []byte
	err := k.t.transact(ctx, "signing with the identity key", func(x *tx) (err error) {
		signature, err = k.sign(x, digest)
		return err
	})
	return signature, err
}

// prove shows that the TPM has the key: a signature over something fresh.
func (k *identity) prove(x *tx) error {
	challenge := append([]byte("conseal tpm identity proof\x00"), rand.Text()...)
	digest := sha256.Sum256(challenge)
	_, err := k.sign(x, digest[:])
	return err
}

// sign checks the signature before it gives it out: a fault or somebody on the
// bus could have had something else signed.
func (k *identity) sign(x *tx, digest []byte) ([]byte, error) {
	var signature []byte
	err := x.withLoaded(k.area, k.blob.private, func(key tpm2.AuthHandle) error {
		rsp, err := run(x, tpm2.Sign{
			KeyHandle: key,
			Digest:    tpm2.TPM2BDigest{Buffer: digest},
			InScheme:  ecdsaSHA256(),
			Validation: tpm2.TPMTTKHashCheck{
				Tag:       tpm2.TPMSTHashCheck,
				Hierarchy: tpm2.TPMRHNull, // a digest that the TPM did not compute: the key is not restricted
			},
		})
		if err != nil {
			return err
		}
		rs, err := rsp.Signature.Signature.ECDSA()
		if err != nil {
			return x.distrust("TPM2_Sign", err)
		}
		signature, err = asn1.Marshal([]*big.Int{
			new(big.Int).SetBytes(rs.SignatureR.Buffer),
			new(big.Int).SetBytes(rs.SignatureS.Buffer),
		})
		if err != nil || !ecdsa.VerifyASN1(k.public, digest, signature) {
			return x.distrust("TPM2_Sign", errors.New("the signature does not verify"))
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	return signature, nil
}

// makeIdentity has the TPM make a key and returns its blob.
func (x *tx) makeIdentity() ([]byte, error) {
	rsp, err := run(x, tpm2.Create{
		ParentHandle: x.srk.auth(),
		InPublic:     tpm2.New2B(identityPublic([2 * coordinate]byte{})),
	}, x.srk.encryptBoth())
	if err != nil {
		return nil, err
	}
	k := tss2{kind: keyfile.OIDLoadableKey, public: rsp.OutPublic.Bytes(), private: bytes.Clone(rsp.OutPrivate.Buffer)}
	blob := k.encode(pem.Block{})
	if _, err := decodeIdentity(blob); err != nil {
		return nil, x.distrust("TPM2_Create", errors.New("it made another key than it was told to"))
	}
	return blob, nil
}

func ecdsaSHA256() tpm2.TPMTSigScheme {
	return tpm2.TPMTSigScheme{
		Scheme:  tpm2.TPMAlgECDSA,
		Details: tpm2.NewTPMUSigScheme(tpm2.TPMAlgECDSA, &tpm2.TPMSSchemeHash{HashAlg: tpm2.TPMAlgSHA256}),
	}
}

// identityPublic is the public part of an identity key: made in this TPM, not to
// be exported, for ECDSA with SHA-256 only. It has no password: whoever may use
// the TPM on the running host may sign.
func identityPublic(point [2 * coordinate]byte) tpm2.TPMTPublic {
	return tpm2.TPMTPublic{
		Type:    tpm2.TPMAlgECC,
		NameAlg: tpm2.TPMAlgSHA256,
		ObjectAttributes: tpm2.TPMAObject{
			FixedTPM:            true,
			FixedParent:         true,
			SensitiveDataOrigin: true,
			UserWithAuth:        true,
			NoDA:                true,
			SignEncrypt:         true,
		},
		Parameters: tpm2.NewTPMUPublicParms(tpm2.TPMAlgECC, &tpm2.TPMSECCParms{
			Scheme: tpm2.TPMTECCScheme{
				Scheme:  tpm2.TPMAlgECDSA,
				Details: tpm2.NewTPMUAsymScheme(tpm2.TPMAlgECDSA, &tpm2.TPMSSigSchemeECDSA{HashAlg: tpm2.TPMAlgSHA256}),
			},
			CurveID: tpm2.TPMECCNistP256,
		}),
		Unique: tpm2.NewTPMUPublicID(tpm2.TPMAlgECC, &tpm2.TPMSECCPoint{
			X: tpm2.TPM2BECCParameter{Buffer: point[:coordinate]},
			Y: tpm2.TPM2BECCParameter{Buffer: point[coordinate:]},
		}),
	}
}

// decodeIdentity wants a key that is as makeIdentity has it made.
func decodeIdentity(blob []byte) (*identity, error) {
	corrupt := fail(ClassCorrupt, "not an identity that this version made, or it was changed; %s", advice[ClassCorrupt])
	k, _, ok := decodeTSS2(blob, keyfile.OIDLoadableKey, "")
	if !ok || k.pin {
		return nil, corrupt
	}
	area, err := tpm2.Unmarshal[tpm2.TPMTPublic](k.public)
	if err != nil {
		return nil, corrupt
	}
	key, err := tpm2.Pub(*area)
	public, isECDSA := key.(*ecdsa.PublicKey)
	if err != nil || !isECDSA || public.Curve != elliptic.P256() {
		return nil, corrupt
	}
	point, err := public.Bytes() // refuses what is not on the curve
	if err != nil || !bytes.Equal(k.public, tpm2.Marshal(identityPublic([2 * coordinate]byte(point[1:])))) {
		return nil, corrupt
	}
	return &identity{blob: *k, area: *area, public: public}, nil
}
