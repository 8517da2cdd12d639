package agent

import (
	"fmt"
	"slices"

	"conseal/agent/epoch"
	"conseal/agent/peer/peerpb"
	"conseal/agent/vault"
	"conseal/protocol"
)

// announce tells a key's other hosts what this host has of it.
func (a *Agent) announce(k *key) {
	for _, h := range k.circle() {
		if h != a.self {
			a.tell(h, k)
		}
	}
}

// announceUnsettled repeats what is not settled, and asks who may have something to say: a
// message that was lost is never missed for long.
func (a *Agent) announceUnsettled() {
	for _, k := range a.keys() {
		k.mu.Lock()
		settled := k.settled
		k.mu.Unlock()
		if v := a.vault.Load(); v != nil {
			if _, deleted := v.Deleted(k.id.Name); deleted {
				a.announceReceipt(k)
				continue
			}
		}
		if a.mine(k) && (k.active.Load() == nil || !settled) {
			a.announce(k)
		}
		a.ask(k, k.owing(a.self))
	}
}

// tell sends one host the status of one key. A host that is down hears it when
// its connection comes up.
func (a *Agent) tell(to protocol.HostID, k *key) {
	k.telling.Lock() // the last that is said is true
	defer k.telling.Unlock()
	_ = a.net.Send(to, &peerpb.Frame{Body: &peerpb.Frame_Key{Key: a.keyStatus(k)}})
}

func (a *Agent) keyStatus(k *key) *peerpb.KeyStatus {
	digest, act := k.digest(), k.active.Load()
	s := &peerpb.KeyStatus{Key: k.id.Name, Incarnation: k.id.Incarnation, Entry: digest[:]}
	if here, ok := a.suspended.of(k.id.Name); ok {
		s.Suspended = uint64(here.since.Unix())
	}
	if act != nil {
		s.Active, s.Certificate = number(act.certificate.Subject.Number), act.id[:]
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	k.tellReceipts(a.self, s)
	own, ok := k.views[a.self]
	if act == nil && (!ok || a.vault.Load() == nil || own.Active && k.known.number().Compare(own.Number) <= 0) {
		s.Unknown = true // not looked at yet, or a share that could not be taken up: never "none"
		return s
	}
	for _, st := range own.Staged {
		s.Staged = append(s.Staged, staged(st))
	}
	if said := k.statements[a.self]; own.Voted != nil && said.about == *own.Voted && said.entry == digest {
		if encoded, err := said.Statement.Encode(); err == nil {
			s.Voted, s.Statement = staged(*own.Voted), encoded
		}
	}
	return s
}

// hear takes a peer's status of a key.
func (a *Agent) hear(from protocol.HostID, s *peerpb.KeyStatus) error {
	k := a.key(s.Key)
	if k == nil {
		return nil // as below
	}
	if err := a.hearReceipts(k, from, s.Receipts); err != nil { // of any incarnation
		return err
	}
	if k.id.Incarnation != s.Incarnation {
		return nil // its roster is another than ours: it will say so again
	}
	view := epoch.View{Heard: true, Unreadable: s.Unknown, Active: s.Active != nil}
	var err error
	if view.Active {
		view.Number = vault.Number{Roster: s.Active.Roster, Attempt: s.Active.Attempt}
		if view.Certificate, err = digest(s.Certificate); err != nil {
			return err
		}
	}
	if view.Entry, err = digest(s.Entry); err != nil {
		return err
	}
	if s.Suspended > maxSeconds {
		return fmt.Errorf("key %q: a suspension since second %d", s.Key, s.Suspended)
	}
	if len(s.Staged) > vault.MaxStaged {
		return fmt.Errorf("key %q: %d staged shares are over the limit", s.Key, len(s.Staged))
	}
	for _, p := range s.Staged {
		st, err := parseStaged(p)
		if err != nil {
			return err
		}
		view.Staged = append(view.Staged, st)
	}
	if err := k.tooFar(a.self, a.roster().Version, view); err != nil {
		return err
	}
	var vote *said
	if s.Voted != nil {
		if view.Voted, vote, err = a.parseVote(k, from, s); err != nil {
			return err
		}
	}
	k.heardSuspended(from, s.Suspended)
	a.heard(k, from, view, vote)
	if k.behind(view.Number) || !k.concerns(from) {
		a.offerKnown(k, from) // it is to hear of the epoch, and of who has it
		a.tell(from, k)
	}
	return nil
}

// exists tells whether the key was born, as far as this host knows or was told.
func (k *key) exists() bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, v := range k.views {
		if v.Active {
			return true
		}
	}
	return k.known != nil
}

