package agent

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/cenkalti/backoff/v5"

	"conseal/agent/epoch"
	"conseal/agent/peer/peerpb"
	"conseal/agent/vault"
	"conseal/internal/failpoint"
	"conseal/internal/secret"
	"conseal/protocol"
	"conseal/protocol/dealing"
)

// retry spaces the attempts of a key generation that fails. Its zero value lets
// the first start at once.
type retry struct {
	policy *backoff.ExponentialBackOff
	after  time.Time
	last   string // why the last attempt failed
}

func (r *retry) fail(err error) {
	if r.policy == nil {
		r.policy = backoff.NewExponentialBackOff()
		r.policy.InitialInterval, r.policy.MaxInterval = 200*time.Millisecond, 30*time.Second
	}
	r.after, r.last = time.Now().Add(r.policy.NextBackOff()), err.Error()
}

// maxJump bounds how far ahead of this host's own count a peer may set the number of a
// birth, or have this host set that of a later epoch, so that nobody uses the numbers up.
const maxJump = 1000

// lastAttempt is the highest that a later epoch may have. Who leads may go that far at
// once: a bound from what a host has itself would have hosts refuse all that follows
// where only others staged a share.
const lastAttempt = 1 << 62

// stagingTime is what the other holders get to stage their shares, after this host has
// staged its own, before it takes the attempt for lost and starts another.
const stagingTime = time.Second

var errSuperseded = errors.New("another attempt took its place")

// callOff ends a key generation that is under way here, if any.
func (k *key) callOff() {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.cancel != nil {
		k.cancel(errSuperseded)
	}
}

// generating tells whether shares of k are being made here.
func (a *Agent) generating(k *key) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.cancel != nil
}

// progress says for people how the generation stands.
func (a *Agent) progress(k *key) string {
	k.mu.Lock()
	defer k.mu.Unlock()
	switch {
	case k.cancel != nil && k.stage != "":
		return "the hosts run the key generation: " + k.stage
	case k.cancel != nil:
		return "the hosts run the key generation"
	case k.retry.last != "":
		return "the last attempt failed and another follows: " + k.retry.last
	}
	return "about to start"
}

// generate starts a key generation as its first holder.
func (a *Agent) generate(ctx context.Context, k *key, n vault.Number) {
	k.mu.Lock()
	wait := time.Until(k.retry.after)
	k.mu.Unlock()
	if wait > 0 || !k.birth.TryLock() {
		return
	}
	a.tasks.Go(func() {
		defer k.birth.Unlock()
		err := a.lead(ctx, k, n)
		if err == nil {
			k.mu.Lock()
			k.retry.after = time.Now().Add(stagingTime)
			time.AfterFunc(stagingTime, a.nudge)
			k.mu.Unlock()
		}
		if err != nil && !errors.Is(err, errSuperseded) {
			k.mu.Lock()
			k.retry.fail(err)
			time.AfterFunc(time.Until(k.retry.after), a.nudge)
			k.mu.Unlock()
			if ctx.Err() == nil {
				a.log.Warn("key generation failed", "key", k.id.Name, "epoch", n.String(), "error", err)
			}
		}
		a.nudge()
	})
}

// lead runs a key generation that this host starts: it opens the session at all
// holders, waits until each is ready, lets them go and takes part.
func (a *Agent) lead(ctx context.Context, k *key, n vault.Number) error {
	v, record, err := a.mayGenerate(ctx, k, n)
	if err != nil {
		return err
	}
	// What was decided on may have changed since; what is decided on now is what
	// each holder is told.
	counted := a.unbornState(k, v)
	counted.Views[a.self] = a.ownView(k, record)
	if again := epoch.Next(counted); again.Step != epoch.Generate || again.Number != n {
		return nil
	}
	var nonce [32]byte
	rand.Read(nonce[:])
	b := k.binding("keygen", n, k.holders(), nonce)
	ctx, end := a.startGeneration(ctx, k)
	defer end()
	box, err := a.sessions.open(b.ID(), a.self, k.holders())
	if err != nil {
		return err
	}
	defer a.sessions.close(box)
	a.log.Info("key generation", "key", k.id.Name, "epoch", n.String(), "session", box.id.String(), "hosts", k.holders())
	err = a.startAll(ctx, box, func(h protocol.HostID) *peerpb.Open {
		open := &peerpb.Open{Binding: wireBinding(&b)}
		for _, s := range counted.Views[h].Staged {
			open.Staged = append(open.Staged, staged(s))
		}
		return open
	})
	if err != nil {
		hangUp(box, a.net.Send, err)
		return err
	}
	return a.runKeygen(ctx, k, v, n, box, nil)
}

