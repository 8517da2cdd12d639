package agent

import (
	"conseal/internal/secret"
	"conseal/protocol"
	"conseal/protocol/cmp"
	"conseal/protocol/dealing"
	"conseal/protocol/taproot"
)

// bip340Scheme is BIP-340 by FROST.
type bip340Scheme struct{}

func (bip340Scheme) keygen(id protocol.SessionID, self protocol.HostID, holders []protocol.HostID, quorum int) (generation, error) {
	k, err := taproot.NewKeygen(taproot.KeygenConfig{Session: id, Self: self, Holders: holders, Quorum: quorum})
	return bip340Keygen{k}, err
}

func (bip340Scheme) traits() traits { return traits{mesh: true, attempts: 4} }

// inspect gives the SubjectPublicKeyInfo of the point with even y.
func (bip340Scheme) inspect(public []byte) (output, error) {
	g, err := taproot.DecodeGroup(public)
	if err != nil {
		return output{}, err
	}
	spki, err := cmp.Secp256k1.SPKI(g.PublicKey)
	x := g.XOnly()
	return output{spki: spki, pin: x[:], quorum: g.Quorum, holders: g.Holders}, err
}

func (bip340Scheme) load(self protocol.HostID, public, share []byte) (shareholder, error) {
	g, err := taproot.DecodeGroup(public)
	if err != nil {
		return nil, err
	}
	s, err := taproot.LoadShare(g, self, share)
	if err != nil {
		return nil, err
	}
	return bip340Share{s}, nil
}

func (bip340Scheme) reshareConfig(in reshareConfig, share shareholder) (cfg taproot.ReshareConfig, err error) {
	old, err := taproot.DecodeGroup(in.old)
	if err != nil {
		return cfg, err
	}
	cfg = taproot.ReshareConfig{
		Session: in.session, Self: in.self, Old: old, Dealers: in.dealers, Holders: in.holders, Quorum: in.quorum, Sign: in.sign, Verify: in.verify,
	}
	if share != nil {
		cfg.Share = share.(bip340Share).share
	}
	return cfg, nil
}

func (s bip340Scheme) reshare(in reshareConfig, share shareholder) (generation, error) {
	cfg, err := s.reshareConfig(in, share)
	if err != nil {
		return nil, err
	}
	r, err := taproot.NewReshare(cfg)
	return bip340Reshare{r}, err
}

func (s bip340Scheme) verifyComplaint(in reshareConfig, c *dealing.Complaint) error {
	cfg, err := s.reshareConfig(in, nil)
	if err != nil {
		return err
	}
	return taproot.VerifyComplaint(cfg, c)
}

type bip340Reshare struct{ *taproot.Reshare }

func (r bip340Reshare) result() (public []byte, share *secret.Bytes, err error) {
	s, err := r.Result()
	if err != nil {
		return nil, nil, err
	}
	defer s.Wipe()
	share, err = s.Secret()
	return s.Group.Encode(), share, err
}

type bip340Keygen struct{ *taproot.Keygen }

func (k bip340Keygen) result() (public []byte, share *secret.Bytes, err error) {
	s, err := k.Result()
	if err != nil {
		return nil, nil, err
	}
	defer s.Wipe()
	share, err = s.Secret()
	return s.Group.Encode(), share, err
}

type bip340Share struct{ share *taproot.Share }

func (s bip340Share) close() { s.share.Wipe() }

func (s bip340Share) sign(in signing) (signature, error) {
	session, err := taproot.NewSign(taproot.SignConfig{Session: in.id, Share: s.share, Signers: in.signers, Message: in.message})
	return bip340Sign{session}, err
}

type bip340Sign struct{ *taproot.Sign }

func (s bip340Sign) result() (signed, error) {
	sig, err := s.Signature()
	return signed{signature: sig[:]}, err
}
