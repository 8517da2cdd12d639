package cmp_test

import (
	"bytes"
	stdecdsa "crypto/ecdsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"flag"
	"maps"
	"math/big"
	mathrand "math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/decred/dcrd/dcrec/secp256k1/v4"
	"github.com/decred/dcrd/dcrec/secp256k1/v4/ecdsa"

	"conseal/protocol"
	"conseal/protocol/cmp"
	"conseal/protocol/protocoltest"
)

var soak = flag.Bool("soak", false, "more random changes")

type shares map[protocol.HostID]*cmp.Share

func keygen(t testing.TB, c *cmp.Curve, n, quorum int) shares {
	t.Helper()
	hosts := protocoltest.Hosts(n)
	net := protocoltest.Connect(t, hosts, func(id protocol.SessionID, h protocol.HostID) (*cmp.Keygen, error) {
		return cmp.NewKeygen(c, cmp.KeygenConfig{Session: id, Self: h, Holders: hosts, Quorum: quorum})
	})
	net.MustRun(t)
	return protocoltest.Shares(t, net.Sessions, hosts)
}

// Keys are made once in a run of the tests: it takes seconds.
var (
	p256Keys      = sync.OnceValue(func() shares { return keygen(protocoltest.Aside{}, cmp.P256, 3, 2) })
	twoKeys       = sync.OnceValue(func() shares { return keygen(protocoltest.Aside{}, cmp.P256, 2, 2) })
	secp256k1Keys = sync.OnceValue(func() shares { return keygen(protocoltest.Aside{}, cmp.Secp256k1, 3, 3) })
)

func keys() map[string]shares {
	return map[string]shares{"P-256": p256Keys(), "secp256k1": secp256k1Keys()}
}

// quorum gives the signers' names, chosen at random.
func (s shares) quorum() []protocol.HostID {
	return protocoltest.Some(slices.Collect(maps.Keys(s)), s.group().Quorum)
}

func (s shares) group() *cmp.Group { return s["a"].Group }

func (s shares) sign(t testing.TB, signers []protocol.HostID, digest [32]byte) protocoltest.Network[*cmp.Sign] {
	t.Helper()
	return protocoltest.Connect(t, signers, func(id protocol.SessionID, h protocol.HostID) (*cmp.Sign, error) {
		return cmp.NewSign(cmp.SignConfig{Session: id, Share: s[h], Signers: signers, Digest: digest})
	})
}

func (s shares) presign(t testing.TB, signers []protocol.HostID) protocoltest.Network[*cmp.Presign] {
	t.Helper()
	return protocoltest.Connect(t, signers, func(id protocol.SessionID, h protocol.HostID) (*cmp.Presign, error) {
		return cmp.NewPresign(cmp.SignConfig{Session: id, Share: s[h], Signers: signers})
	})
}

// verify has the signature of a message judged by code that is not ours.
func verify(t testing.TB, g *cmp.Group, message []byte, sig *cmp.Signature) {
	t.Helper()
	digest := sha256.Sum256(message)
	der, err := sig.DER()
	if err != nil {
		t.Fatal(err)
	}
	spki, err := g.Curve.SPKI(g.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	openssl(t, spki, message, der)
	if len(sig.Fixed()) != 64 {
		t.Errorf("fixed size of %d bytes", len(sig.Fixed()))
	}
	switch g.Curve {
	case cmp.P256:
		public, err := x509.ParsePKIXPublicKey(spki)
		if err != nil || !stdecdsa.VerifyASN1(public.(*stdecdsa.PublicKey), digest[:], der) {
			t.Errorf("crypto/ecdsa refuses the signature: %v", err)
		}
	case cmp.Secp256k1:
		half := new(big.Int).Rsh(secp256k1.S256().N, 1)
		if new(big.Int).SetBytes(sig.S[:]).Cmp(half) > 0 {
			t.Error("s is in the upper half")
		}
		compact := append([]byte{27 + 4 + sig.RecoveryID}, sig.Fixed()...)
		public, _, err := ecdsa.RecoverCompact(compact, digest[:])
		if err != nil || [33]byte(public.SerializeCompressed()) != g.PublicKey {
			t.Errorf("the recovery id leads to another key: %v", err)
		}
	}
	digest[0] ^= 1
	if g.Curve.Verify(g.PublicKey, digest, sig) {
		t.Error("the signature is good for another digest")
	}
}

func openssl(t testing.TB, spki, message, der []byte) {
	t.Helper()
	dir := t.TempDir()
	path := func(name string, b []byte) string {
		file := filepath.Join(dir, name)
		if err := os.WriteFile(file, b, 0o600); err != nil {
			t.Fatal(err)
		}
		return file
	}
	key := path("key.pem", pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: spki}))
	out, err := exec.CommandContext(t.Context(), "openssl", "dgst", "-sha256", "-verify", key, "-signature", path("sig", der), path("message", message)).CombinedOutput()
	if err != nil || !strings.Contains(string(out), "Verified OK") {
		t.Errorf("openssl (apt install openssl): %v: %s", err, out)
	}
}

