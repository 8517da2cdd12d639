// Package epoch decides when a generation of a key's shares exists.
//
// A holder that has a new share safe on its disk signs a statement about it
// ([Subject.Sign]); the statements of all holders together are a [Certificate],
// and a certificate is what makes an epoch: whoever holds one can show it to
// anybody, so a host that says yes to some and no to others changes nothing.
// [Next] says what a holder of an unborn key does, given what it knows of the
// others. Nothing here has a clock, a disk or a network.
package epoch

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/asn1"
	"errors"
	"fmt"
	"slices"

	"conseal/agent/vault"
	"conseal/protocol"
)

// MaxCertificate bounds an encoded certificate, in bytes.
const MaxCertificate = 256 << 10

// Subject is what all holders of an epoch must agree on.
type Subject struct {
	Fleet  string
	Key    vault.KeyID
	Scheme string
	Number vault.Number
	Entry  [32]byte     // digest of the key's entry in the roster
	Output vault.Output // see [OutputDigest]
	Parent [32]byte     // ID of the certificate of the epoch it was made from; zero at birth
}

// OutputDigest is the digest of an epoch's public output: the scheme's
// encoding of quorum, holders, public key and verification shares.
func OutputDigest(scheme string, public []byte) vault.Output {
	h := sha256.New()
	fmt.Fprintf(h, "conseal output v1\n%d %s %d\n", len(scheme), scheme, len(public))
	h.Write(public)
	return vault.Output(h.Sum(nil))
}

// Statement is one holder's word that it has its share of an epoch: staged on
// disk, read back and checked, and that it will never say so of another output
// of the same number, nor, at birth, of any other number of the key.
type Statement struct {
	Holder    protocol.HostID
	PublicKey []byte // identity key, DER SubjectPublicKeyInfo
	Signature []byte // ECDSA, ASN.1
}

// Certificate is the statements of all holders, sorted by name, and the public
// output that they are about.
type Certificate struct {
	Subject    Subject
	Public     []byte
	Statements []Statement
}

type asn1Subject struct {
	Fleet, Key            string `asn1:"utf8"`
	Incarnation           int64
	Scheme                string `asn1:"utf8"`
	Roster, Attempt       int64
	Entry, Output, Parent []byte
}

type asn1Statement struct {
	Holder               string `asn1:"utf8"`
	PublicKey, Signature []byte
}

type asn1Certificate struct {
	Version    int
	Subject    asn1Subject
	Public     []byte
	Statements []asn1Statement
}

func (s *Subject) asn1() asn1Subject {
	return asn1Subject{
		Fleet: s.Fleet, Key: s.Key.Name, Incarnation: int64(s.Key.Incarnation), Scheme: s.Scheme,
		Roster: int64(s.Number.Roster), Attempt: int64(s.Number.Attempt),
		Entry: s.Entry[:], Output: s.Output[:], Parent: s.Parent[:],
	}
}

func (a *asn1Subject) subject() (Subject, error) {
	if a.Incarnation < 1 || a.Roster < 1 || a.Attempt < 1 {
		return Subject{}, errors.New("incarnation, roster version and attempt start at 1")
	}
	if len(a.Entry) != 32 || len(a.Output) != 32 || len(a.Parent) != 32 {
		return Subject{}, errors.New("a digest is not 32 bytes long")
	}
	return Subject{
		Fleet: a.Fleet, Key: vault.KeyID{Name: a.Key, Incarnation: uint64(a.Incarnation)}, Scheme: a.Scheme,
		Number: vault.Number{Roster: uint64(a.Roster), Attempt: uint64(a.Attempt)},
		Entry:  [32]byte(a.Entry), Output: vault.Output(a.Output), Parent: [32]byte(a.Parent),
	}, nil
}

// ID names the certificate of this subject. It does not depend on signatures,
// so every host that puts one together gets the same.
func (s *Subject) ID() [32]byte { return s.digest("conseal epoch v1", "") }

func (s *Subject) digest(domain, holder string) [32]byte {
	der, err := asn1.Marshal(s.asn1())
	if err != nil { // only text that is not UTF-8: such names are refused long before
		der = nil
	}
	h := sha256.New()
	fmt.Fprintf(h, "%s\n%d %s %d\n", domain, len(holder), holder, len(der))
	h.Write(der)
	return [32]byte(h.Sum(nil))
}

// Sign makes the holder's statement. The caller has made its vote durable first.
func (s *Subject) Sign(holder protocol.HostID, identity crypto.Signer) (Statement, error) {
	spki, err := x509.MarshalPKIXPublicKey(identity.Public())
	if err != nil {
		return Statement{}, fmt.Errorf("encoding the identity key: %w", err)
	}
	digest := s.digest("conseal staged v1", string(holder))
	signature, err := identity.Sign(rand.Reader, digest[:], crypto.SHA256)
	if err != nil {
		return Statement{}, fmt.Errorf("signing the statement for key %q, epoch %s: %w", s.Key.Name, s.Number, err)
	}
	return Statement{Holder: holder, PublicKey: spki, Signature: signature}, nil
}

