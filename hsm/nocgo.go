//go:build !cgo

package hsm

import (
	"context"
	"crypto"
	"errors"

	"conseal/internal/secret"
)

var errNoCgo = errors.New("hsm: built without cgo: PKCS#11 needs a build with CGO_ENABLED=1")

// HSM is a host's part of a token. There is none in a build without cgo.
type HSM struct{}

// Open says that PKCS#11 needs cgo.
func Open(context.Context, Config) (*HSM, error) { return nil, errNoCgo }

// Withdraw says that PKCS#11 needs cgo.
func Withdraw(context.Context, Config) (Provisioned, error) { return Provisioned{}, errNoCgo }

// Provision says that PKCS#11 needs cgo.
func Provision(context.Context, Config) (Provisioned, error) { return Provisioned{}, errNoCgo }

// OpenKey says that PKCS#11 needs cgo.
func OpenKey(KeyConfig) (crypto.Signer, func(), error) { return nil, nil, errNoCgo }

// Probe says that PKCS#11 needs cgo.
func Probe(context.Context, Config) (*Report, error) { return nil, errNoCgo }

// Close does nothing.
func (h *HSM) Close() {}

// Name is "hsm".
func (h *HSM) Name() string { return "hsm" }

// Kind is "hsm".
func (h *HSM) Kind() string { return "hsm" }

// Seal says that PKCS#11 needs cgo.
func (h *HSM) Seal(context.Context, string) (*secret.Bytes, []byte, error) {
	return nil, nil, errNoCgo
}

// Open says that PKCS#11 needs cgo.
func (h *HSM) Open(context.Context, string, []byte) (*secret.Bytes, error) { return nil, errNoCgo }

// Root says that PKCS#11 needs cgo.
func (h *HSM) Root(context.Context) (*secret.Bytes, error) { return nil, errNoCgo }

// SetRoot says that PKCS#11 needs cgo.
func (h *HSM) SetRoot(context.Context, *secret.Bytes) error { return errNoCgo }

// Identity says that PKCS#11 needs cgo.
func (h *HSM) Identity(context.Context) (crypto.Signer, error) { return nil, errNoCgo }
