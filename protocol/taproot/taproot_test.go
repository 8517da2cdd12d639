package taproot_test

import (
	"bytes"
	"encoding/csv"
	"encoding/hex"
	mathrand "math/rand/v2"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/btcsuite/btcd/btcec/v2/schnorr"

	"conseal/protocol"
	"conseal/protocol/protocoltest"
	"conseal/protocol/taproot"
)

type shares map[protocol.HostID]*taproot.Share

func keygens(t testing.TB, n, quorum int) protocoltest.Network[*taproot.Keygen] {
	t.Helper()
	return protocoltest.Connect(t, protocoltest.Hosts(n), func(id protocol.SessionID, h protocol.HostID) (*taproot.Keygen, error) {
		return taproot.NewKeygen(taproot.KeygenConfig{Session: id, Self: h, Holders: protocoltest.Hosts(n), Quorum: quorum})
	})
}

func keygen(t testing.TB, n, quorum int) shares {
	t.Helper()
	net := keygens(t, n, quorum)
	net.MustRun(t)
	return protocoltest.Shares(t, net.Sessions, protocoltest.Hosts(n))
}

func signs(t testing.TB, key shares, signers []protocol.HostID, message []byte) protocoltest.Network[*taproot.Sign] {
	t.Helper()
	return protocoltest.Connect(t, signers, func(id protocol.SessionID, h protocol.HostID) (*taproot.Sign, error) {
		return taproot.NewSign(taproot.SignConfig{Session: id, Share: key[h], Signers: signers, Message: message})
	})
}

// verify has a signature judged by another implementation, which takes messages of 32
// bytes only, and by ours.
func verify(t testing.TB, g *taproot.Group, message []byte, sig [64]byte) {
	t.Helper()
	x := g.XOnly()
	if len(message) == 32 {
		public, err := schnorr.ParsePubKey(x[:])
		if err != nil {
			t.Fatal(err)
		}
		other, err := schnorr.ParseSignature(sig[:])
		if err != nil || !other.Verify(message, public) {
			t.Errorf("btcec refuses the signature: %v", err)
		}
	}
	if !taproot.Verify(x, message, sig) {
		t.Error("our verification refuses the signature")
	}
	if taproot.Verify(x, append([]byte{1}, message...), sig) {
		t.Error("the signature is good for another message")
	}
}

// TestPublishedVectors verifies the signatures of BIP-340's test vectors, of which
// many are to be refused.
func TestPublishedVectors(t *testing.T) {
	f, err := os.Open("testdata/bip340-test-vectors.csv")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	rows, err := csv.NewReader(f).ReadAll()
	if err != nil {
		t.Fatal(err)
	}
	results := map[bool]int{}
	for _, row := range rows[1:] {
		var fields [3][]byte
		for i, at := range []int{2, 4, 5} {
			if fields[i], err = hex.DecodeString(row[at]); err != nil {
				t.Fatal(err)
			}
		}
		want := row[6] == "TRUE"
		results[want]++
		if got := taproot.Verify([32]byte(fields[0]), fields[1], [64]byte(fields[2])); got != want {
			t.Errorf("vector %s: %v, want %v", row[0], got, want)
		}
	}
	if results[true] < 5 || results[false] < 10 {
		t.Errorf("vectors: %v", results)
	}
}

// TestQuorumsSign makes keys of many sizes until both parities of the key were there.
func TestQuorumsSign(t *testing.T) {
	for round := range 12 {
		n := 2 + mathrand.IntN(4)
		quorum := 2 + mathrand.IntN(n-1)
		key := keygen(t, n, quorum)
		for _, size := range []int{32, 1, 32, 5000} {
			message := bytes.Repeat([]byte{byte(round)}, size)
			net := signs(t, key, protocoltest.Some(protocoltest.Hosts(n), quorum), message)
			net.MustRun(t)
			for _, s := range net.Sessions {
				sig, err := s.Signature()
				if err != nil {
					t.Fatal(err)
				}
				verify(t, key["a"].Group, message, sig)
			}
		}
	}
}

