package policy

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"math/big"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"

	"encoding/asn1"

	"github.com/google/go-tpm/tpm2"
	"github.com/pelletier/go-toml/v2"
)

// Policy lets a host's TPM open what it guards while the host is in State and the
// counter of revocations is at most Version.
type Policy struct {
	Host    string
	Counter uint32 // NV index
	Version uint64
	State   State
	PIN     bool      // the host's PIN is wanted too
	Comment string    // for people: what this state is
	Signed  time.Time // as the signer's clock had it

	signatures
}

// Revocation ends all policies of a host whose version is less than Below.
type Revocation struct {
	Host    string
	Counter uint32 // NV index
	Below   uint64
	Comment string
	Signed  time.Time

	signatures
}

// signatures are r and s, 32 bytes each: one for the TPM, which sees a digest of what
// is allowed, and one of the whole document, so that who reads it reads the truth.
type signatures struct{ tpm, document [64]byte }

// MaxDocument bounds a document in bytes, and maxComment the comment in it.
const (
	MaxDocument = 16 << 10
	maxComment  = 200
)

// MaxSteps bounds how far one revocation counts: each step wears NV memory. A policy whose
// version is further above the counter could hardly be revoked.
const MaxSteps = 1000

// Signature is what the TPM checks over [Host.Digest].
func (s *signatures) Signature() tpm2.TPMTSignature {
	return tpm2.TPMTSignature{
		SigAlg: tpm2.TPMAlgECDSA,
		Signature: tpm2.NewTPMUSignature(tpm2.TPMAlgECDSA, &tpm2.TPMSSignatureECC{
			Hash:       tpm2.TPMAlgSHA256,
			SignatureR: tpm2.TPM2BECCParameter{Buffer: s.tpm[:32]},
			SignatureS: tpm2.TPM2BECCParameter{Buffer: s.tpm[32:]},
		}),
	}
}

// Fingerprint names a policy key: SHA-256 of its SubjectPublicKeyInfo, in base64.
func Fingerprint(key *ecdsa.PublicKey) (string, error) {
	spki, err := x509.MarshalPKIXPublicKey(key)
	d := sha256.Sum256(spki)
	return "SHA256:" + base64.RawStdEncoding.EncodeToString(d[:]), err
}

// statement is a Policy or a Revocation.
type statement interface {
	host() Host // without the key
	role() string
	// approved is the digest of the policy that a signature approves.
	approved(*Host) ([]byte, error)
	text() string
	check() error
	sigs() *signatures
}

func (p *Policy) host() Host        { return Host{Name: p.Host, Counter: p.Counter} }
func (p *Policy) role() string      { return roleOpen }
func (p *Policy) sigs() *signatures { return &p.signatures }

func (p *Policy) approved(h *Host) ([]byte, error) {
	notRevoked, err := h.counterIs(0, tpm2.TPMEOUnsignedLE, p.Version)
	if err != nil {
		return nil, err
	}
	steps := []step{p.State.Command(0), notRevoked}
	if p.PIN {
		steps = append(steps, tpm2.PolicyAuthValue{})
	}
	return digest(steps...)
}

// Steps are the commands that satisfy the policy in a session, but for TPM2_PolicyAuthValue
// where it wants the PIN, and TPM2_PolicyAuthorize, which follow.
func (p *Policy) Steps(h *Host, session tpm2.TPMHandle) (tpm2.PolicyPCR, tpm2.PolicyNV, error) {
	notRevoked, err := h.counterIs(session, tpm2.TPMEOUnsignedLE, p.Version)
	return p.State.Command(session), notRevoked, err
}

func (r *Revocation) host() Host        { return Host{Name: r.Host, Counter: r.Counter} }
func (r *Revocation) role() string      { return roleRevoke }
func (r *Revocation) sigs() *signatures { return &r.signatures }

func (r *Revocation) approved(h *Host) ([]byte, error) {
	below, countUp, err := r.Steps(h, 0)
	if err != nil {
		return nil, err
	}
	return digest(below, countUp)
}

// Steps are the commands that satisfy the revocation in a session, all but the last.
func (r *Revocation) Steps(h *Host, session tpm2.TPMHandle) (tpm2.PolicyNV, tpm2.PolicyCommandCode, error) {
	below, err := h.counterIs(session, tpm2.TPMEOUnsignedLT, r.Below)
	return below, tpm2.PolicyCommandCode{PolicySession: session, Code: tpm2.TPMCCNVIncrement}, err
}

// Approval is what a TPM needs to take a statement for the key's (TPM2_PolicyAuthorize).
type Approval struct {
	Policy, Ref []byte // approved policy and policyRef
	Digest      []byte // of both, which the signature is over
	Signature   tpm2.TPMTSignature
}

func approval(s statement, h *Host) (*Approval, error) {
	approved, err := s.approved(h)
	if err != nil {
		return nil, err
	}
	ref := h.ref(s.role())
	d := sha256.Sum256(append(bytes.Clone(approved), ref...))
	return &Approval{approved, ref, d[:], s.sigs().Signature()}, nil
}

