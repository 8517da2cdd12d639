// Package vaulttest is the suite that each [vault.Protector] passes: what a vault
// needs of the hardware, and a whole vault on it.
package vaulttest

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"

	"conseal/agent/vault"
	"conseal/internal/secret"
)

// Host is a provisioned host with hardware of its own that never had a root.
type Host struct {
	Protector vault.Protector
	// Reopen connects to the same hardware again, as an agent does that starts.
	// What was returned before is not used afterwards.
	Reopen func() vault.Protector
	// State is the folder of files that the protector keeps outside of the
	// hardware; empty if there are none. An attacker copies it with the vault.
	State string
}

// Run runs the suite. newHost is called once or twice in each test.
func Run(t *testing.T, newHost func(t *testing.T) Host) {
	for _, c := range []struct {
		name string
		test func(t *testing.T, newHost func(t *testing.T) Host)
	}{
		{"Names", testNames},
		{"Root", testRoot},
		{"SealAndOpen", testSeal},
		{"DamagedBlobs", testDamagedBlobs},
		{"CancelledContext", testCancelled},
		{"Concurrency", testConcurrency},
		{"Vault", testVault},
		{"OtherHost", testOtherHost},
		{"OlderFolder", testOlderFolder},
		{"ErasedShare", testErasedShare},
		{"OwnShare", testOwnShare},
	} {
		t.Run(c.name, func(t *testing.T) { c.test(t, newHost) })
	}
}

func testNames(t *testing.T, newHost func(t *testing.T) Host) {
	h := newHost(t)
	if kind := h.Protector.Kind(); kind != "tpm" && kind != "hsm" {
		t.Errorf("kind %q", kind)
	}
	name := h.Protector.Name()
	if name == "" {
		t.Error("it has no name")
	}
	if again := h.Reopen().Name(); again != name {
		t.Errorf("after opening again its name is %q, not %q", again, name)
	}
}

func testRoot(t *testing.T, newHost func(t *testing.T) Host) {
	h := newHost(t)
	wantNoRoot(t, h.Protector)
	h.Protector = h.Reopen()
	wantNoRoot(t, h.Protector)
	var last *secret.Bytes
	for i := range 4 {
		next := secret.Random(32)
		must(t, h.Protector.SetRoot(t.Context(), next))
		wantRoot(t, h.Protector, next)
		if i%2 == 1 {
			h.Protector = h.Reopen()
			wantRoot(t, h.Protector, next)
		}
		last = next
	}
	for _, n := range []int{0, 16, 31, 33} {
		if err := h.Protector.SetRoot(t.Context(), secret.Random(n)); err == nil {
			t.Errorf("a root of %d bytes was taken", n)
		}
	}
	wantRoot(t, h.Protector, last)
	must(t, h.Protector.SetRoot(t.Context(), last)) // the same again
	wantRoot(t, h.Reopen(), last)
}

func testSeal(t *testing.T, newHost func(t *testing.T) Host) {
	h, stranger := newHost(t), newHost(t)
	key, blob := seal(t, h.Protector, "class/held/a")
	second, secondBlob := seal(t, h.Protector, "class/held/a")
	if key.Equal(second) {
		t.Error("two seals gave one key")
	}
	must(t, key.Use(func(b []byte) error {
		if bytes.Contains(blob, b) || len(blob) < 32 {
			t.Error("the blob holds the key")
		}
		return nil
	}))
	wantOpens(t, h.Protector, "class/held/a", blob, key)
	for _, id := range []string{"class/held/b", "class/held/", "class/held/a\x00", "class/held/aa", "CLASS/HELD/A"} {
		wantClosed(t, h.Protector, id, blob)
	}
	wantClosed(t, stranger.Protector, "class/held/a", blob)
	// A root, set or replaced, has nothing to do with what was sealed.
	must(t, h.Protector.SetRoot(t.Context(), secret.Random(32)))
	must(t, h.Protector.SetRoot(t.Context(), secret.Random(32)))
	h.Protector = h.Reopen()
	wantOpens(t, h.Protector, "class/held/a", blob, key)
	wantOpens(t, h.Protector, "class/held/a", secondBlob, second)
}

func testDamagedBlobs(t *testing.T, newHost func(t *testing.T) Host) {
	h := newHost(t)
	key, blob := seal(t, h.Protector, "k")
	for i := 0; i < len(blob); i += 7 {
		spoiled := bytes.Clone(blob)
		spoiled[i] ^= 1 << (i % 8)
		wantClosed(t, h.Protector, "k", spoiled)
		wantClosed(t, h.Protector, "k", blob[:i])
	}
	wantClosed(t, h.Protector, "k", blob[:len(blob)-1])
	wantClosed(t, h.Protector, "k", append(bytes.Clone(blob), 0))
	wantClosed(t, h.Protector, "k", append(bytes.Clone(blob), blob...))
	wantOpens(t, h.Protector, "k", blob, key)
}

