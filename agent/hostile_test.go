package agent

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	"conseal/agent/epoch"
	"conseal/agent/peer"
	"conseal/agent/peer/peerpb"
	"conseal/agent/vault"
	"conseal/config"
	"conseal/internal/secret"
	"conseal/protocol"
	"conseal/protocol/dealing"
	"conseal/testenv"
)

// hardware is a protector in memory. What real hardware does is shown elsewhere;
// here are many agents in one process.
type hardware struct {
	mu   sync.Mutex
	root []byte
	keys map[string][]byte // by id and blob
	// onOpen, if not nil, is asked before a key is opened, without mu.
	onOpen func(id string) error
	// away, if not nil, is what SetRoot says.
	away error
}

type noRootYet struct{}

func (noRootYet) Error() string { return "no root was ever set" }
func (noRootYet) NoRoot() bool  { return true }

func (h *hardware) Name() string { return "memory" }
func (h *hardware) Kind() string { return "tpm" }

func (h *hardware) Seal(_ context.Context, id string) (*secret.Bytes, []byte, error) {
	key, blob := make([]byte, 32), make([]byte, 16)
	rand.Read(key)
	rand.Read(blob)
	h.mu.Lock()
	defer h.mu.Unlock()
	h.keys[id+string(blob)] = key
	return secret.Copy(key), blob, nil
}

func (h *hardware) Open(_ context.Context, id string, blob []byte) (*secret.Bytes, error) {
	h.mu.Lock()
	onOpen := h.onOpen
	h.mu.Unlock()
	if onOpen != nil {
		if err := onOpen(id); err != nil {
			return nil, err
		}
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	key, ok := h.keys[id+string(blob)]
	if !ok {
		return nil, errors.New("not sealed here")
	}
	return secret.Copy(key), nil
}

func (h *hardware) Root(context.Context) (*secret.Bytes, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.root == nil {
		return nil, noRootYet{}
	}
	return secret.Copy(h.root), nil
}

func (h *hardware) SetRoot(_ context.Context, next *secret.Bytes) error {
	return next.Use(func(b []byte) error {
		h.mu.Lock()
		defer h.mu.Unlock()
		if h.away == nil {
			h.root = bytes.Clone(b)
		}
		return h.away
	})
}

// lab is a fleet of agents in this process. Their key is "first", 2 of 3.
type lab struct {
	t      testing.TB
	ctx    context.Context
	roster *config.Roster
	hosts  map[string]*labHost
}

type labHost struct {
	name      string
	identity  *ecdsa.PrivateKey
	protector *hardware
	config    *config.Host
	log       *logText
	agent     *Agent
	stop      func() error // nil while it does not run
}

// logText keeps what an agent logs.
type logText struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logText) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(b)
}

func (l *logText) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// newLab makes alpha, beta and gamma; users are those of key "first", an Ed25519 key.
func newLab(t testing.TB, users ...string) *lab {
	t.Helper()
	return newLabOf(t, "ed25519", users...)
}

