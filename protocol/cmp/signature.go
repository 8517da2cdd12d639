package cmp

import (
	stdecdsa "crypto/ecdsa"
	"crypto/elliptic"
	"encoding/asn1"
	"errors"
	"math/big"

	"github.com/decred/dcrd/dcrec/secp256k1/v4"
	"github.com/decred/dcrd/dcrec/secp256k1/v4/ecdsa"
	module "github.com/luxfi/threshold/pkg/ecdsa"

	"conseal/protocol/guard"
)

// Signature is an ECDSA signature. On secp256k1 its s is in the lower half, as
// ledgers want it.
type Signature struct {
	R, S [32]byte
	// RecoveryID tells which of the public keys that R and S allow it is: bit 0 is
	// the parity of R's y, bit 1 whether R's x was above the order.
	RecoveryID byte
}

// Fixed is r and s, 64 bytes, as IEEE P1363 and JOSE write them.
func (s *Signature) Fixed() []byte { return append(s.R[:], s.S[:]...) }

// DER is the ECDSA-Sig-Value of RFC 3279.
func (s *Signature) DER() ([]byte, error) {
	return asn1.Marshal(struct{ R, S *big.Int }{new(big.Int).SetBytes(s.R[:]), new(big.Int).SetBytes(s.S[:])})
}

// ParseSignature reads a signature as r and s, 64 bytes, or in DER.
func ParseSignature(b []byte) (*Signature, error) {
	if len(b) == 64 {
		return &Signature{R: [32]byte(b), S: [32]byte(b[32:])}, nil
	}
	var rs struct{ R, S *big.Int }
	rest, err := asn1.Unmarshal(b, &rs)
	if err != nil || len(rest) > 0 || rs.R.Sign() <= 0 || rs.S.Sign() <= 0 || rs.R.BitLen() > 256 || rs.S.BitLen() > 256 {
		return nil, errors.New("not an ECDSA signature: neither 64 bytes nor DER")
	}
	out := &Signature{}
	rs.R.FillBytes(out.R[:])
	rs.S.FillBytes(out.S[:])
	return out, nil
}

// signatureOf puts the module's signature into standard form and has it verified by
// code that is not the module's.
func signatureOf(g *Group, digest [32]byte, sig *module.Signature) (*Signature, error) {
	point, err := sig.R.MarshalBinary()
	if err != nil {
		return nil, err
	}
	r, err := sig.R.XScalar().MarshalBinary()
	if err != nil {
		return nil, err
	}
	out := &Signature{R: [32]byte(r), RecoveryID: point[0] & 1}
	if [32]byte(point[1:]) != out.R {
		out.RecoveryID |= 2
	}
	s := g.Curve.group.NewScalar().Set(sig.S)
	if g.Curve == Secp256k1 && s.IsOverHalfOrder() {
		s.Negate()
		out.RecoveryID ^= 1
	}
	encoded, err := s.MarshalBinary()
	if err != nil {
		return nil, err
	}
	out.S = [32]byte(encoded)
	if !g.Curve.Verify(g.PublicKey, digest, out) {
		return nil, errors.New("the signature does not verify")
	}
	return out, nil
}

// Verify tells whether sig is a public key's signature of a digest.
func (c *Curve) Verify(public [guard.PointSize]byte, digest [32]byte, sig *Signature) bool {
	switch c {
	case P256:
		full, err := c.uncompressed(public[:])
		if err != nil {
			return false
		}
		key, err := stdecdsa.ParseUncompressedPublicKey(elliptic.P256(), full)
		return err == nil && stdecdsa.Verify(key, digest[:], new(big.Int).SetBytes(sig.R[:]), new(big.Int).SetBytes(sig.S[:]))
	case Secp256k1:
		key, err := secp256k1.ParsePubKey(public[:])
		var r, s secp256k1.ModNScalar
		if err != nil || r.SetBytes(&sig.R) != 0 || s.SetBytes(&sig.S) != 0 {
			return false
		}
		return ecdsa.NewSignature(&r, &s).Verify(digest[:], key)
	}
	return false
}
