package peer

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"

	"conseal/agent/peer/peerpb"
	"conseal/protocol"
)

// conn is one connection. It ends with its context, whose cause says why.
type conn struct {
	tls       *tls.Conn
	pin       [32]byte // what the other end proved to be; set by open
	cfg       *Config
	in        *bufio.Reader // owned by the goroutine that reads
	queue     queue
	ctx       context.Context
	cancel    context.CancelCauseFunc
	greetings uint64         // those before its hello; set by open
	greeting  sync.Mutex     // held from making a hello until it is queued
	wg        sync.WaitGroup // of the goroutines that it started
	done      chan struct{}  // closed after its Down, or once it is certain that it has no Up
}

const (
	readBuffer = 32 << 10
	helloLimit = 4 << 10 // length of a hello's frame in bytes
	recordSize = 16 << 10
	// writePatience is how many times longer than silence a record may take.
	writePatience = 5
	// spareLimit is the largest buffer kept from one batch to the next.
	spareLimit = 1 << 20
)

func (n *Net) newConn(ctx context.Context, t *tls.Conn) *conn {
	c := &conn{tls: t, cfg: &n.cfg, done: make(chan struct{})}
	c.ctx, c.cancel = context.WithCancelCause(ctx)
	c.in = bufio.NewReaderSize(impatient{t, n.cfg.Silence}, readBuffer)
	c.queue = queue{limit: n.cfg.MaxFrame, length: n.cfg.QueueLen, wake: make(chan struct{}, 1)}
	c.wg.Go(func() {
		<-c.ctx.Done()
		_ = t.NetConn().Close() // not t.Close, which waits to say good-bye
	})
	return c
}

// fail ends the connection, for err unless it has ended already, and says why it
// ended.
func (c *conn) fail(err error) error {
	c.cancel(err)
	return context.Cause(c.ctx)
}

// end ends the connection and waits for its goroutines.
func (c *conn) end() {
	c.cancel(errStopping)
	c.wg.Wait()
}

func (c *conn) ended() bool {
	select {
	case <-c.done:
		return true
	default:
		return false
	}
}

// open makes the handshake and exchanges hellos. dialled is the peer that was
// dialled, or nil. The link is of the peer that proved its identity, or nil; it
// comes with an error too.
func (n *Net) open(c *conn, dialled *link) (*link, *peerpb.Hello, error) {
	slow := time.AfterFunc(n.cfg.Handshake, func() { c.cancel(fmt.Errorf("no hello within %v", n.cfg.Handshake)) })
	defer slow.Stop()
	if err := c.tls.HandshakeContext(c.ctx); err != nil {
		return nil, nil, c.fail(err)
	}
	name, pin, err := n.identify(c.tls.ConnectionState()) // proved by now
	if err != nil {
		return nil, nil, c.fail(err)
	}
	c.pin = pin
	l := n.peer(name)
	if err := n.expect(name, l, dialled); err != nil {
		return l, nil, c.fail(err)
	}
	hello, err := n.greet(c, name, dialled != nil)
	if err != nil {
		return l, nil, c.fail(err)
	}
	return l, hello, nil
}

// expect refuses a host that has no business at this end.
func (n *Net) expect(name protocol.HostID, l, dialled *link) error {
	switch {
	case name == n.cfg.Self:
		return errSelf
	case l == nil:
		return errUnpinned // just now
	case dialled != nil && name != dialled.name:
		return fmt.Errorf("the address answers as host %q", name)
	case dialled == nil && l.dials:
		return fmt.Errorf("host %q has no reason to dial: the smaller name dials", name)
	}
	return nil
}

// greet exchanges hellos. The host that listens speaks first: so the one that
// dialled hears of a refused certificate, which in TLS 1.3 comes after its side
// of the handshake.
func (n *Net) greet(c *conn, name protocol.HostID, dialled bool) (*peerpb.Hello, error) {
	if !dialled {
		if err := n.sayHello(c); err != nil {
			return nil, err
		}
	}
	f, err := frameReader{c.in, helloLimit}.next()
	var remote *net.OpError
	if errors.As(err, &remote) && remote.Op == "remote error" {
		return nil, fmt.Errorf("host %q refuses this host (is its identity in the roster there?): %w", name, err)
	}
	if err != nil {
		return nil, c.blame(name, err)
	}
	hello := f.GetHello()
	if hello == nil {
		return nil, protocol.Faultf(name, "the first frame is not a hello")
	}
	if err := c.checkHello(name, f); err != nil {
		return nil, err
	}
	if dialled {
		err = n.sayHello(c)
	}
	return hello, err
}

// checkHello checks a frame that is a hello.
func (c *conn) checkHello(name protocol.HostID, f *peerpb.Frame) error {
	if size := proto.Size(f); size > helloLimit {
		return protocol.Faultf(name, "hello of %d bytes is over the limit of %d", size, helloLimit)
	}
	if fleet := f.GetHello().Fleet; fleet != c.cfg.Fleet {
		return fmt.Errorf("host %q is of another fleet: %.64q instead of %q", name, fleet, c.cfg.Fleet)
	}
	return nil
}

