package helper

import (
	"context"
	"crypto"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/signal"
	"sync"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"conseal/hsm"
)

// Command is the one argument with which a helper is started.
const Command = "hsm-helper"

// Called tells whether this process is to be a helper.
func Called() bool { return len(os.Args) == 2 && os.Args[1] == Command }

// Main is the life of a helper and gives its exit code. It ends when the agent closes
// the socket, on its standard input, or dies.
func Main() int {
	if err := serve(); err != nil {
		fmt.Fprintln(os.Stderr, "conseald", Command+":", err)
		return 1
	}
	return 0
}

func serve() error {
	// The agent ends the helper: a signal to all processes of a service must not, for
	// the agent may need it to end in order.
	signal.Ignore(unix.SIGINT, unix.SIGTERM, unix.SIGHUP, unix.SIGQUIT)
	if err := protect(); err != nil {
		return err
	}
	conn, err := takeSocket()
	if err != nil {
		return fmt.Errorf("conseald itself starts this, with a socket: %w", err)
	}
	s := &server{conn: conn, cancels: map[uint64]context.CancelFunc{}}
	err = s.run()
	s.finish()
	return err
}

// protect keeps the PIN and the keys that pass through from core files, other
// processes and logs. The rest was done before this process was: see restrict.
func protect() error {
	// A crash of the module ends the process without a word: Go's handlers would print
	// the registers, and a key may be in them.
	for _, s := range []unix.Signal{unix.SIGSEGV, unix.SIGBUS, unix.SIGFPE, unix.SIGILL, unix.SIGABRT, unix.SIGTRAP, unix.SIGSYS} {
		var byDefault [64]byte // a struct sigaction of zeros is SIG_DFL everywhere
		if _, _, errno := unix.RawSyscall6(unix.SYS_RT_SIGACTION, uintptr(s), uintptr(unsafe.Pointer(&byDefault)), 0, 8, 0, 0); errno != 0 {
			return fmt.Errorf("signal %v: %w", s, errno)
		}
	}
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return fmt.Errorf("making the process non-dumpable: %w", err)
	}
	if err := unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{}); err != nil {
		return fmt.Errorf("forbidding core files: %w", err)
	}
	return nil
}

// takeSocket takes the socket from standard input, where a module that asks for
// something would read it, and keeps what was inherited from the module's children.
func takeSocket() (net.Conn, error) {
	conn, err := net.FileConn(os.Stdin)
	if err != nil {
		return nil, err
	}
	null, err := os.Open(os.DevNull)
	if err != nil {
		return nil, err
	}
	defer null.Close()
	if err := unix.Dup3(int(null.Fd()), 0, 0); err != nil {
		return nil, err
	}
	_ = unix.CloseRange(3, ^uint(0), unix.CLOSE_RANGE_CLOEXEC) // unknown before Linux 5.11
	return conn, nil
}

// server is the helper's side.
type server struct {
	conn net.Conn

	writing sync.Mutex     // one frame at a time
	asked   sync.WaitGroup // questions under way

	mu       sync.Mutex // guards what follows
	hsm      *hsm.HSM   // nil: not open
	identity crypto.Signer
	cancels  map[uint64]context.CancelFunc // of questions under way
}

// run takes questions until there are no more.
func (s *server) run() error {
	for {
		f, err := readFrame(s.conn)
		if err != nil {
			return nil // the agent has closed the socket, or ended
		}
		if f.op > opCancel {
			return errFrame
		}
		if f.op == opCancel { // before any question that is asked later
			s.mu.Lock()
			if cancel := s.cancels[f.id]; cancel != nil {
				cancel()
			}
			s.mu.Unlock()
			continue
		}
		s.accept(f)
	}
}

// accept answers a question in a goroutine.
func (s *server) accept(f *frame) {
	ctx, cancel := context.WithCancel(context.Background())
	s.mu.Lock()
	s.cancels[f.id] = cancel
	s.mu.Unlock()
	s.asked.Go(func() {
		answer, err := s.do(ctx, f)
		f.secret.Wipe()
		s.mu.Lock()
		delete(s.cancels, f.id)
		s.mu.Unlock()
		cancel()
		if err == nil {
			answer.id, answer.op = f.id, opDone
			err = answer.check()
		}
		if err != nil {
			if answer != nil {
				answer.secret.Wipe()
			}
			answer = failure(f.id, err)
		}
		s.writing.Lock()
		defer s.writing.Unlock()
		_ = answer.write(s.conn) // if it cannot be written, run sees the end
		answer.secret.Wipe()
	})
}

func (s *server) do(ctx context.Context, f *frame) (*frame, error) {
	switch f.op {
	case opStart:
		return s.start(ctx, f.text)
	case opProvision:
		return provision(ctx, f.text, hsm.Provision)
	case opWithdraw:
		return provision(ctx, f.text, hsm.Withdraw)
	}
	s.mu.Lock()
	h := s.hsm
	s.mu.Unlock()
	if h == nil {
		return nil, errors.New("hsm: the helper has no token open")
	}
	var err error
	answer := &frame{}
	switch f.op {
	case opSeal:
		answer.secret, answer.blob, err = h.Seal(ctx, f.text)
	case opOpen:
		answer.secret, err = h.Open(ctx, f.text, f.blob)
	case opRoot:
		answer.secret, err = h.Root(ctx)
	case opSetRoot:
		if f.secret == nil {
			return nil, errFrame
		}
		err = h.SetRoot(ctx, f.secret)
	case opIdentity, opSign:
		return s.sign(ctx, h, f)
	}
	return answer, err
}

func (s *server) start(ctx context.Context, text string) (*frame, error) {
	var cfg hsm.Config
	if err := strictJSON([]byte(text), &cfg); err != nil {
		return nil, fmt.Errorf("hsm: the helper's configuration: %w", err)
	}
	h, err := hsm.Open(ctx, cfg)
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	s.hsm = h
	s.mu.Unlock()
	return &frame{text: h.Name()}, nil
}

func provision(ctx context.Context, text string, do func(context.Context, hsm.Config) (hsm.Provisioned, error)) (*frame, error) {
	var cfg hsm.Config
	if err := strictJSON([]byte(text), &cfg); err != nil {
		return nil, fmt.Errorf("hsm: the helper's configuration: %w", err)
	}
	done, err := do(ctx, cfg)
	if err != nil {
		return nil, err
	}
	b, err := json.Marshal(done)
	return &frame{text: string(b)}, err
}

// sign answers what is asked of the identity, which it looks for at the first time.
func (s *server) sign(ctx context.Context, h *hsm.HSM, f *frame) (*frame, error) {
	s.mu.Lock()
	identity := s.identity
	s.mu.Unlock()
	if identity == nil || f.op == opIdentity {
		var err error
		if identity, err = h.Identity(ctx); err != nil {
			return nil, err
		}
		s.mu.Lock()
		s.identity = identity
		s.mu.Unlock()
	}
	var b []byte
	var err error
	if f.op == opIdentity {
		b, err = x509.MarshalPKIXPublicKey(identity.Public())
	} else {
		b, err = identity.Sign(nil, f.blob, crypto.SHA256)
	}
	return &frame{blob: b}, err
}

// finish answers what was asked and closes the sessions, if the module lets it in
// time.
func (s *server) finish() {
	done := make(chan struct{})
	go func() {
		s.asked.Wait()
		s.mu.Lock()
		h := s.hsm
		s.mu.Unlock()
		if h != nil {
			h.Close()
		}
		close(done)
	}()
	select {
	case <-done:
	case <-time.After(stopTime):
	}
}
