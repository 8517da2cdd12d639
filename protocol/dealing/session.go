package dealing

import (
	"bytes"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"

	"conseal/internal/secret"
	"conseal/protocol"
	"conseal/protocol/mailbox"
)

var (
	errCancel = errors.New("the dealings cancel out: start again")
	errClosed = errors.New("the session is over")
)

// Key is what is public of the key whose shares are replaced.
type Key[P any] struct {
	Encoded []byte // of the whole group, canonical
	Quorum  int
	Holders []protocol.HostID // sorted
	Shares  []P               // X_i of Holders[i]
	Public  P
}

// Plan is what the hosts of a resharing have in common, and who this one is. The
// session's id stands for all that is common, the old group too; no two sessions have
// one id, for a dealer signs once under it.
type Plan struct {
	Session protocol.SessionID
	Self    protocol.HostID
	Dealers []protocol.HostID // sorted, holders of the old shares, exactly the old quorum
	Holders []protocol.HostID // sorted, of the new shares; a dealer may be one
	Quorum  int               // of the new shares

	// Sign signs a digest with this host's identity key: a dealer needs it, once.
	Sign func(digest [32]byte) ([]byte, error)
	// Verify checks such a signature of a host, by the key pinned for it. An error is
	// the host's fault.
	Verify func(host protocol.HostID, digest [32]byte, signature []byte) error
}

// Config is a resharing in a group. The caller has checked Old.
type Config[P, S any] struct {
	Plan
	Group Group[P, S]
	Old   Key[P]
	Share *Share[S] // a dealer's, nil at others
}

// Share is a host's share of a key.
type Share[S any] struct {
	Self    protocol.HostID
	Encoded []byte // of the whole group, canonical
	Lend    func(use func(x S) error) error
}

// Resharing is a scheme's configuration of a resharing.
type Resharing[P, S any] interface {
	Dealing() (Config[P, S], error)
}

// Session is a resharing: verifiable redistribution of shares (Desmedt and Jajodia
// 1997; Wong, Wang and Wing 2002), with signed dealings and an echo.
//
//   - Round 1, dealers to all: commitments to a polynomial whose constant is
//     lambda_i * x_i, a hash of each holder's value, and a signature of both.
//   - Round 2, all to all: of each dealing its hash and signature, as received. A
//     dealer goes on only if all hosts received the same.
//   - Round 3, dealers to holders: the holder's value and what opens its hash. The
//     transport encrypts.
//
// A dealer that proves itself a cheat is named by a [*Complaint], which the driver
// passes on: the others may not see the proof themselves.
type Session[P, S any] struct {
	cfg     *Config[P, S]
	terms   *terms[P, S]
	others  []protocol.HostID
	mail    mailbox.Box
	started bool
	closed  bool

	own        []byte        // body of round 1, of a dealer
	openings   *secret.Bytes // what each holder gets of a dealer, one after the other
	dealt      []dealt[P]    // of each dealer
	transcript [32]byte      // zero until all have received the same
	done       bool
	scalar     *secret.Bytes // of a holder, when done
	shares     []P           // of all holders, when done
}

// dealt is what was received of a dealer.
type dealt[P any] struct {
	content, signature []byte
	digest             [32]byte // of content
	commitments        []P
}

// The rounds of a resharing.
const (
	roundDeal  = 1
	roundEcho  = 2
	roundShare = 3
	// Rounds is their number: what follows a resharing counts on from it.
	Rounds = 3
)

const (
	saltSize    = 32
	openingSize = scalarSize + saltSize // a value and its salt
	// maxSignature bounds a signature, in bytes.
	maxSignature = 512
	// minEcho and maxEcho bound what is echoed of one dealing: digest, length, signature.
	minEcho = sha256.Size + 2 + 1
	maxEcho = sha256.Size + 2 + maxSignature
)

