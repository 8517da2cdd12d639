package tpm

import (
	"bytes"
	"context"
	"fmt"

	"github.com/google/go-tpm/tpm2"
)

// Provisioned is what a host has in its TPM. None of it is secret, and all of it
// is to be kept with the host's state: nothing opens without it.
type Provisioned struct {
	SRKName   []byte         // pins the TPM: Config.SRKName
	NVRoot    uint32         // the NV index of the root
	PCRWanted map[int][]byte // the measured state in which the root opens: Config.PCRWanted
	Identity  []byte         // blob for [TPM.Identity]
	Steps     []string       // for the operator: what was made and what was there
}

// Provision makes what a host needs in its TPM, or finds it there: the storage
// root key at a persistent handle, the NV index of the root under the present
// values of the PCRs, the counter of receipts, and the identity key. Run again, also
// after a crash, it makes what is missing. It evicts, undefines and resets nothing,
// and leaves passwords and dictionary attack parameters alone: see [Lockout].
//
// Give what an earlier run returned in cfg.SRKName, PCRWanted and Identity. A TPM
// that was cleared since is then refused, rather than taken for a new one.
func Provision(ctx context.Context, cfg Config) (Provisioned, error) {
	t, err := newTPM(cfg)
	if err != nil {
		return Provisioned{}, err
	}
	var p Provisioned
	err = t.attempt(ctx, func(x *tx) error { return x.provision(&p) })
	_ = t.hangUp() // what was made is in NV memory already
	if err != nil {
		return Provisioned{}, fmt.Errorf("%s: provisioning: %w", t.Name(), err)
	}
	return p, nil
}

func (x *tx) provision(p *Provisioned) error {
	if err := x.checkBank(x.cfg.PCRs); err != nil {
		return err
	}
	note := func(made bool, format string, a ...any) {
		state := "already there"
		if made {
			state = "made"
		}
		p.Steps = append(p.Steps, fmt.Sprintf(format, a...)+": "+state)
	}
	made, err := x.provideSRK()
	if err != nil {
		return err
	}
	p.SRKName = bytes.Clone(x.srk.name.Buffer)
	note(made, "storage root key %.6x… at handle %#x", p.SRKName[2:], uint32(x.srk.handle))

	if x.authority != nil {
		if made, err = x.provideCounter(); err != nil {
			return err
		}
		note(made, "NV counter %#x of revocations", x.authority.Counter)
	}
	made, err = x.provideRoot()
	if err != nil {
		return err
	}
	p.NVRoot = x.cfg.NVRoot
	if x.authority != nil {
		note(made, "NV index %#x for the root, under policies that %s signs", p.NVRoot, x.authority.fingerprint)
	} else {
		p.PCRWanted = x.wanted
		note(made, "NV index %#x for the root, under PCRs %v", p.NVRoot, x.cfg.PCRs)
	}

	if made, err = x.provideReceipts(); err != nil {
		return err
	}
	note(made, "NV counter %#x of receipts", x.cfg.NVReceipts)

	p.Identity = bytes.Clone(x.cfg.Identity)
	if len(p.Identity) == 0 {
		if p.Identity, err = x.makeIdentity(); err != nil {
			return fmt.Errorf("making the identity key: %w", err)
		}
	}
	k, err := decodeIdentity(p.Identity)
	if err == nil {
		err = k.prove(x)
	}
	if err != nil {
		return fmt.Errorf("trying the identity key: %w", err)
	}
	note(len(x.cfg.Identity) == 0, "identity key")
	return nil
}

// provideSRK finds the SRK at one of its handles or makes it persistent at the
// first that is free, and tells which.
func (x *tx) provideSRK() (made bool, err error) {
	if len(x.cfg.SRKName) > 0 {
		if err := x.verifySRK(); err == nil { // needs no owner authorization
			return false, nil
		} else if x.conn.broken || ClassOf(err) == ClassLost {
			return false, err
		}
	}
	err = x.withPrimary(func(primary *srk) error {
		for _, h := range x.srkHandles() {
			found, err := x.readSRK(h)
			if err != nil {
				return err
			}
			switch {
			case found == nil:
				made = true
				return x.persist(primary, h)
			case bytes.Equal(found.name.Buffer, primary.name.Buffer):
				x.srk = found
				return nil
			}
		}
		return fmt.Errorf("handles %#x have other keys, which are left alone: configure a free persistent handle for the storage root key", x.srkHandles())
	})
	return made, err
}

func (x *tx) persist(primary *srk, h tpm2.TPMHandle) error {
	_, err := run(x, tpm2.EvictControl{
		Auth:             tpm2.TPMRHOwner,
		ObjectHandle:     tpm2.NamedHandle{Handle: primary.handle, Name: primary.name},
		PersistentHandle: h,
	})
	if err != nil {
		return fmt.Errorf("keeping the storage root key at handle %#x: %w", uint32(h), err)
	}
	x.srk = &srk{h, primary.name, primary.public}
	return nil
}

// provideRoot finds or defines the NV index of the root, and sets x.wanted where
// it was not given and no authority says. What an earlier run returned shows that it
// had defined it: it is not made a second time, as its loss would go unseen.
func (x *tx) provideRoot() (made bool, err error) {
	known := x.wanted != nil || x.authority != nil && len(x.cfg.SRKName) > 0
	if x.rule == nil {
		if x.wanted, err = x.readPCRs(x.cfg.PCRs); err != nil {
			return false, err
		}
		x.rule = fixed{x.wanted, x.pin != nil}
	}
	found, err := x.readIndex(x.cfg.NVRoot)
	switch {
	case err != nil:
		return false, err
	case found == nil && known:
		_, err := x.rootName() // says what that means
		return false, err
	case found == nil:
		return true, x.defineRoot()
	}
	if _, err := x.rootName(); err != nil {
		if known {
			return false, err
		}
		return false, fmt.Errorf("NV index %#x is in use, by something else or by a root made in another measured state: "+
			"configure a free index, or give what provisioning returned when it made this one", x.cfg.NVRoot)
	}
	return false, nil
}

func (x *tx) defineRoot() error {
	public, err := x.rootPublic(false)
	if err != nil {
		return err
	}
	if err := x.define(public); err != nil {
		return fmt.Errorf("defining NV index %#x: %w", x.cfg.NVRoot, err)
	}
	_, err = x.rootName()
	return err
}

// define makes an NV index with the host's PIN, if it has one.
func (x *tx) define(public tpm2.TPMSNVPublic) error {
	return x.withPIN(func(auth []byte) error {
		_, err := run(x, tpm2.NVDefineSpace{
			AuthHandle: tpm2.TPMRHOwner, Auth: tpm2.TPM2BAuth{Buffer: auth}, PublicInfo: tpm2.New2B(public),
		}, x.srk.encryptIn())
		return err
	})
}
