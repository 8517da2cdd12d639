package agent

import (
	"errors"

	"conseal/protocol"
	"conseal/protocol/cmp"
	"conseal/protocol/dealing"
)

// ecdsaScheme is ECDSA by CGGMP on one curve.
type ecdsaScheme struct{ curve *cmp.Curve }

func (s ecdsaScheme) keygen(in dealing.KeygenConfig) (generation, error) {
	return generated(cmp.NewKeygen(s.curve, in))
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

func (s ecdsaScheme) reshare(in reshareConfig, share shareholder) (generation, error) {
	old, err := s.group(in.old)
	if err != nil {
		return generation{}, err
	}
	dealer, _ := share.(ecdsaShare)
	return generated(cmp.NewReshare(cmp.ReshareConfig{Plan: in.Plan, Old: old, Share: dealer.share}))
}

func (s ecdsaScheme) verifyComplaint(in reshareConfig, c *dealing.Complaint) error {
	old, err := s.group(in.old)
	if err != nil {
		return err
	}
	return dealing.VerifyComplaint(cmp.ReshareConfig{Plan: in.Plan, Old: old}, c)
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
