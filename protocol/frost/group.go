package frost

import (
	"crypto/rand"
	"crypto/sha512"
	"encoding/binary"
	"errors"

	ed "filippo.io/edwards25519"
)

// RFC 9591 section 6.1: FROST(Ed25519, SHA-512).
const contextString = "FROST-ED25519-SHA512-v1"

// pointSize and scalarSize are the lengths of encodings, in bytes.
const (
	pointSize  = 32
	scalarSize = 32
)

// identifier is the scalar of the holder at a position, counted from 0: never
// zero, never twice the same.
func identifier(position int) *ed.Scalar {
	var b [scalarSize]byte
	binary.LittleEndian.PutUint64(b[:], uint64(position)+1)
	s, _ := ed.NewScalar().SetCanonicalBytes(b[:]) // far below the order
	return s
}

// hashToScalar reduces SHA-512 of the parts modulo the order, as H1, H2 and H3 do.
func hashToScalar(parts ...[]byte) *ed.Scalar {
	h := sha512.New()
	for _, p := range parts {
		h.Write(p)
	}
	digest := h.Sum(nil)
	defer clear(digest)
	s, _ := ed.NewScalar().SetUniformBytes(digest) // 64 bytes
	return s
}

// The hashes of RFC 9591 section 6.1. H2 has no domain tag: the challenge is that
// of RFC 8032.
func h1(parts ...[]byte) *ed.Scalar { return tagged("rho", parts) }
func h2(parts ...[]byte) *ed.Scalar { return hashToScalar(parts...) }
func h3(parts ...[]byte) *ed.Scalar { return tagged("nonce", parts) }
func h4(m []byte) []byte            { return hashTagged("msg", m) }
func h5(m []byte) []byte            { return hashTagged("com", m) }

func tagged(tag string, parts [][]byte) *ed.Scalar {
	return hashToScalar(append([][]byte{[]byte(contextString + tag)}, parts...)...)
}

func hashTagged(tag string, m []byte) []byte {
	h := sha512.New()
	h.Write([]byte(contextString + tag))
	h.Write(m)
	return h.Sum(nil)
}

// randomScalar draws 64 bytes, so that the reduction has no bias.
func randomScalar() *ed.Scalar {
	var b [64]byte
	rand.Read(b[:])
	s, _ := ed.NewScalar().SetUniformBytes(b[:])
	clear(b[:])
	return s
}

// wipe overwrites secret scalars.
func wipe(scalars ...*ed.Scalar) {
	for _, s := range scalars {
		if s != nil {
			s.Set(ed.NewScalar())
		}
	}
}

var (
	errPoint  = errors.New("not a point of the prime-order group in canonical form")
	errScalar = errors.New("not a scalar in canonical form")
)

// decodePoint is DeserializeElement of RFC 9591 section 6.1: it refuses what is
// not canonical, the identity and points outside the prime-order group.
func decodePoint(b []byte) (*ed.Point, error) {
	p, err := new(ed.Point).SetBytes(b)
	if err != nil || !reduced(b) || p.Equal(ed.NewIdentityPoint()) == 1 {
		return nil, errPoint
	}
	// 8 * (1/8 * P) is P exactly if P has no component of small order.
	q := new(ed.Point).VarTimeDoubleScalarBaseMult(inverseOf8(), p, ed.NewScalar())
	if q.MultByCofactor(q).Equal(p) != 1 {
		return nil, errPoint
	}
	return p, nil
}

// reduced tells whether the y coordinate in 32 bytes is below 2^255-19. The only
// other encodings that are not canonical, those of x = 0 with a sign, are of the
// identity and of a point of order 2.
func reduced(b []byte) bool {
	if b[0] < 0xed || b[31]&0x7f != 0x7f {
		return true
	}
	for _, c := range b[1:31] {
		if c != 0xff {
			return true
		}
	}
	return false
}

func inverseOf8() *ed.Scalar {
	s, _ := ed.NewScalar().SetCanonicalBytes([]byte{
		0x79, 0x2f, 0xdc, 0xe2, 0x29, 0xe5, 0x06, 0x61, 0xd0, 0xda, 0x1c, 0x7d, 0xb3, 0x9d, 0xd3, 0x07,
		0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x06,
	})
	return s
}

func decodeScalar(b []byte) (*ed.Scalar, error) {
	s, err := ed.NewScalar().SetCanonicalBytes(b)
	if err != nil {
		return nil, errScalar
	}
	return s, nil
}

// lagrange returns lambda_i of RFC 9591 section 4.2 for interpolation at x, where
// i and set are positions; x nil is zero.
func lagrange(i int, set []int, x *ed.Scalar) *ed.Scalar {
	if x == nil {
		x = ed.NewScalar()
	}
	num, den := identifier(0), identifier(0) // one
	own := identifier(i)
	for _, j := range set {
		if j == i {
			continue
		}
		other := identifier(j)
		num.Multiply(num, ed.NewScalar().Subtract(other, x))
		den.Multiply(den, ed.NewScalar().Subtract(other, own))
	}
	return num.Multiply(num, den.Invert(den))
}
