package vault

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"time"

	"conseal/internal/failpoint"
)

// Limits of the receipts that a vault keeps.
const (
	MaxReceipt  = 16 << 10 // bytes
	MaxReceipts = 1024     // of one key: a fleet has no more hosts
)

const receiptSuffix = ".receipt"

// Tombstone is what stays for ever of a key that was deleted.
type Tombstone struct {
	Key    KeyID
	At     time.Time // to the second
	Public [32]byte  // SHA-256 of the public key, in the scheme's own form
	Shares uint64    // that were erased
	// RootsBefore and RootsAfter count the roots that the hardware was given before the
	// erasure, and with it.
	RootsBefore, RootsAfter uint64
}

// tombstone finds the one of a name, whatever the incarnation.
func (m *manifest) tombstone(name string) (Tombstone, bool) {
	for id, r := range m.keys {
		if t := r.tombstone; id.Name == name && t != nil {
			return Tombstone{id, moment(t.at), t.public, t.shares, t.roots, t.roots + 1}, true
		}
	}
	return Tombstone{}, false
}

// Deleted returns the tombstone of a name, whatever the incarnation.
func (v *Vault) Deleted(name string) (Tombstone, bool) { return v.now.Load().tombstone(name) }

// AwaitDeletion notes since when the deletion of a key waits, to the second; the zero
// Time: it was revoked. The first time that is noted counts. A revocation takes a new
// root, so that no older copy of the folder makes a later deletion come too early.
func (v *Vault) AwaitDeletion(ctx context.Context, id KeyID, since time.Time) error {
	return v.change(ctx, id, since.IsZero(), func(r *record) error {
		switch {
		case since.IsZero() == (r.deleting == 0):
			return errNoChange
		case since.IsZero():
			r.deleting = 0
		default:
			r.deleting = uint64(since.Unix())
		}
		return nil
	})
}

// Delete erases every share of every epoch and incarnation of the key's name, the active
// ones too, as [Vault.Drop] does and under one root, and puts up a tombstone in their
// place: from then on the name gets no share. public is the SHA-256 of the public key,
// which the caller has compared with that of what the vault holds. A name that was deleted
// stays as it is.
func (v *Vault) Delete(ctx context.Context, id KeyID, public [32]byte) error {
	v.writing.Lock()
	defer v.writing.Unlock()
	if err := v.settle(ctx); err != nil {
		return err
	}
	next := v.now.Load().clone()
	if _, deleted := next.tombstone(id.Name); deleted {
		return nil
	}
	var erased []share
	for _, other := range next.sorted() {
		if other.Name == id.Name {
			r := next.edit(other)
			erased = append(erased, r.shares...)
			r.shares, r.deleting = nil, 0
		}
	}
	next.edit(id).tombstone = &tombstone{at: uint64(time.Now().Unix()), public: public, shares: uint64(len(erased)), roots: next.roots}
	if err := v.commit(ctx, next, true, erased); err != nil {
		return fmt.Errorf("deleting key %q: %w", id.Name, err)
	}
	return nil
}

// KeepReceipt keeps a receipt of a deletion, this host's or another's, which the caller
// has verified. To keep it again is no error.
func (v *Vault) KeepReceipt(ctx context.Context, id KeyID, receipt []byte) error {
	if len(receipt) == 0 || len(receipt) > MaxReceipt {
		return fmt.Errorf("keeping a receipt for key %q: it has %d bytes", id.Name, len(receipt))
	}
	v.writing.Lock()
	defer v.writing.Unlock()
	if err := v.settle(ctx); err != nil {
		return err
	}
	next, digest := v.now.Load().clone(), sha256.Sum256(receipt)
	r := next.edit(id)
	at, found := slices.BinarySearchFunc(r.receipts, digest, func(a, b [32]byte) int { return bytes.Compare(a[:], b[:]) })
	switch {
	case found:
		return nil
	case len(r.receipts) >= MaxReceipts:
		return fmt.Errorf("keeping a receipt for key %q: %d are kept already", id.Name, MaxReceipts)
	}
	if err := writeFile(v.receiptPath(digest), receipt, "vault/receipt"); err != nil {
		return fmt.Errorf("keeping a receipt for key %q: %w", id.Name, err)
	}
	failpoint.Hit("vault/receipt/file")
	r.receipts = slices.Insert(r.receipts, at, digest)
	if err := v.commit(ctx, next, false, nil); err != nil {
		return fmt.Errorf("keeping a receipt for key %q: writing the manifest: %w", id.Name, err)
	}
	return nil
}

// Receipts returns what [Vault.KeepReceipt] kept for a name, whatever the incarnation, as
// far as it can be read; the error is about the rest.
func (v *Vault) Receipts(name string) (receipts [][]byte, err error) {
	m := v.now.Load()
	for _, id := range m.sorted() {
		if id.Name != name {
			continue
		}
		for _, digest := range m.keys[id].receipts {
			b, bad := readFile(v.receiptPath(digest), MaxReceipt)
			if bad == nil && sha256.Sum256(b) != digest {
				bad = ErrDamaged
			}
			if bad != nil {
				err = errors.Join(err, fmt.Errorf("receipt %x for key %q: %w", digest[:8], name, bad))
				continue
			}
			receipts = append(receipts, b)
		}
	}
	return receipts, err
}

// HasReceipts tells whether the vault keeps a receipt of that name.
func (v *Vault) HasReceipts(name string) bool {
	for id, r := range v.now.Load().keys {
		if id.Name == name && len(r.receipts) > 0 {
			return true
		}
	}
	return false
}

// receiptPath is beside the certificates.
func (v *Vault) receiptPath(digest [32]byte) string {
	return filepath.Join(v.dir, certsFolder, hex.EncodeToString(digest[:])+receiptSuffix)
}
