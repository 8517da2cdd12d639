package peer_test

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"conseal/agent/peer"
	"conseal/agent/peer/peerpb"
	"conseal/protocol"
)

// slowSigner signs as hardware does.
type slowSigner struct {
	crypto.Signer
	takes time.Duration
}

func (s slowSigner) Sign(r io.Reader, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	<-time.After(s.takes)
	return s.Signer.Sign(r, digest, opts)
}

func TestThreeHosts(t *testing.T) {
	f := newFleet(t, "a", "b", "c")
	nodes := map[protocol.HostID]*node{}
	for name := range f.hosts {
		nodes[name] = f.start(name, func(c *peer.Config) {
			c.Identity = slowSigner{c.Identity, 50 * time.Millisecond}
		})
	}
	for name, n := range nodes {
		up := map[protocol.HostID]bool{}
		for range len(f.hosts) - 1 {
			select {
			case e := <-n.events:
				if e.kind != "up" || e.hello.Fleet != "test" || e.hello.RosterVersion != 1 {
					t.Fatalf("%q: got %+v, want up with a hello", name, e)
				}
				up[e.host] = true
			case <-time.After(patience):
				t.Fatalf("%q: only %v are up", name, up)
			}
		}
		for _, s := range n.States() {
			if !s.Connected || !up[s.Host] || s.Since.IsZero() || s.Address != f.hosts[s.Host].Address {
				t.Errorf("%q: state is %+v", name, s)
			}
		}
	}
	exchange(t, nodes, 500)
}

// exchange sends frames from each to each, the last of 1 MiB, and wants all of
// them in order.
func exchange(t *testing.T, nodes map[protocol.HostID]*node, count int) {
	t.Helper()
	body := func(i int) []byte { return bytes.Repeat([]byte{byte(i)}, 1+i%100*100+i/(count-1)<<20) }
	for from, n := range nodes {
		for to := range nodes {
			for i := 0; i < count && from != to; i++ {
				if err := n.Send(to, step(string(from), uint32(i), body(i))); err != nil {
					t.Fatal(err)
				}
			}
		}
	}
	for name, n := range nodes {
		next := map[protocol.HostID]int{}
		for range (len(nodes) - 1) * count {
			select {
			case e := <-n.events:
				s := e.frame.GetStep()
				if string(s.GetSession()) != string(e.host) || int(s.GetRound()) != next[e.host] || !bytes.Equal(s.GetBody(), body(next[e.host])) {
					t.Fatalf("%q: got %s of %q with round %d, want round %d", name, e.kind, e.host, s.GetRound(), next[e.host])
				}
				next[e.host]++
			case <-time.After(patience):
				t.Fatalf("%q: only %v frames came", name, next)
			}
		}
	}
}

func TestSendErrors(t *testing.T) {
	f := newFleet(t, "a", "b")
	a := f.start("a", func(c *peer.Config) { c.MaxFrame = 1000 })
	for _, to := range []protocol.HostID{"a", "b", "nobody"} {
		if err := a.Send(to, step("s", 1, nil)); !errors.Is(err, peer.ErrDown) {
			t.Errorf("to %q: got %v, want ErrDown", to, err)
		}
	}
	b := f.start("b", nil)
	a.next("up", "b")
	if err := a.Send("b", step("s", 1, make([]byte, 1000))); err == nil || !strings.Contains(err.Error(), "over the limit of 1000") {
		t.Errorf("long frame: got %v", err)
	}
	if err := a.Send("b", step("s", 2, nil)); err != nil {
		t.Error(err)
	}
	b.next("up", "a")
	if got := b.next("frame", "a").frame.GetStep().GetRound(); got != 2 {
		t.Errorf("got round %d, want 2", got)
	}
}

// A host that is killed and comes back is dialled again.
func TestReconnect(t *testing.T) {
	f := newFleet(t, "a", "b")
	a, b := f.start("a", nil), f.start("b", nil)
	a.next("up", "b")
	b.next("up", "a")
	b.stop()
	if e := a.next("down", "b"); e.err == nil {
		t.Error("down without an error")
	}
	if s := a.States()[0]; s.Connected || s.Err == "" {
		t.Errorf("state is %+v", s)
	}
	if err := a.Send("b", step("s", 1, nil)); !errors.Is(err, peer.ErrDown) {
		t.Errorf("got %v, want ErrDown", err)
	}
	b = f.start("b", func(c *peer.Config) { c.Listener, c.Listen = nil, f.hosts["b"].Address })
	a.next("up", "b")
	b.next("up", "a")
	if err := b.Send("a", step("s", 1, nil)); err != nil {
		t.Error(err)
	}
	a.next("frame", "b")
}

