package agent

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"time"

	"conseal/agent/epoch"
	"conseal/agent/peer/peerpb"
	"conseal/agent/vault"
	"conseal/internal/failpoint"
	"conseal/protocol"
	"conseal/protocol/dealing"
)

// opReshare is the operation of a session that gives a key new shares.
const opReshare = "reshare"

// leadAfter is what each host that may lead gives those before it, after which it takes
// them for silent.
const leadAfter = 5 * time.Second

// uncalledEvery is how often another host may lead a new epoch that the roster does not
// call for, after the first that limits.epochs_per_peer allows: a TPM's NV memory bears
// two roots an hour for some five years.
const uncalledEvery = time.Hour

// born is what [epoch.Renew] decides on.
func (a *Agent) born(k *key, v *vault.Vault) *epoch.Born {
	fits := a.fitting(k, v)
	record, _ := v.Record(k.id)
	k.mu.Lock()
	defer k.mu.Unlock()
	b := &epoch.Born{
		Self: a.self, Base: k.known.base(), Holders: k.holders(), Entry: k.digest(), Roster: a.roster().Version,
		Dealers: slices.DeleteFunc(k.known.dealers(k), func(h protocol.HostID) bool { return k.cheats[h] }),
		Reach:   record.Highest().Attempt + maxJump + k.reach,
		Views:   map[protocol.HostID]epoch.View{},
	}
	for h, view := range k.views {
		if h == a.self {
			view.Staged = fits
		} else if said := k.statements[h]; view.Voted != nil && (said.about != *view.Voted || said.entry != k.digest()) {
			view.Voted = nil // a vote counts with its signature
		}
		b.Views[h] = view
	}
	b.Due = b.Base.Entry != b.Entry || k.asked == b.Base.Certificate || k.age() >= 1
	return b
}

// fitting lists the staged shares that were dealt for the roster's entry.
func (a *Agent) fitting(k *key, v *vault.Vault) (fits []epoch.Staged) {
	k.mu.Lock()
	staged := k.views[a.self].Staged
	k.mu.Unlock()
	for _, s := range staged {
		if made, ok := v.Origin(k.id, s.Number); ok && made.Entry == k.digest() {
			fits = append(fits, s)
		}
	}
	return fits
}

// age is how old the shares are, as a part of the age that the roster allows them; k.mu
// is held.
func (k *key) age() float64 {
	every := time.Duration(k.entry().Refresh)
	if every <= 0 || k.known == nil || k.since.IsZero() {
		return 0
	}
	return float64(time.Since(k.since)) / float64(every)
}

// nearlyDue is the age at which another host's clock may say that a refresh is due.
const nearlyDue = 0.9

// mayLead refuses a host that has led too many epochs here that this host's roster does
// not call for. It returns what to do when another was led.
func (a *Agent) mayLead(from protocol.HostID, k *key, v *vault.Vault) (led func(), err error) {
	due := a.born(k, v).Due
	k.mu.Lock()
	due = due || k.age() > nearlyDue
	k.mu.Unlock()
	if due {
		return func() {}, nil
	}
	limit := a.uncalled.limiter(from)
	if left := limit.Tokens(); left < 1 {
		next := time.Duration((1 - left) * float64(uncalledEvery)).Round(time.Second)
		return nil, a.refuse(reasonBusy, "host %q has led more new epochs than `limits.epochs_per_peer` = %d that this host's roster does not call for: it may lead the next in %s; `conseal key refresh %s` on this host makes one now",
			from, a.config.Limits.EpochsPerPeer, next, k.id.Name)
	}
	return func() { limit.Reserve() }, nil // into debt, if it leads epochs of several keys at a time
}

