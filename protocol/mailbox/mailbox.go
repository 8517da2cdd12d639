// Package mailbox keeps the messages of a session until a round is complete.
package mailbox

import (
	"fmt"
	"slices"

	"conseal/protocol"
)

// Round is what comes here in one round: a message from each of these hosts, whose
// body has a length in bytes within these bounds, which are at least 1.
type Round struct {
	From     []protocol.HostID
	Min, Max int
}

// Exactly is a round of bodies of one length.
func Exactly(size int, from []protocol.HostID) Round { return Round{from, size, size} }

// Box keeps the messages of one session. A message may come one round early: its
// sender had what we still wait for.
type Box struct {
	Session protocol.SessionID
	Self    protocol.HostID
	Rounds  []Round // by number; nobody sends one that has no senders
	Round   uint16  // that is being received

	got map[uint16]map[protocol.HostID][]byte
}

// Put checks a message's envelope and length and keeps a copy of its body.
func (b *Box) Put(m protocol.Message) error {
	switch {
	case m.Session != b.Session:
		return fmt.Errorf("host %q: message of another session, %s", m.From, m.Session)
	case m.To != b.Self:
		return fmt.Errorf("host %q: message for %q", m.From, m.To)
	case !b.sends(m.From):
		return fmt.Errorf("host %q: not a sender of this session", m.From)
	case m.Round < b.Round:
		return fmt.Errorf("host %q: message of round %d, which is over", m.From, m.Round)
	case m.Round > b.Round+1 || int(m.Round) >= len(b.Rounds) || !slices.Contains(b.Rounds[m.Round].From, m.From):
		return protocol.Faultf(m.From, "message of round %d out of turn", m.Round)
	}
	if r, n := b.Rounds[m.Round], len(m.Body); n < r.Min || n > r.Max {
		return protocol.Faultf(m.From, "round %d has %d bytes, want %s", m.Round, n, r.size())
	}
	if b.got == nil {
		b.got = map[uint16]map[protocol.HostID][]byte{}
	}
	if b.got[m.Round] == nil {
		b.got[m.Round] = map[protocol.HostID][]byte{}
	}
	if b.got[m.Round][m.From] != nil {
		return fmt.Errorf("host %q: second message of round %d", m.From, m.Round)
	}
	b.got[m.Round][m.From] = slices.Clone(m.Body)
	return nil
}

// sends tells whether a host sends in any round.
func (b *Box) sends(h protocol.HostID) bool {
	return slices.ContainsFunc(b.Rounds, func(r Round) bool { return slices.Contains(r.From, h) })
}

func (r Round) size() string {
	if r.Min == r.Max {
		return fmt.Sprint(r.Min)
	}
	return fmt.Sprintf("%d to %d", r.Min, r.Max)
}

// Take returns the bodies of the present round and goes on to the next, once all
// are there.
func (b *Box) Take() (map[protocol.HostID][]byte, bool) {
	if int(b.Round) >= len(b.Rounds) || len(b.got[b.Round]) < len(b.Rounds[b.Round].From) {
		return nil, false
	}
	bodies := b.got[b.Round]
	delete(b.got, b.Round)
	b.Round++
	return bodies, true
}

// Missing are the hosts whose message of the present round is not there.
func (b *Box) Missing() (out []protocol.HostID) {
	if int(b.Round) >= len(b.Rounds) {
		return nil
	}
	for _, h := range b.Rounds[b.Round].From {
		if b.got[b.Round][h] == nil {
			out = append(out, h)
		}
	}
	return out
}

// Others returns hosts without self.
func Others(hosts []protocol.HostID, self protocol.HostID) []protocol.HostID {
	return slices.DeleteFunc(slices.Clone(hosts), func(h protocol.HostID) bool { return h == self })
}

// Wipe overwrites what was kept.
func (b *Box) Wipe() {
	for _, bodies := range b.got {
		for _, body := range bodies {
			clear(body)
		}
	}
	b.got = nil
}

// Message is one of this host.
func (b *Box) Message(to protocol.HostID, round uint16, body []byte) protocol.Message {
	return protocol.Message{Session: b.Session, From: b.Self, To: to, Round: round, Body: slices.Clone(body)}
}

// ToAll is a message of this host to each of several.
func (b *Box) ToAll(hosts []protocol.HostID, round uint16, body []byte) (out []protocol.Message) {
	for _, h := range hosts {
		out = append(out, b.Message(h, round, body))
	}
	return out
}