// While the handler is busy nothing is read; the sender's queue fills; nothing
// that was queued is lost.
func TestQueueFull(t *testing.T) {
	f := newFleet(t, "a", "b")
	busy := make(chan struct{})
	b := f.startWith("b", func(r *recorder) peer.Handler { return &waiting{r, busy} }, nil)
	a := f.start("a", func(c *peer.Config) { c.QueueLen = 100 })
	a.next("up", "b")
	queued := 0
	for ; ; queued++ {
		err := a.Send("b", step("s", uint32(queued), make([]byte, 64<<10)))
		if errors.Is(err, peer.ErrFull) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	if queued < 100 {
		t.Errorf("full after %d frames, want 100 or more", queued)
	}
	close(busy)
	b.next("up", "a")
	for i := range queued {
		if got := b.next("frame", "a").frame.GetStep().GetRound(); int(got) != i {
			t.Fatalf("got frame %d, want %d", got, i)
		}
	}
}

// waiting is a handler whose calls wait.
type waiting struct {
	*recorder
	busy chan struct{}
}

func (w *waiting) Frame(h protocol.HostID, f *peerpb.Frame) {
	<-w.busy
	w.recorder.Frame(h, f)
}

func TestRateHoldsThePeerBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f, net := newPipeFleet(t, "a", "b")
		b := f.start("b", func(c *peer.Config) { c.Rate, c.Burst = 100, 5 })
		a := f.start("a", net.use)
		a.next("up", "b")
		b.next("up", "a")
		begin := time.Now()
		const count = 2005
		for i := range count {
			if err := a.Send("b", step("s", uint32(i), nil)); err != nil {
				t.Fatal(err)
			}
		}
		// Until the end no stream is lost, though it takes far longer than silence may.
		for i := range count {
			select {
			case e := <-b.events:
				if e.kind != "frame" || int(e.frame.GetStep().GetRound()) != i {
					t.Fatalf("got %s (%v), want frame %d", e.kind, e.err, i)
				}
			case <-time.After(time.Minute):
				t.Fatalf("frame %d did not come", i)
			}
		}
		// Pings count too.
		if took := time.Since(begin); took < 20*time.Second || took > 21*time.Second {
			t.Errorf("%d frames took %v, want 20 s", count, took)
		}
		a.quiet()
		a.stop()
		b.stop()
	})
}

// Streams with nothing to say stay up; hosts that come late are dialled.
func TestHeartbeat(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f, net := newPipeFleet(t, "a", "b")
		a := f.start("a", net.use)
		time.Sleep(time.Hour)
		if s := a.States()[0]; s.Connected || !strings.Contains(s.Err, "deadline exceeded") {
			t.Errorf("state is %+v", s)
		}
		b := f.start("b", net.use)
		a.next("up", "b")
		b.next("up", "a")
		up := time.Now()
		time.Sleep(time.Hour)
		a.quiet()
		b.quiet()
		if s := a.States()[0]; !s.Connected || s.Since.After(up) {
			t.Errorf("state is %+v", s)
		}
		a.stop()
		b.next("down", "a")
		b.stop()
	})
}

func TestSilentPeerIsDropped(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f, net := newPipeFleet(t, "a", "b")
		b := f.start("b", net.use)
		r := f.rawPipe(net, "b", f.keys["a"])
		go io.Copy(io.Discard, r.Conn) // it takes what it gets and says nothing
		b.next("up", "a")
		up := time.Now()
		e := b.next("down", "a")
		if took := time.Since(up); took != 6*time.Second || e.err.Error() != "silent for 6s" {
			t.Errorf("down after %v: %v", took, e.err)
		}
		r.Conn.NetConn().Close()
		b.stop()
	})
}

// What is not done within the handshake's time is dropped.
func TestSlowStrangers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f, net := newPipeFleet(t, "a", "b")
		b := f.start("b", net.use)
		begin := time.Now()
		c, err := net.dial(t.Context(), "b")
		if err != nil {
			t.Fatal(err)
		}
		if _, err := c.Read(make([]byte, 1)); err == nil || time.Since(begin) != 10*time.Second {
			t.Errorf("%v after %v", err, time.Since(begin))
		}
		b.log.wait(t, "no hello within 10s")
		b.quiet()
		b.stop()
	})
}

// Run ends at once whatever its streams do.
func TestRunEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f, net := newPipeFleet(t, "a", "b", "c", "d")
		b := f.start("b", net.use) // dials c and d, who do not answer
		r := f.rawPipe(net, "b", f.keys["a"])
		b.next("up", "a")
		for i := range 100 { // a takes nothing
			if err := b.Send("a", step("s", uint32(i), make([]byte, 10_000))); err != nil {
				t.Fatal(err)
			}
		}
		stranger, err := net.dial(t.Context(), "b")
		if err != nil {
			t.Fatal(err)
		}
		begin := time.Now()
		b.stop()
		if took := time.Since(begin); took > 0 {
			t.Errorf("stopping took %v", took)
		}
		b.next("down", "a")
		r.Conn.NetConn().Close()
		stranger.Close()
	})
}