// renew takes a key that exists a step further: to its next epoch if one is due, and
// out of this host if it is no holder any more. It says how that stands, for people;
// "" if nothing is wanted.
func (a *Agent) renew(ctx context.Context, k *key, v *vault.Vault) string {
	b := a.born(k, v)
	ahead := b.Ahead()
	a.want(k, ahead)
	action := epoch.Renew(b)
	k.waitsFor(action.Missing)
	var err error
	switch action.Step {
	case epoch.Settled:
		if len(ahead) > 0 {
			return fmt.Sprintf("%q say that the key is at a later epoch than %s; asking for its certificate", ahead, b.Base.Number)
		}
		return ""
	case epoch.Wait:
		if a.generating(k) {
			return a.progress(k)
		}
		if len(action.Missing) > 0 {
			action.Why += "; " + a.whyMissing(action.Missing)
		}
		return action.Why
	case epoch.Vote:
		err = a.vote(ctx, k, v, action.Choice)
	case epoch.Certify:
		err = a.certify(ctx, k, v, action.Choice)
	case epoch.Lead:
		a.leadReshare(ctx, k, action)
		return a.progress(k)
	}
	if err != nil {
		return err.Error()
	}
	a.nudge()
	return "the hosts commit the new shares"
}

// leadReshare starts a resharing, if it is this host's turn.
func (a *Agent) leadReshare(ctx context.Context, k *key, action epoch.Action) {
	k.mu.Lock()
	if k.idle.IsZero() {
		k.idle = time.Now()
	}
	turn := k.idle.Add(time.Duration(action.Rank) * leadAfter)
	if k.asked == k.known.base().Certificate {
		turn = time.Time{} // a person asked here
	}
	if turn.Before(k.retry.after) {
		turn = k.retry.after
	}
	k.mu.Unlock()
	if wait := time.Until(turn); wait > 0 {
		time.AfterFunc(wait, a.nudge)
		return
	}
	if !k.birth.TryLock() {
		return
	}
	a.tasks.Go(func() {
		defer k.birth.Unlock()
		err := a.runLead(ctx, k, action.Number)
		k.mu.Lock()
		k.idle = time.Now()
		switch {
		case err == nil:
			k.retry = retry{after: time.Now().Add(stagingTime)}
		case !errors.Is(err, errSuperseded):
			k.retry.fail(err)
			k.reach += maxJump // who refused may have said how far it is
		}
		time.AfterFunc(time.Until(k.retry.after), a.nudge)
		k.mu.Unlock()
		if err != nil && ctx.Err() == nil {
			a.log.Warn("resharing failed", "key", k.id.Name, "epoch", action.Number.String(), "error", err)
		}
		a.nudge()
	})
}

// refresh has this host start new shares in place of an epoch.
func (k *key) refresh(act *active) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.asked, k.retry = act.id, retry{}
}

// resharing is one session that gives a key new shares, as its hosts agree on it.
type resharing struct {
	base    *known
	entry   [32]byte
	dealers []protocol.HostID
	holders []protocol.HostID
	number  vault.Number
	all     []protocol.HostID // dealers and holders
}

func newResharing(k *key, base *known, dealers []protocol.HostID, n vault.Number) *resharing {
	holders := k.holders()
	return &resharing{base: base, entry: k.digest(), dealers: dealers, holders: holders, number: n,
		all: slices.Compact(slices.Sorted(slices.Values(slices.Concat(dealers, holders))))}
}

// binding is what the hosts of the session agree on: Request is the digest of who deals
// and who gets shares.
func (r *resharing) binding(k *key, nonce [32]byte) protocol.Binding {
	b := k.binding(opReshare, r.number, r.all, nonce)
	b.Certificate, b.Entry = r.base.id, r.entry
	h := sha256.New()
	h.Write([]byte("conseal reshare request v1"))
	for _, hosts := range [][]protocol.HostID{r.dealers, r.holders} {
		h.Write(binary.BigEndian.AppendUint32(nil, uint32(len(hosts))))
		for _, host := range hosts {
			h.Write(binary.BigEndian.AppendUint32(nil, uint32(len(host))))
			h.Write([]byte(host))
		}
	}
	b.Request = [32]byte(h.Sum(nil))
	return b
}

