package agent

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"conseal/agent/epoch"
	"conseal/agent/vault"
	"conseal/protocol"
)

// reconcileEvery is how often a key that is not as the roster wants it is looked
// at again, and said again to its hosts, when nothing happens.
const reconcileEvery = 2 * time.Second

// reconcile makes what the roster says. It is the only goroutine that votes.
func (a *Agent) reconcile(ctx context.Context) {
	tick := time.NewTicker(reconcileEvery)
	defer tick.Stop()
	for {
		a.openVault(ctx)
		a.settleSuspensions(ctx)
		a.reseal(ctx)
		for _, k := range a.keys() {
			if ctx.Err() != nil {
				return
			}
			if a.mine(k) {
				a.settle(ctx, k)
			}
		}
		a.erase(ctx)
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			a.announceUnsettled()
		case <-a.wake:
		}
	}
}

// reseal has all shares rest as the roster says, once, under one root: a TPM takes few
// in its life. What fails is tried again, and said, when its key is taken up.
func (a *Agent) reseal(ctx context.Context) {
	v := a.vault.Load()
	if v == nil || !a.resealAgain.Swap(false) {
		return
	}
	want := map[vault.KeyID]vault.Class{}
	for _, k := range a.keys() {
		want[k.id] = k.class()
	}
	if err := v.Reseal(ctx, want); err != nil {
		a.log.Warn("not every share rests as the roster says", "error", err)
	}
}

// nudge makes reconcile look again soon.
func (a *Agent) nudge() {
	select {
	case a.wake <- struct{}{}:
	default: // it will
	}
}

// settle takes one key a step further and says how it stands.
func (a *Agent) settle(ctx context.Context, k *key) {
	name, detail := a.step(ctx, k)
	a.say(k, name, detail)
}

// say enters the condition of a key, and logs it if it is another than before. That
// the key is suspended here comes before all else.
func (a *Agent) say(k *key, name, detail string) {
	if s, ok := a.suspended.of(k.id.Name); ok && name != "deleted" {
		name, detail = "suspended", s.describe(name, detail)
	}
	if k.setCondition(name, detail) {
		a.log.Info("key", "key", k.id.Name, "condition", name, "detail", detail)
	}
}

// step does what comes next for a key and returns the condition it is in.
func (a *Agent) step(ctx context.Context, k *key) (name, detail string) {
	v := a.vault.Load()
	switch {
	case v == nil && k.entry().State == "deleted":
		return "deleted", "by the roster; nothing is erased while the vault does not open: " + a.vaultProblem()
	case v == nil:
		return "sealed", a.vaultProblem()
	}
	if name, detail = a.deletion(ctx, k, v); name != "" {
		return name, detail
	}
	if older, ok := bornBefore(v, k.id); ok {
		return "refused", fmt.Sprintf("the roster declares incarnation %d, but incarnation %d of this name was born and its share is here; a key that exists is not made anew: set `incarnation = %d` again, and start the agents anew with that roster",
			k.id.Incarnation, older, older)
	}
	record, _ := v.Record(k.id)
	if record.Active != (vault.Number{}) {
		if name, detail = a.load(ctx, k, v, record); name != "" {
			return name, detail
		}
		record, _ = v.Record(k.id)
		a.see(k, v, record)
		return a.exists(ctx, k, v)
	}
	k.mu.Lock()
	exists := k.known != nil
	k.mu.Unlock()
	if exists {
		a.see(k, v, record)
		return a.exists(ctx, k, v)
	}
	if record.Entry != ([32]byte{}) && record.Entry != k.digest() && !reshared(v, record) {
		return a.changedUnborn(k, record)
	}
	a.see(k, v, record)
	return a.unborn(ctx, k, v)
}

// reshared tells whether a host without a certificate has staged a share of a key that
// exists.
func reshared(v *vault.Vault, record vault.Record) bool {
	return slices.ContainsFunc(record.Staged, func(s vault.Staged) bool {
		made, _ := v.Origin(record.Key, s.Number)
		return made.Parent != [32]byte{}
	})
}

// exists takes a key of which this host has a certificate a step further.
func (a *Agent) exists(ctx context.Context, k *key, v *vault.Vault) (name, detail string) {
	next := a.renew(ctx, k, v)
	k.mu.Lock()
	changed := k.next != next
	k.next, k.settled = next, next == ""
	k.mu.Unlock()
	if changed {
		a.log.Debug("next epoch", "key", k.id.Name, "is", next)
	}
	if k.active.Load() != nil {
		return a.ready(k)
	}
	return a.without(k, v, next)
}

