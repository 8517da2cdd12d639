package agent

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"errors"
	"flag"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/time/rate"

	"conseal/agent/api/apipb"
	"conseal/agent/epoch"
	"conseal/agent/peer/peerpb"
	"conseal/agent/vault"
	"conseal/config"
	"conseal/internal/secret"
	"conseal/protocol"
)

// epochOf is the epoch that a host signs with; zero if none.
func (l *lab) epochOf(name string) vault.Number {
	act := l.key(name).active.Load()
	if act == nil {
		return vault.Number{}
	}
	return act.number()
}

// untilEpoch waits until hosts sign with an epoch above n, the same at all, and have
// erased what was below. It returns it.
func (l *lab) untilEpoch(n vault.Number, names ...string) vault.Number {
	l.t.Helper()
	for _, name := range names {
		l.until(fmt.Sprintf("%s has an epoch above %s, and only that", name, n), func() bool {
			now := l.epochOf(name)
			if now.Compare(n) <= 0 || now != l.epochOf(names[0]) {
				return false
			}
			record, _ := l.hosts[name].agent.vault.Load().Record(l.key(name).id)
			return len(record.Staged) == 1
		})
	}
	return l.epochOf(names[0])
}

// refresh asks a host for new shares and waits until it has them.
func (l *lab) refresh(name string) {
	l.t.Helper()
	_, err := adminAPI{l.hosts[name].agent}.Refresh(l.ctx, &apipb.RefreshRequest{Key: "first"})
	ok(l.t, err)
}

// signThrough asks hosts for signatures without pause, until it is stopped; none may
// fail. stop returns how many there were.
func (l *lab) signThrough(names ...string) (stop func() int) {
	ctx, cancel := context.WithCancel(l.ctx)
	var callers sync.WaitGroup
	var signed atomic.Int64
	for _, name := range names {
		k := l.key(name)
		l.until(name+" has heard of all", func() bool { return len(k.live(protocol.HostID(name))) == len(k.holders()) })
		callers.Go(func() {
			for ctx.Err() == nil {
				if _, err := l.sign(name, fmt.Appendf(nil, "message %d", signed.Add(1))); err != nil {
					l.t.Errorf("on %s: %v", name, err)
					return
				}
			}
		})
	}
	return func() int {
		cancel()
		callers.Wait()
		return int(signed.Load())
	}
}

// TestRefresh refreshes keys of all kinds, while hosts are asked for signatures without
// pause: ECDSA with presignatures of the old epoch and the new.
func TestRefresh(t *testing.T) {
	for _, scheme := range []string{"ed25519", "bip340", "ecdsa-p256"} {
		t.Run(scheme, func(t *testing.T) {
			l := newLabOf(t, scheme)
			l.patient()
			l.start("gamma", "beta", "alpha")
			l.untilBorn()
			public := l.key("alpha").active.Load().output.spki
			n := l.epochOf("alpha")
			askers := []string{"alpha", "gamma"}
			if scheme == "ecdsa-p256" { // each costs new Paillier keys
				askers = askers[:1]
			}
			for _, by := range askers {
				if scheme == "ecdsa-p256" {
					stock := l.key("alpha").active.Load().stock
					l.until("alpha has presignatures", func() bool { return stock.ready("alpha", []protocol.HostID{"alpha", "beta"}) > 0 })
				}
				stop := func() int { return 1 }
				if scheme != "bip340" {
					stop = l.signThrough("alpha", "beta")
				}
				l.refresh(by)
				n = l.untilEpoch(n, "alpha", "beta", "gamma")
				if stop() == 0 {
					t.Error("nothing was signed meanwhile")
				}
				for name := range l.hosts {
					if string(l.key(name).active.Load().output.spki) != string(public) {
						t.Fatalf("%s has another public key", name)
					}
					if scheme != "bip340" {
						_, err := l.sign(name, []byte("after "+n.String()))
						ok(t, err)
					}
				}
			}
		})
	}
}

// addHost makes a host with hardware and a vault of its own.
func (l *lab) addHost(name string) {
	l.t.Helper()
	first := l.hosts["alpha"].config
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	ok(l.t, err)
	c := config.Default()
	dir := filepath.Join(filepath.Dir(first.State), name)
	c.Name, c.State, c.InsecureLab, c.Limits = name, dir, true, first.Limits
	network, _, _ := strings.Cut(first.Listen.Address, ":")
	c.Listen.Address = fmt.Sprintf("%s.%d:7443", network[:strings.LastIndex(network, ".")], 10+len(l.hosts)+20*int(l.roster.Version))
	c.Listen.SignSocket, c.Listen.AdminSocket = filepath.Join(dir, "s"), filepath.Join(dir, "a")
	h := &labHost{name: name, identity: key, config: c, log: &logText{}, protector: &hardware{keys: map[string][]byte{}}}
	l.hosts[name] = h
	ok(l.t, os.RemoveAll(c.State))
	ok(l.t, os.MkdirAll(c.State, 0o700))
	ok(l.t, vault.Create(l.ctx, VaultFolder(c), name, h.protector))
}

// write makes the next roster: key "first" has those hosts and that quorum.
func (l *lab) write(quorum int, holders ...string) {
	l.t.Helper()
	var text strings.Builder
	fmt.Fprintf(&text, "fleet = \"lab\"\nversion = %d\n", l.roster.Version+1)
	for name, h := range l.hosts {
		pin, err := config.PinOf(h.identity.Public())
		ok(l.t, err)
		fmt.Fprintf(&text, "[[host]]\nname = %q\naddress = %q\nidentity = %q\nprotector = \"tpm\"\n", name, h.config.Listen.Address, pin)
	}
	old := l.roster.Keys[0]
	var pinned config.PublicKey
	for name := range l.hosts {
		if h := l.hosts[name]; h.agent != nil && l.key(name) != nil && l.key(name).active.Load() != nil {
			pinned = l.key(name).active.Load().output.pin
		}
	}
	fmt.Fprintf(&text, "[[key]]\nname = \"first\"\nscheme = %q\nquorum = %d\nhosts = [\"%s\"]\nstate = \"active\"\npurpose = \"a test\"\npublic_key = %q\n",
		old.Scheme, quorum, strings.Join(holders, `", "`), pinned)
	roster, err := config.ParseRoster([]byte(text.String()))
	ok(l.t, err)
	l.roster = roster
}

