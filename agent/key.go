package agent

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"conseal/agent/api/apipb"
	"conseal/agent/epoch"
	"conseal/agent/vault"
	"conseal/config"
	"conseal/protocol"
)

// key is one key of the roster that this host holds a share of, or should.
type key struct {
	entry   config.Key
	id      vault.KeyID
	digest  [32]byte // of the entry and its hosts' entries
	holders []protocol.HostID
	scheme  scheme

	// birth is held by the generation under way, from before its session opens
	// until its share is staged: so what a host says it has staged stays true
	// while another generation is agreed on.
	birth sync.Mutex

	presignAfter time.Time // when stock is made again after a failure; owned by keepStock

	active atomic.Pointer[active] // nil until this host has certificate and share

	mu         sync.Mutex // guards what follows
	views      map[protocol.HostID]epoch.View
	statements map[protocol.HostID]epoch.Statement // verified, about the vote in the view
	claims     map[protocol.HostID][32]byte        // active certificate that a host says it has
	failed     map[protocol.HostID]time.Time       // when a host last failed in a signing session
	cancel     context.CancelCauseFunc             // ends the generation under way
	retry      retry                               // when the next generation may start
	condition  condition
	stage      string // how far the generation under way is, for people
}

// active is the epoch that a key signs with here.
type active struct {
	certificate *epoch.Certificate
	id          [32]byte // of the certificate
	output      output
	stock       *stock
	share       *custody
}

// close ends the epoch here: nothing of it signs any more.
func (act *active) close() {
	act.stock.close()
	act.share.close()
}

// presigner is what prepares signatures, if the scheme can and the share is held:
// a presignature signs without it, so that it would outlive its time.
func (act *active) presigner() (presigner, bool) {
	p, ok := act.share.held.(presigner)
	return p, ok
}

// condition is what this host makes of a key; see apipb.Key.
type condition struct{ name, detail string }

func newKey(entry config.Key, roster *config.Roster) (*key, error) {
	s, err := schemeOf(entry.Scheme)
	if err != nil {
		return nil, fmt.Errorf("key %q: %w", entry.Name, err)
	}
	digest, err := roster.EntryDigest(entry.Name)
	if err != nil {
		return nil, err
	}
	k := &key{
		entry: entry, digest: digest, scheme: s,
		id:         vault.KeyID{Name: entry.Name, Incarnation: entry.Incarnation},
		views:      map[protocol.HostID]epoch.View{},
		statements: map[protocol.HostID]epoch.Statement{},
		claims:     map[protocol.HostID][32]byte{},
		failed:     map[protocol.HostID]time.Time{},
	}
	for _, h := range entry.Hosts {
		k.holders = append(k.holders, protocol.HostID(h))
	}
	slices.Sort(k.holders)
	return k, nil
}

// pins returns the identities that the roster pins for the key's holders.
func (k *key) pins(roster *config.Roster) map[protocol.HostID][32]byte {
	pins := map[protocol.HostID][32]byte{}
	for _, h := range k.holders {
		if host, ok := roster.Host(string(h)); ok {
			pins[h] = host.Identity
		}
	}
	return pins
}

// subject is what the holders' statements about a staged share are about.
func (k *key) subject(fleet string, s epoch.Staged) epoch.Subject {
	return epoch.Subject{Fleet: fleet, Key: k.id, Scheme: k.entry.Scheme, Number: s.Number, Entry: k.digest, Output: s.Output}
}

// binding is what a session about this key must agree on.
func (k *key) binding(operation string, n vault.Number, parties []protocol.HostID, nonce [32]byte) protocol.Binding {
	return protocol.Binding{
		Operation: operation, Scheme: k.entry.Scheme, Key: k.id.Name, Incarnation: k.id.Incarnation,
		Epoch: [2]uint64{n.Roster, n.Attempt}, Entry: k.digest, Quorum: uint64(k.entry.Quorum),
		Parties: parties, Nonce: nonce,
	}
}

func (k *key) setCondition(name, detail string) (changed bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	changed = k.condition != condition{name, detail}
	k.condition = condition{name, detail}
	return changed
}

// live lists the holders that could sign now: self if it has its share, and
// those that say they have the same epoch's.
func (k *key) live(self protocol.HostID) (live []protocol.HostID) {
	act := k.active.Load()
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, h := range k.holders {
		switch {
		case h == self && act != nil:
			live = append(live, h)
		case h != self && act != nil && k.claims[h] == act.id:
			live = append(live, h)
		case h != self && act == nil && k.views[h].Heard:
			live = append(live, h)
		}
	}
	return live
}

// lost forgets what a host said, because its connection is gone.
func (k *key) lost(host protocol.HostID) {
	k.mu.Lock()
	defer k.mu.Unlock()
	delete(k.views, host)
	delete(k.claims, host)
	delete(k.statements, host)
}

// describe fills in the API's form.
func (k *key) describe(self protocol.HostID) *apipb.Key {
	out := &apipb.Key{
		Name: k.id.Name, Scheme: k.entry.Scheme, Quorum: uint32(k.entry.Quorum), Hosts: names(k.holders),
		Purpose: k.entry.Purpose, Open: string(k.entry.Open), State: k.entry.State, Incarnation: k.id.Incarnation, Live: names(k.live(self)),
	}
	if act := k.active.Load(); act != nil {
		out.PublicKey = act.output.spki
		out.EpochRoster, out.EpochAttempt = act.certificate.Subject.Number.Roster, act.certificate.Subject.Number.Attempt
		out.Certificate = act.id[:]
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	out.Condition, out.Detail = k.condition.name, k.condition.detail
	return out
}

// class is how the key's shares rest.
func (k *key) class() vault.Class {
	if _, held := k.entry.Open.Keep(); held {
		return vault.Held
	}
	return vault.Own
}

// activate makes a certified epoch the one that the key signs with. A share that is
// held is opened now and kept, any other when it is used; each time it is checked
// against the certificate. changed is told when the hardware begins to refuse, and when
// that ends.
func (k *key) activate(ctx context.Context, self protocol.HostID, c *epoch.Certificate, v *vault.Vault, changed func()) error {
	out, err := k.scheme.inspect(c.Public)
	if err != nil {
		return fmt.Errorf("reading the public output of key %q: %w", k.id.Name, err)
	}
	if out.quorum != k.entry.Quorum || !slices.Equal(out.holders, k.holders) {
		return fmt.Errorf("key %q: its certificate is for quorum %d of %q, the roster says %d of %q",
			k.id.Name, out.quorum, out.holders, k.entry.Quorum, k.holders)
	}
	keep, held := k.entry.Open.Keep()
	share := newCustody(keep, func(ctx context.Context) (s shareholder, err error) {
		err = v.Lend(ctx, k.id, c.Subject.Number, func(share []byte) error {
			s, err = k.scheme.load(self, c.Public, share)
			return err
		})
		return s, err
	}, changed)
	if held {
		if share.held, err = share.open(ctx); err != nil {
			return err
		}
	}
	act := &active{certificate: c, id: c.Subject.ID(), output: out, stock: newStock(), share: share}
	if old := k.active.Swap(act); old != nil {
		old.close()
	}
	return nil
}

func names(hosts []protocol.HostID) []string {
	out := make([]string, len(hosts))
	for i, h := range hosts {
		out[i] = string(h)
	}
	return out
}