func newLabOf(t testing.TB, scheme string, users ...string) *lab {
	t.Helper()
	dir, err := os.MkdirTemp("/tmp", "conseal-lab-") // short: sockets have at most 107 bytes
	ok(t, err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	l := &lab{t: t, ctx: t.Context(), hosts: map[string]*labHost{}}
	text := "fleet = \"lab\"\nversion = 1\n"
	network, free, err := testenv.Loopback()
	ok(t, err)
	t.Cleanup(func() { ok(t, free()) })
	for i, name := range []string{"alpha", "beta", "gamma"} {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		ok(t, err)
		pin, err := config.PinOf(key.Public())
		ok(t, err)
		c := config.Default()
		c.Name, c.State, c.InsecureLab = name, filepath.Join(dir, name), true
		c.Limits.KeygenDeadline = patience // for slow machines
		c.Listen.Address = fmt.Sprintf("%s.%d:7443", network, i+1)
		c.Listen.SignSocket, c.Listen.AdminSocket = filepath.Join(dir, name, "s"), filepath.Join(dir, name, "a")
		h := &labHost{name: name, identity: key, config: c, log: &logText{}, protector: &hardware{keys: map[string][]byte{}}}
		l.hosts[name] = h
		ok(t, os.MkdirAll(c.State, 0o700))
		ok(t, vault.Create(l.ctx, VaultFolder(c), name, h.protector))
		text += fmt.Sprintf("[[host]]\nname = %q\naddress = %q\nidentity = %q\nprotector = \"tpm\"\n", name, c.Listen.Address, pin)
	}
	text += "[[key]]\nname = \"first\"\nscheme = \"" + scheme + "\"\nquorum = 2\nhosts = [\"alpha\", \"beta\", \"gamma\"]\nstate = \"active\"\npurpose = \"a test\"\ngenerate = true\n"
	if len(users) > 0 {
		text += fmt.Sprintf("users = [\"%s\"]\n", strings.Join(users, `", "`))
	}
	l.roster, err = config.ParseRoster([]byte(text))
	ok(t, err)
	t.Cleanup(func() {
		for _, h := range l.hosts {
			if h.stop != nil {
				h.stop()
			}
			if t.Failed() {
				t.Logf("log of %s:\n%s", h.name, h.log)
			}
		}
	})
	return l
}

// start runs the agents of hosts.
func (l *lab) start(names ...string) {
	l.t.Helper()
	for _, name := range names {
		h := l.hosts[name]
		var err error
		h.agent, err = New(Options{Config: h.config, Roster: l.roster, Protector: h.protector, Identity: h.identity, Version: "test",
			Log: slog.New(slog.NewTextHandler(h.log, nil))})
		ok(l.t, err)
		ctx, cancel := context.WithCancel(context.Background())
		ended := make(chan error, 1)
		go func() { ended <- h.agent.Run(ctx) }()
		h.stop = func() error {
			cancel()
			h.stop = nil
			return <-ended
		}
	}
}

// born runs three honest agents until key "first" exists everywhere.
func born(t testing.TB, users ...string) *lab {
	t.Helper()
	l := newLab(t, users...)
	l.birth()
	return l
}

// birth runs the agents until key "first" exists on each.
func (l *lab) birth() {
	l.t.Helper()
	l.start("gamma", "beta", "alpha")
	l.untilBorn()
}

// untilBorn waits until every host has the key active, and knows that of the others, and
// no share is left of attempts that came to nothing.
func (l *lab) untilBorn() {
	l.t.Helper()
	l.untilActive(slices.Sorted(maps.Keys(l.hosts))...)
	for name, h := range l.hosts {
		k := l.key(name)
		l.until(name+" has heard of all", func() bool {
			record, _ := h.agent.vault.Load().Record(k.id)
			return len(k.live(protocol.HostID(name))) == len(k.holders()) && len(record.Staged) == 1
		})
	}
}

// leaves stops the agent of a host and waits until the others have seen it: what they
// know of the host from then on is news.
func (l *lab) leaves(name string) {
	l.t.Helper()
	ok(l.t, l.hosts[name].stop())
	for other, h := range l.hosts {
		if h.stop == nil {
			continue
		}
		l.until(other+" has seen that "+name+" left", func() bool {
			for _, k := range h.agent.keys() {
				k.mu.Lock()
				_, there := k.views[protocol.HostID(name)]
				k.mu.Unlock()
				if there {
					return false
				}
			}
			return !slices.ContainsFunc(h.agent.net.States(), func(s peer.State) bool { return string(s.Host) == name && s.Connected })
		})
	}
}

func (l *lab) key(name string) *key { return l.hosts[name].agent.told.Load().keys["first"] }

func (l *lab) untilActive(names ...string) {
	l.t.Helper()
	for _, name := range names {
		l.until("the key is active on "+name, func() bool { return l.key(name).active.Load() != nil })
	}
}

// patience only ends what hangs.
const patience = 10 * time.Minute

// until waits for something that comes by itself. In a goroutine, it ends with the test.
func (l *lab) until(what string, there func() bool) {
	l.t.Helper()
	end := time.NewTimer(patience)
	defer end.Stop()
	look := time.NewTicker(5 * time.Millisecond)
	defer look.Stop()
	for !there() {
		select {
		case <-look.C:
		case <-l.ctx.Done():
			runtime.Goexit()
		case <-end.C:
			l.t.Fatalf("in vain: %s", what)
		}
	}
}

// untilSays waits for a condition whose text has all of words.
func (l *lab) untilSays(host, condition string, words ...string) {
	l.t.Helper()
	k := l.key(host)
	l.until(fmt.Sprintf("%s says %s: %q", host, condition, words), func() bool {
		k.mu.Lock()
		defer k.mu.Unlock()
		return k.condition.name == condition && !slices.ContainsFunc(words, func(w string) bool { return !strings.Contains(k.condition.detail, w) })
	})
}

func (l *lab) untilLogged(host string, words ...string) {
	l.t.Helper()
	l.until(fmt.Sprintf("%s logs %q", host, words), func() bool {
		for line := range strings.Lines(l.hosts[host].log.String()) {
			if !slices.ContainsFunc(words, func(w string) bool { return !strings.Contains(line, w) }) {
				return true
			}
		}
		return false
	})
}

// sign asks a host for a signature and verifies it.
func (l *lab) sign(host string, message []byte) ([]string, error) {
	l.t.Helper()
	a := l.hosts[host].agent
	act := a.key("first").active.Load()
	r, err := a.sign(l.ctx, &request{k: a.key("first"), act: act, message: message, digest: sha256.Sum256(message)})
	if err != nil {
		return nil, err
	}
	public, err := x509.ParsePKIXPublicKey(act.output.spki)
	ok(l.t, err)
	good := false
	switch public := public.(type) {
	case ed25519.PublicKey:
		good = ed25519.Verify(public, message, r.Signature)
	case *ecdsa.PublicKey:
		digest := sha256.Sum256(message)
		good = ecdsa.VerifyASN1(public, digest[:], r.Signature)
	}
	if !good {
		l.t.Error("the signature does not verify")
	}
	return r.Signers, nil
}

// rogue is an attacker with the identity, and the shares, of one host.
type rogue struct {
	*lab
	self     protocol.HostID
	net      *peer.Net
	sessions *sessions
	key      *key
	on       func(from protocol.HostID, f *peerpb.Frame) // told each frame; nil: nobody is
	leave    func()                                      // ends its connections

	mu     sync.Mutex
	up     map[protocol.HostID]bool
	downs  map[protocol.HostID]int // how many streams with a host have ended
	frames []heardFrame
}

type heardFrame struct {
	from protocol.HostID
	f    *peerpb.Frame
}

func (r *rogue) Up(h protocol.HostID, _ *peerpb.Hello) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.up[h] = true
}

func (r *rogue) Hello(protocol.HostID, *peerpb.Hello) {}

func (r *rogue) Down(h protocol.HostID, _ error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.up, h)
	r.downs[h]++
}

func (r *rogue) Frame(from protocol.HostID, f *peerpb.Frame) {
	switch body := f.Body.(type) {
	case *peerpb.Frame_Step:
		r.sessions.deliver(body.Step.Session, event{from: from, step: body.Step})
	case *peerpb.Frame_End:
		r.sessions.deliver(body.End.Session, event{from: from, err: &partyError{host: from, reason: body.End.Reason, text: body.End.Text}})
	}
	r.mu.Lock()
	r.frames = append(r.frames, heardFrame{from, f})
	on := r.on
	r.mu.Unlock()
	if on != nil {
		on(from, f)
	}
}

// react sets what the rogue does on each frame.
func (r *rogue) react(on func(from protocol.HostID, f *peerpb.Frame)) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.on = on
}

// betray puts a rogue in the place of a host, whose agent is stopped if it runs,
// and waits until it is connected to the others.
func (l *lab) betray(name string) *rogue {
	l.t.Helper()
	h := l.hosts[name]
	if h.stop != nil {
		l.leaves(name)
	}
	entry, _ := l.roster.Key("first")
	d, err := declare(*entry, l.roster)
	ok(l.t, err)
	k, err := newKey(d)
	ok(l.t, err)
	r := &rogue{lab: l, self: protocol.HostID(name), key: k, sessions: newSessions(1), up: map[protocol.HostID]bool{}, downs: map[protocol.HostID]int{}}
	hosts := map[protocol.HostID]peer.Host{}
	for _, m := range l.roster.Hosts {
		hosts[protocol.HostID(m.Name)] = peer.Host{Address: m.Address, Pin: m.Identity}
	}
	digest := l.roster.Digest()
	r.net, err = peer.New(peer.Config{
		Self: r.self, Fleet: "lab", Identity: h.identity, Hosts: hosts, Listen: h.config.Listen.Address, MaxFrame: 16 << 20, QueueLen: 1 << 15,
		Hello: func() *peerpb.Hello { return &peerpb.Hello{Fleet: "lab", RosterVersion: 1, RosterDigest: digest[:]} },
	}, r)
	ok(l.t, err)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- r.net.Run(ctx) }()
	r.leave = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			l.t.Error(err)
		}
	})
	l.t.Cleanup(r.leave)
	r.connected()
	return r
}

// connected waits until every agent is connected to everybody.
func (r *rogue) connected() {
	r.t.Helper()
	var running []protocol.HostID
	for name, h := range r.hosts {
		if h.stop != nil {
			running = append(running, protocol.HostID(name))
			r.until(name+" is connected", func() bool {
				return !slices.ContainsFunc(h.agent.net.States(), func(s peer.State) bool { return !s.Connected })
			})
		}
	}
	r.until("the rogue is connected", func() bool {
		r.mu.Lock()
		defer r.mu.Unlock()
		return !slices.ContainsFunc(running, func(h protocol.HostID) bool { return !r.up[h] })
	})
}

