package tpm

import (
	"bytes"
	"context"
	"errors"
	"fmt"

	"github.com/google/go-tpm/tpm2"

	"conseal/internal/secret"
)

// Root gives the host's erasable secret, 32 bytes. If none was ever set, the error
// has NoRoot() bool; if the host is in another measured state than when it was
// provisioned, it is a [PCRError], or a [PolicyError] if signed policies say.
func (t *TPM) Root(ctx context.Context) (*secret.Bytes, error) {
	var root *secret.Bytes
	err := t.transact(ctx, "reading the root", func(x *tx) (err error) {
		root, err = x.readRoot()
		return err
	})
	return root, err
}

// SetRoot replaces the root. Once it has returned nil, no earlier root can be had
// from this TPM by anybody. A write that was sent is not given up when ctx ends:
// whatever became of its acknowledgement, the root is read again, and what is
// there decides. That may take some commands' time-out longer than ctx allows; if
// that fails too, the error says that either root may be there.
func (t *TPM) SetRoot(ctx context.Context, next *secret.Bytes) error {
	err := t.setRoot(ctx, next)
	if err != nil {
		return fmt.Errorf("%s: setting the root: %w", t.Name(), err)
	}
	return nil
}

func (t *TPM) setRoot(ctx context.Context, next *secret.Bytes) error {
	if n := next.Len(); n != KeySize {
		return fmt.Errorf("a root has %d bytes, not %d", KeySize, n)
	}
	release, err := t.acquire(ctx)
	if err != nil {
		return err
	}
	defer release()
	sent := false
	err = t.verified(ctx, func(x *tx) error { return x.writeRoot(next, &sent) })
	if err == nil || !sent {
		return err
	}
	return t.settle(context.WithoutCancel(ctx), next, err)
}

// settle finds out what a write did that ended with writeErr. A command still
// under way cannot take effect later: to connect again ends its sessions.
func (t *TPM) settle(ctx context.Context, next *secret.Bytes, writeErr error) error {
	_ = t.hangUp()
	var root *secret.Bytes
	err := t.verified(ctx, func(x *tx) (err error) {
		root, err = x.readRoot()
		return err
	})
	var none *noRootError
	switch {
	case errors.As(err, &none):
		return fmt.Errorf("%w (there is still none)", writeErr)
	case err != nil:
		return fmt.Errorf("%w (and reading it again failed, so that it may be the old or the new one: %w)", writeErr, err)
	}
	defer root.Wipe()
	if root.Equal(next) {
		return nil
	}
	return fmt.Errorf("%w (the old one is still there)", writeErr)
}

func (x *tx) readRoot() (*secret.Bytes, error) {
	name, err := x.rootName()
	if err != nil {
		return nil, err
	}
	var root *secret.Bytes
	err = x.under(x.rule, func(session tpm2.Session) error {
		index := tpm2.TPMHandle(x.cfg.NVRoot)
		rsp, err := run(x, tpm2.NVRead{
			AuthHandle: tpm2.AuthHandle{Handle: index, Name: name, Auth: session},
			NVIndex:    tpm2.NamedHandle{Handle: index, Name: name},
			Size:       KeySize,
		}, x.srk.encryptOut())
		if errors.Is(err, tpm2.TPMRCNVUninitialized) {
			return &noRootError{x.cfg.NVRoot}
		}
		if err != nil {
			return err
		}
		defer clear(rsp.Data.Buffer)
		if n := len(rsp.Data.Buffer); n != KeySize {
			return x.distrust("TPM2_NV_Read", fmt.Errorf("%d bytes, not %d", n, KeySize))
		}
		root = secret.Copy(rsp.Data.Buffer)
		return nil
	})
	if err != nil {
		root.Wipe() // the PIN was taken, and that could not be noted
		return nil, err
	}
	return root, nil
}

