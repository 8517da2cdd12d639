// Package peer carries frames between the agents of a fleet.
//
// Make a [Net] by [New], call [Net.Run] in a goroutine, send by [Net.Send] and
// receive through a [Handler]; [Net.SetHosts] takes up a newer roster. Every pair
// of hosts keeps one stream: TLS 1.3 with the identity keys of both, which the
// roster pins. No certificate authority, name or date in a certificate counts; who
// sent a frame is what TLS proved and never what the frame says.
//
// The host with the smaller name (bytewise) dials and the other listens, so a
// firewall must let every host in from those whose names are smaller. A lost
// stream is dialled again, with growing pauses. Frames that were queued when a
// stream was lost are lost with it; [Handler] learns of both.
package peer

import (
	"context"
	"crypto"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"conseal/agent/peer/peerpb"
	"conseal/protocol"
)

// Errors of [Net.Send], to be told apart by errors.Is. After both the frame
// was not queued.
var (
	ErrDown = errors.New("not connected")
	ErrFull = errors.New("the queue is full")
)

// Host is what the roster says of a host.
type Host struct {
	Address string   // host:port
	Pin     [32]byte // SHA-256 of the identity key's SubjectPublicKeyInfo, DER
}

// Config is what a [Net] is made of. The zero value of an optional field
// stands for its default.
type Config struct {
	Self  protocol.HostID
	Fleet string // hosts of another fleet are refused
	// Identity is this host's identity key, ECDSA P-256. It signs once in New
	// and once for every handshake, also for those of strangers, and may be
	// called by several goroutines.
	Identity crypto.Signer
	Hosts    map[protocol.HostID]Host // every host of the roster, with Self; later see [Net.SetHosts]
	// Hello is the first frame of a stream, of at most 4 KiB, and what Greet sends;
	// its Fleet is filled in. It is called by several goroutines.
	Hello func() *peerpb.Hello

	Listener net.Listener // Run closes it. Optional: by default, Listen is listened on
	Listen   string       // host:port
	// Dial connects to an address of Hosts; ctx is for connecting only. Optional:
	// TCP by default.
	Dial func(ctx context.Context, address string) (net.Conn, error)

	// MaxFrame is the length in bytes of the longest frame, sent or received.
	// A queue holds four times as much. Default: 4 MiB and 64 KiB.
	MaxFrame int
	QueueLen int // frames that wait for one peer. Default: 4096
	// Rate is how many frames a second are taken from one peer; what is beyond
	// it, and beyond Burst at once, waits in the peer's queue. Much below 1000 a
	// peer may take the waiting for a dead stream. Defaults: 5000, and as much as
	// Rate.
	Rate, Burst int

	Ping      time.Duration // a ping is sent when nothing else was for so long. Default: 2 s
	Silence   time.Duration // a stream on which nothing came for so long is dropped. Default: 6 s
	Handshake time.Duration // how long connecting may take, and the handshake with the hellos. Default: 10 s

	Log *slog.Logger // Optional
}

// Handler is told what happens. The calls for one peer come one at a time and
// in order: Up, any number of Frame and Hello, Down. Those for different peers come at
// the same time. While a call lasts nothing is read from that peer. Up and Down
// are in the log already.
type Handler interface {
	// Up says that a stream is there: from now on Send works, also within Up.
	Up(protocol.HostID, *peerpb.Hello)
	// Hello hands over what the peer's Greet sent on a stream that is up.
	Hello(protocol.HostID, *peerpb.Hello)
	// Down says that it is lost and why. The error is a [*protocol.Fault] if the
	// peer sent what no peer may send.
	Down(protocol.HostID, error)
	// Frame hands over a frame that is not a hello, ping or pong. Its body is
	// never nil; it is the handler's to keep. Nothing in it has been checked.
	Frame(protocol.HostID, *peerpb.Frame)
}

// Net is this host's end of the streams to all its peers.
type Net struct {
	cfg     Config
	handler Handler
	tls     *tls.Config
	door    door
	refused hush // log of strangers
	liar    *liar

	greetings atomic.Uint64 // calls of Greet

	mu     sync.RWMutex                 // guards what follows; taken before that of a link
	hosts  map[[32]byte]protocol.HostID // by pin, with this host
	links  map[protocol.HostID]*link    // without this host
	former map[protocol.HostID]*link    // of hosts that left: one that comes back is not up before it was down
	keep   func(*link)                  // keeps a stream to a new peer; nil unless Run runs
}

