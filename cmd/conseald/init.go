package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"

	"conseal/agent"
	"conseal/agent/vault"
	"conseal/config"
	"conseal/hsm"
	"conseal/hsm/helper"
	"conseal/tpm"
)

func initCommand(file *string, out io.Writer) *cobra.Command {
	var asJSON bool
	var policies []string
	var undo bool
	var confirm, ownLockout string
	c := &cobra.Command{
		Use:   "init",
		Short: "Make this host's identity and vault in its hardware, and print its line for the roster",
		Long: `Make this host's identity key in its TPM or HSM, and an empty vault under it,
and print the host's entry for the roster.

A second run makes what is missing, changes nothing that is there, and prints
the same entry.

With --own-lockout, the TPM's protection against dictionary attacks becomes this
host's: 32 tries, 10 minutes, and a lockout authorization that is written to FILE
first. Without it that is left as it is.

With --undo, for a host that leaves: take what is this host's out of its TPM or HSM, and
its shares from its disk. Nobody can bring them back.`,
		Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			if undo {
				return withdraw(c.Context(), *file, out, confirm)
			}
			if c.Flags().Changed("own-lockout") && ownLockout == "" {
				return errors.New("--own-lockout wants the file for the lockout authorization, and got an empty name")
			}
			return initialise(c.Context(), *file, out, policies, ownLockout, asJSON)
		},
	}
	c.Flags().StringArrayVar(&policies, "policy", nil, "install a signed seal policy first; may be repeated")
	c.Flags().StringVar(&ownLockout, "own-lockout", "", "set the TPM's lockout authorization and write it to `FILE`, and its dictionary attack parameters")
	c.Flags().BoolVar(&undo, "undo", false, "for a host that leaves: destroy its shares and what is its own in the TPM or HSM")
	c.Flags().StringVar(&confirm, "confirm", "", "with --undo: the name of this host")
	c.Flags().BoolVar(&asJSON, "json", false, "print JSON, for programs")
	c.MarkFlagsMutuallyExclusive("undo", "own-lockout")
	return c
}

func initialise(ctx context.Context, file string, out io.Writer, policies []string, ownLockout string, asJSON bool) error {
	c, err := config.Load(file)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(c.State, 0o700); err != nil {
		return fmt.Errorf("making the state folder: %w", err)
	}
	if err := vault.InUse(agent.VaultFolder(c)); err != nil { // before the hardware is touched
		return err
	}
	steps, err := provision(ctx, c, ownLockout)
	if err != nil {
		return err
	}
	hw, err := openHardware(ctx, c, logger(c, os.Stderr))
	if err != nil {
		return err
	}
	if p, ok := hw.protector.(*helper.Pair); ok {
		if err := p.Settle(ctx); err != nil {
			return errors.Join(err, hw.close())
		}
	}
	installed, err := hw.seal.installFiles(ctx, policies)
	if err != nil {
		return errors.Join(err, hw.close())
	}
	step, err := createVault(ctx, c, hw.protector)
	if hw.seal != nil && tpm.ClassOf(err) == tpm.ClassPolicy {
		err = hw.seal.unsigned(ctx, c, err)
	}
	if err != nil {
		return errors.Join(err, hw.close())
	}
	steps = append(steps, installed...)
	pin, err := config.PinOf(hw.identity.Public())
	if err := errors.Join(err, hw.close()); err != nil {
		return err
	}
	return report(out, c, pin, append(steps, step), asJSON)
}

// provision makes what is missing in the hardware and returns the steps in words.
func provision(ctx context.Context, c *config.Host, ownLockout string) ([]string, error) {
	if c.Protector.Kind == "hsm" {
		if ownLockout != "" {
			return nil, errors.New("--own-lockout is for a TPM, and this host has an HSM")
		}
		return eachToken(ctx, c, helper.Provision)
	}
	kept, err := readTPMRecord(c)
	if errors.Is(err, fs.ErrNotExist) {
		kept, err = &tpmRecord{Version: tpmRecordVersion}, nil
	}
	if err != nil {
		return nil, err
	}
	seal, err := openSealPolicies(c)
	if err != nil {
		return nil, err
	}
	p, err := tpm.Provision(ctx, tpmConfig(c, kept, seal))
	if err != nil {
		return nil, err
	}
	kept.SRKName, kept.PCRWanted, kept.Identity = p.SRKName, p.PCRWanted, string(p.Identity)
	if err := kept.write(c); err != nil {
		return nil, err
	}
	steps, err := tpm.Lockout(ctx, tpmConfig(c, kept, seal), ownLockout)
	return append(p.Steps, steps...), err
}

