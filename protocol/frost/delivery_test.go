package frost

import (
	"bytes"
	"crypto/ed25519"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	ed "filippo.io/edwards25519"

	"conseal/protocol"
)

// deliveries are what a network may do to a message. Whoever gets what is wrong
// refuses it without blame, as the sender did nothing wrong.
var deliveries = map[string]struct {
	do   func(m protocol.Message) []protocol.Message
	want string // "error" for one that stops the receiver, "silence" for one that leaves it waiting
}{
	"dropped":       {func(m protocol.Message) []protocol.Message { return nil }, "silence"},
	"repeated":      {func(m protocol.Message) []protocol.Message { return []protocol.Message{m, m} }, "error"},
	"to another":    {func(m protocol.Message) []protocol.Message { m.Session[0]++; return []protocol.Message{m} }, "error"},
	"from stranger": {func(m protocol.Message) []protocol.Message { m.From = "eve"; return []protocol.Message{m} }, "error"},
}

// TestDeliveryOfEachMessage does each of them to each message of a key generation, a
// resharing and a signature, one at a time.
func TestDeliveryOfEachMessage(t *testing.T) {
	group := signingGroup(t, 2, 3)
	for protocolName, fresh := range map[string]func() *network{
		"keygen": func() *network { return keygens(t, 2, 3) },
		"reshare": func() *network {
			return reshares(t, group, []protocol.HostID{"h000", "h002"}, []protocol.HostID{"h002", "h003"}, 2)
		},
		"sign": func() *network { return signs(t, group, []protocol.HostID{"h000", "h002"}, "h001", []byte("m")) },
	} {
		total := 0
		count := fresh()
		count.tamper = func(m protocol.Message) []protocol.Message { total++; return []protocol.Message{m} }
		count.run()
		if len(count.errs) > 0 || total < 4 {
			t.Fatalf("%s: %d messages: %v", protocolName, total, count.errs)
		}
		for name, d := range deliveries {
			for victim := range total {
				net, at := fresh(), 0
				var hit protocol.Message
				net.tamper = func(m protocol.Message) []protocol.Message {
					if at++; at-1 != victim {
						return []protocol.Message{m}
					}
					hit = m
					return d.do(m)
				}
				net.run()
				checkDelivery(t, protocolName+", "+name, net, hit, d.want)
			}
		}
	}
}

func checkDelivery(t *testing.T, name string, net *network, hit protocol.Message, want string) {
	t.Helper()
	for h, err := range net.errs {
		if culprit(err) != "" {
			t.Errorf("%s: message of round %d from %s to %s: %s blames %v", name, hit.Round, hit.From, hit.To, h, err)
		}
	}
	err := net.errs[hit.To]
	if want == "silence" && err != nil || want == "error" && err == nil {
		t.Errorf("%s: message of round %d from %s to %s: got %v, want %s", name, hit.Round, hit.From, hit.To, err, want)
	}
}

// TestReplayInAnotherSession feeds every message of one session to the next.
func TestReplayInAnotherSession(t *testing.T) {
	var old []protocol.Message
	first := keygens(t, 2, 3)
	first.tamper = func(m protocol.Message) []protocol.Message {
		old = append(old, m)
		return []protocol.Message{m}
	}
	first.run()
	for _, m := range old {
		// Bound to its session by the envelope, and by the proof if that is forged.
		k, err := NewKeygen(KeygenConfig{Session: protocol.SessionID{8}, Self: m.To, Holders: hostNames(3), Quorum: 2})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := k.Start(); err != nil {
			t.Fatal(err)
		}
		if _, err := k.Step(m); err == nil || culprit(err) != "" {
			t.Errorf("a message of round %d of another session: %v", m.Round, err)
		}
		k.Close()
	}
	second := connect(t, hostNames(3), func(_ protocol.SessionID, h protocol.HostID) (*Keygen, error) {
		return NewKeygen(KeygenConfig{Session: protocol.SessionID{8}, Self: h, Holders: hostNames(3), Quorum: 2})
	})
	second.tamper = func(m protocol.Message) []protocol.Message {
		for _, o := range old {
			if o.Round == m.Round && o.From == m.From && o.To == m.To && m.From == "h001" && m.Round == roundDeal {
				m.Body = bytes.Clone(o.Body)
			}
		}
		return []protocol.Message{m}
	}
	second.run()
	if culprit(second.errs["h000"]) != "h001" {
		t.Errorf("a proof of possession of another session: %v", second.errs["h000"])
	}
}

// TestFailedKeygenStaysFailed goes on with a session after its echoes differed:
// the shares that come late must not make a key.
func TestFailedKeygenStaysFailed(t *testing.T) {
	net := keygens(t, 2, 3)
	var late []protocol.Message
	net.tamper = func(m protocol.Message) []protocol.Message {
		if m.To == "h000" && m.Round == roundShare {
			late = append(late, m)
			return nil
		}
		if m.To == "h000" && m.From == "h001" && m.Round == roundEcho {
			m.Body[0] ^= 1
		}
		return []protocol.Message{m}
	}
	net.run()
	k := net.sessions["h000"].(*Keygen)
	if net.errs["h000"] == nil || culprit(net.errs["h000"]) != "" || len(late) == 0 {
		t.Fatalf("got %v and %d shares", net.errs["h000"], len(late))
	}
	for _, m := range late {
		if r, err := k.Step(m); err == nil || r.Done {
			t.Error("a failed session took a share")
		}
	}
	if _, err := k.Result(); err == nil {
		t.Error("a failed session has a result")
	}
	for _, c := range k.own.Coefficients {
		if c.Equal(ed.NewScalar()) != 1 {
			t.Error("a failed session keeps its dealing")
		}
	}
}

