package taproot

import (
	"bytes"
	"errors"
	"fmt"
	"slices"

	"github.com/luxfi/threshold/pkg/math/curve"

	"conseal/protocol"
	"conseal/protocol/dealing"
	"conseal/protocol/guard"
)

// ReshareConfig is what the hosts of a resharing have in common, and who this one is.
// The session's id stands for all that is common: the old group, dealers, holders and
// quorum. No two sessions have one id.
type ReshareConfig struct {
	Session protocol.SessionID
	Self    protocol.HostID
	Old     *Group
	Dealers []protocol.HostID // sorted; a quorum of the old holders
	Share   *Share            // the old share of a dealer, nil at others; it is not changed
	Holders []protocol.HostID // sorted; of the new shares
	Quorum  int               // of the new shares

	// Sign signs a digest with this host's identity key. A dealer signs once.
	Sign func(digest [32]byte) ([]byte, error)
	// Verify checks such a signature by the key that is pinned for a host.
	Verify func(host protocol.HostID, digest [32]byte, signature []byte) error
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
	s, err := newReshare(&cfg)
	if err != nil {
		return nil, fmt.Errorf("BIP-340 resharing: %w", err)
	}
	return &Reshare{Session: s, cfg: cfg}, nil
}

func newReshare(cfg *ReshareConfig) (*dealing.Session[curve.Point, curve.Scalar], error) {
	inner, err := cfg.dealing()
	if err != nil {
		return nil, err
	}
	if cfg.Share != nil {
		if cfg.Share.Self != cfg.Self || !bytes.Equal(cfg.Share.Group.Encode(), cfg.Old.Encode()) {
			return nil, fmt.Errorf("host %q has no share of this key and epoch", cfg.Self)
		}
		inner.Share = cfg.Share.use
	}
	return dealing.New(inner)
}

// dealing is the configuration of the session without the share.
func (cfg *ReshareConfig) dealing() (out dealing.Config[curve.Point, curve.Scalar], err error) {
	if cfg.Old == nil {
		return out, errors.New("no group")
	}
	old, err := cfg.Old.Key(group, cfg.Old.Encode())
	if err != nil {
		return out, err
	}
	return dealing.Config[curve.Point, curve.Scalar]{
		Group: guard.Dealing{Curve: group}, Session: cfg.Session, Self: cfg.Self, Old: old,
		Dealers: cfg.Dealers, Holders: cfg.Holders, Quorum: cfg.Quorum, Sign: cfg.Sign, Verify: cfg.Verify,
	}, guard.CheckHolders(cfg.Quorum, cfg.Holders)
}

// VerifyComplaint returns nil if a complaint proves that its dealer cheated in the
// session of cfg, of which neither Self, Share nor Sign is needed.
func VerifyComplaint(cfg ReshareConfig, c *dealing.Complaint) error {
	inner, err := cfg.dealing()
	if err != nil {
		return fmt.Errorf("BIP-340 resharing: %w", err)
	}
	return dealing.VerifyComplaint(inner, c)
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
func (r *Reshare) Result() (*Share, error) {
	scalar, shares, err := r.Output()
	if err != nil {
		return nil, fmt.Errorf("BIP-340 resharing: %w", err)
	}
	defer scalar.Wipe()
	next, err := r.cfg.Old.Next(r.cfg.Quorum, r.cfg.Holders, shares)
	if err != nil {
		return nil, err
	}
	g := &Group{next}
	var share *Share
	err = scalar.Use(func(b []byte) error {
		share, err = LoadShare(g, r.cfg.Self, b)
		return err
	})
	return share, err
}
