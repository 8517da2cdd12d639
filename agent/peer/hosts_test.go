package peer_test

import (
	"context"
	"crypto/ecdsa"
	"errors"
	"io"
	"maps"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"conseal/agent/peer"
	"conseal/agent/peer/peerpb"
	"conseal/protocol"
)

// only is the roster with some of its hosts.
func (f *fleet) only(names ...protocol.HostID) map[protocol.HostID]peer.Host {
	hosts := maps.Clone(f.hosts)
	maps.DeleteFunc(hosts, func(h protocol.HostID, _ peer.Host) bool { return !slices.Contains(names, h) })
	return hosts
}

// with is the roster with another line for a host.
func (f *fleet) with(name protocol.HostID, change func(*peer.Host)) map[protocol.HostID]peer.Host {
	hosts := maps.Clone(f.hosts)
	h := hosts[name]
	change(&h)
	hosts[name] = h
	return hosts
}

func (f *fleet) repin(name protocol.HostID) map[protocol.HostID]peer.Host {
	return f.with(name, func(h *peer.Host) { h.Pin = pinOf(f.t, newKey(f.t)) })
}

func (f *fleet) readdress(name protocol.HostID, address string) map[protocol.HostID]peer.Host {
	return f.with(name, func(h *peer.Host) { h.Address = address })
}

func (n *node) set(hosts map[protocol.HostID]peer.Host) {
	n.t.Helper()
	if err := n.SetHosts(hosts); err != nil {
		n.t.Fatal(err)
	}
}

// talk sends a frame each way.
func talk(t *testing.T, one, other *node, oneName, otherName protocol.HostID) {
	t.Helper()
	for _, err := range []error{one.Send(otherName, step("s", 1, nil)), other.Send(oneName, step("s", 2, nil))} {
		if err != nil {
			t.Fatal(err)
		}
	}
	other.next("frame", oneName)
	one.next("frame", otherName)
}

// A host that is added is let in if it dials, and dialled if it listens.
func TestSetHostsAdds(t *testing.T) {
	for _, name := range []protocol.HostID{"a", "c"} {
		t.Run(string(name), func(t *testing.T) {
			f := newFleet(t, "a", "b", "c")
			b := f.start("b", func(c *peer.Config) { c.Hosts = f.only("b") })
			other := f.start(name, nil)
			if name == "a" {
				b.log.wait(t, "is not in the roster")
			}
			if err := b.Send(name, step("s", 1, nil)); !errors.Is(err, peer.ErrDown) || len(b.States()) != 0 {
				t.Errorf("before: got %v, states %v", err, b.States())
			}
			b.set(f.only("b", name))
			b.next("up", name)
			other.next("up", "b")
			talk(t, b, other, "b", name)
			if s := b.States(); len(s) != 1 || !s[0].Connected || s[0].Address != f.hosts[name].Address {
				t.Errorf("states are %+v", s)
			}
		})
	}
}

func TestSetHostsBeforeRun(t *testing.T) {
	f := newFleet(t, "a", "b", "c")
	cfg := f.config("b")
	cfg.Hosts = f.only("b", "a")
	rec := newRecorder(t)
	n, err := peer.New(cfg, rec)
	if err != nil {
		t.Fatal(err)
	}
	if err := n.SetHosts(f.only("b", "c")); err != nil {
		t.Fatal(err)
	}
	b := f.run("b", n, rec, nil)
	a := f.start("a", nil)
	a.log.wait(t, "refuses this host (is its identity in the roster there?)")
	f.start("c", func(c *peer.Config) { c.Hosts = f.only("b", "c") })
	b.next("up", "c")
	b.stop()
	if err := b.SetHosts(f.hosts); err != nil || len(b.States()) != 2 {
		t.Errorf("after Run: %v, states %v", err, b.States())
	}
}

