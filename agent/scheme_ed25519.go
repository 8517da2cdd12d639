package agent

import (
	"crypto/ed25519"
	"crypto/x509"

	"conseal/protocol"
	"conseal/protocol/dealing"
	"conseal/protocol/frost"
)

// ed25519Scheme is FROST(Ed25519, SHA-512).
type ed25519Scheme struct{}

func (ed25519Scheme) keygen(in dealing.KeygenConfig) (generation, error) {
	return generated(frost.NewKeygen(in))
}

func (ed25519Scheme) traits() traits { return traits{attempts: 4} }

func (ed25519Scheme) inspect(public []byte) (output, error) {
	g, err := frost.DecodeGroup(public)
	if err != nil {
		return output{}, err
	}
	spki, err := x509.MarshalPKIXPublicKey(ed25519.PublicKey(g.PublicKey[:]))
	if err != nil {
		return output{}, err
	}
	return output{spki: spki, pin: g.PublicKey[:], quorum: g.Quorum, holders: g.Holders}, nil
}

func (ed25519Scheme) load(self protocol.HostID, public, share []byte) (shareholder, error) {
	g, err := frost.DecodeGroup(public)
	if err != nil {
		return nil, err
	}
	s, err := frost.LoadShare(g, self, share)
	if err != nil {
		return nil, err
	}
	return frostShare{s}, nil
}

func (ed25519Scheme) reshare(in reshareConfig, share shareholder) (generation, error) {
	old, err := frost.DecodeGroup(in.old)
	if err != nil {
		return generation{}, err
	}
	dealer, _ := share.(frostShare)
	return generated(frost.NewReshare(frost.ReshareConfig{Plan: in.Plan, Old: old, Share: dealer.share}))
}

func (ed25519Scheme) verifyComplaint(in reshareConfig, c *dealing.Complaint) error {
	old, err := frost.DecodeGroup(in.old)
	if err != nil {
		return err
	}
	return dealing.VerifyComplaint(frost.ReshareConfig{Plan: in.Plan, Old: old}, c)
}

type frostShare struct{ share *frost.Share }

func (s frostShare) close() { s.share.Wipe() }

func (s frostShare) sign(in signing) (signature, error) {
	session, err := frost.NewSign(frost.SignConfig{
		Session: in.id, Self: in.self, Coordinator: in.coordinator, Signers: in.signers,
		Group: s.share.Group, Share: s.share, Message: in.message,
	})
	return frostSign{session}, err
}

type frostSign struct{ *frost.Sign }

func (s frostSign) result() (signed, error) {
	sig, err := s.Signature()
	return signed{signature: sig}, err
}
