package tpm_test

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/sha256"
	"encoding/binary"
	"flag"
	"runtime"
	"testing"
)

var soak = flag.Bool("soak", false, "70,000 signatures and 5,000 openings")

// Years of use leave no handle in the TPM and no memory in the process.
func TestManyUses(t *testing.T) {
	signatures, openings := 300, 100
	if *soak {
		signatures, openings = 70_000, 5_000
	}
	m := newTeam(t)
	h := newGovernedHost(t, m, 4, 7)
	m.allow(t, h, "now")
	root := setRoot(t, h.TPM)
	key, blob := seal(t, h.TPM, "k")
	identity, err := h.Identity(t.Context(), h.made.Identity)
	if err != nil {
		t.Fatal(err)
	}
	use := func(signatures, openings int) {
		for i := range signatures {
			digest := sha256.Sum256(binary.BigEndian.AppendUint64(nil, uint64(i)))
			signature, err := identity.Sign(nil, digest[:], crypto.SHA256)
			if err != nil || !ecdsa.VerifyASN1(identity.Public().(*ecdsa.PublicKey), digest[:], signature) {
				t.Fatalf("signature %d: %v", i, err)
			}
			if openings > 0 && i%(signatures/openings) == 0 {
				wantOpens(t, h.TPM, "k", blob, key)
				wantRoot(t, h.TPM, root)
			}
		}
	}
	memory := func() uint64 {
		runtime.GC()
		var s runtime.MemStats
		runtime.ReadMemStats(&s)
		return s.HeapInuse + s.StackInuse + s.OtherSys
	}
	use(100, 10)
	before, goroutines := memory(), runtime.NumGoroutine()
	use(signatures, openings)
	if after := memory(); after > before+4<<20 {
		t.Errorf("memory grew from %d to %d bytes", before, after)
	}
	if n := runtime.NumGoroutine(); n > goroutines {
		t.Errorf("%d goroutines, %d before", n, goroutines)
	}
	wantNoHandles(t, h.tap)
	t.Logf("%d signatures, %d openings", signatures, openings)
}
