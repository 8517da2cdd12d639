package epoch

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/asn1"
	"errors"
	"fmt"
	"time"

	"conseal/agent/vault"
	"conseal/protocol"
)

// MaxReceipt bounds an encoded receipt, in bytes.
const MaxReceipt = vault.MaxReceipt

// Deletion is what a host says when it has erased all that it held of a key.
type Deletion struct {
	Fleet     string
	Key       vault.KeyID
	Public    [32]byte // SHA-256 of the public key, in the scheme's own form
	Host      protocol.HostID
	Time      time.Time // of the erasure by the host's clock, to the second
	Protector string    // "tpm" or "hsm"
	Shares    uint64    // that it erased; 0: it held none
	// RootsBefore and RootsAfter count the roots that its hardware was given before the
	// erasure, and with it.
	RootsBefore, RootsAfter uint64
}

// Receipt is a deletion under the signature of the host's identity key. What its hardware
// certified of the deletion's [Deletion.Digest] is signed with it, in the hardware's own
// encoding; empty if the hardware certifies nothing.
type Receipt struct {
	Deletion
	Proof     []byte
	PublicKey []byte // identity key, DER SubjectPublicKeyInfo
	Signature []byte // ECDSA, ASN.1
}

type asn1Deletion struct {
	Fleet, Key              string `asn1:"utf8"`
	Incarnation             int64
	Public                  []byte
	Host                    string `asn1:"utf8"`
	Time                    int64  // Unix seconds
	Protector               string `asn1:"utf8"`
	Shares                  int64
	RootsBefore, RootsAfter int64
}

type asn1Receipt struct {
	Version                     int
	Deletion                    asn1Deletion
	Proof, PublicKey, Signature []byte
}

func (d *Deletion) asn1() asn1Deletion {
	return asn1Deletion{
		Fleet: d.Fleet, Key: d.Key.Name, Incarnation: int64(d.Key.Incarnation), Public: d.Public[:], Host: string(d.Host),
		Time: d.Time.Unix(), Protector: d.Protector, Shares: int64(d.Shares), RootsBefore: int64(d.RootsBefore), RootsAfter: int64(d.RootsAfter),
	}
}

// Digest is what the hardware is asked to certify.
func (d *Deletion) Digest() [32]byte { return d.digest("conseal deletion v1", nil) }

func (d *Deletion) digest(domain string, proof []byte) [32]byte {
	der, err := asn1.Marshal(d.asn1())
	if err != nil { // only text that is not UTF-8: such names are refused long before
		der = nil
	}
	h := sha256.New()
	fmt.Fprintf(h, "%s\n%d %d\n", domain, len(der), len(proof))
	h.Write(der)
	h.Write(proof)
	return [32]byte(h.Sum(nil))
}

// Sign makes the host's receipt. The caller has erased the key before.
func (d *Deletion) Sign(identity crypto.Signer, proof []byte) (*Receipt, error) {
	spki, err := x509.MarshalPKIXPublicKey(identity.Public())
	if err != nil {
		return nil, fmt.Errorf("encoding the identity key: %w", err)
	}
	digest := d.digest("conseal deleted v1", proof)
	signature, err := identity.Sign(rand.Reader, digest[:], crypto.SHA256)
	if err != nil {
		return nil, fmt.Errorf("signing the receipt for key %q: %w", d.Key.Name, err)
	}
	return &Receipt{Deletion: *d, Proof: proof, PublicKey: spki, Signature: signature}, nil
}

// Verify checks the receipt's signature against the pin of its host: SHA-256 of the
// identity key's SubjectPublicKeyInfo. It does not look at the hardware's proof.
func (r *Receipt) Verify(pin [32]byte) error {
	if sha256.Sum256(r.PublicKey) != pin {
		return fmt.Errorf("receipt of host %q: signed by another identity than the roster pins", r.Host)
	}
	key, err := x509.ParsePKIXPublicKey(r.PublicKey)
	if err != nil {
		return fmt.Errorf("receipt of host %q: identity key: %w", r.Host, err)
	}
	ec, ok := key.(*ecdsa.PublicKey)
	if !ok {
		return fmt.Errorf("receipt of host %q: identity key is a %T, not ECDSA", r.Host, key)
	}
	digest := r.digest("conseal deleted v1", r.Proof)
	if !ecdsa.VerifyASN1(ec, digest[:], r.Signature) {
		return fmt.Errorf("receipt of host %q: wrong signature", r.Host)
	}
	return nil
}

// Encode returns the canonical encoding, DER.
func (r *Receipt) Encode() ([]byte, error) {
	der, err := asn1.Marshal(asn1Receipt{1, r.asn1(), r.Proof, r.PublicKey, r.Signature})
	if err == nil && len(der) > MaxReceipt {
		err = fmt.Errorf("receipt of %d bytes is over the limit of %d", len(der), MaxReceipt)
	}
	return der, err
}

// DecodeReceipt reads what [Receipt.Encode] wrote and nothing else. It checks no signature.
func DecodeReceipt(der []byte) (*Receipt, error) {
	if len(der) > MaxReceipt {
		return nil, fmt.Errorf("receipt of %d bytes is over the limit of %d", len(der), MaxReceipt)
	}
	var in asn1Receipt
	rest, err := asn1.Unmarshal(der, &in)
	if err != nil {
		return nil, fmt.Errorf("decoding a receipt: %w", err)
	}
	d := &in.Deletion
	switch {
	case len(rest) != 0 || in.Version != 1:
		return nil, fmt.Errorf("decoding a receipt: version %d, %d bytes too many", in.Version, len(rest))
	case d.Incarnation < 1 || d.Time < 1 || d.Time > 1<<40 || d.Shares < 0 || d.RootsBefore < 0 || d.RootsAfter < d.RootsBefore:
		return nil, errors.New("decoding a receipt: a number is out of range")
	case len(d.Public) != 32:
		return nil, errors.New("decoding a receipt: a digest is not 32 bytes long")
	}
	r := &Receipt{
		Deletion: Deletion{
			Fleet: d.Fleet, Key: vault.KeyID{Name: d.Key, Incarnation: uint64(d.Incarnation)}, Public: [32]byte(d.Public), Host: protocol.HostID(d.Host),
			Time: time.Unix(d.Time, 0), Protector: d.Protector, Shares: uint64(d.Shares), RootsBefore: uint64(d.RootsBefore), RootsAfter: uint64(d.RootsAfter),
		},
		Proof: in.Proof, PublicKey: in.PublicKey, Signature: in.Signature,
	}
	again, err := r.Encode()
	if err != nil || !bytes.Equal(again, der) {
		return nil, errors.New("decoding a receipt: not in canonical form")
	}
	return r, nil
}
