package main

import (
	"context"
	"crypto"
	"errors"
	"fmt"
	"os"

	"conseal/agent/vault"
	"conseal/hsm"
	"conseal/hsm/helper"
	"conseal/internal/secret"
	"conseal/testenv"
)

// token is what is measured of a host's token, in this process or in a helper.
type token interface {
	vault.Protector
	Identity(context.Context) (crypto.Signer, error)
	Close()
}

// hsmOperations measures what a host asks of its HSM, on SoftHSM, with and without
// a process between. The token is in memory, for a real one is no file; the state folder
// is on the disk.
func hsmOperations(ctx context.Context) (err error) {
	memory := "/dev/shm"
	if _, err := os.Stat(memory); err != nil {
		memory = ""
	}
	store, err := os.MkdirTemp(memory, "conseal-bench-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(store)
	t, err := testenv.NewToken(ctx, store)
	if err != nil {
		return err
	}
	if err := os.Setenv("SOFTHSM2_CONF", t.Conf); err != nil {
		return err
	}
	for name, open := range map[string]func(cfg hsm.Config) (token, error){
		"in-process": func(cfg hsm.Config) (token, error) { return hsm.Open(ctx, cfg) },
		"isolated": func(cfg hsm.Config) (token, error) {
			return helper.Open(ctx, helper.Config{HSM: cfg, Environment: []string{"SOFTHSM2_CONF"}})
		},
	} {
		state, err := os.MkdirTemp("/tmp", "conseal-bench-")
		if err != nil {
			return err
		}
		defer os.RemoveAll(state)
		cfg := hsm.Config{URI: t.URI, Name: name, StateDir: state}
		if _, err := helper.Provision(ctx, helper.Config{HSM: cfg, Environment: []string{"SOFTHSM2_CONF"}}); err != nil {
			return err
		}
		h, err := open(cfg)
		if err != nil {
			return err
		}
		err = hsmHost(ctx, "hsm/"+name+"/", h)
		h.Close()
		if err != nil {
			return err
		}
	}
	return nil
}

func hsmHost(ctx context.Context, name string, h token) error {
	root := secret.Random(32)
	defer root.Wipe()
	wiped := func(s *secret.Bytes, err error) error {
		s.Wipe()
		return err
	}
	key, blob, err := h.Seal(ctx, "bench")
	if err := errors.Join(wiped(key, err), h.SetRoot(ctx, root)); err != nil {
		return err
	}
	identity, err := h.Identity(ctx)
	if err != nil {
		return err
	}
	digest := make([]byte, 32)
	for _, o := range []struct {
		name     string
		together bool
		do       func() error
	}{
		{"seal", true, func() error { key, _, err := h.Seal(ctx, "bench"); return wiped(key, err) }},
		{"open", true, func() error { return wiped(h.Open(ctx, "bench", blob)) }},
		{"sign", true, func() error { _, err := identity.Sign(nil, digest, crypto.SHA256); return err }},
		{"root", false, func() error { return wiped(h.Root(ctx)) }},
		{"set-root", false, func() error { return h.SetRoot(ctx, root) }},
	} {
		l, err := percentiles(o.do)
		if err != nil {
			return err
		}
		print(name+o.name+"-p50", ms(l.p50), "ms")
		for _, callers := range []int{1, 8, 32} {
			if !o.together {
				break // a host has one root
			}
			r, err := rate(callers, o.do)
			if err != nil {
				return err
			}
			print(fmt.Sprintf("%s%s-rate-%d", name, o.name, callers), r, "/s")
		}
	}
	return nil
}
