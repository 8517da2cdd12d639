package frost

import (
	"errors"
	"fmt"
	"slices"

	ed "filippo.io/edwards25519"

	"conseal/protocol/dealing"
)

// ReshareConfig is what a resharing is made of.
type ReshareConfig struct {
	dealing.Plan
	Old   *Group
	Share *Share // the old share of a dealer, nil at others; it is not changed
}

// Reshare replaces the shares of a key under the same public key: any quorum of its
// holders deals to the next holders, under any quorum. With the same holders and
// quorum it is a refresh. See [dealing.Session].
type Reshare struct {
	*dealing.Session[*ed.Point, *ed.Scalar]
	cfg ReshareConfig
}

// NewReshare makes the session of one host: of a dealer, of a new holder, or of both
// in one.
func NewReshare(cfg ReshareConfig) (*Reshare, error) {
	cfg.Holders = slices.Clone(cfg.Holders)
	s, err := dealing.New(cfg)
	if err != nil {
		return nil, fmt.Errorf("FROST resharing: %w", err)
	}
	return &Reshare{Session: s, cfg: cfg}, nil
}

// Dealing is the resharing as package dealing takes it.
func (cfg ReshareConfig) Dealing() (out dealing.Config[*ed.Point, *ed.Scalar], err error) {
	g := cfg.Old
	if g == nil || g.public == nil {
		return out, errors.New("no group of a key generation or of DecodeGroup")
	}
	out.Plan, out.Group = cfg.Plan, curve
	out.Old = dealing.Key[*ed.Point]{Encoded: g.Encode(), Quorum: g.Quorum, Holders: g.Holders, Shares: g.shares, Public: g.public}
	if s := cfg.Share; s != nil {
		out.Share = &dealing.Share[*ed.Scalar]{Self: s.Self, Encoded: s.Public(), Lend: s.use}
	}
	return out, nil
}

// Result returns the new share of a holder, once the session is done. The caller owns
// it. A dealer that is no holder has none.
func (r *Reshare) Result() (share *Share, err error) {
	err = r.Output(func(scalar []byte, shares []*ed.Point) error {
		share, err = LoadShare(newGroup(r.cfg.Quorum, r.cfg.Holders, r.cfg.Old.public, shares), r.cfg.Self, scalar)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("FROST resharing: %w", err)
	}
	return share, nil
}
