// Package guard runs sessions of github.com/luxfi/threshold as [protocol.Session]s
// and stands between that module and what peers send.
//
// The module is used as it is, and it trusts its input: four forged bytes make it
// allocate what a peer says, some malformed messages make it panic, and what it does
// not expect it drops in silence. So a message reaches it only when its sender, round
// and session are right, it is the first of its kind, and its bytes have exactly the
// one form that the round has ([Shape]); all else is refused here, with the sender's
// name. A panic inside the module ends the session as a fault of the message that
// caused it.
//
// The module's rounds are computed where the message that completes them is stepped:
// a step can take seconds.
package guard

import (
	"bytes"
	"errors"
	"fmt"
	"slices"

	"github.com/luxfi/threshold/pkg/party"
	module "github.com/luxfi/threshold/pkg/protocol"

	"conseal/protocol"
	"conseal/protocol/dealing"
)

// Round is what every other party sends in one round. What is nil the round does not
// have.
type Round struct {
	Number    uint16
	Broadcast func(from party.ID) Shape // the same message to all
	Direct    Shape                     // one to each
}

// Same is a broadcast of one shape, whoever sends it.
func Same(s Shape) func(party.ID) Shape { return func(party.ID) Shape { return s } }

// shape is that of the round's message; nil if there is none.
func (r *Round) shape(from party.ID, broadcast bool) Shape {
	switch {
	case !broadcast:
		return r.Direct
	case r.Broadcast == nil:
		return nil
	}
	return r.Broadcast(from)
}

// Config is what a session is made of.
type Config struct {
	Session protocol.SessionID
	Self    protocol.HostID
	Parties []protocol.HostID // sorted
	IDs     map[protocol.HostID]party.ID
	Rounds  []Round // in the module's order
	Start   module.StartFunc

	// Of a session that goes on from another protocol's.
	Offset uint16 // added to the module's numbers of rounds
	Bound  []byte // the module's session id, if it is not Session
}

// Session is one run of a protocol of the module.
type Session struct {
	cfg     Config
	others  []protocol.HostID
	names   map[party.ID]protocol.HostID
	handler *module.MultiHandler
	ssid    []byte
	name    string // the module's, of the protocol
	at      int    // index of the round that is being received
	got     map[slot]bool
	early   []*module.Message // of the next round
	direct  [][]byte          // contents that may be secret
	result  any
	closed  bool
}

// slot is a message that is sent once.
type slot struct {
	from      protocol.HostID
	round     uint16
	broadcast bool
}

// ID is the module's name of the holder at a position, counted from 0: of one length,
// never zero, never twice the same. The module also takes it for a number, the
// holder's point of the polynomial.
func ID(position int) party.ID { return party.ID(fmt.Sprintf("%04d", position+1)) }

var errClosed = errors.New("the session is over")

// New makes a session; the module does nothing before Start.
func New(cfg Config) (*Session, error) {
	if err := protocol.CheckParties(cfg.Self, cfg.Parties); err != nil {
		return nil, err
	}
	if len(cfg.Parties) < 2 || len(cfg.Parties) > dealing.MaxHolders || len(cfg.Rounds) == 0 {
		return nil, fmt.Errorf("a session of %d parties and %d rounds", len(cfg.Parties), len(cfg.Rounds))
	}
	s := &Session{cfg: cfg, names: map[party.ID]protocol.HostID{}, got: map[slot]bool{}}
	for _, h := range cfg.Parties {
		id, ok := cfg.IDs[h]
		if _, again := s.names[id]; !ok || again {
			return nil, fmt.Errorf("host %q has no id of its own", h)
		}
		s.names[id] = h
		if h != cfg.Self {
			s.others = append(s.others, h)
		}
	}
	return s, nil
}

// NewKeygen makes the session of one holder of a key generation, of which the module
// gives the start: it takes its names of this holder and of all, and its threshold.
func NewKeygen(cfg dealing.KeygenConfig, rounds func(quorum int) []Round, start func(self party.ID, all []party.ID, threshold int) module.StartFunc) (*Session, error) {
	if err := dealing.CheckHolders(cfg.Quorum, cfg.Holders); err != nil {
		return nil, err
	}
	var all []party.ID
	for i := range cfg.Holders {
		all = append(all, ID(i))
	}
	ids := IDs(cfg.Holders)
	return New(Config{
		Session: cfg.Session, Self: cfg.Self, Parties: cfg.Holders, IDs: ids,
		Rounds: rounds(cfg.Quorum), Start: start(ids[cfg.Self], all, Threshold(cfg.Quorum)),
	})
}

