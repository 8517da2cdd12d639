// Package protocoltest runs sessions of a protocol against each other in tests.
package protocoltest

import (
	"crypto/rand"
	mathrand "math/rand/v2"
	"slices"
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

// SessionID is a random one.
func SessionID() (id protocol.SessionID) {
	rand.Read(id[:])
	return id
}
