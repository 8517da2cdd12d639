package protocoltest

import (
	"bytes"
	"errors"
	"fmt"
	"sync/atomic"
	"testing"

	"conseal/protocol"
)

// Fuzz fuzzes what follows the head of one message, of host b to host a: that of a
// round and of a kind, which is the first byte of its body. What passes refuses, a must
// refuse and name b, and stay as it was. What passes lets through is given to a session
// of its own, since it changes that: it must not end well. Where sessions are slow,
// only one is run at a time, beside the fuzzing, which ends a process that takes a
// second for one input.
func Fuzz(f *testing.F, build func(testing.TB) map[protocol.HostID]protocol.Session, round uint16, kind byte, passes func(content []byte) bool, slow bool) {
	a, message := pause(f, build(f), round, kind)
	head := 2 + 64 + int(message.Body[65])
	honest := message.Body[head:]
	f.Add(bytes.Clone(honest))
	f.Add(append(bytes.Clone(honest), 0))
	f.Add(honest[:len(honest)/2])
	f.Add([]byte{0xf6})
	for at := 0; at < len(honest); at += 1 + len(honest)/16 {
		changed := bytes.Clone(honest)
		changed[at] ^= 0x41
		f.Add(changed)
	}
	through := func(t testing.TB, content []byte) {
		session, m := pause(t, build(t), round, kind)
		defer session.Close()
		m.Body = append(m.Body[:head:head], content...)
		if ready, _ := session.Step(m); ready.Done {
			panic(fmt.Sprintf("a changed message ends well: %x", content))
		}
	}
	var busy atomic.Bool
	f.Fuzz(func(t *testing.T, content []byte) {
		switch {
		case bytes.Equal(content, honest):
		case !passes(content):
			m := message
			m.Body = append(bytes.Clone(message.Body[:head]), content...)
			var fault *protocol.Fault
			if _, err := a.Step(m); !errors.As(err, &fault) || fault.Host != "b" {
				t.Errorf("not refused, or its sender not named: %v: %x", err, content)
			}
		case !slow:
			through(t, content)
		case busy.CompareAndSwap(false, true):
			content := bytes.Clone(content)
			go func() {
				defer busy.Store(false)
				through(Aside{}, content)
			}()
		}
	})
}

// pause runs sessions until b sends a the message that is wanted, and returns a and
// that message, which a has not seen.
func pause(t testing.TB, sessions map[protocol.HostID]protocol.Session, round uint16, kind byte) (protocol.Session, protocol.Message) {
	var queue []protocol.Message
	post := func(ready protocol.Ready, err error) {
		if err != nil {
			t.Fatal(err)
		}
		queue = append(queue, ready.Send...)
	}
	post(sessions["a"].Start())
	post(sessions["b"].Start())
	for len(queue) > 0 {
		m := queue[0]
		queue = queue[1:]
		if m.To == "a" && m.Round == round && m.Body[0] == kind {
			sessions["b"].Close()
			return sessions["a"], m
		}
		post(sessions[m.To].Step(m))
	}
	t.Fatalf("no message of kind %c in round %d", kind, round)
	return nil, protocol.Message{}
}