// startAll opens a session at its parties, telling each what it is to know, waits until
// each is ready and lets them go.
func (a *Agent) startAll(ctx context.Context, box *inbox, open func(protocol.HostID) *peerpb.Open) error {
	for _, h := range box.parties {
		if err := a.net.Send(h, &peerpb.Frame{Body: &peerpb.Frame_Open{Open: open(h)}}); err != nil {
			return &partyError{host: h, text: err.Error()}
		}
	}
	if _, err := gather(ctx, box, box.parties); err != nil {
		return err
	}
	for _, h := range box.parties {
		if err := a.net.Send(h, readyFrame(box.id)); err != nil {
			return &partyError{host: h, text: err.Error()}
		}
	}
	return nil
}

// startGeneration marks the generation as under way; a later one cancels it.
func (a *Agent) startGeneration(ctx context.Context, k *key) (context.Context, func()) {
	ctx, stop := context.WithTimeoutCause(ctx, a.config.Limits.KeygenDeadline, errors.New("the key generation took too long"))
	ctx, cancel := context.WithCancelCause(ctx)
	k.mu.Lock()
	k.cancel, k.stage = cancel, ""
	k.mu.Unlock()
	return ctx, func() {
		k.mu.Lock()
		k.cancel, k.stage = nil, ""
		k.mu.Unlock()
		cancel(nil)
		stop()
	}
}

// mayGenerate checks, under k.birth, that nothing here forbids a generation of
// number n, and notes for which entry of the roster it is.
func (a *Agent) mayGenerate(ctx context.Context, k *key, n vault.Number) (*vault.Vault, vault.Record, error) {
	v := a.vault.Load()
	switch {
	case v == nil:
		return nil, vault.Record{}, &partyError{host: a.self, reason: reasonNotReady, text: "its vault is not open"}
	case k.entry().State != "active" || !k.entry().Generate || len(k.entry().PublicKey) > 0:
		return nil, vault.Record{}, &partyError{host: a.self, reason: reasonRefused, text: "its roster does not mark the key to be generated"}
	}
	if err := a.buried(k, v); err != nil {
		return nil, vault.Record{}, err
	}
	if k.deletedBy() != "" || v.HasReceipts(k.id.Name) {
		return nil, vault.Record{}, a.refuse(reasonRefused, "it has another host's receipt for the deletion of a key of this name, and a name is never used again")
	}
	if _, born := bornBefore(v, k.id); born {
		return nil, vault.Record{}, &partyError{host: a.self, reason: reasonRefused, text: "an earlier incarnation of the key exists"}
	}
	if err := v.See(ctx, k.id, k.digest()); err != nil {
		return nil, vault.Record{}, fmt.Errorf("noting the roster's entry of key %q: %w", k.id.Name, err)
	}
	record, _ := v.Record(k.id)
	switch {
	case record.Active != (vault.Number{}):
		return nil, record, &partyError{host: a.self, reason: reasonRefused, text: "it holds a share of this key already"}
	case record.Voted != nil:
		return nil, record, &partyError{host: a.self, reason: reasonRefused, text: "it voted for an earlier generation of this key"}
	case n.Roster > a.roster().Version+maxJump:
		return nil, record, &partyError{host: a.self, reason: reasonRefused, text: "the number of the epoch jumps too far ahead"}
	}
	highest := vault.Number{Roster: n.Roster}
	for _, s := range record.Staged {
		if s.Number.Compare(n) >= 0 {
			return nil, record, &partyError{host: a.self, reason: reasonRefused, text: fmt.Sprintf("it has staged epoch %s already", s.Number)}
		}
		if s.Number.Compare(highest) > 0 {
			highest = s.Number
		}
	}
	if n.Attempt > highest.Attempt+maxJump {
		return nil, record, &partyError{host: a.self, reason: reasonRefused, text: "the number of the epoch jumps too far ahead"}
	}
	return v, record, nil
}

