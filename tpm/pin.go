package tpm

import (
	"bytes"
	"errors"
	"fmt"

	"github.com/google/go-tpm/tpm2"

	"conseal/internal/pin"
	"conseal/internal/secret"
)

// latch remembers which PINs the TPM refused.
func latch(stateDir string) pin.Latch { return pin.Latch{Dir: stateDir, Name: "tpm-pin.latch"} }

// ClearLatch lets a PIN be tried again that was refused with [Config.StateDir].
func ClearLatch(stateDir string) error { return latch(stateDir).Clear() }

// A PIN is an authorization value, which the TPM takes up to the size of a digest.
const (
	minPIN = 6
	maxPIN = 32
)

// hostPIN is the authorization value of what a host seals and of its NV indices. What
// has one is under the TPM's protection against dictionary attacks: wrong PINs count,
// and too many lock the TPM for all who use it. So a PIN that was refused is never sent
// again, and none is sent when the next failure would lock.
type hostPIN struct {
	source pin.Source
	latch  pin.Latch

	once *secret.Bytes // from a source that can be read once
	good *secret.Bytes // what the TPM accepted last
}

func newHostPIN(source, stateDir string) (*hostPIN, error) {
	if source == "" {
		return nil, nil
	}
	s, err := pin.ParseSource(source)
	if err != nil {
		return nil, fmt.Errorf("tpm: %w", err)
	}
	if stateDir == "" {
		return nil, errors.New("tpm: a PIN and no folder to remember in which ones were refused")
	}
	return &hostPIN{source: s, latch: latch(stateDir)}, nil
}

// read gives the PIN, which the caller wipes.
func (p *hostPIN) read() (*secret.Bytes, error) {
	if p.once != nil {
		return p.once.Clone()
	}
	v, err := p.source.Read()
	if err != nil {
		return nil, err
	}
	if n := v.Len(); n < minPIN || n > maxPIN {
		v.Wipe()
		return nil, fmt.Errorf("the PIN from %s has %d bytes: a TPM takes %d, and fewer than %d are guessed", p.source, n, maxPIN, minPIN)
	}
	if p.source.Once() {
		if p.once, err = v.Clone(); err != nil {
			return nil, err
		}
	}
	return v, nil
}

// pinned lends fn the PIN, as it is to be used now, and takes note of what the TPM
// makes of it.
func (x *tx) pinned(fn func(pin []byte) error) error {
	p := x.pin
	v, err := p.read()
	if err != nil {
		return err
	}
	defer v.Wipe()
	known := p.good != nil && p.good.Equal(v)
	if !known {
		if err := x.mayTry(v); err != nil {
			return err
		}
	}
	err = v.Use(func(b []byte) error {
		b = bytes.Clone(b) // go-tpm keeps it as long as the session
		defer clear(b)
		return fn(b)
	})
	var refused *CommandError
	switch {
	case errors.As(err, &refused) && (refused.RC.Is(tpm2.TPMRCAuthFail) || refused.RC.Is(tpm2.TPMRCBadAuth)):
		p.good.Wipe()
		p.good = nil
		return x.pinRefused(v, known, err)
	case err == nil && !known:
		p.good.Wipe()
		if p.good, err = v.Clone(); err != nil {
			return err
		}
		return p.latch.Accepted()
	}
	return err
}

// withPIN lends fn the PIN for what is made with it, nil if the host has none. It is not
// tried by that.
func (x *tx) withPIN(fn func(auth []byte) error) error {
	if x.pin == nil {
		return fn(nil)
	}
	v, err := x.pin.read()
	if err != nil {
		return err
	}
	defer v.Wipe()
	return v.Use(func(b []byte) error {
		b = bytes.Clone(b)
		defer clear(b)
		return fn(b)
	})
}

// provePIN makes sure that what is sealed next gets the PIN that the root has: sealed under
// a slip in the file, a share would open for nobody who knows the right one. Before there
// is a root nothing can be lost yet.
func (x *tx) provePIN() error {
	if x.pin == nil {
		return nil
	}
	v, err := x.pin.read()
	if err != nil {
		return err
	}
	defer v.Wipe()
	if x.pin.good != nil && x.pin.good.Equal(v) {
		return nil
	}
	root, err := x.readRoot()
	root.Wipe()
	var none *noRootError
	if errors.As(err, &none) {
		return nil
	}
	if err == nil && (x.pin.good == nil || !x.pin.good.Equal(v)) {
		err = fail(ClassAuth, "the PIN from %s is not tried by the seal policy that opens now, which waives it: nothing is sealed under a PIN that may be wrong", x.pin.source)
	}
	return err
}

// mayTry refuses to send a PIN that was refused before, or when a failure would lock
// the TPM.
func (x *tx) mayTry(v *secret.Bytes) error {
	if err := x.pin.latch.Check(v); err != nil {
		return &failure{ClassAuth, err}
	}
	s, err := x.lockoutState()
	if err != nil {
		return err
	}
	if s.locked || s.interval > 0 && s.left() <= 1 {
		return fail(ClassLockout, "the PIN is not sent: one more failure would lock the TPM, or it is locked (%v); wait until a try is forgotten, or reset the count with the lockout "+
			"authorization (tpm2_dictionarylockout -c)", s)
	}
	return nil
}

// pinRefused remembers a PIN that was wrong. known tells that the TPM took it before.
func (x *tx) pinRefused(v *secret.Bytes, known bool, cause error) error {
	if err := x.pin.latch.Arm(v); err != nil {
		return errors.Join(cause, err)
	}
	what := fmt.Sprintf("put the right one into %s, unless the TPM's owner made anew what it was for", x.pin.source)
	if known {
		what = "the TPM took it before, so that what it was for now was made anew by the TPM's owner, or is not this host's; then run `conseald clear-pin-latch`"
	}
	return fail(ClassAuth, "%w: %w; it is not sent again: %s", pin.ErrRefused, cause, what)
}

// close wipes what is kept.
func (p *hostPIN) close() {
	if p != nil {
		p.once.Wipe()
		p.good.Wipe()
	}
}
