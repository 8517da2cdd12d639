package dealing

import "conseal/protocol"

// What a dealer who cheats has to compute.

// ToSign is what a dealer signs of a dealing.
func (s *Session[P, S]) ToSign(dealer protocol.HostID, content []byte) [32]byte {
	return s.terms.signed(dealer, contentDigest(content))
}

// ContentDigest is what is echoed of a dealing.
func ContentDigest(content []byte) [32]byte { return contentDigest(content) }

// Hide is the hash of an opening in a dealing.
func (s *Session[P, S]) Hide(dealer protocol.HostID, position int, opening []byte) [32]byte {
	return s.terms.hideShare(dealer, position, opening)
}

// Kept are the secrets of a session that are not wiped.
func (s *Session[P, S]) Kept() (n int) {
	if s.openings != nil && s.openings.Len() > 0 {
		n++
	}
	if s.scalar != nil && s.scalar.Len() > 0 {
		n++
	}
	return n
}

// NewComplaint makes any complaint.
func NewComplaint(kind byte, dealer protocol.HostID, parts ...[]byte) *Complaint {
	return &Complaint{Dealer: dealer, kind: kind, parts: parts}
}

// The kinds of complaints.
const (
	WrongDealing = wrongDealing
	WrongShare   = wrongShare
	TwoDealings  = twoDealings
)

// Kind is the kind of a complaint.
func (c *Complaint) Kind() byte { return c.kind }
