package tpm_test

import (
	"bytes"
	"strings"
	"testing"

	"github.com/google/go-tpm/tpm2"

	"conseal/tpm"
	"conseal/tpm/attest"
	"conseal/tpm/policy"
)

// attested goes through attestation, and tells what it found.
func attested(t *testing.T, h *host, pcrs ...int) *attest.Attested {
	t.Helper()
	sent, pending := challenge(t, claim(t, h))
	got, err := pending.Verify(prove(t, h, h.made.Identity, sent), pcrs)
	if err != nil {
		t.Fatal(err)
	}
	return got
}

// A verifier learns under which policy a sealed key opens, and is not lied to.
func TestSealing(t *testing.T) {
	m := newTeam(t)
	h := newGovernedHost(t, m, 4, 7)
	ak := attested(t, h, 4, 7).AK
	_, blob := seal(t, h.TPM, "k") // no policy is installed, and none is needed
	other := newGovernedHost(t, m, 4, 7)
	_, otherBlob := seal(t, other.TPM, "k")
	loose := newHost(t, 7)
	_, looseBlob := seal(t, loose.TPM, "k")
	ours := m.authority("alpha").Host
	want, err := ours.AuthPolicy()
	if err != nil {
		t.Fatal(err)
	}
	theirs := policy.Host{Name: "beta", Key: &m.PublicKey, Counter: counterIndex}
	wrong, err := theirs.AuthPolicy()
	if err != nil {
		t.Fatal(err)
	}
	nonce := bytes.Repeat([]byte{7}, 32)
	certify := func(h *host, blob, nonce []byte) *attest.Sealing {
		t.Helper()
		s, err := h.CertifySealed(t.Context(), blob, nonce)
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	good := certify(h, blob, nonce)
	if err := good.Verify(ak, nonce, want, false); err != nil {
		t.Fatal(err)
	}
	h.reboot(t)
	again := open(t, h.cfg)
	if s, err := again.CertifySealed(t.Context(), blob, nonce); err != nil || s.Verify(ak, nonce, want, false) != nil {
		t.Errorf("after a reboot: %v", err)
	}
	h.TPM = again

	_, second := seal(t, h.TPM, "another")
	swapped := *good
	swapped.Public = certify(h, second, nonce).Public
	bent := *good
	bent.Attest = bytes.Clone(good.Attest)
	bent.Attest[len(bent.Attest)-1] ^= 1
	sent, _ := challenge(t, claim(t, h))
	quoted := prove(t, h, h.made.Identity, sent)
	for name, lie := range map[string]struct {
		s                  *attest.Sealing
		nonce, policy      []byte
		want               string
		anotherKey, nobody bool
	}{
		"another policy":      {s: good, policy: wrong, want: "another policy"},
		"no policy":           {s: good, policy: []byte{}, want: "digest"},
		"another nonce":       {s: good, nonce: bytes.Repeat([]byte{8}, 32), want: "another challenge"},
		"no nonce":            {s: good, nonce: []byte{}, want: "nonce"},
		"another TPM":         {s: certify(other, otherBlob, nonce), want: "attestation key"},
		"the state at init":   {s: certify(loose, looseBlob, nonce), want: "another policy"},
		"another sealed key":  {s: &swapped, want: "another sealed key"},
		"a bit":               {s: &bent, want: "attestation key"},
		"nothing":             {s: &attest.Sealing{}, want: "sealed key"},
		"a quote":             {s: &attest.Sealing{Public: good.Public, Attest: quoted.Quote, Signature: quoted.QuoteSignature}, nonce: sent.Nonce, want: "kind"},
		"a key for a secret":  {s: &attest.Sealing{Public: claim(t, h).Identity, Attest: good.Attest, Signature: good.Signature}, want: "no sealed data object"},
		"no attestation key":  {s: good, nobody: true, want: "attestation key"},
		"another's AK":        {s: good, anotherKey: true, want: "attestation key"},
		"half of its public":  {s: &attest.Sealing{Public: good.Public[:20], Attest: good.Attest, Signature: good.Signature}, want: "sealed key"},
		"half of its attest":  {s: &attest.Sealing{Public: good.Public, Attest: good.Attest[:20], Signature: good.Signature}, want: "attestation key"},
		"half of a signature": {s: &attest.Sealing{Public: good.Public, Attest: good.Attest, Signature: good.Signature[:20]}, want: "signature"},
	} {
		t.Run(name, func(t *testing.T) {
			key, n, p := ak, nonce, want
			if lie.nonce != nil {
				n = lie.nonce
			}
			if lie.policy != nil {
				p = lie.policy
			}
			if lie.anotherKey {
				key = attested(t, other, 4, 7).AK
			}
			if lie.nobody {
				key = nil
			}
			if err := lie.s.Verify(key, n, p, false); err == nil || !strings.Contains(err.Error(), lie.want) {
				t.Errorf("got %v, want %q", err, lie.want)
			}
		})
	}
	if _, err := h.CertifySealed(t.Context(), otherBlob, nonce); err == nil {
		t.Error("the TPM certifies what another made")
	}
	wantNoHandles(t, h.tap)
}

// What [attest.Sealing.Verify] says that a TPM does not tell: a host gives what it seals
// an empty PIN.
func TestSealingDoesNotTellThePIN(t *testing.T) {
	m := newTeam(t)
	h := newGovernedHost(t, m, 4)
	ak := attested(t, h, 4).AK
	host := m.authority("alpha").Host
	want, err := host.AuthPolicy()
	if err != nil {
		t.Fatal(err)
	}
	srk, err := tpm2.ReadPublic{ObjectHandle: tpm2.TPMHandle(tpm.StandardSRKHandle)}.Execute(h.tap)
	if err != nil {
		t.Fatal(err)
	}
	parent := tpm2.AuthHandle{Handle: tpm.StandardSRKHandle, Name: srk.Name, Auth: tpm2.PasswordAuth(nil)}
	made, err := tpm2.Create{
		ParentHandle: parent, InPublic: tpm2.New2B(policy.SealedPublic(want, nil, true)),
		InSensitive: tpm2.TPM2BSensitiveCreate{Sensitive: &tpm2.TPMSSensitiveCreate{Data: tpm2.NewTPMUSensitiveCreate(&tpm2.TPM2BSensitiveData{Buffer: make([]byte, 64)})}},
	}.Execute(h.tap)
	if err != nil {
		t.Fatal(err)
	}
	loaded, err := tpm2.Load{ParentHandle: parent, InPrivate: made.OutPrivate, InPublic: made.OutPublic}.Execute(h.tap)
	if err != nil {
		t.Fatal(err)
	}
	template, err := tpm2.Unmarshal[tpm2.TPMTPublic](claim(t, h).AK)
	if err != nil {
		t.Fatal(err)
	}
	template.Unique = tpm2.NewTPMUPublicID(tpm2.TPMAlgECC, &tpm2.TPMSECCPoint{X: tpm2.TPM2BECCParameter{Buffer: []byte("conseal ak 1")}})
	signer, err := tpm2.CreatePrimary{PrimaryHandle: tpm2.TPMRHEndorsement, InPublic: tpm2.New2B(*template)}.Execute(h.tap)
	if err != nil {
		t.Fatal(err)
	}
	nonce := bytes.Repeat([]byte{7}, 32)
	rsp, err := tpm2.CertifyCreation{
		SignHandle:   tpm2.AuthHandle{Handle: signer.ObjectHandle, Name: signer.Name, Auth: tpm2.PasswordAuth(nil)},
		ObjectHandle: tpm2.NamedHandle{Handle: loaded.ObjectHandle, Name: loaded.Name}, QualifyingData: tpm2.TPM2BData{Buffer: nonce},
		CreationHash: made.CreationHash, InScheme: tpm2.TPMTSigScheme{Scheme: tpm2.TPMAlgNull}, CreationTicket: made.CreationTicket,
	}.Execute(h.tap)
	if err != nil {
		t.Fatal(err)
	}
	s := &attest.Sealing{Public: made.OutPublic.Bytes(), Attest: rsp.CertifyInfo.Bytes(), Signature: tpm2.Marshal(rsp.Signature)}
	if err := s.Verify(ak, nonce, want, true); err != nil {
		t.Errorf("the documentation says that this passes: %v", err)
	}
	if err := s.Verify(ak, nonce, want, false); err == nil {
		t.Error("it passes as one of a host without a PIN too")
	}
}
