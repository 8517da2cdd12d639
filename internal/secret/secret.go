// Package secret holds bytes that must not leak.
//
// Make one with [Random], [Copy], [Take] or [Read], use it inside [Bytes.Use], and end
// it with [Bytes.Wipe]. The bytes live outside the Go heap, locked in memory
// where the kernel allows it and left out of core files; they never print,
// never marshal and are compared only by [Bytes.Equal].
package secret

import (
	"crypto/rand"
	"crypto/subtle"
	"errors"
	"fmt"
	"io"
	"sync"

	"golang.org/x/sys/unix"
)

// ErrWiped is returned when bytes are used after [Bytes.Wipe].
var ErrWiped = errors.New("secret: used after it was wiped")

var errMarshal = errors.New("secret: refuses to be marshalled")

// Bytes is a secret of fixed length. Its methods may be called by several
// goroutines; Wipe waits for uses under way. The zero value is a wiped secret.
type Bytes struct {
	mu  sync.RWMutex // held for reading while the bytes are lent
	mem []byte       // whole pages from mmap; nil once wiped
	n   int
}

// alloc maps whole pages, so that wiping and unmapping touches nobody else's data.
func alloc(n int) *Bytes {
	page := unix.Getpagesize()
	size := (n + page - 1) / page * page
	if size == 0 {
		size = page
	}
	mem, err := unix.Mmap(-1, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		mem = make([]byte, size) // no address space left: a heap secret is better than none
		return &Bytes{mem: mem, n: n}
	}
	_ = unix.Mlock(mem)                         // RLIMIT_MEMLOCK may forbid it; docs/threats.md says so
	_ = unix.Madvise(mem, unix.MADV_DONTDUMP)   // not in core files
	_ = unix.Madvise(mem, unix.MADV_WIPEONFORK) // a child starts with zeros
	return &Bytes{mem: mem, n: n}
}

// Random returns n fresh random bytes.
func Random(n int) *Bytes {
	s := alloc(n)
	rand.Read(s.mem[:n])
	return s
}

// Copy returns a secret with a copy of b; the caller still owns b.
func Copy(b []byte) *Bytes {
	s := alloc(len(b))
	copy(s.mem, b)
	return s
}

// Take returns a secret with the content of b and wipes b.
func Take(b []byte) *Bytes {
	s := Copy(b)
	clear(b)
	return s
}

// Read reads n bytes of r straight into a secret, and no copy stays behind.
func Read(r io.Reader, n int) (*Bytes, error) {
	s := alloc(n)
	if _, err := io.ReadFull(r, s.mem[:n]); err != nil {
		s.Wipe()
		return nil, err
	}
	return s, nil
}

// Use lends the bytes to fn. fn must not keep the slice, nor change it, nor
// call Wipe on the same secret. It returns [ErrWiped] or what fn returns.
func (s *Bytes) Use(fn func(b []byte) error) error {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if s.mem == nil {
		return ErrWiped
	}
	return fn(s.mem[:s.n:s.n])
}

// Clone copies the bytes into a Bytes of its own, or returns [ErrWiped].
func (s *Bytes) Clone() (out *Bytes, err error) {
	err = s.Use(func(b []byte) error {
		out = Copy(b)
		return nil
	})
	return out, err
}

// Len is the length in bytes; 0 once wiped.
func (s *Bytes) Len() int {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if s.mem == nil {
		return 0
	}
	return s.n
}

// Equal compares two different secrets in constant time. Wiped secrets equal nothing.
func (s *Bytes) Equal(o *Bytes) bool {
	equal := false
	_ = s.Use(func(a []byte) error {
		return o.Use(func(b []byte) error {
			equal = subtle.ConstantTimeCompare(a, b) == 1
			return nil
		})
	})
	return equal
}

// Wipe overwrites the bytes and gives the memory back. Wiping twice, or a nil
// secret, does nothing.
func (s *Bytes) Wipe() {
	if s == nil {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.mem == nil {
		return
	}
	clear(s.mem)
	_ = unix.Munmap(s.mem) // EINVAL for the heap fallback
	s.mem, s.n = nil, 0
}

// Format prints "[secret]" for every verb.
func (s *Bytes) Format(f fmt.State, _ rune) { _, _ = f.Write([]byte("[secret]")) }

// MarshalJSON refuses.
func (s *Bytes) MarshalJSON() ([]byte, error) { return nil, errMarshal }

// MarshalText refuses.
func (s *Bytes) MarshalText() ([]byte, error) { return nil, errMarshal }

// MarshalBinary refuses.
func (s *Bytes) MarshalBinary() ([]byte, error) { return nil, errMarshal }
