package cmp_test

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"maps"
	"slices"
	"strings"
	"testing"

	"github.com/cronokirby/saferith"
	"github.com/luxfi/threshold/pkg/math/arith"
	"github.com/luxfi/threshold/pkg/paillier"
	"github.com/luxfi/threshold/pkg/pedersen"
	"github.com/luxfi/threshold/protocols/cmp/config"

	"conseal/protocol"
	"conseal/protocol/cmp"
	"conseal/protocol/protocoltest"
)

func reshareConfig(old shares, id protocol.SessionID, self protocol.HostID, dealers, holders []protocol.HostID, quorum int) cmp.ReshareConfig {
	cfg := cmp.ReshareConfig{Plan: protocoltest.Plan(id, self, dealers, holders, quorum), Old: old[dealers[0]].Group}
	if slices.Contains(dealers, self) {
		cfg.Share = old[self]
	}
	return cfg
}

type resharing = protocoltest.Network[*cmp.Reshare]

func reshares(t testing.TB, old shares, dealers, holders []protocol.HostID, quorum int) resharing {
	t.Helper()
	return protocoltest.Connect(t, slices.Concat(dealers, holders), func(id protocol.SessionID, h protocol.HostID) (*cmp.Reshare, error) {
		return cmp.NewReshare(reshareConfig(old, id, h, dealers, holders, quorum))
	})
}

// refreshing gives the holders of a key new shares.
func refreshing(t testing.TB, key shares) resharing {
	t.Helper()
	return reshares(t, key, key.quorum(), key.group().Holders, key.group().Quorum)
}

// newShares are the results of a resharing, whose hosts agree on it.
func newShares(t testing.TB, net resharing, holders []protocol.HostID) shares {
	t.Helper()
	out := protocoltest.NewShares(t, net.Sessions, holders)
	for h, share := range out {
		stored, err := share.Secret()
		if err != nil {
			t.Fatal(err)
		}
		err = stored.Use(func(b []byte) error { _, err := cmp.LoadShare(share.Group, h, b); return err })
		if err != nil {
			t.Fatal(err)
		}
	}
	return out
}

func (s shares) mustSign(t testing.TB, signers []protocol.HostID) {
	t.Helper()
	message := []byte("after a resharing")
	net := s.sign(t, signers, sha256.Sum256(message))
	net.MustRun(t)
	for _, session := range net.Sessions {
		sig, err := session.Signature()
		if err != nil {
			t.Fatal(err)
		}
		verify(t, s[signers[0]].Group, message, sig)
	}
}

// TestReshare gives a key to other hosts under another quorum, and back to fewer, with
// dealers that were not there at its birth.
func TestReshare(t *testing.T) {
	old := p256Keys() // 2 of a, b and c
	first := []protocol.HostID{"b", "d", "e"}
	net := reshares(t, old, []protocol.HostID{"a", "b"}, first, 3)
	net.MustRun(t)
	fresh := newShares(t, net, first)
	if fresh["d"].Group.PublicKey != old.group().PublicKey {
		t.Fatal("the public key changed")
	}
	fresh.mustSign(t, first)
	old.mustSign(t, []protocol.HostID{"a", "c"}) // until they are erased

	second := []protocol.HostID{"a", "e"}
	net = reshares(t, fresh, first, second, 2)
	net.MustRun(t)
	last := newShares(t, net, second)
	if last["a"].Group.PublicKey != old.group().PublicKey {
		t.Fatal("the public key changed")
	}
	last.mustSign(t, second)
	newAuxiliary(t, old["b"], fresh["b"])
	newAuxiliary(t, fresh["e"], last["e"])
}

// newAuxiliary checks that nothing but the public key is what it was, and that nothing
// is a placeholder.
func newAuxiliary(t *testing.T, old, fresh *cmp.Share) {
	t.Helper()
	seen := map[string]bool{}
	for _, v := range cmp.AuxiliaryValues(old) {
		seen[string(v)] = true
	}
	base := cmp.BasePoint(old.Group.Curve)
	for i, v := range cmp.AuxiliaryValues(fresh) {
		if seen[string(v)] || len(v) < 32 || bytes.Equal(v, base) {
			t.Errorf("value %d of the new share is an old one, or a placeholder: %x", i, v)
		}
		seen[string(v)] = true
	}
}

