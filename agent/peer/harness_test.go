package peer_test

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	mathrand "math/rand/v2"
	"net"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"google.golang.org/protobuf/encoding/protodelim"

	"conseal/agent/peer"
	"conseal/agent/peer/peerpb"
	"conseal/protocol"
)

// patience is how long a test waits for what must come: it only ends what hangs.
const patience = 2 * time.Minute

func newKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func pinOf(t testing.TB, key crypto.Signer) [32]byte {
	t.Helper()
	der, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		t.Fatal(err)
	}
	return sha256.Sum256(der)
}

// certFor is made as a hostile host would: it may say anything.
func certFor(t testing.TB, key crypto.Signer, name string) tls.Certificate {
	t.Helper()
	template := &x509.Certificate{SerialNumber: big.NewInt(7), Subject: pkix.Name{CommonName: name}, DNSNames: []string{name}}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

// fleet is the roster of a test and what each host listens on.
type fleet struct {
	t         testing.TB
	keys      map[protocol.HostID]*ecdsa.PrivateKey
	hosts     map[protocol.HostID]peer.Host
	listeners map[protocol.HostID]net.Listener
}

// newFleet has hosts that listen on loopback, each at an address of its own: so nobody
// else gets the port of one that stops and listens there again.
func newFleet(t testing.TB, names ...protocol.HostID) *fleet {
	t.Helper()
	f := &fleet{t, map[protocol.HostID]*ecdsa.PrivateKey{}, map[protocol.HostID]peer.Host{}, map[protocol.HostID]net.Listener{}}
	for _, name := range names {
		l, err := net.Listen("tcp", fmt.Sprintf("127.%d.%d.%d:0", 1+mathrand.IntN(254), mathrand.IntN(256), 1+mathrand.IntN(254)))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { l.Close() })
		f.add(name, l)
	}
	return f
}

func (f *fleet) add(name protocol.HostID, l net.Listener) {
	key := newKey(f.t)
	f.keys[name], f.listeners[name] = key, l
	f.hosts[name] = peer.Host{Address: l.Addr().String(), Pin: pinOf(f.t, key)}
}

func (f *fleet) config(name protocol.HostID) peer.Config {
	c := peer.Config{
		Self: name, Fleet: "test", Identity: f.keys[name], Hosts: f.hosts, Listener: f.listeners[name],
		Hello: func() *peerpb.Hello { return &peerpb.Hello{RosterVersion: uint64(len(name))} },
	}
	if _, inMemory := c.Listener.(*pipeListener); !inMemory { // there the clock is the test's own
		c.Silence, c.Handshake = patience, patience
	}
	return c
}

// node is a Net that runs, with what its handler was told.
type node struct {
	*peer.Net
	*recorder
	log  *logBuffer
	stop func() // and wait
}

// start runs a host; change, if not nil, changes its configuration.
func (f *fleet) start(name protocol.HostID, change func(*peer.Config)) *node {
	f.t.Helper()
	return f.startWith(name, func(r *recorder) peer.Handler { return r }, change)
}

// startWith puts a handler before the recorder.
func (f *fleet) startWith(name protocol.HostID, wrap func(*recorder) peer.Handler, change func(*peer.Config)) *node {
	f.t.Helper()
	rec, log := newRecorder(f.t), &logBuffer{}
	cfg := f.config(name)
	cfg.Log = slog.New(slog.NewTextHandler(log, nil))
	if change != nil {
		change(&cfg)
	}
	n, err := peer.New(cfg, wrap(rec))
	if err != nil {
		f.t.Fatal(err)
	}
	return f.run(name, n, rec, log)
}

func (f *fleet) run(name protocol.HostID, n *peer.Net, rec *recorder, log *logBuffer) *node {
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- n.Run(ctx) }()
	stop := sync.OnceFunc(func() {
		cancel()
		if err := <-ended; err != nil {
			f.t.Errorf("Run of %q: %v", name, err)
		}
		rec.checkBalance()
	})
	f.t.Cleanup(stop)
	return &node{n, rec, log, stop}
}

