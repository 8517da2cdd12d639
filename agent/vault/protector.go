package vault

import (
	"context"

	"conseal/internal/secret"
)

// Protector is the hardware that guards this host's shares at rest: a TPM or
// an HSM. Its methods may be called by several goroutines.
type Protector interface {
	// Name says what and where it is, for people: "tpm device:/dev/tpmrm0".
	Name() string
	// Kind is "tpm" or "hsm".
	Kind() string
	// Seal makes a fresh 32-byte key and the blob from which only this
	// hardware, in a state that its policy allows, gets it back. id says what
	// the key is for and is bound in: Open with another id fails.
	Seal(ctx context.Context, id string) (key *secret.Bytes, blob []byte, err error)
	// Open gives back the key of a blob that Seal made under the same id.
	Open(ctx context.Context, id string, blob []byte) (*secret.Bytes, error)
	// Root is the host's one erasable secret, 32 bytes. If none was ever set,
	// the error implements [NoRoot].
	Root(ctx context.Context) (*secret.Bytes, error)
	// SetRoot replaces the root. Once it has returned nil, no earlier root can
	// be had from this hardware by anybody. After a crash or an error inside
	// SetRoot, Root gives the old or the new one, whole.
	SetRoot(ctx context.Context, next *secret.Bytes) error
}

// NoRoot is implemented by the error with which a [Protector] says that it was
// provisioned and no root was ever set.
type NoRoot interface{ NoRoot() bool }

// Certifier is a [Protector] whose hardware can certify, for who attested the host, that
// something was stated on it, and after what.
type Certifier interface {
	// Receipt returns the hardware's certificate of a statement that has that SHA-256,
	// in an encoding of its own.
	Receipt(ctx context.Context, statement [32]byte) ([]byte, error)
}
