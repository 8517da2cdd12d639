package peer_test

import (
	"errors"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"conseal/agent/peer"
	"conseal/agent/peer/peerpb"
	"conseal/protocol"
)

// versioned makes a host say which roster it has.
func versioned(v *atomic.Uint64) func(*peer.Config) {
	return func(c *peer.Config) {
		c.Hello = func() *peerpb.Hello { return &peerpb.Hello{RosterVersion: v.Load()} }
	}
}

// wantHello waits for a hello of that version.
func (n *node) wantHello(kind string, host protocol.HostID, version uint64) {
	n.t.Helper()
	if got := n.next(kind, host).hello; got.RosterVersion != version || got.Fleet != "test" {
		n.t.Errorf("%s of %q: got %v, want version %d", kind, host, got, version)
	}
}

// Peers hear of a newer hello on the streams they have, in order with the frames.
func TestGreet(t *testing.T) {
	f := newFleet(t, "a", "b", "c")
	var version atomic.Uint64
	b := f.start("b", versioned(&version))
	peers := map[protocol.HostID]*node{}
	for _, name := range []protocol.HostID{"a", "c"} {
		peers[name] = f.start(name, func(c *peer.Config) { c.Hosts = f.only("b", name) })
		peers[name].wantHello("up", "b", 0)
		b.next("up", name)
	}
	send := func() {
		t.Helper()
		for name := range peers {
			if err := b.Send(name, step("s", 1, nil)); err != nil {
				t.Fatal(err)
			}
		}
	}
	send()
	version.Store(7)
	b.Greet()
	send()
	for name, p := range peers {
		p.next("frame", "b")
		p.wantHello("hello", "b", 7)
		p.next("frame", "b")
		talk(t, b, p, "b", name)
		p.quiet()
	}
	b.quiet()
}

// A hello that changes while a stream comes up is not missed.
func TestGreetDuringHandshake(t *testing.T) {
	for _, name := range []protocol.HostID{"a", "c"} {
		t.Run(string(name), func(t *testing.T) {
			f := newFleet(t, "a", "b", "c")
			g := newGate()
			var version atomic.Uint64
			b := f.start("b", func(c *peer.Config) {
				c.Hosts = f.only("b", name)
				c.Hello = func() *peerpb.Hello {
					h := &peerpb.Hello{RosterVersion: version.Load()}
					g.pass()
					return h
				}
			})
			other := f.start(name, func(c *peer.Config) { c.Hosts = f.only("b", name) })
			<-g.entered
			version.Store(7)
			b.Greet()
			close(g.leave)
			other.wantHello("up", "b", 0)
			other.wantHello("hello", "b", 7)
			b.next("up", name)
			talk(t, b, other, "b", name)
		})
	}
}

func TestGreetWhereTheQueueIsFull(t *testing.T) {
	f := newFleet(t, "a", "b")
	var busy *busyHandler
	b := f.startWith("b", func(r *recorder) peer.Handler { busy = newBusy(r); return busy }, nil)
	leave := sync.OnceFunc(func() { close(busy.leave) })
	defer leave()
	var version atomic.Uint64
	a := f.start("a", func(c *peer.Config) {
		versioned(&version)(c)
		c.QueueLen = 10
	})
	a.next("up", "b")
	b.next("up", "a")
	for {
		err := a.Send("b", step("s", 1, make([]byte, 64<<10)))
		if errors.Is(err, peer.ErrFull) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	version.Store(7)
	a.Greet()
	leave()
	if got := b.skipTo("hello", "a").hello.RosterVersion; got != 7 {
		t.Errorf("got version %d, want 7", got)
	}
}

// A later hello is checked as the first.
func TestLaterHelloIsChecked(t *testing.T) {
	tests := []struct {
		want  string
		hello *peerpb.Hello
		fault bool
	}{
		{"", &peerpb.Hello{Fleet: "test", RosterVersion: 7}, false},
		{`is of another fleet: "other" instead of "test"`, &peerpb.Hello{Fleet: "other"}, false},
		{"is over the limit of 4096", &peerpb.Hello{Fleet: "test", RosterDigest: make([]byte, 4096)}, true},
	}
	for _, test := range tests {
		t.Run(test.want, func(t *testing.T) {
			f := newFleet(t, "a", "b")
			b := f.start("b", nil)
			r := f.raw("b", certFor(t, f.keys["a"], "a"))
			r.greet("test")
			b.next("up", "a")
			r.send(&peerpb.Frame{Body: &peerpb.Frame_Hello{Hello: test.hello}})
			if test.want == "" {
				b.wantHello("hello", "a", 7)
				return
			}
			var fault *protocol.Fault
			if e := b.next("down", "a"); !strings.Contains(e.err.Error(), test.want) || errors.As(e.err, &fault) != test.fault {
				t.Errorf("got %v, want %q", e.err, test.want)
			}
		})
	}
}
