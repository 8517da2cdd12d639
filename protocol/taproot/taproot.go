// Package taproot is threshold BIP-340: holders make a key together, and any quorum of
// them makes Schnorr signatures on secp256k1 with it. The protocol is the FROST of
// github.com/luxfi/threshold behind [guard.Session]; its hashes are not those of RFC
// 9591, its signatures are those of BIP-340.
//
// The message is signed as it is, of any length: BIP-340 hashes it. Ledgers sign 32
// bytes that they have hashed under a tag.
package taproot

import (
	"errors"
	"fmt"
	"slices"

	"github.com/luxfi/threshold/pkg/math/curve"
	"github.com/luxfi/threshold/pkg/party"
	"github.com/luxfi/threshold/pkg/taproot"
	module "github.com/luxfi/threshold/protocols/frost"

	"conseal/internal/secret"
	"conseal/protocol"
	"conseal/protocol/dealing"
	"conseal/protocol/guard"
)

var group = curve.Secp256k1{}

// Group is the public output of a key generation. Its public key has an even y.
type Group struct{ guard.Group }

const groupVersion = 1

// Encode returns the canonical encoding: version and [guard.Group].
func (g *Group) Encode() []byte { return g.Append([]byte{groupVersion}) }

// DecodeGroup reads what [Group.Encode] wrote, and checks it as [guard.Group.Check]
// does.
func DecodeGroup(b []byte) (*Group, error) {
	g, err := decodeGroup(b)
	if err != nil {
		return nil, fmt.Errorf("decoding a BIP-340 group: %w", err)
	}
	return g, nil
}

func decodeGroup(b []byte) (*Group, error) {
	if len(b) < 1 || b[0] != groupVersion {
		return nil, errors.New("not of version 1")
	}
	inner, rest, err := guard.DecodeGroup(group, b[1:])
	switch {
	case err != nil:
		return nil, err
	case len(rest) > 0:
		return nil, errors.New("of the wrong length")
	case inner.PublicKey[0] != 2:
		return nil, errors.New("the public key has an odd y")
	}
	return &Group{inner}, nil
}

// XOnly is the public key as BIP-340 writes it.
func (g *Group) XOnly() [32]byte { return [32]byte(g.PublicKey[1:]) }

// Verify tells whether sig is a signature of a message by BIP-340.
func Verify(public [32]byte, message []byte, sig [64]byte) bool {
	return taproot.PublicKey(public[:]).Verify(sig[:], message)
}

// Share is one holder's share of a key. It is safe for concurrent use.
type Share struct {
	Group *Group
	Self  protocol.HostID

	secret *secret.Bytes // the scalar
}

// LoadShare reads the scalar that [Share.Secret] gave and checks that it is self's
// share of the group's key. It copies scalar.
func LoadShare(g *Group, self protocol.HostID, scalar []byte) (*Share, error) {
	at := slices.Index(g.Holders, self)
	if at < 0 {
		return nil, fmt.Errorf("BIP-340 share: host %q is no holder of this key", self)
	}
	var x curve.Secp256k1Scalar
	if err := x.UnmarshalBinary(scalar); err != nil || x.IsZero() {
		return nil, errors.New("BIP-340 share: not a scalar in canonical form")
	}
	public, err := guard.EncodePoint(x.ActOnBase())
	if err != nil || public != g.VerificationShares[at] {
		return nil, errors.New("BIP-340 share: it does not belong to this key and host")
	}
	return &Share{Group: g, Self: self, secret: secret.Copy(scalar)}, nil
}

// Secret returns a copy of the share's scalar, 32 bytes, for storage.
func (s *Share) Secret() (*secret.Bytes, error) { return s.secret.Clone() }

// Public is the encoded group, which everybody may know.
func (s *Share) Public() []byte { return s.Group.Encode() }

// Wipe ends the share.
func (s *Share) Wipe() { s.secret.Wipe() }

// config makes the module's configuration for one session, which may write into it.
func (s *Share) config() (*module.TaprootConfig, error) {
	public := s.Group.XOnly()
	cfg := &module.TaprootConfig{
		ID: guard.IDs(s.Group.Holders)[s.Self], Threshold: guard.Threshold(s.Group.Quorum),
		PrivateShare: new(curve.Secp256k1Scalar), PublicKey: public[:],
		VerificationShares: map[party.ID]*curve.Secp256k1Point{},
	}
	for i, x := range s.Group.VerificationShares {
		p := new(curve.Secp256k1Point)
		if err := p.UnmarshalBinary(x[:]); err != nil {
			return nil, err
		}
		cfg.VerificationShares[guard.ID(i)] = p
	}
	return cfg, s.secret.Use(cfg.PrivateShare.UnmarshalBinary)
}

// KeygenConfig is what a key generation is made of.
type KeygenConfig = dealing.KeygenConfig

