package cmp

import (
	"fmt"

	"github.com/luxfi/threshold/pkg/party"
	threshold "github.com/luxfi/threshold/pkg/protocol"
	module "github.com/luxfi/threshold/protocols/cmp"

	"conseal/protocol"
	"conseal/protocol/dealing"
	"conseal/protocol/guard"
)

// KeygenConfig is what a key generation is made of.
type KeygenConfig = dealing.KeygenConfig

// Keygen is a key generation: figures 5 and 6 of CGGMP in one.
type Keygen struct {
	*guard.Session
	curve *Curve
	cfg   KeygenConfig
}

// NewKeygen makes the session of one holder. It computes for seconds: two safe primes
// of 1024 bits in its first step, and proofs about them for each of the others later.
func NewKeygen(c *Curve, cfg KeygenConfig) (*Keygen, error) {
	s, err := guard.NewKeygen(cfg,
		func(quorum int) []guard.Round { return keygenRounds(c.group, quorum, false) },
		func(self party.ID, all []party.ID, t int) threshold.StartFunc {
			return module.Keygen(c.group, self, all, t, nil)
		})
	if err != nil {
		return nil, fmt.Errorf("ECDSA key generation: %w", err)
	}
	return &Keygen{s, c, cfg}, nil
}

// Result is this holder's share once the session is done. The caller wipes it.
func (k *Keygen) Result() (*Share, error) {
	return result(k.Session, k.curve, k.cfg.Self, k.cfg.Holders, k.cfg.Quorum)
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