// without is the condition of a key that exists, at a host that has no share of its
// highest epoch.
func (a *Agent) without(k *key, v *vault.Vault, next string) (name, detail string) {
	k.mu.Lock()
	n, damage := k.known, k.damage
	k.mu.Unlock()
	record, _ := v.Record(k.id)
	const deal = "have the others deal new ones, by `conseal key refresh %s` at one of them"
	switch {
	case damage != nil:
		return "lost", fmt.Sprintf("this host's share of epoch %s cannot be used: %v; "+deal+"; %s", n.number(), damage, k.id.Name, next)
	case n != nil && !slices.Contains(n.output.holders, a.self) && !slices.Contains(k.holders(), a.self):
		if highest := record.Highest(); highest.Compare(n.number()) > 0 && len(record.Staged) > 0 {
			return "leaving", fmt.Sprintf("epoch %s is held by other hosts; this one has a share of epoch %s, which came to nothing as far as it knows, and erases it once a later one is in force: `conseal key refresh %s` at one of them", n.number(), highest, k.id.Name)
		}
		if len(record.Staged) > 0 {
			return "leaving", fmt.Sprintf("epoch %s is held by other hosts; this one erases its share once a quorum of them says that it has the epoch", n.number())
		}
		return "left", fmt.Sprintf("epoch %s is held by other hosts; this one has erased its share", n.number())
	case n != nil && n.certificate.Subject.Entry == k.digest() && slices.Contains(n.output.holders, a.self) && !record.Holds(n.number()):
		return "lost", fmt.Sprintf("the key exists, and this host holds no share of epoch %s: the share was lost; "+deal+", or by pinning this host's new identity in the roster; %s", n.number(), k.id.Name, next)
	}
	return "waiting", next
}

func (a *Agent) ready(k *key) (name, detail string) {
	if k.entry().State == "suspended" {
		return "suspended", "by the roster"
	}
	act := k.active.Load()
	if act == nil {
		return "waiting", "its epoch ended just now"
	}
	if err := act.share.refusal(); err != nil {
		return "sealed", fmt.Sprintf("when it was used last, the hardware did not open this host's share: %v; it is asked again at each use", err)
	}
	live := k.live(a.self)
	if len(live) >= act.output.quorum {
		return "ready", ""
	}
	return "waiting", fmt.Sprintf("%d of %d hosts are there: %s", len(live), act.output.quorum, a.missing(k, live))
}

// bornBefore finds an earlier incarnation that has a certificate here.
func bornBefore(v *vault.Vault, id vault.KeyID) (incarnation uint64, ok bool) {
	for i := id.Incarnation - 1; i >= 1; i-- {
		if r, found := v.Record(vault.KeyID{Name: id.Name, Incarnation: i}); found && r.Active != (vault.Number{}) {
			return i, true
		}
	}
	return 0, false
}

// load takes up the epoch that the vault has active, if that is not done. It returns
// the condition of the key if that cannot be.
func (a *Agent) load(ctx context.Context, k *key, v *vault.Vault, record vault.Record) (name, detail string) {
	k.mu.Lock()
	n := k.known
	k.since = record.Since
	k.mu.Unlock()
	if n.number().Compare(record.Active) < 0 {
		c, err := a.readCertificate(k, v)
		if errors.Is(err, vault.ErrDamaged) {
			a.want(k, k.circle())
			if !record.Holds(record.Active) {
				return "", "" // it left the key by that certificate, and may be dealt a later epoch without it
			}
			return "waiting", fmt.Sprintf("fetching the certificate of epoch %s from other hosts, since this host's is not readable: %v", record.Active, err)
		}
		if err == nil {
			n, err = a.know(k, c)
		}
		if err == nil {
			err = a.checkKnown(k, n)
		}
		if err != nil {
			return "refused", err.Error()
		}
		k.learn(n)
	}
	act := k.active.Load()
	if n.number() != record.Active || act != nil && act.id == n.id || !record.Holds(record.Active) {
		return "", ""
	}
	name, detail = a.takeUp(ctx, k, v, n)
	if k.active.Load() == act { // whoever has a certificate signs with nothing below it
		k.supersede(n.number(), a.config.Limits.SignDeadline)
		return name, detail
	}
	a.log.Info("key is active", "key", k.id.Name, "epoch", n.number().String(), "certificate", fmt.Sprintf("%x", n.id[:8]))
	a.see(k, v, record)
	a.announce(k)
	return "", ""
}