// deliver has the agents take up the roster that was written.
func (l *lab) deliver(names ...string) {
	l.t.Helper()
	for _, name := range names {
		_, err := l.hosts[name].agent.TakeRoster(l.roster)
		ok(l.t, err)
	}
}

// patient gives sessions of many computations time on a slow machine.
func (l *lab) patient() {
	for _, h := range l.hosts {
		h.config.Limits.SignDeadline, h.config.Limits.KeygenDeadline = 5*time.Minute, 10*time.Minute
	}
}

// soaking tells whether -soak is on.
func soaking() bool { return flag.Lookup("soak").Value.String() == "true" }

// TestReshare takes a key through all changes of its hosts and quorum. ECDSA, which makes
// new Paillier keys each time, is left to -soak; TestRefresh has it too.
func TestReshare(t *testing.T) {
	schemes := []string{"ed25519"}
	if soaking() {
		schemes = append(schemes, "bip340", "ecdsa-p256")
	}
	for _, scheme := range schemes {
		t.Run(scheme, func(t *testing.T) {
			l := newLabOf(t, scheme)
			l.patient()
			l.start("gamma", "beta", "alpha")
			l.untilBorn()
			public := string(l.key("alpha").active.Load().output.spki)
			n := l.epochOf("alpha")
			check := func(holders ...string) {
				t.Helper()
				n = l.untilEpoch(n, holders...)
				for _, name := range holders {
					if string(l.key(name).active.Load().output.spki) != public {
						t.Fatalf("%s has another public key", name)
					}
					if scheme == "bip340" {
						continue
					}
					signers, err := l.sign(name, []byte("after "+n.String()))
					ok(t, err)
					if len(signers) != l.roster.Keys[0].Quorum {
						t.Errorf("%d signers", len(signers))
					}
				}
			}
			l.addHost("delta")
			l.write(3, "alpha", "beta", "delta", "gamma")
			l.deliver("alpha", "beta", "gamma")
			l.start("delta")
			check("alpha", "beta", "delta", "gamma")

			l.write(2, "beta", "delta", "gamma") // one leaves, and the quorum is lowered
			l.deliver("alpha", "beta", "delta", "gamma")
			check("beta", "delta", "gamma")
			l.until("alpha has erased its share", func() bool {
				record, _ := l.hosts["alpha"].agent.vault.Load().Record(l.key("alpha").id)
				return len(record.Staged) == 0
			})
			l.until("alpha has nothing to do with the key", func() bool { return l.hosts["alpha"].agent.key("first") == nil })

			// Gamma's hardware and disk are lost: it comes back as another.
			ok(t, l.hosts["gamma"].stop())
			delete(l.hosts, "gamma")
			l.addHost("gamma")
			l.write(2, "beta", "delta", "gamma")
			l.deliver("alpha", "beta", "delta")
			l.start("gamma")
			check("beta", "delta", "gamma")

			l.write(2, "alpha", "delta") // all but one are new or were here once
			l.deliver("alpha", "beta", "delta", "gamma")
			check("alpha", "delta")
			if live := l.key("alpha").live("alpha"); !slices.Contains(live, "delta") {
				t.Errorf("live: %q", live)
			}
		})
	}
}

// TestSignThroughRenewal asks for signatures without pause, on every host, while the key
// gets new shares again and again and its hosts change. No request fails.
func TestSignThroughRenewal(t *testing.T) {
	l := newLab(t)
	l.patient()
	l.start("gamma", "beta", "alpha")
	l.untilBorn()
	l.addHost("delta")
	stop := l.signThrough("alpha", "beta") // which hold the key all the while
	n := l.epochOf("alpha")
	refreshes, reshares := 20, 5
	for i := range refreshes {
		l.refresh([]string{"alpha", "beta", "gamma"}[i%3])
		n = l.untilEpoch(n, "alpha", "beta", "gamma")
	}
	for range reshares { // delta comes, and gamma goes; then the other way round
		l.write(2, "alpha", "beta", "delta")
		if l.hosts["delta"].agent == nil {
			l.start("delta")
		}
		l.deliver("alpha", "beta", "gamma", "delta")
		n = l.untilEpoch(n, "alpha", "beta", "delta")
		l.write(2, "alpha", "beta", "gamma")
		l.deliver("alpha", "beta", "gamma", "delta")
		n = l.untilEpoch(n, "alpha", "beta", "gamma")
	}
	signed := stop()
	if signed < 100 {
		t.Errorf("%d signatures in all: the test shows little", signed)
	}
	t.Logf("%d signatures through %d refreshes and %d reshares", signed, refreshes, 2*reshares)
}

// share opens a stopped host's share of its active epoch.
func (l *lab) share(name string) (*known, shareholder) {
	l.t.Helper()
	h, k := l.hosts[name], l.key(name)
	v, err := vault.Open(l.ctx, VaultFolder(h.config), name, h.protector)
	ok(l.t, err)
	defer v.Close()
	k.mu.Lock()
	n := k.known
	k.mu.Unlock()
	var s shareholder
	ok(l.t, v.Lend(l.ctx, k.id, n.number(), func(b []byte) error {
		s, err = k.scheme.load(k.holders()[slices.Index(names(k.holders()), name)], n.certificate.Public, b)
		return err
	}))
	return n, s
}

// leads has a rogue open a resharing at the others, as its leader, and wait until they
// are ready for round 1.
func (r *rogue) leads(res *resharing, change func(*peerpb.Open)) (*inbox, error) {
	r.t.Helper()
	var nonce [32]byte
	rand.Read(nonce[:])
	return r.leadsAs(res, nonce, change)
}

func (r *rogue) leadsAs(res *resharing, nonce [32]byte, change func(*peerpb.Open)) (*inbox, error) {
	r.t.Helper()
	b := res.binding(r.key, nonce)
	encoded, err := res.base.certificate.Encode()
	ok(r.t, err)
	open := &peerpb.Open{Binding: wireBinding(&b), Dealers: names(res.dealers), Certificate: encoded}
	if change != nil {
		change(open)
	}
	box, err := r.sessions.open(b.ID(), r.self, res.all)
	ok(r.t, err)
	for _, h := range box.parties {
		r.send(h, &peerpb.Frame{Body: &peerpb.Frame_Open{Open: open}})
	}
	if _, err := gather(r.ctx, box, box.parties); err != nil {
		return box, err
	}
	for _, h := range box.parties {
		r.send(h, readyFrame(box.id))
	}
	return box, nil
}

