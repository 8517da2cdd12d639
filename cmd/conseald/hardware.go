package main

import (
	"context"
	"crypto"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"conseal/agent/vault"
	"conseal/config"
	"conseal/hsm"
	"conseal/hsm/helper"
	"conseal/internal/disk"
	"conseal/tpm"
)

// hardware is the TPM or HSM of this host, opened.
type hardware struct {
	protector vault.Protector
	seal      *sealPolicies // nil unless signed policies say when the TPM opens
	identity  crypto.Signer
	close     func() error
}

// openHardware opens what `conseald init` provisioned.
func openHardware(ctx context.Context, c *config.Host, log *slog.Logger) (*hardware, error) {
	if c.Protector.Kind == "hsm" {
		return openHSM(ctx, c, log)
	}
	return openTPM(ctx, c)
}

func openTPM(ctx context.Context, c *config.Host) (*hardware, error) {
	kept, err := readTPMRecord(c)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("this host was not initialised: run `conseald init`: %w", err)
	}
	if err != nil {
		return nil, err
	}
	seal, err := openSealPolicies(c)
	if err != nil {
		return nil, err
	}
	t, err := tpm.Open(ctx, tpmConfig(c, kept, seal))
	if err != nil {
		return nil, err
	}
	if seal != nil {
		seal.t = t
	}
	closeTPM := func() error {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
		defer cancel()
		return t.Close(ctx)
	}
	identity, err := t.Identity(ctx, []byte(kept.Identity))
	if err != nil {
		return nil, errors.Join(err, closeTPM())
	}
	return &hardware{certifier{t}, seal, identity, closeTPM}, nil
}

// certifier is a TPM as the vault's protector: its receipts are [attest.Receipt.Encode].
type certifier struct{ *tpm.TPM }

var _ vault.Certifier = certifier{}

func (c certifier) Receipt(ctx context.Context, statement [32]byte) ([]byte, error) {
	r, err := c.TPM.Receipt(ctx, statement[:])
	if err != nil {
		return nil, err
	}
	return r.Encode()
}

// token is one HSM, or a pair of them.
type token interface {
	vault.Protector
	Identity(context.Context) (crypto.Signer, error)
	Close()
}

func openToken(ctx context.Context, c *config.Host, log *slog.Logger) (token, error) {
	if err := secondNamed(c); err != nil {
		return nil, err
	}
	if c.Protector.HSM.SecondURI == "" {
		return helper.Open(ctx, hsmConfig(c, log))
	}
	return helper.OpenPair(ctx, helper.PairConfig{
		First: hsmConfig(c, log), Second: secondConfig(c, log),
		Changed: func(name string, err error) {
			if err != nil {
				log.Warn("one of the two tokens is away", "protector", name, "error", err)
			} else {
				log.Info("a token is back", "protector", name)
			}
		},
	})
}

func openHSM(ctx context.Context, c *config.Host, log *slog.Logger) (*hardware, error) {
	h, err := openToken(ctx, c, log)
	if err != nil {
		return nil, err
	}
	identity, err := h.Identity(ctx)
	if err != nil {
		h.Close()
		return nil, err
	}
	return &hardware{h, nil, identity, func() error { h.Close(); return nil }}, nil
}

func hsmConfig(c *config.Host, log *slog.Logger) helper.Config {
	m := &c.Protector.HSM
	return helper.Config{
		HSM: hsm.Config{
			URI: m.URI, Name: c.Name, Method: m.Method, InitArgs: m.InitArgs, Modules: m.Modules, PINSource: m.PIN,
			StateDir: hsmFolder(c), MaxSessions: m.MaxSessions, Identity: m.Objects.Identity, Wrap: m.Objects.Wrap,
		},
		Timeout: m.Timeout, Environment: m.Environment,
		Lost: func(err error) {
			log.Warn("the PKCS#11 module's process ended and is started again when it is needed", "error", err)
		},
	}
}

// secondConfig is the second token's, if there is one.
func secondConfig(c *config.Host, log *slog.Logger) helper.Config {
	m, cfg := &c.Protector.HSM, hsmConfig(c, log)
	cfg.HSM.URI, cfg.HSM.StateDir, cfg.HSM.Second = m.SecondURI, secondFolder(c), true
	u, err := hsm.ParseURI(m.SecondURI)
	if m.SecondPIN != "" || err == nil && u.PINSource != "" {
		cfg.HSM.PINSource = m.SecondPIN // wins over the URI's, unless it is empty
	}
	return cfg
}

// secondNamed is nil unless this host had a root in a second token that its configuration
// names no more: that keeps the root of the day, whatever becomes of it in the first.
func secondNamed(c *config.Host) error {
	if c.Protector.HSM.SecondURI != "" {
		return nil
	}
	roots, err := filepath.Glob(filepath.Join(secondFolder(c), "hsm-root.*"))
	if err == nil && len(roots) > 0 {
		err = fmt.Errorf("protector.hsm.second_uri is empty, and %s has a root of a second token, which would stay in it: put second_uri back; or destroy conseal/%s/root-second in that token and remove the folder", secondFolder(c), c.Name)
	}
	return err
}

func hsmFolder(c *config.Host) string    { return filepath.Join(c.State, "hsm") }
func secondFolder(c *config.Host) string { return filepath.Join(c.State, "hsm-second") }

func tpmConfig(c *config.Host, kept *tpmRecord, seal *sealPolicies) tpm.Config {
	t := &c.Protector.TPM
	return tpm.Config{
		Device: t.Device, Timeout: t.Timeout, PCRs: t.PCRs, NVRoot: t.NVRoot, NVReceipts: t.NVReceipts, SRKHandle: t.SRKHandle,
		Authority: seal.authority(), PINSource: t.PIN, StateDir: c.State, SRKName: kept.SRKName, PCRWanted: kept.PCRWanted, Identity: []byte(kept.Identity),
	}
}

// tpmRecord is what provisioning a TPM gave, kept in the state folder. None of
// it is secret.
type tpmRecord struct {
	Version   int            `json:"version"`
	SRKName   []byte         `json:"srk_name"`
	PCRWanted map[int][]byte `json:"pcr_wanted"`
	Identity  string         `json:"identity"` // PEM
}

const tpmRecordVersion = 2

func tpmRecordPath(c *config.Host) string { return filepath.Join(c.State, "tpm.json") }

func readTPMRecord(c *config.Host) (*tpmRecord, error) {
	path := tpmRecordPath(c)
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	r := &tpmRecord{}
	if err := json.Unmarshal(b, r); err != nil {
		return nil, fmt.Errorf("%s is damaged: %w: put it back from a backup (it holds no secret)", path, err)
	}
	if r.Version != tpmRecordVersion {
		return nil, fmt.Errorf("%s has format version %d, this program knows %d", path, r.Version, tpmRecordVersion)
	}
	return r, nil
}

// write keeps the record, whole or not at all.
func (r *tpmRecord) write(c *config.Host) error {
	b, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	return disk.WriteFile(tpmRecordPath(c), append(b, '\n'))
}
