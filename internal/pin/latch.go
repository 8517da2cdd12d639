package pin

import (
	"crypto/pbkdf2"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"conseal/internal/disk"
	"conseal/internal/secret"
)

// ErrRefused says that the device refused the PIN, now or earlier. The same PIN is
// not sent again.
var ErrRefused = errors.New("the device refused the PIN")

// Latch remembers in a file which PINs were sent to the device and not accepted, so
// that none is ever sent twice, also not by a new process: a unit with Restart=always
// would otherwise lock the device. Each device needs a latch of its own.
//
// A PIN is entered, durably, before it is sent, and the file is removed when
// the device has accepted it. So a crash in between counts as a refusal. The
// file holds hashes: a short PIN can be found from its hash by trial, which is
// why the file is 0600 in a folder of 0700 like the PIN's own.
type Latch struct {
	Dir  string // an existing folder (0700), for this host and process alone
	Name string // the file's name in Dir
}

const (
	latchTitle = "conseal pin latch v1"
	// latchMax is more PINs than any device takes before it locks.
	latchMax = 8
	// latchWork makes one guess at a PIN cost some 20 ms.
	latchWork = 100_000
)

// refused is the content of a latch's file.
type refused struct {
	salt []byte   // 16 bytes
	pins [][]byte // PBKDF2-HMAC-SHA256, 32 bytes each
}

func (l Latch) path() string { return filepath.Join(l.Dir, l.Name) }

// Arm enters a PIN before it is sent. It fails with [ErrRefused] if the PIN was sent
// before, or too many were; after any error the PIN must not be sent.
func (l Latch) Arm(pin *secret.Bytes) error {
	r, hash, err := l.check(pin)
	if err != nil {
		return err
	}
	r.pins = append(r.pins, hash)
	if err := disk.WriteFile(l.path(), r.encode()); err != nil {
		return fmt.Errorf("PIN latch: %w: the PIN was not sent", err)
	}
	return nil
}

// Check fails as Arm would and enters nothing: for a device whose own count of failed
// tries is looked at before each, and is not used up by crashes. A PIN that is then
// refused is entered by Arm.
func (l Latch) Check(pin *secret.Bytes) error {
	_, _, err := l.check(pin)
	return err
}

func (l Latch) check(pin *secret.Bytes) (r refused, hash []byte, err error) {
	if r, err = l.load(); err != nil {
		return r, nil, fmt.Errorf("PIN latch: %w", err)
	}
	if len(r.pins) >= latchMax {
		return r, nil, fmt.Errorf("%w: %d PINs were refused: set the right one, then delete %s", ErrRefused, len(r.pins), l.path())
	}
	if hash, err = r.hash(pin); err != nil {
		return r, nil, fmt.Errorf("PIN latch: %w", err)
	}
	for _, old := range r.pins {
		if subtle.ConstantTimeCompare(old, hash) == 1 {
			return r, nil, fmt.Errorf("%w: this PIN was sent before and was refused, or cut off by a crash, and is not sent again: put the right one into the PIN source; if this is the right one, delete %s", ErrRefused, l.path())
		}
	}
	return r, hash, nil
}

// Accepted forgets all refusals: the device took the PIN, and counts anew.
func (l Latch) Accepted() error { return l.Clear() }

// Disarm takes back the last Arm: the device never judged the PIN.
func (l Latch) Disarm() error {
	r, err := l.load()
	if err != nil {
		return fmt.Errorf("PIN latch: %w", err)
	}
	if len(r.pins) <= 1 {
		return l.Clear()
	}
	r.pins = r.pins[:len(r.pins)-1]
	return disk.WriteFile(l.path(), r.encode())
}

// Clear forgets which PINs the device refused. An operator calls for it when the PIN
// is right and the device, not the PIN, was at fault.
func (l Latch) Clear() error {
	err := os.Remove(l.path())
	if err == nil || errors.Is(err, fs.ErrNotExist) {
		err = disk.Sync(l.Dir)
	}
	if err != nil {
		return fmt.Errorf("clearing the PIN latch: %w", err)
	}
	return nil
}

func (l Latch) load() (refused, error) {
	b, err := disk.ReadSmall(l.path(), 4096)
	if errors.Is(err, fs.ErrNotExist) {
		r := refused{salt: make([]byte, 16)}
		rand.Read(r.salt)
		return r, nil
	}
	if err != nil {
		return refused{}, err
	}
	r, err := decodeRefused(string(b))
	if err != nil {
		return refused{}, fmt.Errorf("%w: check the PIN, then delete %s", err, l.path())
	}
	return r, nil
}

func (r refused) hash(pin *secret.Bytes) (hash []byte, err error) {
	err = pin.Use(func(b []byte) error {
		// The string is a copy that cannot be wiped: the price of pbkdf2's signature.
		hash, err = pbkdf2.Key(sha256.New, string(b), r.salt, latchWork, sha256.Size)
		return err
	})
	return hash, err
}

func (r refused) encode() []byte {
	var b strings.Builder
	fmt.Fprintf(&b, "%s\nsalt %x\n", latchTitle, r.salt)
	for _, p := range r.pins {
		fmt.Fprintf(&b, "pin %x\n", p)
	}
	return []byte(b.String())
}

// decodeRefused is strict: a latch that cannot be read must not let a PIN through.
func decodeRefused(s string) (refused, error) {
	bad := errors.New("its file is damaged")
	lines := strings.Split(s, "\n")
	if len(lines) < 4 || lines[0] != latchTitle || lines[len(lines)-1] != "" {
		return refused{}, bad
	}
	var r refused
	for i, line := range lines[1 : len(lines)-1] {
		prefix, size := "pin ", sha256.Size
		if i == 0 {
			prefix, size = "salt ", 16
		}
		text, ok := strings.CutPrefix(line, prefix)
		b, err := hex.DecodeString(text)
		if !ok || err != nil || len(b) != size {
			return refused{}, bad
		}
		if i == 0 {
			r.salt = b
		} else {
			r.pins = append(r.pins, b)
		}
	}
	return r, nil
}
