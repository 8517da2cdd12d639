package peer

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cenkalti/backoff/v5"
	"golang.org/x/time/rate"

	"conseal/agent/peer/peerpb"
	"conseal/protocol"
)

// link is what is kept of a peer from one stream to the next.
type link struct {
	name    protocol.HostID
	dials   bool                    // this host dials, the peer never does
	limit   *rate.Limiter           // frames taken from the peer, over all its streams
	current atomic.Pointer[conn]    // the stream that Send uses, between its Up and its Down
	stop    context.CancelCauseFunc // ends dialling; guarded by Net.mu

	mu          sync.Mutex // guards what follows
	host        Host       // zero if the host is not in the roster any more
	last        *conn      // the newest stream let in; it may have ended. All older ones are cancelled
	replaced    []time.Time
	refuseUntil time.Time
	pause       *backoff.ExponentialBackOff
	since       time.Time
	err         error
	logged      time.Time // when a failure to connect was logged
}

const (
	// A host whose streams replaced each other more than cloneCount times
	// within cloneWindow is two agents with one identity: an agent that lost
	// its stream dials again with growing pauses.
	cloneCount   = 3
	cloneWindow  = 10 * time.Second
	cloneRefusal = 30 * time.Second

	pauseMin = 100 * time.Millisecond
	pauseMax = 5 * time.Second
)

var (
	errStopping = errors.New("this agent stops")
	errReplaced = errors.New("a newer stream of the same host took its place")
	errUnpinned = errors.New("its identity is not in the roster any more")
	errClones   = errors.New("two agents seem to run with one identity")
	errSelf     = errors.New("this host's own identity: the address leads back here, or another agent runs with the identity of this host")
)

// newLink is of a host that is not in the roster yet.
func newLink(name protocol.HostID, cfg *Config) *link {
	return &link{
		name:  name,
		dials: cfg.Self < name,
		stop:  func(error) {},
		limit: rate.NewLimiter(rate.Limit(cfg.Rate), cfg.Burst),
		pause: &backoff.ExponentialBackOff{
			InitialInterval: pauseMin, MaxInterval: pauseMax, Multiplier: 2, RandomizationFactor: 0.5,
		},
		since: time.Now(),
	}
}

// assign says what the roster has of the host, zero if it is gone. With another
// identity it starts anew: nothing is sent on a stream of the former, which ends.
func (l *link) assign(h Host) {
	l.mu.Lock()
	defer l.mu.Unlock()
	pin := l.host.Pin
	l.host = h
	if h.Pin == pin {
		return
	}
	l.replaced, l.refuseUntil = nil, time.Time{}
	l.pause.Reset()
	l.current.Store(nil)
	if l.last != nil {
		l.last.cancel(errUnpinned)
	}
}

func (l *link) address() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.host.Address
}

// dialForever keeps a stream to the peer until ctx ends.
func (n *Net) dialForever(ctx context.Context, l *link) {
	for {
		if err := n.dial(ctx, l); err != nil && ctx.Err() == nil {
			n.failed(l, netip.Prefix{}, err)
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(l.nextPause()):
		}
	}
}

// dial connects once and stays until the stream is lost. The error says why
// there never was one.
func (n *Net) dial(ctx context.Context, l *link) error {
	soon, cancel := context.WithTimeout(ctx, n.cfg.Handshake)
	address := l.address()
	raw, err := n.cfg.Dial(soon, address)
	cancel()
	if err != nil {
		return fmt.Errorf("host %q: %w", l.name, err)
	}
	c := n.newConn(ctx, tls.Client(raw, n.tls))
	defer c.end()
	_, hello, err := n.open(c, l)
	if err != nil {
		return fmt.Errorf("host %q at %s: %w", l.name, address, err)
	}
	return n.serve(ctx, l, c, hello)
}

// accept lets connections in until the listener is closed, and returns its error.
func (n *Net) accept(ctx context.Context, listener net.Listener, wg *sync.WaitGroup) error {
	for {
		raw, err := listener.Accept()
		if errors.Is(err, net.ErrClosed) || err != nil && ctx.Err() != nil {
			return err
		}
		if err != nil { // such as no descriptors left: it may pass
			n.failed(nil, netip.Prefix{}, fmt.Errorf("accepting: %w", err))
			select {
			case <-ctx.Done():
			case <-time.After(time.Second):
			}
			continue
		}
		v := n.door.enter(raw)
		if v == nil {
			_ = raw.Close()
			continue
		}
		wg.Go(func() { n.answer(ctx, v) })
	}
}

// answer serves a connection that was let in.
func (n *Net) answer(ctx context.Context, v *visitor) {
	c := n.newConn(ctx, tls.Server(v.conn, n.tls))
	defer c.end()
	l, hello, err := n.open(c, nil)
	n.door.leave(v)
	if err == nil {
		err = n.serve(ctx, l, c, hello)
	}
	if err != nil && ctx.Err() == nil {
		n.failed(l, v.source, fmt.Errorf("connection from %s: %w", v.conn.RemoteAddr(), err))
	}
}

