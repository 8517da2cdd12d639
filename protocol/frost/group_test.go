package frost

import (
	"bytes"
	"encoding/hex"
	"testing"

	ed "filippo.io/edwards25519"

	"conseal/internal/secret"
)

// torsion returns a generator of the 8 points of small order.
func torsion(t testing.TB) *ed.Point {
	t.Helper()
	b, err := hex.DecodeString("26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05")
	if err != nil {
		t.Fatal(err)
	}
	p, err := new(ed.Point).SetBytes(b)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// multiplyByOrder is the definition of membership in the prime-order group: it
// adds l-1 times p, and p.
func multiplyByOrder(p *ed.Point) *ed.Point {
	minusOne := ed.NewScalar().Negate(identifier(0))
	q := new(ed.Point).ScalarMult(minusOne, p)
	return q.Add(q, p)
}

// TestPointsOfSmallOrder adds each point of small order to the identity and to a
// good point: only the good point is one of the prime-order group.
func TestPointsOfSmallOrder(t *testing.T) {
	for _, base := range []*ed.Point{ed.NewIdentityPoint(), new(ed.Point).ScalarBaseMult(randomScalar())} {
		p := new(ed.Point).Set(base)
		for k := range 8 {
			want := k == 0 && base.Equal(ed.NewIdentityPoint()) == 0
			if _, err := decodePoint(p.Bytes()); (err == nil) != want {
				t.Errorf("%x and %d times the point of order 8: %v", base.Bytes(), k, err)
			}
			if got := multiplyByOrder(p).Equal(ed.NewIdentityPoint()) == 1; got != (k == 0) {
				t.Errorf("the control disagrees at %d", k)
			}
			p.Add(p, torsion(t))
		}
		if p.Equal(base) != 1 {
			t.Fatal("the generator is not of order 8")
		}
	}
}

// TestEncodingsThatAreNotCanonical tries every y of 2^255-19 and above, with and
// without sign, and x = 0 with a sign.
func TestEncodingsThatAreNotCanonical(t *testing.T) {
	points := 0
	try := func(b []byte) {
		if p, err := new(ed.Point).SetBytes(b); err == nil {
			points++
			if bytes.Equal(p.Bytes(), b) {
				t.Errorf("%x is canonical: the test is not what it says", b)
			}
		}
		if _, err := decodePoint(b); err == nil {
			t.Errorf("%x was taken", b)
		}
	}
	for low := 0xed; low <= 0xff; low++ {
		for _, high := range []byte{0x7f, 0xff} {
			b := bytes.Repeat([]byte{0xff}, pointSize)
			b[0], b[31] = byte(low), high
			if reduced(b) {
				t.Errorf("%x passes as reduced", b)
			}
			try(b)
		}
	}
	one, minusOne := ed.NewIdentityPoint().Bytes(), bytes.Repeat([]byte{0xff}, pointSize)
	minusOne[0] = 0xec
	one[31] |= 0x80
	try(one)
	try(minusOne)
	if points < 10 {
		t.Errorf("only %d of the encodings are of points at all: the test is not what it says", points)
	}
	for _, b := range [][]byte{nil, {}, make([]byte, 31), make([]byte, 33)} {
		if _, err := decodePoint(b); err == nil {
			t.Errorf("%d bytes were taken", len(b))
		}
	}
}

// FuzzDecodePoint holds the fast checks to their definitions.
func FuzzDecodePoint(f *testing.F) {
	f.Add(ed.NewGeneratorPoint().Bytes())
	f.Add(torsion(f).Bytes())
	f.Add(new(ed.Point).Add(torsion(f), ed.NewGeneratorPoint()).Bytes())
	f.Add(bytes.Repeat([]byte{0xff}, pointSize))
	f.Fuzz(func(t *testing.T, b []byte) {
		p, err := new(ed.Point).SetBytes(b)
		identity := ed.NewIdentityPoint()
		want := err == nil && bytes.Equal(p.Bytes(), b) && p.Equal(identity) == 0 && multiplyByOrder(p).Equal(identity) == 1
		got, err := decodePoint(b)
		if (err == nil) != want {
			t.Fatalf("%x: %v, want a point: %v", b, err, want)
		}
		if err == nil && !bytes.Equal(got.Bytes(), b) {
			t.Errorf("%x encodes back as %x", b, got.Bytes())
		}
	})
}

// FuzzLoadShare: only the one scalar of the group and host is a share.
func FuzzLoadShare(f *testing.F) {
	group := signingGroup(f, 2, 2)
	scalar := func(s *Share) (out []byte) {
		err := s.secret.Use(func(b []byte) error { out = bytes.Clone(b); return nil })
		if err != nil {
			f.Fatal(err)
		}
		return out
	}
	want := scalar(group["h000"])
	f.Add(want)
	f.Add(scalar(group["h001"]))
	f.Add(want[:31])
	f.Add(append(bytes.Clone(want), 0))
	f.Fuzz(func(t *testing.T, b []byte) {
		s, err := LoadShare(group["h000"].Group, "h000", b)
		if (err == nil) != bytes.Equal(b, want) {
			t.Fatalf("%x: %v", b, err)
		}
		if err != nil {
			return
		}
		defer s.Wipe()
		back, err := s.Secret()
		if err != nil || !back.Equal(secret.Copy(b)) {
			t.Errorf("the share does not encode back: %v", err)
		}
		back.Wipe()
	})
}
