package vault

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"path/filepath"
	"slices"
	"time"

	"conseal/internal/secret"
)

// manifest is everything that the vault knows, but shares and certificates. A
// manifest that [Vault.now] points to never changes.
type manifest struct {
	sequence uint64 // rises with each write
	roots    uint64 // taken so far
	host     string
	// suspended is since when this host signs nothing with any key, also with those to
	// come, Unix seconds; 0: it does.
	suspended uint64
	keys      map[KeyID]*record
}

type record struct {
	entry       [32]byte
	voted       *Staged
	active      Number
	certificate [32]byte // SHA-256 of the active epoch's
	since       uint64   // when it became active, Unix seconds
	suspended   uint64   // since when this host signs nothing with the key, Unix seconds; 0: it does
	deleting    uint64   // since when its deletion waits, Unix seconds; 0: it does not
	tombstone   *tombstone
	receipts    [][32]byte // SHA-256 of the receipts of its deletion, sorted
	shares      []share
}

// tombstone is [Tombstone] in the manifest's form.
type tombstone struct {
	at     uint64 // Unix seconds
	public [32]byte
	shares uint64
	roots  uint64 // taken before it; the erasure took the next
}

type share struct {
	number  Number
	output  Output
	made    Origin
	file    fileName
	digest  [32]byte  // SHA-256 of the file
	erasure *[32]byte // without it, the file is noise; one copy, guarded by [Vault.erasing]
}

func (m *manifest) sorted() []KeyID {
	return slices.SortedFunc(maps.Keys(m.keys), func(a, b KeyID) int {
		return cmpKey(a, b)
	})
}

func cmpKey(a, b KeyID) int {
	if c := bytes.Compare([]byte(a.Name), []byte(b.Name)); c != 0 {
		return c
	}
	return Number{Roster: a.Incarnation}.Compare(Number{Roster: b.Incarnation})
}

// clone copies what edit may change: the map. Records are replaced whole.
func (m *manifest) clone() *manifest {
	c := *m
	c.keys = maps.Clone(m.keys)
	return &c
}

// edit returns a record of a cloned manifest that may be changed.
func (m *manifest) edit(id KeyID) *record {
	r := &record{}
	if old := m.keys[id]; old != nil {
		*r = *old
		r.shares, r.receipts = slices.Clone(old.shares), slices.Clone(old.receipts)
	}
	m.keys[id] = r
	return r
}

func (r *record) share(n Number) *share {
	for i := range r.shares {
		if r.shares[i].number == n {
			return &r.shares[i]
		}
	}
	return nil
}

func (r *record) export(id KeyID) Record {
	out := Record{Key: id, Entry: r.entry, Active: r.active, Since: moment(r.since), Deleting: moment(r.deleting)}
	if r.voted != nil {
		vote := *r.voted
		out.Voted = &vote
	}
	for _, s := range r.shares {
		out.Staged = append(out.Staged, Staged{s.number, s.output})
	}
	return out
}

// suspensions is by name, as [Suspensions] is, in the manifest's form.
func (m *manifest) suspensions() map[string]uint64 {
	names := map[string]uint64{}
	for id, r := range m.keys {
		if since := names[id.Name]; r.suspended != 0 && (since == 0 || r.suspended < since) {
			names[id.Name] = r.suspended
		}
	}
	return names
}

// suspend enters since when a name is suspended, 0 if it is not, in all that the
// manifest has of it.
func (m *manifest) suspend(name string, since uint64) {
	found := false
	for _, id := range m.sorted() {
		if id.Name == name {
			m.edit(id).suspended, found = since, true
		}
	}
	if !found && since != 0 {
		m.edit(KeyID{Name: name, Incarnation: 1}).suspended = since
	}
}

// seconds is a time as the manifest has it; 0 for the zero Time.
func seconds(t time.Time) uint64 {
	if t.IsZero() {
		return 0
	}
	return uint64(t.Unix())
}

// moment is a time as the manifest has it; the zero Time for 0.
func moment(seconds uint64) time.Time {
	if seconds == 0 {
		return time.Time{}
	}
	return time.Unix(int64(seconds), 0)
}

// A slot is magic, version, salt, then AES-256-GCM of the encoded manifest with
// all before it as associated data, then SHA-256 of all that. The key is
// HKDF(root, salt): fresh for each write, so the nonce is zero. The tag of the
// root lets a damaged slot be told from one of another root; the digest, which
// proves nothing against an attacker, damage from a torn or rotten disk.
const (
	slotMagic   = "conseal manifest"
	slotVersion = 2 // 1 is read too: it has no origins, times, suspensions and deletions
	saltSize    = 32
	tagSize     = 16
	slots       = 2
	maxManifest = 64 << 20
)

func (v *Vault) slotPath(slot int) string {
	return filepath.Join(v.dir, fmt.Sprintf("manifest.%d", slot))
}