// behind tells whether a host that says it is at epoch n lags behind this one.
func (k *key) behind(n vault.Number) bool {
	act := k.active.Load()
	return act != nil && n != vault.Number{} && n.Compare(act.certificate.Subject.Number) < 0
}

// tooFar refuses numbers that nothing may go beyond: of an unborn key those that
// [Agent.mayGenerate] refuses, as they would stop every generation here, in this host's name.
func (k *key) tooFar(self protocol.HostID, version uint64, view epoch.View) error {
	k.mu.Lock()
	own, born := k.views[self].Staged, k.known != nil || view.Active
	k.mu.Unlock()
	claimed := view.Staged
	if view.Voted != nil {
		claimed = append(slices.Clone(claimed), *view.Voted)
	}
	last := uint64(lastAttempt)
	if !born {
		last = maxJump - 1
		for _, s := range own {
			last = max(last, s.Number.Attempt+maxJump-1)
		}
	}
	for _, st := range claimed {
		if st.Number.Roster > version+maxJump || st.Number.Attempt > last {
			return fmt.Errorf("key %q: staged epoch %s jumps too far ahead", k.id.Name, st.Number)
		}
	}
	return nil
}

// heard enters a peer's view of a key.
func (a *Agent) heard(k *key, from protocol.HostID, view epoch.View, vote *said) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.views[from].Certificate != view.Certificate {
		k.tellNews()
	}
	k.views[from] = view
	if vote != nil {
		k.statements[from] = *vote
	}
	a.nudge()
}

// parseVote checks the signature under a peer's vote. One that this host cannot check,
// because its roster is another or it has not staged the like, is no vote; the peer
// says it again.
func (a *Agent) parseVote(k *key, from protocol.HostID, s *peerpb.KeyStatus) (*epoch.Staged, *said, error) {
	voted, err := parseStaged(s.Voted)
	if err != nil {
		return nil, nil, err
	}
	statement, err := epoch.DecodeStatement(s.Statement)
	if err != nil {
		return nil, nil, err
	}
	if statement.Holder != from {
		return nil, nil, fmt.Errorf("statement of %q", statement.Holder)
	}
	entry, v := k.digest(), a.vault.Load()
	if string(s.Entry) != string(entry[:]) || v == nil {
		return &voted, nil, nil
	}
	made, staged := v.Origin(k.id, voted.Number)
	subject := k.subject(a.roster().Fleet, voted, vault.Origin{Parent: made.Parent, Entry: entry})
	if err := subject.Verify(statement, k.pins([]protocol.HostID{from})[from]); err != nil {
		if !staged && k.exists() { // then it may have a parent
			return &voted, nil, nil
		}
		return nil, nil, err
	}
	return &voted, &said{statement, voted, entry}, nil
}

func number(n vault.Number) *peerpb.Number {
	return &peerpb.Number{Roster: n.Roster, Attempt: n.Attempt}
}

func staged(s epoch.Staged) *peerpb.Staged {
	return &peerpb.Staged{Number: number(s.Number), Output: s.Output[:]}
}

func parseStaged(p *peerpb.Staged) (epoch.Staged, error) {
	output, err := digest(p.GetOutput())
	n := p.GetNumber()
	return epoch.Staged{Number: vault.Number{Roster: n.GetRoster(), Attempt: n.GetAttempt()}, Output: vault.Output(output)}, err
}

func digest(b []byte) (d [32]byte, err error) {
	if len(b) != len(d) {
		return d, fmt.Errorf("a digest of %d bytes", len(b))
	}
	return [32]byte(b), nil
}
