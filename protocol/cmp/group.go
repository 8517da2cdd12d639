// Package cmp is threshold ECDSA after CGGMP (Canetti, Gennaro, Goldfeder, Makriyannis,
// Peled), on P-256 and secp256k1: holders make a key together, and any quorum of them
// signs. The protocol is that of github.com/luxfi/threshold behind [guard.Session]; it
// does not have P-256, which is here.
//
// [NewKeygen] and [NewReshare] make the sessions that end in a [Share], of which the
// [Group] is the public part; [NewPresign] those that prepare a signature while the
// machine is idle; [NewSign] and [NewOnline] those that sign.
package cmp

import (
	"bytes"
	"crypto/sha256"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"

	"filippo.io/nistec"
	"github.com/decred/dcrd/dcrec/secp256k1/v4"
	"github.com/luxfi/threshold/pkg/math/curve"
	module "github.com/luxfi/threshold/protocols/cmp"

	"conseal/internal/secret"
	"conseal/protocol"
	"conseal/protocol/guard"
)

// Curve is one of [P256] and [Secp256k1].
type Curve struct {
	id    byte // in encoded groups
	group curve.Curve
	oid   asn1.ObjectIdentifier
	// uncompressed decodes a compressed point and gives it as SEC 1 writes it in full.
	uncompressed func([]byte) ([]byte, error)
}

// The curves.
var (
	P256 = &Curve{1, p256{}, asn1.ObjectIdentifier{1, 2, 840, 10045, 3, 1, 7}, func(b []byte) ([]byte, error) {
		p, err := nistec.NewP256Point().SetBytes(b)
		if err != nil {
			return nil, err
		}
		return p.Bytes(), nil
	}}
	Secp256k1 = &Curve{2, curve.Secp256k1{}, asn1.ObjectIdentifier{1, 3, 132, 0, 10}, func(b []byte) ([]byte, error) {
		p, err := secp256k1.ParsePubKey(b)
		if err != nil {
			return nil, err
		}
		return p.SerializeUncompressed(), nil
	}}
)

var curves = []*Curve{P256, Secp256k1}

// ParseSPKI reads what [Curve.SPKI] wrote.
func ParseSPKI(der []byte) (*Curve, [guard.PointSize]byte, error) {
	var public [guard.PointSize]byte
	for _, c := range curves {
		if len(der) < 64 {
			break
		}
		public[0] = 2 | der[len(der)-1]&1
		copy(public[1:], der[len(der)-64:])
		if again, err := c.SPKI(public); err == nil && bytes.Equal(again, der) {
			return c, public, nil
		}
	}
	return nil, public, errors.New("not a public key on P-256 or secp256k1")
}

// SPKI is a compressed public key as a SubjectPublicKeyInfo (RFC 5480), DER.
func (c *Curve) SPKI(public [guard.PointSize]byte) ([]byte, error) {
	full, err := c.uncompressed(public[:])
	if err != nil {
		return nil, err
	}
	parameters, err := asn1.Marshal(c.oid)
	if err != nil {
		return nil, err
	}
	return asn1.Marshal(struct {
		Algorithm pkix.AlgorithmIdentifier
		PublicKey asn1.BitString
	}{
		pkix.AlgorithmIdentifier{Algorithm: asn1.ObjectIdentifier{1, 2, 840, 10045, 2, 1}, Parameters: asn1.RawValue{FullBytes: parameters}},
		asn1.BitString{Bytes: full, BitLength: 8 * len(full)},
	})
}

// Group is the public output of a key generation or resharing.
type Group struct {
	guard.Group
	Curve *Curve
	// Auxiliary is SHA-256 of what else is public: each holder's Paillier and
	// Pedersen parameters and ElGamal key, and the random values agreed on.
	Auxiliary [32]byte
}

const groupVersion = 1

// Encode returns the canonical encoding: version, curve, [guard.Group], and the
// auxiliary digest.
func (g *Group) Encode() []byte {
	return append(g.Append([]byte{groupVersion, g.Curve.id}), g.Auxiliary[:]...)
}

// DecodeGroup reads what [Group.Encode] wrote, and checks it as [guard.Group.Check]
// does.
func DecodeGroup(b []byte) (*Group, error) {
	g, err := decodeGroup(b)
	if err != nil {
		return nil, fmt.Errorf("decoding an ECDSA group: %w", err)
	}
	return g, nil
}

func decodeGroup(b []byte) (*Group, error) {
	if len(b) < 2 || b[0] != groupVersion {
		return nil, errors.New("not of version 1")
	}
	at := slices.IndexFunc(curves, func(c *Curve) bool { return c.id == b[1] })
	if at < 0 {
		return nil, fmt.Errorf("curve %d is not known", b[1])
	}
	g := &Group{Curve: curves[at]}
	var err error
	if g.Group, b, err = guard.DecodeGroup(g.Curve.group, b[2:]); err != nil {
		return nil, err
	}
	if len(b) != len(g.Auxiliary) {
		return nil, errors.New("of the wrong length")
	}
	g.Auxiliary = [32]byte(b)
	return g, nil
}