// Approval is for the host's TPM.
func (p *Policy) Approval(h *Host) (*Approval, error) { return approval(p, h) }

// Approval is for the host's TPM.
func (r *Revocation) Approval(h *Host) (*Approval, error) { return approval(r, h) }

// Sign signs a policy with the security team's key and returns the document.
func (p *Policy) Sign(key crypto.Signer) ([]byte, error) { return sign(p, key) }

// Sign signs a revocation with the security team's key and returns the document.
func (r *Revocation) Sign(key crypto.Signer) ([]byte, error) { return sign(r, key) }

func sign(s statement, signer crypto.Signer) ([]byte, error) {
	if err := s.check(); err != nil {
		return nil, err
	}
	public, ok := signer.Public().(*ecdsa.PublicKey)
	if !ok {
		return nil, fmt.Errorf("the policy key is a %T: it must be ECDSA on P-256", signer.Public())
	}
	h := s.host()
	h.Key = public
	a, err := approval(s, &h)
	if err != nil {
		return nil, err
	}
	name, err := Fingerprint(public)
	if err != nil {
		return nil, err
	}
	whole := sha256.Sum256([]byte(s.text()))
	for _, todo := range []struct {
		digest []byte
		to     *[64]byte
	}{{a.Digest, &s.sigs().tpm}, {whole[:], &s.sigs().document}} {
		der, err := signer.Sign(rand.Reader, todo.digest, crypto.SHA256)
		if err != nil {
			return nil, fmt.Errorf("signing with the policy key: %w", err)
		}
		var rs struct{ R, S *big.Int }
		if rest, err := asn1.Unmarshal(der, &rs); err != nil || len(rest) > 0 || !ecdsa.VerifyASN1(public, todo.digest, der) {
			return nil, errors.New("the policy key made a signature that does not verify")
		}
		rs.R.FillBytes(todo.to[:32])
		rs.S.FillBytes(todo.to[32:])
	}
	return document(s, name), nil
}

// document is a signed statement as it is written.
func document(s statement, key string) []byte {
	return fmt.Appendf(nil, "%s\n[signature]\nkey = %q\ntpm = \"%x\"\ndocument = \"%x\"\n", s.text(), key, s.sigs().tpm, s.sigs().document)
}

const (
	kindPolicy     = "conseal seal policy 1"
	kindRevocation = "conseal seal revocation 1"
)

func (p *Policy) check() error {
	if err := p.State.Check(); err != nil {
		return err
	}
	return checkCommon(p.Host, p.Comment, p.Counter)
}

func (r *Revocation) check() error {
	if r.Below == 0 {
		return errors.New("no policy has a version below 0")
	}
	return checkCommon(r.Host, r.Comment, r.Counter)
}

func checkCommon(host, comment string, counter uint32) error {
	switch {
	case host == "" || strings.ContainsFunc(host, func(r rune) bool { return !unicode.IsPrint(r) || r == '"' || r == '\\' }):
		return fmt.Errorf("%q is no name of a host", host)
	case len(comment) > maxComment || strings.ContainsFunc(comment, func(r rune) bool { return !unicode.IsPrint(r) }):
		return fmt.Errorf("the comment has more than %d bytes or what cannot be printed", maxComment)
	case counter>>24 != uint32(tpm2.TPMHTNVIndex):
		return fmt.Errorf("counter %#x is not an NV index: those are 0x01000000 to 0x01ffffff", counter)
	}
	return nil
}

func (p *Policy) text() string {
	var b strings.Builder
	fmt.Fprintf(&b, "# Lets host %q open what its TPM guards in this measured state, until version %d is revoked.\n", p.Host, p.Version)
	fmt.Fprintf(&b, "kind = %q\nhost = %q\nversion = %d\ncomment = %q\nsigned = %q\ncounter = \"%#08x\"\n",
		kindPolicy, p.Host, p.Version, p.Comment, p.Signed.UTC().Format(time.RFC3339), p.Counter)
	writePIN(&b, p.PIN)
	b.WriteString("\n[pcrs] # SHA-256 bank\n")
	writeState(&b, p.State)
	return b.String()
}

func (r *Revocation) text() string {
	return fmt.Sprintf("# Ends all seal policies of host %q below version %d, for good.\n"+
		"kind = %q\nhost = %q\nbelow = %d\ncomment = %q\nsigned = %q\ncounter = \"%#08x\"\n",
		r.Host, r.Below, kindRevocation, r.Host, r.Below, r.Comment, r.Signed.UTC().Format(time.RFC3339), r.Counter)
}

// writePIN leaves the line out where there is no PIN.
func writePIN(b *strings.Builder, pin bool) {
	if pin {
		b.WriteString("pin = true\n")
	}
}

func writeState(b *strings.Builder, s State) {
	for _, i := range s.Indices() {
		fmt.Fprintf(b, "%d = \"%x\" # %s\n", i, s[i], PCRWords(i))
	}
}

