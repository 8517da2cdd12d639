package cmp

import (
	"errors"
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

// Keygen is a key generation or a refresh: figures 5 and 6 of CGGMP in one.
type Keygen struct {
	*guard.Session
	cfg KeygenConfig
	old *Group // of a refresh
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
	return &Keygen{Session: s, cfg: cfg}, nil
}

// NewRefresh makes the session in which all holders of a key give each other new
// shares of it, with new auxiliary parameters.
func NewRefresh(session protocol.SessionID, share *Share) (*Keygen, error) {
	g := share.Group
	cfg, err := share.config()
	if err != nil {
		return nil, fmt.Errorf("ECDSA refresh: %w", err)
	}
	s, err := guard.New(guard.Config{
		Session: session, Self: share.Self, Parties: g.Holders, IDs: guard.IDs(g.Holders),
		Rounds: keygenRounds(g.Curve.group, g.Quorum, true), Start: module.Refresh(cfg, nil),
	})
	if err != nil {
		return nil, fmt.Errorf("ECDSA refresh: %w", err)
	}
	return &Keygen{
		Session: s, old: g,
		cfg: KeygenConfig{Session: session, Self: share.Self, Holders: g.Holders, Quorum: g.Quorum, Curve: g.Curve},
	}, nil
}

// Result is this holder's share once the session is done. The caller wipes it.
func (k *Keygen) Result() (*Share, error) {
	result, err := k.Session.Result()
	if err != nil {
		return nil, err
	}
	cfg, ok := result.(*module.Config)
	if !ok || guard.Threshold(k.cfg.Quorum) != cfg.Threshold {
		return nil, fmt.Errorf("the module made a %T of another quorum", result)
	}
	share, err := newShare(k.cfg.Curve, k.cfg.Self, k.cfg.Holders, cfg)
	if err != nil {
		return nil, err
	}
	if k.old != nil && share.Group.PublicKey != k.old.PublicKey {
		share.Wipe()
		return nil, errors.New("the refresh changed the public key")
	}
	return share, nil
}