// Start runs the module's first round.
func (s *Session) Start() (protocol.Ready, error) {
	if s.closed || s.handler != nil {
		return protocol.Ready{}, errClosed
	}
	id := s.cfg.Bound
	if id == nil {
		id = s.cfg.Session[:]
	}
	err := recovered(func() (err error) {
		s.handler, err = module.NewMultiHandler(s.cfg.Start, id)
		return err
	})
	var ready protocol.Ready
	if err == nil {
		ready, err = s.ready()
	}
	if err != nil {
		s.Close()
	}
	return ready, err
}

// Step takes one message and, when its round is complete, computes the next.
func (s *Session) Step(m protocol.Message) (protocol.Ready, error) {
	if s.closed || s.handler == nil || s.result != nil {
		return protocol.Ready{}, errClosed
	}
	msg, err := s.admit(m)
	if err != nil {
		return protocol.Ready{}, err
	}
	if m.Round != s.round() {
		s.early = append(s.early, msg)
		return protocol.Ready{}, nil
	}
	var all protocol.Ready
	for queue := []*module.Message{msg}; len(queue) > 0; {
		next := queue[0]
		queue = queue[1:]
		before := s.at
		ready, err := s.accept(next)
		if err != nil {
			s.Close()
			return protocol.Ready{}, err
		}
		all.Send, all.Done = append(all.Send, ready.Send...), ready.Done
		if s.at != before {
			queue, s.early = append(queue, s.early...), nil
		}
	}
	return all, nil
}

// accept hands a message of the current round to the module.
func (s *Session) accept(m *module.Message) (protocol.Ready, error) {
	from := s.names[m.From]
	err := recovered(func() error {
		s.handler.Accept(m)
		return nil
	})
	if err != nil {
		return protocol.Ready{}, protocol.Faultf(from, "round %d: %v", s.round(), err)
	}
	return s.ready()
}

// ready collects what the module has to send, and its result.
func (s *Session) ready() (ready protocol.Ready, err error) {
	m, open := s.next()
	for ; m != nil; m, open = s.next() {
		if m.RoundNumber == 0 { // its word that it gives up; the driver has its own
			continue
		}
		send, err := s.outgoing(m)
		if err != nil {
			return protocol.Ready{}, err
		}
		ready.Send = append(ready.Send, send...)
	}
	result, err := s.handler.Result()
	var failed module.Error
	switch {
	case err == nil:
		s.result, ready.Done = result, true
	case errors.As(err, &failed):
		return protocol.Ready{}, s.failure(failed)
	case !open:
		return protocol.Ready{}, fmt.Errorf("round %d: the module ended without a result", s.round())
	}
	return ready, nil
}

// next is a message that the module has ready, or nil; and whether more may follow.
func (s *Session) next() (*module.Message, bool) {
	select {
	case m, open := <-s.handler.Listen():
		return m, open
	default:
		return nil, true
	}
}

// failure puts a failure of the module down to the one party that it names, if it
// names one that is not this host.
func (s *Session) failure(failed module.Error) error {
	if len(failed.Culprits) == 1 && s.names[failed.Culprits[0]] != s.cfg.Self {
		if h, ok := s.names[failed.Culprits[0]]; ok {
			return protocol.Faultf(h, "%v", failed.Err)
		}
	}
	return fmt.Errorf("round %d: %w", s.round(), failed.Err)
}

// outgoing wraps a message for each that it is for. What the module sends passes the
// same shapes as what it receives, so that it cannot leave the rounds known here: its
// presigning would go on to tell peers secrets when a check fails.
func (s *Session) outgoing(m *module.Message) ([]protocol.Message, error) {
	if s.ssid == nil {
		s.ssid, s.name = m.SSID, m.Protocol
	}
	at := slices.IndexFunc(s.cfg.Rounds, func(r Round) bool { return r.Number == uint16(m.RoundNumber) })
	if at < s.at {
		return nil, fmt.Errorf("the module sends a message of round %d, which is none of this protocol's", m.RoundNumber)
	}
	s.at = at
	to := s.others
	if !m.Broadcast {
		to = []protocol.HostID{s.names[m.To]}
	}
	shape := s.cfg.Rounds[at].shape(m.From, m.Broadcast)
	if shape == nil || All(shape, m.Data) != nil {
		return nil, fmt.Errorf("round %d: a check failed whose culprit cannot be told", s.round())
	}
	body := encode(m)
	if !m.Broadcast {
		defer clear(m.Data)
		defer clear(body)
	}
	var out []protocol.Message
	for _, h := range to {
		out = append(out, protocol.Message{Session: s.cfg.Session, From: s.cfg.Self, To: h, Round: s.round(), Body: bytes.Clone(body)})
	}
	return out, nil
}

// round is the number of the round that is being received.
func (s *Session) round() uint16 { return s.number(s.at) }