// joinKeygen takes part in a key generation that the first holder opened.
func (a *Agent) joinKeygen(ctx context.Context, from protocol.HostID, k *key, b *protocol.Binding, counted []*peerpb.Staged, box *inbox) error {
	if from != k.holders()[0] {
		return &partyError{host: a.self, reason: reasonRefused, text: fmt.Sprintf("host %q starts this key's generation", k.holders()[0])}
	}
	n := vault.Number{Roster: b.Epoch[0], Attempt: b.Epoch[1]}
	mine := k.binding("keygen", n, k.holders(), b.Nonce)
	if text := mine.Differs(b); text != "" {
		return &partyError{host: a.self, reason: reasonDiffers, text: "we differ on " + text}
	}
	k.callOff()
	k.birth.Lock()
	defer k.birth.Unlock()
	v, record, err := a.mayGenerate(ctx, k, n)
	if err != nil {
		return err
	}
	if err := agreeStaged(a.self, record, counted); err != nil {
		return err
	}
	ctx, end := a.startGeneration(ctx, k)
	defer end()
	early, err := a.waitLeader(ctx, from, box)
	if err != nil {
		return err
	}
	return a.runKeygen(ctx, k, v, n, box, early)
}

// waitLeader tells who leads a session that this host is ready, and waits until all are.
// It returns what others sent meanwhile. On an error the session is over.
func (a *Agent) waitLeader(ctx context.Context, leader protocol.HostID, box *inbox) ([]event, error) {
	if err := a.net.Send(leader, readyFrame(box.id)); err != nil {
		return nil, err
	}
	early, err := gather(ctx, box, []protocol.HostID{leader})
	if err != nil {
		hangUp(box, a.net.Send, err)
	}
	return early, err
}

// agreeStaged refuses to start a generation on a wrong count of what is staged
// here: an earlier number could become complete at the same time.
func agreeStaged(self protocol.HostID, record vault.Record, counted []*peerpb.Staged) error {
	same := len(counted) == len(record.Staged)
	for _, p := range counted {
		s, err := parseStaged(p)
		same = same && err == nil && slices.ContainsFunc(record.Staged, func(r vault.Staged) bool {
			return r.Number == s.Number && r.Output == s.Output
		})
	}
	if !same {
		return &partyError{host: self, reason: reasonNotReady, text: "it has staged other shares than were counted"}
	}
	return nil
}

// readyFrame is a step of round 0: "I am ready" to the first holder, "go" from it.
func readyFrame(id protocol.SessionID) *peerpb.Frame {
	return &peerpb.Frame{Body: &peerpb.Frame_Step{Step: &peerpb.Step{Session: id[:]}}}
}

// gather waits for a step of round 0 from each of hosts and returns what else
// came meanwhile.
func gather(ctx context.Context, box *inbox, hosts []protocol.HostID) (early []event, err error) {
	missing := map[protocol.HostID]bool{}
	for _, h := range hosts {
		missing[h] = true
	}
	for len(missing) > 0 {
		select {
		case <-ctx.Done():
			return nil, silent(ctx, box, missing)
		case ev := <-box.events:
			switch {
			case ev.err != nil:
				return nil, ev.err
			case ev.step.Round != 0:
				early = append(early, ev)
			default:
				delete(missing, ev.from)
			}
		}
	}
	return early, nil
}

