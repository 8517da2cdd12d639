package agent

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"unicode/utf8"

	"google.golang.org/protobuf/proto"

	"conseal/agent/peer/peerpb"
	"conseal/protocol"
)

// scripted is a session of a test: it has the steps that it was given.
type scripted struct {
	start func() (protocol.Ready, error)
	step  func(protocol.Message) (protocol.Ready, error)
	work  func() error
}

func (s *scripted) Start() (protocol.Ready, error) {
	if s.start == nil {
		return protocol.Ready{}, nil
	}
	return s.start()
}
func (s *scripted) Step(m protocol.Message) (protocol.Ready, error) { return s.step(m) }
func (s *scripted) Close()                                          {}
func (s *scripted) Work() error {
	if s.work == nil {
		return nil
	}
	return s.work()
}

// sent is what a host sent, in order.
type sent struct {
	to []protocol.HostID
	f  []*peerpb.Frame
}

func (s *sent) send(to protocol.HostID, f *peerpb.Frame) error {
	s.to, s.f = append(s.to, to), append(s.f, f)
	return nil
}

// ends are the hosts that were told that a session ended, and what.
func (s *sent) ends() (to []protocol.HostID, last *peerpb.End) {
	for i, f := range s.f {
		if f.GetEnd() != nil {
			to, last = append(to, s.to[i]), f.GetEnd()
		}
	}
	return to, last
}

func openBox(t *testing.T, s *sessions, id byte, parties ...protocol.HostID) *inbox {
	t.Helper()
	box, err := s.open(protocol.SessionID{id}, "a", parties)
	ok(t, err)
	return box
}

func end(from protocol.HostID, reason, text string) event {
	return event{from: from, err: &partyError{host: from, reason: reason, text: text}}
}

func step(from protocol.HostID, round uint32) event {
	return event{from: from, step: &peerpb.Step{Round: round, Body: []byte(from)}}
}

func TestDriveEndsWhenAPartyDoes(t *testing.T) {
	for name, leave := range map[string]func(s *sessions, box *inbox){
		"it says so":          func(s *sessions, box *inbox) { s.deliver(box.id[:], end("c", reasonRefused, "not today")) },
		"its connection went": func(s *sessions, box *inbox) { s.gone("c", errors.New("reset by peer")) },
		"after a flood": func(s *sessions, box *inbox) {
			for range 10 * eventsPerParty {
				s.deliver(box.id[:], step("c", 1))
			}
			s.gone("c", errors.New("reset by peer"))
		},
	} {
		t.Run(name, func(t *testing.T) {
			s, out := newSessions(1), &sent{}
			box := openBox(t, s, 1, "a", "b", "c")
			session := &scripted{step: func(protocol.Message) (protocol.Ready, error) { return protocol.Ready{}, nil }}
			leave(s, box)
			err := drive(t.Context(), "a", session, box, out.send, nil)
			var party *partyError
			if !errors.As(err, &party) || party.host != "c" {
				t.Errorf("error %v does not name c", err)
			}
			if to, _ := out.ends(); !slices.Equal(to, []protocol.HostID{"b", "c"}) {
				t.Errorf("%q were told", to)
			}
		})
	}
}

func TestGoneEndsNobodyElsesSession(t *testing.T) {
	s := newSessions(1)
	with, without := openBox(t, s, 1, "a", "b"), openBox(t, s, 2, "a", "c")
	s.gone("b", errors.New("cut"))
	if len(with.events) != 1 || len(without.events) != 0 {
		t.Errorf("b left: %d events for its session, %d for another's", len(with.events), len(without.events))
	}
}

func TestDriveStepsInOrder(t *testing.T) {
	s, out := newSessions(1), &sent{}
	box := openBox(t, s, 1, "a", "b", "c")
	var got []string
	session := &scripted{
		start: func() (protocol.Ready, error) {
			return protocol.Ready{Send: []protocol.Message{{Session: box.id, To: "b", Round: 1, Body: []byte("hello")}}}, nil
		},
		work: func() error {
			if len(out.f) == 0 {
				t.Error("it worked before it sent")
			}
			return nil
		},
		step: func(m protocol.Message) (protocol.Ready, error) {
			if m.Session != box.id || m.To != "a" || string(m.Body) != string(m.From) {
				t.Errorf("message %+v", m)
			}
			got = append(got, string(m.From))
			return protocol.Ready{Done: len(got) == 3}, nil
		},
	}
	s.deliver(box.id[:], step("b", 1))
	ok(t, drive(t.Context(), "a", session, box, out.send, []event{step("c", 1), step("b", 1)}))
	if strings.Join(got, "") != "cbb" {
		t.Errorf("steps of %q: what came early is first", got)
	}
	if to, _ := out.ends(); len(to) != 0 || len(out.f) != 1 || string(out.f[0].GetStep().Body) != "hello" {
		t.Errorf("sent %v", out.f)
	}
}