func (r *rogue) send(to protocol.HostID, f *peerpb.Frame) {
	r.t.Helper()
	ok(r.t, r.net.Send(to, f))
}

// hears waits for a frame of a host.
func (r *rogue) hears(what string, from protocol.HostID, match func(*peerpb.Frame) bool) (found *peerpb.Frame) {
	r.t.Helper()
	r.until(what, func() bool {
		r.mu.Lock()
		defer r.mu.Unlock()
		for _, h := range r.frames {
			if h.from == from && match(h.f) {
				found = h.f
				return true
			}
		}
		return false
	})
	return found
}

// forget forgets the frames so far.
func (r *rogue) forget() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.frames = nil
}

// all returns the frames so far that match.
func (r *rogue) all(match func(protocol.HostID, *peerpb.Frame) bool) (found []*peerpb.Frame) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, h := range r.frames {
		if match(h.from, h.f) {
			found = append(found, h.f)
		}
	}
	return found
}

// says tells hosts what the rogue claims to have.
func (r *rogue) says(change func(*peerpb.KeyStatus), to ...protocol.HostID) {
	r.t.Helper()
	for _, h := range to {
		s := &peerpb.KeyStatus{Key: "first", Incarnation: 1, Entry: digestOf(r.key)}
		change(s)
		r.send(h, &peerpb.Frame{Body: &peerpb.Frame_Key{Key: s}})
	}
}

// settled waits until a host has taken everything that the rogue sent it: it
// answers the session that the rogue opens last.
func (r *rogue) settled(host protocol.HostID) {
	r.t.Helper()
	b := protocol.Binding{Operation: "ping", Key: "first", Parties: []protocol.HostID{host}}
	rand.Read(b.Nonce[:])
	r.open(host, &b, nil)
	r.hears("an answer", host, endOf(b.ID()))
}

func (r *rogue) open(to protocol.HostID, b *protocol.Binding, message []byte) {
	r.t.Helper()
	r.send(to, &peerpb.Frame{Body: &peerpb.Frame_Open{Open: &peerpb.Open{Binding: wireBinding(b), Message: message}}})
}

// binding reads a request of an honest host.
func (r *rogue) binding(open *peerpb.Open) *protocol.Binding {
	b, err := parseBinding(open.Binding)
	if err != nil {
		r.t.Errorf("an honest host sent %v: %v", open, err)
		return &protocol.Binding{}
	}
	return b
}

func endOf(id protocol.SessionID) func(*peerpb.Frame) bool {
	return func(f *peerpb.Frame) bool { return bytes.Equal(f.GetEnd().GetSession(), id[:]) }
}

func stepOf(id protocol.SessionID, round uint32) func(*peerpb.Frame) bool {
	return func(f *peerpb.Frame) bool {
		return bytes.Equal(f.GetStep().GetSession(), id[:]) && f.GetStep().GetRound() == round
	}
}

// signing is a binding that the others accept, as they know the key.
func (r *rogue) signing(witness string, message []byte, parties ...protocol.HostID) *protocol.Binding {
	k := r.hosts[witness].agent.told.Load().keys["first"]
	var nonce [32]byte
	rand.Read(nonce[:])
	b := r.hosts[witness].agent.signBinding(opSign, k, k.active.Load(), parties, sha256.Sum256(message), nonce)
	return &b
}

// share opens the share that the rogue's host had.
func (r *rogue) share() shareholder {
	r.t.Helper()
	h := r.hosts[string(r.self)]
	v, err := vault.Open(r.ctx, VaultFolder(h.config), h.name, h.protector)
	ok(r.t, err)
	defer v.Close()
	encoded, err := v.Certificate(r.key.id)
	ok(r.t, err)
	c, err := epoch.Decode(encoded)
	ok(r.t, err)
	var s shareholder
	ok(r.t, v.Lend(r.ctx, r.key.id, c.Subject.Number, func(share []byte) error {
		s, err = r.key.scheme.load(r.self, c.Public, share)
		return err
	}))
	return s
}

// claim says that the rogue has the share that the others sign with.
func (r *rogue) claim(witness string) {
	r.t.Helper()
	act := r.hosts[witness].agent.told.Load().keys["first"].active.Load()
	r.says(func(s *peerpb.KeyStatus) {
		s.Active, s.Certificate = number(act.certificate.Subject.Number), act.id[:]
	}, r.others()...)
	for _, h := range r.others() {
		k := r.hosts[string(h)].agent.told.Load().keys["first"]
		r.until("the claim is heard", func() bool { return slices.Contains(k.live(h), r.self) })
	}
}

func (r *rogue) others() []protocol.HostID {
	return slices.DeleteFunc(slices.Clone(r.key.holders()), func(h protocol.HostID) bool { return h == r.self })
}

// prefer makes a host ask another last.
func (l *lab) prefer(host string, not protocol.HostID) {
	k := l.key(host)
	k.mu.Lock()
	defer k.mu.Unlock()
	k.failed[not] = time.Now()
}

