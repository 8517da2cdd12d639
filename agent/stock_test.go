package agent

import (
	"slices"
	"sync"
	"sync/atomic"
	"testing"

	"conseal/protocol"
)

// counted is a presignature that counts its ends. The real ones are in
// presign_test.go and in package cmp.
type counted struct{ ended *atomic.Int64 }

func (c counted) sign(protocol.SessionID, [32]byte) (signature, error) { return nil, nil }
func (c counted) discard()                                             { c.ended.Add(1) }

func TestStockGivesEachPresignatureOnce(t *testing.T) {
	s := newStock()
	var ended atomic.Int64
	const n = 100
	for i := range n {
		if err := s.add(&presigned{counted{&ended}, protocol.SessionID{byte(i)}, "a", []protocol.HostID{"a", "b"}}); err != nil {
			t.Fatal(err)
		}
	}
	var mu sync.Mutex
	taken := map[protocol.SessionID]int{}
	var wg sync.WaitGroup
	for worker := range 8 {
		wg.Go(func() {
			for i := range n {
				var p *presigned
				if worker%2 == 0 {
					p = s.any("a", func(protocol.HostID) bool { return true })
				} else {
					p = s.take(protocol.SessionID{byte(i)}, "a")
				}
				if p != nil {
					mu.Lock()
					taken[p.id]++
					mu.Unlock()
				}
			}
		})
	}
	wg.Wait()
	for id, times := range taken {
		if times != 1 {
			t.Errorf("%s was given %d times", id, times)
		}
	}
	if len(taken) != n {
		t.Errorf("%d were given, want %d", len(taken), n)
	}
}

func TestStockRefuses(t *testing.T) {
	var ended atomic.Int64
	id := protocol.SessionID{1}
	fresh := func() *stock {
		s := newStock()
		ended.Store(0)
		if err := s.add(&presigned{counted{&ended}, id, "a", []protocol.HostID{"a", "b"}}); err != nil {
			t.Fatal(err)
		}
		return s
	}
	if s := fresh(); s.take(id, "b") != nil || s.take(protocol.SessionID{2}, "a") != nil || s.take(id, "a") == nil {
		t.Error("a host that is not the owner takes it, or the owner does not")
	}
	if s := fresh(); s.add(&presigned{counted{&ended}, id, "a", nil}) == nil || ended.Load() != 1 {
		t.Error("two of one id")
	}
	if s := fresh(); s.any("a", func(h protocol.HostID) bool { return h != "b" }) != nil || s.any("b", func(protocol.HostID) bool { return true }) != nil {
		t.Error("given for signers that do not fit, or to another host")
	}
	s := fresh()
	s.drop("c")
	if s.ready("a", []protocol.HostID{"a", "b"}) != 1 {
		t.Error("a host that is no signer drops it")
	}
	s.drop("b")
	if s.take(id, "a") != nil || ended.Load() != 1 {
		t.Error("it outlives the connection")
	}
	s = fresh()
	s.close()
	if s.take(id, "a") != nil || ended.Load() != 1 || s.add(&presigned{counted{&ended}, id, "a", nil}) == nil || ended.Load() != 2 {
		t.Error("it outlives the epoch")
	}
	s = fresh()
	for i := range maxHeld {
		err := s.add(&presigned{counted{&ended}, protocol.SessionID{byte(i), byte(i >> 8), 1}, "b", nil})
		if err != nil {
			t.Fatal(err)
		}
	}
	if s.add(&presigned{counted{&ended}, protocol.SessionID{9, 9, 9}, "b", nil}) == nil || s.take(id, "a") == nil {
		t.Error("one host fills the stock, or takes another's room")
	}
}

// TestSignerSets wants every other host in as many sets as any, and no set twice.
func TestSignerSets(t *testing.T) {
	for n := 2; n <= 7; n++ {
		for quorum := 2; quorum <= n; quorum++ {
			var others []protocol.HostID
			for i := range n - 1 {
				others = append(others, protocol.HostID(rune('b'+i)))
			}
			sets := circle("a", others, quorum-1)
			in := map[protocol.HostID]int{}
			for i, set := range sets {
				if len(set) != quorum || !slices.IsSorted(set) || !slices.Contains(set, "a") {
					t.Errorf("%d of %d: set %v", quorum, n, set)
				}
				for _, other := range sets[:i] {
					if slices.Equal(set, other) {
						t.Errorf("%d of %d: set %v twice", quorum, n, set)
					}
				}
				for _, h := range set {
					in[h]++
				}
			}
			for _, h := range others {
				if in[h] == 0 || in[h] != in["b"] {
					t.Errorf("%d of %d: hosts are in %v sets", quorum, n, in)
				}
			}
		}
	}
}
