package agent

import (
	"crypto/ed25519"
	"crypto/x509"

	"conseal/internal/secret"
	"conseal/protocol"
	"conseal/protocol/dealing"
	"conseal/protocol/frost"
)

// ed25519Scheme is FROST(Ed25519, SHA-512).
type ed25519Scheme struct{}

func (ed25519Scheme) keygen(id protocol.SessionID, self protocol.HostID, holders []protocol.HostID, quorum int) (generation, error) {
	k, err := frost.NewKeygen(frost.KeygenConfig{Session: id, Self: self, Holders: holders, Quorum: quorum})
	return frostKeygen{k}, err
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

func (ed25519Scheme) reshareConfig(in reshareConfig, share shareholder) (cfg frost.ReshareConfig, err error) {
	old, err := frost.DecodeGroup(in.old)
	if err != nil {
		return cfg, err
	}
	cfg = frost.ReshareConfig{
		Session: in.session, Self: in.self, Old: old, Dealers: in.dealers, Holders: in.holders, Quorum: in.quorum, Sign: in.sign, Verify: in.verify,
	}
	if share != nil {
		cfg.Share = share.(frostShare).share
	}
	return cfg, nil
}

func (s ed25519Scheme) reshare(in reshareConfig, share shareholder) (generation, error) {
	cfg, err := s.reshareConfig(in, share)
	if err != nil {
		return nil, err
	}
	r, err := frost.NewReshare(cfg)
	return frostReshare{r}, err
}

func (s ed25519Scheme) verifyComplaint(in reshareConfig, c *dealing.Complaint) error {
	cfg, err := s.reshareConfig(in, nil)
	if err != nil {
		return err
	}
	return frost.VerifyComplaint(cfg, c)
}

type frostReshare struct{ *frost.Reshare }

func (r frostReshare) result() (public []byte, share *secret.Bytes, err error) {
	s, err := r.Result()
	if err != nil {
		return nil, nil, err
	}
	defer s.Wipe()
	share, err = s.Secret()
	return s.Group.Encode(), share, err
}

type frostKeygen struct{ *frost.Keygen }

func (k frostKeygen) result() (public []byte, share *secret.Bytes, err error) {
	s, _, err := k.Result()
	if err != nil {
		return nil, nil, err
	}
	defer s.Wipe()
	share, err = s.Secret()
	return s.Group.Encode(), share, err
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