// A signer that sends a wrong share, leaves or is silent costs one attempt: the
// signature comes from the others, and the log names it.
func TestLyingSigner(t *testing.T) {
	l := born(t)
	r := l.betray("beta")
	share := r.share()
	defer share.close()
	r.claim("alpha")
	join := func(open *peerpb.Open, send sender) {
		b := r.binding(open)
		box, err := r.sessions.open(b.ID(), r.self, []protocol.HostID{"alpha"})
		if err != nil {
			t.Error(err)
			return
		}
		defer r.sessions.close(box)
		session, err := share.sign(signing{id: box.id, self: r.self, coordinator: "alpha", signers: b.Parties, message: open.Message})
		if err != nil {
			t.Error(err)
			return
		}
		defer session.Close()
		_ = drive(l.ctx, r.self, session, box, send, nil)
	}
	for name, lie := range map[string]struct {
		said string
		do   func(open *peerpb.Open)
	}{
		"control: none": {"", func(open *peerpb.Open) { join(open, r.net.Send) }},
		"a wrong share": {"wrong signature share", func(open *peerpb.Open) {
			join(open, func(to protocol.HostID, f *peerpb.Frame) error {
				if f.GetStep().GetRound() == 3 {
					f.GetStep().Body[3] ^= 1
				}
				return r.net.Send(to, f)
			})
		}},
		"no scalar": {"signature share", func(open *peerpb.Open) {
			join(open, func(to protocol.HostID, f *peerpb.Frame) error {
				if f.GetStep().GetRound() == 3 {
					f.GetStep().Body = bytes.Repeat([]byte{0xff}, 32)
				}
				return r.net.Send(to, f)
			})
		}},
		"no point": {"commitment", func(open *peerpb.Open) {
			join(open, func(to protocol.HostID, f *peerpb.Frame) error {
				if f.GetStep().GetRound() == 1 {
					f.GetStep().Body = bytes.Repeat([]byte{0xff}, 64)
				}
				return r.net.Send(to, f)
			})
		}},
		"it refuses": {"not today", func(open *peerpb.Open) {
			_ = r.net.Send("alpha", endFrame(r.binding(open).ID(), "REFUSED", "not today"))
		}},
		"it wants a presignature": {"none here", func(open *peerpb.Open) {
			_ = r.net.Send("alpha", endFrame(r.binding(open).ID(), reasonNoPresignature, "none here"))
		}},
		"it says that alpha is behind": {"far behind", func(open *peerpb.Open) {
			_ = r.net.Send("alpha", endFrame(r.binding(open).ID(), reasonBehind, "far behind"))
		}},
		"it shouts": {"AAAA", func(open *peerpb.Open) {
			f := endFrame(r.binding(open).ID(), "", "")
			f.GetEnd().Text = strings.Repeat("A", 1<<20) + "\x1b[2J"
			_ = r.net.Send("alpha", f)
		}},
		"it is silent": {"no answer in time", func(*peerpb.Open) {}},
	} {
		t.Run(name, func(t *testing.T) {
			r.react(func(_ protocol.HostID, f *peerpb.Frame) {
				if open := f.GetOpen(); open != nil {
					go lie.do(open)
				}
			})
			l.prefer("alpha", "gamma")
			l.key("alpha").mu.Lock()
			delete(l.key("alpha").failed, "beta")
			l.key("alpha").mu.Unlock()
			before := len(l.hosts["alpha"].log.String())
			signers, err := l.sign("alpha", []byte(name))
			ok(t, err)
			said := l.hosts["alpha"].log.String()[before:]
			if lie.said == "" {
				if !slices.Contains(signers, "beta") {
					t.Errorf("signed by %q: beta was not asked, and what follows shows nothing", signers)
				}
				return
			}
			if !slices.Equal(signers, []string{"alpha", "gamma"}) {
				t.Errorf("signed by %q", signers)
			}
			if !strings.Contains(said, `host \"beta\"`) || !strings.Contains(said, lie.said) {
				t.Errorf("logged %q, want host beta and %q", said, lie.said)
			}
			if len(said) > 4096 || strings.Contains(said, "\x1b") {
				t.Errorf("a peer made the log %d bytes longer", len(said))
			}
		})
	}
}

// Whatever lists a coordinator sends, and however often it opens a session, one
// commitment never gives two signature shares.
func TestOneShareForOneCommitment(t *testing.T) {
	l := born(t)
	r := l.betray("beta")
	message := []byte("what beta may ask for")
	point := func(b *protocol.Binding) []byte { // a commitment of alpha's: good points
		return r.hears("a commitment", "alpha", stepOf(b.ID(), 1)).GetStep().Body
	}
	decoy := r.signing("alpha", message, "alpha", "beta")
	r.open("alpha", decoy, message)
	other := point(decoy)
	list := func(to *protocol.Binding, body ...[]byte) {
		id := to.ID()
		r.send("alpha", &peerpb.Frame{Body: &peerpb.Frame_Step{Step: &peerpb.Step{Session: id[:], Round: 2, Body: slices.Concat(body...)}}})
	}
	swapped := append(bytes.Clone(other[32:]), other[:32]...)

	var all []*protocol.Binding
	for name, attack := range map[string]struct {
		run    func(b *protocol.Binding, own []byte)
		shares int
	}{
		"control":            {func(b *protocol.Binding, own []byte) { list(b, own, other) }, 1},
		"two lists":          {func(b *protocol.Binding, own []byte) { list(b, own, other); list(b, own, swapped) }, 1},
		"one list twice":     {func(b *protocol.Binding, own []byte) { list(b, own, other); list(b, own, other) }, 1},
		"its own changed":    {func(b *protocol.Binding, own []byte) { list(b, other, own); list(b, own, other) }, 0},
		"a short list first": {func(b *protocol.Binding, own []byte) { list(b, own); list(b, own, other) }, 0},
		"a bad point first":  {func(b *protocol.Binding, own []byte) { list(b, own, make([]byte, 64)); list(b, own, other) }, 0},
		"opened while open":  {func(b *protocol.Binding, own []byte) { r.open("alpha", b, message); list(b, own, other) }, 1},
	} {
		b := r.signing("alpha", message, "alpha", "beta")
		all = append(all, b)
		r.open("alpha", b, message)
		own := point(b)
		attack.run(b, own)
		if attack.shares > 0 {
			r.hears(name+": a share", "alpha", stepOf(b.ID(), 3))
		} else {
			r.hears(name+": an end", "alpha", endOf(b.ID()))
		}
	}
	// Each id again: replayed when its session is over, with the lists of before.
	r.until("alpha has none of the sessions", func() bool {
		s := l.hosts["alpha"].agent.sessions
		s.mu.Lock()
		defer s.mu.Unlock()
		return !slices.ContainsFunc(all, func(b *protocol.Binding) bool { return s.running[b.ID()] != nil })
	})
	for _, b := range all {
		own := point(b) // of the first time
		r.open("alpha", b, message)
		list(b, own, other)
	}
	r.settled("alpha")
	for _, b := range all {
		r.until("both sessions ended", func() bool {
			return len(r.all(func(_ protocol.HostID, f *peerpb.Frame) bool { return stepOf(b.ID(), 1)(f) })) >= 2 // or 3: "opened while open" may come late
		})
		commitments := map[string]bool{}
		for _, f := range r.all(func(_ protocol.HostID, f *peerpb.Frame) bool { return stepOf(b.ID(), 1)(f) }) {
			if c := string(f.GetStep().Body); commitments[c] {
				t.Error("a commitment came twice")
			} else {
				commitments[c] = true
			}
		}
		if n := len(r.all(func(_ protocol.HostID, f *peerpb.Frame) bool { return stepOf(b.ID(), 3)(f) })); n > 1 {
			t.Errorf("%d shares for a session whose list was sent for one commitment", n)
		}
	}
	if _, err := l.sign("alpha", []byte("honest")); err != nil {
		t.Error(err)
	}
}

