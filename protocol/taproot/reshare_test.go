package taproot_test

import (
	"bytes"
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	mathrand "math/rand/v2"
	"slices"
	"testing"

	"conseal/protocol"
	"conseal/protocol/dealing"
	"conseal/protocol/protocoltest"
	"conseal/protocol/taproot"
)

func reshareConfig(old shares, id protocol.SessionID, self protocol.HostID, dealers, holders []protocol.HostID, quorum int) taproot.ReshareConfig {
	cfg := taproot.ReshareConfig{Plan: protocoltest.Plan(id, self, dealers, holders, quorum), Old: old[dealers[0]].Group}
	if slices.Contains(dealers, self) {
		cfg.Share = old[self]
	}
	return cfg
}

func reshares(t testing.TB, old shares, dealers, holders []protocol.HostID, quorum int) protocoltest.Network[*taproot.Reshare] {
	t.Helper()
	return protocoltest.Connect(t, slices.Concat(dealers, holders), func(id protocol.SessionID, h protocol.HostID) (*taproot.Reshare, error) {
		return taproot.NewReshare(reshareConfig(old, id, h, dealers, holders, quorum))
	})
}

func reshare(t testing.TB, old shares, dealers, holders []protocol.HostID, quorum int) shares {
	t.Helper()
	net := reshares(t, old, dealers, holders, quorum)
	net.MustRun(t)
	out := protocoltest.NewShares(t, net.Sessions, holders)
	if _, err := taproot.DecodeGroup(out[holders[0]].Public()); err != nil { // with an even y
		t.Fatal(err)
	}
	return out
}

// TestReshareChains gives keys of many sizes new shares, again and again: the public
// key stays, any quorum signs, and old and new shares do not go together.
func TestReshareChains(t *testing.T) {
	for range 3 {
		n := 2 + mathrand.IntN(4)
		key, holders := keygen(t, n, 2+mathrand.IntN(n-1)), protocoltest.Hosts(n)
		public := key["a"].Group.PublicKey
		for step := range 3 {
			group := key[holders[0]].Group
			next := protocoltest.Some(protocoltest.Hosts(7), 2+mathrand.IntN(4))
			quorum := 2 + mathrand.IntN(len(next)-1)
			if step == 1 { // a refresh
				next, quorum = holders, group.Quorum
			}
			fresh := reshare(t, key, protocoltest.Some(holders, group.Quorum), next, quorum)
			if fresh[next[0]].Group.PublicKey != public {
				t.Fatal("the public key changed")
			}
			message := bytes.Repeat([]byte{byte(step)}, 32)
			net := signs(t, fresh, protocoltest.Some(next, quorum), message)
			net.MustRun(t)
			for _, s := range net.Sessions {
				sig, err := s.Signature()
				if err != nil {
					t.Fatal(err)
				}
				verify(t, key[holders[0]].Group, message, sig)
			}
			if step == 1 {
				mixed := shares{next[0]: key[next[0]]}
				for _, h := range next[1:] {
					mixed[h] = fresh[h]
				}
				net := signs(t, mixed, next[:quorum], message)
				failed, waiting := net.Run(t)
				for h, s := range net.Sessions {
					if _, err := s.Signature(); err == nil {
						t.Errorf("shares of two epochs sign at %s: failed %v, waiting %v", h, failed, waiting)
					}
				}
			}
			key, holders = fresh, next
		}
	}
}

// forger computes what a dealer signs, from docs/protocol.md.
type forger struct{ context [32]byte }

func part(b []byte) []byte {
	return append(binary.BigEndian.AppendUint32(nil, uint32(len(b))), b...)
}

func newForger(cfg taproot.ReshareConfig) forger {
	b := slices.Concat(part([]byte("conseal reshare v1")), part(cfg.Session[:]), part([]byte("secp256k1")), part(cfg.Old.Encode()),
		part(binary.BigEndian.AppendUint32(nil, uint32(cfg.Quorum))))
	for _, hosts := range [][]protocol.HostID{cfg.Dealers, cfg.Holders} {
		b = append(b, part(binary.BigEndian.AppendUint32(nil, uint32(len(hosts))))...)
		for _, h := range hosts {
			b = append(b, part([]byte(h))...)
		}
	}
	return forger{sha256.Sum256(b)}
}