// New makes the session of one host.
func New[P, S any](r Resharing[P, S]) (*Session[P, S], error) {
	t, err := newTerms(r)
	if err != nil {
		return nil, err
	}
	cfg := t.cfg
	all := slices.Compact(slices.Sorted(slices.Values(slices.Concat(cfg.Dealers, cfg.Holders))))
	if err := protocol.CheckParties(cfg.Self, all); err != nil {
		return nil, err
	}
	switch deals := slices.Contains(cfg.Dealers, cfg.Self); {
	case cfg.Share != nil && (cfg.Share.Self != cfg.Self || !bytes.Equal(cfg.Share.Encoded, cfg.Old.Encoded)):
		return nil, fmt.Errorf("host %q has no share of this key and epoch", cfg.Self)
	case deals && cfg.Share == nil:
		return nil, fmt.Errorf("host %q is to deal without a share", cfg.Self)
	case deals && cfg.Sign == nil:
		return nil, fmt.Errorf("host %q is to deal and cannot sign", cfg.Self)
	case !deals && cfg.Share != nil:
		return nil, fmt.Errorf("host %q has a share and is no dealer", cfg.Self)
	}
	s := &Session[P, S]{cfg: cfg, terms: t, others: mailbox.Others(all, cfg.Self)}
	dealers, n := mailbox.Others(cfg.Dealers, cfg.Self), len(cfg.Dealers)
	s.mail = mailbox.Box{Session: cfg.Session, Self: cfg.Self, Round: roundDeal, Rounds: []mailbox.Round{
		roundDeal:  {From: dealers, Min: t.size() + 1, Max: t.size() + maxSignature},
		roundEcho:  {From: s.others, Min: n * minEcho, Max: n * maxEcho},
		roundShare: {},
	}}
	if s.holds() {
		s.mail.Rounds[roundShare] = mailbox.Exactly(openingSize, dealers)
	}
	return s, nil
}

// holds tells whether this host gets a new share.
func (s *Session[P, S]) holds() bool { return slices.Contains(s.cfg.Holders, s.cfg.Self) }

// Start deals.
func (s *Session[P, S]) Start() (protocol.Ready, error) {
	if s.closed || s.started {
		return protocol.Ready{}, errClosed
	}
	s.started = true
	if s.cfg.Share == nil {
		return protocol.Ready{}, nil
	}
	err := s.cfg.Share.Lend(s.deal)
	if err == nil {
		err = s.sign() // slow in hardware: the share is not lent meanwhile
	}
	if err != nil {
		s.Close()
		return protocol.Ready{}, err
	}
	return protocol.Ready{Send: s.mail.ToAll(s.others, roundDeal, s.own)}, nil
}

// deal shares lambda_i * x among the new holders.
func (s *Session[P, S]) deal(x S) error {
	g := s.cfg.Group
	lambda, zero := s.terms.weights[slices.Index(s.cfg.Dealers, s.cfg.Self)], g.Number(0)
	d := Deal(g, g.MulAdd(lambda, x, zero), s.cfg.Quorum)
	defer d.Wipe()
	for _, c := range d.Commitments {
		s.own = append(s.own, g.EncodePoint(c)...)
	}
	openings := make([]byte, 0, len(s.cfg.Holders)*openingSize)
	for i, holder := range s.cfg.Holders {
		value := d.Share(i)
		encoded := g.EncodeScalar(value)
		if holder != s.cfg.Self {
			cheat(encoded)
		}
		openings = append(openings, encoded...)
		clear(encoded)
		g.Wipe(value)
		openings = openings[:len(openings)+saltSize]
		rand.Read(openings[len(openings)-saltSize:])
		hash := s.terms.hideShare(s.cfg.Self, i, openings[i*openingSize:])
		s.own = append(s.own, hash[:]...)
	}
	s.openings = secret.Take(openings)
	return nil
}

// sign signs what is dealt, as the others will verify it.
func (s *Session[P, S]) sign() error {
	digest := s.terms.signed(s.cfg.Self, contentDigest(s.own))
	signature, err := s.cfg.Sign(digest)
	if err == nil && (len(signature) == 0 || len(signature) > maxSignature) {
		err = fmt.Errorf("a signature of %d bytes", len(signature))
	}
	if err == nil {
		err = s.cfg.Verify(s.cfg.Self, digest, signature)
	}
	if err != nil {
		return fmt.Errorf("signing a dealing: %w", err)
	}
	s.own = append(s.own, signature...)
	return nil
}

