package frost

import (
	"crypto/rand"

	ed "filippo.io/edwards25519"
)

// commitmentSize is the length of a [commitment] in bytes.
const commitmentSize = 2 * pointSize

// commitment is what a signer publishes of its nonces: the encodings of D_i, to the
// hiding nonce, and E_i, to the binding nonce.
type commitment [commitmentSize]byte

// nonces are a signer's two nonces. They belong to one session and are never stored.
type nonces struct {
	hiding, binding *ed.Scalar
	d, e            *ed.Point
	commitment      commitment
}

// commit is RFC 9591 section 5.1.
func commit(share *Share) (*nonces, error) {
	var seed [64]byte
	rand.Read(seed[:])
	defer clear(seed[:])
	return commitWith(share, seed[:32], seed[32:])
}

// commitWith makes nonces from given randomness: nonce_generate of section 4.1.
func commitWith(share *Share, hiding, binding []byte) (*nonces, error) {
	n := &nonces{}
	err := share.secret.Use(func(x []byte) error {
		n.hiding, n.binding = h3(hiding, x), h3(binding, x)
		return nil
	})
	if err != nil {
		return nil, err
	}
	n.d, n.e = new(ed.Point).ScalarBaseMult(n.hiding), new(ed.Point).ScalarBaseMult(n.binding)
	copy(n.commitment[:pointSize], n.d.Bytes())
	copy(n.commitment[pointSize:], n.e.Bytes())
	return n, nil
}

func (n *nonces) wipe() {
	if n != nil {
		wipe(n.hiding, n.binding)
	}
}

// decode checks both points.
func (c *commitment) decode() (d, e *ed.Point, err error) {
	if d, err = decodePoint(c[:pointSize]); err != nil {
		return nil, nil, err
	}
	e, err = decodePoint(c[pointSize:])
	return d, e, err
}
