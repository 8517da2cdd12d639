package vault_test

import (
	"bytes"
	"context"
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"encoding/json"
	"errors"
	"os"
	"sync"

	"conseal/internal/secret"
)

// hardware is a protector in memory, and in a file if it has a path. It is here
// to fail when a test wants it to; what real hardware does is shown by vaulttest
// on TPMs and HSMs.
type hardware struct {
	mu   sync.Mutex
	path string
	held struct{ Key, Root []byte }

	// What they return is what the methods do; nil: they work. take lets the
	// hardware have the root.
	onSetRoot func(take func()) error
	onRoot    func() error
	onOpen    func(id string) error
}

type noRoot struct{}

func (noRoot) Error() string { return "no root was ever set" }
func (noRoot) NoRoot() bool  { return true }

func newHardware() *hardware {
	h := &hardware{}
	h.held.Key = make([]byte, 32)
	rand.Read(h.held.Key)
	return h
}

// hardwareIn is the hardware in a file, made if there is none.
func hardwareIn(path string) (*hardware, error) {
	b, err := os.ReadFile(path)
	if errors.Is(err, os.ErrNotExist) {
		h := newHardware()
		h.path = path
		return h, h.store()
	}
	if err != nil {
		return nil, err
	}
	h := &hardware{path: path}
	return h, json.Unmarshal(b, &h.held)
}

// store is atomic, as a process is killed and not the machine.
func (h *hardware) store() error {
	if h.path == "" {
		return nil
	}
	b, err := json.Marshal(h.held)
	if err != nil {
		return err
	}
	if err := os.WriteFile(h.path+".new", b, 0o600); err != nil {
		return err
	}
	return os.Rename(h.path+".new", h.path)
}

func (h *hardware) Name() string { return "fake" }
func (h *hardware) Kind() string { return "tpm" }

func (h *hardware) aead() cipher.AEAD {
	block, err := aes.NewCipher(h.held.Key)
	if err != nil {
		panic(err)
	}
	aead, err := cipher.NewGCMWithRandomNonce(block)
	if err != nil {
		panic(err)
	}
	return aead
}

func (h *hardware) Seal(ctx context.Context, id string) (*secret.Bytes, []byte, error) {
	if err := ctx.Err(); err != nil {
		return nil, nil, err
	}
	key := make([]byte, 32)
	rand.Read(key)
	return secret.Copy(key), h.aead().Seal(nil, nil, key, []byte(id)), nil
}

func (h *hardware) Open(ctx context.Context, id string, blob []byte) (*secret.Bytes, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if h.onOpen != nil {
		if err := h.onOpen(id); err != nil {
			return nil, err
		}
	}
	key, err := h.aead().Open(nil, nil, blob, []byte(id))
	if err != nil {
		return nil, err
	}
	return secret.Take(key), nil
}

func (h *hardware) Root(ctx context.Context) (*secret.Bytes, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if h.onRoot != nil {
		if err := h.onRoot(); err != nil {
			return nil, err
		}
	}
	if h.held.Root == nil {
		return nil, noRoot{}
	}
	return secret.Copy(h.held.Root), nil
}

func (h *hardware) SetRoot(ctx context.Context, next *secret.Bytes) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if err := ctx.Err(); err != nil {
		return err
	}
	if next.Len() != 32 {
		return errors.New("a root has 32 bytes")
	}
	take := func() {
		_ = next.Use(func(b []byte) error { h.held.Root = bytes.Clone(b); return nil })
	}
	if h.onSetRoot != nil {
		return h.onSetRoot(take)
	}
	take()
	return h.store()
}

// root is what the hardware has, for a test to compare or to put back.
func (h *hardware) root() []byte {
	h.mu.Lock()
	defer h.mu.Unlock()
	return bytes.Clone(h.held.Root)
}

func (h *hardware) setRootTo(b []byte) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.held.Root = bytes.Clone(b)
}