// TestAuxiliaryValuesAreJudged: a share whose public values are not fit for use is
// none, whoever made it.
func TestAuxiliaryValuesAreJudged(t *testing.T) {
	share := twoKeys()["a"]
	number := func(n uint64) *saferith.Nat { return new(saferith.Nat).SetUint64(n) }
	for name, x := range map[string]struct {
		change func(*config.Config)
		want   string
	}{
		"as it is": {func(*config.Config) {}, ""},
		"a placeholder": {func(c *config.Config) {
			n := saferith.ModulusFromNat(number(15))
			c.Public["0002"].Paillier, c.Public["0002"].Pedersen = paillier.NewPublicKey(n), pedersen.New(arith.ModulusFromN(n), number(4), number(2))
		}, "of 4 bits"},
		"a short modulus": {func(c *config.Config) {
			n := saferith.ModulusFromNat(new(saferith.Nat).Rsh(c.Public["0002"].Paillier.N().Nat(), 1, 2047))
			c.Public["0002"].Paillier = paillier.NewPublicKey(n)
		}, "of 2047 bits"},
		"another's modulus": {func(c *config.Config) {
			c.Public["0002"].Paillier, c.Public["0002"].Pedersen = c.Public["0001"].Paillier, c.Public["0001"].Pedersen
		}, "of another"},
		"two moduli":      {func(c *config.Config) { c.Public["0002"].Pedersen = c.Public["0001"].Pedersen }, "of another modulus"},
		"nobody's values": {func(c *config.Config) { delete(c.Public, "0002") }, "has 1 parties"},
	} {
		err := cmp.Judge(share, x.change)
		if (err == nil) != (x.want == "") || err != nil && !strings.Contains(err.Error(), x.want) {
			t.Errorf("%s: %v, want %q", name, err, x.want)
		}
	}
}

// TestRefreshIsBoundToTheDealing replays a message of the refresh that followed
// another dealing, under one session id, which no two sessions should have.
func TestRefreshIsBoundToTheDealing(t *testing.T) {
	key, hosts, id := twoKeys(), protocoltest.Hosts(2), protocoltest.SessionID()
	// run has one host alone get to the refresh: each computes for seconds there.
	run := func(ends protocol.HostID, alter func(m protocol.Message) []protocol.Message) map[protocol.HostID]error {
		net := protocoltest.Connect(t, hosts, func(_ protocol.SessionID, h protocol.HostID) (*cmp.Reshare, error) {
			return cmp.NewReshare(reshareConfig(key, id, h, hosts, hosts, 2))
		})
		net.Alter = func(m protocol.Message) []protocol.Message {
			if m.Round == 3 && m.To != ends {
				return nil
			}
			return alter(m)
		}
		failed, _ := net.Run(t)
		return failed
	}
	var first protocol.Message
	failed := run("b", func(m protocol.Message) []protocol.Message {
		if m.Round == 4 {
			first = m
			first.Body = bytes.Clone(m.Body)
		}
		return []protocol.Message{m}
	})
	if first.Body == nil || len(failed) > 0 {
		t.Fatalf("b sent nothing of its refresh: %v", failed)
	}
	failed = run("a", func(m protocol.Message) []protocol.Message {
		if m.Round == 3 {
			return []protocol.Message{m, first}
		}
		return []protocol.Message{m}
	})
	if !protocoltest.Blames(failed["a"], "b") || !strings.Contains(failed["a"].Error(), "another session of the module") {
		t.Errorf("replayed: %v", failed)
	}
}

// late runs sessions in the order of their messages, but those that are late come when
// there are no others.
func late(t testing.TB, net resharing, isLate func(m protocol.Message) bool) {
	t.Helper()
	var queue, held []protocol.Message
	post := func(ready protocol.Ready, err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range ready.Send {
			if isLate(m) {
				held = append(held, m)
			} else {
				queue = append(queue, m)
			}
		}
	}
	for _, h := range slices.Sorted(maps.Keys(net.Sessions)) {
		post(net.Sessions[h].Start())
	}
	for len(queue)+len(held) > 0 {
		if len(queue) == 0 {
			queue, held = held[:1:1], held[1:]
		}
		m := queue[0]
		queue = queue[1:]
		post(net.Sessions[m.To].Step(m))
	}
}

// TestRefresh gives the holders, or two of three, new shares, to one of them later than
// the others begin with the module's refresh; an old share does not go with new ones.
func TestRefresh(t *testing.T) {
	holders := protocoltest.Hosts(2)
	for name, key := range map[string]shares{"P-256": twoKeys(), "secp256k1, of three": secp256k1Keys()} {
		t.Run(name, func(t *testing.T) {
			net := reshares(t, key, key.quorum(), holders, 2)
			late(t, net, func(m protocol.Message) bool { return m.To == "a" && m.From == "b" && m.Round == 3 })
			for _, s := range key { // as if the refresh had made another key
				s.Group.PublicKey[5] ^= 1
			}
			if _, err := net.Sessions["a"].Result(); err == nil || !strings.Contains(err.Error(), "changed the public key") {
				t.Errorf("another public key: %v", err)
			}
			for _, s := range key {
				s.Group.PublicKey[5] ^= 1
			}
			fresh := newShares(t, net, holders)
			if fresh.group().PublicKey != key.group().PublicKey {
				t.Fatal("the public key changed")
			}
			for i, x := range fresh.group().VerificationShares {
				if x == key.group().VerificationShares[i] {
					t.Errorf("the share of %q did not change", holders[i])
				}
			}
			newAuxiliary(t, key["a"], fresh["a"])
			fresh.mustSign(t, holders)
			if key.group().Quorum > len(holders) {
				return
			}
			old := shares{"a": key["a"], "b": fresh["b"]}.sign(t, holders, [32]byte{1})
			failed, waiting := old.Run(t)
			if len(failed) == 0 || len(failed)+len(waiting) != len(holders) {
				t.Errorf("shares of two epochs: failed %v, waiting %v", failed, waiting)
			}
		})
	}
}