// runKeygen drives the protocol and stages what came out.
func (a *Agent) runKeygen(ctx context.Context, k *key, v *vault.Vault, n vault.Number, box *inbox, early []event) error {
	failpoint.Hit("keygen/before-start")
	g, err := k.scheme.keygen(dealing.KeygenConfig{Session: box.id, Self: a.self, Holders: k.holders(), Quorum: k.entry().Quorum})
	if err != nil {
		hangUp(box, a.net.Send, err)
		return err
	}
	defer g.session.Close()
	a.watchGeneration(k, n, box)
	if err := drive(ctx, a.self, g.session, box, a.net.Send, early); err != nil {
		return err
	}
	failpoint.Hit("keygen/done")
	public, share, err := g.result()
	if err != nil {
		return err
	}
	defer share.Wipe()
	record, _ := v.Record(k.id) // with the entry that mayGenerate noted
	return a.stage(ctx, k, v, n, vault.Origin{Entry: record.Entry}, public, share)
}

// watchGeneration says for people how far a session is.
func (a *Agent) watchGeneration(k *key, n vault.Number, box *inbox) {
	box.watch = func(stage string) {
		k.mu.Lock()
		changed := k.stage != stage
		k.stage = stage
		k.mu.Unlock()
		if changed {
			a.log.Debug("key generation", "key", k.id.Name, "epoch", n.String(), "session", box.id.String(), "stage", stage)
			a.nudge()
		}
	}
	box.watch("computing")
}

// stage puts a new share into the vault and says so.
func (a *Agent) stage(ctx context.Context, k *key, v *vault.Vault, n vault.Number, made vault.Origin, public []byte, share *secret.Bytes) error {
	output := epoch.OutputDigest(k.entry().Scheme, public)
	if err := a.makeRoom(ctx, k, v, n); err != nil {
		return err
	}
	if err := v.Stage(ctx, k.class(), k.id, n, output, made, public, share); err != nil {
		return fmt.Errorf("staging epoch %s of key %q: %w", n, k.id.Name, err)
	}
	k.mu.Lock()
	k.staged = time.Now()
	k.mu.Unlock()
	failpoint.Hit("keygen/staged")
	record, _ := v.Record(k.id)
	a.see(k, v, record)
	a.announce(k)
	a.log.Info("share staged", "key", k.id.Name, "epoch", n.String())
	a.nudge()
	return nil
}

func wireBinding(b *protocol.Binding) *peerpb.Binding {
	return &peerpb.Binding{
		Operation: b.Operation, Scheme: b.Scheme, Key: b.Key, Incarnation: b.Incarnation,
		Epoch: &peerpb.Number{Roster: b.Epoch[0], Attempt: b.Epoch[1]}, Entry: b.Entry[:], Certificate: b.Certificate[:],
		Quorum: b.Quorum, Parties: names(b.Parties), Request: b.Request[:], Nonce: b.Nonce[:],
	}
}

// maxName and maxNames bound what a binding names: no roster has longer names.
const (
	maxName  = 63 // bytes
	maxNames = 1024
)

func parseBinding(p *peerpb.Binding) (*protocol.Binding, error) {
	b := &protocol.Binding{
		Operation: p.GetOperation(), Scheme: p.GetScheme(), Key: p.GetKey(), Incarnation: p.GetIncarnation(),
		Epoch: [2]uint64{p.GetEpoch().GetRoster(), p.GetEpoch().GetAttempt()}, Quorum: p.GetQuorum(),
	}
	names := slices.Concat([]string{b.Operation, b.Scheme, b.Key}, p.GetParties())
	if len(names) > maxNames || slices.ContainsFunc(names, func(s string) bool { return len(s) > maxName }) {
		return nil, errors.New("binding: a name is too long, or there are too many")
	}
	for _, h := range p.GetParties() {
		b.Parties = append(b.Parties, protocol.HostID(h))
	}
	for _, f := range []struct {
		to   *[32]byte
		from []byte
	}{{&b.Entry, p.GetEntry()}, {&b.Certificate, p.GetCertificate()}, {&b.Request, p.GetRequest()}, {&b.Nonce, p.GetNonce()}} {
		d, err := digest(f.from)
		if err != nil {
			return nil, fmt.Errorf("binding: %w", err)
		}
		*f.to = d
	}
	return b, nil
}
