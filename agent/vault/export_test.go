package vault

import (
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"slices"

	"conseal/internal/secret"
)

// RecodeManifest decodes a manifest and encodes it again.
func RecodeManifest(b []byte) ([]byte, error) {
	m, err := decodeManifest(b, slotVersion)
	if err != nil {
		return nil, err
	}
	return m.encode(slotVersion), nil
}

// EncodedManifest is the manifest in plain.
func (v *Vault) EncodedManifest() []byte { return v.now.Load().encode(slotVersion) }

// OpenShareFile opens a share's file as if the manifest had its digest.
func (v *Vault) OpenShareFile(ctx context.Context, id KeyID, n Number) (*secret.Bytes, error) {
	s := *v.now.Load().keys[id].share(n)
	b, err := readFile(v.sharePath(s.file), maxShareFile)
	if err != nil {
		return nil, err
	}
	s.digest = sha256.Sum256(b)
	return v.readShare(ctx, id, &s)
}

// OpenWithClassKey opens a share as what has the vault's memory and its disk would,
// without the hardware.
func (v *Vault) OpenWithClassKey(id KeyID, n Number) (*secret.Bytes, error) {
	s := v.find(id, n)
	f, err := v.readShareFile(id, s)
	if err != nil {
		return nil, err
	}
	aead, err := v.aead(v.class, f, s.erasure)
	if err != nil {
		return nil, err
	}
	plain, err := aead.Open(nil, make([]byte, aead.NonceSize()), f.cipher, f.header)
	return secret.Take(plain), err
}

// Own lists the shares of a key that rest under keys of their own, by their files.
func (v *Vault) Own(id KeyID) (own []Number) {
	for _, s := range v.now.Load().keys[id].shares {
		if f, err := v.readShareFile(id, &s); err == nil && f.class == Own {
			own = append(own, s.number)
		}
	}
	return own
}

// Opened counts the opened shares that the vault keeps.
func (v *Vault) Opened() int {
	v.opened.Lock()
	defer v.opened.Unlock()
	return len(v.opened.shares)
}

// ShareFile is where a share rests.
func (v *Vault) ShareFile(id KeyID, n Number) string {
	return v.sharePath(v.now.Load().keys[id].share(n).file)
}

// Secrets are a vault's keys that must be in no file as they are.
func (v *Vault) Secrets() map[string][]byte {
	out := map[string][]byte{}
	keep := func(name string) func([]byte) error {
		return func(b []byte) error { out[name] = bytes.Clone(b); return nil }
	}
	_ = v.root.Use(keep("root"))
	_ = v.class.Use(keep("class key"))
	for id, r := range v.now.Load().keys {
		for _, s := range r.shares {
			out["erasure key of "+id.Name+" "+s.number.String()] = bytes.Clone(s.erasure[:])
		}
	}
	return out
}

// Fill adds records as a vault of that many keys has them: seen, voted, active,
// one share. Their shares have no files.
func (v *Vault) Fill(keys int) {
	next := v.now.Load().clone()
	for i := range keys {
		n := Number{1, 1}
		r := next.edit(KeyID{fmt.Sprintf("service-%05d/payments", i), 1})
		r.entry[0], r.voted, r.active = 1, &Staged{Number: n}, n
		r.shares = []share{{number: n, erasure: new([32]byte)}}
	}
	v.now.Store(next)
}

// ReceiptsOf joins the receipts of a key, one byte each, sorted.
func (v *Vault) ReceiptsOf(id KeyID) (string, error) {
	var all []byte
	for _, digest := range v.now.Load().keys[id].receipts {
		b, err := readFile(v.receiptPath(digest), MaxReceipt)
		if err != nil {
			return "", err
		}
		all = append(all, b...)
	}
	slices.Sort(all)
	return string(all), nil
}
