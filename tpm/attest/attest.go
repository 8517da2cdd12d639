// Package attest is the verifier's side of attestation: what a host's TPM says of
// itself, and how somebody elsewhere makes sure of it. The host's side is
// [conseal/tpm.TPM.Claim] and [conseal/tpm.TPM.Prove].
//
//  1. The host sends a [Claim]: the certificate of its endorsement key (EK), and the
//     public parts of an attestation key (AK) and of its identity key.
//  2. The verifier checks the certificate and sends a [Challenge] that only the TPM of
//     that EK can open, and only for that AK (credential activation, TPM 2.0 part 1,
//     section 24).
//  3. The host sends [Evidence]: a quote of its PCRs and a certification of the identity
//     key, signed by the AK over the verifier's nonce, and a proof that it opened the
//     challenge.
//
// A host that passes has its identity key in a TPM of a maker that the verifier trusts,
// from which the key cannot leave, and its PCRs had the values that it says.
package attest

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/hmac"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/asn1"
	"encoding/binary"
	"errors"
	"fmt"
	"math/big"
	"slices"

	"github.com/google/go-tpm/tpm2"

	"conseal/tpm/policy"
)

// Claim is what a host says of its TPM. All of it is public.
type Claim struct {
	EKCertificate []byte // X.509, DER, as it is in NV memory
	EK            []byte // TPMT_PUBLIC
	AK            []byte // TPMT_PUBLIC
	Identity      []byte // TPMT_PUBLIC
}

// Challenge is for the TPM of one claim.
type Challenge struct {
	Nonce      []byte // goes into the quote and the certification
	Credential []byte // TPM2B_ID_OBJECT's buffer
	Secret     []byte // TPM2B_ENCRYPTED_SECRET's buffer
}

// Evidence answers a challenge.
type Evidence struct {
	Quote, QuoteSignature     []byte       // TPMS_ATTEST, TPMT_SIGNATURE
	Certify, CertifySignature []byte       // of the identity key
	PCRs                      policy.State // what was quoted
	Proof                     []byte       // HMAC of the rest under what the challenge held
}

// Prove fills in the proof that a host makes with what the challenge held.
func (e *Evidence) Prove(held []byte) { e.Proof = e.mac(held) }

func (e *Evidence) mac(key []byte) []byte {
	m := hmac.New(sha256.New, key)
	for _, b := range [][]byte{e.Quote, e.QuoteSignature, e.Certify, e.CertifySignature} {
		m.Write(binary.BigEndian.AppendUint32(nil, uint32(len(b))))
		m.Write(b)
	}
	return m.Sum(nil)
}

// Pending is a challenge that was sent. It is good for one answer.
type Pending struct {
	nonce, held  []byte
	ak           *ecdsa.PublicKey
	identity     *ecdsa.PublicKey
	identityName []byte
}

// Attested is what a host has proved.
type Attested struct {
	Identity *ecdsa.PublicKey
	AK       *ecdsa.PublicKey // signs what the TPM says of itself later
	PCRs     policy.State
	// Resets and restarts of the TPM so far, and its firmware: a host can be asked
	// again whether it has restarted since.
	ResetCount, RestartCount uint32
	Firmware                 uint64
}

// The extensions of EK certificates that crypto/x509 does not know: TCG EK Credential
// Profile for TPM Family 2.0, section 3.
var (
	subjectAltName = asn1.ObjectIdentifier{2, 5, 29, 17} // of directory names only, and critical
	ekUsage        = asn1.ObjectIdentifier{2, 23, 133, 8, 1}
)

const nonceSize = 32