// Verify checks a statement about s against the pin of its holder: SHA-256 of
// the identity key's SubjectPublicKeyInfo.
func (s *Subject) Verify(st Statement, pin [32]byte) error {
	if sha256.Sum256(st.PublicKey) != pin {
		return fmt.Errorf("statement of host %q: signed by another identity than the roster pins", st.Holder)
	}
	key, err := x509.ParsePKIXPublicKey(st.PublicKey)
	if err != nil {
		return fmt.Errorf("statement of host %q: identity key: %w", st.Holder, err)
	}
	ec, ok := key.(*ecdsa.PublicKey)
	if !ok {
		return fmt.Errorf("statement of host %q: identity key is a %T, not ECDSA", st.Holder, key)
	}
	digest := s.digest("conseal staged v1", string(st.Holder))
	if !ecdsa.VerifyASN1(ec, digest[:], st.Signature) {
		return fmt.Errorf("statement of host %q: wrong signature", st.Holder)
	}
	return nil
}

// Verify checks that the certificate holds a good statement of every holder in
// pins and of nobody else, and that they are about its public output.
func (c *Certificate) Verify(pins map[protocol.HostID][32]byte) error {
	if len(pins) == 0 || len(c.Statements) != len(pins) {
		return fmt.Errorf("certificate has %d statements for %d holders", len(c.Statements), len(pins))
	}
	if OutputDigest(c.Subject.Scheme, c.Public) != c.Subject.Output {
		return errors.New("certificate is about another public output than it holds")
	}
	for i, st := range c.Statements {
		pin, ok := pins[st.Holder]
		if !ok {
			return fmt.Errorf("certificate has a statement of %q, who is no holder", st.Holder)
		}
		if i > 0 && c.Statements[i-1].Holder >= st.Holder {
			return fmt.Errorf("certificate's statements are not sorted and distinct at %q", st.Holder)
		}
		if err := c.Subject.Verify(st, pin); err != nil {
			return err
		}
	}
	return nil
}

// VerifySome checks the statements of the holders in pins, each of which must be there.
// It says nothing of the others: who cannot check them, because the roster has other
// hosts by now, believes the certificate only as far as these hosts are to be believed.
func (c *Certificate) VerifySome(pins map[protocol.HostID][32]byte) error {
	if len(pins) == 0 {
		return errors.New("certificate with no holder that the roster has")
	}
	if OutputDigest(c.Subject.Scheme, c.Public) != c.Subject.Output {
		return errors.New("certificate is about another public output than it holds")
	}
	for h, pin := range pins {
		at := slices.IndexFunc(c.Statements, func(st Statement) bool { return st.Holder == h })
		if at < 0 {
			return fmt.Errorf("certificate has no statement of %q", h)
		}
		if err := c.Subject.Verify(c.Statements[at], pin); err != nil {
			return err
		}
	}
	return nil
}

// Encode returns the canonical encoding, DER.
func (c *Certificate) Encode() ([]byte, error) {
	out := asn1Certificate{Version: 1, Subject: c.Subject.asn1(), Public: c.Public}
	for _, st := range c.Statements {
		out.Statements = append(out.Statements, asn1Statement{string(st.Holder), st.PublicKey, st.Signature})
	}
	return asn1.Marshal(out)
}

// Decode reads what Encode wrote and nothing else. It checks no signature.
func Decode(der []byte) (*Certificate, error) {
	if len(der) > MaxCertificate {
		return nil, fmt.Errorf("certificate of %d bytes is over the limit of %d", len(der), MaxCertificate)
	}
	var in asn1Certificate
	rest, err := asn1.Unmarshal(der, &in)
	if err != nil {
		return nil, fmt.Errorf("decoding a certificate: %w", err)
	}
	if len(rest) != 0 || in.Version != 1 {
		return nil, fmt.Errorf("decoding a certificate: version %d, %d bytes too many", in.Version, len(rest))
	}
	subject, err := in.Subject.subject()
	if err != nil {
		return nil, fmt.Errorf("decoding a certificate: %w", err)
	}
	c := &Certificate{Subject: subject, Public: in.Public}
	for _, st := range in.Statements {
		c.Statements = append(c.Statements, Statement{protocol.HostID(st.Holder), st.PublicKey, st.Signature})
	}
	again, err := c.Encode()
	if err != nil || !bytes.Equal(again, der) {
		return nil, errors.New("decoding a certificate: not in canonical form")
	}
	return c, nil
}

// NewCertificate puts a certificate together.
func NewCertificate(s Subject, public []byte, statements []Statement) *Certificate {
	statements = slices.Clone(statements)
	slices.SortFunc(statements, func(a, b Statement) int { return bytes.Compare([]byte(a.Holder), []byte(b.Holder)) })
	return &Certificate{Subject: s, Public: public, Statements: statements}
}

// Encode returns the statement's canonical encoding, DER.
func (s Statement) Encode() ([]byte, error) {
	return asn1.Marshal(asn1Statement{string(s.Holder), s.PublicKey, s.Signature})
}

// DecodeStatement reads what [Statement.Encode] wrote. It checks no signature.
func DecodeStatement(der []byte) (Statement, error) {
	var in asn1Statement
	rest, err := asn1.Unmarshal(der, &in)
	if err != nil || len(rest) != 0 {
		return Statement{}, fmt.Errorf("decoding a statement: %d bytes too many: %w", len(rest), err)
	}
	return Statement{protocol.HostID(in.Holder), in.PublicKey, in.Signature}, nil
}
