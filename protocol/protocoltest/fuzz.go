package protocoltest

import (
	"bytes"
	"errors"
	"hash/fnv"
	"testing"

	"conseal/protocol"
)

// Fuzz fuzzes what follows head bytes of one message, of host b to host a: that of a
// round and of a kind, which is the first byte of its body. What passes refuses, a must
// refuse and name b, and stay as it was. Of what passes lets through, every sample-th
// is given to a session of its own, since that changes it: it must not end well.
func Fuzz(f *testing.F, build func(testing.TB) map[protocol.HostID]protocol.Session, round uint16, kind byte, passes func(content []byte) bool, sample uint64) {
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
	f.Fuzz(func(t *testing.T, content []byte) {
		if bytes.Equal(content, honest) {
			return
		}
		m := message
		m.Body = append(bytes.Clone(message.Body[:head]), content...)
		session, through := a, passes(content)
		if through {
			h := fnv.New64a()
			h.Write(content)
			if h.Sum64()%sample != 0 {
				return
			}
			session, m = pause(t, build(t), round, kind)
			m.Body = append(m.Body[:head:head], content...)
			defer session.Close()
		}
		ready, err := session.Step(m)
		var fault *protocol.Fault
		switch {
		case ready.Done:
			t.Errorf("a changed message ends well: %x", content)
		case !through && (!errors.As(err, &fault) || fault.Host != "b"):
			t.Errorf("not refused, or its sender not named: %v: %x", err, content)
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
