package main

import (
	"strings"
	"testing"

	"conseal/agent/api/apipb"
)

// TestShowReceipts wants each receipt in words, and who has sent none.
func TestShowReceipts(t *testing.T) {
	var out strings.Builder
	err := printKey(&out, &apipb.Key{
		Name: "first", Condition: "deleted", ReceiptsMissing: []string{"delta", "epsilon"},
		Receipts: []*apipb.Receipt{
			{Host: "alpha", Time: "2026-01-02T03:04:05Z", Protector: "tpm", Shares: 1, RootsBefore: 7, RootsAfter: 8, Proof: make([]byte, 300)},
			{Host: "beta", Time: "2026-01-02T03:04:06Z", Protector: "hsm", Shares: 2, RootsBefore: 1, RootsAfter: 2},
			{Host: "gamma", Time: "2026-01-02T03:04:07Z", Protector: "tpm"},
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		"alpha erased its share at 2026-01-02T03:04:05Z, root 7 became 8; signed by the host, certified by its tpm (300 bytes, in --json)",
		"beta erased 2 shares at 2026-01-02T03:04:06Z, root 1 became 2; signed by the host, its hardware certifies nothing",
		"gamma held no share at",
		"delta, epsilon",
	} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("got %s\nwant %s in it", &out, want)
		}
	}
}

// TestSignedJSON: a recovery id of 0 is one, and only ECDSA has it.
func TestSignedJSON(t *testing.T) {
	for want, r := range map[bool]*apipb.SignResponse{true: {Fixed: make([]byte, 64)}, false: {Signature: make([]byte, 64)}} {
		b, err := signedJSON("release", r)
		if err != nil || strings.Contains(string(b), `"recovery_id":0`) != want {
			t.Errorf("with a recovery id: %t, got %v: %s", want, err, b)
		}
	}
}

// TestStatusSaysWhatTheNextEpochWaitsFor, once.
func TestStatusSaysWhatTheNextEpochWaitsFor(t *testing.T) {
	for want, k := range map[string]*apipb.Key{
		"ready; next epoch: waiting for gamma\n": {Condition: "ready", Next: "waiting for gamma"},
		"waiting: waiting for gamma\n":           {Condition: "waiting", Detail: "waiting for gamma", Next: "waiting for gamma"},
		"ready\n":                                {Condition: "ready"},
	} {
		var out strings.Builder
		printKeys(&out, []*apipb.Key{k})
		if !strings.HasSuffix(out.String(), "\t"+want) {
			t.Errorf("got %q, want %q at its end", out.String(), want)
		}
	}
}
