package agent_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/json"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"conseal/agent/epoch"
	"conseal/agent/peer"
	"conseal/agent/peer/peerpb"
	"conseal/agent/vault"
	"conseal/config"
	"conseal/protocol"
	"conseal/testenv"
	"conseal/tpm"
)

// traitor is host beta in the hands of an attacker: its identity, and a peer
// that says what the test wants.
type traitor struct {
	net    *peer.Net
	up     chan protocol.HostID
	frames chan *peerpb.Frame // from alpha
}

func (tr *traitor) Up(h protocol.HostID, _ *peerpb.Hello) { tr.up <- h }
func (tr *traitor) Hello(protocol.HostID, *peerpb.Hello)  {}
func (tr *traitor) Down(protocol.HostID, error)           {}
func (tr *traitor) Frame(from protocol.HostID, f *peerpb.Frame) {
	if from == "alpha" && f.GetKey() == nil {
		tr.frames <- f
	}
}

// betray stops beta's agent and takes its place.
func betray(ctx context.Context, t *testing.T, f *testenv.Fleet) *traitor {
	t.Helper()
	beta := f.Host("beta")
	must(t, beta.Stop(ctx))
	var kept struct {
		SRKName   []byte         `json:"srk_name"`
		PCRWanted map[int][]byte `json:"pcr_wanted"`
		Identity  string         `json:"identity"`
	}
	b, err := os.ReadFile(filepath.Join(beta.State(), "tpm.json"))
	must(t, err)
	must(t, json.Unmarshal(b, &kept))
	hw, err := tpm.Open(ctx, tpm.Config{Device: beta.Tap.Address(), PCRs: []int{0, 2, 4, 7}, SRKName: kept.SRKName, PCRWanted: kept.PCRWanted})
	must(t, err)
	identity, err := hw.Identity(ctx, []byte(kept.Identity))
	must(t, err)
	roster, err := config.LoadRoster(f.RosterFile())
	must(t, err)
	hosts := map[protocol.HostID]peer.Host{}
	for _, h := range roster.Hosts {
		hosts[protocol.HostID(h.Name)] = peer.Host{Address: h.Address, Pin: h.Identity}
	}
	tr := &traitor{up: make(chan protocol.HostID, 64), frames: make(chan *peerpb.Frame, 4096)}
	tr.net, err = peer.New(peer.Config{
		Self: "beta", Fleet: roster.Fleet, Identity: identity, Listen: beta.Address, Hosts: hosts,
		Hello: func() *peerpb.Hello { return &peerpb.Hello{RosterVersion: 1, RosterDigest: make([]byte, 32)} },
		Rate:  1_000_000, Log: slog.New(slog.DiscardHandler),
	}, tr)
	must(t, err)
	run, stop := context.WithCancel(ctx)
	ended := make(chan struct{})
	go func() { defer close(ended); _ = tr.net.Run(run) }()
	t.Cleanup(func() { stop(); <-ended; hw.Close(context.WithoutCancel(ctx)) })
	for h := range tr.up {
		if h == "alpha" {
			break
		}
	}
	return tr
}

func (tr *traitor) send(t *testing.T, f *peerpb.Frame) {
	t.Helper()
	must(t, tr.net.Send("alpha", f))
}

// answer waits for alpha's next word on a session.
func (tr *traitor) answer(ctx context.Context, t *testing.T, id protocol.SessionID) *peerpb.Frame {
	t.Helper()
	for {
		select {
		case f := <-tr.frames:
			if bytes.Equal(f.GetEnd().GetSession(), id[:]) || bytes.Equal(f.GetStep().GetSession(), id[:]) {
				return f
			}
		case <-ctx.Done():
			t.Fatal("alpha says nothing")
		}
	}
}

func wire(b *protocol.Binding) *peerpb.Binding {
	out := &peerpb.Binding{
		Operation: b.Operation, Scheme: b.Scheme, Key: b.Key, Incarnation: b.Incarnation,
		Epoch: &peerpb.Number{Roster: b.Epoch[0], Attempt: b.Epoch[1]}, Entry: b.Entry[:], Certificate: b.Certificate[:],
		Quorum: b.Quorum, Request: b.Request[:], Nonce: b.Nonce[:],
	}
	for _, p := range b.Parties {
		out.Parties = append(out.Parties, string(p))
	}
	return out
}

