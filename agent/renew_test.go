package agent

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"conseal/agent/api/apipb"
	"conseal/agent/vault"
	"conseal/config"
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

func TestRefresh(t *testing.T) {
	for _, scheme := range []string{"ed25519", "bip340", "ecdsa-p256"} {
		t.Run(scheme, func(t *testing.T) {
			l := newLabOf(t, scheme)
			l.start("gamma", "beta", "alpha")
			l.untilActive("alpha", "beta", "gamma")
			public := l.key("alpha").active.Load().output.spki
			n := l.epochOf("alpha")
			for _, by := range []string{"alpha", "gamma"} {
				l.refresh(by)
				n = l.untilEpoch(n, "alpha", "beta", "gamma")
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
	c.Name, c.State, c.InsecureLab = name, dir, true
	network, _, _ := strings.Cut(first.Listen.Address, ":")
	c.Listen.Address = fmt.Sprintf("%s.%d:7443", network[:strings.LastIndex(network, ".")], 10+int(l.roster.Version))
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

// TestReshare takes a key through all changes of its hosts and quorum.
func TestReshare(t *testing.T) {
	for _, scheme := range []string{"ed25519", "ecdsa-p256"} {
		t.Run(scheme, func(t *testing.T) {
			l := newLabOf(t, scheme)
			l.start("gamma", "beta", "alpha")
			l.untilActive("alpha", "beta", "gamma")
			public := string(l.key("alpha").active.Load().output.spki)
			n := l.epochOf("alpha")
			check := func(holders ...string) {
				t.Helper()
				n = l.untilEpoch(n, holders...)
				for _, name := range holders {
					if string(l.key(name).active.Load().output.spki) != public {
						t.Fatalf("%s has another public key", name)
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
			if l.hosts["alpha"].agent.key("first") != nil {
				t.Error("alpha still has to do with the key")
			}

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
	l := born(t)
	l.addHost("delta")
	ctx, stop := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	var signed atomic.Int64
	for _, name := range []string{"alpha", "beta"} { // which hold the key all the while
		wg.Go(func() {
			for ctx.Err() == nil {
				if _, err := l.sign(name, fmt.Appendf(nil, "message %d", signed.Add(1))); err != nil {
					t.Errorf("on %s: %v", name, err)
					return
				}
			}
		})
	}
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
	stop()
	wg.Wait()
	if signed.Load() < 1000 {
		t.Errorf("%d signatures in all: the test shows little", signed.Load())
	}
	t.Logf("%d signatures through %d refreshes and %d reshares", signed.Load(), refreshes, 2*reshares)
}
