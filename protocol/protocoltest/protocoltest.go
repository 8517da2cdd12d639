// Package protocoltest runs sessions of a protocol against each other in tests.
package protocoltest

import (
	"errors"
	"fmt"
	mathrand "math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"

	"conseal/protocol"
)

// Network carries messages between sessions of one run, each session in a goroutine.
type Network[S protocol.Session] struct {
	Sessions map[protocol.HostID]S
	// Alter may change a message, or drop it by returning nothing.
	Alter func(protocol.Message) []protocol.Message
}

// Connect makes the sessions of a network, under one id.
func Connect[S protocol.Session](t testing.TB, hosts []protocol.HostID, build func(id protocol.SessionID, h protocol.HostID) (S, error)) Network[S] {
	t.Helper()
	n, id := Network[S]{Sessions: map[protocol.HostID]S{}}, SessionID()
	for _, h := range hosts {
		s, err := build(id, h)
		if err != nil {
			t.Fatal(err)
		}
		n.Sessions[h] = s
	}
	return n
}

// Untyped are the network's sessions as those of any protocol.
func (n Network[S]) Untyped() map[protocol.HostID]protocol.Session {
	out := map[protocol.HostID]protocol.Session{}
	for h, s := range n.Sessions {
		out[h] = s
	}
	return out
}

// Run returns the error of each host that failed. Hosts that wait for a message when
// nothing is under way any more are in waiting.
func (n *Network[S]) Run(t testing.TB) (failed map[protocol.HostID]error, waiting []protocol.HostID) {
	t.Helper()
	type inbox struct {
		queue []protocol.Message
		done  bool
	}
	var mu sync.Mutex
	cond := sync.NewCond(&mu)
	busy := len(n.Sessions)
	boxes := map[protocol.HostID]*inbox{}
	for h := range n.Sessions {
		boxes[h] = &inbox{}
	}
	failed = map[protocol.HostID]error{}
	post := func(messages []protocol.Message) {
		for _, m := range messages {
			out := []protocol.Message{m}
			if n.Alter != nil {
				out = n.Alter(m)
			}
			for _, m := range out {
				if box := boxes[m.To]; box != nil {
					box.queue = slices.Insert(box.queue, mathrand.IntN(len(box.queue)+1), m)
				}
			}
		}
	}
	over := func() bool { // nobody has anything to do
		for _, box := range boxes {
			if !box.done && len(box.queue) > 0 {
				return false
			}
		}
		return busy == 0
	}
	var wg sync.WaitGroup
	for h, s := range n.Sessions {
		wg.Go(func() {
			ready, err := s.Start()
			for {
				mu.Lock()
				if err == nil {
					post(ready.Send)
				} else {
					failed[h] = err
				}
				box := boxes[h]
				box.done = err != nil || ready.Done
				busy--
				cond.Broadcast()
				for !box.done && len(box.queue) == 0 && !over() {
					cond.Wait()
				}
				if box.done || len(box.queue) == 0 {
					if !box.done {
						waiting = append(waiting, h)
					}
					cond.Broadcast()
					mu.Unlock()
					return
				}
				m := box.queue[0]
				box.queue = box.queue[1:]
				busy++
				mu.Unlock()
				ready, err = s.Step(m)
			}
		})
	}
	wg.Wait()
	return failed, waiting
}

// MustRun fails the test unless all sessions end well.
func (n *Network[S]) MustRun(t testing.TB) {
	t.Helper()
	if failed, waiting := n.Run(t); len(failed)+len(waiting) > 0 {
		t.Fatalf("failed %v, waiting %v", failed, waiting)
	}
}

// Hosts are n names, sorted: a, b, c...
func Hosts(n int) (out []protocol.HostID) {
	for i := range n {
		out = append(out, protocol.HostID(rune('a'+i)))
	}
	return out
}

// Some are n of hosts, at random, sorted.
func Some(hosts []protocol.HostID, n int) []protocol.HostID {
	all := slices.Clone(hosts)
	mathrand.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
	return slices.Sorted(slices.Values(all[:n]))
}

// SessionID is a random one. It takes nothing from crypto/rand, which a test may fix.
func SessionID() (id protocol.SessionID) {
	for i := range id {
		id[i] = byte(mathrand.Uint32())
	}
	return id
}

// Blames tells whether an error names a host, as its culprit if it has one.
func Blames(err error, host protocol.HostID) bool {
	var fault *protocol.Fault
	if errors.As(err, &fault) {
		return fault.Host == host
	}
	return err != nil && strings.Contains(err.Error(), fmt.Sprintf("host %q", host))
}

// Aside stands in for a test whose work outlives it, or is for all tests: what fails
// panics.
type Aside struct{ testing.TB }

// Helper, Fatal and Fatalf are what is used of a test.
func (Aside) Helper()                           {}
func (Aside) Fatal(args ...any)                 { panic(fmt.Sprint(args...)) }
func (Aside) Fatalf(format string, args ...any) { panic(fmt.Sprintf(format, args...)) }
