package frost

import (
	ed "filippo.io/edwards25519"

	"conseal/protocol/dealing"
)

// curve is the prime-order group of edwards25519 for package dealing.
var curve dealing.Group[*ed.Point, *ed.Scalar] = edwards{}

type edwards struct{}

func (edwards) Name() string                              { return contextString }
func (edwards) PointSize() int                            { return pointSize }
func (edwards) Random() *ed.Scalar                        { return randomScalar() }
func (edwards) Identifier(position int) *ed.Scalar        { return identifier(position) }
func (edwards) Weight(at int, set []int) *ed.Scalar       { return lagrange(at, set, nil) }
func (edwards) EncodeScalar(s *ed.Scalar) []byte          { return s.Bytes() }
func (edwards) DecodeScalar(b []byte) (*ed.Scalar, error) { return decodeScalar(b) }
func (edwards) Wipe(s ...*ed.Scalar)                      { wipe(s...) }
func (edwards) BaseMult(s *ed.Scalar) *ed.Point           { return new(ed.Point).ScalarBaseMult(s) }
func (edwards) Add(a, b *ed.Point) *ed.Point              { return new(ed.Point).Add(a, b) }
func (edwards) EncodePoint(p *ed.Point) []byte            { return p.Bytes() }
func (edwards) DecodePoint(b []byte) (*ed.Point, error)   { return decodePoint(b) }
func (edwards) Equal(a, b *ed.Point) bool                 { return a.Equal(b) == 1 }
func (edwards) IsIdentity(p *ed.Point) bool               { return p.Equal(ed.NewIdentityPoint()) == 1 }
func (edwards) MulAdd(a, b, c *ed.Scalar) *ed.Scalar      { return ed.NewScalar().MultiplyAdd(a, b, c) }
func (edwards) Combine(s []*ed.Scalar, p []*ed.Point) *ed.Point {
	return new(ed.Point).VarTimeMultiScalarMult(s, p)
}

// Number is the scalar n.
func (edwards) Number(n int) *ed.Scalar {
	if n == 0 {
		return ed.NewScalar()
	}
	return identifier(n - 1)
}