func (n *Net) hello() *peerpb.Frame {
	hello := &peerpb.Hello{}
	proto.Merge(hello, n.cfg.Hello())
	hello.Fleet = n.cfg.Fleet
	f, _ := n.liar.tell("", &peerpb.Frame{Body: &peerpb.Frame_Hello{Hello: hello}})
	return f
}

// greetAgain queues a hello on a stream that is up, never one older than the last.
func (n *Net) greetAgain(c *conn) {
	c.greeting.Lock()
	defer c.greeting.Unlock()
	if err := c.queue.add(n.hello(), helloLimit); err != nil {
		c.cancel(fmt.Errorf("saying hello: %w", err))
	}
}

func (n *Net) sayHello(c *conn) error {
	c.greetings = n.greetings.Load()
	b, err := appendFrame(nil, n.hello(), helloLimit)
	if err == nil {
		_, err = c.tls.Write(b)
	}
	if err != nil {
		return fmt.Errorf("saying hello: %w", err)
	}
	return nil
}

// read hands frames to the handler until the connection ends.
func (c *conn) read(l *link, handler Handler) error {
	frames := frameReader{c.in, c.cfg.MaxFrame}
	for {
		f, err := frames.next()
		if err != nil {
			return c.blame(l.name, err)
		}
		if err := l.limit.Wait(c.ctx); err != nil {
			return err
		}
		switch f.Body.(type) {
		case *peerpb.Frame_Hello:
			if err := c.checkHello(l.name, f); err != nil {
				return err
			}
			handler.Hello(l.name, f.GetHello())
		case *peerpb.Frame_Ping:
			_ = c.queue.put(&peerpb.Frame{Body: &peerpb.Frame_Pong{Pong: &peerpb.Pong{}}}) // full: it hears of us anyway
		case *peerpb.Frame_Pong:
		default:
			handler.Frame(l.name, f)
		}
	}
}

// blame says what an error of frameReader.next means.
func (c *conn) blame(name protocol.HostID, err error) error {
	var bad malformed
	switch {
	case errors.As(err, &bad):
		return protocol.Faultf(name, "%s", bad)
	case errors.Is(err, os.ErrDeadlineExceeded):
		return fmt.Errorf("silent for %v", c.cfg.Silence)
	case errors.Is(err, io.EOF):
		return errors.New("closed by the other end")
	}
	return err
}

// write sends what is queued, all that waits at once, and pings when there is
// nothing. A peer that takes no data but speaks may be holding this host to its
// rate, with all of its read buffer still to work off: so writing gets more time
// than silence.
func (c *conn) write() {
	var batch []byte
	idle := time.NewTimer(c.cfg.Ping)
	defer idle.Stop()
	for {
		select {
		case <-c.ctx.Done():
			return
		case <-idle.C:
			_ = c.queue.put(&peerpb.Frame{Body: &peerpb.Frame_Ping{Ping: &peerpb.Ping{}}}) // full: there is enough to send
		case <-c.queue.wake:
		}
		batch = c.queue.take(batch)
		for record := range slices.Chunk(batch, recordSize) {
			_ = c.tls.SetWriteDeadline(time.Now().Add(writePatience * c.cfg.Silence))
			if _, err := c.tls.Write(record); err != nil {
				c.cancel(fmt.Errorf("writing: %w", err))
				return
			}
		}
		idle.Reset(c.cfg.Ping)
	}
}

// queue holds the frames that wait for the writer, encoded one after the other.
type queue struct {
	limit, length int           // bytes of a frame; frames
	wake          chan struct{} // holds a token if frames may wait

	mu     sync.Mutex
	buf    []byte
	frames int
}

func (q *queue) put(f *peerpb.Frame) error {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.frames >= q.length || len(q.buf) >= 4*q.limit {
		return ErrFull
	}
	return q.append(f, q.limit)
}

// add puts a frame of at most limit bytes into the queue though it may be full.
func (q *queue) add(f *peerpb.Frame, limit int) error {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.append(f, limit)
}

// append appends a frame; mu is held.
func (q *queue) append(f *peerpb.Frame, limit int) error {
	buf, err := appendFrame(q.buf, f, limit)
	if err != nil {
		return err
	}
	q.buf = buf
	q.frames++
	select {
	case q.wake <- struct{}{}:
	default:
	}
	return nil
}

// take returns all that waits and leaves spare, whose content is not needed any
// more, to be filled next.
func (q *queue) take(spare []byte) []byte {
	if cap(spare) > spareLimit {
		spare = nil
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	batch := q.buf
	q.buf, q.frames = spare[:0], 0
	return batch
}

// impatient is the reading end of a connection, on which silence is an error.
type impatient struct {
	*tls.Conn
	silence time.Duration
}

func (i impatient) Read(b []byte) (int, error) {
	if err := i.SetReadDeadline(time.Now().Add(i.silence)); err != nil {
		return 0, err
	}
	return i.Conn.Read(b)
}
