package frost

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strings"

	ed "filippo.io/edwards25519"

	"conseal/protocol"
	"conseal/protocol/dealing"
	"conseal/protocol/mailbox"
)

// KeygenConfig is what a key generation is made of.
type KeygenConfig = dealing.KeygenConfig

// Keygen is a key generation: the DKG of the FROST paper (Komlo and Goldberg 2020,
// figure 1), with an echo of the broadcasts.
//
//   - Round 1, to all: commitments and a proof of possession of the constant.
//   - Round 2, to all: SHA-256 of all broadcasts, as received. Shares are dealt only if
//     all holders received the same.
//   - Round 3, to each: its share of the dealing. The transport encrypts.
type Keygen struct {
	cfg      KeygenConfig
	position int
	others   []protocol.HostID
	mail     mailbox.Box
	own      *dealing.Dealing[*ed.Point, *ed.Scalar]
	round1   []byte // own body
	dealt    map[protocol.HostID][]*ed.Point
	echo     [32]byte // of all broadcasts: the transcript
	share    *Share
	closed   bool
}

// The rounds of a key generation.
const (
	roundDeal  = 1
	roundEcho  = 2
	roundShare = 3
)

var errClosed = errors.New("the session is over")

// NewKeygen makes the session of one holder.
func NewKeygen(cfg KeygenConfig) (*Keygen, error) {
	if err := dealing.CheckHolders(cfg.Quorum, cfg.Holders); err != nil {
		return nil, fmt.Errorf("FROST key generation: %w", err)
	}
	if err := protocol.CheckParties(cfg.Self, cfg.Holders); err != nil {
		return nil, fmt.Errorf("FROST key generation: %w", err)
	}
	cfg.Holders = slices.Clone(cfg.Holders)
	k := &Keygen{cfg: cfg, position: slices.Index(cfg.Holders, cfg.Self), dealt: map[protocol.HostID][]*ed.Point{}}
	k.others = mailbox.Others(cfg.Holders, cfg.Self)
	k.mail = mailbox.Box{Session: cfg.Session, Self: cfg.Self, Round: roundDeal, Rounds: []mailbox.Round{
		roundDeal:  mailbox.Exactly(cfg.Quorum*pointSize+proofSize, k.others),
		roundEcho:  mailbox.Exactly(len(k.echo), k.others),
		roundShare: mailbox.Exactly(scalarSize, k.others),
	}}
	return k, nil
}

// Start deals.
func (k *Keygen) Start() (protocol.Ready, error) {
	if k.closed || k.own != nil {
		return protocol.Ready{}, errClosed
	}
	k.own = dealing.Deal(curve, randomScalar(), k.cfg.Quorum)
	for _, c := range k.own.Commitments {
		k.round1 = append(k.round1, c.Bytes()...)
	}
	k.round1 = append(k.round1, k.prove()...)
	return protocol.Ready{Send: k.mail.ToAll(k.others, roundDeal, k.round1)}, nil
}

// Step takes a message and, when its round is complete, does the next.
func (k *Keygen) Step(m protocol.Message) (protocol.Ready, error) {
	if k.closed || k.own == nil || k.share != nil {
		return protocol.Ready{}, errClosed
	}
	if err := k.mail.Put(m); err != nil {
		return protocol.Ready{}, err
	}
	var ready protocol.Ready
	for {
		round := k.mail.Round
		bodies, ok := k.mail.Take()
		if !ok {
			return ready, nil
		}
		send, err := k.complete(round, bodies)
		if err != nil {
			k.Close() // what failed here cannot be taken up again
			return protocol.Ready{}, err
		}
		ready.Send = append(ready.Send, send...)
		if k.share != nil {
			ready.Done = true
			return ready, nil
		}
	}
}

// complete does what follows a round of which all messages are there.
func (k *Keygen) complete(round uint16, bodies map[protocol.HostID][]byte) ([]protocol.Message, error) {
	switch round {
	case roundDeal:
		return k.received(bodies)
	case roundEcho:
		return k.echoed(bodies)
	}
	return nil, k.finish(bodies)
}

// proofSize is a Schnorr proof: R, mu.
const proofSize = pointSize + scalarSize

// challenge is c of the proof of possession, bound to the session and dealer.
func (k *Keygen) challenge(dealer int, constant, r []byte) *ed.Scalar {
	h := []byte(contextString + "conseal dkg proof of possession")
	h = append(h, k.cfg.Session[:]...)
	h = append(h, identifier(dealer).Bytes()...)
	h = append(h, constant...)
	return hashToScalar(append(h, r...))
}

// prove shows that the dealer knows its constant, so that no dealer can choose it
// after the others' (figure 1, round 1, step 2).
func (k *Keygen) prove() []byte {
	nonce := randomScalar()
	defer wipe(nonce)
	r := new(ed.Point).ScalarBaseMult(nonce).Bytes()
	c := k.challenge(k.position, k.own.Commitments[0].Bytes(), r)
	mu := ed.NewScalar().MultiplyAdd(c, k.own.Coefficients[0], nonce)
	return append(r, mu.Bytes()...)
}

