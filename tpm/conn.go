package tpm

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"github.com/google/go-tpm/tpm2"
	"golang.org/x/sys/unix"
)

// conn is a connection to a TPM: one command, one answer.
type conn struct {
	s       stream
	timeout time.Duration // of one command
	broken  bool          // out of step, cut or not to be trusted: never used again
}

// stream is a socket or a device.
type stream interface {
	io.ReadWriteCloser
	SetDeadline(time.Time) error
}

// address is a parsed Config.Device.
type address struct{ network, target string }

// managed tells whether the kernel's resource manager is between us and the TPM:
// our handles are our own there, and are flushed when we hang up.
func (a address) managed() bool { return a.network == "device" }

var rawDevice = regexp.MustCompile(`^tpm[0-9]+$`)

func parseAddress(s string) (address, error) {
	network, target, _ := strings.Cut(s, ":")
	switch {
	case target == "" || network != "device" && network != "unix" && network != "tcp":
		return address{}, fmt.Errorf(`tpm: address %q is none of "device:/dev/tpmrm0", "unix:PATH" and "tcp:HOST:PORT"`, s)
	case network == "device" && rawDevice.MatchString(filepath.Base(target)):
		return address{}, fmt.Errorf("tpm: %s has no resource manager and would be ours alone: use /dev/tpmrm0", target)
	}
	return address{network, target}, nil
}

func dial(ctx context.Context, a address, timeout time.Duration) (*conn, error) {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	var s stream
	var err error
	if a.managed() {
		s, err = openDevice(a.target)
	} else {
		s, err = new(net.Dialer).DialContext(ctx, a.network, a.target)
	}
	if err != nil {
		return nil, fmt.Errorf("connecting: %w", &linkError{err})
	}
	return &conn{s: s, timeout: timeout}, nil
}

// Send carries one command of go-tpm to the TPM and its answer back. A TPM that
// says that it did not start (TPM 2.0 part 2, section 6.6.3) is asked again until
// the command's time is up; what it says last counts. After an error the connection is not used again.
func (x *tx) Send(cmd []byte) ([]byte, error) {
	c := x.conn
	if c.broken {
		return nil, &linkError{net.ErrClosed}
	}
	if err := x.ctx.Err(); err != nil {
		c.broken = true // what this transaction holds can no longer be flushed here
		return nil, err
	}
	until, _ := x.deadline()
	for wait := time.Millisecond; ; wait = min(2*wait, 100*time.Millisecond) {
		deadline, late := x.deadline() // of each try: one that starts must not be cut off at once
		answer, err := c.exchange(cmd, deadline)
		if err != nil {
			c.broken = true
			if errors.Is(err, os.ErrDeadlineExceeded) {
				err = errors.Join(err, late)
			}
			return nil, &linkError{err}
		}
		x.answers = append(x.answers, answer)
		if !notStarted(answer) || time.Now().Add(wait).After(until) {
			return answer, nil
		}
		select {
		case <-time.After(wait):
		case <-x.ctx.Done():
			c.broken = true
			return nil, x.ctx.Err()
		}
	}
}

// deadline of what is sent now, and what its passing means if that is not the command's own.
func (x *tx) deadline() (deadline time.Time, late error) {
	deadline = time.Now().Add(x.conn.timeout)
	if d, ok := x.ctx.Deadline(); ok && d.Before(deadline) {
		return d, context.DeadlineExceeded
	}
	return deadline, nil
}

func notStarted(answer []byte) bool {
	switch tpm2.TPMRC(binary.BigEndian.Uint32(answer[6:])) {
	case tpm2.TPMRCRetry, tpm2.TPMRCYielded, tpm2.TPMRCTesting, tpm2.TPMRCNVRate:
		return true
	}
	return false
}

// Sizes of an answer: its header, and the most that a TPM may send (TPM 2.0
// part 4, MAX_RESPONSE_SIZE; also the kernel's TPM_BUFSIZE).
const (
	headerSize = 10
	maxAnswer  = 4096
)

func (c *conn) exchange(cmd []byte, deadline time.Time) ([]byte, error) {
	if err := c.s.SetDeadline(deadline); err != nil {
		return nil, err
	}
	if _, err := c.s.Write(cmd); err != nil {
		return nil, err
	}
	// A device gives the whole answer to one read, and may drop what did not fit.
	buf := make([]byte, maxAnswer)
	n, err := io.ReadAtLeast(c.s, buf, headerSize)
	if err != nil {
		return nil, err
	}
	size := int64(binary.BigEndian.Uint32(buf[2:]))
	if size < int64(n) || size > maxAnswer {
		return nil, fmt.Errorf("the answer says it has %d bytes, %d came", size, n)
	}
	_, err = io.ReadFull(c.s, buf[n:size])
	return buf[:size], err
}

// device is the character device of the kernel's TPM driver. Its read returns 0,
// which looks like an end of file, while a command runs (drivers/char/tpm,
// tpm_common_read); so it is polled first, which also gives a deadline.
type device struct {
	fd       int
	deadline time.Time
}

func openDevice(path string) (*device, error) {
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: path, Err: err}
	}
	return &device{fd: fd}, nil
}

func (d *device) SetDeadline(t time.Time) error { d.deadline = t; return nil }
func (d *device) Close() error                  { return unix.Close(d.fd) }

func (d *device) Write(b []byte) (int, error) {
	n, err := retryEINTR(func() (int, error) { return unix.Write(d.fd, b) })
	if err == nil && n != len(b) {
		err = io.ErrShortWrite
	}
	return n, err
}

func (d *device) Read(b []byte) (int, error) {
	ready, err := retryEINTR(func() (int, error) {
		left := max(0, time.Until(d.deadline))
		return unix.Poll([]unix.PollFd{{Fd: int32(d.fd), Events: unix.POLLIN}}, int(left.Milliseconds())+1)
	})
	if err != nil {
		return 0, err
	}
	if ready == 0 {
		return 0, os.ErrDeadlineExceeded
	}
	n, err := retryEINTR(func() (int, error) { return unix.Read(d.fd, b) })
	if err == nil && n == 0 {
		err = io.EOF
	}
	return max(n, 0), err
}

func retryEINTR(call func() (int, error)) (int, error) {
	for {
		n, err := call()
		if !errors.Is(err, unix.EINTR) {
			return n, err
		}
	}
}