// NewChallenge checks a claim and makes the challenge for it. makers are the
// certificates of TPM makers that are trusted, between those in between.
func NewChallenge(c *Claim, makers, between *x509.CertPool) (*Challenge, *Pending, error) {
	if makers == nil {
		return nil, nil, errors.New("no makers of TPMs are named: the authorities of the web, whom crypto/x509 would trust, vouch for none")
	}
	certificate, err := checkEK(c.EKCertificate, makers, between)
	if err != nil {
		return nil, nil, fmt.Errorf("certificate of the endorsement key: %w", err)
	}
	ek, err := public(c.EK)
	if err != nil {
		return nil, nil, fmt.Errorf("endorsement key: %w", err)
	}
	if err := ekMatches(ek, certificate); err != nil {
		return nil, nil, err
	}
	ak, err := public(c.AK)
	if err != nil {
		return nil, nil, fmt.Errorf("attestation key: %w", err)
	}
	identity, err := public(c.Identity)
	if err != nil {
		return nil, nil, fmt.Errorf("identity key: %w", err)
	}
	// Restricted: it signs nothing that looks as if the TPM had made it but what the TPM made.
	a := ak.ObjectAttributes
	if !a.FixedTPM || !a.FixedParent || !a.SensitiveDataOrigin || !a.Restricted || !a.SignEncrypt || a.Decrypt {
		return nil, nil, fmt.Errorf("the attestation key is no restricted signing key that was made in its TPM and cannot leave it: attributes %+v", a)
	}
	a = identity.ObjectAttributes
	if !a.FixedTPM || !a.FixedParent || !a.SensitiveDataOrigin || !a.SignEncrypt || a.Decrypt || a.Restricted {
		return nil, nil, fmt.Errorf("the identity key is no signing key that was made in its TPM and cannot leave it: attributes %+v", a)
	}
	p := &Pending{nonce: make([]byte, nonceSize), held: make([]byte, nonceSize)}
	rand.Read(p.nonce)
	rand.Read(p.held)
	if p.ak, err = ecdsaP256(ak); err != nil {
		return nil, nil, fmt.Errorf("attestation key: %w", err)
	}
	if p.identity, err = ecdsaP256(identity); err != nil {
		return nil, nil, fmt.Errorf("identity key: %w", err)
	}
	name, err := tpm2.ObjectName(identity)
	if err != nil {
		return nil, nil, err
	}
	p.identityName = name.Buffer
	akName, err := tpm2.ObjectName(ak)
	if err != nil {
		return nil, nil, err
	}
	to, err := tpm2.ImportEncapsulationKey(ek)
	if err != nil {
		return nil, nil, fmt.Errorf("endorsement key: %w", err)
	}
	credential, secret, err := tpm2.CreateCredential(rand.Reader, to, akName.Buffer, p.held)
	if err != nil {
		return nil, nil, err
	}
	return &Challenge{p.nonce, credential, secret}, p, nil
}

// Verify checks the answer to a challenge. want are the PCRs that must be quoted; their
// values are for the caller to judge.
func (p *Pending) Verify(e *Evidence, want []int) (*Attested, error) {
	if p.held == nil {
		return nil, errors.New("this challenge was answered before")
	}
	held := p.held
	p.held = nil
	if !hmac.Equal(e.mac(held), e.Proof) {
		return nil, errors.New("the host has not opened the challenge: its attestation key is not in the TPM of its endorsement key, or it answers another challenge")
	}
	quote, err := statement(p.ak, p.nonce, e.Quote, e.QuoteSignature, tpm2.TPMSTAttestQuote)
	if err != nil {
		return nil, fmt.Errorf("quote: %w", err)
	}
	info, err := quote.Attested.Quote()
	if err != nil {
		return nil, fmt.Errorf("quote: %w", err)
	}
	if err := checkPCRs(info, e.PCRs, want); err != nil {
		return nil, err
	}
	certify, err := statement(p.ak, p.nonce, e.Certify, e.CertifySignature, tpm2.TPMSTAttestCertify)
	if err != nil {
		return nil, fmt.Errorf("certification of the identity key: %w", err)
	}
	certified, err := certify.Attested.Certify()
	if err != nil || !bytes.Equal(certified.Name.Buffer, p.identityName) {
		return nil, errors.New("the attestation key certifies another key than the identity key that was claimed")
	}
	return &Attested{
		Identity: p.identity, AK: p.ak, PCRs: e.PCRs,
		ResetCount: quote.ClockInfo.ResetCount, RestartCount: quote.ClockInfo.RestartCount, Firmware: quote.FirmwareVersion,
	}, nil
}

func checkPCRs(info *tpm2.TPMSQuoteInfo, pcrs policy.State, want []int) error {
	if err := pcrs.Check(); err != nil {
		return fmt.Errorf("quote: %w", err)
	}
	if got := pcrs.Indices(); !slices.Equal(got, want) {
		return fmt.Errorf("quote: PCRs %v, wanted %v", got, want)
	}
	wanted := pcrs.Command(0)
	if !bytes.Equal(tpm2.Marshal(info.PCRSelect), tpm2.Marshal(wanted.Pcrs)) {
		return errors.New("quote: it is of other PCRs than the host says")
	}
	if !bytes.Equal(info.PCRDigest.Buffer, wanted.PcrDigest.Buffer) {
		return errors.New("quote: the PCRs have other values than the host says")
	}
	return nil
}