// A host that is gone is down, is refused and is not dialled; the others notice
// nothing. It can come back.
func TestSetHostsRemoves(t *testing.T) {
	for gone, stays := range map[protocol.HostID]protocol.HostID{"a": "c", "c": "a"} {
		t.Run(string(gone), func(t *testing.T) {
			f := newFleet(t, "a", "b", "c")
			nodes := map[protocol.HostID]*node{}
			for _, name := range []protocol.HostID{"a", "c"} {
				nodes[name] = f.start(name, func(c *peer.Config) { c.Hosts = f.only("b", name) })
			}
			b := f.start("b", nil) // refuses nobody yet
			for range 2 {
				<-b.events
			}
			nodes[gone].next("up", "b")
			nodes[stays].next("up", "b")
			b.set(f.only("b", stays))
			if err := b.Send(gone, step("s", 1, nil)); !errors.Is(err, peer.ErrDown) {
				t.Errorf("got %v, want ErrDown", err)
			}
			if s := b.States(); len(s) != 1 || s[0].Host != stays || !s[0].Connected {
				t.Errorf("states are %+v", s)
			}
			if e := b.next("down", gone); e.err == nil || !strings.Contains(e.err.Error(), "not in the roster any more") {
				t.Errorf("got %v", e.err)
			}
			nodes[gone].next("down", "b")
			if gone == "a" { // which dials
				nodes["a"].log.wait(t, "refuses this host (is its identity in the roster there?)")
			}
			talk(t, b, nodes[stays], "b", stays)
			b.set(f.hosts)
			b.next("up", gone)
			nodes[gone].next("up", "b")
			talk(t, b, nodes[gone], "b", gone)
			nodes[stays].quiet()
		})
	}
}

// busyHandler says when it is in Frame, and stays there.
type busyHandler struct {
	*recorder
	entered, leave chan struct{}
}

func newBusy(r *recorder) *busyHandler {
	return &busyHandler{r, make(chan struct{}, 1), make(chan struct{})}
}

func (b *busyHandler) Frame(h protocol.HostID, f *peerpb.Frame) {
	b.recorder.Frame(h, f)
	select {
	case b.entered <- struct{}{}:
	default:
	}
	<-b.leave
}

// Frames that were read before their sender lost its place are not handed over
// after that, and nothing is sent to it. Its successor is up when it is down.
func TestSetHostsEndsFrames(t *testing.T) {
	const count = 100
	successor := newKey(t)
	tests := []struct {
		name  string
		hosts func(*fleet) map[protocol.HostID]peer.Host
		ends  bool
		next  func(*fleet) *ecdsa.PrivateKey // who comes then
	}{
		{"stays", func(f *fleet) map[protocol.HostID]peer.Host { return f.readdress("a", "a:1") }, false, nil},
		{"gone", func(f *fleet) map[protocol.HostID]peer.Host { return f.only("b") }, true, nil},
		{"gone and back", func(f *fleet) map[protocol.HostID]peer.Host { return f.only("b") }, true,
			func(f *fleet) *ecdsa.PrivateKey { return f.keys["a"] }},
		{"another identity", func(f *fleet) map[protocol.HostID]peer.Host {
			return f.with("a", func(h *peer.Host) { h.Pin = pinOf(t, successor) })
		}, true, func(*fleet) *ecdsa.PrivateKey { return successor }},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			f := newFleet(t, "a", "b")
			var busy *busyHandler
			b := f.startWith("b", func(r *recorder) peer.Handler { busy = newBusy(r); return busy }, nil)
			leave := sync.OnceFunc(func() { close(busy.leave) })
			defer leave()
			r := f.raw("b", certFor(t, f.keys["a"], "a"))
			r.greet("test")
			b.next("up", "a")
			var record []byte // one, so that all frames arrive together
			for i := range count {
				var err error
				if record, err = peer.AppendFrame(record, step("s", uint32(i), nil), 1000); err != nil {
					t.Fatal(err)
				}
			}
			if _, err := r.Write(record); err != nil {
				t.Fatal(err)
			}
			<-busy.entered
			b.set(test.hosts(f))
			if err := b.Send("a", step("s", 1, nil)); errors.Is(err, peer.ErrDown) != test.ends {
				t.Errorf("Send: got %v", err)
			}
			if test.next != nil {
				b.set(f.with("a", func(h *peer.Host) { h.Pin = pinOf(t, test.next(f)) }))
				closed := make(chan struct{}, 2)
				for range 2 { // must wait; that one took the other's place shows that both got as far as that
					s := f.raw("b", certFor(t, test.next(f), "a"))
					s.greet("test")
					go func() { _, _ = io.Copy(io.Discard, s); closed <- struct{}{} }()
				}
				<-closed
				b.next("frame", "a")
				b.quiet()
				leave()
				b.next("down", "a")
				b.next("up", "a")
				return
			}
			leave()
			b.next("frame", "a")
			for i := 1; i < count && !test.ends; i++ {
				b.next("frame", "a")
			}
			r.Close()
			b.next("down", "a")
		})
	}
}

