package cmp

import (
	module "github.com/luxfi/threshold/protocols/cmp"
)

// Judge changes a share's configuration and has it judged as one that the module made.
func Judge(s *Share, change func(*module.Config)) error {
	cfg, err := s.config()
	if err != nil {
		return err
	}
	change(cfg)
	_, err = newShare(s.Group.Curve, s.Self, s.Group.Holders, cfg)
	return err
}

// AuxiliaryValues are what of a share is neither the key nor a name: values of Paillier,
// Pedersen and ElGamal of each holder, those of this one that are secret, and the random
// ones.
func AuxiliaryValues(s *Share) (out [][]byte) {
	cfg, err := s.config()
	if err != nil {
		panic(err)
	}
	elGamal, err := cfg.ElGamal.MarshalBinary()
	if err != nil {
		panic(err)
	}
	out = append(out, cfg.RID, cfg.ChainKey, elGamal, cfg.Paillier.P().Bytes(), cfg.Paillier.Q().Bytes())
	for _, p := range cfg.Public {
		e, err := p.ElGamal.MarshalBinary()
		if err != nil {
			panic(err)
		}
		out = append(out, e, p.Paillier.N().Bytes(), p.Pedersen.S().Bytes(), p.Pedersen.T().Bytes())
	}
	return out
}

// BasePoint is what a placeholder has for an ElGamal key.
func BasePoint(c *Curve) []byte {
	b, err := c.group.NewBasePoint().MarshalBinary()
	if err != nil {
		panic(err)
	}
	return b
}
