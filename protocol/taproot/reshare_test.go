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

// identity is the key by which a host signs its dealings.
func identity(h protocol.HostID) ed25519.PrivateKey {
	seed := sha256.Sum256([]byte(h))
	return ed25519.NewKeyFromSeed(seed[:])
}

func reshareConfig(old shares, id protocol.SessionID, self protocol.HostID, dealers, holders []protocol.HostID, quorum int) taproot.ReshareConfig {
	cfg := taproot.ReshareConfig{Old: old[dealers[0]].Group, Plan: dealing.Plan{
		Session: id, Self: self, Dealers: dealers, Holders: holders, Quorum: quorum,
		Sign: func(digest [32]byte) ([]byte, error) { return ed25519.Sign(identity(self), digest[:]), nil },
		Verify: func(h protocol.HostID, digest [32]byte, signature []byte) error {
			if !ed25519.Verify(identity(h).Public().(ed25519.PublicKey), digest[:], signature) {
				return errors.New("not signed by this host")
			}
			return nil
		},
	}}
	if slices.Contains(dealers, self) {
		cfg.Share = old[self]
	}
	return cfg
}

func reshareSessions(t testing.TB, old shares, dealers, holders []protocol.HostID, quorum int) map[protocol.HostID]*taproot.Reshare {
	t.Helper()
	sessions := map[protocol.HostID]*taproot.Reshare{}
	id := protocoltest.SessionID()
	for _, h := range slices.Concat(dealers, holders) {
		s, err := taproot.NewReshare(reshareConfig(old, id, h, dealers, holders, quorum))
		if err != nil {
			t.Fatal(err)
		}
		sessions[h] = s
	}
	return sessions
}

func reshare(t testing.TB, old shares, dealers, holders []protocol.HostID, quorum int) shares {
	t.Helper()
	net := protocoltest.Network[*taproot.Reshare]{Sessions: reshareSessions(t, old, dealers, holders, quorum)}
	net.MustRun(t)
	out := shares{}
	var group []byte
	for h, s := range net.Sessions {
		share, err := s.Result()
		if holds := slices.Contains(holders, h); holds != (err == nil) {
			t.Fatalf("%s is a holder: %v, and has: %v", h, holds, err)
		}
		s.Close()
		if err != nil {
			continue
		}
		out[h] = share
		if _, err := taproot.DecodeGroup(share.Group.Encode()); err != nil { // with an even y
			t.Fatal(err)
		}
		if group == nil {
			group = share.Group.Encode()
		}
		if !bytes.Equal(group, share.Group.Encode()) {
			t.Fatalf("%s has another group", h)
		}
	}
	return out
}

// some are n of hosts, at random.
func some(hosts []protocol.HostID, n int) []protocol.HostID {
	all := slices.Clone(hosts)
	mathrand.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
	return slices.Sorted(slices.Values(all[:n]))
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
			next := some(protocoltest.Hosts(7), 2+mathrand.IntN(4))
			quorum := 2 + mathrand.IntN(len(next)-1)
			if step == 1 { // a refresh
				next, quorum = holders, group.Quorum
			}
			fresh := reshare(t, key, some(holders, group.Quorum), next, quorum)
			if fresh[next[0]].Group.PublicKey != public {
				t.Fatal("the public key changed")
			}
			message := bytes.Repeat([]byte{byte(step)}, 32)
			net := protocoltest.Network[*taproot.Sign]{Sessions: signSessions(t, fresh, some(next, quorum), message)}
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
				net := protocoltest.Network[*taproot.Sign]{Sessions: signSessions(t, mixed, next[:quorum], message)}
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
	return append(bytes.Clone(content), ed25519.Sign(identity(dealer), digest[:])...)
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
		sessions := map[protocol.HostID]*taproot.Reshare{}
		id := protocoltest.SessionID()
		for _, h := range hosts {
			s, err := taproot.NewReshare(reshareConfig(key, id, h, hosts, hosts, 2))
			if err != nil {
				t.Fatal(err)
			}
			sessions[h] = s
		}
		third := reshareConfig(key, id, "z", hosts, hosts, 2)
		f := newForger(third)
		var honest []byte
		var sent []byte
		net := protocoltest.Network[*taproot.Reshare]{Sessions: sessions, Alter: func(m protocol.Message) []protocol.Message {
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
		}}
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
		if _, err := sessions["a"].Result(); err == nil {
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
			net := protocoltest.Network[*taproot.Reshare]{Sessions: reshareSessions(t, key, hosts, hosts, 2), Alter: func(m protocol.Message) []protocol.Message {
				if m.From == "b" && m.Round == round {
					size = len(m.Body)
					// A signature of what is agreed on anyway proves nothing and is not looked at.
					harmless = round == 2 && at%(32+2+ed25519.SignatureSize) >= 32+2
					m.Body[at] ^= 1
					hits[round]++
				}
				return []protocol.Message{m}
			}}
			failed, _ := net.Run(t)
			if (failed["a"] == nil) != harmless || failed["a"] != nil && !named(failed["a"]) {
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
	for name, change := range map[string]func(*taproot.ReshareConfig){
		"no group":            func(c *taproot.ReshareConfig) { c.Old = nil },
		"an empty group":      func(c *taproot.ReshareConfig) { c.Old = &taproot.Group{} },
		"another key's share": func(c *taproot.ReshareConfig) { c.Share = other["a"] },
		"another's share":     func(c *taproot.ReshareConfig) { c.Share = key["b"] },
		"no share":            func(c *taproot.ReshareConfig) { c.Share = nil },
		"no holders":          func(c *taproot.ReshareConfig) { c.Holders = nil },
		"a quorum of one":     func(c *taproot.ReshareConfig) { c.Quorum = 1 },
		"dealers too many":    func(c *taproot.ReshareConfig) { c.Dealers = protocoltest.Hosts(3) },
	} {
		cfg := reshareConfig(key, protocol.SessionID{1}, "a", two, two, 2)
		if _, err := taproot.NewReshare(cfg); err != nil {
			t.Fatal(err)
		}
		change(&cfg)
		if _, err := taproot.NewReshare(cfg); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
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
		net := protocoltest.Network[*taproot.Reshare]{Sessions: reshareSessions(t, key, hosts, hosts, 2), Alter: func(m protocol.Message) []protocol.Message {
			if m.From == "b" && m.Round == round {
				from := min(int(at), len(m.Body))
				body := slices.Concat(m.Body[:from], insert, m.Body[min(from+int(cut), len(m.Body)):])
				changed = !bytes.Equal(body, m.Body)
				m.Body = body
			}
			return []protocol.Message{m}
		}}
		failed, _ := net.Run(t)
		if failed["a"] != nil && !named(failed["a"]) {
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
