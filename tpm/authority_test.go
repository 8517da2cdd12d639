package tpm_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"

	"conseal/internal/secret"
	"conseal/tpm"
	"conseal/tpm/policy"
)

// team is a security team and the policies that a host has of it.
type team struct {
	*ecdsa.PrivateKey
	installed []*policy.Policy
}

func newTeam(t testing.TB) *team {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return &team{PrivateKey: key}
}

// pem is the public key as a host has it.
func (m *team) pem(t testing.TB) []byte {
	t.Helper()
	spki, err := x509.MarshalPKIXPublicKey(&m.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: spki})
}

const counterIndex = 0x01800601

func (m *team) authority(host string) *tpm.Authority {
	return &tpm.Authority{
		Host:      policy.Host{Name: host, Key: &m.PublicKey, Counter: counterIndex},
		Installed: func() ([]*policy.Policy, error) { return slices.Clone(m.installed), nil },
	}
}

// newGovernedHost is provisioned under a security team's policies, of which it has none.
func newGovernedHost(t testing.TB, m *team, pcrs ...int) *host {
	t.Helper()
	h := &host{device: startTPM(t)}
	h.tap = startTap(t, h.device)
	h.cfg = tpm.Config{Device: h.tap.Address(), Timeout: 20 * time.Second, PCRs: pcrs, Authority: m.authority("alpha")}
	h.made = provision(t, h.cfg)
	h.cfg = remember(h.cfg, h.made)
	h.TPM = open(t, h.cfg)
	return h
}

// allow signs and installs a policy for the present state.
func (m *team) allow(t testing.TB, h *host, comment string) *policy.Policy {
	t.Helper()
	p := m.sign(t, h.measured(t).Policy(comment, time.Now()))
	m.installed = append(m.installed, p)
	return p
}