// A host that is no party of a session, or a party that is not its coordinator,
// cannot feed it.
func TestStepsOfStrangers(t *testing.T) {
	l := born(t)
	r := l.betray("beta")
	r.claim("alpha")
	r.react(func(from protocol.HostID, f *peerpb.Frame) {
		if open := f.GetOpen(); open != nil { // as a signer, feed the other signers too
			id := r.binding(open).ID()
			for _, h := range r.others() {
				for round := range uint32(5) {
					_ = r.net.Send(h, &peerpb.Frame{Body: &peerpb.Frame_Step{Step: &peerpb.Step{Session: id[:], Round: round, Body: make([]byte, 64*round)}}})
				}
				_ = r.net.Send(h, endFrame(id, "ABORTED", "it is over"))
			}
		}
	})
	for i := range 10 {
		signers, err := l.sign("gamma", fmt.Appendf(nil, "message %d", i))
		ok(t, err)
		if !slices.Equal(signers, []string{"alpha", "gamma"}) {
			t.Errorf("signed by %q", signers)
		}
	}
	id := protocol.SessionID{7}
	box, err := l.hosts["alpha"].agent.sessions.open(id, "alpha", []protocol.HostID{"alpha", "gamma"})
	ok(t, err)
	defer l.hosts["alpha"].agent.sessions.close(box)
	r.send("alpha", &peerpb.Frame{Body: &peerpb.Frame_Step{Step: &peerpb.Step{Session: id[:], Round: 1}}})
	r.send("alpha", endFrame(id, "ABORTED", "it is over"))
	r.settled("alpha")
	if len(box.events) != 0 {
		t.Error("a stranger's frames came to a session")
	}
}

// Floods end as BUSY. They take neither memory nor goroutines, and do not stop
// the others.
func TestFloods(t *testing.T) {
	l := born(t)
	r := l.betray("beta")
	alpha := l.hosts["alpha"].agent
	message := []byte("flood")
	binding := wireBinding(r.signing("alpha", message, "alpha", "beta"))
	flood := func(i int) *peerpb.Frame {
		switch i % 8 {
		case 0:
			return endFrame(protocol.SessionID{byte(i)}, "ABORTED", "")
		case 1:
			return &peerpb.Frame{Body: &peerpb.Frame_Want{Want: &peerpb.CertificateRequest{Key: "first", Incarnation: 1}}}
		case 2:
			return &peerpb.Frame{Body: &peerpb.Frame_Step{Step: &peerpb.Step{Session: make([]byte, i%40), Round: uint32(i) << 10}}}
		}
		o := proto.Clone(binding).(*peerpb.Binding)
		rand.Read(o.Nonce)
		return &peerpb.Frame{Body: &peerpb.Frame_Open{Open: &peerpb.Open{Binding: o, Message: message}}}
	}
	runtime.GC()
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	goroutines := runtime.NumGoroutine()
	logged := len(l.hosts["alpha"].log.String())
	most := 0
	for i := range 4000 {
		r.send("alpha", flood(i))
		most = max(most, runtime.NumGoroutine())
	}
	long := strings.Repeat("x", 1<<20) // and what would fill the log
	for _, set := range []func(*peerpb.Binding){
		func(b *peerpb.Binding) { b.Operation = long },
		func(b *peerpb.Binding) { b.Scheme = long },
		func(b *peerpb.Binding) { b.Key = long },
		func(b *peerpb.Binding) { b.Parties[0] = long },
		func(b *peerpb.Binding) { b.Parties = make([]string, 1<<20) },
	} {
		f := flood(3)
		set(f.GetOpen().Binding)
		r.send("alpha", f)
	}
	for i := range 3 {
		_, err := l.sign("alpha", fmt.Appendf(nil, "honest %d", i))
		ok(t, err)
		most = max(most, runtime.NumGoroutine())
	}
	r.hears("BUSY", "alpha", func(f *peerpb.Frame) bool { return f.GetEnd().GetReason() == reasonBusy })
	r.until("all sessions ended", func() bool {
		alpha.sessions.mu.Lock()
		defer alpha.sessions.mu.Unlock()
		return len(alpha.sessions.running) == 0 && len(alpha.sessions.opened) == 0
	})
	runtime.GC()
	runtime.ReadMemStats(&after)
	if limit := goroutines + alpha.config.Limits.SessionsPerPeer + 64; most > limit {
		t.Errorf("%d goroutines, %d before: want at most %d", most, goroutines, limit)
	}
	if grown := int64(after.HeapAlloc) - int64(before.HeapAlloc); grown > 64<<20 {
		t.Errorf("%d bytes are kept", grown)
	}
	if n := len(l.hosts["alpha"].log.String()) - logged; n > 256<<10 {
		t.Errorf("a peer made alpha log %d bytes", n)
	}
}

// A frame over the limit ends the stream, names the peer, and is all that happens.
func TestOversizedFrame(t *testing.T) {
	l := born(t)
	r := l.betray("alpha") // dials, and comes back
	downs := func() int {
		r.mu.Lock()
		defer r.mu.Unlock()
		return r.downs["beta"]
	}
	before := downs()
	r.send("beta", &peerpb.Frame{Body: &peerpb.Frame_Open{Open: &peerpb.Open{Message: make([]byte, maxFrame+1)}}})
	r.until("the stream ends", func() bool { return downs() > before })
	l.untilLogged("beta", "alpha", "over the limit")
	_, err := l.sign("beta", []byte("honest"))
	ok(t, err)
	r.connected()
}

