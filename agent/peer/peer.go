// Package peer carries frames between the agents of a fleet.
//
// Make a [Net] by [New], call [Net.Run] in a goroutine, send by [Net.Send] and
// receive through a [Handler]. Every pair of hosts keeps one stream: TLS 1.3
// with the identity keys of both, which the roster pins. No certificate
// authority, name or date in a certificate counts; who sent a frame is what TLS
// proved and never what the frame says.
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
	"net"
	"slices"
	"strings"
	"sync"
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
	Hosts    map[protocol.HostID]Host // every host of the roster, with Self
	// Hello is the first frame of a stream; its Fleet is filled in. It is called
	// by several goroutines.
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
// in order: Up, any number of Frame, Down. Those for different peers come at
// the same time. While a call lasts nothing is read from that peer. Up and Down
// are in the log already.
type Handler interface {
	// Up says that a stream is there: from now on Send works, also within Up.
	Up(protocol.HostID, *peerpb.Hello)
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
	hosts   map[[32]byte]protocol.HostID // by pin, with this host
	links   map[protocol.HostID]*link    // without this host
	door    door
	refused hush // log of strangers
}

// New checks the configuration and makes the certificate.
func New(cfg Config, handler Handler) (*Net, error) {
	cfg.setDefaults()
	n := &Net{cfg: cfg, handler: handler, hosts: map[[32]byte]protocol.HostID{}, links: map[protocol.HostID]*link{}}
	if err := n.check(); err != nil {
		return nil, fmt.Errorf("peers: %w", err)
	}
	if err := n.addHosts(); err != nil {
		return nil, fmt.Errorf("peers: %w", err)
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

// addHosts takes over the roster's hosts. Two hosts with one pin could not be
// told apart.
func (n *Net) addHosts() error {
	for name, h := range n.cfg.Hosts {
		if h.Pin == ([32]byte{}) {
			return fmt.Errorf("host %q has no identity in the roster", name)
		}
		if other, ok := n.hosts[h.Pin]; ok {
			return fmt.Errorf("hosts %q and %q have one identity in the roster", min(name, other), max(name, other))
		}
		n.hosts[h.Pin] = name
		if name != n.cfg.Self {
			n.links[name] = newLink(name, h, &n.cfg)
		}
	}
	own, ok := n.cfg.Hosts[n.cfg.Self]
	if !ok {
		return fmt.Errorf("this host, %q, is not in the roster", n.cfg.Self)
	}
	spki, err := x509.MarshalPKIXPublicKey(n.cfg.Identity.Public())
	if err != nil {
		return fmt.Errorf("the identity key of host %q: %w", n.cfg.Self, err)
	}
	if pin := sha256.Sum256(spki); pin != own.Pin {
		return fmt.Errorf("the roster's identity of this host, %q, is %s, but its key is %s: peers would refuse it", n.cfg.Self, pinText(own.Pin), pinText(pin))
	}
	return nil
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
	for _, l := range n.links {
		if l.dials {
			wg.Go(func() { n.dialForever(ctx, l) })
		}
	}
	if err := n.accept(ctx, listener, &wg); ctx.Err() == nil {
		return fmt.Errorf("peers: accepting on %s: %w", listener.Addr(), err)
	}
	return nil
}

// Send queues a frame for a peer and never blocks; the frame is encoded when it
// returns. That nothing is wrong does not mean that the frame arrived. The error
// is ErrDown, ErrFull or says what is wrong with the frame.
func (n *Net) Send(to protocol.HostID, f *peerpb.Frame) error {
	l := n.links[to]
	if l == nil {
		return fmt.Errorf("host %q is not a peer: %w", to, ErrDown)
	}
	c := l.current.Load()
	if c == nil {
		return fmt.Errorf("host %q: %w", to, ErrDown)
	}
	if err := c.queue.put(f); err != nil {
		return fmt.Errorf("host %q: %w", to, err)
	}
	return nil
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
	var all []State
	for _, l := range n.links {
		all = append(all, l.state())
	}
	slices.SortFunc(all, func(a, b State) int { return strings.Compare(string(a.Host), string(b.Host)) })
	return all
}