func (h *host) measured(t testing.TB) *policy.Measurement {
	t.Helper()
	m, err := h.Measure(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	m, err = policy.ParseMeasurement(m.Encode())
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// sign takes a policy through its document, as it travels.
func (m *team) sign(t testing.TB, p *policy.Policy) *policy.Policy {
	t.Helper()
	document, err := p.Sign(m)
	if err != nil {
		t.Fatal(err)
	}
	s, err := policy.Parse(document, &m.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	return s.(*policy.Policy)
}

func (m *team) revocation(t *testing.T, host string, below uint64) *policy.Revocation {
	t.Helper()
	r := &policy.Revocation{Host: host, Counter: counterIndex, Below: below, Signed: time.Now()}
	if _, err := r.Sign(m); err != nil {
		t.Fatal(err)
	}
	return r
}

func wantRefused(t *testing.T, err error, words ...string) {
	t.Helper()
	wantClass(t, err, tpm.ClassPolicy)
	var e *tpm.PolicyError
	if !errors.As(err, &e) {
		t.Fatalf("no PolicyError: %v", err)
	}
	for _, w := range words {
		if !strings.Contains(err.Error(), w) {
			t.Errorf("the text does not have %q: %v", w, err)
		}
	}
}

// A kernel update: refused, signed, open without sealing anew, and the old state revoked.
func TestSealPolicies(t *testing.T) {
	m := newTeam(t)
	h := newGovernedHost(t, m, 4, 7)
	wantRefused(t, h.SetRoot(t.Context(), secret.Random(32)), "no seal policy is installed", "conseal seal measure")
	old := m.allow(t, h, "kernel 6.1")
	root := setRoot(t, h.TPM)
	key, blob := seal(t, h.TPM, "k")
	wantOpens(t, h.TPM, "k", blob, key)

	h.extend(t, 4, "kernel 6.12")
	_, err := h.Open(t.Context(), "k", blob)
	wantRefused(t, err, "kernel 6.1", "PCR 4 (boot loader)", "wants another state")
	_, err = h.Root(t.Context())
	wantRefused(t, err, "PCR 4")
	young := m.allow(t, h, "kernel 6.12")
	if young.Version <= old.Version {
		t.Fatalf("version %d after %d", young.Version, old.Version)
	}
	wantOpens(t, h.TPM, "k", blob, key)
	wantRoot(t, h.TPM, root)
	root = setRoot(t, h.TPM)

	h.reboot(t) // into the old kernel, which is allowed too
	d := open(t, h.cfg)
	wantOpens(t, d, "k", blob, key)
	r := m.revocation(t, "alpha", young.Version)
	for range 2 { // again: nothing more happens
		counter, err := d.Revoke(t.Context(), r)
		if err != nil || counter != young.Version {
			t.Fatalf("the counter is at %d: %v", counter, err)
		}
	}
	_, err = d.Open(t.Context(), "k", blob)
	wantRefused(t, err, "kernel 6.1) is revoked", "PCR 4")
	_, err = d.Root(t.Context())
	wantRefused(t, err)
	if err := h.tap.Extend(4, "kernel 6.12"); err != nil {
		t.Fatal(err)
	}
	wantOpens(t, d, "k", blob, key)
	wantRoot(t, d, root)
	counter, verdicts, err := d.Verdicts(t.Context())
	if err != nil || counter != young.Version || len(verdicts) != 2 || !verdicts[0].Opens() || verdicts[1].Opens() || !verdicts[1].Revoked {
		t.Errorf("counter %d, verdicts %+v, %v", counter, verdicts, err)
	}
	wantNoHandles(t, h.tap)
}

// Before an update both states are allowed, and nothing is ever refused.
func TestPreparedUpdate(t *testing.T) {
	m := newTeam(t)
	h := newGovernedHost(t, m, 4)
	m.allow(t, h, "now")
	key, blob := seal(t, h.TPM, "k")
	canary := newGovernedHost(t, newTeam(t), 4)
	canary.extend(t, 4, "kernel 6.12")
	next := h.measured(t).Policy("the state of the canary", time.Now())
	next.State[4] = canary.measured(t).PCRs[4]
	m.installed = append(m.installed, m.sign(t, next))
	wantOpens(t, h.TPM, "k", blob, key)
	h.extend(t, 4, "kernel 6.12")
	wantOpens(t, h.TPM, "k", blob, key)
}

// Whoever owns the host can put any policy before its TPM.
func TestForgedPolicies(t *testing.T) {
	m, stranger := newTeam(t), newTeam(t)
	h := newGovernedHost(t, m, 4)
	good := m.allow(t, h, "good")
	root := setRoot(t, h.TPM)
	key, blob := seal(t, h.TPM, "k")
	h.extend(t, 4, "a root kit")
	now := h.measured(t).Policy("forged", time.Now())
	for name, forge := range map[string]func() *policy.Policy{
		"another key": func() *policy.Policy { return stranger.sign(t, now) },
		"altered": func() *policy.Policy {
			p := *good
			p.State = now.State
			return &p
		},
		"not signed": func() *policy.Policy { return now },
		"for another host": func() *policy.Policy {
			p := *now
			p.Host = "beta"
			return m.sign(t, &p)
		},
		"for another counter": func() *policy.Policy {
			p := *now
			p.Counter++
			return m.sign(t, &p)
		},
		"with another version": func() *policy.Policy {
			p := *m.sign(t, now)
			p.Version++
			return &p
		},
	} {
		t.Run(name, func(t *testing.T) {
			m.installed = []*policy.Policy{forge()}
			if key, err := h.Open(t.Context(), "k", blob); err == nil {
				key.Wipe()
				t.Error("a sealed key opens")
			}
			if root, err := h.Root(t.Context()); err == nil {
				root.Wipe()
				t.Error("the root opens")
			}
			if err := h.SetRoot(t.Context(), secret.Random(32)); err == nil {
				t.Error("the root is written")
			}
		})
	}
	m.installed = []*policy.Policy{m.sign(t, now)} // the control
	wantOpens(t, h.TPM, "k", blob, key)
	wantRoot(t, h.TPM, root)
	wantNoHandles(t, h.tap)
}

func TestForgedRevocations(t *testing.T) {
	m, stranger := newTeam(t), newTeam(t)
	h := newGovernedHost(t, m, 4)
	p := m.allow(t, h, "good")
	for name, r := range map[string]*policy.Revocation{
		"another key":        stranger.revocation(t, "alpha", p.Version+1),
		"another host's":     m.revocation(t, "beta", p.Version+1),
		"for another host":   func() *policy.Revocation { r := m.revocation(t, "beta", p.Version+1); r.Host = "alpha"; return r }(),
		"of another version": func() *policy.Revocation { r := m.revocation(t, "alpha", p.Version+1); r.Below++; return r }(),
		"not signed":         {Host: "alpha", Counter: counterIndex, Below: p.Version + 1},
		"too far for a typo": m.revocation(t, "alpha", p.Version+100_000),
	} {
		if counter, err := h.Revoke(t.Context(), r); err == nil {
			t.Errorf("%s: taken, the counter is at %d", name, counter)
		}
	}
	if got := h.measured(t).Revoked; got != p.Version {
		t.Errorf("the counter is at %d, want %d", got, p.Version)
	}
	wantNoHandles(t, h.tap)
}

// The owner of the TPM cannot turn the counter back, nor on, and cannot use the root;
// whom it may deny service is the owner's own host.
func TestOwnerAgainstCounter(t *testing.T) {
	m := newTeam(t)
	h := newGovernedHost(t, m, 4)
	p := m.allow(t, h, "good")
	root := setRoot(t, h.TPM)
	d := dialTap(t, h.tap)
	name := func(index uint32) tpm2.TPM2BName {
		rsp, err := tpm2.NVReadPublic{NVIndex: tpm2.TPMHandle(index)}.Execute(d)
		if err != nil {
			t.Fatal(err)
		}
		return rsp.NVName
	}
	counter := tpm2.NamedHandle{Handle: counterIndex, Name: name(counterIndex)}
	rootIndex := tpm2.NamedHandle{Handle: tpm.DefaultNVRoot, Name: name(tpm.DefaultNVRoot)}
	for _, auth := range []tpm2.AuthHandle{
		{Handle: tpm2.TPMRHOwner, Auth: tpm2.PasswordAuth(nil)},
		{Handle: tpm2.TPMRHPlatform, Auth: tpm2.PasswordAuth(nil)},
		{Handle: counterIndex, Name: counter.Name, Auth: tpm2.PasswordAuth(nil)},
	} {
		if _, err := (tpm2.NVIncrement{AuthHandle: auth, NVIndex: counter}).Execute(d); err == nil {
			t.Errorf("handle %#x counts up", auth.Handle)
		}
		if auth.Handle == counterIndex {
			auth = tpm2.AuthHandle{Handle: rootIndex.Handle, Name: rootIndex.Name, Auth: tpm2.PasswordAuth(nil)}
		}
		if _, err := (tpm2.NVRead{AuthHandle: auth, NVIndex: rootIndex, Size: 32}).Execute(d); err == nil {
			t.Errorf("handle %#x reads the root", auth.Handle)
		}
		if _, err := (tpm2.NVWrite{AuthHandle: auth, NVIndex: rootIndex, Data: tpm2.TPM2BMaxNVBuffer{Buffer: make([]byte, 32)}}).Execute(d); err == nil {
			t.Errorf("handle %#x writes the root", auth.Handle)
		}
	}
	wantRoot(t, h.TPM, root)

	// Removed and made anew, it is above all that it ever was.
	if _, err := h.Revoke(t.Context(), m.revocation(t, "alpha", p.Version+1)); err != nil {
		t.Fatal(err)
	}
	_, err := h.Root(t.Context())
	wantRefused(t, err, "is revoked")
	_, err = tpm2.NVUndefineSpace{AuthHandle: tpm2.AuthHandle{Handle: tpm2.TPMRHOwner, Auth: tpm2.PasswordAuth(nil)}, NVIndex: counter}.Execute(d)
	if err != nil {
		t.Fatal(err)
	}
	_, err = h.Root(t.Context())
	wantClass(t, err, tpm.ClassLost)
	provision(t, h.cfg)
	if got := h.measured(t).Revoked; got <= p.Version {
		t.Errorf("a new counter starts at %d: policy %d is valid again", got, p.Version)
	}
	_, err = h.Root(t.Context())
	wantRefused(t, err, "is revoked")
	m.allow(t, h, "after the repair")
	wantRoot(t, h.TPM, root)
}
