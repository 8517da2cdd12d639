package testenv

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"path/filepath"
	"slices"
	"sync"
	"time"
)

// sender is what go-tpm's commands are executed on; a [Tap] is one too.
type sender interface {
	Send(cmd []byte) ([]byte, error)
}

// Exchange carries one command to the TPM and returns its answer.
type Exchange func(cmd []byte) (answer []byte, err error)

// Tap stands between a TPM and its clients, as somebody on the bus would. It can
// record what passes, and [Tap.Intercept] can delay, alter, answer, hang or cut.
// Unlike swtpm it takes several clients and puts their commands in line; it does
// not keep their handles apart, as a resource manager would.
//
// Tap is itself a go-tpm transport: what is sent on it comes between two commands
// of the clients, past recorder and interceptor.
type Tap struct {
	listener *net.UnixListener
	done     chan struct{} // closed once, by Close
	closing  sync.Once
	serving  sync.WaitGroup

	mu        sync.Mutex // of what follows
	target    string     // socket of the TPM
	record    io.Writer
	intercept func(cmd []byte, next Exchange) ([]byte, error)
	clients   map[net.Conn]chan struct{} // closed once its commands are done

	line sync.Mutex // held for one command
	tpm  *tpmConn   // nil until the next command dials
}

// Tap starts a tap of t, listening in t's folder under name. End it with [Tap.Close].
func (t *TPM) Tap(name string) (*Tap, error) {
	path := filepath.Join(t.dir, name)
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, fmt.Errorf("listening for clients of the TPM: %w", err)
	}
	p := &Tap{listener: l, done: make(chan struct{}), target: t.socket(), clients: map[net.Conn]chan struct{}{}}
	p.serving.Go(p.accept)
	return p, nil
}

// Address is where clients connect, as in the agent's configuration.
func (p *Tap) Address() string { return "unix:" + p.listener.Addr().String() }

// Done is closed by [Tap.Close]: an interceptor that hangs waits for it too.
func (p *Tap) Done() <-chan struct{} { return p.done }

// Close cuts all clients off and frees the TPM. Interceptors must return once
// Done is closed. Closing twice does nothing.
func (p *Tap) Close() error {
	var err error
	p.closing.Do(func() {
		close(p.done)
		err = p.listener.Close()
		p.Cut()
		p.serving.Wait()
		p.line.Lock()
		defer p.line.Unlock()
		p.hangUp()
	})
	return err
}

// Cut closes the connections of all clients.
func (p *Tap) Cut() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for c := range p.clients {
		c.Close()
	}
}

// Drain waits until the clients have hung up and what they sent is done: the last command
// of a process that was killed comes before those of the next.
func (p *Tap) Drain() {
	p.mu.Lock()
	clients := slices.Collect(maps.Values(p.clients))
	p.mu.Unlock()
	for _, done := range clients {
		<-done
	}
}

// Record writes every command and answer from now on to w, as clients see them;
// nil ends that. Nothing is written to the former w once Record has returned.
func (p *Tap) Record(w io.Writer) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.record = w
}

// Intercept has f handle each command instead of passing it on: f may call next
// never, once or often, with what it likes. If it returns an error the client is
// cut off without an answer. nil ends that. f may be called by several goroutines.
func (p *Tap) Intercept(f func(cmd []byte, next Exchange) ([]byte, error)) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.intercept = f
}

// Delay makes each command take d longer: real TPMs take 50 to 500 ms for some.
func (p *Tap) Delay(d time.Duration) {
	p.Intercept(func(cmd []byte, next Exchange) ([]byte, error) {
		select {
		case <-time.After(d):
			return next(cmd)
		case <-p.done:
			return nil, net.ErrClosed
		}
	})
}

// Connect has the next commands go to another TPM, as if the board were replaced.
func (p *Tap) Connect(other *TPM) {
	p.mu.Lock()
	p.target = other.socket()
	p.mu.Unlock()
	p.line.Lock()
	defer p.line.Unlock()
	p.hangUp()
	p.Cut()
}

