package main

import (
	"context"
	"crypto"
	stdecdsa "crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"errors"
	"os"
	"path/filepath"
	"time"

	"conseal/internal/secret"
	"conseal/testenv"
	"conseal/tpm"
	"conseal/tpm/policy"
)

// tpmOperations measures what a host asks of its TPM, on swtpm: as installed, and by
// signed policies.
func tpmOperations(ctx context.Context) (err error) {
	dir, err := os.MkdirTemp("/tmp", "conseal-bench-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	device, err := testenv.StartTPM(ctx, dir)
	if err != nil {
		return err
	}
	defer device.Kill()
	key, err := stdecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	var installed []*policy.Policy
	cfg := tpm.Config{Device: device.Address(), PCRs: []int{0, 2, 4, 7}}
	if err := tpmHost(ctx, "tpm/as-installed/", cfg, func(*tpm.TPM) error { return nil }); err != nil {
		return err
	}
	cfg.NVRoot, cfg.NVReceipts = 0x01800700, 0x01800702
	cfg.Authority = &tpm.Authority{
		Host:      policy.Host{Name: "bench", Key: &key.PublicKey, Counter: 0x01800701},
		Installed: func() ([]*policy.Policy, error) { return installed, nil },
	}
	allow := func(t *tpm.TPM) error {
		m, err := t.Measure(ctx)
		if err != nil {
			return err
		}
		p := m.Policy("bench", time.Now())
		_, err = p.Sign(key)
		installed = []*policy.Policy{p}
		return err
	}
	if err := tpmHost(ctx, "tpm/by-policy/", cfg, allow); err != nil {
		return err
	}
	cfg.NVRoot, cfg.NVReceipts = 0x01800800, 0x01800802
	cfg.PINSource, cfg.StateDir = "file:"+filepath.Join(dir, "pin"), dir
	if err := os.WriteFile(filepath.Join(dir, "pin"), []byte("a PIN for the bench"), 0o600); err != nil {
		return err
	}
	return tpmHost(ctx, "tpm/by-policy-and-pin/", cfg, allow)
}

func tpmHost(ctx context.Context, name string, cfg tpm.Config, prepare func(*tpm.TPM) error) (err error) {
	made, err := tpm.Provision(ctx, cfg)
	if err != nil {
		return err
	}
	cfg.SRKName, cfg.PCRWanted, cfg.Identity = made.SRKName, made.PCRWanted, made.Identity
	t, err := tpm.Open(ctx, cfg)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, t.Close(ctx)) }()
	if err := prepare(t); err != nil {
		return err
	}
	root := secret.Random(tpm.KeySize)
	defer root.Wipe()
	wiped := func(s *secret.Bytes, err error) error {
		s.Wipe()
		return err
	}
	key, blob, err := t.Seal(ctx, "bench")
	if wiped(key, err) != nil {
		return err
	}
	identity, err := t.Identity(ctx, cfg.Identity)
	if err != nil {
		return err
	}
	digest := make([]byte, 32)
	for _, o := range []struct {
		name string
		do   func() error
	}{
		{"seal", func() error { key, _, err := t.Seal(ctx, "bench"); return wiped(key, err) }},
		{"open", func() error { return wiped(t.Open(ctx, "bench", blob)) }},
		{"set-root", func() error { return t.SetRoot(ctx, root) }},
		{"root", func() error { return wiped(t.Root(ctx)) }},
		{"receipt", func() error { _, err := t.Receipt(ctx, []byte("bench")); return err }},
		{"certify-sealed", func() error { _, err := t.CertifySealed(ctx, blob, digest); return err }},
		{"sign", func() error { _, err := identity.Sign(nil, digest, crypto.SHA256); return err }},
	} {
		l, err := percentiles(o.do)
		if err != nil {
			return err
		}
		print(name+o.name+"-p50", ms(l.p50), "ms")
	}
	return nil
}
