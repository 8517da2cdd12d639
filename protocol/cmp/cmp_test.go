package cmp_test

import (
	stdecdsa "crypto/ecdsa"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
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
)

// network carries messages between sessions of one run, each session in a goroutine.
type network[S protocol.Session] struct {
	sessions map[protocol.HostID]S
	// alter may change a message, or drop it by returning nothing.
	alter func(protocol.Message) []protocol.Message
}

// run returns the error of each host that failed. Hosts that wait for a message when
// nothing is under way any more are in waiting.
func (n *network[S]) run(t testing.TB) (failed map[protocol.HostID]error, waiting []protocol.HostID) {
	t.Helper()
	type inbox struct {
		queue []protocol.Message
		done  bool
	}
	var mu sync.Mutex
	cond := sync.NewCond(&mu)
	busy := len(n.sessions)
	boxes := map[protocol.HostID]*inbox{}
	for h := range n.sessions {
		boxes[h] = &inbox{}
	}
	failed = map[protocol.HostID]error{}
	post := func(messages []protocol.Message) {
		for _, m := range messages {
			out := []protocol.Message{m}
			if n.alter != nil {
				out = n.alter(m)
			}
			for _, m := range out {
				if box := boxes[m.To]; box != nil {
					box.queue = slices.Insert(box.queue, mathrand.IntN(len(box.queue)+1), m)
				}
			}
		}
	}
	over := func() bool { // nobody has anything to do
		for _, box := range boxes {
			if !box.done && len(box.queue) > 0 {
				return false
			}
		}
		return busy == 0
	}
	var wg sync.WaitGroup
	for h, s := range n.sessions {
		wg.Go(func() {
			ready, err := s.Start()
			for {
				mu.Lock()
				if err == nil {
					post(ready.Send)
				} else {
					failed[h] = err
				}
				box := boxes[h]
				box.done = err != nil || ready.Done
				busy--
				cond.Broadcast()
				for !box.done && len(box.queue) == 0 && !over() {
					cond.Wait()
				}
				if box.done || len(box.queue) == 0 {
					if !box.done {
						waiting = append(waiting, h)
					}
					cond.Broadcast()
					mu.Unlock()
					return
				}
				m := box.queue[0]
				box.queue = box.queue[1:]
				busy++
				mu.Unlock()
				ready, err = s.Step(m)
			}
		})
	}
	wg.Wait()
	return failed, waiting
}

func (n *network[S]) mustRun(t testing.TB) {
	t.Helper()
	if failed, waiting := n.run(t); len(failed)+len(waiting) > 0 {
		t.Fatalf("failed %v, waiting %v", failed, waiting)
	}
}

func hosts(n int) (out []protocol.HostID) {
	for i := range n {
		out = append(out, protocol.HostID(rune('a'+i)))
	}
	return out
}

func sessionID() (id protocol.SessionID) {
	rand.Read(id[:])
	return id
}

type shares map[protocol.HostID]*cmp.Share

func keygen(t testing.TB, c *cmp.Curve, n, quorum int) shares {
	t.Helper()
	net := network[*cmp.Keygen]{sessions: map[protocol.HostID]*cmp.Keygen{}}
	id := sessionID()
	for _, h := range hosts(n) {
		k, err := cmp.NewKeygen(cmp.KeygenConfig{Session: id, Self: h, Holders: hosts(n), Quorum: quorum, Curve: c})
		if err != nil {
			t.Fatal(err)
		}
		net.sessions[h] = k
	}
	net.mustRun(t)
	return results(t, net)
}

func results(t testing.TB, net network[*cmp.Keygen]) shares {
	t.Helper()
	out := shares{}
	var group []byte
	for h, k := range net.sessions {
		share, err := k.Result()
		if err != nil {
			t.Fatal(err)
		}
		k.Close()
		if group == nil {
			group = share.Group.Encode()
		}
		if !slices.Equal(group, share.Group.Encode()) {
			t.Fatal("hosts ended with different groups")
		}
		out[h] = share
	}
	return out
}

// Keys are made once in a run of the tests: it takes seconds.
var (
	p256Keys      = sync.OnceValue(func() shares { return keygen(keyMaker{}, cmp.P256, 3, 2) })
	twoKeys       = sync.OnceValue(func() shares { return keygen(keyMaker{}, cmp.P256, 2, 2) })
	secp256k1Keys = sync.OnceValue(func() shares { return keygen(keyMaker{}, cmp.Secp256k1, 3, 3) })
)

