package guard

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"

	"github.com/luxfi/threshold/pkg/math/curve"
	"github.com/luxfi/threshold/pkg/math/polynomial"
	"github.com/luxfi/threshold/pkg/party"

	"conseal/protocol"
	"conseal/protocol/dealing"
)

// PointSize is the length of a compressed point, in bytes.
const PointSize = 33

// Group is what everybody may know of a key whose shares lie on a polynomial.
type Group struct {
	Quorum             int               // how many holders sign
	Holders            []protocol.HostID // sorted
	PublicKey          [PointSize]byte   // SEC 1, compressed
	VerificationShares [][PointSize]byte // X_i of Holders[i]
}

// Append writes the canonical encoding after b: quorum, number of holders, for each
// its name and verification share, and the public key.
func (g *Group) Append(b []byte) []byte {
	b = binary.BigEndian.AppendUint16(b, uint16(g.Quorum))
	b = binary.BigEndian.AppendUint16(b, uint16(len(g.Holders)))
	for i, h := range g.Holders {
		b = append(b, byte(len(h)))
		b = append(b, h...)
		b = append(b, g.VerificationShares[i][:]...)
	}
	return append(b, g.PublicKey[:]...)
}

// DecodeGroup reads what [Group.Append] wrote and returns what follows it. It checks
// as [Group.Check] does.
func DecodeGroup(c curve.Curve, b []byte) (g Group, rest []byte, err error) {
	if len(b) < 4 {
		return g, nil, errors.New("too short")
	}
	g.Quorum = int(binary.BigEndian.Uint16(b))
	n := int(binary.BigEndian.Uint16(b[2:]))
	if n > dealing.MaxHolders {
		return g, nil, fmt.Errorf("%d holders are over the limit of %d", n, dealing.MaxHolders)
	}
	b = b[4:]
	for range n {
		if len(b) < 1 || len(b) < 1+int(b[0])+PointSize {
			return g, nil, errors.New("too short")
		}
		name := b[1 : 1+int(b[0])]
		b = b[1+len(name):]
		g.Holders = append(g.Holders, protocol.HostID(name))
		g.VerificationShares = append(g.VerificationShares, [PointSize]byte(b))
		b = b[PointSize:]
	}
	if len(b) < PointSize {
		return g, nil, errors.New("too short")
	}
	g.PublicKey = [PointSize]byte(b)
	return g, b[PointSize:], g.Check(c)
}

// Check checks every point, and that all verification shares lie on one polynomial of
// degree Quorum-1 with the public key at zero: the first Quorum-1 of them together
// with any other give the public key.
func (g *Group) Check(c curve.Curve) error {
	if err := dealing.CheckHolders(g.Quorum, g.Holders); err != nil {
		return err
	}
	public, err := DecodePoint(c, g.PublicKey[:])
	if err != nil {
		return fmt.Errorf("public key: %w", err)
	}
	var shares []curve.Point
	for i, x := range g.VerificationShares {
		p, err := DecodePoint(c, x[:])
		if err != nil {
			return fmt.Errorf("verification share of %q: %w", g.Holders[i], err)
		}
		shares = append(shares, p)
	}
	for last := g.Quorum - 1; last < len(shares); last++ {
		var ids []party.ID
		for i := range g.Quorum - 1 {
			ids = append(ids, ID(i))
		}
		ids = append(ids, ID(last))
		lambda := polynomial.Lagrange(c, ids)
		sum := c.NewPoint()
		for i, id := range ids[:g.Quorum-1] {
			sum = sum.Add(lambda[id].Act(shares[i]))
		}
		if !sum.Add(lambda[ID(last)].Act(shares[last])).Equal(public) {
			return fmt.Errorf("the verification share of %q is not of this key", g.Holders[last])
		}
	}
	return nil
}

// DecodePoint decodes a compressed point that is not the identity.
func DecodePoint(c curve.Curve, b []byte) (curve.Point, error) {
	p := c.NewPoint()
	if err := p.UnmarshalBinary(b); err != nil {
		return nil, errors.New("is no point of the curve")
	}
	if again, err := p.MarshalBinary(); err != nil || p.IsIdentity() || !bytes.Equal(again, b) {
		return nil, errors.New("is no point of the curve in canonical form")
	}
	return p, nil
}

// DecodeScalar decodes a number below the group's order, of 32 bytes.
func DecodeScalar(c curve.Curve, b []byte) (curve.Scalar, error) {
	s := c.NewScalar()
	if err := s.UnmarshalBinary(b); err != nil {
		return nil, errors.New("is not below the order of the group")
	}
	if again, err := s.MarshalBinary(); err != nil || !bytes.Equal(again, b) {
		return nil, errors.New("is no scalar in canonical form")
	}
	return s, nil
}

// EncodePoint is the compressed form of a point.
func EncodePoint(p curve.Point) (out [PointSize]byte, err error) {
	b, err := p.MarshalBinary()
	if err != nil || len(b) != PointSize {
		return out, fmt.Errorf("encoding a point: %d bytes, %w", len(b), err)
	}
	return [PointSize]byte(b), nil
}

// IDs are the module's names of holders.
func IDs(holders []protocol.HostID) map[protocol.HostID]party.ID {
	out := map[protocol.HostID]party.ID{}
	for i, h := range holders {
		out[h] = ID(i)
	}
	return out
}

// Signers checks that hosts are a quorum with self and gives the module's names.
func (g *Group) Signers(self protocol.HostID, hosts []protocol.HostID) ([]party.ID, error) {
	if err := protocol.CheckParties(self, hosts); err != nil {
		return nil, err
	}
	if len(hosts) != g.Quorum {
		return nil, fmt.Errorf("%d signers for a quorum of %d", len(hosts), g.Quorum)
	}
	var out []party.ID
	for _, h := range hosts {
		at := slices.Index(g.Holders, h)
		if at < 0 {
			return nil, fmt.Errorf("host %q holds no share", h)
		}
		out = append(out, ID(at))
	}
	return out, nil
}

// Threshold is the module's word for a quorum: how many parties together know
// nothing.
func Threshold(quorum int) int { return quorum - 1 }