func TestQuorumsSign(t *testing.T) {
	for name, key := range keys() {
		t.Run(name, func(t *testing.T) {
			message := []byte("a message of " + name)
			net := key.sign(t, key.quorum(), sha256.Sum256(message))
			net.MustRun(t)
			var first *cmp.Signature
			for h, s := range net.Sessions {
				sig, err := s.Signature()
				if err != nil {
					t.Fatalf("%s: %v", h, err)
				}
				if first == nil {
					first = sig
					verify(t, key.group(), message, sig)
				}
				if *sig != *first {
					t.Error("signers ended with different signatures")
				}
			}
		})
	}
}

// TestPresignatureSignsOnce signs with presignatures and tries to use them again.
func TestPresignatureSignsOnce(t *testing.T) {
	for name, key := range keys() {
		t.Run(name, func(t *testing.T) {
			net := key.presign(t, key.quorum())
			net.MustRun(t)
			message := []byte("signed at once")
			digest := sha256.Sum256(message)
			online := protocoltest.Network[*cmp.Sign]{Sessions: map[protocol.HostID]*cmp.Sign{}}
			id := protocoltest.SessionID()
			for h, p := range net.Sessions {
				pre, err := p.Result()
				if err != nil {
					t.Fatal(err)
				}
				p.Close()
				// Of many who want it at once, one gets it.
				var mu sync.Mutex
				var wg sync.WaitGroup
				for range 8 {
					wg.Go(func() {
						s, err := cmp.NewOnline(id, pre, digest)
						mu.Lock()
						defer mu.Unlock()
						switch {
						case err == nil && online.Sessions[h] == nil:
							online.Sessions[h] = s
						case !errors.Is(err, cmp.ErrUsed):
							t.Errorf("%s: a second use: %v", h, err)
						}
					})
				}
				wg.Wait()
				pre.Discard()
			}
			online.MustRun(t)
			for h, s := range online.Sessions {
				sig, err := s.Signature()
				if err != nil {
					t.Fatalf("%s: %v", h, err)
				}
				verify(t, key.group(), message, sig)
			}
		})
	}
}

func TestDiscardedPresignatureSignsNothing(t *testing.T) {
	key := p256Keys()
	net := key.presign(t, key.quorum())
	net.MustRun(t)
	for _, p := range net.Sessions {
		pre, err := p.Result()
		if err != nil {
			t.Fatal(err)
		}
		pre.Discard()
		if _, err := cmp.NewOnline(protocoltest.SessionID(), pre, [32]byte{1}); !errors.Is(err, cmp.ErrUsed) {
			t.Errorf("after discarding: %v", err)
		}
	}
}

