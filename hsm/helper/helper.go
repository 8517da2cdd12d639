// Package helper runs a host's PKCS#11 module in a process of its own, so that a
// crash or hang of a vendor's library costs milliseconds, not the agent.
//
// [Open] and [Provision] do what those of package hsm do. The helper is this very
// program, started again: its main calls [Main] if it was [Called].
//
//	func main() {
//		if helper.Called() {
//			os.Exit(helper.Main())
//		}
//		...
//		h, err := helper.Open(ctx, helper.Config{HSM: hsm.Config{...}})
//
// The PIN is read in the helper and never is in this process. The helper can neither
// read this process's memory nor gain privileges, and ends with this process.
package helper

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/sha256"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"conseal/hsm"
	"conseal/internal/pin"
	"conseal/internal/secret"
)

// Config says how to reach a host's token.
type Config struct {
	HSM hsm.Config
	// Timeout is how long the module may take for one use of a key before it is taken
	// to hang and is ended; 0 means 10s. What makes several calls may take longer: see
	// deadlines.
	Timeout time.Duration
	// Environment are the names of the variables that the module gets to see, beside
	// CREDENTIALS_DIRECTORY.
	Environment []string
	// Lost, if not nil, is told why a helper ended before it was asked to: its caller
	// may have had an answer from the next one.
	Lost func(error)
}

const (
	defaultTimeout  = 10 * time.Second
	defaultSessions = 8
)

// deadlines are the times that questions may take, in timeouts: so many for the
// calls of the module that they make.
func deadlines(o op) time.Duration {
	switch o {
	case opStart, opRoot, opSetRoot, opIdentity:
		return 3
	case opProvision, opWithdraw:
		return 30 // keys are made and destroyed
	}
	return 1
}

func (c *Config) deadline(o op) time.Duration {
	if c.Timeout == 0 {
		return deadlines(o) * defaultTimeout
	}
	return deadlines(o) * c.Timeout
}

// pinSource is the source that counts.
func (c *Config) pinSource() (pin.Source, error) {
	text := c.HSM.PINSource
	if text == "" {
		u, err := hsm.ParseURI(c.HSM.URI)
		if err != nil {
			return pin.Source{}, err
		}
		text = u.PINSource
	}
	if text == "" {
		return pin.Source{}, nil // package hsm says so
	}
	return pin.ParseSource(text)
}

// prepare takes what belongs to this process and is handed to each helper.
func prepare(ctx context.Context, cfg *Config) (lock *os.File, err error) {
	source, err := cfg.pinSource()
	if err == nil {
		err = source.Keep() // a pipe can be read once, and there may be several helpers
	}
	if err != nil {
		return nil, fmt.Errorf("hsm: %w", err)
	}
	return lockFolder(ctx, cfg.HSM.StateDir)
}

// lockPause is between two looks at a lock.
const lockPause = 10 * time.Millisecond

// lockFolder takes a state folder for this process and its helpers. A killed agent's
// helper may need a moment to end; until then it could still change the root.
func lockFolder(ctx context.Context, dir string) (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(dir, "hsm.lock"), os.O_CREATE|os.O_RDWR|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, fmt.Errorf("hsm: state folder: %w: make it with install -d -m 0700", err)
	}
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	for {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return f, nil
		}
		select {
		case <-ctx.Done():
			f.Close()
			return nil, fmt.Errorf("hsm: state folder %s is in use by another process (look with fuser %s): %w", dir, f.Name(), err)
		case <-time.After(lockPause):
		}
	}
}

// Provision makes what a host needs in its token: see [hsm.Provision].
func Provision(ctx context.Context, cfg Config) (hsm.Provisioned, error) {
	return once(ctx, cfg, opProvision)
}

// Withdraw destroys what a host has in its token: see [hsm.Withdraw].
func Withdraw(ctx context.Context, cfg Config) (hsm.Provisioned, error) {
	return once(ctx, cfg, opWithdraw)
}