// checkProof verifies R = mu*G - c*C_0 (figure 1, round 1, step 5).
func (k *Keygen) checkProof(dealer protocol.HostID, constant *ed.Point, proof []byte) error {
	mu, err := decodeScalar(proof[pointSize:])
	if err != nil {
		return protocol.Faultf(dealer, "proof of possession: %v", err)
	}
	c := k.challenge(slices.Index(k.cfg.Holders, dealer), constant.Bytes(), proof[:pointSize])
	r := new(ed.Point).VarTimeDoubleScalarBaseMult(c.Negate(c), constant, mu)
	if !bytes.Equal(r.Bytes(), proof[:pointSize]) {
		return protocol.Faultf(dealer, "wrong proof of possession")
	}
	return nil
}

// dealing returns the commitments of a broadcast whose proof is right. The own
// ones need no check.
func (k *Keygen) dealing(dealer protocol.HostID, body []byte) ([]*ed.Point, error) {
	if dealer == k.cfg.Self {
		return k.own.Commitments, nil
	}
	size := k.cfg.Quorum * pointSize
	commitments, err := dealing.DecodeCommitments(curve, dealer, body[:size], k.cfg.Quorum)
	if err != nil {
		return nil, err
	}
	return commitments, k.checkProof(dealer, commitments[0], body[size:])
}

// received checks all dealings and tells what was received.
func (k *Keygen) received(bodies map[protocol.HostID][]byte) ([]protocol.Message, error) {
	bodies[k.cfg.Self] = k.round1
	h := sha256.New()
	h.Write([]byte("conseal frost keygen broadcasts v1"))
	h.Write(k.cfg.Session[:])
	for _, dealer := range k.cfg.Holders {
		body := bodies[dealer]
		var err error
		if k.dealt[dealer], err = k.dealing(dealer, body); err != nil {
			return nil, err
		}
		var length [4]byte
		binary.BigEndian.PutUint32(length[:], uint32(len(body)))
		h.Write(length[:])
		h.Write(body)
	}
	k.echo = [32]byte(h.Sum(nil))
	return k.mail.ToAll(k.others, roundEcho, k.echo[:]), nil
}

// echoed deals the shares out if everybody received the same broadcasts. If not,
// a dealer or an echo lied, and there is no telling which.
func (k *Keygen) echoed(bodies map[protocol.HostID][]byte) ([]protocol.Message, error) {
	var differ []string
	for _, h := range k.others {
		if !bytes.Equal(bodies[h], k.echo[:]) {
			differ = append(differ, fmt.Sprintf("%q", h))
		}
	}
	if len(differ) > 0 {
		return nil, fmt.Errorf("a holder sent different dealings to different hosts: what %s received differs from what %q received", strings.Join(differ, ", "), k.cfg.Self)
	}
	var out []protocol.Message
	for _, h := range k.others {
		share := k.own.Share(slices.Index(k.cfg.Holders, h))
		body := share.Bytes()
		out = append(out, k.mail.Message(h, roundShare, body))
		clear(body)
		wipe(share)
	}
	return out, nil
}

// finish checks and adds up the shares (figure 1, round 2, steps 2 to 4).
func (k *Keygen) finish(bodies map[protocol.HostID][]byte) error {
	sum := k.own.Share(k.position)
	defer wipe(sum)
	defer func() {
		for _, b := range bodies {
			clear(b)
		}
	}()
	for _, dealer := range k.others {
		value, err := decodeScalar(bodies[dealer])
		if err != nil {
			return protocol.Faultf(dealer, "dealt share: %v", err)
		}
		if err := dealing.CheckShare(curve, dealer, k.dealt[dealer], k.position, value); err != nil {
			return err
		}
		sum.Add(sum, value)
		wipe(value)
	}
	g, err := k.group()
	if err != nil {
		return err
	}
	scalar := sum.Bytes()
	defer clear(scalar)
	k.share, err = LoadShare(g, k.cfg.Self, scalar)
	k.own.Wipe()
	return err
}

// group adds up the commitments.
func (k *Keygen) group() (*Group, error) {
	var dealt [][]*ed.Point
	for _, h := range k.cfg.Holders {
		dealt = append(dealt, k.dealt[h])
	}
	public, shares, err := dealing.Total(curve, dealt, len(k.cfg.Holders))
	if err != nil {
		return nil, err
	}
	return newGroup(k.cfg.Quorum, k.cfg.Holders, public, shares), nil
}

// Result returns the share, once the session is done. The caller owns it.
func (k *Keygen) Result() (*Share, error) {
	if k.share == nil {
		return nil, errors.New("the key generation is not done")
	}
	scalar, err := k.share.Secret()
	if err != nil {
		return nil, err
	}
	s := *k.share
	s.secret = scalar
	return &s, nil
}

// Close wipes the dealing and the session's copy of the share.
func (k *Keygen) Close() {
	k.closed = true
	if k.own != nil {
		k.own.Wipe()
	}
	k.mail.Wipe()
	if k.share != nil {
		k.share.Wipe()
	}
}