// event is one call of a handler.
type event struct {
	kind  string // "up", "hello", "down", "frame"
	host  protocol.HostID
	hello *peerpb.Hello
	err   error
	frame *peerpb.Frame
}

// recorder is a handler that queues the calls, in order.
type recorder struct {
	t      testing.TB
	events chan event

	mu sync.Mutex
	up map[protocol.HostID]bool
}

func newRecorder(t testing.TB) *recorder {
	return &recorder{t: t, events: make(chan event, 1<<16), up: map[protocol.HostID]bool{}}
}

func (r *recorder) Up(h protocol.HostID, hello *peerpb.Hello) {
	r.flip(h, true)
	r.events <- event{kind: "up", host: h, hello: hello}
}

func (r *recorder) Down(h protocol.HostID, err error) {
	r.flip(h, false)
	r.events <- event{kind: "down", host: h, err: err}
}

func (r *recorder) Frame(h protocol.HostID, f *peerpb.Frame) {
	r.between(h)
	r.events <- event{kind: "frame", host: h, frame: f}
}

func (r *recorder) Hello(h protocol.HostID, hello *peerpb.Hello) {
	r.between(h)
	r.events <- event{kind: "hello", host: h, hello: hello}
}

func (r *recorder) between(h protocol.HostID) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.up[h] {
		r.t.Errorf("a frame of %q outside Up and Down", h)
	}
}

func (r *recorder) flip(h protocol.HostID, up bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.up[h] == up {
		r.t.Errorf("host %q: up is %v twice", h, up)
	}
	r.up[h] = up
}

// checkBalance is for after Run.
func (r *recorder) checkBalance() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for h, up := range r.up {
		if up {
			r.t.Errorf("host %q had no Down", h)
		}
	}
}

// next waits for the next call, which must be of that kind and host.
func (r *recorder) next(kind string, host protocol.HostID) event {
	r.t.Helper()
	select {
	case e := <-r.events:
		if e.kind != kind || e.host != host {
			r.t.Fatalf("got %s of %q (%v), want %s of %q", e.kind, e.host, e.err, kind, host)
		}
		return e
	case <-time.After(patience):
		r.t.Fatalf("no %s of %q", kind, host)
	}
	return event{}
}

// skipTo waits for a call of that kind and host, whatever comes before it.
func (r *recorder) skipTo(kind string, host protocol.HostID) event {
	r.t.Helper()
	late := time.After(patience)
	for {
		select {
		case e := <-r.events:
			if e.kind == kind && e.host == host {
				return e
			}
		case <-late:
			r.t.Fatalf("no %s of %q", kind, host)
		}
	}
}

// quiet fails if the handler was told anything.
func (r *recorder) quiet() {
	r.t.Helper()
	select {
	case e := <-r.events:
		r.t.Errorf("got %s of %q (%v), want nothing", e.kind, e.host, e.err)
	default:
	}
}

// logBuffer is a log that can be waited for.
type logBuffer struct {
	mu    sync.Mutex
	buf   bytes.Buffer
	added chan struct{}
}

func (l *logBuffer) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.added != nil {
		close(l.added)
		l.added = nil
	}
	return l.buf.Write(b)
}

func (l *logBuffer) content() (string, <-chan struct{}) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.added == nil {
		l.added = make(chan struct{})
	}
	return l.buf.String(), l.added
}

// wait returns the log once it holds text.
func (l *logBuffer) wait(t testing.TB, text string) string {
	t.Helper()
	late := time.After(patience)
	for {
		got, added := l.content()
		if strings.Contains(got, text) {
			return got
		}
		select {
		case <-added:
		case <-late:
			t.Fatalf("no %q in the log:\n%s", text, got)
		}
	}
}

// rawPeer is a peer that the test plays itself, with no code of the package.
type rawPeer struct {
	*tls.Conn
	t testing.TB
}

// raw connects to a host of the fleet as whoever holds cert and shakes hands.
func (f *fleet) raw(to protocol.HostID, cert tls.Certificate) *rawPeer {
	f.t.Helper()
	c, err := tls.Dial("tcp", f.hosts[to].Address, rawConfig(cert))
	if err != nil {
		f.t.Fatal(err)
	}
	f.t.Cleanup(func() { c.Close() })
	return &rawPeer{c, f.t}
}

