package frost

import (
	"crypto/ed25519"
	"errors"
	"fmt"
	"slices"

	ed "filippo.io/edwards25519"

	"conseal/protocol"
	"conseal/protocol/mailbox"
)

// SignConfig is what the coordinator and the signers of a signature have in
// common, and who this host is.
type SignConfig struct {
	Session     protocol.SessionID
	Self        protocol.HostID
	Coordinator protocol.HostID
	Signers     []protocol.HostID // sorted, as many as the quorum; the coordinator may be one
	Group       *Group
	Share       *Share // of a signer; the coordinator may have none
	Message     []byte // the whole message; not copied
}

// Sign is two-round FROST (RFC 9591 section 5) with a coordinator.
//
//   - Round 1, to the coordinator: commitments to two nonces (section 5.1).
//   - Round 2, to each signer: the commitments of all signers, in their order.
//   - Round 3, to the coordinator: the signature share (section 5.2). The coordinator
//     adds them up and verifies the signature (section 5.3).
//
// Nonces are made in Start, live in the session only, and are gone before the one
// share that uses them leaves it.
type Sign struct {
	cfg       SignConfig
	signs     bool // self is a signer
	positions []int
	others    []protocol.HostID // signers, at the coordinator
	mail      mailbox.Box
	nonces    *nonces // nil before Start and once used
	started   bool
	encoded   []byte // the list that the coordinator sent
	list      *commitmentList
	own       *ed.Scalar // the coordinator's own signature share
	signature []byte
	done      bool
}

// The rounds of a signature.
const (
	roundCommit = 1
	roundList   = 2
	roundSign   = 3
)

// NewSign makes the session of a signer, of the coordinator, or of both in one.
func NewSign(cfg SignConfig) (*Sign, error) {
	cfg.Signers = slices.Clone(cfg.Signers)
	s := &Sign{cfg: cfg, signs: slices.Contains(cfg.Signers, cfg.Self)}
	if err := s.check(); err != nil {
		return nil, fmt.Errorf("FROST signature: %w", err)
	}
	s.mail = mailbox.Box{Session: cfg.Session, Self: cfg.Self}
	if cfg.Self == cfg.Coordinator {
		s.others = mailbox.Others(cfg.Signers, cfg.Self)
		s.mail.Round, s.mail.Rounds = roundCommit, []mailbox.Round{
			roundCommit: mailbox.Exactly(commitmentSize, s.others), roundSign: mailbox.Exactly(scalarSize, s.others),
		}
	} else {
		s.mail.Round, s.mail.Rounds = roundList, []mailbox.Round{
			roundList: mailbox.Exactly(len(cfg.Signers)*commitmentSize, []protocol.HostID{cfg.Coordinator}),
		}
	}
	return s, nil
}

func (s *Sign) check() error {
	c := &s.cfg
	switch {
	case c.Group == nil || c.Group.public == nil:
		return errors.New("no group of a key generation or of DecodeGroup")
	case len(c.Message) == 0:
		return errors.New("an empty message")
	case len(c.Signers) != c.Group.Quorum:
		return fmt.Errorf("%d signers for a quorum of %d", len(c.Signers), c.Group.Quorum)
	case !s.signs && c.Self != c.Coordinator:
		return fmt.Errorf("host %q is neither signer nor coordinator", c.Self)
	case s.signs && (c.Share == nil || c.Share.Self != c.Self || !c.Share.Group.equal(c.Group)):
		return fmt.Errorf("host %q has no share of this key and epoch", c.Self)
	}
	if err := protocol.CheckParties(c.Signers[0], c.Signers); err != nil {
		return err
	}
	for _, h := range c.Signers {
		if c.Group.position(h) < 0 {
			return fmt.Errorf("host %q is no holder of this key", h)
		}
		s.positions = append(s.positions, c.Group.position(h))
	}
	return nil
}

// Start makes the nonces of a signer.
func (s *Sign) Start() (protocol.Ready, error) {
	if s.started || s.done {
		return protocol.Ready{}, errClosed
	}
	s.started = true
	if s.signs {
		var err error
		if s.nonces, err = commit(s.cfg.Share); err != nil {
			s.Close()
			return protocol.Ready{}, err
		}
	}
	if s.cfg.Self == s.cfg.Coordinator {
		return protocol.Ready{}, nil
	}
	return protocol.Ready{Send: []protocol.Message{s.mail.Message(s.cfg.Coordinator, roundCommit, s.nonces.commitment[:])}}, nil
}