// eachToken provisions the host's tokens, or withdraws from them, and returns the steps
// in words.
func eachToken(ctx context.Context, c *config.Host, do func(context.Context, helper.Config) (hsm.Provisioned, error)) (steps []string, err error) {
	if err := secondNamed(c); err != nil {
		return nil, err
	}
	log := logger(c, os.Stderr)
	tokens := []helper.Config{hsmConfig(c, log)}
	if c.Protector.HSM.SecondURI != "" {
		tokens = append(tokens, secondConfig(c, log))
	}
	for _, cfg := range tokens {
		if err := os.MkdirAll(cfg.HSM.StateDir, 0o700); err != nil {
			return steps, err
		}
		p, err := do(ctx, cfg)
		if err != nil {
			return steps, err
		}
		for _, s := range p.Steps {
			steps = append(steps, s.Object+": "+s.Done)
		}
		if p.Erasure == "" { // it was withdrawn from
			continue
		}
		if err := recordErasure(cfg.HSM.StateDir, p); err != nil {
			return steps, err
		}
		steps = append(steps, fmt.Sprintf("erasure: %s, a guess: %s", p.Erasure, p.ErasureWhy))
	}
	return steps, nil
}

// withdraw undoes what initialise did.
func withdraw(ctx context.Context, file string, out io.Writer, confirm string) error {
	c, err := config.Load(file)
	if err != nil {
		return err
	}
	if confirm != c.Name {
		return fmt.Errorf("this destroys all shares of host %q, for good: keys that need it for their quorum are lost with it; if that is meant, run: conseald init --undo --confirm %s", c.Name, c.Name)
	}
	if err := vault.InUse(agent.VaultFolder(c)); err != nil {
		return err
	}
	var steps []string
	if c.Protector.Kind == "hsm" {
		steps, err = eachToken(ctx, c, helper.Withdraw)
	} else {
		steps, err = withdrawTPM(ctx, c)
	}
	for _, s := range steps {
		fmt.Fprintln(out, s)
	}
	if err != nil {
		return err
	}
	for _, name := range []string{"vault", filepath.Base(hsmFolder(c)), filepath.Base(secondFolder(c)), "policies", "measurement.toml", filepath.Base(tpmRecordPath(c))} { // the record last: with it, this can be run again
		path := filepath.Join(c.State, name)
		if _, err := os.Lstat(path); errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err := os.RemoveAll(path); err != nil {
			return err
		}
		fmt.Fprintln(out, path+": removed")
	}
	_, err = fmt.Fprintf(out, "%s: left; take the host out of the roster\n", filepath.Join(c.State, "audit.log"))
	return err
}

func withdrawTPM(ctx context.Context, c *config.Host) ([]string, error) {
	kept, err := readTPMRecord(c)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("this host was not initialised, or was undone already: %w", err)
	}
	if err != nil {
		return nil, err
	}
	seal, err := openSealPolicies(c)
	if err != nil {
		return nil, err
	}
	return tpm.Withdraw(ctx, tpmConfig(c, kept, seal))
}

func createVault(ctx context.Context, c *config.Host, p vault.Protector) (step string, err error) {
	err = vault.Create(ctx, agent.VaultFolder(c), c.Name, p)
	if errors.Is(err, vault.ErrExists) {
		return "vault " + agent.VaultFolder(c) + ": already there", nil
	}
	return "vault " + agent.VaultFolder(c) + ": made", err
}

func report(out io.Writer, c *config.Host, pin config.Pin, steps []string, asJSON bool) error {
	if asJSON {
		return json.NewEncoder(out).Encode(map[string]any{
			"name": c.Name, "identity": pin.String(), "protector": c.Protector.Kind, "steps": steps,
		})
	}
	for _, s := range steps {
		fmt.Fprintln(out, s)
	}
	_, err := fmt.Fprintf(out, `
This host's entry for the roster (put in the address where other hosts reach it):

[[host]]
name = %q
address = "%s:7443"
identity = %q
protector = %q

To compare aloud: %s
`, c.Name, c.Name, pin, c.Protector.Kind, pin.Grouped())
	return err
}