// runLead leads a resharing: it opens the session at all its hosts, waits until each is
// ready, lets them go and takes part.
func (a *Agent) runLead(ctx context.Context, k *key, n vault.Number) error {
	v := a.vault.Load()
	b := a.born(k, v)
	if again := epoch.Renew(b); again.Step != epoch.Lead || again.Number != n {
		return errSuperseded
	}
	k.mu.Lock()
	base := k.known
	k.mu.Unlock()
	r := newResharing(k, base, a.pickDealers(k, b), n)
	if err := a.mayReshare(k, v, r); err != nil {
		return err
	}
	var nonce [32]byte
	rand.Read(nonce[:])
	binding := r.binding(k, nonce)
	encoded, err := base.certificate.Encode()
	if err != nil {
		return err
	}
	ctx, end := a.startGeneration(ctx, k)
	defer end()
	box, err := a.sessions.open(binding.ID(), a.self, r.all)
	if err != nil {
		return err
	}
	defer a.sessions.close(box)
	k.deals(box.id) // another dealer may lead it again
	a.log.Info("resharing", "key", k.id.Name, "epoch", n.String(), "session", box.id.String(), "dealers", r.dealers, "holders", r.holders)
	err = a.startAll(ctx, box, func(protocol.HostID) *peerpb.Open {
		return &peerpb.Open{Binding: wireBinding(&binding), Dealers: names(r.dealers), Certificate: encoded}
	})
	if err != nil {
		hangUp(box, a.net.Send, err)
	} else {
		err = a.runReshare(ctx, k, v, r, box, nil)
	}
	a.blameReshare(k, r, box.id, err)
	return err
}

// pickDealers chooses a quorum of those that can deal: this host, then such as did not
// fail lately.
func (a *Agent) pickDealers(k *key, b *epoch.Born) []protocol.HostID {
	able := b.Able()
	k.prefer(able, a.self)
	dealers := able[:min(len(able), b.Base.Quorum)]
	slices.Sort(dealers)
	return dealers
}

// mayReshare checks, under k.birth, that nothing here forbids a resharing.
func (a *Agent) mayReshare(k *key, v *vault.Vault, r *resharing) error {
	refuse := a.refuse
	if v == nil {
		return refuse(reasonNotReady, "its vault is not open")
	}
	if state := k.entry().State; state == "deleted" {
		return refuse(reasonRefused, "the key is deleted by its roster")
	}
	if err := a.buried(k, v); err != nil {
		return err
	}
	record, _ := v.Record(k.id)
	highest := record.Highest()
	k.mu.Lock()
	known := k.known.number()
	vain, pause := k.pause(&record)
	k.mu.Unlock()
	n := r.number
	switch {
	case known.Compare(record.Active) < 0 && len(k.entry().PublicKey) == 0: // else it could be dealt another key
		return refuse(reasonNotReady, "it has not read its certificate of epoch %s", record.Active)
	case n.Compare(highest) <= 0:
		return refuse(reasonRefused, "it has epoch %s already", highest)
	case n.Roster > a.roster().Version: // else the next roster's epochs could get no higher numbers
		return refuse(reasonNotReady, "epoch %s is of a later roster than its version %d", n, a.roster().Version)
	case n.Attempt > lastAttempt:
		return refuse(reasonRefused, "the numbers of roster version %d are used up: a roster with a higher version begins anew", n.Roster)
	case pause > 0:
		return refuse(reasonBusy, "%d attempts at the next epoch came to nothing: it takes part in another in %s, or when its roster has another entry for the key", vain, pause.Round(time.Second))
	case slices.Contains(r.holders, a.self) && record.Active == vault.Number{} && len(k.entry().PublicKey) == 0:
		return refuse(reasonRefused, "it holds no share of this key yet: set `public_key` in the roster, so that it cannot be dealt another key")
	}
	return nil
}

// attemptsAtOnce is how many attempts at a key's next epoch that come to nothing follow
// each other before this host pauses, for a second and then each time for twice as long.
const attemptsAtOnce = 8

// pause is how long this host takes part in no attempt at the next epoch, since so many
// came to nothing. One lying holder can bring that about, and each time this host may have
// voted: that took a root, and left a share that it must keep, of which the vault takes
// [vault.MaxStaged]. k.mu is held.
func (k *key) pause(record *vault.Record) (vain int, pause time.Duration) {
	for _, s := range record.Staged {
		if s.Number.Compare(record.Active) > 0 {
			vain++
		}
	}
	if vain < attemptsAtOnce {
		return vain, 0
	}
	return vain, time.Until(k.staged.Add(time.Second << min(vain-attemptsAtOnce, 32)))
}

