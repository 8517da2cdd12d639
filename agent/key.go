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

// key is one key of the roster. Most are held here, or should be; of the others a host
// only knows that it is none of their holders.
type key struct {
	id       vault.KeyID
	scheme   scheme
	declared atomic.Pointer[declared] // replaced when a newer roster is taken up

	// birth is held by the generation under way, from before its session opens
	// until its share is staged: so what a host says it has staged stays true
	// while another generation is agreed on.
	birth sync.Mutex

	telling sync.Mutex // held while others are told what this host has of it

	presignAfter time.Time // when stock is made again after a failure; owned by keepStock

	receiptsRead bool  // whether receipts has those of the vault; owned by reconcile
	receiptRetry retry // when this host's receipt is tried again; owned by reconcile

	active atomic.Pointer[active] // nil until this host has certificate and share
	here   *suspensions           // of this host

	mu         sync.Mutex // guards what follows
	views      map[protocol.HostID]epoch.View
	statements map[protocol.HostID]said                    // verified
	failed     map[protocol.HostID]time.Time               // when a host last failed in a signing session
	suspended  map[protocol.HostID]time.Time               // other hosts that sign nothing with the key, and since when
	signing    map[context.Context]context.CancelCauseFunc // sessions that sign or presign
	cancel     context.CancelCauseFunc                     // ends the generation under way
	retry      retry                                       // when the next generation may start
	condition  condition
	stage      string                       // how far the generation under way is, for people
	damage     error                        // why the active epoch's share cannot be read from its file; nil if it can
	known      *known                       // the highest certificate that this host has; nil if none
	wanted     time.Time                    // when certificates were asked for last
	reach      uint64                       // how much further than maxJump what others say reaches
	missing    []protocol.HostID            // hosts that the next step waits for
	since      time.Time                    // when that epoch was taken up here
	next       string                       // how it stands with the next epoch, for people; "" if none is wanted
	settled    bool                         // next is ""
	cheats     map[protocol.HostID]bool     // dealers that are proven to have cheated
	dealt      map[protocol.SessionID]bool  // sessions in which this host dealt, or was to, from the epoch that is known
	asked      [32]byte                     // certificate of an epoch that a person wants to end
	idle       time.Time                    // since when nothing happened to the next epoch, for who is to lead after whom
	staged     time.Time                    // when this host staged a share above that epoch last
	receipts   map[protocol.HostID]*receipt // of the key's deletion; not empty if a host erased it
	shown      map[protocol.HostID]bool     // hosts that have shown that they have this host's receipt
	news       chan struct{}                // closed, and made anew, when an epoch is taken up or a host says that it did
}

// active is the epoch that a key signs with here.
type active struct {
	certificate *epoch.Certificate
	id          [32]byte // of the certificate
	output      output
	stock       *stock
	share       *custody
}

func (act *active) number() vault.Number { return act.certificate.Subject.Number }

