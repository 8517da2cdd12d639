package attest

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/sha256"
	"errors"
	"fmt"

	"github.com/google/go-tpm/tpm2"

	"conseal/tpm/policy"
)

// Sealing is a TPM's word that it made a sealed key, and so in which states alone that
// opens (TPM2_CertifyCreation, TPM 2.0 part 3, section 18.3). All of it is public.
type Sealing struct {
	Public            []byte // TPMT_PUBLIC of the sealed data object
	Attest, Signature []byte // TPMS_ATTEST, TPMT_SIGNATURE
}

// Verify checks a sealing: that the TPM of ak, which is from an [Attested], made the
// object, that the object opens under authPolicy and in no other way
// ([policy.Host.AuthPolicy]), and that it was certified for this nonce, which the
// verifier draws anew each time. pin says whether the object is one as hosts with a PIN
// make it, for which the TPM counts wrong ones; that its PIN is not empty, or not known to
// everybody, a TPM does not tell. Nor does it tell that the host's shares are under this
// key, and that nobody kept it when it was sealed: that is for the host to do.
func (s *Sealing) Verify(ak *ecdsa.PublicKey, nonce, authPolicy []byte, pin bool) error {
	if ak == nil || len(nonce) < nonceSize || len(authPolicy) != sha256.Size {
		return errors.New("a sealing is checked by an attestation key, a nonce of 32 bytes and the digest of a policy")
	}
	p, err := public(s.Public)
	if err != nil {
		return fmt.Errorf("sealed key: %w", err)
	}
	unique, err := p.Unique.KeyedHash()
	if err != nil {
		return errors.New("sealed key: it is no sealed data object")
	}
	if !bytes.Equal(tpm2.Marshal(policy.SealedPublic(authPolicy, unique.Buffer, pin)), s.Public) {
		return errors.New("sealed key: it opens under another policy, or in other ways too")
	}
	a, err := statement(ak, nonce, s.Attest, s.Signature, tpm2.TPMSTAttestCreation)
	if err != nil {
		return fmt.Errorf("certification of the sealed key: %w", err)
	}
	created, err := a.Attested.Creation()
	if err != nil {
		return fmt.Errorf("certification of the sealed key: %w", err)
	}
	name, err := tpm2.ObjectName(p)
	if err != nil {
		return err
	}
	if !bytes.Equal(created.ObjectName.Buffer, name.Buffer) {
		return errors.New("the attestation key certifies another sealed key")
	}
	return nil
}