// Step takes a message and, when its round is complete, does the next.
func (s *Session[P, S]) Step(m protocol.Message) (protocol.Ready, error) {
	if s.closed || !s.started || s.done {
		return protocol.Ready{}, errClosed
	}
	if err := s.mail.Put(m); err != nil {
		return protocol.Ready{}, err
	}
	var ready protocol.Ready
	for !s.done {
		round := s.mail.Round
		bodies, ok := s.mail.Take()
		if !ok {
			break
		}
		send, err := s.complete(round, bodies)
		if err != nil {
			s.Close() // what failed here cannot be taken up again
			return protocol.Ready{}, err
		}
		ready.Send = append(ready.Send, send...)
	}
	ready.Done = s.done
	return ready, nil
}

// complete does what follows a round of which all messages are there.
func (s *Session[P, S]) complete(round uint16, bodies map[protocol.HostID][]byte) ([]protocol.Message, error) {
	switch round {
	case roundDeal:
		return s.received(bodies)
	case roundEcho:
		return s.echoed(bodies)
	}
	return nil, s.finish(bodies)
}

// received checks all dealings and tells what was received.
func (s *Session[P, S]) received(bodies map[protocol.HostID][]byte) ([]protocol.Message, error) {
	var echo []byte
	for i, dealer := range s.cfg.Dealers {
		body := bodies[dealer]
		if dealer == s.cfg.Self {
			body = s.own
		}
		size := s.terms.size()
		d := dealt[P]{content: body[:size], signature: body[size:], digest: contentDigest(body[:size])}
		if err := s.cfg.Verify(dealer, s.terms.signed(dealer, d.digest), d.signature); err != nil {
			return nil, protocol.Faultf(dealer, "the signature of its dealing: %v", err)
		}
		var err error
		if d.commitments, err = s.terms.check(i, d.content); err != nil {
			return nil, complain(wrongDealing, dealer, err, d.content, d.signature)
		}
		s.dealt = append(s.dealt, d)
		echo = append(echo, d.digest[:]...)
		echo = binary.BigEndian.AppendUint16(echo, uint16(len(d.signature)))
		echo = append(echo, d.signature...)
	}
	return s.mail.ToAll(s.others, roundEcho, echo), nil
}

// echoed deals the values out if everybody received the same dealings. If not, a
// dealer signed two, or an echo has a dealing that its dealer never signed.
func (s *Session[P, S]) echoed(bodies map[protocol.HostID][]byte) ([]protocol.Message, error) {
	for _, from := range s.others {
		if err := s.compare(from, bodies[from]); err != nil {
			return nil, err
		}
	}
	h := s.terms.hash("conseal reshare transcript v1")
	for _, d := range s.dealt {
		h.Write(d.digest[:])
	}
	s.transcript = [32]byte(h.Sum(nil))
	var out []protocol.Message
	if s.openings != nil {
		err := s.openings.Use(func(b []byte) error {
			for i, h := range s.cfg.Holders {
				if h != s.cfg.Self {
					out = append(out, s.mail.Message(h, roundShare, b[i*openingSize:(i+1)*openingSize]))
				}
			}
			return nil
		})
		if err != nil {
			return nil, err
		}
	}
	s.done = !s.holds()
	return out, nil
}

