package agent_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/sha256"
	"crypto/x509"
	"fmt"
	"testing"
	"time"

	"conseal/agent/api"
	"conseal/agent/api/apipb"
	"conseal/testenv"
)

// newECDSAFleet starts three hosts with the key "token" on P-256.
func newECDSAFleet(t *testing.T, limits string, flags ...string) (context.Context, *testenv.Fleet) {
	t.Helper()
	ctx, f := newFleet(t, flags...)
	f.Keys = f.Key("token", "ecdsa-p256", 2)
	f.Limits = "[limits]\nkeygen_deadline = \"5m\"\nsign_deadline = \"2m\"\n" + limits
	must(t, f.WriteRoster(1))
	for _, h := range f.Hosts {
		must(t, h.WriteConfig())
	}
	must(t, f.Start(ctx))
	must(t, f.WaitReady(ctx, "token"))
	return ctx, f
}

// stockOf asks a host for its presignatures of key "token".
func stockOf(ctx context.Context, t *testing.T, h *testenv.Host) (out []*apipb.Presignatures) {
	t.Helper()
	client := api.Dial(h.AdminSocket())
	defer client.Close()
	s, err := client.Status(ctx)
	must(t, err)
	for _, k := range s.Keys {
		if k.Name == "token" {
			out = k.Presignatures
		}
	}
	return out
}

// waitStock waits until a host has its whole stock.
func waitStock(ctx context.Context, t *testing.T, h *testenv.Host) {
	t.Helper()
	for {
		full, stock := true, stockOf(ctx, t, h)
		for _, p := range stock {
			full = full && p.Ready == p.Wanted
		}
		if full && len(stock) > 0 {
			return
		}
		select {
		case <-ctx.Done():
			t.Fatalf("%s: stock %v: %v", h.Name, stock, ctx.Err())
		case <-time.After(100 * time.Millisecond):
		}
	}
}

func count(stock []*apipb.Presignatures) (n int) {
	for _, p := range stock {
		n += int(p.Ready)
	}
	return n
}

func signECDSA(ctx context.Context, t *testing.T, h *testenv.Host, message string) *apipb.SignResponse {
	t.Helper()
	r, err := h.Client().Sign(ctx, "token", []byte(message))
	must(t, err)
	key, err := x509.ParsePKIXPublicKey(r.PublicKey)
	must(t, err)
	digest := sha256.Sum256([]byte(message))
	if !ecdsa.VerifyASN1(key.(*ecdsa.PublicKey), digest[:], r.Signature) {
		t.Fatal("crypto/ecdsa refuses the signature")
	}
	return r
}

// TestStock fills the stock, uses it up, one presignature a signature, and sees it
// filled again; a host that restarts takes its part of it away.
func TestStock(t *testing.T) {
	ctx, f := newECDSAFleet(t, "presignatures = 1\n")
	alpha := f.Hosts[0]
	waitStock(ctx, t, alpha)
	before := count(stockOf(ctx, t, alpha))
	if before != 2 {
		t.Fatalf("%d presignatures, want one with each of two hosts", before)
	}
	used := map[string]bool{}
	for i := range before {
		r := signECDSA(ctx, t, alpha, fmt.Sprint("message ", i))
		used[fmt.Sprint(r.Signers)] = true
		if n := count(stockOf(ctx, t, alpha)); n != before-1-i {
			t.Errorf("%d presignatures after signature %d", n, i+1)
		}
	}
	if len(used) != 2 {
		t.Errorf("signed by %v", used)
	}
	signECDSA(ctx, t, alpha, "with none left")
	waitStock(ctx, t, alpha)
	f.Hosts[1].Kill()
	for count(stockOf(ctx, t, alpha)) != 1 {
		select {
		case <-ctx.Done():
			t.Fatal(ctx.Err())
		case <-time.After(20 * time.Millisecond):
		}
	}
	signECDSA(ctx, t, alpha, "after the loss")
}
