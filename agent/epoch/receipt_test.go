package epoch

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"conseal/agent/vault"
)

func testReceipt(t testing.TB) *Receipt {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	d := &Deletion{
		Fleet: "lab", Key: vault.KeyID{Name: "first", Incarnation: 2}, Public: sha256.Sum256([]byte("public")), Host: "alpha",
		Time: time.Unix(1700000000, 0), Protector: "tpm", Shares: 1, RootsBefore: 5, RootsAfter: 6,
	}
	r, err := d.Sign(key, []byte("proof"))
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// TestReceipt changes each field of a receipt: the signature is over all of them, and what
// the hardware certifies over all but its own proof.
func TestReceipt(t *testing.T) {
	r := testReceipt(t)
	pin, digest := sha256.Sum256(r.PublicKey), r.Digest()
	der, err := r.Encode()
	if err != nil {
		t.Fatal(err)
	}
	back, err := DecodeReceipt(der)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(back, r); diff != "" {
		t.Errorf("got -, want +:\n%s", diff)
	}
	if err := back.Verify(pin); err != nil {
		t.Error(err)
	}
	for name, change := range map[string]func(*Receipt){
		"fleet":        func(r *Receipt) { r.Fleet = "other" },
		"key":          func(r *Receipt) { r.Key.Name = "second" },
		"incarnation":  func(r *Receipt) { r.Key.Incarnation++ },
		"public key":   func(r *Receipt) { r.Public[31]++ },
		"host":         func(r *Receipt) { r.Host = "beta" },
		"time":         func(r *Receipt) { r.Time = r.Time.Add(time.Second) },
		"protector":    func(r *Receipt) { r.Protector = "hsm" },
		"shares":       func(r *Receipt) { r.Shares++ },
		"roots before": func(r *Receipt) { r.RootsBefore-- },
		"roots after":  func(r *Receipt) { r.RootsAfter++ },
	} {
		changed := *r
		change(&changed)
		if changed.Verify(pin) == nil || changed.Digest() == digest {
			t.Errorf("another %s verifies, or has the same digest", name)
		}
	}
	changed := *r
	changed.Proof = nil
	if changed.Verify(pin) == nil || r.Verify([32]byte{}) == nil {
		t.Error("a receipt without its proof, or under another pin, verifies")
	}
	if _, err := DecodeReceipt(append(der, 0)); err == nil {
		t.Error("a receipt with a byte too many is read")
	}
	changed.Proof = make([]byte, MaxReceipt)
	if _, err := changed.Encode(); err == nil {
		t.Error("a receipt over the limit is written")
	}
}

func FuzzDecodeReceipt(f *testing.F) {
	der, err := testReceipt(f).Encode()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(der)
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := DecodeReceipt(b)
		if err != nil {
			return
		}
		if again, err := r.Encode(); err != nil || !bytes.Equal(again, b) {
			t.Errorf("%x encodes as %x, %v", b, again, err)
		}
		_ = r.Verify([32]byte{})
	})
}
