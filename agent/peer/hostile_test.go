package peer_test

import (
	"crypto/tls"
	"errors"
	"io"
	"net"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"conseal/agent/peer"
	"conseal/agent/peer/peerpb"
	"conseal/protocol"
)

// Whoever is not the host that may dial is refused, the log says why, and the
// handler hears nothing of it.
func TestRefusedWhenTheyDial(t *testing.T) {
	host := func(name protocol.HostID) func(*fleet) *tls.Config {
		return func(f *fleet) *tls.Config { return rawConfig(certFor(f.t, f.keys[name], string(name))) }
	}
	but := func(change func(*tls.Config)) func(*fleet) *tls.Config {
		return func(f *fleet) *tls.Config {
			c := host("a")(f)
			change(c)
			return c
		}
	}
	tests := []struct {
		name, want string
		config     func(*fleet) *tls.Config
		then       func(*rawPeer) // after the handshake
	}{
		{"stranger", "is not in the roster", func(f *fleet) *tls.Config { return rawConfig(certFor(f.t, newKey(f.t), "a")) }, nil},
		{"no certificate", "didn't provide a certificate", but(func(c *tls.Config) { c.Certificates = nil }), nil},
		{"two certificates", "2 certificates instead of one", chain("a", "c"), nil},
		{"another's certificate", "invalid signature by the client certificate", stolen("a"), nil},
		{"own certificate, not the key", "invalid signature by the client certificate", stolen("b"), nil},
		{"own identity", "this host's own identity", host("b"), nil},
		{"the larger name", `host \"c\" has no reason to dial`, host("c"), nil},
		{"TLS 1.2", "unsupported versions", but(func(c *tls.Config) { c.MaxVersion = tls.VersionTLS12 }), nil},
		{"other ALPN", "unsupported application protocols", but(func(c *tls.Config) { c.NextProtos = []string{"h2"} }), nil},
		{"no ALPN", "does not speak conseal/1", but(func(c *tls.Config) { c.NextProtos = nil }), nil},
		{"other fleet", `is of another fleet: \"other\" instead of \"test\"`, host("a"), func(r *rawPeer) { r.greet("other") }},
		{"no hello", "the first frame is not a hello", host("a"), func(r *rawPeer) { r.send(step("s", 1, nil)) }},
		{"long hello", "over the limit of 4096", host("a"), func(r *rawPeer) { r.greet(strings.Repeat("x", 5000)) }},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			f := newFleet(t, "a", "b", "c")
			b := f.start("b", nil)
			conn, err := tls.Dial("tcp", f.hosts["b"].Address, test.config(f))
			if err == nil {
				r := &rawPeer{conn, t}
				if test.then != nil {
					test.then(r)
				}
				r.waitClosed()
				r.Close()
			}
			log := b.log.wait(t, test.want)
			if strings.Contains(log, "own identity") != (test.name == "own identity") {
				t.Errorf("who has which identity is claimed without proof:\n%s", log)
			}
			b.stop()
			b.quiet()
		})
	}
}

// chain presents the certificates of two hosts.
func chain(first, second protocol.HostID) func(*fleet) *tls.Config {
	return func(f *fleet) *tls.Config {
		cert := certFor(f.t, f.keys[first], "x")
		cert.Certificate = append(cert.Certificate, certFor(f.t, f.keys[second], "x").Certificate...)
		return rawConfig(cert)
	}
}

// stolen presents a host's certificate without having its key.
func stolen(name protocol.HostID) func(*fleet) *tls.Config {
	return func(f *fleet) *tls.Config {
		cert := certFor(f.t, f.keys[name], string(name))
		cert.PrivateKey = newKey(f.t)
		return rawConfig(cert)
	}
}

