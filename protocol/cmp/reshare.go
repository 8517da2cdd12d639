package cmp

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"slices"

	"github.com/cronokirby/saferith"
	"github.com/luxfi/threshold/pkg/math/arith"
	"github.com/luxfi/threshold/pkg/math/curve"
	"github.com/luxfi/threshold/pkg/paillier"
	"github.com/luxfi/threshold/pkg/party"
	"github.com/luxfi/threshold/pkg/pedersen"
	threshold "github.com/luxfi/threshold/pkg/protocol"
	module "github.com/luxfi/threshold/protocols/cmp"
	"github.com/luxfi/threshold/protocols/cmp/config"

	"conseal/protocol"
	"conseal/protocol/dealing"
	"conseal/protocol/guard"
	"conseal/protocol/mailbox"
)

// ReshareConfig is what a resharing is made of.
type ReshareConfig struct {
	dealing.Plan
	Old   *Group
	Share *Share // the old share of a dealer, nil at others; it is not changed
}

// Reshare replaces the shares of a key under the same public key: any quorum of its
// holders deals to the next holders, under any quorum. With the same holders and
// quorum it is a refresh.
//
// Rounds 1 to 3 are those of [dealing.Session]. With what was dealt the new holders
// run the module's refresh, rounds 4 to 7: it makes each holder's Paillier, Pedersen
// and ElGamal values and adds dealings of zero by all of them. A holder computes as
// long as for a key generation.
type Reshare struct {
	cfg     ReshareConfig
	deal    *dealing.Session[curve.Point, curve.Scalar]
	others  []protocol.HostID // holders
	early   []protocol.Message
	refresh *guard.Session // nil before the dealing is done, and at who gets no share
	closed  bool
}

// The module counts from round 2.
const (
	refreshOffset = dealing.Rounds - 1
	refreshRounds = 4
	roundRefresh  = dealing.Rounds + 1
	// maxEarly bounds a message of the refresh that comes while dealing, in bytes.
	maxEarly = 1 << 10
)

var errClosed = errors.New("the session is over")

// NewReshare makes the session of one host: of a dealer, of a new holder, or of both
// in one.
func NewReshare(cfg ReshareConfig) (*Reshare, error) {
	cfg.Holders = slices.Clone(cfg.Holders)
	s, err := dealing.New(cfg)
	if err != nil {
		return nil, fmt.Errorf("ECDSA resharing: %w", err)
	}
	return &Reshare{cfg: cfg, deal: s, others: mailbox.Others(cfg.Holders, cfg.Self)}, nil
}

// Dealing is the resharing as package dealing takes it.
func (cfg ReshareConfig) Dealing() (out dealing.Config[curve.Point, curve.Scalar], err error) {
	if cfg.Old == nil || cfg.Old.Curve == nil {
		return out, errors.New("no group")
	}
	out, err = cfg.Old.Dealing(cfg.Old.Curve.group, cfg.Old.Encode(), cfg.Plan)
	if s := cfg.Share; s != nil {
		out.Share = &dealing.Share[curve.Scalar]{Self: s.Self, Encoded: s.Public(), Lend: s.use}
	}
	return out, err
}

// use lends the share's scalar.
func (s *Share) use(fn func(x curve.Scalar) error) error {
	cfg, err := s.config()
	if err != nil {
		return err
	}
	defer guard.Dealing{Curve: cfg.Group}.Wipe(cfg.ECDSA)
	return fn(cfg.ECDSA)
}

// Start deals.
func (r *Reshare) Start() (protocol.Ready, error) { return r.deal.Start() }

// Step takes a message and, when its round is complete, does the next.
func (r *Reshare) Step(m protocol.Message) (protocol.Ready, error) {
	switch {
	case r.closed:
		return protocol.Ready{}, errClosed
	case r.refresh != nil:
		return r.refresh.Step(m)
	case m.Round == roundRefresh && r.holds():
		return protocol.Ready{}, r.keep(m)
	}
	ready, err := r.deal.Step(m)
	if err == nil && ready.Done && r.holds() {
		if ready, err = r.begin(ready.Send); err != nil {
			r.Close()
		}
	}
	return ready, err
}

func (r *Reshare) holds() bool { return slices.Contains(r.cfg.Holders, r.cfg.Self) }

// keep keeps a message of the refresh whose sender has all that was dealt to it, while
// this host waits for an echo or for its values. The refresh checks its body.
func (r *Reshare) keep(m protocol.Message) error {
	switch {
	case m.Session != r.cfg.Session:
		return fmt.Errorf("host %q: message of another session, %s", m.From, m.Session)
	case m.To != r.cfg.Self:
		return fmt.Errorf("host %q: message for %q", m.From, m.To)
	case !slices.Contains(r.others, m.From):
		return fmt.Errorf("host %q: not a sender of this round", m.From)
	case len(m.Body) > maxEarly:
		return protocol.Faultf(m.From, "round %d has %d bytes", m.Round, len(m.Body))
	case slices.ContainsFunc(r.early, func(e protocol.Message) bool { return e.From == m.From }):
		return fmt.Errorf("host %q: second message of round %d", m.From, m.Round)
	}
	m.Body = slices.Clone(m.Body)
	r.early = append(r.early, m)
	return nil
}

