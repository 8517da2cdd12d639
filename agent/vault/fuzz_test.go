package vault_test

import (
	"bytes"
	"encoding/hex"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"conseal/agent/vault"
	"conseal/internal/secret"
)

func hexadecimal(b []byte) []byte { return hex.AppendEncode(nil, b) }

// FuzzDecodeManifest: what decodes is canonical, so that it encodes to the same.
func FuzzDecodeManifest(f *testing.F) {
	v := newVault(f)
	f.Add(v.EncodedManifest())
	must(f, v.see(backups, 1))
	v.born(payments, n11)
	must(f, v.stage(payments, n12))
	f.Add(v.EncodedManifest())
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		again, err := vault.RecodeManifest(b)
		if err == nil && !bytes.Equal(again, b) {
			t.Errorf("%x decodes and encodes to %x", b, again)
		}
	})
}

// FuzzReadShareFile: only the file that was written opens.
func FuzzReadShareFile(f *testing.F) {
	v := newVault(f)
	must(f, v.stage(payments, n11))
	must(f, v.stage(backups, n11))
	must(f, v.Reseal(f.Context(), map[vault.KeyID]vault.Class{backups: vault.Own}))
	good := map[vault.KeyID][]byte{}
	for _, id := range []vault.KeyID{payments, backups} {
		b, err := os.ReadFile(v.ShareFile(id, n11))
		must(f, err)
		good[id] = b
		f.Add(b)
		f.Add(b[:len(b)-1])
	}
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		for id, want := range good {
			must(t, os.WriteFile(v.ShareFile(id, n11), b, 0o600))
			share, err := v.OpenShareFile(t.Context(), id, n11)
			if (err == nil) != bytes.Equal(b, want) {
				t.Errorf("%d bytes as the share of %s: %v", len(b), id.Name, err)
			}
			share.Wipe()
		}
	})
}

// BenchmarkStage10k stages one share more in a vault of 10,000 keys, each fsync
// included.
func BenchmarkStage10k(b *testing.B) {
	const keys = 10_000
	v := newVault(b)
	share := secret.Random(64)
	v.Fill(keys)
	must(b, v.stage(payments, n11))
	b.ResetTimer()
	for i := range b.N {
		must(b, v.Stage(b.Context(), vault.Held, key(fmt.Sprint("bench", i), 1), n11, vault.Output{}, vault.Origin{}, nil, share))
	}
	b.StopTimer()
	info, err := os.Stat(filepath.Join(v.dir, "manifest.0"))
	must(b, err)
	b.ReportMetric(float64(info.Size())/float64(v.Stats().Keys), "manifest-B/key")
	v.reopen()
	v.wantLends(payments, n11)
}
