package cmp

import (
	"bytes"
	"crypto/ecdh"
	"crypto/elliptic"
	"math/big"
	"testing"

	"github.com/cronokirby/saferith"
	"github.com/luxfi/threshold/pkg/math/curve"
	"pgregory.net/rapid"
)

var order = elliptic.P256().Params().N

// scalars draws 1 and order-1 more often than chance would.
func scalars(t *rapid.T, label string) (curve.Scalar, *big.Int) {
	n := new(big.Int).SetBytes(rapid.OneOf(
		rapid.SliceOfN(rapid.Byte(), p256Bytes, p256Bytes),
		rapid.Just([]byte{1}), rapid.Just(new(big.Int).Sub(order, big.NewInt(1)).Bytes()),
	).Draw(t, label))
	n.Mod(n, order)
	if n.Sign() == 0 {
		n.SetInt64(1)
	}
	return scalarOf(n), n
}

func scalarOf(n *big.Int) curve.Scalar {
	s := p256{}.NewScalar()
	if err := s.UnmarshalBinary(n.FillBytes(make([]byte, p256Bytes))); err != nil {
		panic(err)
	}
	return s
}

func encoded(t interface{ Fatal(...any) }, m interface{ MarshalBinary() ([]byte, error) }) []byte {
	b, err := m.MarshalBinary()
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// TestScalarsAgreeWithBig holds the arithmetic to math/big.
func TestScalarsAgreeWithBig(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		a, x := scalars(t, "a")
		b, y := scalars(t, "b")
		fresh := func() curve.Scalar { return p256{}.NewScalar().Set(a) }
		for name, got := range map[string]struct {
			s curve.Scalar
			n *big.Int
		}{
			"add":    {fresh().Add(b), new(big.Int).Add(x, y)},
			"sub":    {fresh().Sub(b), new(big.Int).Sub(x, y)},
			"mul":    {fresh().Mul(b), new(big.Int).Mul(x, y)},
			"negate": {fresh().Negate(), new(big.Int).Neg(x)},
			"invert": {fresh().Invert(), new(big.Int).ModInverse(x, order)},
			"zero":   {fresh().Sub(a), new(big.Int)},
		} {
			want := got.n.Mod(got.n, order)
			if !bytes.Equal(encoded(t, got.s), want.FillBytes(make([]byte, p256Bytes))) {
				t.Fatalf("%s of %x and %x is wrong", name, x, y)
			}
			if got.s.IsZero() != (want.Sign() == 0) || got.s.Equal(a) != (want.Cmp(x) == 0) {
				t.Fatalf("%s: IsZero or Equal is wrong", name)
			}
			if got.s.IsOverHalfOrder() != (want.Cmp(new(big.Int).Rsh(order, 1)) > 0) {
				t.Fatalf("%s: IsOverHalfOrder is wrong for %x", name, want)
			}
		}
		if !a.Equal(scalarOf(x)) {
			t.Fatal("an operand was changed")
		}
	})
}

// TestPointsAgreeWithECDH holds multiplication to crypto/ecdh, and addition to it.
func TestPointsAgreeWithECDH(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		a, x := scalars(t, "a")
		b, y := scalars(t, "b")
		private := func(n *big.Int) *ecdh.PrivateKey {
			k, err := ecdh.P256().NewPrivateKey(n.FillBytes(make([]byte, p256Bytes)))
			if err != nil {
				t.Fatal(err)
			}
			return k
		}
		pa, pb := a.ActOnBase(), b.ActOnBase()
		if !bytes.Equal(pa.(*p256Point).v.Bytes(), private(x).PublicKey().Bytes()) || !pa.Equal(a.Act(p256{}.NewBasePoint())) {
			t.Fatalf("%x times the base point is wrong", x)
		}
		shared, err := private(x).ECDH(private(y).PublicKey())
		if err != nil {
			t.Fatal(err)
		}
		if want := new(saferith.Nat).SetBytes(shared); !a.Act(pb).XScalar().Equal(p256{}.NewScalar().SetNat(want)) {
			t.Fatal("a times B has another x")
		}
		sum := p256{}.NewScalar().Set(a).Add(b)
		if !pa.Add(pb).Equal(sum.ActOnBase()) || !pa.Add(pb).Sub(pb).Equal(pa) {
			t.Fatal("addition disagrees with the scalars")
		}
		if zero := pa.Add(pa.Negate()); !zero.IsIdentity() || zero.XScalar() != nil || pa.IsIdentity() {
			t.Fatal("A - A is not the identity, or A is")
		}
		back := p256{}.NewPoint()
		if err := back.UnmarshalBinary(encoded(t, pa)); err != nil || !back.Equal(pa) {
			t.Fatalf("decoded another point: %v", err)
		}
	})
}

// TestDecodingIsStrict tries what a peer could send instead of a scalar or a point.
func TestDecodingIsStrict(t *testing.T) {
	good := encoded(t, p256{}.NewBasePoint())
	if err := (p256{}.NewPoint()).UnmarshalBinary(good); err != nil {
		t.Fatalf("the base point is refused: %v", err)
	}
	offCurve := append([]byte{2}, bytes.Repeat([]byte{0xff}, p256Bytes)...) // x above the field's prime
	noRoot := append([]byte{2}, make([]byte, p256Bytes)...)
	for noRoot[p256Bytes] = 1; (p256{}.NewPoint()).UnmarshalBinary(noRoot) == nil; noRoot[p256Bytes]++ {
	}
	identity := encoded(t, p256{}.NewPoint())
	for name, b := range map[string][]byte{
		"empty": {}, "identity": identity, "identity, padded": append(identity, make([]byte, p256Bytes)...), "short": good[:p256Bytes],
		"long": append(bytes.Clone(good), 0), "uncompressed": p256{}.NewBasePoint().(*p256Point).v.Bytes(),
		"prefix": append([]byte{5}, good[1:]...), "x too large": offCurve, "not on the curve": noRoot,
	} {
		if err := (p256{}.NewPoint()).UnmarshalBinary(b); err == nil {
			t.Errorf("point, %s: accepted", name)
		}
	}
	for name, b := range map[string][]byte{
		"empty": {}, "short": make([]byte, p256Bytes-1), "long": make([]byte, p256Bytes+1),
		"order": order.Bytes(), "above the order": bytes.Repeat([]byte{0xff}, p256Bytes),
	} {
		if err := (p256{}.NewScalar()).UnmarshalBinary(b); err == nil {
			t.Errorf("scalar, %s: accepted", name)
		}
	}
}

// TestRandomScalarsAreWide: reduced randomness must be wider than the order by 128 bits.
func TestRandomScalarsAreWide(t *testing.T) {
	if bits := 8 * (p256{}).SafeScalarBytes(); bits < order.BitLen()+128 {
		t.Errorf("%d bits", bits)
	}
}
