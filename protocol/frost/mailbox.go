package frost

import (
	"fmt"
	"slices"

	"conseal/protocol"
)

// mailbox keeps the messages of a session until a round is complete. A message
// may come one round early: its sender had what we still wait for.
type mailbox struct {
	session protocol.SessionID
	self    protocol.HostID
	round   uint16            // that is being received
	from    []protocol.HostID // senders of each round
	sizes   []int             // of the bodies of each round, in bytes; 0 for one that does not come here
	got     map[uint16]map[protocol.HostID][]byte
}

// put checks a message's envelope and length and keeps a copy of its body.
func (m *mailbox) put(msg protocol.Message) error {
	switch {
	case msg.Session != m.session:
		return fmt.Errorf("host %q: message of another session, %s", msg.From, msg.Session)
	case msg.To != m.self:
		return fmt.Errorf("host %q: message for %q", msg.From, msg.To)
	case !slices.Contains(m.from, msg.From):
		return fmt.Errorf("host %q: not a sender of this session", msg.From)
	case msg.Round < m.round:
		return fmt.Errorf("host %q: message of round %d, which is over", msg.From, msg.Round)
	case msg.Round > m.round+1 || int(msg.Round) >= len(m.sizes) || m.sizes[msg.Round] == 0:
		return protocol.Faultf(msg.From, "message of round %d out of turn", msg.Round)
	case len(msg.Body) != m.sizes[msg.Round]:
		return protocol.Faultf(msg.From, "round %d has %d bytes, want %d", msg.Round, len(msg.Body), m.sizes[msg.Round])
	}
	if m.got == nil {
		m.got = map[uint16]map[protocol.HostID][]byte{}
	}
	if m.got[msg.Round] == nil {
		m.got[msg.Round] = map[protocol.HostID][]byte{}
	}
	if m.got[msg.Round][msg.From] != nil {
		return fmt.Errorf("host %q: second message of round %d", msg.From, msg.Round)
	}
	m.got[msg.Round][msg.From] = slices.Clone(msg.Body)
	return nil
}

// take returns the bodies of the present round and goes on to the next, once all
// are there.
func (m *mailbox) take() (map[protocol.HostID][]byte, bool) {
	if len(m.got[m.round]) < len(m.from) {
		return nil, false
	}
	bodies := m.got[m.round]
	delete(m.got, m.round)
	m.round++
	return bodies, true
}

// others returns hosts without self.
func others(hosts []protocol.HostID, self protocol.HostID) []protocol.HostID {
	return slices.DeleteFunc(slices.Clone(hosts), func(h protocol.HostID) bool { return h == self })
}

// wipe overwrites what was kept.
func (m *mailbox) wipe() {
	for _, bodies := range m.got {
		for _, b := range bodies {
			clear(b)
		}
	}
	m.got = nil
}

func (m *mailbox) message(to protocol.HostID, round uint16, body []byte) protocol.Message {
	return protocol.Message{Session: m.session, From: m.self, To: to, Round: round, Body: slices.Clone(body)}
}