// TestDealerWithTwoFaces deals one thing to one host and another to the other. Both can
// prove it, to each other too; it deals no more, and when the roster drops it the rest
// goes on without it.
func TestDealerWithTwoFaces(t *testing.T) {
	l := born(t)
	n := l.epochOf("beta")
	ok(t, l.hosts["alpha"].stop())
	base, share := l.share("alpha")
	r := l.betray("alpha")
	r.connected()
	res := newResharing(r.key, base, []protocol.HostID{"alpha", "beta"}, vault.Number{Roster: 1, Attempt: n.Attempt + 1})
	box, err := r.leads(res, nil)
	ok(t, err)
	cfg := l.hosts["beta"].agent.reshareConfig(l.key("beta"), res, box.id)
	cfg.Self = "alpha"
	cfg.Sign = func(digest [32]byte) ([]byte, error) {
		return l.hosts["alpha"].identity.Sign(rand.Reader, digest[:], crypto.SHA256)
	}
	step := func(victim string, ready protocol.Ready, err error) {
		t.Helper()
		ok(t, err)
		for _, m := range ready.Send {
			if m.To == protocol.HostID(victim) {
				r.send(m.To, &peerpb.Frame{Body: &peerpb.Frame_Step{Step: &peerpb.Step{Session: m.Session[:], Round: uint32(m.Round), Body: m.Body}}})
			}
		}
	}
	faces := map[string]protocol.Session{}
	for _, victim := range []string{"beta", "gamma"} {
		face, err := r.key.scheme.reshare(cfg, share)
		ok(t, err)
		faces[victim] = face.session
		ready, err := faces[victim].Start()
		step(victim, ready, err)
	}
	ev := <-box.events
	for ev.from != "beta" || ev.step == nil || ev.step.Round != 1 { // gamma's echo may come before what beta deals
		if ev.err != nil {
			t.Fatal(ev.err)
		}
		ev = <-box.events
	}
	for victim, face := range faces {
		ready, err := face.Step(protocol.Message{Session: box.id, From: ev.from, To: "alpha", Round: 1, Body: ev.step.Body})
		step(victim, ready, err) // the echo
	}
	for _, victim := range []string{"beta", "gamma"} {
		k := l.key(victim)
		l.until(victim+" has a proof", func() bool { k.mu.Lock(); defer k.mu.Unlock(); return k.cheats["alpha"] })
		l.untilLogged(victim, "this is proven", "dealer=alpha", "proof=")
	}
	l.write(2, "beta", "gamma")
	l.deliver("beta", "gamma")
	l.untilEpoch(n, "beta", "gamma")
	_, err = l.sign("gamma", []byte("without alpha"))
	ok(t, err)
}

// TestSilentHolder has a host say that all is well and take part in nothing: the others
// sign on, and say who is missing.
func TestSilentHolder(t *testing.T) {
	l := born(t)
	base := l.key("alpha").active.Load()
	r := l.betray("gamma")
	r.connected()
	r.says(func(s *peerpb.KeyStatus) { s.Active, s.Certificate = number(base.number()), base.id[:] }, "alpha", "beta")
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
	defer cancel()
	_, err := adminAPI{l.hosts["alpha"].agent}.Refresh(ctx, &apipb.RefreshRequest{Key: "first"})
	var refused *apiError
	if !errors.As(err, &refused) || refused.reason != "DEADLINE" {
		t.Fatalf("the refresh: %v", err)
	}
	for range 20 {
		if _, err := l.sign("alpha", []byte("meanwhile")); err != nil {
			t.Fatal(err)
		}
	}
	if act := l.key("alpha").active.Load(); act.id != base.id {
		t.Errorf("alpha is at epoch %s", act.number())
	}
}