// compare holds a host's echo to what was received here.
func (s *Session[P, S]) compare(from protocol.HostID, echo []byte) error {
	for i, dealer := range s.cfg.Dealers {
		if len(echo) < minEcho {
			return protocol.Faultf(from, "its echo is too short")
		}
		digest, n := [32]byte(echo), int(binary.BigEndian.Uint16(echo[sha256.Size:]))
		echo = echo[sha256.Size+2:]
		if n == 0 || n > maxSignature || n > len(echo) {
			return protocol.Faultf(from, "its echo has a signature of %d bytes", n)
		}
		signature := echo[:n]
		echo = echo[n:]
		d := s.dealt[i]
		if digest == d.digest {
			continue
		}
		if err := s.cfg.Verify(dealer, s.terms.signed(dealer, digest), signature); err != nil {
			return protocol.Faultf(from, "echoes a dealing that %q did not sign: %v", dealer, err)
		}
		return complain(twoDealings, dealer, errors.New("signed two dealings"), d.digest[:], d.signature, digest[:], signature)
	}
	if len(echo) > 0 {
		return protocol.Faultf(from, "its echo is too long")
	}
	return nil
}

// finish checks and adds up the values.
func (s *Session[P, S]) finish(bodies map[protocol.HostID][]byte) error {
	g := s.cfg.Group
	defer func() {
		for _, b := range bodies {
			clear(b)
		}
	}()
	position := slices.Index(s.cfg.Holders, s.cfg.Self)
	sum := g.Number(0)
	defer func() { g.Wipe(sum) }()
	var commitments [][]P
	for i, dealer := range s.cfg.Dealers {
		commitments = append(commitments, s.dealt[i].commitments)
		err := s.opening(dealer, bodies[dealer], position, func(opening []byte) error {
			value, err := s.value(i, position, opening)
			if err != nil {
				return err
			}
			next := g.MulAdd(value, g.Number(1), sum)
			g.Wipe(sum, value)
			sum = next
			return nil
		})
		if err != nil {
			return err
		}
	}
	public, shares, err := Total(g, commitments, len(s.cfg.Holders))
	if err != nil {
		return err
	}
	if !g.Equal(public, s.cfg.Old.Public) {
		return errors.New("the dealings do not make up the public key")
	}
	s.scalar, s.shares, s.done = secret.Take(g.EncodeScalar(sum)), shares, true
	s.openings.Wipe()
	return nil
}

// opening lends what a dealer dealt to this host.
func (s *Session[P, S]) opening(dealer protocol.HostID, received []byte, position int, use func([]byte) error) error {
	if dealer != s.cfg.Self {
		return use(received)
	}
	return s.openings.Use(func(b []byte) error { return use(b[position*openingSize : (position+1)*openingSize]) })
}

// value checks what a dealer dealt to this host. Only what the dealer signed the hash
// of proves anything to others.
func (s *Session[P, S]) value(at, position int, opening []byte) (value S, err error) {
	dealer, d := s.cfg.Dealers[at], s.dealt[at]
	if !s.terms.opens(dealer, d.content, position, opening) {
		return value, protocol.Faultf(dealer, "dealt a share that does not fit the hash it signed")
	}
	if value, err = s.terms.checkShare(dealer, d.commitments, position, opening); err != nil {
		return value, complain(wrongShare, dealer, err, d.content, d.signature, []byte(s.cfg.Self), opening)
	}
	return value, nil
}

// Progress tells which of how many rounds is being received, and from whom messages
// of it are missing.
func (s *Session[P, S]) Progress() (round, rounds int, missing []protocol.HostID) {
	return min(int(s.mail.Round), Rounds), Rounds, s.mail.Missing()
}

// Transcript is the hash of all dealings, once all hosts have received the same.
func (s *Session[P, S]) Transcript() ([32]byte, error) {
	if s.transcript == [32]byte{} {
		return s.transcript, errors.New("the dealings are not agreed on")
	}
	return s.transcript, nil
}

// Output lends the new share of a holder, and gives the public shares of all, once the
// session is done.
func (s *Session[P, S]) Output(use func(scalar []byte, shares []P) error) error {
	if s.scalar == nil {
		return errors.New("there is no new share here")
	}
	return s.scalar.Use(func(b []byte) error { return use(b, s.shares) })
}

// Close wipes what was dealt and received, and the session's copy of the share.
func (s *Session[P, S]) Close() {
	s.closed = true
	s.openings.Wipe()
	s.scalar.Wipe()
	s.mail.Wipe()
}