// TestShareAtRest stores shares and loads them, and refuses what does not belong
// together.
func TestShareAtRest(t *testing.T) {
	for name, key := range keys() {
		t.Run(name, func(t *testing.T) {
			g, err := cmp.DecodeGroup(key.group().Encode())
			if err != nil {
				t.Fatal(err)
			}
			stored, err := key["a"].Secret()
			if err != nil {
				t.Fatal(err)
			}
			defer stored.Wipe()
			load := func(g *cmp.Group, self protocol.HostID, change func([]byte) []byte) error {
				return stored.Use(func(b []byte) error {
					s, err := cmp.LoadShare(g, self, change(slices.Clone(b)))
					if err == nil {
						s.Wipe()
					}
					return err
				})
			}
			same := func(b []byte) []byte { return b }
			if err := load(g, "a", same); err != nil {
				t.Fatal(err)
			}
			if err := load(g, "b", same); err == nil {
				t.Error("the share of a is good for b")
			}
			if err := load(g, "z", same); err == nil || !strings.Contains(err.Error(), "no holder") {
				t.Errorf("a stranger: %v", err)
			}
			for range 40 {
				err := load(g, "a", func(b []byte) []byte {
					b[mathrand.IntN(len(b))] ^= byte(1 + mathrand.IntN(255))
					return b
				})
				if err == nil {
					t.Error("a changed share is good")
				}
			}
			for _, field := range []string{"\x61S", "\x61T"} { // of each holder, one after the other
				err := stored.Use(func(whole []byte) error {
					if bytes.Count(whole, []byte(field)) < len(g.Holders) {
						t.Errorf("a share has no %s of each holder", field[1:])
					}
					for at := range whole {
						if bytes.HasPrefix(whole[at:], []byte(field)) && load(g, "a", func(b []byte) []byte { b[at+1] = 'X'; return b }) == nil {
							t.Errorf("a share without %s at byte %d is good", field[1:], at)
						}
					}
					return nil
				})
				if err != nil {
					t.Fatal(err)
				}
			}
			for _, n := range []int{0, 1, 100} {
				if load(g, "a", func(b []byte) []byte { return b[:n] }) == nil {
					t.Errorf("%d bytes of a share are good", n)
				}
			}
			other := *g
			other.Auxiliary[0] ^= 1
			if load(&other, "a", same) == nil {
				t.Error("a share is good for other public parameters")
			}
		})
	}
}

func TestDecodeGroupRefuses(t *testing.T) {
	key := p256Keys().group()
	whole := key.Encode()
	for i := range whole {
		for _, change := range []byte{1, 0x80} {
			b := slices.Clone(whole)
			b[i] ^= change
			g, err := cmp.DecodeGroup(b)
			name := false
			for at, h := range key.Holders {
				name = name || err == nil && g.Holders[at] != h
			}
			higher := err == nil && g.Quorum > key.Quorum // the shares fit any: the roster says which
			if auxiliary := i >= len(b)-32; err == nil && !auxiliary && !name && !higher {
				t.Errorf("byte %d changed: no error", i)
			}
		}
	}
	for n := range whole {
		if _, err := cmp.DecodeGroup(whole[:n]); err == nil {
			t.Errorf("%d bytes: no error", n)
		}
	}
}

func TestBadConfigs(t *testing.T) {
	for _, test := range []struct {
		holders string
		quorum  int
	}{{"a b c", 1}, {"a b c", 0}, {"a b c", 4}, {"b a", 2}, {"a", 1}, {"", 2}, {"b c", 2}, {"a a", 2}} {
		var holders []protocol.HostID
		for h := range strings.FieldsSeq(test.holders) {
			holders = append(holders, protocol.HostID(h))
		}
		if _, err := cmp.NewKeygen(cmp.P256, cmp.KeygenConfig{Self: "a", Holders: holders, Quorum: test.quorum}); err == nil {
			t.Errorf("quorum %d of %q: no error", test.quorum, holders)
		}
	}
	key := p256Keys()
	for _, signers := range [][]protocol.HostID{nil, {"a"}, {"b", "a"}, {"a", "b", "c"}, {"b", "c"}, {"a", "z"}} {
		if _, err := cmp.NewSign(cmp.SignConfig{Share: key["a"], Signers: signers}); err == nil {
			t.Errorf("signers %q: no error", signers)
		}
		if _, err := cmp.NewPresign(cmp.SignConfig{Share: key["a"], Signers: signers}); err == nil {
			t.Errorf("presigning by %q: no error", signers)
		}
	}
}