// The successor of a host is connected to, the host itself not any more.
func TestSetHostsRepins(t *testing.T) {
	for _, name := range []protocol.HostID{"a", "c"} {
		t.Run(string(name), func(t *testing.T) {
			f := newFleet(t, "a", "b", "c")
			b := f.start("b", func(c *peer.Config) { c.Hosts = f.only("b", name) })
			former := f.start(name, func(c *peer.Config) { c.Hosts = f.only("b", name) })
			b.next("up", name)
			former.next("up", "b")
			key := newKey(t)
			f.hosts = f.with(name, func(h *peer.Host) { h.Pin = pinOf(t, key) })
			b.set(f.only("b", name))
			b.next("down", name)
			former.next("down", "b")
			b.log.wait(t, "identity sha256:") // the former's, a stranger's now
			former.stop()
			b.quiet()
			f.keys[name] = key
			successor := f.start(name, func(c *peer.Config) {
				c.Hosts = f.only("b", name)
				c.Listener, c.Listen = nil, f.hosts[name].Address
			})
			b.next("up", name)
			successor.next("up", "b")
			talk(t, b, successor, "b", name)
		})
	}
}

// A new address is used when the stream is lost, and not before.
func TestSetHostsReaddresses(t *testing.T) {
	f := newFleet(t, "a", "b")
	a, b := f.start("a", nil), f.start("b", nil)
	a.next("up", "b")
	b.next("up", "a")
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	a.set(f.readdress("b", l.Addr().String()))
	if s := a.States()[0]; !s.Connected || s.Address != l.Addr().String() {
		t.Errorf("state is %+v", s)
	}
	talk(t, a, b, "a", "b")
	b.stop()
	a.next("down", "b")
	b = f.start("b", func(c *peer.Config) { c.Listener = l })
	a.next("up", "b")
	b.next("up", "a")
}

// A host that is not dialled any more is let go at once.
func TestSetHostsEndsDialling(t *testing.T) {
	f := newFleet(t, "a", "b")
	dialling, ended := make(chan struct{}), make(chan struct{})
	a := f.start("a", func(c *peer.Config) {
		c.Handshake = time.Hour
		c.Dial = func(ctx context.Context, _ string) (net.Conn, error) {
			close(dialling)
			<-ctx.Done()
			close(ended)
			return nil, ctx.Err()
		}
	})
	<-dialling
	a.set(f.only("a"))
	select {
	case <-ended:
	case <-time.After(patience):
		t.Fatal("it is still dialled")
	}
}

// gate holds up one hello, while the other end is known and the stream not up.
type gate struct {
	once           sync.Once
	entered, leave chan struct{}
}

func newGate() *gate { return &gate{entered: make(chan struct{}), leave: make(chan struct{})} }

func (g *gate) pass() {
	g.once.Do(func() {
		close(g.entered)
		<-g.leave
	})
}

// Who was in the roster when the handshake began, but is not when it ends, is not
// let in: neither who dials nor who was dialled.
func TestSetHostsDuringHandshake(t *testing.T) {
	for _, name := range []protocol.HostID{"a", "c"} {
		for _, change := range []string{"none", "gone", "another identity"} {
			t.Run(string(name)+" "+change, func(t *testing.T) {
				f := newFleet(t, "a", "b", "c")
				g := newGate()
				b := f.start("b", func(c *peer.Config) {
					c.Hosts = f.only("b", name)
					c.Hello = func() *peerpb.Hello { g.pass(); return &peerpb.Hello{} }
				})
				other := f.start(name, func(c *peer.Config) { c.Hosts = f.only("b", name) })
				<-g.entered
				switch change {
				case "none":
					b.set(f.hosts)
				case "gone":
					b.set(f.only("b"))
				default:
					b.set(f.repin(name))
				}
				close(g.leave)
				if change == "none" {
					b.next("up", name)
					return
				}
				other.log.wait(t, " err=") // of the stream's end, whether it was up there or not
				b.stop()
				b.quiet()
			})
		}
	}
}