func (f forger) sign(dealer protocol.HostID, content []byte) []byte {
	inner := sha256.Sum256(append(part([]byte("conseal dealing content v1")), content...))
	digest := sha256.Sum256(slices.Concat(part([]byte("conseal dealing v1")), f.context[:], part([]byte(dealer)), inner[:]))
	return append(bytes.Clone(content), ed25519.Sign(protocoltest.Identity(dealer), digest[:])...)
}

func (f forger) hide(dealer, receiver protocol.HostID, opening []byte) []byte {
	h := sha256.Sum256(slices.Concat(part([]byte("conseal dealt share v1")), f.context[:], part([]byte(dealer)), part([]byte(receiver)), opening))
	return h[:]
}

// TestLyingDealer: b deals what it should not; a gets it, and has proof for a third host.
func TestLyingDealer(t *testing.T) {
	key := keygen(t, 2, 2)
	hosts := protocoltest.Hosts(2)
	opening := bytes.Repeat([]byte{3}, 64)
	for name, change := range map[string]func(f forger, content []byte){
		"another constant":          func(_ forger, c []byte) { copy(c, c[33:66]) },
		"the constant's other y":    func(_ forger, c []byte) { c[0] ^= 1 },
		"a point off the curve":     func(_ forger, c []byte) { clear(c[34:66]) },
		"a point above the field":   func(_ forger, c []byte) { copy(c[34:], bytes.Repeat([]byte{0xff}, 32)) },
		"an encoding that is none":  func(_ forger, c []byte) { c[33] |= 4 },
		"a share that does not fit": func(f forger, c []byte) { copy(c[66:], f.hide("b", "a", opening)) },
	} {
		var third taproot.ReshareConfig
		net := protocoltest.Connect(t, hosts, func(id protocol.SessionID, h protocol.HostID) (*taproot.Reshare, error) {
			third = reshareConfig(key, id, "z", hosts, hosts, 2)
			return taproot.NewReshare(reshareConfig(key, id, h, hosts, hosts, 2))
		})
		f := newForger(third)
		var honest []byte
		var sent []byte
		net.Alter = func(m protocol.Message) []protocol.Message {
			switch {
			case m.Round == 1 && m.From == "b":
				honest = bytes.Clone(m.Body)
				content := bytes.Clone(m.Body[:len(m.Body)-ed25519.SignatureSize])
				if !bytes.Equal(f.sign("b", content), honest) {
					t.Error("b does not sign what docs/protocol.md says")
				}
				change(f, content)
				sent = f.sign("b", content)
				m.Body = sent
			case m.Round == 2: // each hears of b's dealing what it believes itself
				own := sent
				if m.To == "b" {
					own = honest
				}
				digest := sha256.Sum256(append(part([]byte("conseal dealing content v1")), own[:len(own)-ed25519.SignatureSize]...))
				copy(m.Body[32+2+ed25519.SignatureSize:], slices.Concat(digest[:], []byte{0, ed25519.SignatureSize}, own[len(own)-ed25519.SignatureSize:]))
			case m.Round == 3 && m.From == "b" && name == "a share that does not fit":
				m.Body = opening
			}
			return []protocol.Message{m}
		}
		failed, _ := net.Run(t)
		var complaint *dealing.Complaint
		if !errors.As(failed["a"], &complaint) || complaint.Dealer != "b" || failed["b"] != nil {
			t.Errorf("%s: %v", name, failed)
			continue
		}
		again, err := dealing.DecodeComplaint(complaint.Encode())
		if err != nil {
			t.Fatal(err)
		}
		if err := dealing.VerifyComplaint(third, again); err != nil {
			t.Errorf("%s: a third host does not believe: %v", name, err)
		}
		again.Dealer = "a"
		if dealing.VerifyComplaint(third, again) == nil {
			t.Errorf("%s: a third host believes it of another dealer", name)
		}
		if _, err := net.Sessions["a"].Result(); err == nil {
			t.Errorf("%s: there is a share", name)
		}
	}
}

