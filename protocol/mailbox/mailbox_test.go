package mailbox_test

import (
	"errors"
	"slices"
	"testing"

	"conseal/protocol"
	"conseal/protocol/mailbox"
)

func box() *mailbox.Box {
	return &mailbox.Box{Session: protocol.SessionID{1}, Self: "a", Round: 1, Rounds: []mailbox.Round{
		1: {From: []protocol.HostID{"b", "c"}, Min: 2, Max: 3}, 2: {}, 3: mailbox.Exactly(1, []protocol.HostID{"b"}),
	}}
}

func message(from protocol.HostID, round uint16, size int) protocol.Message {
	return protocol.Message{Session: protocol.SessionID{1}, From: from, To: "a", Round: round, Body: make([]byte, size)}
}

// TestPut holds each message to what its round has. Only a message that its sender
// cannot have been led to send is its fault.
func TestPut(t *testing.T) {
	with := func(m protocol.Message, change func(*protocol.Message)) protocol.Message {
		change(&m)
		return m
	}
	for name, test := range map[string]struct {
		m     protocol.Message
		good  bool
		fault bool
	}{
		"the shortest":       {message("b", 1, 2), true, false},
		"the longest":        {message("b", 1, 3), true, false},
		"too short":          {message("b", 1, 1), false, true},
		"too long":           {message("b", 1, 4), false, true},
		"empty":              {message("b", 1, 0), false, true},
		"of nobody's round":  {message("b", 2, 1), false, true},
		"too early":          {message("b", 3, 1), false, true},
		"of no round":        {message("b", 9, 1), false, true},
		"of round 0":         {message("b", 0, 1), false, false},
		"of another session": {with(message("b", 1, 2), func(m *protocol.Message) { m.Session[0]++ }), false, false},
		"for another":        {with(message("b", 1, 2), func(m *protocol.Message) { m.To = "b" }), false, false},
		"a stranger's":       {message("z", 1, 2), false, false},
		"our own":            {message("a", 1, 2), false, false},
	} {
		err := box().Put(test.m)
		var fault *protocol.Fault
		if (err == nil) != test.good || errors.As(err, &fault) != test.fault {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestRounds takes rounds when all messages are there, with one that comes early, and
// one that nobody sends.
func TestRounds(t *testing.T) {
	b := box()
	put := func(from protocol.HostID, round uint16, size int) {
		t.Helper()
		if err := b.Put(message(from, round, size)); err != nil {
			t.Fatal(err)
		}
	}
	put("c", 1, 2)
	if _, ok := b.Take(); ok || !slices.Equal(b.Missing(), []protocol.HostID{"b"}) {
		t.Fatalf("taken, or missing %q", b.Missing())
	}
	if err := b.Put(message("c", 1, 2)); err == nil {
		t.Error("a second message was taken")
	}
	put("b", 1, 3)
	if bodies, ok := b.Take(); !ok || len(bodies["b"]) != 3 || len(bodies["c"]) != 2 {
		t.Errorf("got %v", bodies)
	}
	put("b", 3, 1) // early
	if err := b.Put(message("c", 3, 1)); err == nil {
		t.Error("a message of a host that does not send in this round was taken")
	}
	if bodies, ok := b.Take(); !ok || len(bodies) > 0 {
		t.Errorf("the round that nobody sends: %v, %v", bodies, ok)
	}
	if bodies, ok := b.Take(); !ok || len(bodies) != 1 {
		t.Errorf("the last round: %v, %v", bodies, ok)
	}
	if _, ok := b.Take(); ok || b.Missing() != nil {
		t.Error("there is something after the last round")
	}
}

// TestBodiesAreCopies: a driver may use its buffers again; a wiped box has nothing.
func TestBodiesAreCopies(t *testing.T) {
	b := box()
	m := message("b", 1, 2)
	if err := b.Put(m); err != nil {
		t.Fatal(err)
	}
	m.Body[0] = 9
	if err := b.Put(message("c", 1, 2)); err != nil {
		t.Fatal(err)
	}
	bodies, _ := b.Take()
	if bodies["b"][0] != 0 {
		t.Error("the box keeps the driver's body")
	}
	sent := []byte{1}
	out := b.ToAll([]protocol.HostID{"b", "c"}, 1, sent)
	sent[0] = 2
	if len(out) != 2 || out[0].Body[0] != 1 || out[1].To != "c" || out[1].From != "a" {
		t.Errorf("sends %+v", out)
	}
	b = box()
	if err := b.Put(message("b", 1, 2)); err != nil {
		t.Fatal(err)
	}
	b.Wipe()
	if len(b.Missing()) != 2 {
		t.Error("a wiped box has messages")
	}
	if got := mailbox.Others([]protocol.HostID{"a", "b"}, "a"); !slices.Equal(got, []protocol.HostID{"b"}) {
		t.Errorf("others: %q", got)
	}
}
