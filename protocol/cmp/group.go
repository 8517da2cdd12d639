// Package cmp is threshold ECDSA after CGGMP (Canetti, Gennaro, Goldfeder, Makriyannis,
// Peled), on P-256 and secp256k1: holders make a key together, and any quorum of them
// signs. The protocol is that of github.com/luxfi/threshold behind [guard.Session]; it
// does not have P-256, which is here.
//
// [NewKeygen] and [NewRefresh] make the sessions that end in a [Share], of which the
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
	"github.com/luxfi/threshold/pkg/math/polynomial"
	"github.com/luxfi/threshold/pkg/party"
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

const pointSize = 33 // of a compressed point, in bytes

// point decodes a compressed point that is not the identity.
func (c *Curve) point(b []byte) (curve.Point, error) {
	p := c.group.NewPoint()
	if err := p.UnmarshalBinary(b); err != nil || p.IsIdentity() {
		return nil, errors.New("not a point of the curve")
	}
	if again, err := p.MarshalBinary(); err != nil || !bytes.Equal(again, b) {
		return nil, errors.New("not a point in canonical form")
	}
	return p, nil
}

// SPKI is a compressed public key as a SubjectPublicKeyInfo (RFC 5480), DER.
func (c *Curve) SPKI(public [pointSize]byte) ([]byte, error) {
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

// Group is the public output of a key generation or refresh.
type Group struct {
	Curve              *Curve
	Quorum             int               // how many holders sign
	Holders            []protocol.HostID // sorted
	PublicKey          [pointSize]byte   // SEC 1, compressed
	VerificationShares [][pointSize]byte // X_i of Holders[i]
	// Auxiliary is SHA-256 of what else is public: each holder's Paillier and
	// Pedersen parameters and ElGamal key, and the random values agreed on.
	Auxiliary [32]byte
}

const groupVersion = 1

// Encode returns the canonical encoding: version, curve, quorum, number of holders,
// for each its name and verification share, the public key, the auxiliary digest.
func (g *Group) Encode() []byte {
	b := []byte{groupVersion, g.Curve.id}
	b = binary.BigEndian.AppendUint16(b, uint16(g.Quorum))
	b = binary.BigEndian.AppendUint16(b, uint16(len(g.Holders)))
	for i, h := range g.Holders {
		b = append(b, byte(len(h)))
		b = append(b, h...)
		b = append(b, g.VerificationShares[i][:]...)
	}
	b = append(b, g.PublicKey[:]...)
	return append(b, g.Auxiliary[:]...)
}

// DecodeGroup reads what [Group.Encode] wrote. It checks every point, and that all
// verification shares lie on one polynomial of degree Quorum-1 with the public key at
// zero.
func DecodeGroup(b []byte) (*Group, error) {
	g, err := decodeGroup(b)
	if err != nil {
		return nil, fmt.Errorf("decoding an ECDSA group: %w", err)
	}
	return g, nil
}

func decodeGroup(b []byte) (*Group, error) {
	whole := b
	if len(b) < 6 || b[0] != groupVersion {
		return nil, errors.New("not of version 1")
	}
	g := &Group{Quorum: int(binary.BigEndian.Uint16(b[2:]))}
	for _, c := range []*Curve{P256, Secp256k1} {
		if c.id == b[1] {
			g.Curve = c
		}
	}
	n := int(binary.BigEndian.Uint16(b[4:]))
	if g.Curve == nil || n > guard.MaxParties {
		return nil, fmt.Errorf("curve %d with %d holders is not known", b[1], n)
	}
	b = b[6:]
	for range n {
		if len(b) < 1 || len(b) < 1+int(b[0])+pointSize {
			return nil, errors.New("too short")
		}
		name := b[1 : 1+int(b[0])]
		b = b[1+len(name):]
		g.Holders = append(g.Holders, protocol.HostID(name))
		g.VerificationShares = append(g.VerificationShares, [pointSize]byte(b))
		b = b[pointSize:]
	}
	if len(b) != pointSize+len(g.Auxiliary) {
		return nil, errors.New("of the wrong length")
	}
	g.PublicKey, g.Auxiliary = [pointSize]byte(b), [32]byte(b[pointSize:])
	if err := checkHolders(g.Quorum, g.Holders); err != nil {
		return nil, err
	}
	if !bytes.Equal(g.Encode(), whole) {
		return nil, errors.New("not in canonical form")
	}
	return g, g.consistent()
}

// checkHolders refuses groups that make no sense.
func checkHolders(quorum int, holders []protocol.HostID) error {
	if quorum < 2 || quorum > len(holders) || len(holders) > guard.MaxParties {
		return fmt.Errorf("quorum %d of %d holders: want 2 <= quorum <= holders <= %d", quorum, len(holders), guard.MaxParties)
	}
	for _, h := range holders {
		if len(h) > 255 {
			return fmt.Errorf("a holder's name has %d bytes", len(h))
		}
	}
	return protocol.CheckParties(holders[0], holders)
}

// consistent interpolates the public key from the first Quorum-1 shares and each of
// the others.
func (g *Group) consistent() error {
	public, err := g.Curve.point(g.PublicKey[:])
	if err != nil {
		return fmt.Errorf("public key: %w", err)
	}
	var shares []curve.Point
	for i, x := range g.VerificationShares {
		p, err := g.Curve.point(x[:])
		if err != nil {
			return fmt.Errorf("verification share of %q: %w", g.Holders[i], err)
		}
		shares = append(shares, p)
	}
	for last := g.Quorum - 1; last < len(shares); last++ {
		var ids []party.ID
		for i := range g.Quorum - 1 {
			ids = append(ids, guard.ID(i))
		}
		lambda := polynomial.Lagrange(g.Curve.group, append(ids, guard.ID(last)))
		sum := lambda[guard.ID(last)].Act(shares[last])
		for i, id := range ids {
			sum = sum.Add(lambda[id].Act(shares[i]))
		}
		if !sum.Equal(public) {
			return fmt.Errorf("the verification share of %q is not of this key", g.Holders[last])
		}
	}
	return nil
}

// ids are the module's names of the holders.
func ids(holders []protocol.HostID) map[protocol.HostID]party.ID {
	out := map[protocol.HostID]party.ID{}
	for i, h := range holders {
		out[h] = guard.ID(i)
	}
	return out
}

// groupOf is the group of a configuration that the module made for holders.
func groupOf(c *Curve, holders []protocol.HostID, cfg *module.Config) (*Group, error) {
	g := &Group{Curve: c, Quorum: cfg.Threshold + 1, Holders: slices.Clone(holders)}
	if len(cfg.Public) != len(holders) {
		return nil, fmt.Errorf("the module's configuration has %d parties, not %d", len(cfg.Public), len(holders))
	}
	public, err := cfg.PublicPoint().MarshalBinary()
	if err != nil || len(public) != pointSize {
		return nil, fmt.Errorf("encoding the public key: %d bytes, %w", len(public), err)
	}
	g.PublicKey = [pointSize]byte(public)
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
		x, err := p.ECDSA.MarshalBinary()
		if err != nil || len(x) != pointSize {
			return nil, fmt.Errorf("encoding the verification share of %q: %d bytes, %w", name, len(x), err)
		}
		g.VerificationShares = append(g.VerificationShares, [pointSize]byte(x))
		e, err := p.ElGamal.MarshalBinary()
		if err != nil {
			return nil, fmt.Errorf("encoding the ElGamal key of %q: %w", name, err)
		}
		n := p.Paillier.N().Bytes()
		if moduli[string(n)] {
			return nil, fmt.Errorf("host %q has the Paillier modulus of another", name)
		}
		moduli[string(n)] = true
		for _, b := range [][]byte{x, e, n, p.Pedersen.N().Bytes(), p.Pedersen.S().Bytes(), p.Pedersen.T().Bytes()} {
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
	if err := g.consistent(); err != nil {
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
func (s *Share) Secret() (*secret.Bytes, error) {
	var out *secret.Bytes
	err := s.secret.Use(func(b []byte) error {
		out = secret.Copy(b)
		return nil
	})
	return out, err
}

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

// signers checks that hosts are a quorum with self and gives the module's names.
func (s *Share) signers(hosts []protocol.HostID) ([]party.ID, error) {
	if err := protocol.CheckParties(s.Self, hosts); err != nil {
		return nil, err
	}
	if len(hosts) != s.Group.Quorum {
		return nil, fmt.Errorf("%d signers for a quorum of %d", len(hosts), s.Group.Quorum)
	}
	var out []party.ID
	for _, h := range hosts {
		at := slices.Index(s.Group.Holders, h)
		if at < 0 {
			return nil, fmt.Errorf("host %q holds no share", h)
		}
		out = append(out, guard.ID(at))
	}
	return out, nil
}