// groupOf is the group of a configuration that the module made for holders.
func groupOf(c *Curve, holders []protocol.HostID, cfg *module.Config) (*Group, error) {
	g := &Group{Curve: c, Group: guard.Group{Quorum: cfg.Threshold + 1, Holders: slices.Clone(holders)}}
	if len(cfg.Public) != len(holders) {
		return nil, fmt.Errorf("the module's configuration has %d parties, not %d", len(cfg.Public), len(holders))
	}
	var err error
	if g.PublicKey, err = guard.EncodePoint(cfg.PublicPoint()); err != nil {
		return nil, err
	}
	h := sha256.New()
	part := func(b []byte) {
		h.Write(binary.BigEndian.AppendUint32(nil, uint32(len(b))))
		h.Write(b)
	}
	part(cfg.RID)
	part(cfg.ChainKey)
	moduli := map[string]bool{}
	for i, name := range holders {
		p := cfg.Public[guard.ID(i)]
		if p == nil {
			return nil, fmt.Errorf("the module's configuration lacks host %q", name)
		}
		x, err := guard.EncodePoint(p.ECDSA)
		if err != nil {
			return nil, err
		}
		g.VerificationShares = append(g.VerificationShares, x)
		e, err := guard.EncodePoint(p.ElGamal)
		if err != nil {
			return nil, err
		}
		n := p.Paillier.N().Bytes()
		switch {
		case len(n) != modulusSize || n[0] < 0x80:
			return nil, fmt.Errorf("host %q has a Paillier modulus of %d bits, not %d", name, p.Paillier.N().BitLen(), 8*modulusSize)
		case !bytes.Equal(n, p.Pedersen.N().Bytes()):
			return nil, fmt.Errorf("host %q has Pedersen parameters of another modulus than its Paillier key", name)
		case p.Pedersen.S() == nil || p.Pedersen.T() == nil: // the module takes a share that lacks its own
			return nil, fmt.Errorf("host %q has no Pedersen parameters", name)
		case moduli[string(n)]:
			return nil, fmt.Errorf("host %q has the Paillier modulus of another", name)
		}
		moduli[string(n)] = true
		for _, b := range [][]byte{x[:], e[:], n, p.Pedersen.N().Bytes(), p.Pedersen.S().Bytes(), p.Pedersen.T().Bytes()} {
			part(b)
		}
	}
	h.Sum(g.Auxiliary[:0])
	return g, nil
}

// Share is one holder's share of a key. It is safe for concurrent use.
type Share struct {
	Group *Group
	Self  protocol.HostID

	secret *secret.Bytes // the module's configuration, CBOR
}

// LoadShare reads what [Share.Secret] gave and checks that it is self's share of the
// group's key. It copies encoded.
func LoadShare(g *Group, self protocol.HostID, encoded []byte) (*Share, error) {
	at := slices.Index(g.Holders, self)
	if at < 0 {
		return nil, fmt.Errorf("ECDSA share: host %q is no holder of this key", self)
	}
	cfg, err := decodeConfig(g.Curve, encoded)
	if err != nil {
		return nil, fmt.Errorf("ECDSA share: %w", err)
	}
	has, err := groupOf(g.Curve, g.Holders, cfg)
	if err != nil {
		return nil, fmt.Errorf("ECDSA share: %w", err)
	}
	again, err := cfg.MarshalBinary()
	if err != nil {
		return nil, fmt.Errorf("ECDSA share: %w", err)
	}
	defer clear(again)
	if !bytes.Equal(again, encoded) {
		return nil, errors.New("ECDSA share: not in canonical form")
	}
	if cfg.ID != guard.ID(at) || !bytes.Equal(has.Encode(), g.Encode()) {
		return nil, errors.New("ECDSA share: it does not belong to this key and host")
	}
	return &Share{Group: g, Self: self, secret: secret.Copy(encoded)}, nil
}

func decodeConfig(c *Curve, encoded []byte) (cfg *module.Config, err error) {
	defer func() {
		if r := recover(); r != nil {
			cfg, err = nil, fmt.Errorf("not a share: %v", r)
		}
	}()
	cfg = module.EmptyConfig(c.group)
	return cfg, cfg.UnmarshalBinary(encoded)
}

// newShare is the share in a configuration that the module made.
func newShare(c *Curve, self protocol.HostID, holders []protocol.HostID, cfg *module.Config) (*Share, error) {
	g, err := groupOf(c, holders, cfg)
	if err != nil {
		return nil, err
	}
	if err := g.Check(c.group); err != nil {
		return nil, err
	}
	encoded, err := cfg.MarshalBinary()
	if err != nil {
		return nil, err
	}
	return &Share{Group: g, Self: self, secret: secret.Take(encoded)}, nil
}

// Secret returns a copy of the share for storage: about 1 KB, and as much for each
// holder.
func (s *Share) Secret() (*secret.Bytes, error) { return s.secret.Clone() }

// Public is the encoded group, which everybody may know.
func (s *Share) Public() []byte { return s.Group.Encode() }

// Wipe ends the share.
func (s *Share) Wipe() { s.secret.Wipe() }

// config decodes the share anew: the module's sessions write into it, so that each
// needs its own.
func (s *Share) config() (cfg *module.Config, err error) {
	err = s.secret.Use(func(b []byte) error {
		cfg, err = decodeConfig(s.Group.Curve, b)
		return err
	})
	return cfg, err
}