// writeRoot sets sent as soon as the write may have an effect.
func (x *tx) writeRoot(next *secret.Bytes, sent *bool) error {
	name, err := x.rootName()
	if err != nil {
		return err
	}
	return x.under(x.rule, func(session tpm2.Session) error {
		if err := x.ctx.Err(); err != nil {
			return err
		}
		x.ctx = context.WithoutCancel(x.ctx) // from here the command's time-out alone
		return next.Use(func(b []byte) error {
			index := tpm2.TPMHandle(x.cfg.NVRoot)
			data := bytes.Clone(b) // go-tpm takes no promise not to change it
			defer clear(data)
			*sent = true
			_, err := run(x, tpm2.NVWrite{
				AuthHandle: tpm2.AuthHandle{Handle: index, Name: name, Auth: session},
				NVIndex:    tpm2.NamedHandle{Handle: index, Name: name},
				Data:       tpm2.TPM2BMaxNVBuffer{Buffer: data},
			}, x.srk.encryptIn())
			return err
		})
	})
}

// rootPublic is the NV index of the root: to be read and written under the rule
// only, whole, and by nobody's password.
func (x *tx) rootPublic(written bool) (tpm2.TPMSNVPublic, error) {
	digest, err := x.rule.authPolicy()
	return tpm2.TPMSNVPublic{
		NVIndex: tpm2.TPMHandle(x.cfg.NVRoot),
		NameAlg: tpm2.TPMAlgSHA256,
		Attributes: tpm2.TPMANV{
			PolicyRead:  true,
			PolicyWrite: true,
			WriteAll:    true,
			NoDA:        x.pin == nil,
			Written:     written,
			NT:          tpm2.TPMNTOrdinary,
		},
		AuthPolicy: tpm2.TPM2BDigest{Buffer: digest},
		DataSize:   KeySize,
	}, err
}

// readIndex reads what is defined at an NV index; nil if nothing is, which the TPM says
// in a session that proves it.
func (x *tx) readIndex(index uint32) (*tpm2.TPMSNVPublic, error) {
	rsp, err := run(x, tpm2.NVReadPublic{NVIndex: tpm2.TPMHandle(index)})
	var refused *CommandError
	if errors.As(err, &refused) && refused.RC.Is(tpm2.TPMRCHandle) {
		return nil, x.noIndex(index)
	}
	if err != nil {
		return nil, err
	}
	public, err := rsp.NVPublic.Contents()
	if err != nil {
		return nil, x.distrust("TPM2_NV_ReadPublic", err)
	}
	return public, nil
}

// noIndex makes sure that an index is not defined, as a refusal could be anybody's on the
// bus: a root would pass for lost, or for withdrawn.
func (x *tx) noIndex(index uint32) error {
	rsp, err := run(x, tpm2.GetCapability{Capability: tpm2.TPMCapHandles, Property: index, PropertyCount: 1}, x.srk.witness())
	if err != nil {
		return err
	}
	list, err := rsp.CapabilityData.Data.Handles() // that one, or the next
	if err != nil {
		return x.distrust("TPM2_GetCapability", err)
	}
	if len(list.Handle) > 0 && list.Handle[0] == tpm2.TPMHandle(index) {
		return x.distrust("TPM2_NV_ReadPublic", fmt.Errorf("NV index %#x is defined, and was said not to be", index))
	}
	return nil
}

// rootName is the name of the root's index as we defined it. It is computed and
// goes into the HMAC of each use, so that an index that the owner defined anew
// with weaker attributes is neither read nor written.
func (x *tx) rootName() (tpm2.TPM2BName, error) {
	var none tpm2.TPM2BName
	found, err := x.readIndex(x.cfg.NVRoot)
	if err != nil {
		return none, err
	}
	if found == nil {
		return none, fail(ClassLost, "NV index %#x is not defined any more: the TPM's owner removed it and the root with it, "+
			"and the shares under it are lost; provision anew and reshare the host's keys", x.cfg.NVRoot)
	}
	ours, err := x.rootPublic(found.Attributes.Written)
	if err != nil {
		return none, err
	}
	if !bytes.Equal(tpm2.Marshal(ours), tpm2.Marshal(*found)) {
		return none, fail(ClassLost, "NV index %#x is not the one that was provisioned. Either the configuration changed since then (the host's name, "+
			"its policy key, the index of its counter, whether it has a PIN): put it back. Or somebody defined the index anew, the root is gone "+
			"and the shares under it are lost: provision anew with a free index and reshare the host's keys", x.cfg.NVRoot)
	}
	name, err := tpm2.NVName(&ours)
	if err != nil {
		return none, err
	}
	return *name, nil
}
