package agent

import (
	"errors"

	"conseal/internal/secret"
	"conseal/protocol"
	"conseal/protocol/cmp"
	"conseal/protocol/dealing"
)

// ecdsaScheme is ECDSA by CGGMP on one curve.
type ecdsaScheme struct{ curve *cmp.Curve }

func (s ecdsaScheme) keygen(id protocol.SessionID, self protocol.HostID, holders []protocol.HostID, quorum int) (generation, error) {
	k, err := cmp.NewKeygen(cmp.KeygenConfig{Session: id, Self: self, Holders: holders, Quorum: quorum, Curve: s.curve})
	return ecdsaKeygen{k}, err
}

var errCurve = errors.New("the key is on another curve than its scheme says")

func (ecdsaScheme) traits() traits { return traits{mesh: true, attempts: 2, digest: true} }

func (s ecdsaScheme) group(public []byte) (*cmp.Group, error) {
	g, err := cmp.DecodeGroup(public)
	if err == nil && g.Curve != s.curve {
		err = errCurve
	}
	return g, err
}

func (s ecdsaScheme) inspect(public []byte) (output, error) {
	g, err := s.group(public)
	if err != nil {
		return output{}, err
	}
	spki, err := g.Curve.SPKI(g.PublicKey)
	return output{spki: spki, pin: g.PublicKey[:], quorum: g.Quorum, holders: g.Holders}, err
}

func (s ecdsaScheme) load(self protocol.HostID, public, share []byte) (shareholder, error) {
	g, err := s.group(public)
	if err != nil {
		return nil, err
	}
	loaded, err := cmp.LoadShare(g, self, share)
	if err != nil {
		return nil, err
	}
	return ecdsaShare{loaded}, nil
}

func (s ecdsaScheme) reshareConfig(in reshareConfig, share shareholder) (cfg cmp.ReshareConfig, err error) {
	old, err := s.group(in.old)
	if err != nil {
		return cfg, err
	}
	cfg = cmp.ReshareConfig{
		Session: in.session, Self: in.self, Old: old, Dealers: in.dealers, Holders: in.holders, Quorum: in.quorum, Sign: in.sign, Verify: in.verify,
	}
	if share != nil {
		cfg.Share = share.(ecdsaShare).share
	}
	return cfg, nil
}

func (s ecdsaScheme) reshare(in reshareConfig, share shareholder) (generation, error) {
	cfg, err := s.reshareConfig(in, share)
	if err != nil {
		return nil, err
	}
	r, err := cmp.NewReshare(cfg)
	return ecdsaReshare{r}, err
}

func (s ecdsaScheme) verifyComplaint(in reshareConfig, c *dealing.Complaint) error {
	cfg, err := s.reshareConfig(in, nil)
	if err != nil {
		return err
	}
	return cmp.VerifyComplaint(cfg, c)
}

type ecdsaReshare struct{ *cmp.Reshare }

func (r ecdsaReshare) result() (public []byte, share *secret.Bytes, err error) {
	s, err := r.Result()
	if err != nil {
		return nil, nil, err
	}
	defer s.Wipe()
	share, err = s.Secret()
	return s.Group.Encode(), share, err
}

type ecdsaKeygen struct{ *cmp.Keygen }

func (k ecdsaKeygen) result() (public []byte, share *secret.Bytes, err error) {
	s, err := k.Result()
	if err != nil {
		return nil, nil, err
	}
	defer s.Wipe()
	share, err = s.Secret()
	return s.Group.Encode(), share, err
}

type ecdsaShare struct{ share *cmp.Share }

func (s ecdsaShare) close() { s.share.Wipe() }

func (s ecdsaShare) sign(in signing) (signature, error) {
	session, err := cmp.NewSign(cmp.SignConfig{Session: in.id, Share: s.share, Signers: in.signers, Digest: in.digest})
	return ecdsaSign{session}, err
}

type ecdsaSign struct{ *cmp.Sign }

func (s ecdsaSign) result() (signed, error) {
	sig, err := s.Signature()
	if err != nil {
		return signed{}, err
	}
	der, err := sig.DER()
	return signed{signature: der, fixed: sig.Fixed(), recovery: uint32(sig.RecoveryID)}, err
}

func (s ecdsaShare) presign(in signing) (presigning, error) {
	session, err := cmp.NewPresign(cmp.SignConfig{Session: in.id, Share: s.share, Signers: in.signers})
	return ecdsaPresign{session}, err
}

type ecdsaPresign struct{ *cmp.Presign }

func (s ecdsaPresign) result() (presignature, error) {
	p, err := s.Result()
	return ecdsaPresignature{p}, err
}

type ecdsaPresignature struct{ *cmp.Presignature }

func (p ecdsaPresignature) discard() { p.Discard() }

func (p ecdsaPresignature) sign(id protocol.SessionID, digest [32]byte) (signature, error) {
	session, err := cmp.NewOnline(id, p.Presignature, digest)
	return ecdsaSign{session}, err
}