// keyMaker stands in for a test when a key is made for all.
type keyMaker struct{ testing.TB }

func (keyMaker) Helper()                           {}
func (keyMaker) Fatal(args ...any)                 { panic(fmt.Sprint(args...)) }
func (keyMaker) Fatalf(format string, args ...any) { panic(fmt.Sprintf(format, args...)) }

func keys() map[string]shares {
	return map[string]shares{"P-256": p256Keys(), "secp256k1": secp256k1Keys()}
}

// quorum gives the signers' names, chosen at random.
func (s shares) quorum() []protocol.HostID {
	all := slices.Sorted(maps.Keys(s))
	mathrand.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
	return slices.Sorted(slices.Values(all[:s.group().Quorum]))
}

func (s shares) group() *cmp.Group { return s["a"].Group }

func (s shares) sign(t testing.TB, signers []protocol.HostID, digest [32]byte) network[*cmp.Sign] {
	t.Helper()
	net := network[*cmp.Sign]{sessions: map[protocol.HostID]*cmp.Sign{}}
	id := sessionID()
	for _, h := range signers {
		session, err := cmp.NewSign(cmp.SignConfig{Session: id, Share: s[h], Signers: signers, Digest: digest})
		if err != nil {
			t.Fatal(err)
		}
		net.sessions[h] = session
	}
	return net
}

func (s shares) presign(t testing.TB, signers []protocol.HostID) network[*cmp.Presign] {
	t.Helper()
	net := network[*cmp.Presign]{sessions: map[protocol.HostID]*cmp.Presign{}}
	id := sessionID()
	for _, h := range signers {
		session, err := cmp.NewPresign(cmp.SignConfig{Session: id, Share: s[h], Signers: signers})
		if err != nil {
			t.Fatal(err)
		}
		net.sessions[h] = session
	}
	return net
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
	if g.Verify(digest, sig) {
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
			net.mustRun(t)
			var first *cmp.Signature
			for h, s := range net.sessions {
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
			net.mustRun(t)
			message := []byte("signed at once")
			digest := sha256.Sum256(message)
			online := network[*cmp.Sign]{sessions: map[protocol.HostID]*cmp.Sign{}}
			id := sessionID()
			for h, p := range net.sessions {
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
						case err == nil && online.sessions[h] == nil:
							online.sessions[h] = s
						case !errors.Is(err, cmp.ErrUsed):
							t.Errorf("%s: a second use: %v", h, err)
						}
					})
				}
				wg.Wait()
				pre.Discard()
			}
			online.mustRun(t)
			for h, s := range online.sessions {
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
	net.mustRun(t)
	for _, p := range net.sessions {
		pre, err := p.Result()
		if err != nil {
			t.Fatal(err)
		}
		pre.Discard()
		if _, err := cmp.NewOnline(sessionID(), pre, [32]byte{1}); !errors.Is(err, cmp.ErrUsed) {
			t.Errorf("after discarding: %v", err)
		}
	}
}

// TestRefresh gives new shares of the same key; an old one does not go with new ones.
func TestRefresh(t *testing.T) {
	key := p256Keys()
	net := network[*cmp.Keygen]{sessions: refreshing(t, key)}
	net.mustRun(t)
	fresh := results(t, net)
	if fresh.group().PublicKey != key.group().PublicKey {
		t.Fatal("the public key changed")
	}
	for i, x := range fresh.group().VerificationShares {
		if x == key.group().VerificationShares[i] {
			t.Errorf("the share of %q did not change", fresh.group().Holders[i])
		}
	}
	message := []byte("after the refresh")
	signing := fresh.sign(t, fresh.quorum(), sha256.Sum256(message))
	signing.mustRun(t)
	for _, s := range signing.sessions {
		sig, err := s.Signature()
		if err != nil {
			t.Fatal(err)
		}
		verify(t, key.group(), message, sig)
	}
	mixed := shares{"a": key["a"], "b": fresh["b"]}
	old := mixed.sign(t, hosts(2), [32]byte{1})
	failed, waiting := old.run(t)
	if len(failed) == 0 || len(failed)+len(waiting) != 2 {
		t.Errorf("shares of two epochs: failed %v, waiting %v", failed, waiting)
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
		if _, err := cmp.NewKeygen(cmp.KeygenConfig{Self: "a", Holders: holders, Quorum: test.quorum, Curve: cmp.P256}); err == nil {
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
