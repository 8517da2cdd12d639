package agent

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"conseal/internal/disk"
)

// marker is a file of fixed size in the state folder that says with which keys this host
// signs nothing. It is there before it is needed and written in place: it takes
// neither room on the disk nor the hardware. Of its two slots the one that is not the
// newest is written, so that a crash leaves the other.
type marker struct {
	f    *os.File
	path string
	now  marks // of the newest slot
}

// marks is what a marker says; JSON in its slots.
type marks struct {
	Sequence uint64          `json:"sequence"` // rises with each write; its lowest bit is the slot
	All      *mark           `json:"all,omitempty"`
	Keys     map[string]mark `json:"keys"` // by name
}

type mark struct {
	Since  int64  `json:"since"` // Unix seconds
	Reason string `json:"reason,omitempty"`
}

// A slot is magic, SHA-256 of the rest, its length, the rest.
const (
	markerMagic  = "conseal marker 1"
	markerHeader = len(markerMagic) + sha256.Size + 4
	markerSlot   = 512 << 10 // bytes
)

// errMarker is the error of a marker of which no slot is whole.
var errMarker = errors.New("damaged")

// openMarker opens the marker in dir, and makes it if there is none. With [errMarker] it
// returns it too: nobody knows what it said.
func openMarker(dir string) (*marker, error) {
	m := &marker{path: filepath.Join(dir, "suspended")}
	if _, err := os.Lstat(m.path); errors.Is(err, fs.ErrNotExist) {
		if err := makeMarker(m.path); err != nil {
			return nil, fmt.Errorf("making %s, which says which keys are suspended: %w", m.path, err)
		}
	}
	var err error
	if m.f, err = os.OpenFile(m.path, os.O_RDWR|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0); err != nil {
		return nil, fmt.Errorf("opening which keys are suspended: %w", err)
	}
	if info, err := m.f.Stat(); err != nil || !info.Mode().IsRegular() {
		m.f.Close()
		return nil, errors.Join(err, fmt.Errorf("%s is no regular file: move it away", m.path))
	}
	return m, m.read()
}

// makeMarker writes both slots, so that each is whole and has its room on the disk.
func makeMarker(path string) error {
	var out []byte
	for sequence := range uint64(2) {
		slot, err := (&marks{Sequence: sequence, Keys: map[string]mark{}}).encode()
		if err != nil {
			return err
		}
		out = append(append(out, slot...), make([]byte, markerSlot-len(slot))...)
	}
	return disk.WriteFile(path, out)
}

func (s *marks) encode() ([]byte, error) {
	body, err := json.Marshal(s)
	if err != nil {
		return nil, err
	}
	if len(body) > markerSlot-markerHeader {
		return nil, fmt.Errorf("%d keys with their reasons have no room in it: suspend all, by `conseal suspend --all`", len(s.Keys))
	}
	rest := append(binary.BigEndian.AppendUint32(nil, uint32(len(body))), body...)
	digest := sha256.Sum256(rest)
	return append(append([]byte(markerMagic), digest[:]...), rest...), nil
}

// decodeMarks reads a slot.
func decodeMarks(slot []byte) (*marks, error) {
	if len(slot) < markerHeader || string(slot[:len(markerMagic)]) != markerMagic {
		return nil, errMarker
	}
	size := int(binary.BigEndian.Uint32(slot[markerHeader-4:]))
	if size > len(slot)-markerHeader {
		return nil, errMarker
	}
	rest := slot[markerHeader-4 : markerHeader+size]
	if digest := sha256.Sum256(rest); !bytes.Equal(slot[len(markerMagic):markerHeader-4], digest[:]) {
		return nil, errMarker
	}
	s := &marks{}
	d := json.NewDecoder(bytes.NewReader(rest[4:]))
	d.DisallowUnknownFields()
	if err := d.Decode(s); err != nil {
		return nil, fmt.Errorf("%w: %w", errMarker, err)
	}
	return s, nil
}

// read takes the newest slot that is whole.
func (m *marker) read() error {
	m.now = marks{Keys: map[string]mark{}}
	found := false
	for i := range 2 {
		slot := make([]byte, markerSlot)
		n, err := m.f.ReadAt(slot, int64(i)*markerSlot)
		if n == 0 && err != nil {
			continue // cut off
		}
		s, err := decodeMarks(slot[:n])
		if err == nil && (!found || s.Sequence > m.now.Sequence) {
			m.now, found = *s, true
		}
	}
	if !found {
		return fmt.Errorf("%s: %w: no slot of it is whole", m.path, errMarker)
	}
	return nil
}

// write has the marker say that, on the disk.
func (m *marker) write(all *mark, keys map[string]mark) error {
	next := marks{Sequence: m.now.Sequence + 1, All: all, Keys: keys}
	slot, err := next.encode()
	if err == nil {
		_, err = m.f.WriteAt(slot, int64(next.Sequence&1)*markerSlot)
	}
	if err == nil {
		err = unix.Fdatasync(int(m.f.Fd()))
	}
	if err != nil {
		return fmt.Errorf("writing %s: %w", m.path, err)
	}
	m.now = next
	return nil
}

func (m *marker) close() { m.f.Close() }