// New checks the configuration and makes the certificate.
func New(cfg Config, handler Handler) (*Net, error) {
	cfg.setDefaults()
	n := &Net{cfg: cfg, links: map[protocol.HostID]*link{}, former: map[protocol.HostID]*link{}}
	n.liar, n.handler = newLiar(cfg.Log, handler)
	if err := n.check(); err != nil {
		return nil, fmt.Errorf("peers: %w", err)
	}
	if err := n.SetHosts(cfg.Hosts); err != nil {
		return nil, err
	}
	cert, err := certificate(cfg.Self, cfg.Identity)
	if err != nil {
		return nil, fmt.Errorf("peers: making the certificate of host %q: %w", cfg.Self, err)
	}
	n.tls = n.tlsConfig(cert)
	return n, nil
}

func (c *Config) setDefaults() {
	orInt := func(v *int, value int) {
		if *v == 0 {
			*v = value
		}
	}
	orDuration := func(v *time.Duration, value time.Duration) {
		if *v == 0 {
			*v = value
		}
	}
	orInt(&c.MaxFrame, 4<<20+64<<10)
	orInt(&c.QueueLen, 4096)
	orInt(&c.Rate, 5000)
	orInt(&c.Burst, c.Rate)
	orDuration(&c.Ping, 2*time.Second)
	orDuration(&c.Silence, 6*time.Second)
	orDuration(&c.Handshake, 10*time.Second)
	if c.Dial == nil {
		c.Dial = func(ctx context.Context, address string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "tcp", address)
		}
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
}

// check refuses what no default repairs.
func (n *Net) check() error {
	c := &n.cfg
	switch {
	case n.handler == nil || c.Identity == nil || c.Hello == nil:
		return errors.New("handler, identity and hello are needed")
	case c.Self == "" || c.Fleet == "":
		return errors.New("the names of host and fleet are needed")
	case c.Listener == nil && c.Listen == "":
		return errors.New("an address to listen on is needed")
	case min(c.MaxFrame, c.QueueLen, c.Rate, c.Burst) < 1 || min(c.Ping, c.Silence, c.Handshake) < 1:
		return errors.New("limits must be positive")
	case c.Ping >= c.Silence:
		return fmt.Errorf("pings every %v do not break a silence of %v", c.Ping, c.Silence)
	}
	return nil
}