// Step takes a message and, when its round is complete, does the next.
func (s *Sign) Step(m protocol.Message) (protocol.Ready, error) {
	if !s.started || s.done {
		return protocol.Ready{}, errClosed
	}
	if err := s.mail.Put(m); err != nil {
		return protocol.Ready{}, err
	}
	round := s.mail.Round
	bodies, ok := s.mail.Take()
	if !ok {
		return protocol.Ready{}, nil
	}
	ready, err := s.complete(round, bodies)
	if err != nil {
		s.Close() // what failed here cannot be taken up again
	}
	return ready, err
}

// complete does what follows a round of which all messages are there.
func (s *Sign) complete(round uint16, bodies map[protocol.HostID][]byte) (protocol.Ready, error) {
	switch round {
	case roundCommit:
		return s.distribute(bodies), nil
	case roundList:
		return s.respond(bodies[s.cfg.Coordinator])
	}
	return s.aggregate(bodies)
}

// commitmentList is what all signers derive from the commitments of all.
type commitmentList struct {
	hiding, binding []*ed.Point // D_i, E_i of each signer
	factors         []*ed.Scalar
	r               []byte // the group commitment
	challenge       *ed.Scalar
}

// newList decodes the commitments and computes binding factors (section 4.4),
// group commitment (4.5) and challenge (4.6). The own commitment, which is at
// position own of the list, needs no check.
func (s *Sign) newList(encoded []byte, own int) (*commitmentList, error) {
	l := &commitmentList{}
	var hashed []byte // encode_group_commitment_list, section 4.3
	for i, h := range s.cfg.Signers {
		c := commitment(encoded[i*commitmentSize:])
		if i == own {
			l.hiding, l.binding = append(l.hiding, s.nonces.d), append(l.binding, s.nonces.e)
		} else {
			d, e, err := c.decode()
			if err != nil {
				return nil, s.malformed(h, err)
			}
			l.hiding, l.binding = append(l.hiding, d), append(l.binding, e)
		}
		hashed = append(append(hashed, identifier(s.positions[i]).Bytes()...), c[:]...)
	}
	public := s.cfg.Group.PublicKey[:]
	prefix := slices.Concat(public, h4(s.cfg.Message), h5(hashed))
	for _, p := range s.positions {
		l.factors = append(l.factors, h1(prefix, identifier(p).Bytes()))
	}
	r := new(ed.Point).VarTimeMultiScalarMult(l.factors, l.binding)
	for _, d := range l.hiding {
		r.Add(r, d)
	}
	l.r = r.Bytes()
	l.challenge = h2(l.r, public, s.cfg.Message)
	return l, nil
}

// malformed is the error for a commitment of signer h. The coordinator has it from
// h, and a coordinator that signs answers for its own; else a signer cannot tell
// who is at fault, as the coordinator sends the list before it checks it.
func (s *Sign) malformed(h protocol.HostID, err error) error {
	if c := s.cfg.Coordinator; c == s.cfg.Self || c == h {
		return protocol.Faultf(h, "commitment: %v", err)
	}
	return fmt.Errorf("the commitment of host %q in the list of coordinator %q: %w", h, s.cfg.Coordinator, err)
}

// lambda weighs the share of the signer at a position of the list (section 4.2).
func (s *Sign) lambda(at int) *ed.Scalar { return lagrange(s.positions[at], s.positions, nil) }

// share is the signature share of RFC 9591 section 5.2. It uses the nonces up,
// whatever happens.
func (s *Sign) share(l *commitmentList, at int) (*ed.Scalar, error) {
	n := s.nonces
	s.nonces = nil
	if n == nil {
		return nil, errors.New("the nonces of this session are used up")
	}
	defer n.wipe()
	z := ed.NewScalar()
	err := s.cfg.Share.use(func(x *ed.Scalar) error {
		z.MultiplyAdd(n.binding, l.factors[at], n.hiding)
		weighted := ed.NewScalar().Multiply(s.lambda(at), l.challenge)
		z.MultiplyAdd(weighted, x, z)
		return nil
	})
	return z, err
}