func TestDriveTellsTheOthersWhatItFailsOf(t *testing.T) {
	fault := protocol.Faultf("b", "wrong signature share")
	for name, session := range map[string]*scripted{
		"start": {start: func() (protocol.Ready, error) { return protocol.Ready{}, fault }},
		"work":  {work: func() error { return fault }},
		"step":  {step: func(protocol.Message) (protocol.Ready, error) { return protocol.Ready{}, fault }},
	} {
		s, out := newSessions(1), &sent{}
		box := openBox(t, s, 1, "a", "b", "c")
		s.deliver(box.id[:], step("c", 1))
		err := drive(t.Context(), "a", session, box, out.send, nil)
		if !errors.Is(err, fault) || !slices.Equal(culprits(err), []protocol.HostID{"b"}) {
			t.Errorf("%s: error %v blames %q", name, err, culprits(err))
		}
		if to, last := out.ends(); len(to) != 2 || last.Reason != reasonAborted || !strings.Contains(last.Text, "wrong signature share") {
			t.Errorf("%s: %q were told %v", name, to, last)
		}
	}
}

// A step that is refused without a proven fault still names who sent it: else one
// host could stop every signature by a message out of turn.
func TestDriveNamesWhoseStepIsRefused(t *testing.T) {
	s, out := newSessions(1), &sent{}
	box := openBox(t, s, 1, "a", "b", "c")
	session := &scripted{step: func(m protocol.Message) (protocol.Ready, error) {
		return protocol.Ready{}, fmt.Errorf("host %q: message of round 0, which is over", m.From)
	}}
	s.deliver(box.id[:], step("c", 0))
	err := drive(t.Context(), "a", session, box, out.send, nil)
	if !slices.Equal(culprits(err), []protocol.HostID{"c"}) || err.Error() != `host "c": message of round 0, which is over` {
		t.Errorf("error %q blames %q", err, culprits(err))
	}
}

// Whoever calls a session off here is not waiting for anybody.
func TestDriveCalledOffBlamesNobody(t *testing.T) {
	for _, cause := range []error{nil, errSuperseded} {
		s, out := newSessions(1), &sent{}
		box := openBox(t, s, 1, "a", "b", "c")
		ctx, cancel := context.WithCancelCause(t.Context())
		cancel(cause)
		err := drive(ctx, "a", &scripted{}, box, out.send, nil)
		if want := context.Cause(ctx); !errors.Is(err, want) || culprits(err) != nil {
			t.Errorf("error %v blames %q, want %v", err, culprits(err), want)
		}
	}
}

func TestDriveNamesAPartyThatCannotBeReached(t *testing.T) {
	s := newSessions(1)
	box := openBox(t, s, 1, "a", "b", "c")
	session := &scripted{start: func() (protocol.Ready, error) {
		return protocol.Ready{Send: []protocol.Message{{To: "b"}, {To: "c"}}}, nil
	}}
	send := func(to protocol.HostID, f *peerpb.Frame) error {
		if to == "c" {
			return errors.New("not connected")
		}
		return nil
	}
	if err := drive(t.Context(), "a", session, box, send, nil); !slices.Equal(culprits(err), []protocol.HostID{"c"}) {
		t.Errorf("error %v", err)
	}
}

// A deadline names a party that owes an answer; if none does, the one who set it
// says why, and nobody is blamed.
func TestDriveDeadline(t *testing.T) {
	for name, c := range map[string]struct {
		heard  []protocol.HostID
		silent []protocol.HostID
	}{
		"nobody answered": {nil, []protocol.HostID{"b"}},
		"one answered":    {[]protocol.HostID{"b"}, []protocol.HostID{"c"}},
		"all answered":    {[]protocol.HostID{"b", "c"}, nil},
	} {
		s, out := newSessions(1), &sent{}
		box := openBox(t, s, 1, "a", "b", "c")
		ctx, cancel := context.WithCancelCause(t.Context())
		seen := 0
		if len(c.heard) == 0 {
			cancel(errors.New("too long"))
		}
		session := &scripted{step: func(protocol.Message) (protocol.Ready, error) {
			if seen++; seen == len(c.heard) {
				cancel(errors.New("too long"))
			}
			return protocol.Ready{}, nil
		}}
		for _, h := range c.heard {
			s.deliver(box.id[:], step(h, 1))
		}
		err := drive(ctx, "a", session, box, out.send, nil)
		if !slices.Equal(culprits(err), c.silent) || len(c.silent) == 0 && !strings.Contains(err.Error(), "too long") {
			t.Errorf("%s: error %v blames %q, want %q", name, err, culprits(err), c.silent)
		}
	}
}

// An End always can be sent, and shows nothing that a terminal would obey.
func TestEndIsFitToSend(t *testing.T) {
	for _, text := range []string{strings.Repeat("ä", 400), strings.Repeat("x", 511) + "ä", "\x1b[2Jgone\r\nFORGED", "broken \xff", strings.Repeat("\U0001f512", 200)} {
		f := endFrame(protocol.SessionID{}, reasonAborted, text)
		if _, err := proto.Marshal(f); err != nil {
			t.Errorf("%.20q: %v", text, err)
		}
		got := f.GetEnd().Text
		if len(got) > 512 || !utf8.ValidString(got) || strings.ContainsAny(got, "\x1b\r\n") || got == "" {
			t.Errorf("%.20q became %q", text, got)
		}
	}
}

func TestCulpritsOfJoinedErrors(t *testing.T) {
	err := errors.Join(protocol.Faultf("b", "one"), errors.Join(protocol.Faultf("c", "two"), errors.New("no party")), &partyError{host: "d"})
	if got := culprits(err); !slices.Equal(got, []protocol.HostID{"b", "c", "d"}) {
		t.Errorf("culprits %q", got)
	}
	if got := culprits(errors.New("nobody's fault")); len(got) != 0 {
		t.Errorf("culprits %q", got)
	}
}
