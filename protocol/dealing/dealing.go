// Package dealing shares a secret number among holders, verifiably: what key
// generation, refresh and resharing have in common, for any group.
//
// [Deal] shares a number: key generation deals a random one (package frost). [New]
// makes the session in which a quorum of a key's holders deals the key to its next
// holders. A refresh is that with the same holders.
package dealing

import (
	"conseal/protocol"
)

// Group is a group of prime order with points P and scalars S, both pointers, and
// the scalar that stands for each holder.
type Group[P, S any] interface {
	Name() string // differs for different groups
	PointSize() int

	Random() S
	Number(n int) S                 // small, not negative
	Identifier(position int) S      // of the holder at a position, from 0: never zero, never twice the same
	Weight(at int, set []int) S     // lambda: the Lagrange coefficient, at zero, of a position among others
	MulAdd(a, b, c S) S             // a*b + c
	EncodeScalar(S) []byte          // 32 bytes
	DecodeScalar([]byte) (S, error) // refuses what is not canonical
	Wipe(...S)                      // overwrites them, as far as the group's code can

	BaseMult(S) P
	Add(a, b P) P
	Combine([]S, []P) P // the sum of products, of public values: in variable time
	EncodePoint(P) []byte
	DecodePoint([]byte) (P, error) // refuses what is not canonical, the identity, and points outside the group
	Equal(a, b P) bool
	IsIdentity(P) bool
}

// scalarSize is the length of an encoded scalar of every group, in bytes.
const scalarSize = 32

// Dealing is a polynomial of degree quorum-1 and a Feldman commitment to each of its
// coefficients (Feldman 1987); holders get its values.
type Dealing[P, S any] struct {
	Coefficients []S
	Commitments  []P

	group Group[P, S]
}

// Deal takes over constant.
func Deal[P, S any](g Group[P, S], constant S, quorum int) *Dealing[P, S] {
	d := &Dealing[P, S]{group: g, Coefficients: []S{constant}}
	for len(d.Coefficients) < quorum {
		d.Coefficients = append(d.Coefficients, g.Random())
	}
	for _, c := range d.Coefficients {
		d.Commitments = append(d.Commitments, g.BaseMult(c))
	}
	return d
}

// Share is the polynomial's value for the holder at a position.
func (d *Dealing[P, S]) Share(position int) S {
	x, v := d.group.Identifier(position), d.group.Number(0)
	for k := len(d.Coefficients) - 1; k >= 0; k-- {
		next := d.group.MulAdd(v, x, d.Coefficients[k])
		d.group.Wipe(v)
		v = next
	}
	return v
}

// Wipe ends the dealing.
func (d *Dealing[P, S]) Wipe() { d.group.Wipe(d.Coefficients...) }

// Evaluate is the commitment to the value for the holder at a position: the sum of
// x^k * C_k, where x is its identifier.
func Evaluate[P, S any](g Group[P, S], commitments []P, position int) P {
	powers := make([]S, len(commitments))
	x, power, zero := g.Identifier(position), g.Number(1), g.Number(0)
	for k := range powers {
		powers[k] = power
		power = g.MulAdd(power, x, zero)
	}
	return g.Combine(powers, commitments)
}

// DecodeCommitments reads exactly quorum commitments.
func DecodeCommitments[P, S any](g Group[P, S], dealer protocol.HostID, b []byte, quorum int) (out []P, err error) {
	size := g.PointSize()
	if len(b) != quorum*size || quorum == 0 {
		return nil, protocol.Faultf(dealer, "%d bytes of commitments for a quorum of %d", len(b), quorum)
	}
	for k := range quorum {
		p, err := g.DecodePoint(b[k*size : (k+1)*size])
		if err != nil {
			return nil, protocol.Faultf(dealer, "commitment %d: %v", k, err)
		}
		out = append(out, p)
	}
	return out, nil
}

// CheckShare verifies a dealt value against the dealer's commitments.
func CheckShare[P, S any](g Group[P, S], dealer protocol.HostID, commitments []P, position int, value S) error {
	if !g.Equal(g.BaseMult(value), Evaluate(g, commitments, position)) {
		return protocol.Faultf(dealer, "dealt a share that does not fit its commitments")
	}
	return nil
}

// Total adds up the commitments of dealers and gives what they make for each of n
// holders. None of it is the identity.
func Total[P, S any](g Group[P, S], dealt [][]P, n int) (public P, shares []P, err error) {
	total := dealt[0]
	for _, commitments := range dealt[1:] {
		sum := make([]P, len(total))
		for k := range total {
			sum[k] = g.Add(total[k], commitments[k])
		}
		total = sum
	}
	for i := range n {
		shares = append(shares, Evaluate(g, total, i))
	}
	for _, p := range append([]P{total[0]}, shares...) {
		if g.IsIdentity(p) {
			return public, nil, errCancel
		}
	}
	return total[0], shares, nil
}
