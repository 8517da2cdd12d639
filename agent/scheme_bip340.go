package agent

import (
	"conseal/protocol"
	"conseal/protocol/cmp"
	"conseal/protocol/dealing"
	"conseal/protocol/taproot"
)

// bip340Scheme is BIP-340 by FROST.
type bip340Scheme struct{}

func (bip340Scheme) keygen(in dealing.KeygenConfig) (generation, error) {
	return generated(taproot.NewKeygen(in))
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

func (bip340Scheme) reshare(in reshareConfig, share shareholder) (generation, error) {
	old, err := taproot.DecodeGroup(in.old)
	if err != nil {
		return generation{}, err
	}
	dealer, _ := share.(bip340Share)
	return generated(taproot.NewReshare(taproot.ReshareConfig{Plan: in.Plan, Old: old, Share: dealer.share}))
}

func (bip340Scheme) verifyComplaint(in reshareConfig, c *dealing.Complaint) error {
	old, err := taproot.DecodeGroup(in.old)
	if err != nil {
		return err
	}
	return dealing.VerifyComplaint(taproot.ReshareConfig{Plan: in.Plan, Old: old}, c)
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
