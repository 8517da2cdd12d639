package attest

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/sha256"
	"encoding/asn1"
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/google/go-tpm/tpm2"
)

// Receipt is what a host's TPM says of the counter of its receipts, which it counted up
// for one statement ([conseal/tpm.TPM.Receipt]). All of it is public.
//
// It proves that a statement was made on that TPM, in a state that the counter's policy
// allows, and when: later than all receipts of that counter with lower values. No host can
// make a receipt with a value that the counter has left behind, also not by putting back an
// old disk or by removing the counter and making it anew. So whoever holds the receipt of a
// deletion or of a new epoch cannot be shown the state of before as the present one.
//
// It does not prove that the statement is true: root on a running host in a permitted
// state can have any statement certified, and two with the same value.
type Receipt struct {
	Certified []byte // TPMS_ATTEST
	Signature []byte // TPMT_SIGNATURE
}

// asn1Receipt is a receipt in one piece.
type asn1Receipt struct{ Certified, Signature []byte }

// Encode returns the receipt in one piece, DER.
func (r *Receipt) Encode() ([]byte, error) {
	return asn1.Marshal(asn1Receipt{r.Certified, r.Signature})
}

// DecodeReceipt reads what [Receipt.Encode] wrote and nothing else. It checks nothing that
// the receipt says.
func DecodeReceipt(der []byte) (*Receipt, error) {
	var in asn1Receipt
	rest, err := asn1.Unmarshal(der, &in)
	if err != nil || len(rest) != 0 {
		return nil, errors.Join(fmt.Errorf("decoding a receipt of a TPM: %d bytes too many", len(rest)), err)
	}
	r := &Receipt{Certified: in.Certified, Signature: in.Signature}
	if again, err := r.Encode(); err != nil || !bytes.Equal(again, der) {
		return nil, errors.New("decoding a receipt of a TPM: not in canonical form")
	}
	return r, nil
}

// Counter is the counter of a host's receipts, as its verifiers know it. The TPM's name of
// it, which is in each receipt, binds all fields.
type Counter struct {
	// Index is where it is in NV memory: protector.tpm.nv_receipts of the host.
	Index uint32
	// Policy says in which states it is counted up and certified: AuthPolicy of the
	// [conseal/tpm/policy.Host] if a security team says that, else of the
	// [conseal/tpm/policy.State] in which the host was initialised. The latter is what the
	// host quotes whenever it can make receipts.
	Policy []byte
	// PIN tells whether it is one as hosts with a PIN make it. The TPM does not tell which
	// PIN: the owner can make the counter anew with another.
	PIN bool
}

// counterSize is the length of an NV counter: TPM 2.0 part 2, section 13.2.
const counterSize = 8

// Public is its public area: a counter that nobody's password reads or counts up. written
// tells whether it was ever counted up.
func (c Counter) Public(written bool) tpm2.TPMSNVPublic {
	return tpm2.TPMSNVPublic{
		NVIndex: tpm2.TPMHandle(c.Index),
		NameAlg: tpm2.TPMAlgSHA256,
		Attributes: tpm2.TPMANV{
			PolicyRead:  true,
			PolicyWrite: true,
			NoDA:        !c.PIN,
			Written:     written,
			NT:          tpm2.TPMNTCounter,
		},
		AuthPolicy: tpm2.TPM2BDigest{Buffer: c.Policy},
		DataSize:   counterSize,
	}
}

// ReceiptDigest is what stands for a statement in a receipt.
func ReceiptDigest(statement []byte) []byte {
	d := sha256.Sum256(append([]byte("conseal tpm receipt 1\x00"), statement...))
	return d[:]
}

// VerifyReceipt checks the receipt of a statement, and gives the counter's value. ak is the
// host's attestation key ([Attested.AK]).
//
// The rule for who receives receipts: keep the highest value of each host with its
// statement, and take a receipt for the present state only if its value is higher. The
// same value with another statement, or a lower one, is of before, or of a host that lies,
// or of a TPM whose own memory was set back, as can be done to that of a virtual machine.
// Who needs to know that a receipt was made just now puts a nonce into the statement.
func VerifyReceipt(r *Receipt, ak *ecdsa.PublicKey, c Counter, statement []byte) (value uint64, err error) {
	switch {
	case r == nil || len(statement) == 0:
		return 0, errors.New("no receipt, or one of nothing")
	case ak == nil || ak.Curve != elliptic.P256():
		return 0, errors.New("no attestation key to verify the receipt with")
	case c.Index>>24 != uint32(tpm2.TPMHTNVIndex) || len(c.Policy) != sha256.Size:
		return 0, fmt.Errorf("no counter to verify the receipt for: index %#x, a policy of %d bytes", c.Index, len(c.Policy))
	}
	a, err := signed(ak, r.Certified, r.Signature, tpm2.TPMSTAttestNV)
	if err != nil {
		return 0, fmt.Errorf("receipt: %w", err)
	}
	if !bytes.Equal(a.ExtraData.Buffer, ReceiptDigest(statement)) {
		return 0, errors.New("receipt: it is of another statement")
	}
	info, err := a.Attested.NV()
	if err != nil {
		return 0, fmt.Errorf("receipt: %w", err)
	}
	public := c.Public(true)
	name, err := tpm2.NVName(&public)
	if err != nil {
		return 0, err
	}
	if !bytes.Equal(info.IndexName.Buffer, name.Buffer) {
		return 0, fmt.Errorf("receipt: it is of something else than the counter at NV index %#x under that policy", c.Index)
	}
	if n := len(info.NVContents.Buffer); info.Offset != 0 || n != counterSize {
		return 0, fmt.Errorf("receipt: it is of %d bytes at %d of the counter, not of all %d", n, info.Offset, counterSize)
	}
	return binary.BigEndian.Uint64(info.NVContents.Buffer), nil
}
