package tpm

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"fmt"

	"github.com/google/go-tpm/tpm2"

	"conseal/tpm/attest"
)

// Receipt counts the counter of receipts up and has the TPM certify its value together
// with a statement: what that proves is said at [attest.Receipt], and
// [attest.VerifyReceipt] checks it. It is allowed in the states in which the root opens.
// Each receipt is one write to NV memory, of which a TPM endures some 100,000. If it fails
// the counter may have moved; the next receipt has a higher value then.
func (t *TPM) Receipt(ctx context.Context, statement []byte) (*attest.Receipt, error) {
	if len(statement) == 0 {
		return nil, fmt.Errorf("%s: making a receipt: of an empty statement", t.Name())
	}
	var r *attest.Receipt
	err := t.transact(ctx, "making a receipt", func(x *tx) error {
		return x.withEndorsement(akTemplate(), func(ak tpm2.NamedHandle, public *tpm2.TPMTPublic) (err error) {
			if err := x.countReceipts(); err != nil {
				return err
			}
			if r, err = x.certifyReceipts(ak, statement); err != nil {
				return err
			}
			return x.checkReceipt(r, public, statement)
		})
	})
	if err != nil {
		return nil, err
	}
	return r, nil
}

func (x *tx) countReceipts() error {
	name, err := x.receiptsName()
	if err != nil {
		return err
	}
	return x.under(x.rule, func(session tpm2.Session) error {
		index := tpm2.TPMHandle(x.cfg.NVReceipts)
		_, err := run(x, tpm2.NVIncrement{
			AuthHandle: tpm2.AuthHandle{Handle: index, Name: name, Auth: session},
			NVIndex:    tpm2.NamedHandle{Handle: index, Name: name},
		}, x.srk.witness())
		return err
	})
}

func (x *tx) certifyReceipts(ak tpm2.NamedHandle, statement []byte) (r *attest.Receipt, err error) {
	name, err := x.receiptsName() // another than before the counter was first counted up
	if err != nil {
		return nil, err
	}
	err = x.under(x.rule, func(session tpm2.Session) error {
		index := tpm2.TPMHandle(x.cfg.NVReceipts)
		rsp, err := run(x, tpm2.NVCertify{
			SignHandle:     tpm2.AuthHandle{Handle: ak.Handle, Name: ak.Name, Auth: tpm2.PasswordAuth(nil)},
			AuthHandle:     tpm2.AuthHandle{Handle: index, Name: name, Auth: session},
			NVIndex:        tpm2.NamedHandle{Handle: index, Name: name},
			QualifyingData: tpm2.TPM2BData{Buffer: attest.ReceiptDigest(statement)},
			InScheme:       tpm2.TPMTSigScheme{Scheme: tpm2.TPMAlgNull},
			Size:           8,
		}, x.srk.witness())
		if err != nil {
			return err
		}
		r = &attest.Receipt{Certified: bytes.Clone(rsp.CertifyInfo.Bytes()), Signature: tpm2.Marshal(rsp.Signature)}
		return nil
	})
	return r, err
}

// checkReceipt makes sure that others will take it.
func (x *tx) checkReceipt(r *attest.Receipt, ak *tpm2.TPMTPublic, statement []byte) error {
	c, err := x.receiptsCounter()
	if err != nil {
		return err
	}
	key, err := tpm2.Pub(*ak)
	if err != nil {
		return x.distrust("TPM2_CreatePrimary", err)
	}
	public, _ := key.(*ecdsa.PublicKey)
	if _, err := attest.VerifyReceipt(r, public, c, statement); err != nil {
		return x.distrust("TPM2_NV_Certify", err)
	}
	return nil
}

// receiptsCounter is the counter as verifiers know it, under the rule of the root.
func (x *tx) receiptsCounter() (attest.Counter, error) {
	policy, err := x.rule.authPolicy()
	return attest.Counter{Index: x.cfg.NVReceipts, Policy: policy, PIN: x.pin != nil}, err
}

// receiptsName is the name of the counter as we defined it.
func (x *tx) receiptsName() (tpm2.TPM2BName, error) {
	var none tpm2.TPM2BName
	found, err := x.readIndex(x.cfg.NVReceipts)
	if err != nil {
		return none, err
	}
	if found == nil {
		return none, fail(ClassLost, "NV counter %#x of receipts is not defined: the host was provisioned before there were receipts, or the TPM's owner removed it; "+
			"no share is lost: provision again, and it starts above all values that it had", x.cfg.NVReceipts)
	}
	c, err := x.receiptsCounter()
	if err != nil {
		return none, err
	}
	ours := c.Public(found.Attributes.Written)
	if !bytes.Equal(tpm2.Marshal(ours), tpm2.Marshal(*found)) {
		return none, fail(ClassLost, "NV index %#x is not the counter of receipts of this host and policy: "+
			"configure a free index for it and provision again, or put back the configuration that it was provisioned with", x.cfg.NVReceipts)
	}
	name, err := tpm2.NVName(&ours)
	if err != nil {
		return none, err
	}
	return *name, nil
}

// provideReceipts finds or defines the counter. The first receipt counts it up for the
// first time: that needs a permitted state, in which a host may not be yet.
func (x *tx) provideReceipts() (made bool, err error) {
	found, err := x.readIndex(x.cfg.NVReceipts)
	if err != nil {
		return false, err
	}
	if found == nil {
		c, err := x.receiptsCounter()
		if err != nil {
			return false, err
		}
		if err := x.define(c.Public(false)); err != nil {
			return false, fmt.Errorf("defining NV counter %#x of receipts: %w", x.cfg.NVReceipts, err)
		}
	}
	_, err = x.receiptsName()
	return found == nil, err
}

// checkIndices wants an NV index for each purpose.
func (c *Config) checkIndices() error {
	used := map[uint32]bool{}
	indices := []uint32{c.NVRoot, c.NVReceipts}
	if c.Authority != nil {
		indices = append(indices, c.Authority.Counter)
	}
	for _, i := range indices {
		if i>>24 != uint32(tpm2.TPMHTNVIndex) {
			return fmt.Errorf("tpm: %#x is not an NV index: those are 0x01000000 to 0x01ffffff", i)
		}
		if used[i] {
			return fmt.Errorf("tpm: NV index %#x is given twice: root, receipts and revocations need one each", i)
		}
		used[i] = true
	}
	return nil
}