// slotKeys derives a slot's key and the tag of its root.
func slotKeys(root *secret.Bytes, salt []byte) (aead cipher.AEAD, tag []byte, err error) {
	err = root.Use(func(root []byte) error {
		if tag, err = hkdf.Key(sha256.New, root, salt, "conseal manifest v1 root tag", tagSize); err != nil {
			return err
		}
		key, err := hkdf.Key(sha256.New, root, salt, "conseal manifest v1 key", 32)
		if err != nil {
			return err
		}
		defer clear(key)
		aead, err = newGCM(key)
		return err
	})
	return aead, tag, err
}

func newGCM(key []byte) (cipher.AEAD, error) {
	block, err := aes.NewCipher(key)
	if err != nil {
		return nil, err
	}
	return cipher.NewGCM(block)
}

func (v *Vault) writeSlot(slot int, m *manifest, root *secret.Bytes) error {
	salt := make([]byte, saltSize)
	rand.Read(salt)
	aead, tag, err := slotKeys(root, salt)
	if err != nil {
		return err
	}
	plain := m.encode(slotVersion)
	defer clear(plain)
	out := append([]byte(slotMagic), slotVersion)
	out = append(append(out, salt...), tag...)
	out = aead.Seal(out, make([]byte, aead.NonceSize()), plain, bytes.Clone(out))
	digest := sha256.Sum256(out)
	if out = append(out, digest[:]...); len(out) > maxManifest {
		return fmt.Errorf("it would have %d bytes, and %d are the limit: drop what is staged", len(out), maxManifest)
	}
	return writeFile(v.slotPath(slot), out, "vault/manifest")
}

// readSlots returns the newest manifest that root opens.
func (v *Vault) readSlots(root *secret.Bytes) (newest *manifest, slot int, err error) {
	for i := range slots {
		m, err := v.readSlot(i, root)
		if err != nil {
			return nil, 0, fmt.Errorf("manifest.%d: %w", i, err)
		}
		if m != nil && (newest == nil || m.sequence > newest.sequence) {
			newest, slot = m, i
		}
	}
	if newest == nil {
		return nil, 0, ErrStale
	}
	return newest, slot, nil
}

// readSlot returns nil if the slot is empty or another root's.
func (v *Vault) readSlot(slot int, root *secret.Bytes) (*manifest, error) {
	b, err := readFile(v.slotPath(slot), maxManifest)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	const header = len(slotMagic) + 1 + saltSize + tagSize
	if len(b) < header+sha256.Size || string(b[:len(slotMagic)]) != slotMagic {
		return nil, fmt.Errorf("%w: no manifest; move it away to go on with the other slot, if that is the newer", ErrDamaged)
	}
	version := b[len(slotMagic)]
	if version == 0 || version > slotVersion {
		return nil, fmt.Errorf("format version %d; this program knows %d and leaves it alone", version, slotVersion)
	}
	body, digest := b[:len(b)-sha256.Size], b[len(b)-sha256.Size:]
	if sha256.Sum256(body) != [32]byte(digest) {
		return nil, fmt.Errorf("%w: its content changed on the disk; move it away to go on with the other slot, if that is the newer", ErrDamaged)
	}
	salt := body[len(slotMagic)+1:][:saltSize]
	aead, tag, err := slotKeys(root, salt)
	if err != nil {
		return nil, err
	}
	if !bytes.Equal(body[header-tagSize:header], tag) {
		return nil, nil
	}
	plain, err := aead.Open(nil, make([]byte, aead.NonceSize()), body[header:], body[:header])
	if err != nil {
		return nil, fmt.Errorf("%w: not authentic", ErrDamaged)
	}
	defer clear(plain)
	return decodeManifest(plain, version)
}

// size bounds the encoding, in bytes.
func (m *manifest) size() int {
	n := 64 + len(m.host)
	for id, r := range m.keys {
		n += 512 + len(id.Name) + 256*len(r.shares) + 32*len(r.receipts)
	}
	return n
}

// encode is canonical: keys are sorted, numbers are big-endian.
func (m *manifest) encode(version byte) []byte {
	e := encoder{b: make([]byte, 0, m.size())} // never grown: it holds erasure keys
	e.u64(m.sequence)
	e.u64(m.roots)
	e.text(m.host)
	if version > 1 {
		e.u64(m.suspended)
	}
	e.u32(len(m.keys))
	for _, id := range m.sorted() {
		r := m.keys[id]
		e.text(id.Name)
		e.u64(id.Incarnation)
		e.raw(r.entry[:])
		e.flag(r.voted != nil)
		if r.voted != nil {
			e.number(r.voted.Number)
			e.raw(r.voted.Output[:])
		}
		e.number(r.active)
		e.raw(r.certificate[:])
		if version > 1 {
			e.u64(r.since)
			e.u64(r.suspended)
			e.deletion(r)
		}
		e.u32(len(r.shares))
		for _, s := range r.shares {
			e.number(s.number)
			e.raw(s.output[:])
			if version > 1 {
				e.raw(s.made.Parent[:])
				e.raw(s.made.Entry[:])
			}
			e.raw(s.file[:])
			e.raw(s.digest[:])
			e.raw(s.erasure[:])
		}
	}
	return e.b
}