// takeUp makes the share of a certified epoch the one that the key signs with, whatever
// became of the key's other shares. With a share whose file is damaged it returns "": that
// is a lost share.
func (a *Agent) takeUp(ctx context.Context, k *key, v *vault.Vault, n *known) (name, detail string) {
	class := k.class()
	failed := v.Reseal(ctx, map[vault.KeyID]vault.Class{k.id: class})
	rests, err := v.Rests(k.id, n.number())
	switch {
	case err != nil && !errors.Is(err, vault.ErrDamaged):
		return "sealed", err.Error()
	case err == nil && rests != class:
		return "sealed", fmt.Sprintf("the roster says `open = %q`, and the share does not rest so yet: %v", k.entry().Open, failed)
	}
	changed := func() {
		if act := k.active.Load(); act != nil && errors.Is(act.share.refusal(), vault.ErrDamaged) && k.active.CompareAndSwap(act, nil) {
			act.end(a.config.Limits.SignDeadline)
			a.nudge() // it is taken up again, or lost
			return
		}
		name, detail := a.ready(k)
		a.say(k, name, detail)
	}
	if err == nil {
		err = k.activate(ctx, a.self, n, v, a.config.Limits.SignDeadline, changed)
	}
	damaged := errors.Is(err, vault.ErrDamaged)
	k.mu.Lock()
	if k.known == n { // else a later one is known meanwhile
		k.damage = nil
		if damaged {
			k.damage = err
		}
	}
	k.mu.Unlock()
	if err != nil && !damaged {
		return "refused", err.Error()
	}
	return "", ""
}

// unborn takes a step towards the key's birth.
func (a *Agent) unborn(ctx context.Context, k *key, v *vault.Vault) (name, detail string) {
	action := epoch.Next(a.unbornState(k, v))
	k.waitsFor(action.Missing)
	var err error
	switch action.Step {
	case epoch.Stuck:
		return "refused", action.Why
	case epoch.Wait:
		if a.generating(k) {
			return "generating", a.progress(k)
		}
		if len(action.Missing) > 0 {
			action.Why += "; " + a.whyMissing(action.Missing)
		}
		return "waiting", action.Why
	case epoch.Fetch:
		return a.bornElsewhere(ctx, k, v)
	case epoch.Generate:
		a.generate(ctx, k, action.Number)
		return "generating", a.progress(k)
	case epoch.Vote:
		err = a.vote(ctx, k, v, action.Choice)
	case epoch.Certify:
		err = a.certify(ctx, k, v, action.Choice)
	}
	if err != nil {
		return "waiting", err.Error()
	}
	a.nudge()
	return "generating", "the hosts commit the new shares"
}

func (a *Agent) unbornState(k *key, v *vault.Vault) *epoch.Unborn {
	k.mu.Lock()
	defer k.mu.Unlock()
	u := &epoch.Unborn{
		Self: a.self, Holders: k.holders(), Entry: k.digest(), Roster: a.roster().Version,
		Generate: k.entry().Generate && len(k.entry().PublicKey) == 0,
		Views:    map[protocol.HostID]epoch.View{},
	}
	for h, view := range k.views {
		if h == a.self {
			view.Staged = slices.DeleteFunc(slices.Clone(view.Staged), func(s epoch.Staged) bool {
				made, _ := v.Origin(k.id, s.Number)
				return made.Parent != [32]byte{}
			})
		}
		if said := k.statements[h]; h != a.self && view.Voted != nil && said.about != *view.Voted {
			view.Voted = nil // a vote counts with its signature
		}
		u.Views[h] = view
	}
	return u
}

// changedUnborn is what to do about a key whose entry changed before it was born, as far
// as this host knows. If it voted, the others may have the certificate.
func (a *Agent) changedUnborn(k *key, record vault.Record) (name, detail string) {
	const changed = "the key's hosts, quorum or identities changed in the roster before it was born; put them back, or raise its `incarnation`"
	from := k.sayActive(a.self)
	if record.Voted == nil || len(from) == 0 {
		return "refused", changed
	}
	a.want(k, from)
	return "refused", fmt.Sprintf("host %s says that the key exists; fetching its certificate. If there is none: %s", strings.Trim(fmt.Sprintf("%q", from), "[]"), changed)
}

// sayActive lists the other hosts that say that the key exists.
func (k *key) sayActive(self protocol.HostID) (hosts []protocol.HostID) {
	k.mu.Lock()
	defer k.mu.Unlock()
	for h, view := range k.views {
		if view.Active && h != self {
			hosts = append(hosts, h)
		}
	}
	slices.Sort(hosts)
	return hosts
}