// distribute sends the list, once the coordinator has all commitments.
func (s *Sign) distribute(bodies map[protocol.HostID][]byte) protocol.Ready {
	if s.signs {
		bodies[s.cfg.Self] = s.nonces.commitment[:]
	}
	var encoded []byte
	for _, h := range s.cfg.Signers {
		encoded = append(encoded, bodies[h]...)
	}
	s.encoded = encoded
	s.mail.Round = roundSign // round 2 is what was sent
	return protocol.Ready{Send: s.mail.ToAll(s.others, roundList, encoded)}
}

// Work checks and uses the list that the coordinator has sent, while the signers
// do the same.
func (s *Sign) Work() error {
	if s.encoded == nil || s.list != nil || s.done {
		return nil
	}
	own := slices.Index(s.cfg.Signers, s.cfg.Self)
	var err error
	if s.list, err = s.newList(s.encoded, own); err == nil && s.signs {
		s.own, err = s.share(s.list, own)
	}
	if err != nil {
		s.Close()
	}
	return err
}

// respond is a signer's work after round 2. There is no second list for these
// nonces, whatever happens.
func (s *Sign) respond(encoded []byte) (protocol.Ready, error) {
	s.done = true
	at := slices.Index(s.cfg.Signers, s.cfg.Self)
	if commitment(encoded[at*commitmentSize:]) != s.nonces.commitment {
		return protocol.Ready{}, protocol.Faultf(s.cfg.Coordinator, "changed this host's commitment")
	}
	l, err := s.newList(encoded, at)
	if err != nil {
		return protocol.Ready{}, err
	}
	z, err := s.share(l, at)
	if err != nil {
		return protocol.Ready{}, err
	}
	return protocol.Ready{Done: true, Send: []protocol.Message{s.mail.Message(s.cfg.Coordinator, roundSign, z.Bytes())}}, nil
}

// aggregate is RFC 9591 section 5.3. The finished signature is verified first;
// only if it is wrong are the shares looked at one by one (section 5.4).
func (s *Sign) aggregate(bodies map[protocol.HostID][]byte) (protocol.Ready, error) {
	err := s.Work()
	s.done = true
	if err != nil {
		return protocol.Ready{}, err
	}
	z := ed.NewScalar()
	shares := make([]*ed.Scalar, len(s.cfg.Signers))
	for i, h := range s.cfg.Signers {
		if shares[i] = s.own; h != s.cfg.Self {
			var err error
			if shares[i], err = decodeScalar(bodies[h]); err != nil {
				return protocol.Ready{}, protocol.Faultf(h, "signature share: %v", err)
			}
		}
		z.Add(z, shares[i])
	}
	signature := append(slices.Clone(s.list.r), z.Bytes()...)
	if !ed25519.Verify(s.cfg.Group.PublicKey[:], s.cfg.Message, signature) {
		return protocol.Ready{}, s.culprits(shares)
	}
	s.signature = signature
	return protocol.Ready{Done: true}, nil
}

// culprits names every signer whose share is wrong:
// z_i*G != D_i + rho_i*E_i + c*lambda_i*X_i.
func (s *Sign) culprits(shares []*ed.Scalar) error {
	var faults []error
	for i, h := range s.cfg.Signers {
		weighted := ed.NewScalar().Multiply(s.lambda(i), s.list.challenge)
		want := new(ed.Point).VarTimeMultiScalarMult(
			[]*ed.Scalar{identifier(0), s.list.factors[i], weighted},
			[]*ed.Point{s.list.hiding[i], s.list.binding[i], s.cfg.Group.shares[s.positions[i]]})
		if new(ed.Point).ScalarBaseMult(shares[i]).Equal(want) != 1 {
			faults = append(faults, protocol.Faultf(h, "wrong signature share"))
		}
	}
	if len(faults) == 0 {
		return errors.New("the signature is wrong although every share is right")
	}
	return errors.Join(faults...)
}

// Signature returns the 64-byte signature, verified, at the coordinator of a
// session that is done.
func (s *Sign) Signature() ([]byte, error) {
	if s.signature == nil {
		return nil, errors.New("there is no signature here")
	}
	return slices.Clone(s.signature), nil
}

// Close wipes what is secret.
func (s *Sign) Close() {
	s.done = true
	s.nonces.wipe()
	s.nonces = nil
	wipe(s.own)
}
