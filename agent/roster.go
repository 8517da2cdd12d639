package agent

import (
	"bytes"
	"fmt"
	"maps"
	"math"
	"slices"
	"time"

	"conseal/agent/peer"
	"conseal/agent/vault"
	"conseal/config"
	"conseal/protocol"
)

// told is what the roster says and what follows from it. It is replaced whole when a
// newer roster is taken up.
type told struct {
	roster *config.Roster
	digest [32]byte        // of the roster
	keys   map[string]*key // by name: those that this host holds, or is to hold, or held
	sorted []*key          // by name
}

// declared is what the roster says of one key.
type declared struct {
	entry   config.Key
	digest  [32]byte // of the entry and its hosts' entries
	holders []protocol.HostID
	pins    map[protocol.HostID][32]byte // of every host of the roster
}

func (a *Agent) roster() *config.Roster { return a.told.Load().roster }

func (a *Agent) rosterDigest() []byte {
	digest := a.told.Load().digest
	return digest[:]
}

func (a *Agent) keys() []*key { return a.told.Load().sorted }

// key returns the key of that name; nil if it is none of this host's.
func (a *Agent) key(name string) *key {
	if k := a.told.Load().keys[name]; k != nil && a.mine(k) {
		return k
	}
	return nil
}

// has tells whether a host is in the roster.
func (d *declared) has(h protocol.HostID) bool {
	_, ok := d.pins[h]
	return ok
}

// mine tells whether this host has to do with a key: by the roster, or because its vault
// has a share of it or had one of a key of that name, which was deleted.
func (a *Agent) mine(k *key) bool {
	if k.concerns(a.self) {
		return true
	}
	v := a.vault.Load()
	if v == nil {
		return false
	}
	record, ok := v.Record(k.id)
	_, deleted := v.Deleted(k.id.Name)
	return deleted || ok && len(record.Staged) > 0
}

// declare reads one key's entry.
func declare(entry config.Key, roster *config.Roster) (*declared, error) {
	digest, err := roster.EntryDigest(entry.Name)
	if err != nil {
		return nil, err
	}
	d := &declared{entry: entry, digest: digest, pins: map[protocol.HostID][32]byte{}}
	for _, h := range roster.Hosts {
		d.pins[protocol.HostID(h.Name)] = h.Identity
	}
	for _, h := range entry.Hosts {
		d.holders = append(d.holders, protocol.HostID(h))
	}
	slices.Sort(d.holders)
	return d, nil
}

// read makes what follows from a roster. Keys that were there before stay the same,
// with what their sessions know.
func (a *Agent) read(roster *config.Roster) (*told, error) {
	t := &told{roster: roster, digest: roster.Digest(), keys: map[string]*key{}}
	for _, entry := range roster.Keys {
		d, err := declare(entry, roster)
		if err != nil {
			return nil, err
		}
		k, err := newKey(d)
		if err != nil {
			return nil, err
		}
		k.here, t.keys[entry.Name] = &a.suspended, k
	}
	for _, name := range slices.Sorted(maps.Keys(t.keys)) {
		t.sorted = append(t.sorted, t.keys[name])
	}
	return t, nil
}

// peerHosts is the roster's hosts as the network has them.
func peerHosts(roster *config.Roster) map[protocol.HostID]peer.Host {
	hosts := map[protocol.HostID]peer.Host{}
	for _, h := range roster.Hosts {
		hosts[protocol.HostID(h.Name)] = peer.Host{Address: h.Address, Pin: h.Identity}
	}
	return hosts
}

// checkSelf refuses a roster that does not know this host as it is.
func (a *Agent) checkSelf(roster *config.Roster) error {
	host, ok := roster.Host(string(a.self))
	if !ok {
		return fmt.Errorf("roster %s has no host %q: the configuration's `name` and the roster must agree", a.config.Roster, a.self)
	}
	pin, err := config.PinOf(a.identity.Public())
	if err != nil {
		return err
	}
	if pin != host.Identity {
		return fmt.Errorf("roster %s pins identity %s for host %q, but this host's is %s: put that into the roster, or find out whose machine this is",
			a.config.Roster, host.Identity, a.self, pin)
	}
	if host.Protector != a.config.Protector.Kind {
		return fmt.Errorf("roster %s says that host %q has protector %q, its configuration says %q", a.config.Roster, a.self, host.Protector, a.config.Protector.Kind)
	}
	return nil
}