// TestChangedReshareNamesItsSender flips a bit in places of each message of b to a.
func TestChangedReshareNamesItsSender(t *testing.T) {
	key := keygen(t, 2, 2)
	hosts := protocoltest.Hosts(2)
	size, hits := 0, map[uint16]int{}
	for round := uint16(1); round <= 3; round++ {
		for at := 0; at == 0 || at < size; at += 1 + mathrand.IntN(20) {
			harmless := false
			net := reshares(t, key, hosts, hosts, 2)
			net.Alter = func(m protocol.Message) []protocol.Message {
				if m.From == "b" && m.Round == round {
					size = len(m.Body)
					// A signature of what is agreed on anyway proves nothing and is not looked at.
					harmless = round == 2 && at%(32+2+ed25519.SignatureSize) >= 32+2
					m.Body[at] ^= 1
					hits[round]++
				}
				return []protocol.Message{m}
			}
			failed, _ := net.Run(t)
			if (failed["a"] == nil) != harmless || failed["a"] != nil && !protocoltest.Blames(failed["a"], "b") {
				t.Errorf("round %d, byte %d of %d: %v", round, at, size, failed["a"])
			}
			for _, s := range net.Sessions {
				s.Close()
			}
		}
		size = 0
	}
	if len(hits) != 3 {
		t.Errorf("changed %v", hits)
	}
}

func TestBadReshareConfigs(t *testing.T) {
	key, other := keygen(t, 3, 2), keygen(t, 3, 2)
	two := protocoltest.Hosts(2)
	good := func() taproot.ReshareConfig {
		return reshareConfig(key, protocol.SessionID{1}, "a", two, two, 2)
	}
	protocoltest.Refuses(t, taproot.NewReshare, good, map[string]func(*taproot.ReshareConfig){
		"no group":            func(c *taproot.ReshareConfig) { c.Old = nil },
		"an empty group":      func(c *taproot.ReshareConfig) { c.Old = &taproot.Group{} },
		"another key's share": func(c *taproot.ReshareConfig) { c.Share = other["a"] },
		"another's share":     func(c *taproot.ReshareConfig) { c.Share = key["b"] },
		"no share":            func(c *taproot.ReshareConfig) { c.Share = nil },
		"no holders":          func(c *taproot.ReshareConfig) { c.Holders = nil },
		"a quorum of one":     func(c *taproot.ReshareConfig) { c.Quorum = 1 },
		"dealers too many":    func(c *taproot.ReshareConfig) { c.Dealers = protocoltest.Hosts(3) },
	})
}

// FuzzReshare cuts out some of one message of b to a and puts in something else. a
// blames nobody else, and has a share only if what changed does not count.
func FuzzReshare(f *testing.F) {
	key, hosts := keygen(f, 2, 2), protocoltest.Hosts(2)
	for round := range uint16(4) {
		f.Add(round, uint16(0), uint16(1), []byte{4})
		f.Add(round, uint16(34), uint16(32), bytes.Repeat([]byte{0xff}, 32))
		f.Add(round, uint16(0), uint16(33), []byte{})
	}
	f.Fuzz(func(t *testing.T, round, at, cut uint16, insert []byte) {
		changed := false
		net := reshares(t, key, hosts, hosts, 2)
		net.Alter = func(m protocol.Message) []protocol.Message {
			if m.From == "b" && m.Round == round {
				from := min(int(at), len(m.Body))
				body := slices.Concat(m.Body[:from], insert, m.Body[min(from+int(cut), len(m.Body)):])
				changed = !bytes.Equal(body, m.Body)
				m.Body = body
			}
			return []protocol.Message{m}
		}
		failed, _ := net.Run(t)
		if failed["a"] != nil && !protocoltest.Blames(failed["a"], "b") {
			t.Errorf("round %d: %v", round, failed["a"])
		}
		if _, err := net.Sessions["a"].Result(); err == nil && changed && round != 2 {
			t.Errorf("a share after a changed message of round %d", round)
		}
		for _, s := range net.Sessions {
			s.Close()
		}
	})
}