// Certificates that do not hold are not taken up, and neither is a claim to have
// one; the log names who sent them.
func TestForgedCertificates(t *testing.T) {
	l := born(t)
	true1 := l.key("alpha").active.Load().certificate
	u := newLab(t) // another fleet of the same names, whose key is not born yet
	u.start("alpha", "gamma")
	r := u.betray("beta")

	subject := u.key("alpha").subject("lab", epoch.Staged{Number: vault.Number{Roster: 1, Attempt: 1}, Output: epoch.OutputDigest("ed25519", true1.Public)}, vault.Origin{Entry: u.key("alpha").digest()})
	forged := func(change func(*epoch.Certificate), signers ...string) *peerpb.Frame {
		c := &epoch.Certificate{Subject: subject, Public: true1.Public}
		for i, name := range []string{"alpha", "beta", "gamma"} {
			s := subject
			st, err := s.Sign(protocol.HostID(name), u.hosts[signers[i]].identity)
			ok(t, err)
			c.Statements = append(c.Statements, st)
		}
		change(c)
		encoded, err := c.Encode()
		ok(t, err)
		return &peerpb.Frame{Body: &peerpb.Frame_Certificate{Certificate: &peerpb.CertificateOffer{Certificate: encoded}}}
	}
	honest := []string{"alpha", "beta", "gamma"}
	encoded, err := true1.Encode()
	ok(t, err)
	for name, c := range map[string]struct {
		f    *peerpb.Frame
		want string
	}{
		"garbage":           {&peerpb.Frame{Body: &peerpb.Frame_Certificate{Certificate: &peerpb.CertificateOffer{Certificate: []byte("garbage")}}}, "decoding"},
		"empty":             {&peerpb.Frame{Body: &peerpb.Frame_Certificate{Certificate: &peerpb.CertificateOffer{}}}, "decoding"},
		"of other hosts":    {&peerpb.Frame{Body: &peerpb.Frame_Certificate{Certificate: &peerpb.CertificateOffer{Certificate: encoded}}}, "other hosts"},
		"another fleet":     {forged(func(c *epoch.Certificate) { c.Subject.Fleet = "elsewhere" }, honest...), "elsewhere"},
		"incarnation":       {forged(func(c *epoch.Certificate) { c.Subject.Key.Incarnation = 2 }, honest...), "incarnation 2"},
		"scheme":            {forged(func(c *epoch.Certificate) { c.Subject.Scheme = "bip340" }, honest...), "bip340"},
		"self-made":         {forged(func(*epoch.Certificate) {}, "beta", "beta", "beta"), "identity"},
		"missing statement": {forged(func(c *epoch.Certificate) { c.Statements = c.Statements[:2] }, honest...), "2 statements for 3"},
		"no statements":     {forged(func(c *epoch.Certificate) { c.Statements = nil }, honest...), "0 statements for 3"},
		"twice the same":    {forged(func(c *epoch.Certificate) { c.Statements[2] = c.Statements[1] }, honest...), "not sorted"},
		"a stranger":        {forged(func(c *epoch.Certificate) { c.Statements[2].Holder = "omega" }, honest...), "no holder"},
		"another's words":   {forged(func(c *epoch.Certificate) { c.Statements[0].Signature = c.Statements[1].Signature }, honest...), "wrong signature"},
		"another number":    {forged(func(c *epoch.Certificate) { c.Subject.Number.Attempt = 2 }, honest...), "wrong signature"},
		"a parent":          {forged(func(c *epoch.Certificate) { c.Subject.Parent[0] = 1 }, honest...), "wrong signature"},
		"other output":      {forged(func(c *epoch.Certificate) { c.Public = append(bytes.Clone(c.Public), 0) }, honest...), "another public output"},
		// All statements are good, which no honest host would have signed: there is no share to go with it.
		"no share": {forged(func(*epoch.Certificate) {}, honest...), "no such share"},
	} {
		before := len(u.hosts["alpha"].log.String())
		r.send("alpha", c.f)
		u.until(fmt.Sprintf("%s: alpha logs %q", name, c.want), func() bool {
			said := u.hosts["alpha"].log.String()[before:]
			return strings.Contains(said, "peer=beta") && strings.Contains(said, c.want)
		})
		if u.key("alpha").active.Load() != nil {
			t.Fatalf("%s: it was taken up", name)
		}
	}
	goroutines, most := runtime.NumGoroutine(), 0
	f := forged(func(*epoch.Certificate) {}, "beta", "beta", "beta")
	for range 2000 {
		r.send("alpha", f)
		most = max(most, runtime.NumGoroutine())
	}
	r.settled("alpha")
	if limit := goroutines + u.hosts["alpha"].config.Limits.SessionsPerPeer + 64; most > limit {
		t.Errorf("2000 certificates took %d goroutines, %d before", most, goroutines)
	}
}

// TestLostStatuses loses what a host said when it voted and when it took up the epoch. Who
// waits for it asks, and it says so again, also when it has nothing left to do itself.
func TestLostStatuses(t *testing.T) {
	l := newLab(t)
	l.start("alpha", "gamma")
	r := l.betray("beta")
	asks := func(f *peerpb.Frame) bool { return f.GetWant() != nil }
	m := r.keygen()
	r.says(has(m), "alpha", "gamma") // but not that it votes
	r.statement("alpha")
	r.statement("gamma")
	r.hears("the question for beta's vote", "gamma", asks)
	r.says(both(has(m), r.vote(m.choice())), "alpha")
	l.untilActive("alpha", "gamma")
	act := l.key("alpha").active.Load()
	r.forget()
	r.hears("the question for beta's epoch", "alpha", asks)
	r.forget()
	r.send("alpha", &peerpb.Frame{Body: &peerpb.Frame_Want{Want: &peerpb.CertificateRequest{Key: "first", Incarnation: 1}}})
	r.hears("what alpha has", "alpha", func(f *peerpb.Frame) bool { return bytes.Equal(f.GetKey().GetCertificate(), act.id[:]) })
}

// What a host says of a key is believed only as far as it is signed or of the
// right form.
func TestLiesAboutAKey(t *testing.T) {
	l := newLab(t)
	l.start("alpha", "gamma")
	r := l.betray("beta")
	st := func(n vault.Number) *peerpb.Staged { return staged(epoch.Staged{Number: n, Output: vault.Output{1}}) }
	subject := r.key.subject("lab", epoch.Staged{Number: vault.Number{Roster: 1, Attempt: 1}, Output: vault.Output{1}}, vault.Origin{Entry: r.key.digest()})
	statement := func(as protocol.HostID, by string) []byte {
		s, err := subject.Sign(as, l.hosts[by].identity)
		ok(t, err)
		b, err := s.Encode()
		ok(t, err)
		return b
	}
	one := vault.Number{Roster: 1, Attempt: 1}
	for name, c := range map[string]struct {
		lie  func(*peerpb.KeyStatus)
		want string
	}{
		"65 staged":            {func(s *peerpb.KeyStatus) { s.Staged = slices.Repeat([]*peerpb.Staged{st(one)}, 65) }, "65 staged"},
		"a short digest":       {func(s *peerpb.KeyStatus) { s.Staged = []*peerpb.Staged{{Number: number(one), Output: []byte{1}}} }, "digest of 1"},
		"no digest":            {func(s *peerpb.KeyStatus) { s.Staged = []*peerpb.Staged{{}} }, "digest of 0"},
		"a short entry":        {func(s *peerpb.KeyStatus) { s.Entry = s.Entry[:31] }, "digest of 31"},
		"a short certificate":  {func(s *peerpb.KeyStatus) { s.Active, s.Certificate = number(one), []byte{1} }, "digest of 1"},
		"a vote, no statement": {func(s *peerpb.KeyStatus) { s.Voted = st(one) }, "decoding a statement"},
		"a vote, garbage":      {func(s *peerpb.KeyStatus) { s.Voted, s.Statement = st(one), []byte("garbage") }, "decoding a statement"},
		"a vote, by another":   {func(s *peerpb.KeyStatus) { s.Voted, s.Statement = st(one), statement("gamma", "gamma") }, "gamma"},
		"a vote, stolen name":  {func(s *peerpb.KeyStatus) { s.Voted, s.Statement = st(one), statement("beta", "gamma") }, "identity"},
		"a vote, of another": {func(s *peerpb.KeyStatus) {
			s.Voted, s.Statement = st(vault.Number{Roster: 1, Attempt: 2}), statement("beta", "beta")
		}, "wrong signature"},
		"a far attempt": {func(s *peerpb.KeyStatus) { s.Staged = []*peerpb.Staged{st(vault.Number{Roster: 1, Attempt: 1 << 63})} }, "too far"},
		"the last attempt": {func(s *peerpb.KeyStatus) {
			s.Staged = []*peerpb.Staged{st(vault.Number{Roster: 1, Attempt: 1<<64 - 1})}
		}, "too far"},
		"a far roster": {func(s *peerpb.KeyStatus) { s.Staged = []*peerpb.Staged{st(vault.Number{Roster: 1 << 62, Attempt: 1})} }, "too far"},
		"a long name of holder": {func(s *peerpb.KeyStatus) {
			s.Voted, s.Statement = st(one), statement(protocol.HostID(strings.Repeat("x", 1<<16)), "beta")
		}, "xxxx"},
	} {
		before := len(l.hosts["alpha"].log.String())
		r.says(c.lie, "alpha")
		said := ""
		l.until(fmt.Sprintf("%s: alpha logs %q", name, c.want), func() bool {
			said = l.hosts["alpha"].log.String()[before:]
			return strings.Contains(said, "peer=beta") && strings.Contains(said, c.want)
		})
		if len(said) > 4096 {
			t.Errorf("%s: alpha logged %d bytes", name, len(said))
		}
		k := l.key("alpha")
		k.mu.Lock()
		if view := k.views["beta"]; view.Heard || len(k.statements) != 0 {
			t.Errorf("%s: alpha believes %+v", name, view)
		}
		k.mu.Unlock()
	}
	l.untilSays("alpha", "waiting", "beta")
}