// statement checks what an AK signed: that a TPM made it, of that kind, for this nonce.
func statement(ak *ecdsa.PublicKey, nonce, attest, signature []byte, kind tpm2.TPMST) (*tpm2.TPMSAttest, error) {
	a, err := signed(ak, attest, signature, kind)
	if err == nil && !bytes.Equal(a.ExtraData.Buffer, nonce) {
		return nil, errors.New("it answers another challenge")
	}
	return a, err
}

// signed checks that a TPM made something of a kind, and that the AK signed it.
func signed(ak *ecdsa.PublicKey, attest, signature []byte, kind tpm2.TPMST) (*tpm2.TPMSAttest, error) {
	sig, err := tpm2.Unmarshal[tpm2.TPMTSignature](signature)
	if err != nil {
		return nil, fmt.Errorf("malformed signature: %w", err)
	}
	if !bytes.Equal(tpm2.Marshal(*sig), signature) {
		return nil, errors.New("malformed signature: bytes behind it")
	}
	rs, err := sig.Signature.ECDSA()
	if err != nil || rs.Hash != tpm2.TPMAlgSHA256 {
		return nil, errors.New("its signature is not ECDSA with SHA-256")
	}
	digest := sha256.Sum256(attest)
	if !ecdsa.Verify(ak, digest[:], new(big.Int).SetBytes(rs.SignatureR.Buffer), new(big.Int).SetBytes(rs.SignatureS.Buffer)) {
		return nil, errors.New("its signature is not one of the attestation key")
	}
	a, err := tpm2.Unmarshal[tpm2.TPMSAttest](attest)
	switch {
	case err != nil:
		return nil, fmt.Errorf("malformed: %w", err)
	case !bytes.Equal(tpm2.Marshal(*a), attest):
		return nil, errors.New("malformed: bytes behind it")
	case a.Magic != tpm2.TPMGeneratedValue:
		return nil, errors.New("no TPM made it")
	case a.Type != kind:
		return nil, fmt.Errorf("a statement of kind %#x, not %#x", uint16(a.Type), uint16(kind))
	}
	return a, nil
}

// checkEK verifies the chain of an EK certificate. NV memory may have zeros behind it.
func checkEK(der []byte, makers, between *x509.CertPool) (*x509.Certificate, error) {
	var raw asn1.RawValue
	if _, err := asn1.Unmarshal(der, &raw); err != nil {
		return nil, err
	}
	c, err := x509.ParseCertificate(raw.FullBytes)
	if err != nil {
		return nil, err
	}
	if !slices.ContainsFunc(c.UnknownExtKeyUsage, ekUsage.Equal) {
		return nil, errors.New("it is for something else than an endorsement key")
	}
	c.UnhandledCriticalExtensions = slices.DeleteFunc(c.UnhandledCriticalExtensions, subjectAltName.Equal)
	_, err = c.Verify(x509.VerifyOptions{Roots: makers, Intermediates: between, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}})
	return c, err
}

// ekMatches also wants that an EK decrypts only what credential activation lets it:
// another key of the same certificate does not exist, but other attributes would.
func ekMatches(ek *tpm2.TPMTPublic, c *x509.Certificate) error {
	key, err := tpm2.Pub(*ek)
	if err != nil {
		return fmt.Errorf("endorsement key: %w", err)
	}
	same := false
	switch k := key.(type) {
	case *rsa.PublicKey:
		same = k.Equal(c.PublicKey)
	case *ecdsa.PublicKey:
		same = k.Equal(c.PublicKey)
	}
	a := ek.ObjectAttributes
	if !same || !a.FixedTPM || !a.FixedParent || !a.Restricted || !a.Decrypt || a.SignEncrypt {
		return errors.New("the endorsement key is not the one of its certificate, or no restricted decryption key")
	}
	return nil
}

func public(b []byte) (*tpm2.TPMTPublic, error) {
	p, err := tpm2.Unmarshal[tpm2.TPMTPublic](b)
	if err != nil {
		return nil, err
	}
	if !bytes.Equal(tpm2.Marshal(*p), b) {
		return nil, errors.New("malformed")
	}
	return p, nil
}

func ecdsaP256(p *tpm2.TPMTPublic) (*ecdsa.PublicKey, error) {
	key, err := tpm2.Pub(*p)
	if err != nil {
		return nil, err
	}
	k, ok := key.(*ecdsa.PublicKey)
	if !ok || k.Curve != elliptic.P256() || p.NameAlg != tpm2.TPMAlgSHA256 {
		return nil, errors.New("not ECDSA on P-256 with SHA-256 names")
	}
	return k, nil
}
