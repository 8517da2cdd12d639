package tpm

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/google/go-tpm/tpm2"
)

// Lockout says in words how the TPM's protection against dictionary attacks stands. cfg
// is as for [Open].
//
// If own is not empty it first sets the protection to 32 tries, of which one is forgotten
// every 10 minutes, and a lockout authorization, which it has written to the file own
// before. Run again, also after a crash, it does what is missing. What somebody else has
// set is left alone.
func Lockout(ctx context.Context, cfg Config, own string) (steps []string, err error) {
	t, err := newTPM(cfg)
	if err != nil {
		return nil, err
	}
	err = t.transact(ctx, "protection against dictionary attacks", func(x *tx) error {
		if own != "" {
			step, err := x.ownLockout(own)
			if err != nil {
				return err
			}
			steps = append(steps, step)
		}
		s, err := x.lockoutState()
		if err != nil {
			return err
		}
		steps = append(steps, s.String())
		return nil
	})
	_ = t.hangUp()
	return steps, err
}

// lockoutState is how the TPM's protection against dictionary attacks stands: TPM 2.0
// part 1, section 19.8. It counts wrong authorizations for all objects that have it
// (not NoDA), whoever they belong to.
type lockoutState struct {
	tries, max uint32        // failed tries so far, and how many lock
	interval   time.Duration // after which one failed try is forgotten; zero: tries are not counted
	recovery   time.Duration // for which a wrong lockout authorization blocks that one; zero: until the TPM restarts
	locked     bool          // what has the protection is refused now

	// Whether an authorization of the hierarchy is set (TPMA_PERMANENT).
	ownerSet, endorsementSet, lockoutSet bool
}

// left is how many more tries may fail before the TPM locks.
func (s *lockoutState) left() uint32 { return s.max - min(s.tries, s.max) }

func (s *lockoutState) String() string {
	words := fmt.Sprintf("dictionary attack protection of the TPM: locks at %d failed tries, %d are left, forgets one every %v", s.max, s.left(), s.interval)
	if s.interval == 0 {
		words = "dictionary attack protection of the TPM: off, tries are not counted"
	}
	if s.recovery == 0 {
		words += "; a wrong lockout authorization blocks that until the TPM restarts"
	} else {
		words += fmt.Sprintf("; a wrong lockout authorization blocks that for %v", s.recovery)
	}
	if s.locked {
		words += "; it is locked now"
	}
	if s.ownerSet {
		words += "; an owner authorization is set, and not by us"
	}
	if s.endorsementSet {
		words += "; an endorsement authorization is set, and not by us"
	}
	if s.lockoutSet {
		return words + "; a lockout authorization is set: who has it may reset the count and clear the TPM"
	}
	return words + "; no lockout authorization is set: root on this host may reset the count and clear the TPM"
}

// lockoutState reads it, in a session that proves who answers.
func (x *tx) lockoutState() (*lockoutState, error) {
	permanent, err := x.properties(tpm2.TPMPTPermanent, 1)
	if err != nil {
		return nil, err
	}
	v, err := x.properties(tpm2.TPMPTLockoutCounter, 4) // and those that follow it
	if err != nil {
		return nil, err
	}
	bit := func(n int) bool { return permanent[0]>>n&1 == 1 } // TPM 2.0 part 2, section 8.6
	seconds := func(n uint32) time.Duration { return time.Duration(n) * time.Second }
	return &lockoutState{
		tries: v[0], max: v[1], interval: seconds(v[2]), recovery: seconds(v[3]),
		ownerSet: bit(0), endorsementSet: bit(1), lockoutSet: bit(2), locked: bit(9),
	}, nil
}

// properties reads n properties that have numbers in sequence.
func (x *tx) properties(first tpm2.TPMPT, n int) ([]uint32, error) {
	rsp, err := run(x, tpm2.GetCapability{
		Capability: tpm2.TPMCapTPMProperties, Property: uint32(first), PropertyCount: uint32(n),
	}, x.srk.witness())
	if err != nil {
		return nil, err
	}
	list, err := rsp.CapabilityData.Data.TPMProperties()
	if err != nil {
		return nil, x.distrust("TPM2_GetCapability", err)
	}
	var values []uint32
	for i, p := range list.TPMProperty {
		if p.Property == first+tpm2.TPMPT(i) {
			values = append(values, p.Value)
		}
	}
	if len(values) != n {
		return nil, errors.New("the TPM does not say how its protection against dictionary attacks stands")
	}
	return values, nil
}
