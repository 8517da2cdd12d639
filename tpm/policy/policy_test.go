package policy_test

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"conseal/tpm/policy"
)

func newKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

var at = time.Date(2026, 11, 25, 6, 0, 0, 0, time.UTC)

func somePolicy() *policy.Policy {
	return &policy.Policy{
		Host: "alpha", Counter: 0x01800601, Version: 5, Comment: "kernel 6.12 \"stable\"", Signed: at,
		State: policy.State{4: bytes.Repeat([]byte{4}, 32), 7: bytes.Repeat([]byte{7}, 32)},
	}
}

func sign(t testing.TB, s interface {
	Sign(key crypto.Signer) ([]byte, error)
}, key *ecdsa.PrivateKey) []byte {
	t.Helper()
	b, err := s.Sign(key)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestDocuments(t *testing.T) {
	key := newKey(t)
	for _, s := range []interface {
		Sign(key crypto.Signer) ([]byte, error)
	}{
		somePolicy(),
		&policy.Revocation{Host: "alpha", Counter: 0x01800601, Below: 6, Comment: "kernel 6.1 has a hole", Signed: at},
	} {
		b := sign(t, s, key)
		got, err := policy.Parse(b, &key.PublicKey)
		if err != nil {
			t.Fatalf("%v in\n%s", err, b)
		}
		if diff := cmp.Diff(s, got, cmp.AllowUnexported(policy.Policy{}, policy.Revocation{}, policy.Signatures{})); diff != "" {
			t.Error(diff)
		}
	}
}

// Whatever is changed in a signed document, it is refused.
func TestAlteredDocuments(t *testing.T) {
	key := newKey(t)
	good := string(sign(t, somePolicy(), key))
	for i := range good {
		bad := good[:i] + string(good[i]^1) + good[i+1:]
		if _, err := policy.Parse([]byte(bad), &key.PublicKey); err == nil {
			t.Fatalf("byte %d was changed and it is taken:\n%s", i, bad)
		}
	}
	for name, bad := range map[string]string{
		"nothing":        "",
		"cut":            good[:len(good)-20],
		"more":           good + "\n",
		"another key":    string(sign(t, somePolicy(), newKey(t))),
		"no signature":   good[:strings.Index(good, "[signature]")],
		"a comment more": "# all is well\n" + good,
		"twice":          good + good,
		"no PCRs":        strings.ReplaceAll(strings.ReplaceAll(good, "4 = ", "# 4 = "), "7 = ", "# 7 = "),
		"big":            good + strings.Repeat("#\n", policy.MaxDocument),
	} {
		if _, err := policy.Parse([]byte(bad), &key.PublicKey); err == nil {
			t.Errorf("%s: it is taken", name)
		}
	}
}

func TestSignRefuses(t *testing.T) {
	key := newKey(t)
	for name, change := range map[string]func(p *policy.Policy){
		"no PCRs":            func(p *policy.Policy) { p.State = nil },
		"a resettable PCR":   func(p *policy.Policy) { p.State[16] = make([]byte, 32) },
		"PCR 24":             func(p *policy.Policy) { p.State[24] = make([]byte, 32) },
		"a short value":      func(p *policy.Policy) { p.State[7] = make([]byte, 20) },
		"no host":            func(p *policy.Policy) { p.Host = "" },
		"lines in a comment": func(p *policy.Policy) { p.Comment = "a\nversion = 9" },
		"a quote in a host":  func(p *policy.Policy) { p.Host = "a\"b" },
		"no NV index":        func(p *policy.Policy) { p.Counter = 0x81000001 },
	} {
		p := somePolicy()
		change(p)
		if b, err := p.Sign(key); err == nil {
			t.Errorf("%s: signed\n%s", name, b)
		}
	}
	other, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := somePolicy().Sign(other); err == nil {
		t.Error("a key on P-384 was taken")
	}
	if _, err := (&policy.Revocation{Host: "a", Counter: 0x01800601}).Sign(key); err == nil {
		t.Error("a revocation of nothing was signed")
	}
}

func TestMeasurement(t *testing.T) {
	m := &policy.Measurement{
		Host: "alpha", Counter: 0x01800601, Revoked: 5, Next: 7, Key: "SHA256:x", Taken: at, Selected: []int{4, 7},
		PCRs: policy.State{0: make([]byte, 32), 4: bytes.Repeat([]byte{4}, 32), 7: bytes.Repeat([]byte{7}, 32)},
	}
	b := m.Encode()
	got, err := policy.ParseMeasurement(b)
	if err != nil {
		t.Fatalf("%v in\n%s", err, b)
	}
	if diff := cmp.Diff(m, got); diff != "" {
		t.Error(diff)
	}
	want := somePolicy()
	want.Version, want.Comment = 7, "c"
	if diff := cmp.Diff(want, m.Policy("c", at), cmpopts.IgnoreUnexported(policy.Policy{})); diff != "" {
		t.Error(diff)
	}
	for name, bad := range map[string]string{
		"a policy":           string(sign(t, somePolicy(), newKey(t))),
		"nothing":            "",
		"selected, no value": strings.Replace(string(b), "[4, 7]", "[4, 9]", 1),
		"half a value":       strings.Replace(string(b), "0404", "04", 1),
		"a field of its own": strings.Replace(string(b), "key =", "keys =", 1),
	} {
		if _, err := policy.ParseMeasurement([]byte(bad)); err == nil {
			t.Errorf("%s: it is taken", name)
		}
	}
}

func FuzzParse(f *testing.F) {
	key := newKey(f)
	f.Add(sign(f, somePolicy(), key))
	f.Fuzz(func(t *testing.T, b []byte) {
		_, _ = policy.Parse(b, &key.PublicKey)
		if m, err := policy.ParseMeasurement(b); err == nil {
			_ = m.Encode()
		}
	})
}