// Keygen is a key generation: the DKG of the FROST paper (Komlo and Goldberg 2020,
// figure 1) with an echo of the broadcasts, and the key negated if its y is odd.
type Keygen struct {
	*guard.Session
	cfg KeygenConfig
}

// NewKeygen makes the session of one holder.
func NewKeygen(cfg KeygenConfig) (*Keygen, error) {
	s, err := guard.NewKeygen(cfg, keygenRounds, module.KeygenTaproot)
	if err != nil {
		return nil, fmt.Errorf("BIP-340 key generation: %w", err)
	}
	return &Keygen{s, cfg}, nil
}

func keygenRounds(quorum int) []guard.Round {
	return []guard.Round{
		{Number: 2, Broadcast: guard.Same(guard.Fields("PhiI SigmaI Commitment", guard.Polynomial(group, quorum, false),
			guard.Fields("C Z", guard.Fields("C", guard.Point(group)), guard.Fields("Z", guard.Scalar(group))), guard.Bytes(64)))},
		{
			Number:    3,
			Broadcast: guard.Same(guard.Fields("CL Decommitment", guard.Bytes(32), guard.Bytes(32))),
			Direct:    guard.Fields("FLi", guard.Scalar(group)),
		},
	}
}

// Result is this holder's share once the session is done. The caller wipes it.
func (k *Keygen) Result() (*Share, error) {
	result, err := k.Session.Result()
	if err != nil {
		return nil, err
	}
	cfg, ok := result.(*module.TaprootConfig)
	if !ok || cfg.Threshold != guard.Threshold(k.cfg.Quorum) || len(cfg.PublicKey) != 32 {
		return nil, fmt.Errorf("the module made a %T of another quorum", result)
	}
	g := &Group{guard.Group{Quorum: k.cfg.Quorum, Holders: slices.Clone(k.cfg.Holders), PublicKey: [guard.PointSize]byte(append([]byte{2}, cfg.PublicKey...))}}
	for i, h := range k.cfg.Holders {
		p := cfg.VerificationShares[guard.ID(i)]
		if p == nil {
			return nil, fmt.Errorf("the module's result lacks host %q", h)
		}
		x, err := guard.EncodePoint(p)
		if err != nil {
			return nil, err
		}
		g.VerificationShares = append(g.VerificationShares, x)
	}
	if err := g.Check(group); err != nil {
		return nil, err
	}
	scalar, err := cfg.PrivateShare.MarshalBinary()
	if err != nil {
		return nil, err
	}
	defer clear(scalar)
	return LoadShare(g, k.cfg.Self, scalar)
}

// SignConfig is what a session of signing is about.
type SignConfig struct {
	Session protocol.SessionID
	Share   *Share
	Signers []protocol.HostID // sorted, as many as the quorum
	Message []byte
}

// Sign is a session that signs, in two rounds; every signer has the signature at its
// end.
type Sign struct {
	*guard.Session
	public  [32]byte
	message []byte
}

// NewSign makes the session of one signer.
func NewSign(cfg SignConfig) (*Sign, error) {
	signers, err := cfg.Share.Group.Signers(cfg.Share.Self, cfg.Signers)
	if err != nil {
		return nil, fmt.Errorf("BIP-340 signing: %w", err)
	}
	if len(cfg.Message) == 0 {
		return nil, errors.New("BIP-340 signing: the message is empty")
	}
	c, err := cfg.Share.config()
	if err != nil {
		return nil, fmt.Errorf("BIP-340 signing: %w", err)
	}
	message := slices.Clone(cfg.Message)
	s, err := guard.New(guard.Config{
		Session: cfg.Session, Self: cfg.Share.Self, Parties: cfg.Signers, IDs: guard.IDs(cfg.Share.Group.Holders),
		Rounds: signRounds(), Start: module.SignTaproot(c, signers, message),
	})
	if err != nil {
		return nil, fmt.Errorf("BIP-340 signing: %w", err)
	}
	return &Sign{s, cfg.Share.Group.XOnly(), message}, nil
}

func signRounds() []guard.Round {
	return []guard.Round{
		{Number: 2, Broadcast: guard.Same(guard.Fields("D_i E_i", guard.Point(group), guard.Point(group)))},
		{Number: 3, Broadcast: guard.Same(guard.Fields("ZI", guard.Scalar(group)))},
	}
}

// Signature is the result, verified.
func (s *Sign) Signature() ([64]byte, error) {
	result, err := s.Session.Result()
	if err != nil {
		return [64]byte{}, err
	}
	sig, ok := result.(taproot.Signature)
	if !ok || len(sig) != 64 {
		return [64]byte{}, fmt.Errorf("the module made a %T of %d bytes", result, len(sig))
	}
	if !Verify(s.public, s.message, [64]byte(sig)) {
		return [64]byte{}, errors.New("the signature does not verify")
	}
	return [64]byte(sig), nil
}