// TestLyingDealer: what b deals is wrong, or not what it signed. a names it, and there
// is no share. Package dealing has the lies that need a signature.
func TestLyingDealer(t *testing.T) {
	for attack, change := range map[string]struct {
		round uint16
		at    int
	}{"a commitment": {1, 40}, "a hash": {1, 100}, "a signature": {1, 135}, "an echo": {2, 3}, "a share": {3, 3}} {
		net := refreshing(t, twoKeys())
		net.Alter = func(m protocol.Message) []protocol.Message {
			if m.From == "b" && m.Round == change.round {
				m.Body[change.at] ^= 1
			}
			if m.From == "a" && m.Round == 3 {
				return nil // b would compute for seconds
			}
			return []protocol.Message{m}
		}
		failed, _ := net.Run(t)
		var fault *protocol.Fault
		if !errors.As(failed["a"], &fault) || fault.Host != "b" {
			t.Errorf("%s: %v", attack, failed)
		}
		for h, s := range net.Sessions {
			if _, err := s.Result(); err == nil {
				t.Errorf("%s: %s has a share", attack, h)
			}
			s.Close()
		}
	}
}

// TestEarlyRefresh holds what comes of the refresh while a waits for an echo.
func TestEarlyRefresh(t *testing.T) {
	key := twoKeys()
	id := protocoltest.SessionID()
	hosts := protocoltest.Hosts(2)
	s, err := cmp.NewReshare(reshareConfig(key, id, "a", hosts, hosts, 2))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Start(); err != nil {
		t.Fatal(err)
	}
	early := protocol.Message{Session: id, From: "b", To: "a", Round: 4, Body: []byte("b")}
	for name, change := range map[string]func(*protocol.Message){
		"another session": func(m *protocol.Message) { m.Session[0]++ },
		"another host's":  func(m *protocol.Message) { m.To = "b" },
		"a stranger's":    func(m *protocol.Message) { m.From = "z" },
		"our own":         func(m *protocol.Message) { m.From = "a" },
		"a huge one":      func(m *protocol.Message) { m.Body = make([]byte, 1<<20) },
		"a later round":   func(m *protocol.Message) { m.Round = 5 },
		"round 65535":     func(m *protocol.Message) { m.Round = 65535 },
	} {
		m := early
		change(&m)
		if _, err := s.Step(m); err == nil {
			t.Errorf("%s was taken", name)
		}
	}
	if _, err := s.Step(early); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Step(early); err == nil {
		t.Error("a second message of a round was taken")
	}
	if round, rounds, missing := s.Progress(); round != 1 || rounds != 7 || !slices.Equal(missing, []protocol.HostID{"b"}) {
		t.Errorf("round %d of %d, missing %q", round, rounds, missing)
	}
	s.Close()
	s.Close()
	if _, err := s.Step(early); err == nil {
		t.Error("a closed session took a message")
	}
	if _, err := s.Result(); err == nil {
		t.Error("a closed session has a result")
	}
}

func TestBadReshareConfigs(t *testing.T) {
	key, two := p256Keys(), protocoltest.Hosts(2)
	good := func() cmp.ReshareConfig {
		return reshareConfig(key, protocol.SessionID{1}, "a", two, two, 2)
	}
	protocoltest.Refuses(t, cmp.NewReshare, good, map[string]func(*cmp.ReshareConfig){
		"no group":            func(c *cmp.ReshareConfig) { c.Old = nil },
		"an empty group":      func(c *cmp.ReshareConfig) { c.Old = &cmp.Group{} },
		"a group of nobody":   func(c *cmp.ReshareConfig) { c.Old = &cmp.Group{Curve: cmp.P256} },
		"another key's share": func(c *cmp.ReshareConfig) { c.Share = twoKeys()["a"] },
		"another's share":     func(c *cmp.ReshareConfig) { c.Share = key["b"] },
		"no share":            func(c *cmp.ReshareConfig) { c.Share = nil },
		"no holders":          func(c *cmp.ReshareConfig) { c.Holders = nil },
		"a quorum of one":     func(c *cmp.ReshareConfig) { c.Quorum = 1 },
		"dealers too many":    func(c *cmp.ReshareConfig) { c.Dealers = protocoltest.Hosts(3) },
	})
}