func rawConfig(certs ...tls.Certificate) *tls.Config {
	return &tls.Config{Certificates: certs, InsecureSkipVerify: true, NextProtos: []string{"conseal/1"}, ClientAuth: tls.RequestClientCert}
}

// greet reads the hello of a host that listens and answers it.
func (r *rawPeer) greet(fleet string) {
	r.t.Helper()
	got := &peerpb.Frame{}
	if err := protodelim.UnmarshalFrom(oneByte{r.Conn}, got); err != nil || got.GetHello() == nil {
		r.t.Fatalf("got %v, %v instead of a hello", got, err)
	}
	r.send(&peerpb.Frame{Body: &peerpb.Frame_Hello{Hello: &peerpb.Hello{Fleet: fleet}}})
}

func (r *rawPeer) send(f *peerpb.Frame) {
	r.t.Helper()
	_, err := protodelim.MarshalTo(r.Conn, f)
	if err != nil && !errors.Is(err, syscall.EPIPE) && !errors.Is(err, syscall.ECONNRESET) { // refused before it was all sent
		r.t.Fatal(err)
	}
}

// waitClosed reads until the other end hangs up.
func (r *rawPeer) waitClosed() {
	r.t.Helper()
	_ = r.SetReadDeadline(time.Now().Add(patience))
	_, err := io.Copy(io.Discard, r.Conn)
	var timeout net.Error
	if errors.As(err, &timeout) && timeout.Timeout() {
		r.t.Fatal("the connection stayed open")
	}
}

// rawPipe is raw and greet over a network in memory.
func (f *fleet) rawPipe(p *pipes, to protocol.HostID, key crypto.Signer) *rawPeer {
	f.t.Helper()
	conn, err := p.dial(f.t.Context(), string(to))
	if err != nil {
		f.t.Fatal(err)
	}
	r := &rawPeer{tls.Client(conn, rawConfig(certFor(f.t, key, "raw"))), f.t}
	if err := r.Handshake(); err != nil {
		f.t.Fatal(err)
	}
	r.greet("test")
	return r
}

type oneByte struct{ io.Reader }

func (r oneByte) ReadByte() (byte, error) {
	var b [1]byte
	_, err := io.ReadFull(r, b[:])
	return b[0], err
}

// pipes is a network in memory, for tests in a synctest bubble.
type pipes struct {
	mu        sync.Mutex
	listeners map[string]*pipeListener
}

// newPipeFleet has hosts that listen in memory, each at its own name.
func newPipeFleet(t testing.TB, names ...protocol.HostID) (*fleet, *pipes) {
	t.Helper()
	p := &pipes{listeners: map[string]*pipeListener{}}
	f := newFleet(t)
	for _, name := range names {
		f.add(name, p.listen(string(name)))
	}
	return f, p
}

// use makes a host dial in memory, for [fleet.start].
func (p *pipes) use(c *peer.Config) { c.Dial = p.dial }

func (p *pipes) listen(address string) *pipeListener {
	l := &pipeListener{address: address, conns: make(chan net.Conn), closed: make(chan struct{})}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.listeners[address] = l
	return l
}

func (p *pipes) dial(ctx context.Context, address string) (net.Conn, error) {
	address = strings.TrimSuffix(address, ":1")
	p.mu.Lock()
	l := p.listeners[address]
	p.mu.Unlock()
	here, there := net.Pipe()
	select {
	case l.conns <- there:
		return here, nil
	case <-l.closed:
		return nil, errors.New("connection refused")
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

type pipeListener struct {
	address string
	conns   chan net.Conn
	once    sync.Once
	closed  chan struct{}
}

func (l *pipeListener) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

func (l *pipeListener) Close() error {
	l.once.Do(func() { close(l.closed) })
	return nil
}

func (l *pipeListener) Addr() net.Addr  { return l }
func (l *pipeListener) Network() string { return "pipe" }
func (l *pipeListener) String() string  { return l.address + ":1" }
