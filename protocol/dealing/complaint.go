package dealing

import (
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"
	"slices"

	"conseal/protocol"
)

// terms is what every host knows of a resharing, also one that takes no part.
type terms[P, S any] struct {
	cfg       *Config[P, S]
	context   [32]byte // hash of all that is common; in every other hash
	weights   []S      // lambda_i of each dealer
	constants []P      // lambda_i * X_i of each dealer
}

func newTerms[P, S any](r Resharing[P, S]) (*terms[P, S], error) {
	cfg, err := r.Dealing()
	if err != nil {
		return nil, err
	}
	cfg.Dealers, cfg.Holders = slices.Clone(cfg.Dealers), slices.Clone(cfg.Holders)
	t, old, g := &terms[P, S]{cfg: &cfg}, &cfg.Old, cfg.Group
	if err := CheckHolders(cfg.Quorum, cfg.Holders); err != nil {
		return nil, err
	}
	switch {
	case cfg.Verify == nil:
		return nil, errors.New("no way to verify the dealers' signatures")
	case len(cfg.Dealers) == 0 || len(cfg.Dealers) != old.Quorum:
		return nil, fmt.Errorf("%d dealers for a quorum of %d", len(cfg.Dealers), old.Quorum)
	}
	if err := protocol.CheckParties(cfg.Dealers[0], cfg.Dealers); err != nil {
		return nil, fmt.Errorf("dealers: %w", err)
	}
	var positions []int
	for _, d := range cfg.Dealers {
		at := slices.Index(old.Holders, d)
		if at < 0 {
			return nil, fmt.Errorf("dealer %q holds no share of this key", d)
		}
		positions = append(positions, at)
	}
	for _, at := range positions {
		lambda := g.Weight(at, positions)
		t.weights = append(t.weights, lambda)
		t.constants = append(t.constants, g.Combine([]S{lambda}, []P{old.Shares[at]}))
	}
	h := sha256.New()
	part(h, []byte("conseal reshare v1"))
	part(h, cfg.Session[:])
	part(h, []byte(g.Name()))
	part(h, old.Encoded)
	part(h, binary.BigEndian.AppendUint32(nil, uint32(cfg.Quorum)))
	for _, hosts := range [][]protocol.HostID{cfg.Dealers, cfg.Holders} {
		part(h, binary.BigEndian.AppendUint32(nil, uint32(len(hosts))))
		for _, host := range hosts {
			part(h, []byte(host))
		}
	}
	t.context = [32]byte(h.Sum(nil))
	return t, nil
}

// part hashes b with its length.
func part(h hash.Hash, b []byte) {
	h.Write(binary.BigEndian.AppendUint32(nil, uint32(len(b))))
	h.Write(b)
}

// hash begins a hash under a domain tag within these terms.
func (t *terms[P, S]) hash(tag string) hash.Hash {
	h := sha256.New()
	part(h, []byte(tag))
	h.Write(t.context[:])
	return h
}

// size is the length of what a dealer signs: commitments and hashes of values.
func (t *terms[P, S]) size() int {
	return t.cfg.Quorum*t.cfg.Group.PointSize() + len(t.cfg.Holders)*sha256.Size
}

// contentDigest is the hash of a dealing's content that is echoed.
func contentDigest(content []byte) [32]byte {
	h := sha256.New()
	part(h, []byte("conseal dealing content v1"))
	h.Write(content)
	return [32]byte(h.Sum(nil))
}

// signed is what a dealer signs of a dealing with this digest.
func (t *terms[P, S]) signed(dealer protocol.HostID, digest [32]byte) [32]byte {
	h := t.hash("conseal dealing v1")
	part(h, []byte(dealer))
	h.Write(digest[:])
	return [32]byte(h.Sum(nil))
}

// hideShare is the hash of a value for the holder at a position, with its salt.
func (t *terms[P, S]) hideShare(dealer protocol.HostID, position int, opening []byte) [32]byte {
	h := t.hash("conseal dealt share v1")
	part(h, []byte(dealer))
	part(h, []byte(t.cfg.Holders[position]))
	h.Write(opening)
	return [32]byte(h.Sum(nil))
}

// check verifies the content of the dealing of the dealer at a position: as many
// commitments as the new quorum, and the constant that is its to deal.
func (t *terms[P, S]) check(at int, content []byte) ([]P, error) {
	dealer, g := t.cfg.Dealers[at], t.cfg.Group
	if len(content) != t.size() {
		return nil, protocol.Faultf(dealer, "a dealing of %d bytes, want %d", len(content), t.size())
	}
	commitments, err := DecodeCommitments(g, dealer, content[:t.cfg.Quorum*g.PointSize()], t.cfg.Quorum)
	if err != nil {
		return nil, err
	}
	if !g.Equal(commitments[0], t.constants[at]) {
		return nil, protocol.Faultf(dealer, "deals something else than its share")
	}
	return commitments, nil
}

// opens tells whether an opening is what the content of a dealing has the hash of.
func (t *terms[P, S]) opens(dealer protocol.HostID, content []byte, position int, opening []byte) bool {
	at := t.cfg.Quorum*t.cfg.Group.PointSize() + position*sha256.Size
	return len(opening) == openingSize && t.hideShare(dealer, position, opening) == [32]byte(content[at:])
}

// checkShare verifies the value in an opening.
func (t *terms[P, S]) checkShare(dealer protocol.HostID, commitments []P, position int, opening []byte) (S, error) {
	value, err := t.cfg.Group.DecodeScalar(opening[:scalarSize])
	if err != nil {
		return value, protocol.Faultf(dealer, "dealt share: %v", err)
	}
	return value, CheckShare(t.cfg.Group, dealer, commitments, position, value)
}

