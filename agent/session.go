package agent

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"unicode"

	"conseal/agent/peer/peerpb"
	"conseal/protocol"
	"conseal/protocol/dealing"
)

// Reasons with which a host leaves a session; stable, for programs.
const (
	reasonDiffers   = "DIFFERS"   // the hosts disagree on what the session is about
	reasonNotReady  = "NOT_READY" // the host cannot use its share now
	reasonRefused   = "REFUSED"   // the host's own roster does not allow it
	reasonBusy      = "BUSY"      // over the host's limits
	reasonAborted   = "ABORTED"   // a protocol message was wrong, or time ran out
	reasonNoLedger  = "NO_LEDGER" // the host's audit log cannot be written
	reasonSuspended = "SUSPENDED" // by the host's roster, or on the host
	reasonBehind    = "BEHIND"    // the host knows a later epoch of the key, and has sent its certificate
	reasonSealed    = "SEALED"    // the host's hardware does not open its share
	// the host does not have the presignature, so the next attempt goes without
	reasonNoPresignature = "NO_PRESIGNATURE"
)

// partyError is an error for which a party of a session stands, or that it
// reported: the next attempt goes without it. It is no proof of anything.
type partyError struct {
	host   protocol.HostID
	reason string // one of the above; "" for a lost connection or silence
	text   string
	// complaint is a proof that a dealer cheated, if the host sent one.
	complaint []byte
}

func (e *partyError) Error() string { return fmt.Sprintf("host %q: %s", e.host, e.text) }

// event is what the network tells a session.
type event struct {
	from protocol.HostID
	step *peerpb.Step
	err  *partyError // it left
}

// inbox is where a session's messages arrive. Its channel is never closed.
type inbox struct {
	id      protocol.SessionID
	parties []protocol.HostID // without this host
	events  chan event
	count   map[protocol.HostID]int // events of each party; guarded by sessions.mu
	watch   func(stage string)      // told of progress, if not nil
}

// sessions knows the sessions under way, to deliver what peers send.
type sessions struct {
	mu      sync.Mutex
	running map[protocol.SessionID]*inbox
	opened  map[protocol.HostID]int // sessions that a peer opened here, or is about to
	limit   int                     // of opened
}

func newSessions(limit int) *sessions {
	return &sessions{running: map[protocol.SessionID]*inbox{}, opened: map[protocol.HostID]int{}, limit: limit}
}

var errReplay = errors.New("a session of this id is under way")

// eventsPerParty bounds what one session takes from its parties: no protocol
// here sends a host more messages in a session.
const eventsPerParty = 16

// admit counts a session that a peer asks for; false if it has too many. release
// ends what admit began.
func (s *sessions) admit(peer protocol.HostID) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.opened[peer] >= s.limit {
		return false
	}
	s.opened[peer]++
	return true
}

func (s *sessions) release(peer protocol.HostID) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.opened[peer]--; s.opened[peer] == 0 {
		delete(s.opened, peer)
	}
}

// open registers a session between this host and others.
func (s *sessions) open(id protocol.SessionID, self protocol.HostID, parties []protocol.HostID) (*inbox, error) {
	others := slices.DeleteFunc(slices.Clone(parties), func(h protocol.HostID) bool { return h == self })
	box := &inbox{
		id: id, parties: others,
		events: make(chan event, (eventsPerParty+1)*len(others)), count: map[protocol.HostID]int{},
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.running[id] != nil {
		return nil, errReplay
	}
	s.running[id] = box
	return box, nil
}

func (s *sessions) close(box *inbox) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.running, box.id)
}