// Extend is [TPM.Extend] while clients are connected.
func (p *Tap) Extend(pcr int, data string) error { return extend(p, pcr, data) }

// Boot extends the TPM's PCRs as a boot with this event log would.
func (p *Tap) Boot(log *EventLog) error {
	for _, e := range log.Events {
		if e.Type == EventNoAction {
			continue
		}
		if err := extendDigest(p, int(e.PCR), e.SHA256); err != nil {
			return err
		}
	}
	return nil
}

// Send carries one command to the TPM between those of the clients.
func (p *Tap) Send(cmd []byte) ([]byte, error) {
	p.line.Lock()
	defer p.line.Unlock()
	if p.tpm == nil {
		p.mu.Lock()
		target := p.target
		p.mu.Unlock()
		c, err := dialTPM(target)
		if err != nil {
			return nil, err
		}
		p.tpm = c
	}
	answer, err := p.tpm.Send(cmd)
	if err != nil {
		p.hangUp() // a late answer must not become that of the next command
	}
	return answer, err
}

// hangUp is called with the line held.
func (p *Tap) hangUp() {
	if p.tpm != nil {
		p.tpm.Close()
		p.tpm = nil
	}
}

func (p *Tap) accept() {
	for {
		c, err := p.listener.Accept()
		if err != nil {
			return // closed
		}
		done := make(chan struct{})
		p.mu.Lock()
		p.clients[c] = done
		p.mu.Unlock()
		p.serving.Go(func() {
			defer close(done)
			p.serve(c)
			p.mu.Lock()
			delete(p.clients, c)
			p.mu.Unlock()
			c.Close()
		})
	}
}

// serve handles one client's commands until either side hangs up.
func (p *Tap) serve(c net.Conn) {
	select {
	case <-p.done: // Cut may have come before this client was known
		return
	default:
	}
	for {
		cmd, err := readFrame(c)
		if err != nil {
			return
		}
		answer, err := p.handle(cmd)
		if err != nil {
			return
		}
		if _, err := c.Write(answer); err != nil {
			return
		}
	}
}

func (p *Tap) handle(cmd []byte) ([]byte, error) {
	p.mu.Lock()
	p.write(cmd)
	intercept := p.intercept
	p.mu.Unlock()
	var answer []byte
	var err error
	if intercept == nil {
		answer, err = p.Send(cmd)
	} else {
		answer, err = intercept(cmd, p.Send)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.write(answer)
	return answer, err
}

// write is called with mu held.
func (p *Tap) write(frame []byte) {
	if p.record != nil {
		_, _ = p.record.Write(frame) // a test's buffer
	}
}

// tpmConn is a connection to swtpm.
type tpmConn struct{ net.Conn }

// answerTime bounds one command of this package's own connections. swtpm takes
// milliseconds; longer means that another client holds it.
const answerTime = 20 * time.Second

func dialTPM(path string) (*tpmConn, error) {
	c, err := net.Dial("unix", path)
	if err != nil {
		return nil, fmt.Errorf("connecting to the TPM: %w", err)
	}
	return &tpmConn{c}, nil
}

func (c *tpmConn) Send(cmd []byte) ([]byte, error) {
	if err := c.SetDeadline(time.Now().Add(answerTime)); err != nil {
		return nil, err
	}
	if _, err := c.Write(cmd); err != nil {
		return nil, err
	}
	answer, err := readFrame(c)
	if err != nil {
		return nil, fmt.Errorf("no answer from the TPM (does another client hold it?): %w", err)
	}
	return answer, nil
}

// readFrame reads one command or answer: tag (2 bytes), size of the whole (4),
// code (4), rest. TPM 2.0 part 1, section 18.
func readFrame(r io.Reader) ([]byte, error) {
	header := make([]byte, 10)
	if _, err := io.ReadFull(r, header); err != nil {
		return nil, err
	}
	size := binary.BigEndian.Uint32(header[2:])
	if size < 10 || size > 1<<16 {
		return nil, errors.New("not a TPM command or answer")
	}
	frame := make([]byte, size)
	copy(frame, header)
	_, err := io.ReadFull(r, frame[10:])
	return frame, err
}