// SetHosts takes the hosts of a newer roster in place of those before. It may be
// called at any time, also by the handler. On an error nothing has changed.
//
// A host that is new is connected to. One that is gone, or has another identity
// now, loses its stream: Send to it fails, no further Frame of it begins and, if
// it was up, Down follows; SetHosts does not wait for it. Whoever proves the
// former identity is a stranger, also if that began before. The stream of a host
// with the same identity stays; a new address is for when it is lost.
func (n *Net) SetHosts(hosts map[protocol.HostID]Host) error {
	pins, err := n.checkHosts(hosts)
	if err != nil {
		return fmt.Errorf("peers: %w", err)
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.hosts = pins
	for name, l := range n.links {
		if _, ok := hosts[name]; !ok {
			delete(n.links, name)
			n.former[name] = l
			l.assign(Host{})
			l.stop(errUnpinned)
		}
	}
	for name, h := range hosts {
		if l := n.links[name]; l != nil {
			l.assign(h)
		} else if name != n.cfg.Self {
			n.addLink(name, h)
		}
	}
	return nil
}

// addLink begins with a host that was no peer; mu is held.
func (n *Net) addLink(name protocol.HostID, h Host) {
	l := n.former[name]
	if l == nil {
		l = newLink(name, &n.cfg)
	}
	delete(n.former, name)
	n.links[name] = l
	l.assign(h)
	if n.keep != nil {
		n.keep(l)
	}
}

// checkHosts returns the names by pin. Two hosts with one pin could not be told
// apart.
func (n *Net) checkHosts(hosts map[protocol.HostID]Host) (map[[32]byte]protocol.HostID, error) {
	pins := map[[32]byte]protocol.HostID{}
	for name, h := range hosts {
		if h.Pin == ([32]byte{}) {
			return nil, fmt.Errorf("host %q has no identity in the roster", name)
		}
		if other, ok := pins[h.Pin]; ok {
			return nil, fmt.Errorf("hosts %q and %q have one identity in the roster", min(name, other), max(name, other))
		}
		if _, _, err := net.SplitHostPort(h.Address); err != nil {
			return nil, fmt.Errorf("host %q has address %q in the roster, which is not host:port", name, h.Address)
		}
		pins[h.Pin] = name
	}
	own, ok := hosts[n.cfg.Self]
	if !ok {
		return nil, fmt.Errorf("this host, %q, is not in the roster", n.cfg.Self)
	}
	spki, err := x509.MarshalPKIXPublicKey(n.cfg.Identity.Public())
	if err != nil {
		return nil, fmt.Errorf("the identity key of host %q: %w", n.cfg.Self, err)
	}
	if pin := sha256.Sum256(spki); pin != own.Pin {
		return nil, fmt.Errorf("the roster's identity of this host, %q, is %s, but its key is %s: peers would refuse it", n.cfg.Self, pinText(own.Pin), pinText(pin))
	}
	return pins, nil
}

// Run listens and dials until ctx ends, which is no error, or until nothing can
// be accepted any more. All its goroutines have then ended and every Up had its
// Down. It is called once.
func (n *Net) Run(ctx context.Context) error {
	listener := n.cfg.Listener
	if listener == nil {
		var err error
		if listener, err = (&net.ListenConfig{}).Listen(ctx, "tcp", n.cfg.Listen); err != nil {
			return fmt.Errorf("peers: %w", err)
		}
	}
	ctx, stop := context.WithCancelCause(ctx)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer stop(errStopping)
	wg.Go(func() {
		<-ctx.Done()
		_ = listener.Close() // ends accept
	})
	n.setKeep(func(l *link) {
		if l.dials {
			ctx, stop := context.WithCancelCause(ctx)
			l.stop = stop
			wg.Go(func() { n.dialForever(ctx, l) })
		}
	})
	defer n.setKeep(nil) // before wg.Wait
	if err := n.accept(ctx, listener, &wg); ctx.Err() == nil {
		return fmt.Errorf("peers: accepting on %s: %w", listener.Addr(), err)
	}
	return nil
}

// setKeep says what is done for each peer from now on, also those of now.
func (n *Net) setKeep(keep func(*link)) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.keep = keep
	for _, l := range n.links {
		if keep != nil {
			keep(l)
		}
	}
}

// peer returns the link of a host, or nil if the roster has no such peer.
func (n *Net) peer(name protocol.HostID) *link {
	n.mu.RLock()
	defer n.mu.RUnlock()
	return n.links[name]
}

// Send queues a frame for a peer and never blocks; the frame is encoded when it
// returns. That nothing is wrong does not mean that the frame arrived. The error
// is ErrDown, ErrFull or says what is wrong with the frame.
func (n *Net) Send(to protocol.HostID, f *peerpb.Frame) error {
	l := n.peer(to)
	if l == nil {
		return fmt.Errorf("host %q is not a peer: %w", to, ErrDown)
	}
	c := l.current.Load()
	if c == nil {
		return fmt.Errorf("host %q: %w", to, ErrDown)
	}
	f, times := n.liar.tell(to, f)
	for range times {
		if err := c.queue.put(f); err != nil {
			return fmt.Errorf("host %q: %w", to, err)
		}
	}
	return nil
}

// Greet sends the present Hello again on each stream that is up, also where the
// queue is full. A stream that comes up meanwhile has it too.
func (n *Net) Greet() {
	n.greetings.Add(1)
	n.mu.RLock()
	links := slices.Collect(maps.Values(n.links))
	n.mu.RUnlock() // Config.Hello may wait for a caller of SetHosts
	for _, l := range links {
		if c := l.current.Load(); c != nil {
			n.greetAgain(c)
		}
	}
}

// State is what is known of the stream to a peer.
type State struct {
	Host      protocol.HostID
	Address   string
	Connected bool
	Since     time.Time // when the stream came up or was lost; when this host started if neither
	Err       string    // why the last stream or attempt ended; empty if none has
}

// States lists all peers by name.
func (n *Net) States() []State {
	n.mu.RLock()
	defer n.mu.RUnlock()
	var all []State
	for _, l := range n.links {
		all = append(all, l.state())
	}
	slices.SortFunc(all, func(a, b State) int { return strings.Compare(string(a.Host), string(b.Host)) })
	return all
}
