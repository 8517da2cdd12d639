// Package frost is FROST(Ed25519, SHA-512) of RFC 9591: holders make a key
// together, and any quorum of them signs.
//
// [NewKeygen] makes the session in which holders generate a key, [NewSign] the
// session in which a coordinator and a quorum sign, [NewReshare] the session in which
// a quorum gives the key new shares. All are [protocol.Session]s; the results are a
// [Share], of which the [Group] is the public part, and an Ed25519 signature (RFC 8032).
package frost

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"

	ed "filippo.io/edwards25519"

	"conseal/internal/secret"
	"conseal/protocol"
	"conseal/protocol/dealing"
)

// Group is the public output of a key generation.
type Group struct {
	Quorum             int               // how many holders sign
	Holders            []protocol.HostID // sorted; the identifier of Holders[i] is i+1
	PublicKey          [32]byte          // RFC 8032
	VerificationShares [][32]byte        // X_i of Holders[i]

	public *ed.Point
	shares []*ed.Point
}

// newGroup fills in the encodings.
func newGroup(quorum int, holders []protocol.HostID, public *ed.Point, shares []*ed.Point) *Group {
	g := &Group{Quorum: quorum, Holders: slices.Clone(holders), PublicKey: [32]byte(public.Bytes()), public: public, shares: shares}
	for _, x := range shares {
		g.VerificationShares = append(g.VerificationShares, [32]byte(x.Bytes()))
	}
	return g
}

const groupVersion = 1

// Encode returns the canonical encoding: version, quorum, number of holders, and
// for each its name and verification share; then the public key.
func (g *Group) Encode() []byte {
	b := []byte{groupVersion}
	b = binary.BigEndian.AppendUint16(b, uint16(g.Quorum))
	b = binary.BigEndian.AppendUint16(b, uint16(len(g.Holders)))
	for i, h := range g.Holders {
		b = append(b, byte(len(h)))
		b = append(b, h...)
		b = append(b, g.VerificationShares[i][:]...)
	}
	return append(b, g.PublicKey[:]...)
}

// DecodeGroup reads what [Group.Encode] wrote. It checks every point, and that
// all verification shares lie on one polynomial of degree Quorum-1 with the
// public key at zero.
func DecodeGroup(b []byte) (*Group, error) {
	g, err := decodeGroup(b)
	if err != nil {
		return nil, fmt.Errorf("decoding a FROST group: %w", err)
	}
	return g, nil
}

func decodeGroup(b []byte) (*Group, error) {
	whole := b
	if len(b) < 5 || b[0] != groupVersion {
		return nil, errors.New("not of version 1")
	}
	quorum, n := int(binary.BigEndian.Uint16(b[1:])), int(binary.BigEndian.Uint16(b[3:]))
	if n > dealing.MaxHolders {
		return nil, fmt.Errorf("%d holders are over the limit of %d", n, dealing.MaxHolders)
	}
	b = b[5:]
	var holders []protocol.HostID
	var points []*ed.Point
	for range n {
		if len(b) < 1 || len(b) < 1+int(b[0])+pointSize {
			return nil, errors.New("too short")
		}
		name := b[1 : 1+int(b[0])]
		b = b[1+len(name):]
		x, err := decodePoint(b[:pointSize])
		if err != nil {
			return nil, fmt.Errorf("verification share of %q: %w", name, err)
		}
		holders, points, b = append(holders, protocol.HostID(name)), append(points, x), b[pointSize:]
	}
	if len(b) != pointSize {
		return nil, errors.New("of the wrong length")
	}
	public, err := decodePoint(b)
	if err != nil {
		return nil, fmt.Errorf("public key: %w", err)
	}
	g := newGroup(quorum, holders, public, points)
	if err := dealing.CheckHolders(quorum, holders); err != nil {
		return nil, err
	}
	if !bytes.Equal(g.Encode(), whole) {
		return nil, errors.New("not in canonical form")
	}
	return g, g.consistent()
}

// consistent interpolates the public key, and every share beyond the first
// Quorum, from the first Quorum shares.
func (g *Group) consistent() error {
	base := make([]int, g.Quorum)
	for i := range base {
		base[i] = i
	}
	at := func(x *ed.Scalar) *ed.Point {
		var lambdas []*ed.Scalar
		for _, i := range base {
			lambdas = append(lambdas, lagrange(i, base, x))
		}
		return new(ed.Point).VarTimeMultiScalarMult(lambdas, g.shares[:g.Quorum])
	}
	if at(nil).Equal(g.public) != 1 {
		return errors.New("the shares do not make up the public key")
	}
	for i := g.Quorum; i < len(g.shares); i++ {
		if at(identifier(i)).Equal(g.shares[i]) != 1 {
			return fmt.Errorf("the verification share of %q is not of this key", g.Holders[i])
		}
	}
	return nil
}

// equal tells whether two groups are the same epoch of the same key.
func (g *Group) equal(o *Group) bool { return g == o || bytes.Equal(g.Encode(), o.Encode()) }

func (g *Group) position(h protocol.HostID) int { return slices.Index(g.Holders, h) }

// Share is one holder's share of a key. It is safe for concurrent use.
type Share struct {
	Group *Group
	Self  protocol.HostID

	position int
	secret   *secret.Bytes // the scalar
}

// LoadShare reads the scalar that [Share.Secret] gave and checks that it is
// self's share of the group's key. It copies scalar.
func LoadShare(group *Group, self protocol.HostID, scalar []byte) (*Share, error) {
	s := &Share{Group: group, Self: self, position: group.position(self)}
	if s.position < 0 {
		return nil, fmt.Errorf("FROST share: host %q is no holder of this key", self)
	}
	x, err := decodeScalar(scalar)
	if err != nil {
		return nil, fmt.Errorf("FROST share: %w", err)
	}
	defer wipe(x)
	if new(ed.Point).ScalarBaseMult(x).Equal(group.shares[s.position]) != 1 {
		return nil, errors.New("FROST share: it does not belong to this key and host")
	}
	s.secret = secret.Copy(scalar)
	return s, nil
}

// Secret returns a copy of the share's scalar, 32 bytes, for storage.
func (s *Share) Secret() (*secret.Bytes, error) { return s.secret.Clone() }

// Public is the encoded group, which everybody may know.
func (s *Share) Public() []byte { return s.Group.Encode() }

// Wipe ends the share.
func (s *Share) Wipe() { s.secret.Wipe() }

// use lends the share's scalar.
func (s *Share) use(fn func(x *ed.Scalar) error) error {
	return s.secret.Use(func(b []byte) error {
		x, err := decodeScalar(b)
		if err != nil {
			return err
		}
		defer wipe(x)
		return fn(x)
	})
}