func TestShareAtRest(t *testing.T) {
	key := keygen(t, 3, 2)
	g, err := taproot.DecodeGroup(key["a"].Group.Encode())
	if err != nil {
		t.Fatal(err)
	}
	stored, err := key["a"].Secret()
	if err != nil {
		t.Fatal(err)
	}
	defer stored.Wipe()
	err = stored.Use(func(b []byte) error {
		if _, err := taproot.LoadShare(g, "a", b); err != nil {
			return err
		}
		for name, load := range map[string]func() (*taproot.Share, error){
			"another holder": func() (*taproot.Share, error) { return taproot.LoadShare(g, "b", b) },
			"a stranger":     func() (*taproot.Share, error) { return taproot.LoadShare(g, "z", b) },
			"cut short":      func() (*taproot.Share, error) { return taproot.LoadShare(g, "a", b[:31]) },
			"zero":           func() (*taproot.Share, error) { return taproot.LoadShare(g, "a", make([]byte, 32)) },
			"above the order": func() (*taproot.Share, error) {
				return taproot.LoadShare(g, "a", bytes.Repeat([]byte{0xff}, 32))
			},
		} {
			if _, err := load(); err == nil {
				t.Errorf("%s: no error", name)
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	whole := g.Encode()
	for i := range whole {
		b := bytes.Clone(whole)
		b[i] ^= 0x80
		if other, err := taproot.DecodeGroup(b); err == nil && slices.Equal(other.Holders, g.Holders) {
			t.Errorf("byte %d changed: no error", i)
		}
		if _, err := taproot.DecodeGroup(whole[:i]); err == nil {
			t.Errorf("%d bytes: no error", i)
		}
	}
}

// TestChangedMessagesNameTheirSender flips a bit in each place of each message that b
// sends to a: a must fail, and name b but where only the sum of all tells.
func TestChangedMessagesNameTheirSender(t *testing.T) {
	key := keygen(t, 2, 2)
	message := []byte("a message")
	for run, start := range map[string]func() map[protocol.HostID]protocol.Session{
		"keygen": func() map[protocol.HostID]protocol.Session { return keygens(t, 2, 2).Untyped() },
		"sign": func() map[protocol.HostID]protocol.Session {
			return signs(t, key, protocoltest.Hosts(2), message).Untyped()
		},
	} {
		var sizes []int // of b's messages
		sent := -1
		net := protocoltest.Network[protocol.Session]{Sessions: start(), Alter: func(m protocol.Message) []protocol.Message {
			if m.From == "b" {
				sizes = append(sizes, len(m.Body))
			}
			return []protocol.Message{m}
		}}
		net.MustRun(t)
		for target, size := range sizes {
			for at := 0; at < size; at += 1 + mathrand.IntN(8) {
				echo := false
				sent = -1
				net := protocoltest.Network[protocol.Session]{Sessions: start(), Alter: func(m protocol.Message) []protocol.Message {
					if m.From == "b" {
						if sent++; sent == target && at < len(m.Body) {
							echo = m.Body[65] == 64 && at >= 66 && at < 66+64
							m.Body[at] ^= 1
						}
					}
					return []protocol.Message{m}
				}}
				failed, waiting := net.Run(t)
				if slices.Contains(waiting, "a") && failed["b"] != nil {
					continue // b saw first that they had received different things
				}
				if failed["a"] == nil || strings.Contains(failed["a"].Error(), "panicked") || !echo && !protocoltest.Blames(failed["a"], "b") {
					t.Errorf("%s: message %d, byte %d of %d: %v", run, target, at, size, failed["a"])
				}
			}
		}
		if len(sizes) < 2 {
			t.Errorf("%s: b sent %d messages", run, len(sizes))
		}
	}
}