// begin starts the refresh with what was dealt.
func (r *Reshare) begin(send []protocol.Message) (protocol.Ready, error) {
	u, err := r.unproven()
	if err != nil {
		return protocol.Ready{}, err
	}
	r.deal.Close() // its share is in the configuration
	if r.refresh, err = u.session(r); err != nil {
		return protocol.Ready{}, err
	}
	ready, err := r.refresh.Start()
	ready.Send = slices.Concat(send, ready.Send)
	for _, m := range r.early {
		if err != nil {
			break
		}
		var more protocol.Ready
		more, err = r.refresh.Step(m)
		ready.Send, ready.Done = append(ready.Send, more.Send...), more.Done
	}
	r.early = nil
	return ready, err
}

// unproven is a configuration with a share that was dealt, in which everything about
// Paillier, Pedersen and ElGamal is a placeholder that is good for nothing: a modulus
// of four bits, and no private keys. It is never stored. All it can do is refresh.
type unproven struct {
	cfg        *module.Config
	transcript [32]byte
}

// unproven makes it of what was dealt.
func (r *Reshare) unproven() (*unproven, error) {
	c := r.cfg.Old.Curve.group
	transcript, err := r.deal.Transcript()
	if err != nil {
		return nil, err
	}
	// The module's chain key is for derivation, which there is none of: the
	// transcript is something that all holders have.
	cfg := &module.Config{
		Group: c, ID: guard.IDs(r.cfg.Holders)[r.cfg.Self], Threshold: guard.Threshold(r.cfg.Quorum),
		RID: slices.Clone(transcript[:]), ChainKey: slices.Clone(transcript[:]), Public: map[party.ID]*config.Public{},
	}
	number := func(n uint64) *saferith.Nat { return new(saferith.Nat).SetUint64(n) }
	n := saferith.ModulusFromNat(number(15))
	err = r.deal.Output(func(scalar []byte, shares []curve.Point) error {
		for i, x := range shares {
			cfg.Public[guard.ID(i)] = &config.Public{
				ECDSA: x, ElGamal: c.NewBasePoint(), Paillier: paillier.NewPublicKey(n),
				Pedersen: pedersen.New(arith.ModulusFromN(n), number(4), number(2)),
			}
		}
		cfg.ECDSA, err = guard.DecodeScalar(c, scalar)
		return err
	})
	return &unproven{cfg, transcript}, err
}

// session is the refresh, bound to what was dealt.
func (u *unproven) session(r *Reshare) (*guard.Session, error) {
	h := sha256.New()
	h.Write([]byte("conseal refresh after dealing v1"))
	h.Write(r.cfg.Session[:])
	h.Write(u.transcript[:])
	return guard.New(guard.Config{
		Session: r.cfg.Session, Self: r.cfg.Self, Parties: r.cfg.Holders, IDs: guard.IDs(r.cfg.Holders),
		Rounds: keygenRounds(u.cfg.Group, r.cfg.Quorum, true), Start: u.refresh(), Offset: refreshOffset, Bound: h.Sum(nil),
	})
}

func (u *unproven) refresh() threshold.StartFunc { return module.Refresh(u.cfg, nil) }

// Progress tells which of how many rounds is being received, and from whom messages
// of it are missing.
func (r *Reshare) Progress() (round, rounds int, missing []protocol.HostID) {
	if r.refresh == nil {
		round, _, missing = r.deal.Progress()
		return round, dealing.Rounds + refreshRounds, missing
	}
	round, rounds, missing = r.refresh.Progress()
	return dealing.Rounds + round, dealing.Rounds + rounds, missing
}

// Transcript is the hash of all dealings, once all hosts have received the same.
func (r *Reshare) Transcript() ([32]byte, error) { return r.deal.Transcript() }

// Result is the new share of a holder, once the session is done. The caller wipes it.
// A dealer that is no holder has none.
func (r *Reshare) Result() (*Share, error) {
	if r.refresh == nil {
		return nil, errors.New("ECDSA resharing: there is no new share here")
	}
	share, err := result(r.refresh, r.cfg.Old.Curve, r.cfg.Self, r.cfg.Holders, r.cfg.Quorum)
	if err != nil {
		return nil, fmt.Errorf("ECDSA resharing: %w", err)
	}
	if share.Group.PublicKey != r.cfg.Old.PublicKey {
		share.Wipe()
		return nil, errors.New("ECDSA resharing: the refresh changed the public key")
	}
	return share, nil
}

// Close wipes what was dealt and received. The module wipes nothing: see [guard.Session].
func (r *Reshare) Close() {
	r.closed, r.early = true, nil
	r.deal.Close()
	if r.refresh != nil {
		r.refresh.Close()
	}
}