// TestEquivocatingCoordinator sends each signer another list, with the signer's
// own commitment in it and a commitment of its own making for the other: the shares
// make no signature, and each signer gives one.
func TestEquivocatingCoordinator(t *testing.T) {
	group := signingGroup(t, 3, 4)
	signers := []protocol.HostID{"h000", "h001", "h002"}
	net := signs(t, group, signers, "h003", []byte("m"))
	answers := map[protocol.HostID]int{}
	net.tamper = func(m protocol.Message) []protocol.Message {
		if m.Round == roundList && m.To == "h001" {
			other, err := commit(group["h000"])
			if err != nil {
				t.Fatal(err)
			}
			copy(m.Body, other.commitment[:])
			return []protocol.Message{m, m}
		}
		if m.Round == roundSign {
			answers[m.From]++
		}
		return []protocol.Message{m}
	}
	net.run()
	if _, err := net.sessions["h003"].(*Sign).Signature(); err == nil || net.errs["h003"] == nil {
		t.Error("there is a signature over different lists")
	}
	for _, h := range signers {
		if answers[h] != 1 {
			t.Errorf("%s gave %d shares", h, answers[h])
		}
	}
}

// TestMalformedCommitmentBlamesItsSender: the coordinator passes a commitment on
// before it checks it. It names the signer that sent it; the other signers, who
// cannot know, name nobody and give nothing.
func TestMalformedCommitmentBlamesItsSender(t *testing.T) {
	group := signingGroup(t, 3, 3)
	for _, coordinator := range hostNames(2) {
		net := signs(t, group, hostNames(3), coordinator, []byte("m"))
		net.tamper = func(m protocol.Message) []protocol.Message {
			if m.Round == roundCommit && m.From == "h002" {
				p, err := new(ed.Point).SetBytes(m.Body[:pointSize])
				if err != nil {
					t.Fatal(err)
				}
				copy(m.Body, p.Add(p, torsion(t)).Bytes()) // a small order, added
			}
			if m.Round == roundSign && m.From != "h002" {
				t.Errorf("a share of %s left", m.From)
			}
			return []protocol.Message{m}
		}
		net.run()
		for _, h := range hostNames(2) {
			want := protocol.HostID("")
			if h == coordinator {
				want = "h002"
			}
			if err := net.errs[h]; err == nil || culprit(err) != want {
				t.Errorf("coordinator %s: %s says %v", coordinator, h, err)
			}
		}
	}
}

// TestSignerSendsNoList: a signer that plays coordinator is at fault.
func TestSignerSendsNoList(t *testing.T) {
	group := signingGroup(t, 2, 2)
	s := signs(t, group, hostNames(2), "h000", []byte("m")).sessions["h000"]
	if _, err := s.Start(); err != nil {
		t.Fatal(err)
	}
	for _, round := range []uint16{roundList, roundSign, 4, 65535} {
		m := protocol.Message{Session: testSession, From: "h001", To: "h000", Round: round, Body: make([]byte, 2*commitmentSize)}
		if _, err := s.Step(m); culprit(err) != "h001" {
			t.Errorf("round %d: %v", round, err)
		}
	}
}

// TestWipedShareSignsNothing: an error and no panic, however the driver goes on.
func TestWipedShareSignsNothing(t *testing.T) {
	group := signingGroup(t, 2, 2)
	net := signs(t, group, hostNames(2), "h000", []byte("m"))
	group["h001"].Wipe()
	s := net.sessions["h001"]
	if _, err := s.Start(); err == nil {
		t.Fatal("nonces from a wiped share")
	}
	m := protocol.Message{Session: testSession, From: "h000", To: "h001", Round: roundList, Body: make([]byte, 2*commitmentSize)}
	if _, err := s.Step(m); !errors.Is(err, errClosed) {
		t.Errorf("got %v", err)
	}
	s.Close()
	s.Close()
}

// TestOpenSSLVerifies has another implementation verify a signature.
func TestOpenSSLVerifies(t *testing.T) {
	if _, err := exec.LookPath("openssl"); err != nil {
		t.Fatal("openssl is needed and was not found; install it: apt-get install openssl")
	}
	group := signingGroup(t, 2, 3)
	message := []byte("a message that openssl reads from a file")
	net := signs(t, group, []protocol.HostID{"h000", "h002"}, "h001", message)
	net.run()
	sig, err := net.sessions["h001"].(*Sign).Signature()
	if err != nil {
		t.Fatal(err)
	}
	spki, err := x509.MarshalPKIXPublicKey(ed25519.PublicKey(group["h000"].Group.PublicKey[:]))
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	verify := func(message []byte) ([]byte, error) {
		for name, content := range map[string][]byte{"key": pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: spki}), "message": message, "sig": sig} {
			if err := os.WriteFile(filepath.Join(dir, name), content, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		cmd := exec.Command("openssl", "pkeyutl", "-verify", "-pubin", "-inkey", "key", "-rawin", "-in", "message", "-sigfile", "sig")
		cmd.Dir = dir
		return cmd.CombinedOutput()
	}
	if out, err := verify(message); err != nil {
		t.Errorf("openssl refuses: %v: %s", err, out)
	}
	if out, err := verify(append(message, '.')); err == nil {
		t.Errorf("openssl takes another message: %s", out)
	}
}