// made is a share that a rogue made with the others.
type made struct {
	number vault.Number
	public []byte
}

func (m *made) staged() *peerpb.Staged { return staged(m.choice()) }

func (m *made) choice() epoch.Staged {
	return epoch.Staged{Number: m.number, Output: epoch.OutputDigest("ed25519", m.public)}
}

// vote is the rogue's word about a share.
func (r *rogue) vote(choice epoch.Staged) func(*peerpb.KeyStatus) {
	r.t.Helper()
	subject := r.key.subject("lab", choice, vault.Origin{Entry: r.key.digest()})
	st, err := subject.Sign(r.self, r.hosts[string(r.self)].identity)
	ok(r.t, err)
	b, err := st.Encode()
	ok(r.t, err)
	return func(s *peerpb.KeyStatus) { s.Voted, s.Statement = staged(choice), b }
}

// has says that the rogue has staged shares.
func has(shares ...*made) func(*peerpb.KeyStatus) {
	return func(s *peerpb.KeyStatus) {
		for _, m := range shares {
			s.Staged = append(s.Staged, m.staged())
		}
	}
}

func both(one, other func(*peerpb.KeyStatus)) func(*peerpb.KeyStatus) {
	return func(s *peerpb.KeyStatus) { one(s); other(s) }
}

// keygen takes part in the first key generation that alpha starts.
func (r *rogue) keygen() *made {
	r.t.Helper()
	for _, h := range r.others() {
		r.says(has(), h)
	}
	open := r.hears("a key generation", "alpha", func(f *peerpb.Frame) bool { return f.GetOpen() != nil }).GetOpen()
	b := r.binding(open)
	box, err := r.sessions.open(b.ID(), r.self, r.key.holders())
	ok(r.t, err)
	defer r.sessions.close(box)
	r.send("alpha", readyFrame(box.id))
	early, err := gather(r.ctx, box, []protocol.HostID{"alpha"})
	ok(r.t, err)
	return r.make(b, box, early)
}

// lead starts a key generation as the first holder.
func (r *rogue) lead(n vault.Number, counted ...*made) (*made, error) {
	r.t.Helper()
	b := r.key.binding("keygen", n, r.key.holders(), [32]byte{})
	rand.Read(b.Nonce[:])
	box, err := r.sessions.open(b.ID(), r.self, r.key.holders())
	ok(r.t, err)
	defer r.sessions.close(box)
	open := &peerpb.Open{Binding: wireBinding(&b)}
	for _, m := range counted {
		open.Staged = append(open.Staged, m.staged())
	}
	for _, h := range box.parties {
		r.send(h, &peerpb.Frame{Body: &peerpb.Frame_Open{Open: open}})
	}
	early, err := gather(r.ctx, box, box.parties)
	if err != nil {
		hangUp(box, r.net.Send, err)
		for _, h := range box.parties { // what is over cannot take the place of what follows
			r.hears("an end", h, endOf(box.id))
		}
		return nil, err
	}
	for _, h := range box.parties {
		r.send(h, readyFrame(box.id))
	}
	return r.make(&b, box, early), nil
}

func (r *rogue) make(b *protocol.Binding, box *inbox, early []event) *made {
	r.t.Helper()
	g, err := r.key.scheme.keygen(dealing.KeygenConfig{Session: box.id, Self: r.self, Holders: r.key.holders(), Quorum: 2})
	ok(r.t, err)
	defer g.session.Close()
	ok(r.t, drive(r.ctx, r.self, g.session, box, r.net.Send, early))
	public, share, err := g.result()
	ok(r.t, err)
	share.Wipe()
	m := &made{vault.Number{Roster: b.Epoch[0], Attempt: b.Epoch[1]}, public}
	for _, h := range r.others() {
		r.hears("the share is staged", h, func(f *peerpb.Frame) bool {
			return slices.ContainsFunc(f.GetKey().GetStaged(), func(s *peerpb.Staged) bool { return proto.Equal(s, m.staged()) })
		})
	}
	return m
}

// statement waits for the vote of an honest host and returns it.
func (r *rogue) statement(of protocol.HostID) epoch.Statement {
	r.t.Helper()
	f := r.hears(string(of)+" votes", of, func(f *peerpb.Frame) bool { return f.GetKey().GetVoted() != nil })
	st, err := epoch.DecodeStatement(f.GetKey().Statement)
	ok(r.t, err)
	return st
}

// wantUnborn wants that no honest host shows a public key.
func (l *lab) wantUnborn(hosts ...string) {
	l.t.Helper()
	for _, h := range hosts {
		if len(l.key(h).describe(protocol.HostID(h)).PublicKey) != 0 {
			l.t.Fatalf("%s shows a public key", h)
		}
	}
}

// wantOneKey wants the same key and certificate on honest hosts, with a signature.
func (l *lab) wantOneKey(m *made, hosts ...string) {
	l.t.Helper()
	l.untilActive(hosts...)
	for _, h := range hosts {
		if c := l.key(h).active.Load().certificate; !bytes.Equal(c.Public, m.public) {
			l.t.Errorf("%s has another key", h)
		}
	}
	l.untilSays(hosts[0], "ready")
	signers, err := l.sign(hosts[0], []byte("born"))
	ok(l.t, err)
	if !slices.Equal(signers, hosts) {
		l.t.Errorf("signed by %q", signers)
	}
}