// What does not answer as the host that was dialled is refused.
func TestRefusedWhenDialled(t *testing.T) {
	answer := func(name protocol.HostID) func(*fleet) *tls.Config {
		return func(f *fleet) *tls.Config { return rawConfig(certFor(f.t, f.keys[name], "b")) }
	}
	tests := []struct {
		name, want string
		config     func(*fleet) *tls.Config
	}{
		{"stranger", "is not in the roster", func(f *fleet) *tls.Config { return rawConfig(certFor(f.t, newKey(f.t), "b")) }},
		{"another host", `the address answers as host "c"`, answer("c")},
		{"itself", "this host's own identity", answer("a")},
		{"another host's certificate, not its key", "invalid signature by the server certificate", stolen("c")},
		{"two certificates", "2 certificates instead of one", chain("b", "c")},
		{"no ALPN", "does not speak conseal/1", func(f *fleet) *tls.Config {
			c := answer("b")(f)
			c.NextProtos = nil
			return c
		}},
		{"TLS 1.2", "protocol version", func(f *fleet) *tls.Config {
			c := answer("b")(f)
			c.MaxVersion = tls.VersionTLS12
			return c
		}},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			f := newFleet(t, "a", "b", "c")
			server := f.serve("b", test.config(f), func(c *tls.Conn) { _ = c.Handshake() })
			a := f.start("a", nil)
			a.log.wait(t, "no new stream with peer\" host=b")
			a.stop()
			server.Close()
			a.quiet()
			if s := a.States()[0]; s.Connected || !strings.Contains(s.Err, test.want) || !strings.Contains(s.Err, s.Address) {
				t.Errorf("got %q, want %q and the address", s.Err, test.want)
			}
		})
	}
}

// serve answers at a host's address.
func (f *fleet) serve(name protocol.HostID, config *tls.Config, each func(*tls.Conn)) io.Closer {
	l := tls.NewListener(f.listeners[name], config)
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			each(c.(*tls.Conn))
			c.Close()
		}
	}()
	return l
}

// A host whose roster has another identity for this one refuses it: both say so.
func TestWrongPin(t *testing.T) {
	f := newFleet(t, "a", "b")
	b := f.start("b", func(c *peer.Config) {
		c.Hosts = map[protocol.HostID]peer.Host{
			"a": {Address: f.hosts["a"].Address, Pin: pinOf(t, newKey(t))},
			"b": f.hosts["b"],
		}
	})
	a := f.start("a", nil)
	b.log.wait(t, "is not in the roster")
	a.log.wait(t, "refuses this host (is its identity in the roster there?)")
	a.quiet()
	b.quiet()
}

// Only the key counts, not the name in the certificate.
func TestNameInCertificateIsIgnored(t *testing.T) {
	f := newFleet(t, "a", "b", "c")
	b := f.start("b", nil)
	r := f.raw("b", certFor(t, f.keys["a"], "c"))
	r.greet("test")
	b.next("up", "a")
	r.send(step("s", 1, nil))
	b.next("frame", "a")
	r.Close()
	b.next("down", "a")
}

// A peer that sends what no peer may send loses its stream; the error names it
// and is a fault. It is refused until a pause has passed.
func TestViolations(t *testing.T) {
	for want, data := range hostileBytes() {
		t.Run(want, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f, net := newPipeFleet(t, "a", "b")
				b := f.start("b", func(c *peer.Config) { c.MaxFrame = 4096 })
				r := f.rawPipe(net, "b", f.keys["a"])
				b.next("up", "a")
				if _, err := r.Write(data); err != nil {
					t.Fatal(err)
				}
				e := b.next("down", "a")
				var fault *protocol.Fault
				if !errors.As(e.err, &fault) || fault.Host != "a" || !strings.Contains(e.err.Error(), want) {
					t.Errorf("got %v, want a fault of a with %q", e.err, want)
				}
				again := f.rawPipe(net, "b", f.keys["a"])
				again.waitClosed()
				b.log.wait(t, `host \"a\" is refused for another`)
				time.Sleep(time.Second)
				later := f.rawPipe(net, "b", f.keys["a"])
				b.next("up", "a")
				for _, p := range []*rawPeer{r, again, later} {
					p.NetConn().Close()
				}
				b.next("down", "a")
				b.stop()
			})
		})
	}
}

