package tpm

import (
	"context"
	"fmt"

	"github.com/google/go-tpm/tpm2"
)

// Withdraw takes what [Provision] made out of the TPM, the storage root key excepted,
// which others may use: the root is gone then, and with it whatever needs the root. Blobs
// that somebody kept still load: the identity key signs, and what was sealed in one
// measured state opens in that. With signed policies it does not, while their counter is gone. It
// removes only what is this host's, may be run again after a crash, and says what it
// did. cfg is as for Open.
func Withdraw(ctx context.Context, cfg Config) (steps []string, err error) {
	t, err := newTPM(cfg)
	if err != nil {
		return nil, err
	}
	err = t.transact(ctx, "withdrawing", func(x *tx) error {
		steps, err = x.withdraw()
		return err
	})
	_ = t.hangUp() // what was removed is out of NV memory already
	return steps, err
}

func (x *tx) withdraw() (steps []string, err error) {
	remove := func(what string, index uint32, name func() (tpm2.TPM2BName, error)) error {
		found, err := x.readIndex(index)
		if err != nil {
			return err
		}
		if found == nil {
			steps = append(steps, fmt.Sprintf("NV index %#x of the %s: already gone", index, what))
			return nil
		}
		n, err := name()
		if err != nil {
			return err
		}
		_, err = run(x, tpm2.NVUndefineSpace{
			AuthHandle: tpm2.AuthHandle{Handle: tpm2.TPMRHOwner, Auth: tpm2.PasswordAuth(nil)},
			NVIndex:    tpm2.NamedHandle{Handle: tpm2.TPMHandle(index), Name: n},
		}, x.srk.witness())
		if err != nil {
			return fmt.Errorf("removing NV index %#x of the %s: %w", index, what, err)
		}
		steps = append(steps, fmt.Sprintf("NV index %#x of the %s: removed", index, what))
		return nil
	}
	if err := remove("root", x.cfg.NVRoot, x.rootName); err != nil {
		return steps, err
	}
	if err := remove("counter of receipts", x.cfg.NVReceipts, x.receiptsName); err != nil {
		return steps, err
	}
	if x.authority != nil {
		err := remove("counter of revocations", x.authority.Counter, func() (tpm2.TPM2BName, error) {
			n, _, err := x.authority.counterName(x)
			return n, err
		})
		if err != nil {
			return steps, err
		}
	}
	steps = append(steps, fmt.Sprintf("storage root key at handle %#x: left, others may use it", uint32(x.srk.handle)))
	s, err := x.lockoutState()
	if err == nil && s.lockoutSet {
		steps = append(steps, "lockout authorization and parameters: left; who has the former may take it away (tpm2_changeauth -c lockout -p file:FILE)")
	}
	return steps, err
}