// Complaint is an error whose culprit is proven to anybody: it holds what a dealer
// signed and no honest dealer signs. It reveals at most one bad value. It wraps a
// [*protocol.Fault].
type Complaint struct {
	Dealer protocol.HostID

	kind   byte
	reason string // for people; not encoded
	parts  [][]byte
}

// The kinds of complaints, and what proves each.
const (
	wrongDealing = 1 // content, signature
	wrongShare   = 2 // content, signature, receiver, opening
	twoDealings  = 3 // digest, signature, another digest, signature
)

func partsOf(kind byte) int {
	switch kind {
	case wrongDealing:
		return 2
	case wrongShare, twoDealings:
		return 4
	}
	return 0
}

// complain keeps copies of what proves the fault.
func complain(kind byte, dealer protocol.HostID, reason error, parts ...[]byte) error {
	var fault *protocol.Fault
	c := &Complaint{Dealer: dealer, kind: kind, reason: reason.Error()}
	if errors.As(reason, &fault) {
		c.reason = fault.Reason
	}
	for _, p := range parts {
		c.parts = append(c.parts, slices.Clone(p))
	}
	return c
}

func (c *Complaint) Error() string { return c.Unwrap().Error() }

// Unwrap gives the fault.
func (c *Complaint) Unwrap() error { return &protocol.Fault{Host: c.Dealer, Reason: c.reason} }

const complaintVersion = 1

// maxComplaint bounds an encoded complaint, in bytes.
const maxComplaint = 1 << 16

// Encode returns the canonical encoding: version, kind, and the dealer's name and what
// proves the fault, each with its length in four bytes.
func (c *Complaint) Encode() []byte {
	b := []byte{complaintVersion, c.kind}
	for _, p := range append([][]byte{[]byte(c.Dealer)}, c.parts...) {
		b = binary.BigEndian.AppendUint32(b, uint32(len(p)))
		b = append(b, p...)
	}
	return b
}

// DecodeComplaint reads what [Complaint.Encode] wrote. What it says is proven only
// once it has been verified.
func DecodeComplaint(b []byte) (*Complaint, error) {
	if len(b) > maxComplaint {
		return nil, fmt.Errorf("decoding a complaint: %d bytes are over the limit of %d", len(b), maxComplaint)
	}
	if len(b) < 2 || b[0] != complaintVersion || partsOf(b[1]) == 0 {
		return nil, errors.New("decoding a complaint: not of version 1, or of a kind that is not known")
	}
	c := &Complaint{kind: b[1], reason: "said to have cheated"}
	b = b[2:]
	for range 1 + partsOf(c.kind) {
		if len(b) < 4 || uint64(len(b)-4) < uint64(binary.BigEndian.Uint32(b)) {
			return nil, errors.New("decoding a complaint: too short")
		}
		n := binary.BigEndian.Uint32(b)
		c.parts = append(c.parts, slices.Clone(b[4:4+n]))
		b = b[4+n:]
	}
	if len(b) > 0 {
		return nil, fmt.Errorf("decoding a complaint: %d bytes too many", len(b))
	}
	c.Dealer, c.parts = protocol.HostID(c.parts[0]), c.parts[1:]
	return c, nil
}

// VerifyComplaint returns nil if a complaint proves that its dealer cheated in the
// session of r, of which neither Self, Share nor Sign is needed. Any host can do it.
func VerifyComplaint[P, S any](r Resharing[P, S], c *Complaint) error {
	t, err := newTerms(r)
	if err == nil {
		err = t.judge(c)
	}
	if err != nil {
		return fmt.Errorf("a complaint about dealer %q: %w", c.Dealer, err)
	}
	return nil
}

func (t *terms[P, S]) judge(c *Complaint) error {
	at := slices.Index(t.cfg.Dealers, c.Dealer)
	if at < 0 || len(c.parts) != partsOf(c.kind) {
		return errors.New("it is no dealer of this session")
	}
	verify := func(digest, signature []byte) error {
		if len(digest) != sha256.Size {
			return errors.New("no digest of a dealing")
		}
		return t.cfg.Verify(c.Dealer, t.signed(c.Dealer, [32]byte(digest)), signature)
	}
	if c.kind == twoDealings {
		if string(c.parts[0]) == string(c.parts[2]) {
			return errors.New("its two dealings are the same")
		}
		return errors.Join(verify(c.parts[0], c.parts[1]), verify(c.parts[2], c.parts[3]))
	}
	content := c.parts[0]
	digest := contentDigest(content)
	if err := verify(digest[:], c.parts[1]); err != nil {
		return err
	}
	commitments, wrong := t.check(at, content)
	if c.kind == wrongDealing {
		if wrong == nil {
			return errors.New("the dealing is right")
		}
		return nil
	}
	position, opening := slices.Index(t.cfg.Holders, protocol.HostID(c.parts[2])), c.parts[3]
	switch {
	case wrong != nil:
		return fmt.Errorf("about a share of a dealing that is wrong itself: %w", wrong)
	case position < 0:
		return fmt.Errorf("by %q, which is no holder", c.parts[2])
	case !t.opens(c.Dealer, content, position, opening):
		return errors.New("the share is not the one that the dealer signed")
	}
	if _, err := t.checkShare(c.Dealer, commitments, position, opening); err == nil {
		return errors.New("the share is right")
	}
	return nil
}
