package agent

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"conseal/agent/epoch"
	"conseal/agent/peer/peerpb"
	"conseal/agent/vault"
	"conseal/protocol"
)

// reconcileEvery is how often a key that is not as the roster wants it is looked
// at again, and said again to its hosts, when nothing happens.
const reconcileEvery = 2 * time.Second

// reconcile makes what the roster says. It is the only goroutine that votes,
// activates and drops.
func (a *Agent) reconcile(ctx context.Context) {
	tick := time.NewTicker(reconcileEvery)
	defer tick.Stop()
	for {
		a.openVault(ctx)
		a.reseal(ctx)
		for _, k := range a.sorted {
			if ctx.Err() != nil {
				return
			}
			a.settle(ctx, k)
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			a.announceUnborn()
		case <-a.wake:
		}
	}
}

// reseal has all shares rest as the roster says, once, under one root: a TPM takes few
// in its life. What fails is tried again, and said, when its key is taken up.
func (a *Agent) reseal(ctx context.Context) {
	v := a.vault.Load()
	if v == nil || a.resealed {
		return
	}
	a.resealed = true
	want := map[vault.KeyID]vault.Class{}
	for _, k := range a.sorted {
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

// say enters the condition of a key, and logs it if it is another than before.
func (a *Agent) say(k *key, name, detail string) {
	if k.setCondition(name, detail) {
		a.log.Info("key", "key", k.id.Name, "condition", name, "detail", detail)
	}
}

// step does what comes next for a key and returns the condition it is in.
func (a *Agent) step(ctx context.Context, k *key) (name, detail string) {
	if k.entry.State != "active" {
		return k.entry.State, "by the roster"
	}
	if k.active.Load() != nil {
		return a.ready(k)
	}
	v := a.vault.Load()
	if v == nil {
		return "sealed", a.vaultProblem()
	}
	if older, ok := bornBefore(v, k.id); ok {
		return "refused", fmt.Sprintf("the roster declares incarnation %d, but incarnation %d of this name was born and its share is here; a key that exists is not made anew: set `incarnation = %d` again",
			k.id.Incarnation, older, older)
	}
	record, _ := v.Record(k.id)
	if record.Active != (vault.Number{}) {
		return a.load(ctx, k, v)
	}
	if record.Entry != ([32]byte{}) && record.Entry != k.digest {
		return "refused", "the key's hosts, quorum or identities changed in the roster before it was born; put them back, or raise its `incarnation`"
	}
	a.see(k, a.ownView(k, record))
	return a.unborn(ctx, k, v)
}

func (a *Agent) ready(k *key) (name, detail string) {
	if err := k.active.Load().share.refusal(); err != nil {
		return "sealed", fmt.Sprintf("when it was used last, the hardware did not open this host's share: %v; it is asked again at each use", err)
	}
	live := k.live(a.self)
	if len(live) >= k.entry.Quorum {
		return "ready", ""
	}
	return "waiting", fmt.Sprintf("%d of %d hosts are there: %s", len(live), k.entry.Quorum, a.missing(k, live))
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

// load takes up the epoch that the vault has active.
func (a *Agent) load(ctx context.Context, k *key, v *vault.Vault) (name, detail string) {
	c, err := a.readCertificate(k, v)
	if err == nil {
		err = a.checkCertificate(k, c)
	}
	if err != nil {
		return "refused", err.Error()
	}
	if err := v.Reseal(ctx, map[vault.KeyID]vault.Class{k.id: k.class()}); err != nil {
		return "sealed", fmt.Sprintf("the roster says `open = %q`, and the share does not rest so yet: %v", k.entry.Open, err)
	}
	changed := func() {
		name, detail := a.ready(k)
		a.say(k, name, detail)
	}
	if err := k.activate(ctx, a.self, c, v, changed); err != nil {
		return "refused", err.Error()
	}
	act := k.active.Load()
	a.log.Info("key is active", "key", k.id.Name, "epoch", c.Subject.Number.String(), "certificate", fmt.Sprintf("%x", act.id[:8]))
	a.announce(k)
	return a.ready(k)
}

func (a *Agent) readCertificate(k *key, v *vault.Vault) (*epoch.Certificate, error) {
	encoded, err := v.Certificate(k.id)
	if err != nil {
		return nil, err
	}
	return epoch.Decode(encoded)
}

// checkCertificate refuses a certificate that is not about this key as the
// roster declares it.
func (a *Agent) checkCertificate(k *key, c *epoch.Certificate) error {
	s := &c.Subject
	switch {
	case s.Fleet != a.roster.Fleet || s.Key != k.id || s.Scheme != k.entry.Scheme:
		return fmt.Errorf("certificate is about key %q, incarnation %d, %s, of fleet %q", s.Key.Name, s.Key.Incarnation, s.Scheme, s.Fleet)
	case s.Entry != k.digest:
		return errors.New("certificate is for other hosts, identities or another quorum than the roster declares for this key")
	}
	if err := c.Verify(k.pins(a.roster)); err != nil {
		return err
	}
	out, err := k.scheme.inspect(c.Public)
	if err != nil {
		return err
	}
	if pinned := k.entry.PublicKey; len(pinned) > 0 && !bytes.Equal(pinned, out.pin) {
		return fmt.Errorf("the roster pins public key %s, the certificate is for %x", pinned, out.pin)
	}
	return nil
}

// unborn takes a step towards the key's birth.
func (a *Agent) unborn(ctx context.Context, k *key, v *vault.Vault) (name, detail string) {
	action := epoch.Next(a.unbornState(k))
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
		return a.fetch(k, v)
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

func (a *Agent) unbornState(k *key) *epoch.Unborn {
	k.mu.Lock()
	defer k.mu.Unlock()
	u := &epoch.Unborn{
		Self: a.self, Holders: k.holders, Entry: k.digest, Roster: a.roster.Version,
		Generate: k.entry.Generate && len(k.entry.PublicKey) == 0,
		Views:    map[protocol.HostID]epoch.View{},
	}
	for h, view := range k.views {
		if _, ok := k.statements[h]; !ok && h != a.self {
			view.Voted = nil // a vote counts with its signature
		}
		u.Views[h] = view
	}
	return u
}

// fetch asks for the certificate that other hosts say they have: all of them, as
// one may lie and another may not.
func (a *Agent) fetch(k *key, v *vault.Vault) (name, detail string) {
	var from []string
	k.mu.Lock()
	for _, h := range k.holders {
		if k.views[h].Active && h != a.self {
			from = append(from, strconv.Quote(string(h)))
			f := &peerpb.CertificateRequest{Key: k.id.Name, Incarnation: k.id.Incarnation}
			_ = a.net.Send(h, &peerpb.Frame{Body: &peerpb.Frame_Want{Want: f}}) // asked again if it is lost
		}
	}
	k.mu.Unlock()
	hosts := strings.Join(from, ", ")
	if record, _ := v.Record(k.id); len(record.Staged) == 0 {
		return "lost", fmt.Sprintf("host %s says that the key exists, and this host holds no share of it: the share was lost; nothing is generated in its place", hosts)
	}
	return "waiting", fmt.Sprintf("fetching the key's certificate from host %s", hosts)
}

// adopt takes a certificate that a peer sent or that was put together here.
func (a *Agent) adopt(ctx context.Context, k *key, v *vault.Vault, c *epoch.Certificate) error {
	if err := a.checkCertificate(k, c); err != nil {
		return err
	}
	encoded, err := c.Encode()
	if err != nil {
		return err
	}
	if err := v.Activate(ctx, k.id, c.Subject.Number, encoded); err != nil {
		return fmt.Errorf("activating epoch %s of key %q: %w", c.Subject.Number, k.id.Name, err)
	}
	return a.dropUnborn(ctx, k, v, c.Subject.Number)
}

// dropUnborn erases what earlier attempts at the key's birth left.
func (a *Agent) dropUnborn(ctx context.Context, k *key, v *vault.Vault, born vault.Number) error {
	var drop []vault.Drop
	for _, r := range v.Keys() {
		if r.Key.Name != k.id.Name || r.Key.Incarnation > k.id.Incarnation {
			continue
		}
		for _, s := range r.Staged {
			if r.Key != k.id || s.Number != born {
				drop = append(drop, vault.Drop{Key: r.Key, Number: s.Number})
			}
		}
	}
	if len(drop) == 0 {
		return nil
	}
	return v.Drop(ctx, drop)
}

// vote makes this host's word durable and gives it.
func (a *Agent) vote(ctx context.Context, k *key, v *vault.Vault, choice epoch.Staged) error {
	if err := v.Vote(ctx, k.id, choice.Number, choice.Output); err != nil {
		return fmt.Errorf("voting for epoch %s of key %q: %w", choice.Number, k.id.Name, err)
	}
	a.log.Info("voted", "key", k.id.Name, "epoch", choice.Number.String())
	k.callOff() // who voted joins no other generation
	record, _ := v.Record(k.id)
	a.see(k, a.ownView(k, record))
	a.announce(k)
	return nil
}

// certify puts the certificate together and takes up the epoch.
func (a *Agent) certify(ctx context.Context, k *key, v *vault.Vault, choice epoch.Staged) error {
	public, err := v.Public(k.id, choice.Number)
	if err != nil {
		return err
	}
	var statements []epoch.Statement
	k.mu.Lock()
	for _, h := range k.holders {
		statements = append(statements, k.statements[h])
	}
	k.mu.Unlock()
	return a.adopt(ctx, k, v, epoch.NewCertificate(k.subject(a.roster.Fleet, choice), public, statements))
}

// ownView is what this host says of a key.
func (a *Agent) ownView(k *key, r vault.Record) epoch.View {
	view := epoch.View{Heard: true, Entry: k.digest, Active: r.Active != (vault.Number{})}
	for _, s := range r.Staged {
		view.Staged = append(view.Staged, epoch.Staged{Number: s.Number, Output: s.Output})
	}
	if r.Voted != nil {
		view.Voted = &epoch.Staged{Number: r.Voted.Number, Output: r.Voted.Output}
	}
	return view
}

// see enters this host's own view, with a statement if it voted.
func (a *Agent) see(k *key, view epoch.View) {
	k.mu.Lock()
	_, signed := k.statements[a.self]
	k.views[a.self] = view
	k.mu.Unlock()
	if view.Voted == nil || signed {
		return
	}
	subject := k.subject(a.roster.Fleet, *view.Voted)
	statement, err := subject.Sign(a.self, a.identity)
	if err != nil {
		a.log.Error("signing a statement", "key", k.id.Name, "error", err)
		return // said again at the next look
	}
	k.mu.Lock()
	k.statements[a.self] = statement
	k.mu.Unlock()
}