func decodeManifest(b []byte, version byte) (*manifest, error) {
	d := decoder{b: b}
	m := &manifest{sequence: d.u64(), roots: d.u64(), host: d.text(), keys: map[KeyID]*record{}}
	if version > 1 {
		m.suspended = d.u64()
	}
	for range d.u32() {
		if d.failed {
			break
		}
		id := KeyID{Name: d.text(), Incarnation: d.u64()}
		r := &record{}
		d.raw(r.entry[:])
		if d.flag() {
			r.voted = &Staged{Number: d.number()}
			d.raw(r.voted.Output[:])
		}
		r.active = d.number()
		d.raw(r.certificate[:])
		if version > 1 {
			r.since, r.suspended = d.u64(), d.u64()
			d.deletion(r)
		}
		for range d.u32() {
			if d.failed {
				break
			}
			s := share{number: d.number(), erasure: new([32]byte)}
			d.raw(s.output[:])
			if version > 1 {
				d.raw(s.made.Parent[:])
				d.raw(s.made.Entry[:])
			} else {
				s.made.Entry = r.entry
			}
			d.raw(s.file[:])
			d.raw(s.digest[:])
			d.raw(s.erasure[:])
			r.shares = append(r.shares, s)
		}
		m.keys[id] = r
	}
	again := m.encode(version)
	defer clear(again)
	if d.failed || len(d.b) != 0 || !bytes.Equal(again, b) {
		return nil, fmt.Errorf("%w: not in canonical form", ErrDamaged)
	}
	return m, nil
}

func (e *encoder) deletion(r *record) {
	e.u64(r.deleting)
	e.flag(r.tombstone != nil)
	if t := r.tombstone; t != nil {
		e.u64(t.at)
		e.raw(t.public[:])
		e.u64(t.shares)
		e.u64(t.roots)
	}
	e.u32(len(r.receipts))
	for _, digest := range r.receipts {
		e.raw(digest[:])
	}
}

func (d *decoder) deletion(r *record) {
	r.deleting = d.u64()
	if d.flag() {
		t := &tombstone{at: d.u64()}
		d.raw(t.public[:])
		t.shares, t.roots = d.u64(), d.u64()
		r.tombstone = t
	}
	for range d.u32() {
		if d.failed {
			break
		}
		var digest [32]byte
		d.raw(digest[:])
		r.receipts = append(r.receipts, digest)
	}
}

// encoder appends length-prefixed fields.
type encoder struct{ b []byte }

func (e *encoder) u64(n uint64)    { e.b = binary.BigEndian.AppendUint64(e.b, n) }
func (e *encoder) u32(n int)       { e.b = binary.BigEndian.AppendUint32(e.b, uint32(n)) }
func (e *encoder) raw(b []byte)    { e.b = append(e.b, b...) }
func (e *encoder) bytes(b []byte)  { e.u32(len(b)); e.raw(b) }
func (e *encoder) text(s string)   { e.bytes([]byte(s)) }
func (e *encoder) number(n Number) { e.u64(n.Roster); e.u64(n.Attempt) }
func (e *encoder) flag(f bool) {
	if f {
		e.b = append(e.b, 1)
	} else {
		e.b = append(e.b, 0)
	}
}

// decoder is the reverse. After a failure it gives zeros.
type decoder struct {
	b      []byte
	failed bool
}

func (d *decoder) take(n int) []byte {
	if d.failed || n < 0 || n > len(d.b) {
		d.failed, d.b = true, nil
		return nil
	}
	out := d.b[:n]
	d.b = d.b[n:]
	return out
}

func (d *decoder) u64() uint64 {
	if b := d.take(8); b != nil {
		return binary.BigEndian.Uint64(b)
	}
	return 0
}

func (d *decoder) u32() int {
	if b := d.take(4); b != nil {
		return int(binary.BigEndian.Uint32(b))
	}
	return 0
}

func (d *decoder) raw(to []byte)  { copy(to, d.take(len(to))) }
func (d *decoder) bytes() []byte  { return d.take(d.u32()) }
func (d *decoder) text() string   { return string(d.bytes()) }
func (d *decoder) number() Number { return Number{d.u64(), d.u64()} }
func (d *decoder) flag() bool {
	b := d.take(1)
	if len(b) == 1 && b[0] > 1 {
		d.failed = true
	}
	return len(b) == 1 && b[0] == 1
}
