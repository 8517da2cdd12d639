package taproot

import (
	"errors"
	"fmt"
	"slices"

	"github.com/luxfi/threshold/pkg/math/curve"

	"conseal/protocol/dealing"
	"conseal/protocol/guard"
)

// ReshareConfig is what a resharing is made of.
type ReshareConfig struct {
	dealing.Plan
	Old   *Group
	Share *Share // the old share of a dealer, nil at others; it is not changed
}

// Reshare replaces the shares of a key under the same public key: any quorum of its
// holders deals to the next holders, under any quorum. With the same holders and
// quorum it is a refresh. Shares belong to the secret whose public key has an even y,
// and so do what they are replaced by. See [dealing.Session].
type Reshare struct {
	*dealing.Session[curve.Point, curve.Scalar]
	cfg ReshareConfig
}

// NewReshare makes the session of one host: of a dealer, of a new holder, or of both
// in one.
func NewReshare(cfg ReshareConfig) (*Reshare, error) {
	cfg.Holders = slices.Clone(cfg.Holders)
	s, err := dealing.New(cfg)
	if err != nil {
		return nil, fmt.Errorf("BIP-340 resharing: %w", err)
	}
	return &Reshare{Session: s, cfg: cfg}, nil
}

// Dealing is the resharing as package dealing takes it.
func (cfg ReshareConfig) Dealing() (out dealing.Config[curve.Point, curve.Scalar], err error) {
	if cfg.Old == nil {
		return out, errors.New("no group")
	}
	out, err = cfg.Old.Dealing(group, cfg.Old.Encode(), cfg.Plan)
	if s := cfg.Share; s != nil {
		out.Share = &dealing.Share[curve.Scalar]{Self: s.Self, Encoded: s.Public(), Lend: s.use}
	}
	return out, err
}

// use lends the share's scalar.
func (s *Share) use(fn func(x curve.Scalar) error) error {
	return s.secret.Use(func(b []byte) error {
		x, err := guard.DecodeScalar(group, b)
		if err != nil {
			return err
		}
		defer guard.Dealing{Curve: group}.Wipe(x)
		return fn(x)
	})
}

// Result returns the new share of a holder, once the session is done. The caller wipes
// it. A dealer that is no holder has none.
func (r *Reshare) Result() (share *Share, err error) {
	err = r.Output(func(scalar []byte, shares []curve.Point) error {
		next, err := r.cfg.Old.Next(r.cfg.Quorum, r.cfg.Holders, shares)
		if err == nil {
			share, err = LoadShare(&Group{next}, r.cfg.Self, scalar)
		}
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("BIP-340 resharing: %w", err)
	}
	return share, nil
}
