package guard

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/luxfi/threshold/pkg/math/curve"
	"github.com/luxfi/threshold/pkg/party"
)

// Shape reads one CBOR value (RFC 8949) of exactly one form from the front of a
// message and returns the rest. Shapes know every length and every key, in the order
// in which the module writes them, so that no two encodings of a value pass.
type Shape func(b []byte) (rest []byte, err error)

// CBOR's major types, in the upper three bits of a head.
const (
	cborUint  = 0 << 5
	cborBytes = 2 << 5
	cborText  = 3 << 5
	cborArray = 4 << 5
	cborMap   = 5 << 5
	cborTag   = 6 << 5

	cborFalse = 0xf4
	cborTrue  = 0xf5
	cborNull  = 0xf6

	tagBignum = 2
)

var errForm = errors.New("is not of the form that this round has")

// head is the canonical head of a value.
func head(major byte, n int) []byte {
	switch {
	case n < 24:
		return []byte{major | byte(n)}
	case n < 1<<8:
		return []byte{major | 24, byte(n)}
	case n < 1<<16:
		return binary.BigEndian.AppendUint16([]byte{major | 25}, uint16(n))
	}
	return binary.BigEndian.AppendUint32([]byte{major | 26}, uint32(n))
}

func expect(b, want []byte) ([]byte, error) {
	rest, ok := bytes.CutPrefix(b, want)
	if !ok {
		if len(b) > 0 && b[0] == cborNull {
			return nil, errors.New("is missing")
		}
		return nil, errForm
	}
	return rest, nil
}

// leaf is a byte string of n bytes that check accepts.
func leaf(n int, check func([]byte) error) Shape {
	return func(b []byte) ([]byte, error) {
		b, err := expect(b, head(cborBytes, n))
		if err != nil {
			return nil, err
		}
		if len(b) < n {
			return nil, errForm
		}
		return b[n:], check(b[:n])
	}
}

// Bytes is a byte string of n bytes.
func Bytes(n int) Shape { return leaf(n, func([]byte) error { return nil }) }

// Int is a saferith.Int: a sign, 0 or 1, and n bytes.
func Int(n int) Shape {
	return leaf(1+n, func(b []byte) error {
		if b[0] > 1 {
			return errors.New("has a sign that is none")
		}
		return nil
	})
}

// Modulus is an odd number of exactly n bytes.
func Modulus(n int) Shape {
	return leaf(n, func(b []byte) error {
		if b[0] < 0x80 || b[n-1]&1 == 0 {
			return errors.New("is no modulus of this size")
		}
		return nil
	})
}

// Point is a point of the group other than the identity, compressed.
func Point(group curve.Curve) Shape {
	return leaf(PointSize, func(b []byte) error {
		_, err := DecodePoint(group, b)
		return err
	})
}

// Scalar is a number below the group's order.
func Scalar(group curve.Curve) Shape {
	return leaf(32, func(b []byte) error {
		_, err := DecodeScalar(group, b)
		return err
	})
}

// Polynomial is a polynomial in the exponent with exactly n coefficients that are
// sent; with zero, its constant is the identity, which is not. In front of it stands
// their number in four bytes, which the module believes: it would allocate that many
// points.
func Polynomial(group curve.Curve, n int, zero bool) Shape {
	points := make([]Shape, n)
	for i := range points {
		points[i] = Point(group)
	}
	form := Fields("IsConstant Coefficients", constant(zero), array(points...))
	size := 4 + 1 + len("xIsConstant") + 1 + len("xCoefficients") + len(head(cborArray, n)) + n*(2+PointSize)
	return leaf(size, func(b []byte) error {
		if binary.BigEndian.Uint32(b) != uint32(n) {
			return fmt.Errorf("says it has %d coefficients, not %d", binary.BigEndian.Uint32(b), n)
		}
		return All(form, b[4:])
	})
}

// BigInt is a math/big.Int that is not negative and has at most n bytes.
func BigInt(n int) Shape {
	return func(b []byte) ([]byte, error) {
		b, err := expect(b, []byte{cborTag | tagBignum})
		if err != nil {
			return nil, err
		}
		size := 0
		switch {
		case len(b) >= 1 && b[0]&0xe0 == cborBytes && b[0]&0x1f < 24:
			size = int(b[0] & 0x1f)
		case len(b) >= 2 && b[0] == cborBytes|24:
			size = int(b[1])
		case len(b) >= 3 && b[0] == cborBytes|25:
			size = int(binary.BigEndian.Uint16(b[1:]))
		}
		if size > n {
			return nil, fmt.Errorf("has %d bytes, more than %d", size, n)
		}
		b, err = expect(b, head(cborBytes, size))
		if err != nil || len(b) < size || size <= 8 || b[0] == 0 { // up to 8 bytes it would be no bignum
			return nil, errForm
		}
		return b[size:], nil
	}
}

// Bool is true or false.
func Bool() Shape {
	return func(b []byte) ([]byte, error) {
		if len(b) == 0 || b[0] != cborFalse && b[0] != cborTrue {
			return nil, errForm
		}
		return b[1:], nil
	}
}

func constant(v bool) Shape {
	want := []byte{cborFalse}
	if v {
		want[0] = cborTrue
	}
	return func(b []byte) ([]byte, error) { return expect(b, want) }
}

// Array is n times the same.
func Array(n int, element Shape) Shape { return array(slices.Repeat([]Shape{element}, n)...) }

func array(elements ...Shape) Shape {
	start := head(cborArray, len(elements))
	return func(b []byte) ([]byte, error) {
		b, err := expect(b, start)
		for i, e := range elements {
			if err != nil {
				return nil, err
			}
			if b, err = e(b); err != nil {
				return nil, fmt.Errorf("[%d] %w", i, err)
			}
		}
		return b, err
	}
}

// Fields is a map with exactly these keys, separated by blanks, and one shape for each.
func Fields(keys string, values ...Shape) Shape {
	names := strings.Fields(keys)
	if len(names) != len(values) {
		panic(fmt.Sprintf("guard: %d shapes for the keys %q", len(values), keys))
	}
	start := head(cborMap, len(names))
	return func(b []byte) ([]byte, error) {
		b, err := expect(b, start)
		if err != nil {
			return nil, err
		}
		for i, name := range names {
			if b, err = expect(b, text(name)); err == nil {
				b, err = values[i](b)
			}
			if err != nil {
				return nil, fmt.Errorf(".%s %w", name, err)
			}
		}
		return b, nil
	}
}

func text(s string) []byte { return append(head(cborText, len(s)), s...) }

// Parties is a map with one value for each of ids, in any order.
func Parties(ids []party.ID, value Shape) Shape {
	start := head(cborMap, len(ids))
	return func(b []byte) ([]byte, error) {
		b, err := expect(b, start)
		if err != nil {
			return nil, err
		}
		missing := slices.Clone(ids)
		for len(missing) > 0 {
			i := slices.IndexFunc(missing, func(id party.ID) bool { return bytes.HasPrefix(b, text(string(id))) })
			if i < 0 {
				return nil, errors.New("has a key that is no party, or one twice")
			}
			b = b[len(text(string(missing[i]))):]
			if b, err = value(b); err != nil {
				return nil, fmt.Errorf("[%s] %w", missing[i], err)
			}
			missing = slices.Delete(missing, i, i+1)
		}
		return b, nil
	}
}

// All reads b to its end.
func All(s Shape, b []byte) error {
	rest, err := s(b)
	if err == nil && len(rest) > 0 {
		err = fmt.Errorf("has %d bytes too many", len(rest))
	}
	return err
}