// deliver hands an event to a session. What belongs to no session here, or comes
// from a host that is no party of it, is dropped: late messages of sessions that
// ended are normal.
func (s *sessions) deliver(id []byte, ev event) {
	if len(id) != len(protocol.SessionID{}) {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if box := s.running[protocol.SessionID(id)]; box != nil {
		box.put(ev)
	}
}

// put queues an event; sessions.mu is held. The channel has room for all that
// the parties may send, and for the end of each; what a party sends beyond that
// is dropped.
func (b *inbox) put(ev event) {
	limit := eventsPerParty
	if ev.err != nil {
		limit++
	}
	if b.count[ev.from] < limit && slices.Contains(b.parties, ev.from) {
		b.count[ev.from]++
		b.events <- ev
	}
}

// gone tells every session of which host is a party that its connection is lost.
func (s *sessions) gone(host protocol.HostID, cause error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, box := range s.running {
		box.put(event{from: host, err: &partyError{host: host, text: "connection lost: " + cause.Error()}})
	}
}

// sender sends a frame to a peer; it never blocks.
type sender func(to protocol.HostID, f *peerpb.Frame) error

// drive steps a session until it is done. It returns the session's own error, a
// [partyError] when a party left, or the context's cause with the names of the
// parties that were silent. Parties are told when the session fails here.
// early are events that came before the session could start.
func drive(ctx context.Context, self protocol.HostID, s protocol.Session, box *inbox, send sender, early []event) error {
	owing := map[protocol.HostID]bool{} // parties whose turn it is, as far as is known here
	for _, h := range box.parties {
		owing[h] = true
	}
	ready, err := s.Start()
	for {
		if err == nil {
			err = sendAll(ready.Send, send, owing)
		}
		if worker, ok := s.(protocol.Worker); ok && err == nil {
			err = worker.Work()
		}
		if err != nil {
			hangUp(box, send, err)
			return err
		}
		if ready.Done {
			return nil
		}
		box.progress(s)
		ev, left := nextEvent(ctx, box, &early, owing)
		if left != nil {
			hangUp(box, send, left)
			return left
		}
		delete(owing, ev.from)
		ready, err = s.Step(protocol.Message{Session: box.id, From: ev.from, To: self, Round: uint16(ev.step.Round), Body: ev.step.Body})
		if err != nil && culprits(err) == nil {
			// Nothing is proven, but another attempt may do without who sent this.
			err = &partyError{host: ev.from, text: strings.TrimPrefix(err.Error(), fmt.Sprintf("host %q: ", ev.from))}
		}
	}
}

// progress tells the watcher of a session with several rounds how far it is.
func (b *inbox) progress(s protocol.Session) {
	p, ok := s.(interface {
		Progress() (round, rounds int, missing []protocol.HostID)
	})
	if !ok || b.watch == nil {
		return
	}
	if round, rounds, missing := p.Progress(); len(missing) > 0 {
		b.watch(fmt.Sprintf("round %d of %d, waiting for %s", round, rounds, strings.Join(names(missing), ", ")))
	}
}

// nextEvent returns a step of a party, or why there is none.
func nextEvent(ctx context.Context, box *inbox, early *[]event, owing map[protocol.HostID]bool) (event, error) {
	if len(*early) > 0 {
		ev := (*early)[0]
		*early = (*early)[1:]
		return ev, nil
	}
	select {
	case <-ctx.Done():
		return event{}, silent(ctx, box, owing)
	case ev := <-box.events:
		if ev.err != nil {
			return event{}, ev.err
		}
		return ev, nil
	}
}

func sendAll(messages []protocol.Message, send sender, owing map[protocol.HostID]bool) error {
	for _, m := range messages {
		owing[m.To] = true
		step := &peerpb.Step{Session: m.Session[:], Round: uint32(m.Round), Body: m.Body}
		var own *partyError
		if err := send(m.To, &peerpb.Frame{Body: &peerpb.Frame_Step{Step: step}}); errors.As(err, &own) {
			return own // it does not even let it out
		} else if err != nil {
			return &partyError{host: m.To, text: err.Error()}
		}
	}
	return nil
}

// silent names a party that owes an answer when time runs out. Nobody is at fault
// for what was called off here.
func silent(ctx context.Context, box *inbox, owing map[protocol.HostID]bool) error {
	cause := context.Cause(ctx)
	var halted *partyError
	calledOff := errors.Is(cause, context.Canceled) || errors.Is(cause, errSuperseded) || errors.As(cause, &halted)
	for _, h := range box.parties {
		if owing[h] && !calledOff {
			return &partyError{host: h, text: "no answer in time"}
		}
	}
	return fmt.Errorf("session %s: %w", box.id, cause)
}

// hangUp tells the other parties that this host will not go on.
func hangUp(box *inbox, send sender, cause error) {
	reason, text := reasonAborted, cause.Error()
	var party *partyError
	if errors.As(cause, &party) && party.reason != "" {
		reason = party.reason
	}
	for _, h := range box.parties {
		f := endFrame(box.id, reason, text)
		var proof *dealing.Complaint
		if errors.As(cause, &proof) {
			f.GetEnd().Complaint = proof.Encode()
		}
		_ = send(h, f) // it may be gone itself
	}
}

func endFrame(id protocol.SessionID, reason, text string) *peerpb.Frame {
	return &peerpb.Frame{Body: &peerpb.Frame_End{End: &peerpb.End{Session: id[:], Reason: reason, Text: clean(text)}}}
}

// clean makes a text that a peer reads, or wrote, fit for logs and terminals, and
// for protobuf, which refuses to send what is not UTF-8.
func clean(text string) string {
	const most = 512
	if len(text) > most {
		text = text[:most]
	}
	return strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return ' '
		}
		return r
	}, strings.ToValidUTF8(text, ""))
}