// TestTraitor attacks an agent with a valid identity of another host.
func TestTraitor(t *testing.T) {
	ctx, f := newFleet(t)
	must(t, f.Start(ctx))
	must(t, f.WaitReady(ctx, "first"))
	alpha := f.Host("alpha")
	k, err := alpha.Client().GetKey(ctx, "first")
	must(t, err)
	roster, err := config.LoadRoster(f.RosterFile())
	must(t, err)
	entry, err := roster.EntryDigest("first")
	must(t, err)
	tr := betray(ctx, t, f)
	message := []byte("what beta may ask for")
	good := func() protocol.Binding {
		b := protocol.Binding{
			Operation: "sign", Scheme: "ed25519", Key: "first", Incarnation: 1, Epoch: [2]uint64{k.EpochRoster, k.EpochAttempt},
			Entry: entry, Certificate: [32]byte(k.Certificate), Quorum: 2, Parties: []protocol.HostID{"alpha", "beta"}, Request: sha256.Sum256(message),
		}
		rand.Read(b.Nonce[:])
		return b
	}
	open := func(b *protocol.Binding, message []byte) *peerpb.Frame {
		tr.send(t, &peerpb.Frame{Body: &peerpb.Frame_Open{Open: &peerpb.Open{Binding: wire(b), Message: message}}})
		return tr.answer(ctx, t, b.ID())
	}
	t.Run("control", func(t *testing.T) {
		b := good()
		if f := open(&b, message); f.GetStep().GetRound() != 1 {
			t.Fatalf("a good request got %v: the attacks below would show nothing", f)
		}
	})
	t.Run("bindings", func(t *testing.T) {
		for name, test := range map[string]struct {
			change  func(*protocol.Binding)
			message []byte
			want    string
		}{
			"operation":     {func(b *protocol.Binding) { b.Operation = "export" }, message, "operation"},
			"scheme":        {func(b *protocol.Binding) { b.Scheme = "bip340" }, message, "scheme"},
			"key":           {func(b *protocol.Binding) { b.Key = "other" }, message, "no key"},
			"incarnation":   {func(b *protocol.Binding) { b.Incarnation = 2 }, message, "incarnation"},
			"epoch":         {func(b *protocol.Binding) { b.Epoch[1]++ }, message, "epoch"},
			"entry":         {func(b *protocol.Binding) { b.Entry[0]++ }, message, "roster entry"},
			"certificate":   {func(b *protocol.Binding) { b.Certificate = [32]byte{} }, message, "certificate"},
			"quorum":        {func(b *protocol.Binding) { b.Quorum = 1 }, message, "quorum"},
			"too few":       {func(b *protocol.Binding) { b.Parties = []protocol.HostID{"alpha"} }, message, "1 signers"},
			"too many":      {func(b *protocol.Binding) { b.Parties = []protocol.HostID{"alpha", "beta", "gamma"} }, message, "3 signers"},
			"nobody":        {func(b *protocol.Binding) { b.Parties = nil }, message, "no parties"},
			"without alpha": {func(b *protocol.Binding) { b.Parties = []protocol.HostID{"beta", "gamma"} }, message, "not among"},
			"twice":         {func(b *protocol.Binding) { b.Parties = []protocol.HostID{"alpha", "alpha"} }, message, "sorted"},
			"stranger":      {func(b *protocol.Binding) { b.Parties = []protocol.HostID{"alpha", "eve"} }, message, "holds no share"},
			"digest":        {func(b *protocol.Binding) { b.Request[0]++ }, message, "another than"},
			"empty message": {func(b *protocol.Binding) { b.Request = sha256.Sum256(nil) }, nil, "outside its limits"},
			"long message":  {func(b *protocol.Binding) {}, make([]byte, 1<<20+1), "outside its limits"},
			"keygen anew":   {func(b *protocol.Binding) { b.Operation = "keygen" }, nil, "starts this key's generation"},
		} {
			b := good()
			test.change(&b)
			f := open(&b, test.message)
			if f.GetEnd() == nil || !strings.Contains(f.GetEnd().Text, test.want) {
				t.Errorf("%s: got %v, want a refusal that says %q", name, f, test.want)
			}
		}
	})
	t.Run("nonces", func(t *testing.T) {
		b := good()
		commitment := open(&b, message).GetStep()
		id := b.ID()
		mine := commitment.GetBody() // any points will do
		list := append(bytes.Clone(commitment.GetBody()), mine...)
		second := append(bytes.Clone(commitment.GetBody()), mine[32:]...)
		second = append(second, mine[:32]...)
		for _, body := range [][]byte{list, second, list} {
			tr.send(t, &peerpb.Frame{Body: &peerpb.Frame_Step{Step: &peerpb.Step{Session: id[:], Round: 2, Body: body}}})
		}
		if f := tr.answer(ctx, t, id); f.GetStep().GetRound() != 3 {
			t.Fatalf("the first list got %v", f)
		}
		replayed := open(&b, message)
		for replayed.GetEnd().GetReason() == "BUSY" { // alpha has not closed the session yet of which the share came
			replayed = open(&b, message)
		}
		if f := replayed; f.GetStep().GetRound() != 1 || bytes.Equal(f.GetStep().GetBody(), commitment.GetBody()) {
			t.Errorf("a replayed session got %v: want a fresh commitment", f)
		}
		for {
			select {
			case f := <-tr.frames:
				if bytes.Equal(f.GetStep().GetSession(), id[:]) && f.GetStep().GetRound() == 3 {
					t.Fatal("a second share came for one commitment")
				}
				continue
			default:
			}
			break
		}
	})
	t.Run("lies", func(t *testing.T) {
		fake := epoch.NewCertificate(epoch.Subject{Fleet: "test", Key: vault.KeyID{Name: "first", Incarnation: 1}, Scheme: "ed25519"}, []byte("public"), nil)
		encoded, err := fake.Encode()
		must(t, err)
		for _, f := range []*peerpb.Frame{
			{Body: &peerpb.Frame_Key{Key: &peerpb.KeyStatus{Key: "first", Incarnation: 1, Entry: []byte("short")}}},
			{Body: &peerpb.Frame_Key{Key: &peerpb.KeyStatus{Key: "first", Incarnation: 1, Entry: entry[:], Active: &peerpb.Number{}, Certificate: []byte{1}}}},
			{Body: &peerpb.Frame_Key{Key: &peerpb.KeyStatus{Key: "first", Incarnation: 1, Entry: entry[:], Voted: &peerpb.Staged{Output: make([]byte, 32)}, Statement: []byte("garbage")}}},
			{Body: &peerpb.Frame_Key{Key: &peerpb.KeyStatus{Key: "first", Incarnation: 1, Entry: entry[:], Staged: make([]*peerpb.Staged, 65)}}},
			{Body: &peerpb.Frame_Certificate{Certificate: &peerpb.CertificateOffer{Certificate: []byte("garbage")}}},
			{Body: &peerpb.Frame_Certificate{Certificate: &peerpb.CertificateOffer{Certificate: encoded}}},
			{Body: &peerpb.Frame_Want{Want: &peerpb.CertificateRequest{Key: "nope"}}},
			{Body: &peerpb.Frame_Open{Open: &peerpb.Open{}}},
			{Body: &peerpb.Frame_Step{Step: &peerpb.Step{Session: []byte("short"), Round: 1 << 20}}},
			{Body: &peerpb.Frame_End{End: &peerpb.End{}}},
		} {
			tr.send(t, f)
		}
		for range 3000 { // sessions that are opened and left
			b := good()
			tr.send(t, &peerpb.Frame{Body: &peerpb.Frame_Open{Open: &peerpb.Open{Binding: wire(&b), Message: message}}})
		}
		busy := false
		for !busy {
			select {
			case f := <-tr.frames:
				busy = f.GetEnd().GetReason() == "BUSY"
			case <-ctx.Done():
				t.Fatal("3000 sessions were not too many")
			}
		}
	})
	// All the while and afterwards, alpha and gamma sign.
	for range 5 {
		r, err := alpha.Client().Sign(ctx, "first", []byte("honest"))
		must(t, err)
		must(t, verifyScheme("ed25519", r, []byte("honest")))
	}
	log, err := os.ReadFile(alpha.LogFile())
	must(t, err)
	if !bytes.Contains(log, []byte("peer=beta")) || bytes.Contains(log, []byte("panic")) {
		t.Error("alpha's log does not name beta, or speaks of a panic")
	}
	if len(log) > 2<<20 {
		t.Errorf("a peer made alpha log %d bytes", len(log))
	}
}