// bornElsewhere is what to do about a key that exists, as others say, and of which this
// host has no certificate: it missed the birth, lost its share, or is new to the key.
func (a *Agent) bornElsewhere(ctx context.Context, k *key, v *vault.Vault) (name, detail string) {
	from := k.sayActive(a.self)
	k.mu.Lock()
	n := k.known
	k.mu.Unlock()
	hosts := strings.Trim(fmt.Sprintf("%q", from), "[]")
	record, _ := v.Record(k.id)
	if n == nil {
		a.want(k, from)
	}
	switch {
	case len(record.Staged) > 0 && !reshared(v, record):
		return "waiting", fmt.Sprintf("fetching the key's certificate from host %s", hosts)
	case n == nil && len(record.Staged) == 0:
		if record.Entry == k.digest() || len(k.entry().PublicKey) == 0 {
			return "lost", fmt.Sprintf("host %s says that the key exists, and this host holds no share of it: the share was lost, or the host is new to the key; nothing is generated in its place; pin `public_key` in the roster, and the others deal it a share", hosts)
		}
		return "waiting", fmt.Sprintf("host %s says that the key exists; fetching its certificate", hosts)
	}
	return a.exists(ctx, k, v)
}

// vote makes this host's word durable and gives it.
func (a *Agent) vote(ctx context.Context, k *key, v *vault.Vault, choice epoch.Staged) error {
	err := v.Vote(ctx, k.id, choice.Number, choice.Output)
	if errors.Is(err, vault.ErrDamaged) { // no vote, no certificate: another attempt is to follow
		err = errors.Join(err, v.Drop(ctx, []vault.Drop{{Key: k.id, Number: choice.Number}}))
		record, _ := v.Record(k.id)
		a.see(k, v, record)
		a.announce(k)
	}
	if err != nil {
		return fmt.Errorf("voting for epoch %s of key %q: %w", choice.Number, k.id.Name, err)
	}
	a.log.Info("voted", "key", k.id.Name, "epoch", choice.Number.String())
	k.callOff() // who voted joins no other generation
	record, _ := v.Record(k.id)
	a.see(k, v, record)
	a.announce(k)
	return nil
}

// certify puts the certificate together and takes up the epoch.
func (a *Agent) certify(ctx context.Context, k *key, v *vault.Vault, choice epoch.Staged) error {
	public, err := v.Public(k.id, choice.Number)
	if err != nil {
		return err
	}
	made, _ := v.Origin(k.id, choice.Number)
	var statements []epoch.Statement
	k.mu.Lock()
	for _, h := range k.holders() {
		statements = append(statements, k.statements[h].Statement)
	}
	k.mu.Unlock()
	return a.adopt(ctx, k, v, epoch.NewCertificate(k.subject(a.roster().Fleet, choice, made), public, statements))
}

// ownView is what this host says of a key.
func (a *Agent) ownView(k *key, r vault.Record) epoch.View {
	k.mu.Lock()
	damaged := k.damage != nil
	k.mu.Unlock()
	view := epoch.View{Heard: true, Entry: k.digest(), Active: r.Holds(r.Active) && !damaged, Number: r.Active}
	if act := k.active.Load(); act != nil {
		view.Certificate = act.id
	}
	for _, s := range r.Staged {
		if s.Number.Compare(r.Active) > 0 {
			view.Staged = append(view.Staged, epoch.Staged{Number: s.Number, Output: s.Output})
		}
	}
	if r.Voted != nil && r.Voted.Number.Compare(r.Active) > 0 {
		view.Voted = &epoch.Staged{Number: r.Voted.Number, Output: r.Voted.Output}
	}
	return view
}

// said is a host's statement, and what it is about.
type said struct {
	epoch.Statement
	about epoch.Staged
	entry [32]byte // of the roster, for which it was made
}

// see enters this host's own view, with a statement if it voted.
func (a *Agent) see(k *key, v *vault.Vault, record vault.Record) {
	view := a.ownView(k, record)
	k.mu.Lock()
	before, looked := k.views[a.self]
	k.views[a.self] = view
	have := k.statements[a.self]
	k.mu.Unlock()
	if looked && before.Entry != view.Entry {
		defer a.announce(k) // others wait until all have the roster
	}
	if view.Voted == nil || have.about == *view.Voted {
		return
	}
	made, ok := v.Origin(k.id, view.Voted.Number)
	if !ok {
		return
	}
	subject := k.subject(a.roster().Fleet, *view.Voted, made)
	var err error
	if have.Statement, err = subject.Sign(a.self, a.identity); err != nil {
		a.log.Error("signing a statement", "key", k.id.Name, "error", err)
		return // said again at the next look
	}
	have.about, have.entry = *view.Voted, made.Entry
	k.mu.Lock()
	k.statements[a.self] = have
	k.mu.Unlock()
}
