package frost

import (
	ed "filippo.io/edwards25519"

	"conseal/protocol"
)

// A dealing shares a constant among holders: a polynomial of degree quorum-1, a
// Feldman commitment to each coefficient, and the polynomial's value for each
// holder. Key generation deals a random constant; refresh and resharing will deal
// zero and lambda_i * x_i.
type dealing struct {
	coefficients []*ed.Scalar
	commitments  []*ed.Point
}

// deal takes over constant.
func deal(constant *ed.Scalar, quorum int) *dealing {
	d := &dealing{coefficients: []*ed.Scalar{constant}}
	for len(d.coefficients) < quorum {
		d.coefficients = append(d.coefficients, randomScalar())
	}
	for _, c := range d.coefficients {
		d.commitments = append(d.commitments, new(ed.Point).ScalarBaseMult(c))
	}
	return d
}

// share is the polynomial's value for the holder at a position.
func (d *dealing) share(position int) *ed.Scalar {
	x, v := identifier(position), ed.NewScalar()
	for k := len(d.coefficients) - 1; k >= 0; k-- {
		v.MultiplyAdd(v, x, d.coefficients[k])
	}
	return v
}

func (d *dealing) wipe() { wipe(d.coefficients...) }

// evaluate is the commitment to the value for the holder at a position: the sum
// of position^k * C_k.
func evaluate(commitments []*ed.Point, position int) *ed.Point {
	powers := make([]*ed.Scalar, len(commitments))
	x, power := identifier(position), identifier(0)
	for k := range powers {
		powers[k] = ed.NewScalar().Set(power)
		power.Multiply(power, x)
	}
	return new(ed.Point).VarTimeMultiScalarMult(powers, commitments)
}

// decodeCommitments reads exactly quorum commitments.
func decodeCommitments(dealer protocol.HostID, b []byte, quorum int) ([]*ed.Point, error) {
	if len(b) != quorum*pointSize || quorum == 0 {
		return nil, protocol.Faultf(dealer, "%d bytes of commitments for a quorum of %d", len(b), quorum)
	}
	var out []*ed.Point
	for k := range quorum {
		p, err := decodePoint(b[k*pointSize : (k+1)*pointSize])
		if err != nil {
			return nil, protocol.Faultf(dealer, "commitment %d: %v", k, err)
		}
		out = append(out, p)
	}
	return out, nil
}

// checkShare verifies a dealt value against the dealer's commitments.
func checkShare(dealer protocol.HostID, commitments []*ed.Point, position int, value *ed.Scalar) error {
	if new(ed.Point).ScalarBaseMult(value).Equal(evaluate(commitments, position)) != 1 {
		return protocol.Faultf(dealer, "dealt a share that does not fit its commitments")
	}
	return nil
}
