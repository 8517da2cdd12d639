package hsm

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

	"conseal/internal/secret"
)

// pinSource is where a PIN comes from: never a command line, never the
// environment, for others can read both.
type pinSource struct {
	kind string // "file", "fd" or "cred"
	arg  string // path, number or name
}

const maxPIN = 256 // bytes

func parsePINSource(s string) (pinSource, error) {
	kind, arg, ok := strings.Cut(s, ":")
	if strings.HasPrefix(s, "/") {
		kind, arg, ok = "file", s, true
	}
	switch {
	case ok && kind == "file" && filepath.IsAbs(arg) && !strings.HasPrefix(arg, "//"):
		return pinSource{kind, arg}, nil
	case ok && kind == "fd":
		if n, err := strconv.ParseUint(arg, 10, 16); err == nil && n >= 3 && strconv.FormatUint(n, 10) == arg {
			return pinSource{kind, arg}, nil
		}
	case ok && kind == "cred" && arg != "" && arg != "." && arg != ".." && !strings.ContainsAny(arg, "/\x00"):
		return pinSource{kind, arg}, nil
	}
	return pinSource{}, errors.New("PIN source must be file:/path, fd:N with N >= 3, or cred:NAME")
}

func (p pinSource) String() string { return p.kind + ":" + p.arg }

// read gets the PIN: everything up to one final line end.
func (p pinSource) read() (*secret.Bytes, error) {
	f, err := p.open()
	if err != nil {
		return nil, fmt.Errorf("reading the PIN from %s: %w", p, err)
	}
	defer f.Close()
	var buf [maxPIN + 3]byte // room for a line end, and for one byte that shows there is more
	defer clear(buf[:])
	n, err := io.ReadFull(f, buf[:])
	if err != nil && err != io.EOF && err != io.ErrUnexpectedEOF {
		return nil, fmt.Errorf("reading the PIN from %s: %w", p, err)
	}
	pin := bytes.TrimSuffix(bytes.TrimSuffix(buf[:n], []byte("\n")), []byte("\r"))
	switch {
	case len(pin) == 0:
		return nil, fmt.Errorf("reading the PIN from %s: it is empty (a pipe can be read only once)", p)
	case len(pin) > maxPIN || bytes.ContainsAny(pin, "\x00\r\n"):
		return nil, fmt.Errorf("reading the PIN from %s: must be one line of at most %d bytes", p, maxPIN)
	}
	return secret.Copy(pin), nil
}

func (p pinSource) open() (*os.File, error) {
	switch p.kind {
	case "fd":
		return openFD(p.arg)
	case "cred":
		dir := os.Getenv("CREDENTIALS_DIRECTORY") // systemd.exec(5); the folder's name is no secret
		if !filepath.IsAbs(dir) {
			return nil, errors.New("CREDENTIALS_DIRECTORY is not set: add LoadCredentialEncrypted= to the unit")
		}
		// systemd gives a service under User= its credential by an ACL, which
		// shows as group-readable.
		return openOwn(filepath.Join(dir, p.arg), 0o027)
	}
	return openOwn(p.arg, 0o077)
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
		err = trusted(info, forbidden)
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}