// joinReshare takes part in a resharing that a dealer leads.
func (a *Agent) joinReshare(ctx context.Context, from protocol.HostID, k *key, b *protocol.Binding, open *peerpb.Open, box *inbox) error {
	c, err := epoch.Decode(open.Certificate)
	if err != nil {
		return a.refuse(reasonDiffers, "%v", err)
	}
	base, err := a.know(k, c)
	if err != nil {
		return a.refuse(reasonDiffers, "%v", err)
	}
	var dealers []protocol.HostID
	for _, d := range open.Dealers {
		dealers = append(dealers, protocol.HostID(d))
	}
	r := newResharing(k, base, dealers, vault.Number{Roster: b.Epoch[0], Attempt: b.Epoch[1]})
	mine := r.binding(k, b.Nonce)
	if text := mine.Differs(b); text != "" {
		return a.refuse(reasonDiffers, "we differ on %s", text)
	}
	if !slices.Contains(dealers, from) {
		return a.refuse(reasonRefused, "host %q leads a resharing in which it does not deal", from)
	}
	if err := a.checkBase(k, r, from); err != nil {
		return err
	}
	k.callOff()
	k.birth.Lock()
	defer k.birth.Unlock()
	v := a.vault.Load()
	if err := a.mayReshare(k, v, r); err != nil {
		if v != nil { // the leader may have counted on something else
			record, _ := v.Record(k.id)
			a.see(k, v, record)
			a.tell(from, k)
		}
		return err
	}
	led, err := a.mayLead(from, k, v)
	if err != nil {
		return err
	}
	if slices.Contains(dealers, a.self) && (a.ledger.dealt[k.id.Name].sessions[box.id.String()] || !k.deals(box.id)) {
		return a.refuse(reasonRefused, "it has dealt under this session's id before")
	}
	ctx, end := a.startGeneration(ctx, k)
	defer end()
	early, err := a.waitLeader(ctx, from, box)
	if err != nil {
		return err
	}
	a.log.Info("resharing", "key", k.id.Name, "epoch", r.number.String(), "session", box.id.String(), "leader", from, "dealers", r.dealers, "holders", r.holders)
	if err = a.runReshare(ctx, k, v, r, box, early); err == nil {
		led()
	}
	a.blameReshare(k, r, box.id, err)
	return err
}

// deals notes that this host deals in a session, once since it started; the audit log has
// what was before. Who had it sign two dealings under one id could prove that it cheats.
func (k *key) deals(id protocol.SessionID) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.dealt[id] {
		return false
	}
	k.dealt[id] = true
	return true
}

// checkBase checks the epoch that others want to reshare from. A host that knows a
// higher one sends it.
func (a *Agent) checkBase(k *key, r *resharing, from protocol.HostID) error {
	refuse := a.refuse
	s := &r.base.certificate.Subject
	if err := r.base.certificate.VerifySome(k.pins(r.dealers)); err != nil {
		return refuse(reasonDiffers, "the base: %v", err)
	}
	if len(r.dealers) != r.base.output.quorum {
		return refuse(reasonDiffers, "%d dealers for a quorum of %d", len(r.dealers), r.base.output.quorum)
	}
	if pinned := k.entry().PublicKey; len(pinned) > 0 && !bytes.Equal(pinned, r.base.output.pin) {
		return refuse(reasonRefused, "its roster pins another public key")
	}
	k.mu.Lock()
	own := k.known
	k.mu.Unlock()
	switch {
	case own == nil:
	case !bytes.Equal(own.output.spki, r.base.output.spki):
		return refuse(reasonRefused, "the base has another public key")
	case own.number().Compare(s.Number) > 0:
		a.offerKnown(k, from)
		return refuse(reasonBehind, "host %q is behind: the key is at epoch %s, the base is %s", from, own.number(), s.Number)
	case own.number() == s.Number && own.id != r.base.id:
		return refuse(reasonRefused, "it has another certificate of epoch %s", s.Number)
	}
	if act := k.active.Load(); slices.Contains(r.dealers, a.self) && (act == nil || act.id != r.base.id) {
		return refuse(reasonNotReady, "it does not have its share of epoch %s ready", s.Number)
	}
	return nil
}