// end lets the sessions that have the share go on, for as long as one may last; none
// begins any more.
func (act *active) end(last time.Duration) {
	act.stock.close()
	act.share.end(last)
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

func newKey(d *declared) (*key, error) {
	s, err := schemeOf(d.entry.Scheme)
	if err != nil {
		return nil, fmt.Errorf("key %q: %w", d.entry.Name, err)
	}
	k := &key{
		scheme:     s,
		id:         vault.KeyID{Name: d.entry.Name, Incarnation: d.entry.Incarnation},
		views:      map[protocol.HostID]epoch.View{},
		statements: map[protocol.HostID]said{},
		cheats:     map[protocol.HostID]bool{},
		dealt:      map[protocol.SessionID]bool{},
		failed:     map[protocol.HostID]time.Time{},
		suspended:  map[protocol.HostID]time.Time{},
		signing:    map[context.Context]context.CancelCauseFunc{},
		receipts:   map[protocol.HostID]*receipt{},
		shown:      map[protocol.HostID]bool{},
		news:       make(chan struct{}),
	}
	k.declared.Store(d)
	return k, nil
}

func (k *key) entry() *config.Key         { return &k.declared.Load().entry }
func (k *key) digest() [32]byte           { return k.declared.Load().digest }
func (k *key) holders() []protocol.HostID { return k.declared.Load().holders }

// pins returns the identities that the roster pins for hosts.
func (k *key) pins(hosts []protocol.HostID) map[protocol.HostID][32]byte {
	all, pins := k.declared.Load().pins, map[protocol.HostID][32]byte{}
	for _, h := range hosts {
		if pin, ok := all[h]; ok {
			pins[h] = pin
		}
	}
	return pins
}

// circle lists the hosts that have to do with the key: those that are to hold it by
// the roster, those that hold its active epoch, and those that say that they hold one.
func (k *key) circle() []protocol.HostID {
	d, hosts := k.declared.Load(), slices.Clone(k.holders())
	add := func(h protocol.HostID) {
		if d.has(h) && !slices.Contains(hosts, h) {
			hosts = append(hosts, h)
		}
	}
	if act := k.active.Load(); act != nil {
		for _, h := range act.output.holders {
			add(h)
		}
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	for h, view := range k.views {
		if view.Active {
			add(h)
		}
	}
	return hosts
}

// concerns tells whether a host has to do with the key.
func (k *key) concerns(h protocol.HostID) bool { return slices.Contains(k.circle(), h) }

// subject is what the holders' statements about a staged share are about. The entry is
// that of the session, whatever the roster says by now: of one epoch there is one
// certificate.
func (k *key) subject(fleet string, s epoch.Staged, made vault.Origin) epoch.Subject {
	return epoch.Subject{Fleet: fleet, Key: k.id, Scheme: k.entry().Scheme, Number: s.Number, Entry: made.Entry, Output: s.Output, Parent: made.Parent}
}

// binding is what a session about this key must agree on.
func (k *key) binding(operation string, n vault.Number, parties []protocol.HostID, nonce [32]byte) protocol.Binding {
	return protocol.Binding{
		Operation: operation, Scheme: k.entry().Scheme, Key: k.id.Name, Incarnation: k.id.Incarnation,
		Epoch: [2]uint64{n.Roster, n.Attempt}, Entry: k.digest(), Quorum: uint64(k.entry().Quorum),
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
// those that say they have the same epoch's; none that is suspended.
func (k *key) live(self protocol.HostID) (live []protocol.HostID) {
	act, holders := k.active.Load(), k.holders()
	if act != nil {
		holders = act.output.holders
	}
	_, suspended := k.here.of(k.id.Name)
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, h := range holders {
		_, there := k.suspended[h]
		switch {
		case there || h == self && suspended:
		case h == self && act != nil, h != self && act != nil && k.views[h].Certificate == act.id,
			h != self && act == nil && k.views[h].Heard:
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
	delete(k.statements, host)
	delete(k.suspended, host)
}

// describe fills in the API's form.
func (k *key) describe(self protocol.HostID) *apipb.Key {
	out := &apipb.Key{
		Name: k.id.Name, Scheme: k.entry().Scheme, Quorum: uint32(k.entry().Quorum), Hosts: names(k.holders()),
		Purpose: k.entry().Purpose, Open: string(k.entry().Open), State: k.entry().State, Incarnation: k.id.Incarnation, Live: names(k.live(self)),
	}
	if act := k.active.Load(); act != nil {
		out.PublicKey = act.output.spki
		out.EpochRoster, out.EpochAttempt = act.certificate.Subject.Number.Roster, act.certificate.Subject.Number.Attempt
		out.Certificate = act.id[:]
	}
	concerns := k.concerns(self)
	k.mu.Lock()
	defer k.mu.Unlock()
	k.describeReceipts(out)
	out.Condition, out.Detail, out.Next = k.condition.name, k.condition.detail, k.next
	if out.Condition == "" && concerns {
		out.Condition, out.Detail = "waiting", "this host has not looked at it yet"
	}
	if out.EpochRoster > 0 && !k.since.IsZero() {
		out.Since = k.since.UTC().Format(time.RFC3339)
	}
	return out
}

// class is how the key's shares rest.
func (k *key) class() vault.Class {
	if _, held := k.entry().Open.Keep(); held {
		return vault.Held
	}
	return vault.Own
}

// learn notes a certificate that is higher than all before.
func (k *key) learn(n *known) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.known.number().Compare(n.number()) < 0 {
		k.known, k.damage, k.asked, k.idle, k.staged, k.settled, k.reach = n, nil, [32]byte{}, time.Time{}, time.Time{}, false, 0
		clear(k.dealt) // the base is part of a session's id
		k.tellNews()
	}
}

// waitsFor notes for which hosts the next step waits.
func (k *key) waitsFor(hosts []protocol.HostID) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.missing = hosts
}

// owing lists the other hosts that may have said something that was lost: those that the
// next step waits for, and holders of the active epoch that did not say that they have it.
func (k *key) owing(self protocol.HostID) (hosts []protocol.HostID) {
	act := k.active.Load()
	k.mu.Lock()
	defer k.mu.Unlock()
	hosts = slices.Clone(k.missing)
	if act != nil {
		for _, h := range act.output.holders {
			if k.views[h].Certificate != act.id {
				hosts = append(hosts, h)
			}
		}
	}
	slices.Sort(hosts)
	return slices.DeleteFunc(slices.Compact(hosts), func(h protocol.HostID) bool { return h == self || k.views[h].Unreadable })
}

// tellNews wakes who waits for hosts to take up an epoch; k.mu is held.
func (k *key) tellNews() {
	close(k.news)
	k.news = make(chan struct{})
}

// activate makes a certified epoch the one that the key signs with. A share that is
// held is opened now and kept, any other when it is used; each time it is checked
// against the certificate. changed is told when the hardware begins to refuse, and when
// that ends. What was active before serves the sessions that have it, for as long as
// one may last.
func (k *key) activate(ctx context.Context, self protocol.HostID, n *known, v *vault.Vault, last time.Duration, changed func()) error {
	keep, held := k.entry().Open.Keep()
	share := newCustody(keep, func(ctx context.Context) (s shareholder, err error) {
		err = v.Lend(ctx, k.id, n.number(), func(share []byte) error {
			s, err = k.scheme.load(self, n.certificate.Public, share)
			return err
		})
		return s, err
	}, changed)
	if held {
		var err error
		if share.held, err = share.open(ctx); err != nil {
			return err
		}
	}
	act := &active{certificate: n.certificate, id: n.id, output: n.output, stock: newStock(), share: share}
	if old := k.active.Swap(act); old != nil {
		old.end(last)
	}
	k.mu.Lock()
	k.tellNews()
	highest := k.known.number()
	k.mu.Unlock()
	k.supersede(highest, last) // by one that was learned meanwhile
	return nil
}

// supersede stops signing with an epoch below n.
func (k *key) supersede(n vault.Number, last time.Duration) {
	act := k.active.Load()
	if act != nil && act.certificate.Subject.Number.Compare(n) < 0 && k.active.CompareAndSwap(act, nil) {
		act.end(last)
	}
}

func names(hosts []protocol.HostID) []string {
	out := make([]string, len(hosts))
	for i, h := range hosts {
		out[i] = string(h)
	}
	return out
}