// LoadRoster takes up what is in the configured file now: see [Agent.TakeRoster].
func (a *Agent) LoadRoster() (changed bool, err error) {
	roster, err := config.LoadRoster(a.config.Roster)
	if err != nil {
		return false, err
	}
	return a.TakeRoster(roster)
}

// TakeRoster takes up a newer roster while the agent runs, and makes what it says. It
// changes nothing if the roster is not of this fleet, does not know this host as it is,
// is not newer than the present one, or changes what no roster may. changed is false if
// the present one says the same.
func (a *Agent) TakeRoster(roster *config.Roster) (changed bool, err error) {
	a.taking.Lock()
	defer a.taking.Unlock()
	now := a.told.Load()
	switch {
	case roster.Fleet != now.roster.Fleet:
		return false, fmt.Errorf("the roster is of fleet %q, this host is in %q", roster.Fleet, now.roster.Fleet)
	case roster.Version == now.roster.Version && roster.Digest() == now.digest:
		return false, nil
	case roster.Version <= now.roster.Version:
		return false, fmt.Errorf("the roster has version %d, and %d is in force: raise `version` with each change", roster.Version, now.roster.Version)
	}
	if err := a.checkSelf(roster); err != nil {
		return false, err
	}
	next, err := a.read(roster)
	if err != nil {
		return false, err
	}
	for _, k := range next.sorted {
		if err := a.keep(now, next, k); err != nil {
			return false, err
		}
	}
	if err := a.net.SetHosts(peerHosts(roster)); err != nil {
		return false, err
	}
	a.settleIn(now, next)
	a.told.Store(next)
	a.log.Info("roster taken up", "version", roster.Version, "before", now.roster.Version, "hosts", len(roster.Hosts), "keys", len(roster.Keys))
	a.net.Greet()
	a.nudge()
	return true, nil
}

// keep checks that an entry may follow the one before it.
func (a *Agent) keep(now, next *told, k *key) error {
	old := now.keys[k.id.Name]
	switch {
	case old == nil:
		return nil
	case k.id.Incarnation < old.id.Incarnation:
		return fmt.Errorf("key %q: the roster lowers its incarnation from %d to %d", k.id.Name, old.id.Incarnation, k.id.Incarnation)
	case k.id.Incarnation > old.id.Incarnation:
		return nil
	case k.entry().Scheme != old.entry().Scheme:
		return fmt.Errorf("key %q: the roster changes its scheme from %s to %s: a key keeps its scheme", k.id.Name, old.entry().Scheme, k.entry().Scheme)
	}
	old.mu.Lock()
	defer old.mu.Unlock()
	if pinned := k.entry().PublicKey; len(pinned) > 0 && old.known != nil && !bytes.Equal(pinned, old.known.output.pin) {
		return fmt.Errorf("key %q: the roster pins public key %s, the key has %x", k.id.Name, pinned, old.known.output.pin)
	}
	next.keys[k.id.Name] = old
	return nil
}

// settleIn gives the keys that stay their new entries, and ends those that go.
func (a *Agent) settleIn(now, next *told) {
	for i, k := range next.sorted {
		old := next.keys[k.id.Name]
		if old == k {
			continue
		}
		next.sorted[i] = old
		changed := old.digest() != k.digest()
		a.suspended.whole(func() { old.declared.Store(k.declared.Load()) })
		if old.entry().State != "active" {
			a.stopSigning(old)
		}
		if changed {
			old.callOff()
			old.mu.Lock()
			old.retry, old.idle, old.staged = retry{}, time.Time{}, time.Time{}
			old.mu.Unlock()
		}
	}
	for name, k := range now.keys {
		if next.keys[name] != k {
			k.supersede(vault.Number{Roster: math.MaxUint64}, a.config.Limits.SignDeadline)
		}
	}
	a.resealAgain.Store(true)
}