// A set of hosts that New would refuse changes nothing.
func TestSetHostsRefuses(t *testing.T) {
	f := newFleet(t, "a", "b", "c")
	a, b := f.start("a", nil), f.start("b", nil)
	a.next("up", "b")
	b.next("up", "a")
	stranger := peer.Host{Address: "x:1", Pin: pinOf(t, newKey(t))}
	tests := []struct {
		want  string
		hosts map[protocol.HostID]peer.Host
	}{
		{"not in the roster", nil},
		{`this host, "b", is not in the roster`, map[protocol.HostID]peer.Host{"x": stranger}},
		{"peers would refuse it", map[protocol.HostID]peer.Host{"b": stranger}},
		{"has no identity", map[protocol.HostID]peer.Host{"b": f.hosts["b"], "x": {Address: "x:1"}}},
		{`hosts "b" and "x" have one identity`, map[protocol.HostID]peer.Host{"b": f.hosts["b"], "x": f.hosts["b"]}},
		{"not host:port", map[protocol.HostID]peer.Host{"b": f.hosts["b"], "x": {Pin: stranger.Pin}}},
	}
	for _, test := range tests {
		if err := b.SetHosts(test.hosts); err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("got %v, want %q", err, test.want)
		}
		if s := b.States(); len(s) != 2 || s[0].Host != "a" || s[1].Host != "c" || s[1].Address != f.hosts["c"].Address {
			t.Errorf("%s: states are %+v", test.want, s)
		}
	}
	talk(t, a, b, "a", "b")
	f.start("c", nil)
	b.next("up", "c")
	b.quiet()
}

// settingHandler takes up other hosts in its calls.
type settingHandler struct {
	*recorder
	set func()
}

func (s *settingHandler) Frame(h protocol.HostID, f *peerpb.Frame) {
	s.recorder.Frame(h, f)
	s.set()
}

func TestSetHostsByTheHandler(t *testing.T) {
	f := newFleet(t, "a", "b")
	a := f.start("a", nil)
	handler := &settingHandler{}
	b := f.startWith("b", func(r *recorder) peer.Handler { handler.recorder = r; return handler }, nil)
	a.next("up", "b")
	b.next("up", "a")
	handler.set = func() { b.set(f.only("b")) }
	if err := a.Send("b", step("s", 1, nil)); err != nil {
		t.Fatal(err)
	}
	b.next("frame", "a")
	b.next("down", "a")
}

// Hosts come and go while all else goes on, and no frame of the others is lost.
func TestSetHostsWhileAllElseGoesOn(t *testing.T) {
	const frames, flips = 2000, 20
	f := newFleet(t, "a", "b", "c")
	a := f.start("a", func(c *peer.Config) { c.Hosts = f.only("a", "b") })
	c := f.start("c", func(c *peer.Config) { c.Hosts, c.Rate = f.only("b", "c"), 1<<30 })
	b := f.start("b", nil)
	a.next("up", "b")
	c.next("up", "b")
	b.skipTo("up", "a")
	done := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		for i := 0; i < frames; {
			switch err := a.Send("b", step("s", uint32(i), nil)); {
			case err == nil:
				i++
			case !errors.Is(err, peer.ErrFull):
				t.Errorf("a: %v", err)
				return
			}
		}
	})
	wg.Go(func() {
		for {
			select {
			case <-done:
				return
			default:
			}
			if err := b.Send("c", step("s", 1, nil)); err != nil && !errors.Is(err, peer.ErrDown) && !errors.Is(err, peer.ErrFull) {
				t.Errorf("b: %v", err)
			}
			if s := b.States(); s[0].Host != "a" || !s[0].Connected {
				t.Errorf("states are %+v", s)
			}
		}
	})
	for range flips {
		b.set(f.only("a", "b"))
		c.skipTo("down", "b")
		b.set(f.hosts)
		c.skipTo("up", "b")
	}
	close(done)
	wg.Wait()
	for i := range frames {
		if e := b.skipTo("frame", "a"); int(e.frame.GetStep().GetRound()) != i {
			t.Fatalf("got frame %d of a, want %d", e.frame.GetStep().GetRound(), i)
		}
	}
	a.quiet()
}