func testCancelled(t *testing.T, newHost func(t *testing.T) Host) {
	h := newHost(t)
	root := secret.Random(32)
	must(t, h.Protector.SetRoot(t.Context(), root))
	key, blob := seal(t, h.Protector, "k")
	gone, cancel := context.WithCancel(t.Context())
	cancel()
	if _, _, err := h.Protector.Seal(gone, "k"); err == nil {
		t.Error("Seal went on")
	}
	if _, err := h.Protector.Open(gone, "k", blob); err == nil {
		t.Error("Open went on")
	}
	_, err := h.Protector.Root(gone)
	var none vault.NoRoot
	if err == nil || errors.As(err, &none) && none.NoRoot() {
		t.Errorf("Root went on, or takes it for a lost root: %v", err)
	}
	if err := h.Protector.SetRoot(gone, secret.Random(32)); err == nil {
		t.Error("SetRoot went on")
	}
	wantRoot(t, h.Protector, root)
	wantOpens(t, h.Protector, "k", blob, key)
}

// testConcurrency uses all methods at once. Each root that is read must be one
// that was set.
func testConcurrency(t *testing.T, newHost func(t *testing.T) Host) {
	h := newHost(t)
	var roots []*secret.Bytes
	for range 6 {
		roots = append(roots, secret.Random(32))
	}
	must(t, h.Protector.SetRoot(t.Context(), roots[0]))
	key, blob := seal(t, h.Protector, "k")
	var wg sync.WaitGroup
	for w := range 2 {
		wg.Go(func() {
			for i := range 3 {
				if err := h.Protector.SetRoot(t.Context(), roots[3*w+i]); err != nil {
					t.Errorf("setting a root: %v", err)
				}
			}
		})
		wg.Go(func() {
			for range 4 {
				got, err := h.Protector.Root(t.Context())
				if err != nil || !slices.ContainsFunc(roots, got.Equal) {
					t.Errorf("a root that nobody set, or none: %v", err)
				}
				got.Wipe()
			}
		})
		wg.Go(func() {
			for range 4 {
				got, err := h.Protector.Open(t.Context(), "k", blob)
				if err != nil || !got.Equal(key) {
					t.Errorf("another key, or none: %v", err)
				}
				got.Wipe()
			}
		})
		wg.Go(func() {
			for range 3 {
				k, b, err := h.Protector.Seal(t.Context(), "k2")
				if err != nil {
					t.Errorf("sealing: %v", err)
					continue
				}
				got, err := h.Protector.Open(t.Context(), "k2", b)
				if err != nil || !got.Equal(k) {
					t.Errorf("what was just sealed does not open: %v", err)
				}
				got.Wipe()
				k.Wipe()
			}
		})
	}
	wg.Wait()
	got, err := h.Protector.Root(t.Context())
	must(t, err)
	if !got.Equal(roots[2]) && !got.Equal(roots[5]) {
		t.Error("the root is not one that was set last")
	}
	wantRoot(t, h.Reopen(), got)
}

func seal(t *testing.T, p vault.Protector, id string) (*secret.Bytes, []byte) {
	t.Helper()
	key, blob, err := p.Seal(t.Context(), id)
	must(t, err)
	if key.Len() != 32 {
		t.Fatalf("a key of %d bytes", key.Len())
	}
	return key, blob
}

func wantOpens(t *testing.T, p vault.Protector, id string, blob []byte, want *secret.Bytes) {
	t.Helper()
	got, err := p.Open(t.Context(), id, blob)
	must(t, err)
	defer got.Wipe()
	if !got.Equal(want) {
		t.Fatal("it opened to another key")
	}
}

func wantClosed(t *testing.T, p vault.Protector, id string, blob []byte) {
	t.Helper()
	if _, err := p.Open(t.Context(), id, blob); err == nil {
		t.Errorf("a blob of %d bytes opened under %q", len(blob), id)
	}
}

func wantNoRoot(t *testing.T, p vault.Protector) {
	t.Helper()
	root, err := p.Root(t.Context())
	var none vault.NoRoot
	if root != nil || !errors.As(err, &none) || !none.NoRoot() {
		t.Fatalf("before the first root: %v", err)
	}
}

func wantRoot(t *testing.T, p vault.Protector, want *secret.Bytes) {
	t.Helper()
	got, err := p.Root(t.Context())
	must(t, err)
	defer got.Wipe()
	if !got.Equal(want) {
		t.Fatal("it is another root")
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// save copies what is below a folder to a new one, if there is a folder.
func save(t *testing.T, dir string) string {
	t.Helper()
	to := filepath.Join(t.TempDir(), "copy")
	if dir != "" {
		must(t, os.CopyFS(to, os.DirFS(dir)))
	}
	return to
}

// putBack makes dir what it was when it was saved.
func putBack(t *testing.T, dir, saved string) {
	t.Helper()
	if dir == "" {
		return
	}
	old, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	for _, f := range old {
		must(t, os.RemoveAll(filepath.Join(dir, f.Name())))
	}
	must(t, os.CopyFS(dir, os.DirFS(saved)))
	must(t, filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() {
			return os.Chmod(path, 0o700)
		}
		return os.Chmod(path, 0o600)
	}))
}
