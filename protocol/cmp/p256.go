package cmp

import (
	"crypto/elliptic"
	"crypto/subtle"
	"errors"
	"fmt"

	"filippo.io/nistec"
	"github.com/cronokirby/saferith"
	"github.com/luxfi/threshold/pkg/math/curve"
)

// p256 is NIST P-256 as a [curve.Curve], in constant time. Operands of another
// curve panic, as the interface lets them.
type p256 struct{}

const p256Bytes = 32 // of a scalar, and of a coordinate

var (
	p256Nat   = new(saferith.Nat).SetBytes(elliptic.P256().Params().N.Bytes())
	p256Order = saferith.ModulusFromNat(p256Nat)
	p256Half  = new(saferith.Nat).Rsh(p256Nat, 1, 256)
)

func (p256) Name() string             { return "P-256" }
func (p256) NewPoint() curve.Point    { return &p256Point{nistec.NewP256Point()} }
func (p256) ScalarBits() int          { return 8 * p256Bytes }
func (p256) Order() *saferith.Modulus { return p256Order }

func (p256) NewBasePoint() curve.Point {
	return &p256Point{nistec.NewP256Point().SetGenerator()}
}

func (p256) NewScalar() curve.Scalar {
	return &p256Scalar{new(saferith.Nat).SetUint64(0).Resize(8 * p256Bytes)}
}

// SafeScalarBytes is what a scalar takes of randomness: 16 bytes more than it
// has, since the order is not close to a power of two.
func (p256) SafeScalarBytes() int { return p256Bytes + 16 }

// p256Scalar is a number modulo the order of P-256. Its methods change it.
type p256Scalar struct{ v *saferith.Nat }

func (s *p256Scalar) bytes() []byte { return s.v.FillBytes(make([]byte, p256Bytes)) }

func (s *p256Scalar) Curve() curve.Curve             { return p256{} }
func (s *p256Scalar) MarshalBinary() ([]byte, error) { return s.bytes(), nil }

// UnmarshalBinary takes exactly 32 bytes, big-endian, below the order.
func (s *p256Scalar) UnmarshalBinary(b []byte) error {
	if len(b) != p256Bytes {
		return fmt.Errorf("P-256: a scalar has %d bytes, not %d", p256Bytes, len(b))
	}
	v := new(saferith.Nat).SetBytes(b)
	if _, _, below := v.CmpMod(p256Order); below != 1 {
		return errors.New("P-256: scalar is not below the order")
	}
	s.v = v
	return nil
}

func (s *p256Scalar) Add(t curve.Scalar) curve.Scalar {
	s.v = new(saferith.Nat).ModAdd(s.v, t.(*p256Scalar).v, p256Order)
	return s
}

func (s *p256Scalar) Sub(t curve.Scalar) curve.Scalar {
	s.v = new(saferith.Nat).ModSub(s.v, t.(*p256Scalar).v, p256Order)
	return s
}

func (s *p256Scalar) Negate() curve.Scalar {
	s.v = new(saferith.Nat).ModNeg(s.v, p256Order)
	return s
}

func (s *p256Scalar) Mul(t curve.Scalar) curve.Scalar {
	s.v = new(saferith.Nat).ModMul(s.v, t.(*p256Scalar).v, p256Order)
	return s
}

func (s *p256Scalar) Invert() curve.Scalar {
	s.v = new(saferith.Nat).ModInverse(s.v, p256Order)
	return s
}

func (s *p256Scalar) Equal(t curve.Scalar) bool {
	return subtle.ConstantTimeCompare(s.bytes(), t.(*p256Scalar).bytes()) == 1
}

func (s *p256Scalar) IsZero() bool {
	return subtle.ConstantTimeCompare(s.bytes(), make([]byte, p256Bytes)) == 1
}

// Set overwrites what was there.
func (s *p256Scalar) Set(t curve.Scalar) curve.Scalar {
	s.v.SetNat(t.(*p256Scalar).v)
	return s
}

func (s *p256Scalar) SetNat(x *saferith.Nat) curve.Scalar {
	s.v = new(saferith.Nat).Mod(x, p256Order)
	return s
}

func (s *p256Scalar) Act(p curve.Point) curve.Point {
	out, err := nistec.NewP256Point().ScalarMult(p.(*p256Point).v, s.bytes())
	if err != nil {
		panic(err) // only for another length
	}
	return &p256Point{out}
}

func (s *p256Scalar) ActOnBase() curve.Point {
	out, err := nistec.NewP256Point().ScalarBaseMult(s.bytes())
	if err != nil {
		panic(err) // only for another length
	}
	return &p256Point{out}
}

func (s *p256Scalar) IsOverHalfOrder() bool {
	over, _, _ := s.v.Cmp(p256Half)
	return over == 1
}

// p256Point is a point of P-256, or the identity. Its methods do not change it.
type p256Point struct{ v *nistec.P256Point }

func (p *p256Point) Curve() curve.Curve { return p256{} }

// MarshalBinary returns the compressed form of SEC 1: 33 bytes, or one for the identity.
func (p *p256Point) MarshalBinary() ([]byte, error) { return p.v.BytesCompressed(), nil }

// UnmarshalBinary takes a compressed point of the curve. The identity is refused:
// no message has a place for it.
func (p *p256Point) UnmarshalBinary(b []byte) error {
	if len(b) != 1+p256Bytes {
		return fmt.Errorf("P-256: a point has %d bytes, not %d", 1+p256Bytes, len(b))
	}
	v, err := nistec.NewP256Point().SetBytes(b)
	if err != nil {
		return fmt.Errorf("P-256: %w", err)
	}
	p.v = v
	return nil
}

func (p *p256Point) Add(q curve.Point) curve.Point {
	return &p256Point{nistec.NewP256Point().Add(p.v, q.(*p256Point).v)}
}

func (p *p256Point) Sub(q curve.Point) curve.Point { return p.Add(q.Negate()) }

func (p *p256Point) Negate() curve.Point {
	return &p256Point{nistec.NewP256Point().Negate(p.v)}
}

func (p *p256Point) Equal(q curve.Point) bool {
	return subtle.ConstantTimeCompare(p.v.Bytes(), q.(*p256Point).v.Bytes()) == 1
}

func (p *p256Point) IsIdentity() bool { return len(p.v.Bytes()) == 1 }

// XScalar returns the x coordinate modulo the order, or nil for the identity.
func (p *p256Point) XScalar() curve.Scalar {
	x, err := p.v.BytesX()
	if err != nil {
		return nil
	}
	return p256{}.NewScalar().SetNat(new(saferith.Nat).SetBytes(x))
}
