//go:build !race

// Without the race detector, under which the one goroutine here takes three minutes
// and not ten seconds; `make test` runs this package both ways.

package cmp

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/sha256"
	"math/big"
	"testing"

	lux "github.com/luxfi/threshold/pkg/ecdsa"
	"github.com/luxfi/threshold/pkg/party"
	"github.com/luxfi/threshold/pkg/protocol"
	"github.com/luxfi/threshold/protocols/cmp"
)

// run runs a protocol of the module between honest parties, in one goroutine.
func run(t *testing.T, session string, ids party.IDSlice, start func(party.ID) protocol.StartFunc) map[party.ID]any {
	t.Helper()
	handlers := map[party.ID]*protocol.MultiHandler{}
	for _, id := range ids {
		h, err := protocol.NewMultiHandler(start(id), []byte(session))
		if err != nil {
			t.Fatal(err)
		}
		handlers[id] = h
	}
	for moved := true; moved; {
		moved = false
		for _, from := range ids {
			for m := next(handlers[from]); m != nil; m = next(handlers[from]) {
				moved = true
				for _, to := range ids {
					if to != from && m.IsFor(to) {
						handlers[to].Accept(m)
					}
				}
			}
		}
	}
	out := map[party.ID]any{}
	for id, h := range handlers {
		result, err := h.Result()
		if err != nil {
			t.Fatalf("%s: %v", id, err)
		}
		out[id] = result
	}
	return out
}

// next is a message that the party has ready, or nil.
func next(h *protocol.MultiHandler) *protocol.Message {
	select {
	case m := <-h.Listen():
		return m
	default:
		return nil
	}
}

// TestModuleSignsOnP256 makes a key with the module on our curve and has
// crypto/ecdsa verify what it signs, and refuse it for another message.
func TestModuleSignsOnP256(t *testing.T) {
	ids := party.NewIDSlice([]party.ID{"a", "b"})
	configs := run(t, "keygen", ids, func(id party.ID) protocol.StartFunc { return cmp.Keygen(p256{}, id, ids, 1, nil) })
	config := func(id party.ID) *cmp.Config { return configs[id].(*cmp.Config) }
	digest := sha256.Sum256([]byte("a message"))
	signatures := run(t, "sign", ids, func(id party.ID) protocol.StartFunc { return cmp.Sign(config(id), ids, digest[:], nil) })
	public, err := ecdsa.ParseUncompressedPublicKey(elliptic.P256(), config("a").PublicPoint().(*p256Point).v.Bytes())
	if err != nil {
		t.Fatal(err)
	}
	for id, signature := range signatures {
		sig := signature.(*lux.Signature)
		r := new(big.Int).SetBytes(encoded(t, sig.R.XScalar()))
		s := new(big.Int).SetBytes(encoded(t, sig.S))
		if !ecdsa.Verify(public, digest[:], r, s) {
			t.Errorf("%s: crypto/ecdsa refuses the signature", id)
		}
		digest := sha256.Sum256([]byte("another"))
		if ecdsa.Verify(public, digest[:], r, s) {
			t.Errorf("%s: the signature is good for another message", id)
		}
	}
}
