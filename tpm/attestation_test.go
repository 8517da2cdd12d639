package tpm_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-tpm/tpm2"

	"conseal/tpm/attest"
)

// makers are the certificates of who made the tests' TPMs.
func makers(t *testing.T) (roots, between *x509.CertPool) {
	t.Helper()
	pool := func(file string) *x509.CertPool {
		b, err := os.ReadFile(filepath.Join(base, "tpm-ca", file))
		p := x509.NewCertPool()
		if err != nil || !p.AppendCertsFromPEM(b) {
			t.Fatalf("%s: %v", file, err)
		}
		return p
	}
	return pool("swtpm-localca-rootca-cert.pem"), pool("issuercert.pem")
}

func claim(t *testing.T, h *host) *attest.Claim {
	t.Helper()
	c, err := h.Claim(t.Context(), h.made.Identity)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func challenge(t *testing.T, c *attest.Claim) (*attest.Challenge, *attest.Pending) {
	t.Helper()
	roots, between := makers(t)
	sent, pending, err := attest.NewChallenge(c, roots, between)
	if err != nil {
		t.Fatal(err)
	}
	return sent, pending
}

func prove(t *testing.T, h *host, identity []byte, c *attest.Challenge) *attest.Evidence {
	t.Helper()
	e, err := h.Prove(t.Context(), identity, c)
	if err != nil {
		t.Fatal(err)
	}
	return e
}

func TestAttestation(t *testing.T) {
	h := newHost(t, 4, 7)
	h.extend(t, 4, "a kernel")
	sent, pending := challenge(t, claim(t, h))
	e := prove(t, h, h.made.Identity, sent)
	got, err := pending.Verify(e, []int{4, 7})
	if err != nil {
		t.Fatal(err)
	}
	identity, err := h.Identity(t.Context(), h.made.Identity)
	if err != nil {
		t.Fatal(err)
	}
	if !got.Identity.Equal(identity.Public()) {
		t.Error("another identity key is attested")
	}
	if bytes.Equal(got.PCRs[4], make([]byte, 32)) || !bytes.Equal(got.PCRs[7], make([]byte, 32)) {
		t.Errorf("PCRs %x", got.PCRs)
	}
	if _, err := pending.Verify(e, []int{4, 7}); err == nil {
		t.Error("one challenge was answered twice")
	}
	h.device.Kill()
	h.reboot(t)
	h.TPM = open(t, h.cfg)
	sent, pending = challenge(t, claim(t, h))
	again, err := pending.Verify(prove(t, h, h.made.Identity, sent), []int{4, 7})
	if err != nil || again.ResetCount <= got.ResetCount {
		t.Errorf("after a restart: %+v, before %+v, %v", again, got, err)
	}
	wantNoHandles(t, h.tap)
}

// A host that can open its challenge lies in what it answers.
func TestLyingEvidence(t *testing.T) {
	h, other := newHost(t, 4, 7), newHost(t, 4, 7)
	provisioned := h.cfg
	provisioned.Identity = nil
	second := provision(t, provisioned).Identity // another key in the same TPM
	earlier, _ := challenge(t, claim(t, h))
	for name, lie := range map[string]struct {
		tell func(e *attest.Evidence, c *attest.Challenge)
		want string
	}{
		"another value": {func(e *attest.Evidence, _ *attest.Challenge) { e.PCRs[4] = bytes.Repeat([]byte{9}, 32) }, "other values"},
		"a PCR fewer":   {func(e *attest.Evidence, _ *attest.Challenge) { delete(e.PCRs, 4) }, "wanted [4 7]"},
		"no PCRs":       {func(e *attest.Evidence, _ *attest.Challenge) { e.PCRs = nil }, "no PCRs"},
		"other PCRs":    {func(e *attest.Evidence, _ *attest.Challenge) { e.PCRs[5] = e.PCRs[4]; delete(e.PCRs, 4) }, "wanted [4 7]"},
		"a quote of before": {func(e *attest.Evidence, _ *attest.Challenge) {
			old := prove(t, h, h.made.Identity, earlier)
			e.Quote, e.QuoteSignature = old.Quote, old.QuoteSignature
		}, "another challenge"},
		"another TPM's quote": {func(e *attest.Evidence, c *attest.Challenge) { e.Quote, e.QuoteSignature = foreignQuote(t, other, c) }, "attestation key"},
		"certified for quote": {func(e *attest.Evidence, _ *attest.Challenge) {
			e.Quote, e.QuoteSignature = e.Certify, e.CertifySignature
		}, "kind"},
		"quote for certified": {func(e *attest.Evidence, _ *attest.Challenge) {
			e.Certify, e.CertifySignature = e.Quote, e.QuoteSignature
		}, "kind"},
		"another key": {func(e *attest.Evidence, c *attest.Challenge) {
			x := prove(t, h, second, c)
			e.Certify, e.CertifySignature = x.Certify, x.CertifySignature
		}, "another key"},
		"nothing":            {func(e *attest.Evidence, _ *attest.Challenge) { *e = attest.Evidence{} }, "quote"},
		"a bit of the quote": {func(e *attest.Evidence, _ *attest.Challenge) { e.Quote[len(e.Quote)-1] ^= 1 }, "attestation key"},
	} {
		t.Run(name, func(t *testing.T) {
			sent, pending := challenge(t, claim(t, h))
			e := prove(t, h, h.made.Identity, sent)
			held, err := h.OpenChallenge(t.Context(), sent)
			if err != nil {
				t.Fatal(err)
			}
			lie.tell(e, sent)
			e.Prove(held)
			if _, err := pending.Verify(e, []int{4, 7}); err == nil || !strings.Contains(err.Error(), lie.want) {
				t.Errorf("got %v, want %q", err, lie.want)
			}
		})
	}
	sent, pending := challenge(t, claim(t, h))
	e := prove(t, h, h.made.Identity, sent)
	e.Prove(make([]byte, 32))
	if _, err := pending.Verify(e, []int{4, 7}); err == nil || !strings.Contains(err.Error(), "not opened the challenge") {
		t.Errorf("a made-up proof: %v", err)
	}
}

// foreignQuote has another TPM quote for this challenge.
func foreignQuote(t *testing.T, other *host, c *attest.Challenge) (quote, signature []byte) {
	t.Helper()
	own, _ := challenge(t, claim(t, other))
	own.Nonce = c.Nonce
	e := prove(t, other, other.made.Identity, own)
	return e.Quote, e.QuoteSignature
}

// What a host claims of its keys is refused before a challenge is made, or the
// challenge does not open.
func TestLyingClaims(t *testing.T) {
	h, other := newHost(t, 7), newHost(t, 7)
	roots, between := makers(t)
	honest, foreign := claim(t, h), claim(t, other)
	attributes := func(b []byte, change func(*tpm2.TPMAObject)) []byte {
		p, err := tpm2.Unmarshal[tpm2.TPMTPublic](b)
		if err != nil {
			t.Fatal(err)
		}
		change(&p.ObjectAttributes)
		return tpm2.Marshal(*p)
	}
	exportable := func(a *tpm2.TPMAObject) { a.FixedTPM, a.FixedParent = false, false }
	for name, lie := range map[string]func(c *attest.Claim){
		"an exportable identity key": func(c *attest.Claim) { c.Identity = attributes(c.Identity, exportable) },
		"an imported identity key": func(c *attest.Claim) {
			c.Identity = attributes(c.Identity, func(a *tpm2.TPMAObject) { a.SensitiveDataOrigin = false })
		},
		"an unrestricted AK":             func(c *attest.Claim) { c.AK = attributes(c.AK, func(a *tpm2.TPMAObject) { a.Restricted = false }) },
		"an exportable AK":               func(c *attest.Claim) { c.AK = attributes(c.AK, exportable) },
		"the identity key for AK":        func(c *attest.Claim) { c.AK = c.Identity },
		"an EK that signs":               func(c *attest.Claim) { c.EK = attributes(c.EK, func(a *tpm2.TPMAObject) { a.SignEncrypt = true }) },
		"another's EK":                   func(c *attest.Claim) { c.EK = foreign.EK },
		"another's certificate":          func(c *attest.Claim) { c.EKCertificate = foreign.EKCertificate },
		"no certificate":                 func(c *attest.Claim) { c.EKCertificate = nil },
		"a certificate with a bit wrong": func(c *attest.Claim) { c.EKCertificate[len(c.EKCertificate)/2] ^= 1 },
		"no keys":                        func(c *attest.Claim) { c.EK, c.AK, c.Identity = nil, nil, nil },
		"an EK for AK":                   func(c *attest.Claim) { c.AK = c.EK },
		"bytes behind a key":             func(c *attest.Claim) { c.AK = append(c.AK, 0) },
	} {
		c := *honest
		c.EKCertificate = slices.Clone(c.EKCertificate)
		c.AK = slices.Clone(c.AK)
		lie(&c)
		if _, _, err := attest.NewChallenge(&c, roots, between); err == nil {
			t.Errorf("%s: a challenge was made", name)
		}
	}
	for i := 0; i < len(honest.AK); i += 3 {
		c := *honest
		c.AK = c.AK[:i]
		if _, _, err := attest.NewChallenge(&c, roots, between); err == nil {
			t.Errorf("an AK of %d bytes was taken", i)
		}
	}
	if _, _, err := attest.NewChallenge(honest, x509.NewCertPool(), between); err == nil {
		t.Error("a maker was trusted whom nobody named")
	}
	t.Setenv("SSL_CERT_FILE", filepath.Join(base, "tpm-ca", "swtpm-localca-rootca-cert.pem")) // what crypto/x509 trusts if not told
	if _, _, err := attest.NewChallenge(honest, nil, between); err == nil {
		t.Error("nobody was named, and whom the system trusts was trusted")
	}

	// Another TPM's AK under this one's EK: the form is right, and this TPM refuses.
	mixed := *honest
	mixed.AK = foreign.AK
	sent, _, err := attest.NewChallenge(&mixed, roots, between)
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range []*host{h, other} {
		if _, err := d.OpenChallenge(t.Context(), sent); err == nil {
			t.Error("a challenge for an AK in another TPM opens")
		}
	}
	if sent, _ := challenge(t, honest); true {
		if _, err := h.OpenChallenge(context.Background(), sent); err != nil {
			t.Errorf("control: %v", err)
		}
	}
	wantNoHandles(t, h.tap)
}

// A host claims a key in software for AK, whose public area says that it is in the TPM
// and lets everybody use it. TPM2_LoadExternal takes that without the private part; a
// challenge does not open for it, as only what has a private part there can authorize.
func TestSoftwareKeyForAK(t *testing.T) {
	h := newHost(t, 7)
	anybody := tpm2.PolicyCommandCode{Code: tpm2.TPMCCActivateCredential}
	calc, err := tpm2.NewPolicyCalculator(tpm2.TPMAlgSHA256)
	if err == nil {
		err = anybody.Update(calc)
	}
	if err != nil {
		t.Fatal(err)
	}
	c := claim(t, h)
	area, err := tpm2.Unmarshal[tpm2.TPMTPublic](c.AK)
	if err != nil {
		t.Fatal(err)
	}
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	point, err := private.PublicKey.Bytes()
	if err != nil {
		t.Fatal(err)
	}
	area.Unique = tpm2.NewTPMUPublicID(tpm2.TPMAlgECC, &tpm2.TPMSECCPoint{X: tpm2.TPM2BECCParameter{Buffer: point[1:33]}, Y: tpm2.TPM2BECCParameter{Buffer: point[33:]}})
	area.ObjectAttributes.AdminWithPolicy = true
	area.AuthPolicy = tpm2.TPM2BDigest{Buffer: calc.Hash().Digest}
	c.AK = tpm2.Marshal(*area)
	sent, _ := challenge(t, c)
	loaded, err := tpm2.LoadExternal{InPublic: tpm2.New2B(*area), Hierarchy: tpm2.TPMRHOwner}.Execute(h.tap)
	if err != nil {
		t.Fatal(err)
	}
	session := func(step func(s tpm2.Session) error) tpm2.Session {
		t.Helper()
		s, _, err := tpm2.PolicySession(h.tap, tpm2.TPMAlgSHA256, 16)
		if err == nil {
			err = step(s)
		}
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	ak := session(func(s tpm2.Session) error {
		anybody.PolicySession = s.Handle()
		_, err := anybody.Execute(h.tap)
		return err
	})
	ek := session(func(s tpm2.Session) error {
		_, err := tpm2.PolicySecret{AuthHandle: tpm2.AuthHandle{Handle: tpm2.TPMRHEndorsement, Auth: tpm2.PasswordAuth(nil)}, PolicySession: s.Handle(), NonceTPM: s.NonceTPM()}.Execute(h.tap)
		return err
	})
	made, err := tpm2.CreatePrimary{PrimaryHandle: tpm2.TPMRHEndorsement, InPublic: tpm2.New2B(tpm2.RSAEKTemplate)}.Execute(h.tap)
	if err != nil {
		t.Fatal(err)
	}
	_, err = tpm2.ActivateCredential{
		ActivateHandle: tpm2.AuthHandle{Handle: loaded.ObjectHandle, Name: loaded.Name, Auth: ak},
		KeyHandle:      tpm2.AuthHandle{Handle: made.ObjectHandle, Name: made.Name, Auth: ek},
		CredentialBlob: tpm2.TPM2BIDObject{Buffer: sent.Credential},
		Secret:         tpm2.TPM2BEncryptedSecret{Buffer: sent.Secret},
	}.Execute(h.tap)
	if !errors.Is(err, tpm2.TPMRCAuthUnavailable) {
		t.Errorf("ActivateCredential: %v", err)
	}
}
