package cmp

import (
	"errors"
	"fmt"
	"slices"
	"sync"

	"github.com/fxamacker/cbor/v2"
	"github.com/luxfi/threshold/pkg/ecdsa"
	"github.com/luxfi/threshold/pkg/party"
	module "github.com/luxfi/threshold/protocols/cmp"

	"conseal/internal/secret"
	"conseal/protocol"
	"conseal/protocol/guard"
)

// SignConfig is what a session of signing or presigning is about.
type SignConfig struct {
	Session protocol.SessionID
	Share   *Share
	Signers []protocol.HostID // sorted, as many as the quorum
	Digest  [32]byte          // of the message; not for presigning
}

// Sign is a session that signs; every signer has the signature at its end.
type Sign struct {
	*guard.Session
	group  *Group
	digest [32]byte
}

// NewSign makes the session of a signature without a presignature: CGGMP's presigning
// and signing in four rounds.
func NewSign(cfg SignConfig) (*Sign, error) {
	c, signers, err := cfg.open()
	if err != nil {
		return nil, fmt.Errorf("ECDSA signing: %w", err)
	}
	s, err := guard.New(guard.Config{
		Session: cfg.Session, Self: cfg.Share.Self, Parties: cfg.Signers, IDs: guard.IDs(cfg.Share.Group.Holders),
		Rounds: signRounds(c.Group), Start: module.Sign(c, signers, cfg.Digest[:], nil),
	})
	if err != nil {
		return nil, fmt.Errorf("ECDSA signing: %w", err)
	}
	return &Sign{s, cfg.Share.Group, cfg.Digest}, nil
}

// open checks the signers and decodes the share for one session.
func (cfg *SignConfig) open() (*module.Config, []party.ID, error) {
	signers, err := cfg.Share.Group.Signers(cfg.Share.Self, cfg.Signers)
	if err != nil {
		return nil, nil, err
	}
	c, err := cfg.Share.config()
	return c, signers, err
}

// Signature is the result, verified.
func (s *Sign) Signature() (*Signature, error) {
	result, err := s.Session.Result()
	if err != nil {
		return nil, err
	}
	sig, ok := result.(*ecdsa.Signature)
	if !ok {
		return nil, fmt.Errorf("the module made a %T", result)
	}
	return signatureOf(s.group, s.digest, sig)
}

// Presign is a session that prepares a signature of a message that is not known yet.
type Presign struct {
	*guard.Session
	cfg    SignConfig
	config *module.Config
}

// NewPresign makes the session of one signer: CGGMP's presigning in six rounds.
func NewPresign(cfg SignConfig) (*Presign, error) {
	c, signers, err := cfg.open()
	if err != nil {
		return nil, fmt.Errorf("ECDSA presigning: %w", err)
	}
	cfg.Signers = slices.Clone(cfg.Signers)
	s, err := guard.New(guard.Config{
		Session: cfg.Session, Self: cfg.Share.Self, Parties: cfg.Signers, IDs: guard.IDs(cfg.Share.Group.Holders),
		Rounds: presignRounds(c.Group, signers), Start: module.Presign(c, signers, nil),
	})
	if err != nil {
		return nil, fmt.Errorf("ECDSA presigning: %w", err)
	}
	return &Presign{s, cfg, c}, nil
}

// Presignature is one signer's part of a signature to be. It signs once: two
// signatures made from one tell everybody the private key.
type Presignature struct {
	group   *Group
	self    protocol.HostID
	signers []protocol.HostID
	public  *module.Config // without its secrets

	mu     sync.Mutex
	secret *secret.Bytes // the module's presignature, CBOR; nil once it is taken
}

// Result is this signer's part once the session is done. The caller uses or discards
// it.
func (p *Presign) Result() (*Presignature, error) {
	result, err := p.Session.Result()
	if err != nil {
		return nil, err
	}
	made, ok := result.(*ecdsa.PreSignature)
	if !ok {
		return nil, fmt.Errorf("the module made a %T", result)
	}
	encoded, err := cbor.Marshal(made)
	if err != nil {
		return nil, err
	}
	c := p.config
	return &Presignature{
		group: p.cfg.Share.Group, self: p.cfg.Share.Self, signers: p.cfg.Signers, secret: secret.Take(encoded),
		public: &module.Config{Group: c.Group, ID: c.ID, Threshold: c.Threshold, RID: c.RID, ChainKey: c.ChainKey, Public: c.Public},
	}, nil
}

// ErrUsed says that a presignature was used or discarded before.
var ErrUsed = errors.New("the presignature was used before")

// take gives what is secret, once.
func (p *Presignature) take() (*ecdsa.PreSignature, error) {
	p.mu.Lock()
	held := p.secret
	p.secret = nil
	p.mu.Unlock()
	if held == nil {
		return nil, ErrUsed
	}
	defer held.Wipe()
	out := ecdsa.EmptyPreSignature(p.group.Curve.group)
	err := held.Use(func(b []byte) error { return cbor.Unmarshal(b, out) })
	return out, err
}

// Discard ends a presignature that was not used.
func (p *Presignature) Discard() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.secret != nil {
		p.secret.Wipe()
		p.secret = nil
	}
}

// NewOnline makes the session that signs digest with a presignature: one message of
// each signer to each other. It takes the presignature, whatever comes of it.
func NewOnline(session protocol.SessionID, p *Presignature, digest [32]byte) (*Sign, error) {
	made, err := p.take()
	if err != nil {
		return nil, fmt.Errorf("ECDSA signing: %w", err)
	}
	s, err := guard.New(guard.Config{
		Session: session, Self: p.self, Parties: p.signers, IDs: guard.IDs(p.group.Holders),
		Rounds: onlineRounds(p.group.Curve.group), Start: module.PresignOnline(p.public, made, digest[:], nil),
	})
	if err != nil {
		return nil, fmt.Errorf("ECDSA signing: %w", err)
	}
	return &Sign{s, p.group, digest}, nil
}