// failed notes and logs that no stream came to be. l is nil if the other end did
// not prove to be a peer.
func (n *Net) failed(l *link, source netip.Prefix, err error) {
	level, clones := slog.LevelWarn, errors.Is(err, errClones)
	if clones || errors.Is(err, errSelf) {
		level = slog.LevelError
	}
	switch {
	case l == nil && n.refused.allow(source):
		n.cfg.Log.Log(context.Background(), level, "connection refused; no more of its source are logged for a minute", "err", err)
	case l != nil && (l.failed(err) || clones):
		n.cfg.Log.Log(context.Background(), level, "no new stream with peer", "host", l.name, "address", l.address(), "err", err)
	}
}

// serve runs a stream on which the hellos went well until it is lost. The error
// says why the stream was not let in.
func (n *Net) serve(ctx context.Context, l *link, c *conn, hello *peerpb.Hello) error {
	defer close(c.done)
	if err := l.adopt(c); err != nil {
		return err
	}
	n.cfg.Log.Info("peer up", "host", l.name, "from", c.tls.RemoteAddr().String())
	c.wg.Go(c.write)
	if n.greetings.Load() != c.greetings { // Greet did not find c yet
		n.greetAgain(c)
	}
	n.handler.Up(l.name, hello)
	err := c.fail(c.read(l, n.handler))
	l.drop(err, n.cfg.Silence)
	c.wg.Wait()
	level := slog.LevelWarn
	if ctx.Err() != nil || errors.Is(err, errUnpinned) {
		level = slog.LevelInfo // nobody's fault
	}
	n.cfg.Log.Log(ctx, level, "peer down", "host", l.name, "err", err)
	n.handler.Down(l.name, err)
	return nil
}

// adopt makes c the peer's stream. It first ends the one before, which is most
// likely dead: after it returns, that one had its Down.
func (l *link) adopt(c *conn) error {
	previous, err := l.enlist(c)
	if err != nil {
		return err
	}
	if previous != nil {
		<-previous.done
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if c.ctx.Err() != nil {
		return context.Cause(c.ctx) // replaced or unpinned while it waited
	}
	l.current.Store(c)
	l.since = time.Now()
	return nil
}

// enlist makes c the newest stream and ends the one before, which it returns. It
// looks at the roster again, which may have changed since the handshake.
func (l *link) enlist(c *conn) (previous *conn, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if c.ctx.Err() != nil {
		return nil, context.Cause(c.ctx)
	}
	if c.pin != l.host.Pin {
		return nil, errUnpinned
	}
	now := time.Now()
	if now.Before(l.refuseUntil) {
		return nil, fmt.Errorf("host %q is refused for another %v", l.name, l.refuseUntil.Sub(now).Round(time.Millisecond))
	}
	if l.last != nil && !l.last.ended() {
		l.replaced = slices.DeleteFunc(l.replaced, func(t time.Time) bool { return now.Sub(t) > cloneWindow })
		if len(l.replaced) >= cloneCount {
			l.replaced = nil
			l.refuseUntil = now.Add(cloneRefusal)
			return nil, fmt.Errorf("%w, that of host %q: its streams replaced each other over and over; new ones are refused for %v",
				errClones, l.name, cloneRefusal)
		}
		l.replaced = append(l.replaced, now)
	}
	if l.last != nil {
		l.last.cancel(errReplaced)
	}
	previous, l.last = l.last, c
	return previous, nil
}

// drop ends what adopt began. A peer that broke the protocol is refused for a
// while; pauses start short again after a stream that lasted.
func (l *link) drop(err error, lasting time.Duration) {
	l.current.Store(nil)
	l.mu.Lock()
	defer l.mu.Unlock()
	now := time.Now()
	if now.Sub(l.since) >= lasting {
		l.pause.Reset()
	}
	var fault *protocol.Fault
	if !l.dials && errors.As(err, &fault) {
		l.refuseUntil = now.Add(l.pause.NextBackOff())
	}
	l.since, l.err = now, err
}

func (l *link) nextPause() time.Duration {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.pause.NextBackOff()
}

// failed notes an error and says whether to log it: peers that stay away are
// logged once a minute.
func (l *link) failed(err error) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.err = err
	now := time.Now()
	if now.Sub(l.logged) < hushFor {
		return false
	}
	l.logged = now
	return true
}

func (l *link) state() State {
	l.mu.Lock()
	defer l.mu.Unlock()
	s := State{Host: l.name, Address: l.host.Address, Connected: l.current.Load() != nil, Since: l.since}
	if l.err != nil {
		s.Err = l.err.Error()
	}
	return s
}