// number is that of the round at an index, in messages.
func (s *Session) number(at int) uint16 { return s.cfg.Rounds[at].Number + s.cfg.Offset }

// Progress tells which of how many rounds is being received, and from whom messages
// of it are missing.
func (s *Session) Progress() (round, rounds int, missing []protocol.HostID) {
	for _, h := range s.others {
		r := s.cfg.Rounds[s.at]
		if r.Broadcast != nil && !s.got[slot{h, s.round(), true}] || r.Direct != nil && !s.got[slot{h, s.round(), false}] {
			missing = append(missing, h)
		}
	}
	return s.at + 1, len(s.cfg.Rounds), missing
}

// A body is: what it is, "b" for a broadcast or "d" for a direct message; the
// module's session, 64 bytes; the hash of the last round's broadcasts with its length
// in front, 0 or 64; the module's content.
const ssidSize = 64

func encode(m *module.Message) []byte {
	b := []byte{'d'}
	if m.Broadcast {
		b[0] = 'b'
	}
	b = append(b, m.SSID...)
	b = append(b, byte(len(m.BroadcastVerification)))
	b = append(b, m.BroadcastVerification...)
	return append(b, m.Data...)
}

// admit checks everything about a message that can be checked before the module sees
// it. It is the first of its slot.
func (s *Session) admit(m protocol.Message) (*module.Message, error) {
	switch {
	case m.Session != s.cfg.Session:
		return nil, fmt.Errorf("host %q: message of another session, %s", m.From, m.Session)
	case m.To != s.cfg.Self:
		return nil, fmt.Errorf("host %q: message for %q", m.From, m.To)
	case !slices.Contains(s.others, m.From):
		return nil, fmt.Errorf("host %q: not a sender of this session", m.From)
	case m.Round < s.round():
		return nil, fmt.Errorf("host %q: message of round %d, which is over", m.From, m.Round)
	}
	ahead := s.at
	if m.Round != s.round() {
		ahead++
	}
	if ahead == len(s.cfg.Rounds) || s.number(ahead) != m.Round {
		return nil, protocol.Faultf(m.From, "message of round %d out of turn", m.Round)
	}
	fault := func(format string, args ...any) error {
		return protocol.Faultf(m.From, "round %d: "+format, append([]any{m.Round}, args...)...)
	}
	b := m.Body
	if len(b) < 2+ssidSize || b[0] != 'b' && b[0] != 'd' {
		return nil, fault("not a message of %d bytes", len(b))
	}
	broadcast, ssid, size := b[0] == 'b', b[1:1+ssidSize], int(b[1+ssidSize])
	if b = b[2+ssidSize:]; size != 0 && size != ssidSize || len(b) < size {
		return nil, fault("an echo of %d bytes", size)
	}
	if !bytes.Equal(ssid, s.ssid) {
		return nil, fault("of another session of the module: it does not hold the same public values")
	}
	out := &module.Message{
		SSID: s.ssid, From: s.cfg.IDs[m.From], Protocol: s.name, Data: bytes.Clone(b[size:]), Broadcast: broadcast,
	}
	setRound(&out.RoundNumber, m.Round-s.cfg.Offset)
	if size > 0 {
		out.BroadcastVerification = bytes.Clone(b[:size])
	}
	if !broadcast {
		out.To = s.cfg.IDs[s.cfg.Self]
		s.direct = append(s.direct, out.Data)
	}
	shape := s.cfg.Rounds[ahead].shape(out.From, broadcast)
	if shape == nil {
		return nil, fault("a message that the round does not have")
	}
	if err := All(shape, out.Data); err != nil {
		return nil, fault("the content %v", err)
	}
	mine := slot{m.From, m.Round, broadcast}
	if s.got[mine] {
		return nil, fmt.Errorf("host %q: second message of round %d", m.From, m.Round)
	}
	s.got[mine] = true
	return out, nil
}

// setRound sets a number of a type that the module keeps to itself.
func setRound[N ~uint16](to *N, round uint16) { *to = N(round) }

// Result is what the module made of a session that is done.
func (s *Session) Result() (any, error) {
	if s.result == nil {
		return nil, errors.New("the session is not done")
	}
	return s.result, nil
}

// Close ends the session. The module has no way to wipe what it holds: it is left to
// the garbage collector.
func (s *Session) Close() {
	for _, b := range s.direct {
		clear(b)
	}
	s.handler, s.early, s.direct, s.result, s.closed = nil, nil, nil, nil, true
}

// recovered turns a panic of the module into an error.
func recovered(call func() error) (err error) {
	defer func() {
		if r := recover(); r != nil {
			err = fmt.Errorf("the module panicked: %v", r)
		}
	}()
	return call()
}