func TestRunReportsALostListener(t *testing.T) {
	f := newFleet(t, "a")
	n, err := peer.New(f.config("a"), newRecorder(t))
	if err != nil {
		t.Fatal(err)
	}
	f.listeners["a"].Close()
	if err := n.Run(t.Context()); !errors.Is(err, net.ErrClosed) {
		t.Errorf("got %v, want that the listener is closed", err)
	}
}

func TestNewRefuses(t *testing.T) {
	p384, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tests := []struct {
		want   string
		change func(*peer.Config)
	}{
		{"not in the roster", func(c *peer.Config) { delete(c.Hosts, "a") }},
		{"has no identity", func(c *peer.Config) { c.Hosts["b"] = peer.Host{Address: "b:1"} }},
		{`host "b" has address "b" in the roster, which is not host:port`, func(c *peer.Config) { c.Hosts["b"] = peer.Host{Address: "b", Pin: c.Hosts["b"].Pin} }},
		{`hosts "a" and "b" have one identity`, func(c *peer.Config) { c.Hosts["b"] = c.Hosts["a"] }},
		{"peers would refuse it", func(c *peer.Config) { c.Identity = newKey(t) }},
		{"not ECDSA on P-256", func(c *peer.Config) {
			c.Identity = p384
			c.Hosts["a"] = peer.Host{Address: "a:1", Pin: pinOf(t, p384)}
		}},
		{"identity and hello are needed", func(c *peer.Config) { c.Hello = nil }},
		{"names of host and fleet", func(c *peer.Config) { c.Fleet = "" }},
		{"address to listen on", func(c *peer.Config) { c.Listener = nil }},
		{"limits must be positive", func(c *peer.Config) { c.MaxFrame = -1 }},
		{"do not break a silence", func(c *peer.Config) { c.Ping = c.Silence }},
	}
	for _, test := range tests {
		t.Run(test.want, func(t *testing.T) {
			cfg := newFleet(t, "a", "b").config("a")
			test.change(&cfg)
			if _, err := peer.New(cfg, newRecorder(t)); err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("got %v, want %q", err, test.want)
			}
		})
	}
}

// echo answers every frame, and counts.
type echo struct {
	net   *peer.Net
	up    chan struct{}
	back  chan struct{}
	reply bool
	once  sync.Once
}

func (e *echo) Up(protocol.HostID, *peerpb.Hello)    { e.once.Do(func() { close(e.up) }) }
func (e *echo) Hello(protocol.HostID, *peerpb.Hello) {}
func (e *echo) Down(protocol.HostID, error)          {}
func (e *echo) Frame(h protocol.HostID, f *peerpb.Frame) {
	if e.reply {
		_ = e.net.Send(h, f)
		return
	}
	e.back <- struct{}{}
}

// benchPair connects two hosts over loopback.
func benchPair(b *testing.B, reply bool) (a, other *echo) {
	f := newFleet(b, "a", "b")
	make1 := func(name protocol.HostID, reply bool) *echo {
		e := &echo{up: make(chan struct{}), back: make(chan struct{}, 1<<16), reply: reply}
		cfg := f.config(name)
		cfg.Rate = 1 << 30
		var err error
		if e.net, err = peer.New(cfg, e); err != nil {
			b.Fatal(err)
		}
		ctx, cancel := context.WithCancel(context.Background())
		ended := make(chan error, 1)
		go func() { ended <- e.net.Run(ctx) }()
		b.Cleanup(func() { cancel(); <-ended })
		return e
	}
	a, other = make1("a", false), make1("b", reply)
	<-a.up
	<-other.up
	return a, other
}

func BenchmarkRoundTrip(b *testing.B) {
	a, _ := benchPair(b, true)
	f := step(strings.Repeat("s", 32), 1, make([]byte, 100))
	b.ReportAllocs()
	for b.Loop() {
		if err := a.net.Send("b", f); err != nil {
			b.Fatal(err)
		}
		<-a.back
	}
}

func BenchmarkFrames(b *testing.B) {
	for _, size := range []int{100, 64 << 10} {
		b.Run(fmt.Sprintf("%dB", size), func(b *testing.B) {
			a, other := benchPair(b, false)
			f := step(strings.Repeat("s", 32), 1, make([]byte, size))
			b.SetBytes(int64(size))
			b.ReportAllocs()
			const window = 1000
			sent := 0
			for b.Loop() {
				if sent >= window {
					<-other.back
				}
				sent++
				for errors.Is(a.net.Send("b", f), peer.ErrFull) {
					<-other.back
					sent--
				}
			}
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "frames/s")
		})
	}
}
