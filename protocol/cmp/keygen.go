package cmp

import (
	"fmt"

	"github.com/luxfi/threshold/pkg/party"
	module "github.com/luxfi/threshold/protocols/cmp"

	"conseal/protocol"
	"conseal/protocol/guard"
)

// KeygenConfig is what all holders of a key generation have in common, and who this
// one is.
type KeygenConfig struct {
	Session protocol.SessionID
	Self    protocol.HostID
	Holders []protocol.HostID // sorted; all take part
	Quorum  int
	Curve   *Curve
}

// Keygen is a key generation: figures 5 and 6 of CGGMP in one.
type Keygen struct {
	*guard.Session
	cfg KeygenConfig
}

// NewKeygen makes the session of one holder. It computes for seconds: two safe primes
// of 1024 bits in its first step, and proofs about them for each of the others later.
func NewKeygen(cfg KeygenConfig) (*Keygen, error) {
	if err := guard.CheckHolders(cfg.Quorum, cfg.Holders); err != nil {
		return nil, fmt.Errorf("ECDSA key generation: %w", err)
	}
	var all []party.ID
	for i := range cfg.Holders {
		all = append(all, guard.ID(i))
	}
	self := guard.IDs(cfg.Holders)[cfg.Self]
	s, err := guard.New(guard.Config{
		Session: cfg.Session, Self: cfg.Self, Parties: cfg.Holders, IDs: guard.IDs(cfg.Holders),
		Rounds: keygenRounds(cfg.Curve.group, cfg.Quorum, false),
		Start:  module.Keygen(cfg.Curve.group, self, all, guard.Threshold(cfg.Quorum), nil),
	})
	if err != nil {
		return nil, fmt.Errorf("ECDSA key generation: %w", err)
	}
	return &Keygen{s, cfg}, nil
}

// Result is this holder's share once the session is done. The caller wipes it.
func (k *Keygen) Result() (*Share, error) {
	return result(k.Session, k.cfg.Curve, k.cfg.Self, k.cfg.Holders, k.cfg.Quorum)
}

// result is the share that a session of the module made.
func result(s *guard.Session, c *Curve, self protocol.HostID, holders []protocol.HostID, quorum int) (*Share, error) {
	result, err := s.Result()
	if err != nil {
		return nil, err
	}
	cfg, ok := result.(*module.Config)
	if !ok || guard.Threshold(quorum) != cfg.Threshold {
		return nil, fmt.Errorf("the module made a %T of another quorum", result)
	}
	return newShare(c, self, holders, cfg)
}