// file is what a document's TOML holds.
type file struct {
	Kind      string            `toml:"kind"`
	Host      string            `toml:"host"`
	Version   *uint64           `toml:"version"`
	Below     *uint64           `toml:"below"`
	Comment   string            `toml:"comment"`
	Signed    string            `toml:"signed"`
	Counter   string            `toml:"counter"`
	PIN       bool              `toml:"pin"`
	PCRs      map[string]string `toml:"pcrs"`
	Signature struct {
		Key      string `toml:"key"`
		TPM      string `toml:"tpm"`
		Document string `toml:"document"`
	} `toml:"signature"`
}

// Parse reads a document that key has signed: a *Policy or a *Revocation. A document
// that it accepts is byte for byte what Sign made.
func Parse(b []byte, key *ecdsa.PublicKey) (any, error) {
	if len(b) > MaxDocument {
		return nil, fmt.Errorf("%d bytes are no seal policy", len(b))
	}
	var f file
	if err := decode(b, &f, kindPolicy, kindRevocation); err != nil {
		return nil, fmt.Errorf("not a signed seal policy: %w", err)
	}
	s, err := f.statement()
	if err != nil {
		return nil, err
	}
	if err := s.check(); err != nil {
		return nil, err
	}
	want, err := Fingerprint(key)
	if err != nil {
		return nil, err
	}
	if f.Signature.Key != want {
		return nil, fmt.Errorf("signed by key %q, not by the policy key %s", f.Signature.Key, want)
	}
	if !bytes.Equal(b, document(s, want)) {
		return nil, errors.New("its text was changed after it was made")
	}
	h := s.host()
	h.Key = key
	a, err := approval(s, &h)
	if err != nil {
		return nil, err
	}
	whole := sha256.Sum256([]byte(s.text()))
	if !verify(key, whole[:], s.sigs().document) || !verify(key, a.Digest, s.sigs().tpm) {
		return nil, fmt.Errorf("its signature is not one of the policy key %s", want)
	}
	return s, nil
}

// decode reads TOML of one of some kinds, with no field but those that it has.
func decode(b []byte, to any, kinds ...string) error {
	var of struct {
		Kind any `toml:"kind"`
	}
	if err := toml.Unmarshal(b, &of); err != nil {
		return err
	}
	if kind, ok := of.Kind.(string); !ok || !slices.Contains(kinds, kind) {
		return fmt.Errorf("its kind is none of %q", kinds)
	}
	return toml.NewDecoder(bytes.NewReader(b)).DisallowUnknownFields().Decode(to)
}

func verify(key *ecdsa.PublicKey, digest []byte, sig [64]byte) bool {
	return ecdsa.Verify(key, digest, new(big.Int).SetBytes(sig[:32]), new(big.Int).SetBytes(sig[32:]))
}

func (f *file) statement() (statement, error) {
	signed, err := time.Parse(time.RFC3339, f.Signed)
	if err != nil {
		return nil, fmt.Errorf("signed = %q is no time as 2026-01-02T15:04:05Z", f.Signed)
	}
	counter, err := strconv.ParseUint(f.Counter, 0, 32)
	if err != nil {
		return nil, fmt.Errorf("counter = %q is no NV index", f.Counter)
	}
	var s signatures
	if !decodeHex(s.tpm[:], f.Signature.TPM) || !decodeHex(s.document[:], f.Signature.Document) {
		return nil, errors.New("its signatures are not of 64 bytes each")
	}
	switch {
	case f.Kind == kindPolicy && f.Version != nil && f.Below == nil:
		state, err := parseState(f.PCRs)
		return &Policy{f.Host, uint32(counter), *f.Version, state, f.PIN, f.Comment, signed, s}, err
	case f.Kind == kindRevocation && f.Below != nil && f.Version == nil && f.PCRs == nil:
		return &Revocation{f.Host, uint32(counter), *f.Below, f.Comment, signed, s}, nil
	}
	return nil, fmt.Errorf("it lacks what a %s has, or has more", f.Kind)
}

func parseState(pcrs map[string]string) (State, error) {
	s := State{}
	for name, value := range pcrs {
		i, err := strconv.Atoi(name)
		v := make([]byte, sha256.Size)
		if err != nil || !decodeHex(v, value) {
			return nil, fmt.Errorf("PCR %q = %q: not a register with the 64 hexadecimal digits of its value", name, value)
		}
		s[i] = v
	}
	return s, nil
}

func decodeHex(to []byte, text string) bool {
	b, err := hex.DecodeString(text)
	return err == nil && copy(to, b) == len(to) && len(b) == len(to)
}

// PCRWords says what is measured into a register: TCG PC Client Platform Firmware
// Profile, section 3.3.4, and the UAPI Group's Linux TPM PCR Registry.
func PCRWords(i int) string {
	words := []string{
		"firmware", "firmware settings", "firmware extensions (option ROMs)", "settings of firmware extensions", "boot loader",
		"partition table and boot loader settings", "events of the manufacturer", "Secure Boot: state and keys", "kernel command line (GRUB)", "kernel and files (GRUB), initrd",
		"IMA: files that were run", "unified kernel image", "kernel command line and credentials (systemd-stub)", "system extensions (systemd-stub)", "machine owner keys (shim)",
		"machine id and file systems (systemd)",
	}
	if i < len(words) {
		return words[i]
	}
	return "not assigned"
}
