package agent

import (
	"fmt"

	"conseal/agent/epoch"
	"conseal/agent/peer/peerpb"
	"conseal/agent/vault"
	"conseal/protocol"
)

// announce tells a key's other hosts what this host has of it.
func (a *Agent) announce(k *key) {
	for _, h := range k.holders {
		if h != a.self {
			a.tell(h, k)
		}
	}
}

// announceUnborn repeats what is not settled: a message that was lost with its
// connection is never missed for long.
func (a *Agent) announceUnborn() {
	for _, k := range a.sorted {
		if k.active.Load() == nil {
			a.announce(k)
		}
	}
}

// tell sends one host the status of one key. A host that is down hears it when
// its connection comes up.
func (a *Agent) tell(to protocol.HostID, k *key) {
	_ = a.net.Send(to, &peerpb.Frame{Body: &peerpb.Frame_Key{Key: a.keyStatus(k)}})
}

func (a *Agent) keyStatus(k *key) *peerpb.KeyStatus {
	s := &peerpb.KeyStatus{Key: k.id.Name, Incarnation: k.id.Incarnation, Entry: k.digest[:]}
	if act := k.active.Load(); act != nil {
		s.Active, s.Certificate = number(act.certificate.Subject.Number), act.id[:]
		return s
	}
	if a.vault.Load() == nil {
		s.Unknown = true
		return s
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	own, ok := k.views[a.self]
	if !ok || own.Active { // not looked at yet, or a certificate that could not be taken up: never "none"
		s.Unknown = true
		return s
	}
	for _, st := range own.Staged {
		s.Staged = append(s.Staged, staged(st))
	}
	if statement, ok := k.statements[a.self]; ok && own.Voted != nil {
		if encoded, err := statement.Encode(); err == nil {
			s.Voted, s.Statement = staged(*own.Voted), encoded
		}
	}
	return s
}

// hear takes a peer's status of a key.
func (a *Agent) hear(from protocol.HostID, s *peerpb.KeyStatus) error {
	k := a.keys[s.Key]
	if k == nil || !k.holds(from) || k.id.Incarnation != s.Incarnation {
		return nil // its roster is another than ours: it will say so again
	}
	view := epoch.View{Heard: true, Unreadable: s.Unknown, Active: s.Active != nil}
	var err error
	if view.Entry, err = digest(s.Entry); err != nil {
		return err
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
	if err := k.tooFar(a.self, a.roster.Version, view.Staged); err != nil {
		return err
	}
	var statement *epoch.Statement
	if s.Voted != nil {
		if view.Voted, statement, err = a.parseVote(k, from, s); err != nil {
			return err
		}
	}
	return a.heard(k, from, view, statement, s.Certificate)
}

// tooFar refuses numbers that [Agent.mayGenerate] would refuse to go beyond: they
// would stop every generation here, in this host's name.
func (k *key) tooFar(self protocol.HostID, version uint64, claimed []epoch.Staged) error {
	k.mu.Lock()
	own := k.views[self].Staged
	k.mu.Unlock()
	for _, st := range claimed {
		highest := uint64(0)
		for _, s := range own {
			highest = max(highest, s.Number.Attempt)
		}
		if st.Number.Roster > version+maxJump || st.Number.Attempt >= highest+maxJump {
			return fmt.Errorf("key %q: staged epoch %s jumps too far ahead", k.id.Name, st.Number)
		}
	}
	return nil
}

// heard enters a peer's view of a key.
func (a *Agent) heard(k *key, from protocol.HostID, view epoch.View, statement *epoch.Statement, claim []byte) error {
	var id [32]byte
	if view.Active {
		var err error
		if id, err = digest(claim); err != nil {
			return err
		}
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	k.views[from] = view
	delete(k.claims, from)
	if view.Active {
		k.claims[from] = id
	}
	if statement != nil {
		k.statements[from] = *statement
	}
	a.nudge()
	return nil
}

// parseVote checks the signature under a peer's vote. A signature that does not
// fit because the peer's roster differs is no vote.
func (a *Agent) parseVote(k *key, from protocol.HostID, s *peerpb.KeyStatus) (*epoch.Staged, *epoch.Statement, error) {
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
	if string(s.Entry) != string(k.digest[:]) {
		return &voted, nil, nil
	}
	subject := k.subject(a.roster.Fleet, voted)
	if err := subject.Verify(statement, k.pins(a.roster)[from]); err != nil {
		return nil, nil, err
	}
	return &voted, &statement, nil
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
