// Package pin reads the PIN of a device, a TPM or a PKCS#11 token, and sees that
// none is sent again that the device did not accept.
//
// [ParseSource] says where the PIN is and [Source.Read] gets it. Around each use of
// it stands a [Latch]: [Latch.Arm] before the PIN is sent, then [Latch.Accepted] or,
// if the device never judged it, [Latch.Disarm]. After a refusal, nothing:
//
//	source, err := pin.ParseSource("file:/etc/conseal/hsm.pin")
//	value, err := source.Read()
//	defer value.Wipe()
//	latch := pin.Latch{Dir: "/var/lib/conseal/hsm", Name: "hsm-pin.latch"}
//	err = latch.Arm(value) // ErrRefused: it was sent before
//	... send it
//	err = latch.Accepted()
package pin

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"conseal/internal/disk"
	"conseal/internal/secret"
)

// Source is where a PIN comes from: never a command line, never the environment,
// for others can read both. Make it with [ParseSource].
type Source struct {
	kind string // "file", "fd" or "cred"
	arg  string // path, number or name
}

const maxPIN = 256 // bytes

// ParseSource understands "file:/path" or "/path" (mode 0600, owned by us or root,
// no symbolic link), "fd:N" (an open file descriptor, N >= 3) and "cred:NAME" (a
// systemd credential). Its error does not repeat s, which may be a PIN by mistake.
func ParseSource(s string) (Source, error) {
	kind, arg, ok := strings.Cut(s, ":")
	if strings.HasPrefix(s, "/") {
		kind, arg, ok = "file", s, true
	}
	switch {
	case ok && kind == "file" && filepath.IsAbs(arg) && !strings.HasPrefix(arg, "//"):
		return Source{kind, arg}, nil
	case ok && kind == "fd":
		if n, err := strconv.ParseUint(arg, 10, 16); err == nil && n >= 3 && strconv.FormatUint(n, 10) == arg {
			return Source{kind, arg}, nil
		}
	case ok && kind == "cred" && arg != "" && arg != "." && arg != ".." && !strings.ContainsAny(arg, "/\x00"):
		return Source{kind, arg}, nil
	}
	return Source{}, errors.New("PIN source must be file:/path, fd:N with N >= 3, or cred:NAME")
}

// String is the source as [ParseSource] reads it. It holds no secret.
func (s Source) String() string { return s.kind + ":" + s.arg }

// Once tells whether a second Read may find nothing: a pipe can be read once.
func (s Source) Once() bool { return s.kind == "fd" }

// FD is the number of the descriptor of a source "fd:N".
func (s Source) FD() (n int, ok bool) {
	n, err := strconv.Atoi(s.arg)
	return n, s.kind == "fd" && err == nil
}

// Keep makes a pipe readable again and again, also by a child that gets the
// descriptor: it puts a file of the kernel's memory with the pipe's content in its
// place, under the same number. The bytes do not pass through this process's memory.
// Of any other source there is nothing to keep.
func (s Source) Keep() error {
	n, ok := s.FD()
	if !ok {
		return nil
	}
	var st unix.Stat_t
	if err := unix.Fstat(n, &st); err != nil {
		return fmt.Errorf("keeping the PIN of %s: %w: start the program with %d<FILE", s, err, n)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFIFO {
		return nil
	}
	file, err := unix.MemfdCreate("pin", unix.MFD_CLOEXEC)
	if err != nil {
		return fmt.Errorf("keeping the PIN of %s: %w", s, err)
	}
	defer unix.Close(file)
	if err := drain(n, file); err != nil {
		return fmt.Errorf("keeping the PIN of %s: %w", s, err)
	}
	return unix.Dup3(file, n, unix.O_CLOEXEC)
}

// drain moves what is in a pipe to a file until the pipe's other end is closed. It
// stops at a length that no PIN has, so that Read refuses it.
func drain(pipe, file int) error {
	for total := int64(0); total <= 2*maxPIN; {
		n, err := unix.Splice(pipe, nil, file, nil, 2*maxPIN, 0)
		switch {
		case errors.Is(err, unix.EINTR):
		case errors.Is(err, unix.EAGAIN): // somebody set O_NONBLOCK
			_, err = unix.Poll([]unix.PollFd{{Fd: int32(pipe), Events: unix.POLLIN}}, -1)
			if err != nil && !errors.Is(err, unix.EINTR) {
				return err
			}
		case err != nil:
			return err
		case n == 0:
			return nil
		}
		total += n
	}
	return nil
}

// Read gets the PIN, of 1 to 256 bytes: everything up to one final line end.
func (s Source) Read() (*secret.Bytes, error) {
	f, err := s.open()
	if err != nil {
		return nil, fmt.Errorf("reading the PIN from %s: %w", s, err)
	}
	defer f.Close()
	var buf [maxPIN + 3]byte // room for a line end, and for one byte that shows there is more
	defer clear(buf[:])
	n, err := io.ReadFull(f, buf[:])
	if err != nil && err != io.EOF && err != io.ErrUnexpectedEOF {
		return nil, fmt.Errorf("reading the PIN from %s: %w", s, err)
	}
	pin := bytes.TrimSuffix(bytes.TrimSuffix(buf[:n], []byte("\n")), []byte("\r"))
	switch {
	case len(pin) == 0:
		return nil, fmt.Errorf("reading the PIN from %s: it is empty (a pipe can be read only once)", s)
	case len(pin) > maxPIN || bytes.ContainsAny(pin, "\x00\r\n"):
		return nil, fmt.Errorf("reading the PIN from %s: must be one line of at most %d bytes", s, maxPIN)
	}
	return secret.Copy(pin), nil
}

func (s Source) open() (*os.File, error) {
	switch s.kind {
	case "fd":
		return openFD(s.arg)
	case "cred":
		dir := os.Getenv("CREDENTIALS_DIRECTORY") // systemd.exec(5); the folder's name is no secret
		if !filepath.IsAbs(dir) {
			return nil, errors.New("CREDENTIALS_DIRECTORY is not set: add LoadCredentialEncrypted= to the unit")
		}
		// systemd gives a service under User= its credential by an ACL, which
		// shows as group-readable.
		return openOwn(filepath.Join(dir, s.arg), 0o027)
	}
	return openOwn(s.arg, 0o077)
}

// openFD duplicates the descriptor, so that closing what it returns leaves the
// number taken: a later read must not meet somebody else's file.
func openFD(number string) (*os.File, error) {
	n, err := strconv.Atoi(number)
	if err != nil {
		return nil, err
	}
	dup, err := unix.FcntlInt(uintptr(n), unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		return nil, fmt.Errorf("%w: start the program with %d<FILE", err, n)
	}
	f := os.NewFile(uintptr(dup), "pin")
	if info, err := f.Stat(); err == nil && info.Mode().IsRegular() {
		if _, err := f.Seek(0, io.SeekStart); err != nil {
			f.Close()
			return nil, err
		}
	}
	return f, nil
}

// openOwn opens a regular file that nobody but us and root can change and that
// has none of the mode bits in forbidden. It follows no symbolic link and does
// not wait on a FIFO.
func openOwn(path string, forbidden fs.FileMode) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if errors.Is(err, unix.ELOOP) {
		return nil, errors.New("it is a symbolic link: give the file itself")
	}
	if err != nil {
		return nil, err
	}
	info, err := f.Stat()
	if err == nil && !info.Mode().IsRegular() {
		err = errors.New("not a regular file")
	}
	if err == nil {
		err = disk.Trusted(info, forbidden)
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}