// once starts a helper for one question.
func once(ctx context.Context, cfg Config, o op) (hsm.Provisioned, error) {
	var done hsm.Provisioned
	lock, err := prepare(ctx, &cfg)
	if err != nil {
		return done, err
	}
	defer lock.Close()
	p, a := begin(ctx, &cfg, lock, o)
	if p != nil {
		defer p.stop(stopTime)
	}
	if a.err != nil {
		return done, a.err
	}
	if err := strictJSON([]byte(a.text), &done); err != nil {
		return done, fmt.Errorf("hsm: %s: the helper's answer: %w", o, err)
	}
	return done, nil
}

// Name says which token it is: "hsm pkcs11:token=conseal;serial=1234".
func (h *HSM) Name() string { return h.name }

// Kind is "hsm".
func (h *HSM) Kind() string { return "hsm" }

// Seal is [hsm.HSM.Seal].
func (h *HSM) Seal(ctx context.Context, id string) (*secret.Bytes, []byte, error) {
	a := h.ask(ctx, &frame{op: opSeal, text: id})
	key, err := a.key()
	if err == nil && len(a.blob) == 0 {
		key.Wipe()
		key, err = nil, errors.New("hsm: sealing: the helper gave no blob")
	}
	if err != nil {
		return nil, nil, err
	}
	return key, a.blob, nil
}

// Open is [hsm.HSM.Open].
func (h *HSM) Open(ctx context.Context, id string, blob []byte) (*secret.Bytes, error) {
	return h.ask(ctx, &frame{op: opOpen, text: id, blob: blob}).key()
}

// Root is [hsm.HSM.Root].
func (h *HSM) Root(ctx context.Context) (*secret.Bytes, error) {
	return h.ask(ctx, &frame{op: opRoot}).key()
}

// SetRoot is [hsm.HSM.SetRoot]. If the helper ends inside, it is not repeated: Root
// tells whether it was done. So it does if the context ends: what Root says then stays.
func (h *HSM) SetRoot(ctx context.Context, next *secret.Bytes) error {
	return h.ask(ctx, &frame{op: opSetRoot, secret: next}).err
}

const keySize = 32

// key is the secret of an answer, which has its length.
func (a answer) key() (*secret.Bytes, error) {
	if a.err != nil {
		return nil, a.err
	}
	if a.secret == nil || a.secret.Len() != keySize {
		a.secret.Wipe()
		return nil, fmt.Errorf("hsm: the helper gave no key of %d bytes", keySize)
	}
	return a.secret, nil
}

// identity signs with the host's key. What the helper signs is verified here.
type identity struct {
	h      *HSM
	public *ecdsa.PublicKey
}

// Identity gives the host's key, ECDSA on P-256: see [hsm.HSM.Identity]. Each of its
// signatures has a deadline.
func (h *HSM) Identity(ctx context.Context) (crypto.Signer, error) {
	a := h.ask(ctx, &frame{op: opIdentity})
	if a.err != nil {
		return nil, a.err
	}
	key, err := x509.ParsePKIXPublicKey(a.blob)
	public, ok := key.(*ecdsa.PublicKey)
	if err != nil || !ok || public.Curve != elliptic.P256() {
		return nil, fmt.Errorf("hsm: identity in %s: the helper gave no key on P-256", h.name)
	}
	return &identity{h, public}, nil
}

// Public is an [*ecdsa.PublicKey].
func (i *identity) Public() crypto.PublicKey { return i.public }

// Sign signs a SHA-256 digest and gives the signature in DER.
func (i *identity) Sign(_ io.Reader, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	if opts == nil || opts.HashFunc() != crypto.SHA256 || len(digest) != sha256.Size {
		return nil, errors.New("hsm: the identity key signs SHA-256 digests of 32 bytes only")
	}
	a := i.h.ask(context.Background(), &frame{op: opSign, blob: digest})
	if a.err != nil {
		return nil, a.err
	}
	if !ecdsa.VerifyASN1(i.public, digest, a.blob) {
		return nil, &hsm.Error{Class: hsm.ClassPolicy, What: "hsm: signing in " + i.h.name + ": another key signed than the host's"}
	}
	return a.blob, nil
}

// strictJSON reads one document and nothing else.
func strictJSON(b []byte, into any) error {
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(into); err != nil {
		return err
	}
	if _, err := d.Token(); err != io.EOF {
		return errors.New("something follows")
	}
	return nil
}