// runReshare drives the protocol and stages what came out at a holder.
func (a *Agent) runReshare(ctx context.Context, k *key, v *vault.Vault, r *resharing, box *inbox, early []event) error {
	failpoint.Hit("reshare/before-start")
	var share shareholder
	if slices.Contains(r.dealers, a.self) {
		act := k.active.Load()
		if act == nil || act.id != r.base.id {
			return a.refuse(reasonNotReady, "it does not have its share of the base any more")
		}
		lent, done, err := act.share.borrow(ctx)
		if err != nil {
			hangUp(box, a.net.Send, err)
			return err
		}
		defer done()
		share = lent
		logged := a.ledger.Append(entry{Event: "reshare", Key: k.id.Name, Epoch: r.base.number().String(), Session: box.id.String(), Signers: names(r.dealers)})
		if err := logged(ctx); err != nil { // before anything is dealt
			hangUp(box, a.net.Send, err)
			return err
		}
	}
	g, err := k.scheme.reshare(a.reshareConfig(k, r, box.id), share)
	if err != nil {
		hangUp(box, a.net.Send, err)
		return err
	}
	defer g.session.Close()
	a.watchGeneration(k, r.number, box)
	if err := drive(ctx, a.self, g.session, box, a.net.Send, early); err != nil {
		return err
	}
	failpoint.Hit("reshare/done")
	if !slices.Contains(r.holders, a.self) {
		return nil
	}
	public, made, err := g.result()
	if err != nil {
		return err
	}
	defer made.Wipe()
	return a.stage(ctx, k, v, r.number, vault.Origin{Parent: r.base.id, Entry: r.entry}, public, made)
}

// reshareConfig is what the session is made of, for this host.
func (a *Agent) reshareConfig(k *key, r *resharing, id protocol.SessionID) reshareConfig {
	return reshareConfig{old: r.base.certificate.Public, Plan: dealing.Plan{
		Session: id, Self: a.self, Dealers: r.dealers, Holders: r.holders, Quorum: k.entry().Quorum,
		Sign: func(digest [32]byte) ([]byte, error) { return a.identity.Sign(rand.Reader, digest[:], crypto.SHA256) },
		Verify: func(host protocol.HostID, digest [32]byte, signature []byte) error {
			st, ok := r.base.statement(k, host)
			if !ok {
				return fmt.Errorf("the roster does not pin the identity with which %q holds the key", host)
			}
			spki, err := x509.ParsePKIXPublicKey(st.PublicKey)
			if err != nil {
				return err
			}
			if ec, ok := spki.(*ecdsa.PublicKey); !ok || !ecdsa.VerifyASN1(ec, digest[:], signature) {
				return errors.New("wrong signature")
			}
			return nil
		},
	}}
}

// blameReshare remembers whose fault it was that a resharing failed. A proof counts for
// good, also one that another host found.
func (a *Agent) blameReshare(k *key, r *resharing, id protocol.SessionID, err error) {
	if err == nil {
		return
	}
	var proof *dealing.Complaint
	var party *partyError
	switch {
	case errors.As(err, &proof):
	case errors.As(err, &party) && len(party.complaint) > 0:
		c, bad := dealing.DecodeComplaint(party.complaint)
		if bad == nil {
			bad = k.scheme.verifyComplaint(a.reshareConfig(k, r, id), c)
		}
		if bad != nil {
			a.complain("a complaint that proves nothing", "peer", party.host, "key", k.id.Name, "error", bad)
			break
		}
		proof = c
	}
	if proof != nil {
		a.log.Error("a dealer cheated, and this is proven", "key", k.id.Name, "epoch", r.number.String(), "dealer", proof.Dealer, "proof", fmt.Sprintf("%x", proof.Encode()))
		k.mu.Lock()
		k.cheats[proof.Dealer] = true
		k.mu.Unlock()
		return
	}
	k.blame(err, a.self, map[protocol.HostID]bool{})
}