// A violation by the host that listens is a fault too.
func TestViolationByTheDialledHost(t *testing.T) {
	f := newFleet(t, "a", "b")
	server := f.serve("b", rawConfig(certFor(t, f.keys["b"], "b")), func(c *tls.Conn) {
		if c.Handshake() != nil {
			return // a dialled a third time, and stopped
		}
		r := &rawPeer{c, t}
		r.send(&peerpb.Frame{Body: &peerpb.Frame_Hello{Hello: &peerpb.Hello{Fleet: "test"}}})
		_, _ = c.Write([]byte{0xff, 0xff, 0xff, 0x7f})
		r.waitClosed()
	})
	defer server.Close()
	a := f.start("a", nil)
	for range 2 { // and it dials again
		a.next("up", "b")
		var fault *protocol.Fault
		if e := a.next("down", "b"); !errors.As(e.err, &fault) || fault.Host != "b" {
			t.Errorf("got %v, want a fault of b", e.err)
		}
	}
	a.stop()
}

// A newer stream takes the place of an older one; two agents that throw each
// other out are noticed, and the one that is there may stay.
func TestTwoAgentsWithOneName(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f, net := newPipeFleet(t, "a", "b")
		b := f.start("b", nil)
		var streams []*rawPeer
		dial := func() *rawPeer {
			r := f.rawPipe(net, "b", f.keys["a"])
			streams = append(streams, r)
			return r
		}
		dial()
		b.next("up", "a")
		for range 3 {
			dial()
			if e := b.next("down", "a"); !strings.Contains(e.err.Error(), "a newer stream of the same host") {
				t.Errorf("got %v", e.err)
			}
			b.next("up", "a")
		}
		dial().waitClosed()
		b.quiet()
		log := b.log.wait(t, "two agents seem to run with one identity")
		if !strings.Contains(log, "level=ERROR") || !strings.Contains(log, `host=a`) {
			t.Errorf("log is\n%s", log)
		}
		dial().waitClosed()
		b.log.wait(t, "two agents")
		streams[3].send(step("s", 1, nil)) // it may stay
		b.next("frame", "a")
		b.next("down", "a") // silent, as it does not ping
		time.Sleep(30 * time.Second)
		dial()
		b.next("up", "a")
		for _, s := range streams {
			s.NetConn().Close()
		}
		b.next("down", "a")
		b.stop()
	})
}

// Real agents with one identity are noticed as well.
func TestCloneOfAnAgent(t *testing.T) {
	f := newFleet(t, "a", "b")
	b := f.start("b", nil)
	f.start("a", nil)
	f.start("a", func(c *peer.Config) { c.Listener, c.Listen = nil, "127.0.0.1:0" })
	b.log.wait(t, "two agents seem to run with one identity")
}

// Strangers that hold as many connections as they get keep no peer out, and do
// not fill the log.
func TestFlood(t *testing.T) {
	f := newFleet(t, "a", "b")
	b := f.start("b", func(c *peer.Config) { c.Handshake = time.Minute })
	flood(t, f.hosts["b"].Address, 500)
	for range 100 {
		f.raw("b", tls.Certificate{}).waitClosed()
	}
	a := f.start("a", nil)
	a.next("up", "b")
	b.next("up", "a")
	log, _ := b.log.content()
	if lines := strings.Count(log, "connection refused"); lines < 1 || lines > 10 {
		t.Errorf("%d lines in the log:\n%s", lines, log)
	}
}

// flood opens connections from other addresses of loopback and says nothing.
func flood(t *testing.T, address string, count int) {
	t.Helper()
	for i := range count {
		d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, byte(2+i%5))}}
		c, err := d.Dial("tcp", address)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
	}
}