// TestForgedResharing has a host that holds no share try to have the holders reshare, in
// every way that it could.
func TestForgedResharing(t *testing.T) {
	l := born(t)
	n := l.epochOf("alpha")
	l.addHost("delta")
	l.write(2, "alpha", "beta", "gamma")
	l.deliver("alpha", "beta", "gamma")
	base := &known{l.key("alpha").active.Load().certificate, l.key("alpha").active.Load().id, l.key("alpha").active.Load().output}
	r := l.betray("delta")
	r.connected()
	at := func(attempt uint64) vault.Number { return vault.Number{Roster: 2, Attempt: attempt} }
	forged := *base.certificate
	forged.Subject.Number.Attempt++
	forgedBase := &known{&forged, forged.Subject.ID(), base.output}
	for name, c := range map[string]struct {
		base    *known
		dealers []protocol.HostID
		n       vault.Number
		change  func(*peerpb.Open)
		want    string
	}{
		"it deals nothing":     {base, []protocol.HostID{"alpha", "beta"}, at(1), nil, "differ on parties"},
		"it deals":             {base, []protocol.HostID{"alpha", "delta"}, at(1), nil, "delta"},
		"a forged base":        {forgedBase, []protocol.HostID{"alpha", "beta"}, at(1), nil, ""},
		"no certificate":       {base, []protocol.HostID{"alpha", "beta"}, at(1), func(o *peerpb.Open) { o.Certificate = nil }, "decoding"},
		"no dealers":           {base, nil, at(1), nil, ""},
		"others than the id's": {base, []protocol.HostID{"alpha", "beta"}, at(1), func(o *peerpb.Open) { o.Dealers = []string{"alpha"} }, "differ"},
	} {
		res := newResharing(r.key, c.base, c.dealers, c.n)
		if len(c.dealers) == 0 {
			res.all = res.holders
		}
		if !slices.Contains(res.all, "delta") {
			res.all = append(slices.Clone(res.all), "delta")
			slices.Sort(res.all)
		}
		_, err := r.leads(res, c.change)
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
	for _, name := range []string{"alpha", "beta", "gamma"} {
		if record, _ := l.hosts[name].agent.vault.Load().Record(l.key(name).id); l.epochOf(name) != n || len(record.Staged) != 1 {
			t.Errorf("%s is at epoch %s and holds %v", name, l.epochOf(name), record.Staged)
		}
	}
}

// TestManyHosts takes a key from 3 hosts to 7, of which 4 sign, and to 15, of which 8 sign.
func TestManyHosts(t *testing.T) {
	l := born(t)
	n := l.epochOf("alpha")
	holders := []string{"alpha", "beta", "gamma"}
	for _, of := range []struct{ hosts, quorum int }{{7, 4}, {15, 8}} {
		before := slices.Clone(holders)
		var added []string
		for len(holders) < of.hosts {
			name := fmt.Sprintf("host%02d", len(holders))
			l.addHost(name)
			holders, added = append(holders, name), append(added, name)
		}
		l.write(of.quorum, holders...)
		l.deliver(before...)
		l.start(added...)
		n = l.untilEpoch(n, holders...)
		l.refresh(holders[len(holders)-1])
		n = l.untilEpoch(n, holders...)
		signers, err := l.sign(holders[len(holders)-1], []byte("by many"))
		if ok(t, err); len(signers) != of.quorum {
			t.Errorf("%d signers, want %d", len(signers), of.quorum)
		}
	}
}

// TestLeftoversMakeRoom fills a vault with shares of resharings that came to nothing: the
// next one goes through.
func TestLeftoversMakeRoom(t *testing.T) {
	l := born(t)
	n := l.epochOf("alpha")
	v, k := l.hosts["alpha"].agent.vault.Load(), l.key("alpha")
	for i := range vault.MaxStaged - 1 {
		at := vault.Number{Roster: n.Roster, Attempt: n.Attempt + 1 + uint64(i)}
		ok(t, v.Stage(t.Context(), vault.Held, k.id, at, vault.Output{byte(i)}, vault.Origin{Parent: [32]byte{1}}, nil, secret.Random(32)))
	}
	l.refresh("beta") // which hears of them when alpha refuses a number that is not above
	l.untilEpoch(n, "alpha", "beta", "gamma")
	if _, err := l.sign("alpha", []byte("with room again")); err != nil {
		t.Error(err)
	}
}

// TestWithdrawnShares has a holder take part in each attempt at the next epoch, and say that
// it has its share until the others have voted: they vote few times at once, and when the
// roster drops it the rest goes on.
func TestWithdrawnShares(t *testing.T) {
	l := born(t)
	n := l.epochOf("alpha")
	r := l.betray("gamma")
	r.claim("alpha")
	r.react(func(from protocol.HostID, f *peerpb.Frame) {
		if open := f.GetOpen(); open != nil && open.Binding.Operation == opReshare {
			go r.withdraws(from, open)
		}
	})
	l.prefer("alpha", "gamma")
	l.prefer("beta", "gamma")
	v, k := l.hosts["alpha"].agent.vault.Load(), l.key("alpha")
	roots := v.Stats().Roots
	go adminAPI{l.hosts["alpha"].agent}.Refresh(t.Context(), &apipb.RefreshRequest{Key: "first"})
	next := func() string { k.mu.Lock(); defer k.mu.Unlock(); return k.next }
	vain := uint64(0)
	l.until("alpha pauses for long", func() bool {
		if text, _, ok := strings.Cut(next(), " attempts at the next epoch came to nothing"); ok {
			_, _ = fmt.Sscan(text[strings.LastIndexByte(text, ' ')+1:], &vain)
		}
		return vain >= attemptsAtOnce+2
	})
	if took := v.Stats().Roots - roots; took < attemptsAtOnce || took > vain+2 {
		t.Errorf("%d roots for %d attempts", took, vain)
	}
	l.write(2, "alpha", "beta")
	l.deliver("alpha", "beta")
	l.untilEpoch(n, "alpha", "beta")
}

// withdraws takes part in a resharing, deals nothing, and says that it has its share until
// it hears of a vote.
func (r *rogue) withdraws(leader protocol.HostID, open *peerpb.Open) {
	b, base := r.binding(open), r.hosts["beta"].agent.key("first")
	box, err := r.sessions.open(b.ID(), r.self, b.Parties)
	if err != nil {
		return
	}
	defer r.sessions.close(box)
	base.mu.Lock()
	res := newResharing(r.key, base.known, nil, vault.Number{Roster: b.Epoch[0], Attempt: b.Epoch[1]})
	base.mu.Unlock()
	for _, d := range open.Dealers {
		res.dealers = append(res.dealers, protocol.HostID(d))
	}
	cfg := r.hosts["beta"].agent.reshareConfig(base, res, box.id)
	cfg.Self = r.self
	if r.net.Send(leader, readyFrame(box.id)) != nil {
		return
	}
	early, err := gather(r.ctx, box, []protocol.HostID{leader})
	if err != nil {
		return
	}
	g, err := r.key.scheme.reshare(cfg, nil)
	if err != nil {
		return
	}
	defer g.session.Close()
	if drive(r.ctx, r.self, g.session, box, r.net.Send, early) != nil {
		return
	}
	public, share, err := g.result()
	if err != nil {
		r.t.Error(err)
		return
	}
	share.Wipe()
	s := epoch.Staged{Number: res.number, Output: epoch.OutputDigest(r.key.entry().Scheme, public)}
	has := func(k *peerpb.KeyStatus) { k.Active, k.Certificate = number(res.base.number()), res.base.id[:] }
	r.says(both(has, func(k *peerpb.KeyStatus) { k.Staged = append(k.Staged, staged(s)) }), r.others()...)
	for _, h := range r.others() {
		r.hears("a vote", h, func(f *peerpb.Frame) bool { return bytes.Equal(f.GetKey().GetVoted().GetOutput(), s.Output[:]) })
	}
	r.says(has, r.others()...)
}

// TestFarNumber has a leader take a far number, and deal so that one host stages it and the
// others do not. That holds nobody up for longer than it takes them to get there.
func TestFarNumber(t *testing.T) {
	l := born(t)
	n := l.epochOf("beta")
	ok(t, l.hosts["alpha"].stop())
	base, share := l.share("alpha")
	r := l.betray("alpha")
	r.connected()
	beyond := newResharing(r.key, base, []protocol.HostID{"alpha", "gamma"}, vault.Number{Roster: 1, Attempt: lastAttempt + 1})
	box, err := r.leads(beyond, nil)
	if err == nil || !strings.Contains(err.Error(), "used up") {
		t.Errorf("a number beyond the last: %v", err)
	}
	for _, h := range box.parties { // none is to join the next session before it
		r.hears("a refusal", h, endOf(box.id))
	}
	far := newResharing(r.key, base, []protocol.HostID{"alpha", "gamma"}, vault.Number{Roster: 1, Attempt: n.Attempt + maxJump*3/2})
	box, err = r.leads(far, nil)
	ok(t, err)
	cfg := l.hosts["gamma"].agent.reshareConfig(l.key("gamma"), far, box.id)
	cfg.Self = "alpha"
	cfg.Sign = func(digest [32]byte) ([]byte, error) {
		return l.hosts["alpha"].identity.Sign(rand.Reader, digest[:], crypto.SHA256)
	}
	g, err := r.key.scheme.reshare(cfg, share)
	ok(t, err)
	ok(t, drive(l.ctx, "alpha", g.session, box, func(to protocol.HostID, f *peerpb.Frame) error {
		if to == "beta" && f.GetStep().GetRound() == 3 {
			return nil
		}
		return r.net.Send(to, f)
	}, nil))
	l.until("gamma has staged it", func() bool {
		record, _ := l.hosts["gamma"].agent.vault.Load().Record(l.key("gamma").id)
		return record.Highest() == far.number
	})
	hangUp(box, r.net.Send, errors.New("enough"))
	r.leave()
	l.start("alpha") // which knows nothing of it
	for _, by := range []string{"beta", "alpha", "gamma"} {
		l.refresh(by)
		n = l.untilEpoch(n, "alpha", "beta", "gamma")
	}
	if n.Attempt < far.number.Attempt {
		t.Errorf("epoch %s: nobody was to stage %s again", n, far.number)
	}
}

// TestUnbornSharesGo finds what attempts at a birth left, as a crash right after the birth
// leaves it: of this incarnation and of an earlier one.
func TestUnbornSharesGo(t *testing.T) {
	l := newLab(t)
	l.roster.Keys[0].Incarnation = 2
	l.start("gamma", "beta", "alpha")
	l.untilBorn()
	v, k := l.hosts["alpha"].agent.vault.Load(), l.key("alpha")
	active := l.epochOf("alpha")
	earlier := vault.KeyID{Name: k.id.Name, Incarnation: 1}
	for _, id := range []vault.KeyID{earlier, k.id} {
		ok(t, v.Stage(t.Context(), vault.Held, id, vault.Number{Roster: 1, Attempt: 7}, vault.Output{1}, vault.Origin{}, nil, secret.Random(32)))
	}
	l.hosts["alpha"].agent.nudge()
	l.until("alpha has one share", func() bool {
		now, _ := v.Record(k.id)
		before, _ := v.Record(earlier)
		return len(now.Staged) == 1 && now.Staged[0].Number == active && len(before.Staged) == 0
	})
	if _, err := l.sign("alpha", []byte("with the one that stays")); err != nil {
		t.Error(err)
	}
}

// TestLeavingWithAShareOfNothing has a host leave that holds a share of an epoch above: it
// keeps it until a later one is in force, and says so.
func TestLeavingWithAShareOfNothing(t *testing.T) {
	l := born(t)
	v, k := l.hosts["gamma"].agent.vault.Load(), l.key("gamma")
	ok(t, v.Stage(t.Context(), vault.Held, k.id, vault.Number{Roster: 2, Attempt: 9}, vault.Output{1}, vault.Origin{Parent: [32]byte{1}}, nil, secret.Random(32)))
	n := l.epochOf("beta")
	l.write(2, "alpha", "beta")
	l.deliver("alpha", "beta", "gamma")
	n = l.untilEpoch(n, "beta", "alpha")
	l.untilSays("gamma", "leaving", "epoch 2.9", "came to nothing", "key refresh first")
	l.write(2, "alpha", "beta") // the same, but its epochs have higher numbers
	l.deliver("alpha", "beta", "gamma")
	l.refresh("beta")
	l.untilEpoch(n, "beta", "alpha")
	l.until("gamma has erased its shares", func() bool { record, _ := v.Record(k.id); return len(record.Staged) == 0 })
}

// TestFramedDealer has a leader use one session id twice, to get two dealings of an honest
// dealer under it: that would prove that it cheats.
func TestFramedDealer(t *testing.T) {
	l := born(t)
	n := l.epochOf("beta")
	ok(t, l.hosts["alpha"].stop())
	base, share := l.share("alpha")
	share.close()
	r := l.betray("alpha")
	r.connected()
	res := newResharing(r.key, base, []protocol.HostID{"alpha", "beta"}, vault.Number{Roster: 1, Attempt: n.Attempt + 1})
	box, err := r.leadsAs(res, [32]byte{1}, nil)
	ok(t, err)
	if ev := <-box.events; ev.from != "beta" || ev.step == nil || ev.step.Round != 1 { // gamma has nothing to say yet
		t.Fatalf("beta does not deal: %+v", ev)
	}
	leave := func() { // until what was said of the session has come: its id is used again
		t.Helper()
		hangUp(box, func(to protocol.HostID, f *peerpb.Frame) error { r.send(to, f); return nil }, errors.New("again"))
		r.sessions.close(box)
		for _, name := range []string{"beta", "gamma"} {
			at := l.hosts[name].agent.sessions
			l.until(name+" has left the session", func() bool { at.mu.Lock(); defer at.mu.Unlock(); return at.running[box.id] == nil })
			r.settled(protocol.HostID(name))
		}
	}
	leave()
	again := func(when string) {
		t.Helper()
		if box, err = r.leadsAs(res, [32]byte{1}, nil); err == nil || !strings.Contains(err.Error(), "dealt under this session's id") {
			t.Errorf("the same id again, %s: %v", when, err)
		}
	}
	again("at once")
	leave()
	ok(t, l.hosts["beta"].stop())
	l.start("beta")
	l.untilActive("beta")
	r.connected()
	l.until("beta and gamma are connected", func() bool { return len(l.key("beta").live("beta")) >= 2 })
	again("after a restart")
}

// TestFramedLeader has a dealer lead a session again that an honest host led.
func TestFramedLeader(t *testing.T) {
	l := born(t)
	l.prefer("beta", "gamma") // it is to deal with alpha
	r := l.betray("alpha")
	r.claim("beta")
	led := make(chan *peerpb.Open, 16)
	r.react(func(from protocol.HostID, f *peerpb.Frame) {
		if open := f.GetOpen(); open != nil && from == "beta" && open.Binding.Operation == opReshare {
			led <- open
		}
	})
	go adminAPI{l.hosts["beta"].agent}.Refresh(t.Context(), &apipb.RefreshRequest{Key: "first"})
	open := <-led
	b := r.binding(open)
	box, err := r.sessions.open(b.ID(), r.self, b.Parties)
	ok(t, err)
	r.send("beta", readyFrame(box.id))
	r.hears("beta's dealing", "beta", stepOf(box.id, 1))
	r.sessions.close(box)
	r.send("beta", endFrame(box.id, reasonAborted, "again"))
	r.hears("an end", "beta", endOf(box.id))
	l.until("beta has left the session", func() bool { return !l.hosts["beta"].agent.generating(l.key("beta")) })
	box, err = r.sessions.open(b.ID(), r.self, b.Parties)
	ok(t, err)
	r.send("beta", &peerpb.Frame{Body: &peerpb.Frame_Open{Open: open}})
	if _, err = gather(r.ctx, box, []protocol.HostID{"beta"}); err == nil || !strings.Contains(err.Error(), "dealt under this session's id") {
		t.Errorf("the same id again: %v", err)
	}
}

// TestUncalledEpochs has a host lead new epochs without end: the others take part in as
// many as their limits allow. What their own roster or their own people ask for is not
// counted.
func TestUncalledEpochs(t *testing.T) {
	const allowed = 3
	l := newLab(t)
	l.hosts["beta"].config.Limits.EpochsPerPeer = allowed
	l.start("gamma", "beta", "alpha")
	l.untilActive("alpha", "beta", "gamma")
	n, staged := l.epochOf("alpha"), func() int { return strings.Count(l.hosts["beta"].log.String(), `msg="share staged"`) }
	born := staged()
	ctx, cancel := context.WithCancel(t.Context())
	asked := make(chan int, 1)
	go func() {
		for epochs := 0; ; epochs++ {
			if _, err := (adminAPI{l.hosts["alpha"].agent}).Refresh(ctx, &apipb.RefreshRequest{Key: "first"}); err != nil {
				asked <- epochs
				return
			}
		}
	}()
	l.untilLogged("alpha", "resharing failed", "epochs_per_peer", "conseal key refresh first")
	n = l.untilEpoch(n, "alpha", "beta", "gamma")
	cancel()
	// Where a host is slow to stage, an epoch takes another attempt, which counts too.
	if epochs, shares := <-asked, staged()-born; epochs < 1 || epochs > allowed || shares != allowed || l.epochOf("beta") != n {
		t.Fatalf("%d epochs, by %d shares, and then %s", epochs, shares, l.epochOf("beta"))
	}
	l.refresh("gamma") // each host has its own
	n = l.untilEpoch(n, "alpha", "beta", "gamma")
	l.refresh("beta") // a person asks on beta itself
	n = l.untilEpoch(n, "alpha", "beta", "gamma")
	l.write(3, "alpha", "beta", "gamma") // the roster calls for it, and alpha comes first
	l.deliver("alpha", "beta", "gamma")
	l.untilEpoch(n, "alpha", "beta", "gamma")
	if !strings.Contains(l.hosts["beta"].log.String(), "leader=alpha") {
		t.Error("beta does not say who led")
	}
}

// TestUncalledEpochsAtATime has a host lead epochs of several keys at a time: what that is
// over the limit counts too.
func TestUncalledEpochsAtATime(t *testing.T) {
	l := newLab(t)
	l.hosts["beta"].config.Limits.EpochsPerPeer = 1
	l.start("gamma", "beta", "alpha")
	l.untilActive("alpha", "beta", "gamma")
	a, k := l.hosts["beta"].agent, l.key("beta")
	var ends []func()
	for range 3 {
		led, err := a.mayLead("alpha", k, a.vault.Load())
		ok(t, err)
		ends = append(ends, led)
	}
	for _, led := range ends {
		led()
	}
	if _, err := a.mayLead("alpha", k, a.vault.Load()); err == nil || !strings.Contains(err.Error(), "lead the next in 3h") && !strings.Contains(err.Error(), "lead the next in 2h59m") {
		t.Errorf("after three at a time: %v", err)
	}
}

// damage shortens the files in a folder of a host's vault, but those that keep names. It
// returns how many.
func (l *lab) damage(name, folder string, keep ...string) (n int) {
	l.t.Helper()
	for _, file := range l.files(name, folder) {
		if !slices.Contains(keep, file) {
			ok(l.t, os.Truncate(file, 100))
			n++
		}
	}
	return n
}

func (l *lab) files(name, folder string) []string {
	l.t.Helper()
	files, err := filepath.Glob(filepath.Join(VaultFolder(l.hosts[name].config), folder, "*"))
	ok(l.t, err)
	return files
}

// TestDamagedShare damages the file of a host's share, or takes it away: the host says so,
// the others sign, and the next epoch makes it whole.
func TestDamagedShare(t *testing.T) {
	for name, harm := range map[string]func(l *lab){
		"shortened": func(l *lab) { l.damage("alpha", "shares") },
		"gone":      func(l *lab) { ok(l.t, os.Remove(l.files("alpha", "shares")[0])) },
	} {
		t.Run(name, func(t *testing.T) {
			l := born(t)
			n := l.epochOf("alpha")
			ok(t, l.hosts["alpha"].stop())
			if files := l.files("alpha", "shares"); len(files) != 1 {
				t.Fatalf("shares: %q", files)
			}
			harm(l)
			l.start("alpha")
			l.untilSays("alpha", "lost", "damaged", "conseal key refresh first")
			if signers, err := l.sign("beta", []byte("without alpha")); err != nil || slices.Contains(signers, "alpha") {
				t.Errorf("signed by %q: %v", signers, err)
			}
			l.refresh("beta")
			l.untilEpoch(n, "alpha", "beta", "gamma")
			_, err := l.sign("alpha", []byte("whole again"))
			ok(t, err)
		})
	}
}

// TestDamagedWhileOpened damages the files of shares that their hosts have opened, at so
// many hosts that without them there is no quorum: they sign on, and a damaged share keeps
// no host from taking up the next one.
func TestDamagedWhileOpened(t *testing.T) {
	l := born(t)
	n := l.epochOf("alpha")
	for _, name := range []string{"alpha", "beta"} {
		if l.damage(name, "shares") != 1 {
			t.Fatalf("no share of %s is damaged", name)
		}
	}
	_, err := l.sign("alpha", []byte("from memory"))
	ok(t, err)
	l.refresh("gamma")
	l.untilEpoch(n, "alpha", "beta", "gamma")
	_, err = l.sign("alpha", []byte("with new shares"))
	ok(t, err)
}

// TestDamagedBetweenUses damages the file of a share that is opened for each use: at the
// next use it is a lost share, as after a restart.
func TestDamagedBetweenUses(t *testing.T) {
	l := labOpen(t, "ed25519", "each")
	l.start("gamma", "beta", "alpha")
	l.untilBorn()
	n := l.epochOf("alpha")
	if l.damage("alpha", "shares") != 1 {
		t.Fatal("no share is damaged")
	}
	if _, err := l.sign("alpha", []byte("m")); err == nil {
		t.Error("alpha signed with a damaged share")
	}
	l.untilSays("alpha", "lost", "damaged", "conseal key refresh first")
	l.refresh("beta")
	l.untilEpoch(n, "alpha", "beta", "gamma")
	_, err := l.sign("alpha", []byte("whole again"))
	ok(t, err)
}

// TestDamageIsOfOneEpoch has a host hear of a later epoch while it finds that its share is
// damaged: of the later one it says nothing.
func TestDamageIsOfOneEpoch(t *testing.T) {
	l := born(t)
	a, k := l.hosts["alpha"].agent, l.key("alpha")
	k.mu.Lock()
	n := k.known
	k.mu.Unlock()
	later := *n.certificate
	later.Subject.Number.Attempt++
	if l.damage("alpha", "shares") != 1 {
		t.Fatal("no share is damaged")
	}
	damage := func() error {
		a.takeUp(t.Context(), k, a.vault.Load(), n)
		k.mu.Lock()
		defer k.mu.Unlock()
		return k.damage
	}
	if !errors.Is(damage(), vault.ErrDamaged) {
		t.Error("before, it says nothing either")
	}
	k.learn(&known{&later, later.Subject.ID(), n.output})
	if err := damage(); err != nil {
		t.Errorf("of a later epoch: %v", err)
	}
}

// TestLaterEpochMeanwhile shows a host the certificate of a later epoch, of which it has no
// share, while it takes up the one before: it does not sign with that.
func TestLaterEpochMeanwhile(t *testing.T) {
	l := born(t)
	a, k := l.hosts["alpha"].agent, l.key("alpha")
	k.mu.Lock()
	n := k.known
	k.mu.Unlock()
	later := *n.certificate
	later.Subject.Number.Attempt++
	k.learn(&known{&later, later.Subject.ID(), n.output})
	k.supersede(later.Subject.Number, 0)
	a.takeUp(t.Context(), k, a.vault.Load(), n)
	if act := k.active.Load(); act != nil {
		t.Errorf("it signs with epoch %s, and has the certificate of %s", act.number(), later.Subject.Number)
	}
}

// TestDamagedCertificate damages the file of a host's certificate: it gets another copy.
func TestDamagedCertificate(t *testing.T) {
	l := born(t)
	ok(t, l.hosts["alpha"].stop())
	if l.damage("alpha", "certs") != 1 {
		t.Fatal("no certificate is damaged")
	}
	l.start("alpha")
	l.untilActive("alpha")
	_, err := l.sign("alpha", []byte("with another copy"))
	ok(t, err)
	ok(t, l.hosts["alpha"].stop())
	for _, name := range []string{"beta", "gamma"} { // which it needs no more
		ok(t, l.hosts[name].stop())
	}
	l.start("alpha")
	l.untilActive("alpha")
}

// TestDamagedCertificateOfOneThatLeft damages the certificate by which a host left a key,
// and has it hold the key again.
func TestDamagedCertificateOfOneThatLeft(t *testing.T) {
	l := born(t)
	n := l.epochOf("alpha")
	l.write(2, "alpha", "beta")
	l.deliver("alpha", "beta", "gamma")
	n = l.untilEpoch(n, "alpha", "beta")
	l.until("gamma has left", func() bool {
		record, _ := l.hosts["gamma"].agent.vault.Load().Record(l.key("gamma").id)
		return len(record.Staged) == 0
	})
	ok(t, l.hosts["gamma"].stop())
	if l.damage("gamma", "certs") == 0 {
		t.Fatal("no certificate is damaged")
	}
	l.write(2, "alpha", "beta", "gamma")
	l.deliver("alpha", "beta")
	l.start("gamma")
	l.untilEpoch(n, "alpha", "beta", "gamma")
}

// TestAnotherKeyWithoutACertificate has two hosts deal another key to one that cannot read
// its certificate, and so does not know which key it has.
func TestAnotherKeyWithoutACertificate(t *testing.T) {
	other := born(t).key("alpha").active.Load().certificate.Public // held by hosts of the same names
	l := born(t)
	k := l.key("alpha")
	for name := range l.hosts {
		ok(t, l.hosts[name].stop())
	}
	l.damage("alpha", "certs")
	r := l.betray("beta")
	l.betray("gamma")
	l.start("alpha")
	l.untilSays("alpha", "waiting", "fetching the certificate")
	r.connected()
	subject := k.subject("lab", epoch.Staged{Number: vault.Number{Roster: 1, Attempt: 1}, Output: epoch.OutputDigest("ed25519", other)}, vault.Origin{Entry: k.digest()})
	forged := &epoch.Certificate{Subject: subject, Public: other}
	for _, name := range []string{"beta", "gamma"} {
		st, err := subject.Sign(protocol.HostID(name), l.hosts[name].identity)
		ok(t, err)
		forged.Statements = append(forged.Statements, st)
	}
	base, err := l.hosts["alpha"].agent.know(l.key("alpha"), forged)
	ok(t, err)
	res := newResharing(r.key, base, []protocol.HostID{"beta", "gamma"}, vault.Number{Roster: 1, Attempt: 2})
	b := res.binding(r.key, [32]byte{1})
	encoded, err := forged.Encode()
	ok(t, err)
	box, err := r.sessions.open(b.ID(), r.self, res.all)
	ok(t, err)
	r.send("alpha", &peerpb.Frame{Body: &peerpb.Frame_Open{Open: &peerpb.Open{Binding: wireBinding(&b), Dealers: names(res.dealers), Certificate: encoded}}})
	if _, err := gather(r.ctx, box, []protocol.HostID{"alpha"}); err == nil || !strings.Contains(err.Error(), "has not read its certificate") {
		t.Errorf("alpha is dealt another key: %v", err)
	}
}

// TestDamagedBeforeTheVote damages a share that was staged for the next epoch before its
// host votes for it: another attempt follows.
func TestDamagedBeforeTheVote(t *testing.T) {
	l := born(t)
	n := l.epochOf("alpha")
	h := l.hosts["alpha"].protector
	away := func(err error) { h.mu.Lock(); defer h.mu.Unlock(); h.away = err }
	before := l.files("alpha", "shares")
	untilNext := func(what string) {
		t.Helper()
		l.until("alpha cannot vote: "+what, func() bool {
			k := l.key("alpha")
			k.mu.Lock()
			defer k.mu.Unlock()
			return strings.Contains(k.next, "voting for epoch") && strings.Contains(k.next, what)
		})
	}
	away(errors.New("its hardware is away"))
	go adminAPI{l.hosts["beta"].agent}.Refresh(t.Context(), &apipb.RefreshRequest{Key: "first"})
	untilNext("its hardware is away")
	if l.damage("alpha", "shares", before...) != 1 {
		t.Fatal("no staged share is damaged")
	}
	untilNext("damaged")
	away(nil)
	l.untilEpoch(n, "alpha", "beta", "gamma")
}

// snapshot returns what puts a stopped host's vault and hardware back as they are now.
func (l *lab) snapshot(name string) (putBack func()) {
	l.t.Helper()
	h, saved := l.hosts[name], l.t.TempDir()
	ok(l.t, os.CopyFS(saved, os.DirFS(VaultFolder(h.config))))
	h.protector.mu.Lock()
	defer h.protector.mu.Unlock()
	root, keys := slices.Clone(h.protector.root), maps.Clone(h.protector.keys)
	return func() {
		l.t.Helper()
		ok(l.t, os.RemoveAll(VaultFolder(h.config)))
		ok(l.t, os.CopyFS(VaultFolder(h.config), os.DirFS(saved)))
		h.protector = &hardware{root: root, keys: keys}
	}
}

// signed counts the signatures for which a host lent its share.
func (l *lab) signed(name string) int {
	l.t.Helper()
	b, err := os.ReadFile(filepath.Join(l.hosts[name].config.State, "audit.log"))
	ok(l.t, err)
	return bytes.Count(b, []byte(`"event":"sign"`))
}

// TestMixOfEpochs has a host with a usable share of an older epoch among others: nothing
// is signed with both, nobody waits in vain, and all say who is behind.
func TestMixOfEpochs(t *testing.T) {
	t.Run("an older roster", func(t *testing.T) {
		l := born(t)
		old := l.epochOf("gamma")
		l.addHost("delta")
		l.write(2, "alpha", "beta", "delta")
		l.deliver("alpha", "beta")
		l.start("delta")
		now := l.untilEpoch(old, "alpha", "beta", "delta")
		if l.epochOf("gamma") != old {
			t.Fatalf("gamma is at epoch %s", l.epochOf("gamma"))
		}
		lent := l.signed("alpha") + l.signed("beta")
		_, err := l.sign("gamma", []byte("with an older epoch"))
		var refused *apiError
		if !errors.As(err, &refused) || refused.reason != "NO_QUORUM" || !strings.Contains(err.Error(), fmt.Sprintf(`this host is behind "alpha", at epoch %s of %s`, old, now)) {
			t.Errorf("gamma: %v", err)
		}
		if l.signed("alpha")+l.signed("beta") != lent {
			t.Error("a host lent its share to an older epoch")
		}
		l.until("gamma says what it lacks", func() bool {
			k := l.key("gamma")
			k.mu.Lock()
			defer k.mu.Unlock()
			return strings.Contains(k.condition.detail, `this host is behind "alpha"`)
		})
		signers, err := l.sign("alpha", []byte("without gamma"))
		if ok(t, err); slices.Contains(signers, "gamma") {
			t.Errorf("signed by %q", signers)
		}
		ok(t, l.hosts["beta"].stop())
		ok(t, l.hosts["delta"].stop())
		if _, err := l.sign("alpha", []byte("alone")); !errors.As(err, &refused) || refused.reason != "NO_QUORUM" || strings.Contains(err.Error(), "gamma") {
			t.Errorf("alpha: %v", err)
		}
	})
	t.Run("disk and hardware put back", func(t *testing.T) {
		l := born(t)
		n := l.epochOf("gamma")
		ok(t, l.hosts["gamma"].stop())
		putBack := l.snapshot("gamma")
		l.start("gamma")
		l.untilActive("gamma")
		l.refresh("gamma")
		n = l.untilEpoch(n, "alpha", "beta", "gamma")
		ok(t, l.hosts["gamma"].stop())
		putBack()
		l.start("gamma")
		l.untilSays("gamma", "lost", "epoch "+n.String(), "conseal key refresh first")
		if l.key("gamma").active.Load() != nil {
			t.Error("gamma signs with the older epoch")
		}
		for range 5 {
			signers, err := l.sign("alpha", []byte("without gamma"))
			if ok(t, err); slices.Contains(signers, "gamma") {
				t.Errorf("signed by %q", signers)
			}
		}
		l.refresh("beta")
		l.untilEpoch(n, "alpha", "beta", "gamma")
		_, err := l.sign("gamma", []byte("whole again"))
		ok(t, err)
	})
}

// TestErasuresAreRationed: a host that has erased often keeps old shares for a while, and
// erases them together; when they are too many it does not wait.
func TestErasuresAreRationed(t *testing.T) {
	l := born(t)
	a := l.hosts["alpha"].agent
	held := func() int {
		record, _ := a.vault.Load().Record(l.key("alpha").id)
		return len(record.Staged)
	}
	next := func() {
		n := l.epochOf("beta")
		l.refresh("beta")
		l.untilEpoch(n, "beta", "gamma")
		l.until("alpha has the epoch", func() bool { return l.epochOf("alpha") == l.epochOf("beta") })
	}
	a.erasures.SetLimit(0)
	a.erasures.AllowN(time.Now(), erasuresAtOnce)
	for range 3 {
		next()
	}
	if held() < 4 {
		t.Fatalf("alpha holds %d shares", held())
	}
	roots, h := a.vault.Load().Stats().Roots, l.hosts["alpha"].protector
	away := func(err error) { h.mu.Lock(); defer h.mu.Unlock(); h.away = err }
	away(errors.New("its hardware is away"))
	a.erasures.SetLimit(rate.Inf)
	l.until("alpha fails to erase", func() bool {
		a.nudge()
		if a.erasures.Tokens() >= 1 { // there is room again, and no more comes
			a.erasures.SetLimit(0)
		}
		return strings.Count(l.hosts["alpha"].log.String(), "erasing old shares") > erasuresAtOnce
	})
	away(nil) // what failed does not count
	a.nudge()
	l.until("the old shares are erased", func() bool { return held() == 1 })
	if now := a.vault.Load().Stats().Roots; now != roots+1 {
		t.Errorf("%d roots for one erasure", now-roots)
	}
	a.erasures.SetLimit(0)
	a.erasures.AllowN(time.Now(), int(a.erasures.Tokens()))
	for range leftovers {
		next()
	}
	l.until("they are too many to wait", func() bool { return held() < leftovers })
}
