package guard

import (
	"crypto/rand"
	"slices"

	"github.com/cronokirby/saferith"
	"github.com/luxfi/threshold/pkg/math/curve"
	"github.com/luxfi/threshold/pkg/math/polynomial"
	"github.com/luxfi/threshold/pkg/math/sample"
	"github.com/luxfi/threshold/pkg/party"

	"conseal/protocol"
	"conseal/protocol/dealing"
)

// Dealing is a curve of the module as package dealing takes it. A holder's scalar is
// the number that the module takes its name for: see [ID].
type Dealing struct{ curve.Curve }

var _ dealing.Group[curve.Point, curve.Scalar] = Dealing{}

// Dealing is a resharing of a group's key as package dealing takes it, without a share.
// It checks the group.
func (g *Group) Dealing(c curve.Curve, encoded []byte, plan dealing.Plan) (dealing.Config[curve.Point, curve.Scalar], error) {
	out := dealing.Config[curve.Point, curve.Scalar]{Plan: plan, Group: Dealing{c}}
	out.Old = dealing.Key[curve.Point]{Encoded: encoded, Quorum: g.Quorum, Holders: g.Holders}
	if err := g.Check(c); err != nil {
		return out, err
	}
	for _, x := range g.VerificationShares {
		p, err := DecodePoint(c, x[:])
		if err != nil {
			return out, err
		}
		out.Old.Shares = append(out.Old.Shares, p)
	}
	var err error
	out.Old.Public, err = DecodePoint(c, g.PublicKey[:])
	return out, err
}

// Next is the group of the same key after a resharing to holders.
func (g *Group) Next(quorum int, holders []protocol.HostID, shares []curve.Point) (Group, error) {
	next := Group{Quorum: quorum, Holders: slices.Clone(holders), PublicKey: g.PublicKey}
	for _, p := range shares {
		x, err := EncodePoint(p)
		if err != nil {
			return next, err
		}
		next.VerificationShares = append(next.VerificationShares, x)
	}
	return next, nil
}

// PointSize is [PointSize].
func (d Dealing) PointSize() int { return PointSize }

// Random is a scalar without bias.
func (d Dealing) Random() curve.Scalar { return sample.Scalar(rand.Reader, d.Curve) }

// Number is the scalar n.
func (d Dealing) Number(n int) curve.Scalar {
	return d.NewScalar().SetNat(new(saferith.Nat).SetUint64(uint64(n)))
}

// Identifier is the holder's point of the polynomial.
func (d Dealing) Identifier(position int) curve.Scalar { return ID(position).Scalar(d.Curve) }

// Weight is the holder's Lagrange coefficient at zero.
func (d Dealing) Weight(at int, set []int) curve.Scalar {
	var ids []party.ID
	for _, i := range set {
		ids = append(ids, ID(i))
	}
	return polynomial.LagrangeSingle(d.Curve, ids, ID(at))
}

// MulAdd is a*b + c.
func (d Dealing) MulAdd(a, b, c curve.Scalar) curve.Scalar {
	return d.NewScalar().Set(a).Mul(b).Add(c)
}

// EncodeScalar is 32 bytes, big-endian.
func (d Dealing) EncodeScalar(s curve.Scalar) []byte {
	b, _ := s.MarshalBinary() // of either curve, without an error
	return b
}

// DecodeScalar is [DecodeScalar].
func (d Dealing) DecodeScalar(b []byte) (curve.Scalar, error) { return DecodeScalar(d.Curve, b) }

// Wipe overwrites scalars. What the module copied of them stays.
func (d Dealing) Wipe(scalars ...curve.Scalar) {
	for _, s := range scalars {
		if s != nil {
			s.Set(d.NewScalar())
		}
	}
}

// BaseMult is s times the generator.
func (d Dealing) BaseMult(s curve.Scalar) curve.Point { return s.ActOnBase() }

// Add is the sum of two points.
func (d Dealing) Add(a, b curve.Point) curve.Point { return a.Add(b) }

// Combine is the sum of products.
func (d Dealing) Combine(scalars []curve.Scalar, points []curve.Point) curve.Point {
	sum := d.NewPoint()
	for i, s := range scalars {
		sum = sum.Add(s.Act(points[i]))
	}
	return sum
}

// EncodePoint is the compressed form of a point that is not the identity.
func (d Dealing) EncodePoint(p curve.Point) []byte {
	b, _ := p.MarshalBinary() // of either curve, without an error
	return b
}

// DecodePoint is [DecodePoint].
func (d Dealing) DecodePoint(b []byte) (curve.Point, error) { return DecodePoint(d.Curve, b) }

// Equal compares two points.
func (d Dealing) Equal(a, b curve.Point) bool { return a.Equal(b) }

// IsIdentity tells the identity.
func (d Dealing) IsIdentity(p curve.Point) bool { return p.IsIdentity() }