// A host that says it has its share to one and not to the other, and that keeps
// its statement back, delays a birth. Both are told, and there is one key.
func TestBirthWithTwoFacedHost(t *testing.T) {
	l := newLab(t)
	l.start("alpha", "gamma")
	r := l.betray("beta")
	m := r.keygen()
	r.says(has(m), "alpha")
	r.says(has(), "gamma")
	r.statement("alpha")
	l.untilSays("gamma", "refused", "was voted for", `host "beta" does not have its share`, "incarnation")
	l.untilSays("alpha", "waiting", "the statements of", `"beta"`)
	l.wantUnborn("alpha", "gamma")
	r.says(has(m), "gamma")
	r.statement("gamma")
	l.untilSays("alpha", "waiting", `waiting for the statements of "beta"`)
	l.untilSays("gamma", "waiting", `waiting for the statements of "beta"`)
	l.wantUnborn("alpha", "gamma")
	// It can make the certificate now, and nobody else can. It shows it to one.
	c := epoch.NewCertificate(r.key.subject("lab", m.choice(), vault.Origin{Entry: r.key.digest()}), m.public, []epoch.Statement{r.statement("alpha"), r.statement("gamma"), func() epoch.Statement {
		s := r.key.subject("lab", m.choice(), vault.Origin{Entry: r.key.digest()})
		st, err := s.Sign("beta", l.hosts["beta"].identity)
		ok(t, err)
		return st
	}()})
	encoded, err := c.Encode()
	ok(t, err)
	r.send("gamma", &peerpb.Frame{Body: &peerpb.Frame_Certificate{Certificate: &peerpb.CertificateOffer{Certificate: encoded}}})
	l.wantOneKey(m, "alpha", "gamma") // gamma gives it to alpha
}

// Votes for what nobody has, and two votes, are refused with words that say what to do.
func TestBirthWithHostThatVotesTwice(t *testing.T) {
	l := newLab(t)
	l.start("alpha", "gamma")
	r := l.betray("beta")
	m := r.keygen()
	bogus := m.choice()
	bogus.Output[0] ^= 1
	r.says(both(has(m), r.vote(bogus)), r.others()...)
	l.untilSays("alpha", "refused", "was voted for", "raise its `incarnation`")
	l.untilSays("gamma", "refused", "was voted for", "raise its `incarnation`")
	r.says(has(m), "alpha")
	r.statement("alpha")
	l.untilSays("gamma", "refused", "hosts have voted for different")
	l.wantUnborn("alpha", "gamma")
	r.says(both(has(m), r.vote(m.choice())), r.others()...)
	l.wantOneKey(m, "alpha", "gamma")
}

// The host that starts generations cannot have two of them certified: who voted
// for one joins no other, and a wrong count of what is staged is refused.
func TestBirthWithLyingLeader(t *testing.T) {
	l := newLab(t)
	l.start("beta", "gamma")
	r := l.betray("alpha")
	first := vault.Number{Roster: 1, Attempt: 1}
	next := vault.Number{Roster: 1, Attempt: 2}
	one, err := r.lead(first)
	ok(t, err)
	refused := func(what, want string, n vault.Number, counted ...*made) {
		t.Helper()
		if m, err := r.lead(n, counted...); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: made %v, error %v, want %q", what, m, err, want)
		}
	}
	refused("as if nothing were staged", "staged other shares", next)
	refused("another output", "staged other shares", next, &made{first, []byte("other")})
	refused("the same number again", "has staged epoch 1.1 already", first, one)
	refused("a far number", "too far ahead", vault.Number{Roster: 1, Attempt: 1 << 40}, one)
	refused("a far roster", "too far ahead", vault.Number{Roster: 1 << 40, Attempt: 2}, one)
	two, err := r.lead(next, one)
	ok(t, err)

	// Each host is told of another generation as the one that all have.
	r.says(has(one), "beta")
	r.statement("beta")
	l.until("gamma has heard how beta votes", func() bool { // before it may vote for the other itself
		k := l.key("gamma")
		k.mu.Lock()
		defer k.mu.Unlock()
		return k.views["beta"].Voted != nil
	})
	r.says(both(has(two), r.vote(two.choice())), "gamma")
	l.untilSays("gamma", "refused", "hosts have voted for different", "incarnation")
	refused("after a vote", "voted for an earlier generation", vault.Number{Roster: 1, Attempt: 3}, one, two)
	l.wantUnborn("beta", "gamma")
	r.says(both(has(one, two), r.vote(one.choice())), r.others()...)
	l.wantOneKey(one, "beta", "gamma")
	for _, h := range []string{"beta", "gamma"} {
		l.until("the shares of the other generation are erased on "+h, func() bool {
			record, _ := l.hosts[h].agent.vault.Load().Record(r.key.id)
			return len(record.Staged) == 1
		})
	}
	refused("once it is born", "holds a share of this key already", vault.Number{Roster: 1, Attempt: 3}, one)
}

// Only the first host starts a generation.
func TestBirthIsStartedByTheFirstHost(t *testing.T) {
	l := newLab(t)
	l.start("alpha", "gamma")
	r := l.betray("beta")
	if _, err := r.lead(vault.Number{Roster: 1, Attempt: 1}); err == nil || !strings.Contains(err.Error(), `host "alpha" starts`) {
		t.Error(err)
	}
}

// A host that says it has a certificate and never shows it does not keep another
// from one that has it.
func TestBirthWithMadeUpCertificate(t *testing.T) {
	l := newLab(t)
	l.start("beta", "gamma")
	r := l.betray("alpha")
	m, err := r.lead(vault.Number{Roster: 1, Attempt: 1})
	ok(t, err)
	r.says(has(m), r.others()...)
	r.statement("beta")
	r.statement("gamma")
	r.says(func(s *peerpb.KeyStatus) { s.Active, s.Certificate = number(m.number), make([]byte, 32) }, "gamma")
	l.untilSays("gamma", "waiting", "fetching the key's certificate", `"alpha"`)
	r.hears("gamma asks for the certificate", "gamma", func(f *peerpb.Frame) bool { return f.GetWant() != nil })
	l.wantUnborn("beta", "gamma")
	r.says(both(has(m), r.vote(m.choice())), "beta") // who now has all statements
	l.untilActive("beta")
	l.wantOneKey(m, "beta", "gamma")
	r.says(func(s *peerpb.KeyStatus) { s.Active, s.Certificate = number(m.number), make([]byte, 32) }, r.others()...)
	r.settled("beta")
	if live := l.key("beta").live("beta"); slices.Contains(live, "alpha") {
		t.Errorf("live are %q: alpha's certificate is made up", live)
	}
}

func digestOf(k *key) []byte {
	d := k.digest()
	return d[:]
}
