package config

import (
	"cmp"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"reflect"
	"slices"
	"time"
)

// Roster says what should be: which hosts and keys there are, who holds each
// key and who may use it. Every host of a fleet reads the same.
type Roster struct {
	// Fleet names all of this, so that a host cannot be given the roster of
	// another fleet. Example: "demo".
	Fleet string `toml:"fleet"`
	// Version is 1 or more and rises with every change.
	Version uint64 `toml:"version"`
	// Hosts, each a [[host]]; two at least.
	Hosts []Member `toml:"host"`
	// Keys, each a [[key]]. One that is left out is not erased: that takes
	// state "deleted".
	Keys []Key `toml:"key"`

	// Bytes are exactly those that were read. Signatures will be over them: what
	// the security team signs is a file, not our reading of it.
	Bytes []byte `toml:"-"`
}

// Member is a host of the fleet, a [[host]] of the roster.
type Member struct {
	// Name: letters a-z, digits and "-", at most 63.
	Name string `toml:"name"`
	// Address is host:port where the other hosts reach its agent.
	Address string `toml:"address"`
	// Identity pins the host's identity key, as "conseald init" prints it.
	Identity Pin `toml:"identity"`
	// Protector is what guards its shares: "tpm" or "hsm".
	Protector string `toml:"protector"`
	// Role is empty, or "recovery" for a host that holds shares and is
	// normally powered off: it does not count towards who can sign.
	Role string `toml:"role,omitempty"`
}

// Key is a signing key held in common, a [[key]] of the roster.
type Key struct {
	// Name: letters a-z, digits and "-", at most 63.
	Name string `toml:"name"`
	// Scheme is "ed25519", "ecdsa-p256", "ecdsa-secp256k1" or "bip340".
	Scheme string `toml:"scheme"`
	// Quorum is how many hosts it takes to sign: 2 or more.
	Quorum int `toml:"quorum"`
	// Hosts are the names of the hosts that hold a share.
	Hosts []string `toml:"hosts"`
	// State is "active", "suspended" (signs nothing) or "deleted" (is erased,
	// for ever; PublicKey repeats which key that is).
	State string `toml:"state"`
	// Purpose is for people: what it signs. At most 256 bytes, never empty.
	Purpose string `toml:"purpose"`
	// Incarnation tells keys of one name apart; a birth that is stuck is given
	// up by raising it. 1 to 1000. Default: 1.
	Incarnation uint64 `toml:"incarnation"`
	// Generate lets the hosts make the key, once. Without it they make none.
	Generate bool `toml:"generate,omitempty"`
	// PublicKey, once set, is the only one accepted, and is never generated. In
	// the scheme's own form, hexadecimal: Ed25519 32 bytes (RFC 8032), BIP-340
	// 32 bytes, ECDSA 33 bytes (SEC 1, compressed).
	PublicKey PublicKey `toml:"public_key,omitempty"`
	// Users are the local users who may ask for signatures, on any host:
	// "uid:1000" or a name, which each host looks up. Empty is nobody.
	Users []string `toml:"users,omitempty"`
	// Askers are the hosts that may ask the others for signatures. Empty is
	// Hosts.
	Askers []string `toml:"askers,omitempty"`
	// Prehashed lets callers bring a digest in place of the message; ECDSA only.
	// The hosts then cannot tell what they sign: see docs/threats.md.
	Prehashed bool `toml:"prehashed,omitempty"`
	// PrehashedPresignatures lets such digests be signed with presignatures too,
	// which is weaker against a caller who chooses digests: see docs/threats.md.
	PrehashedPresignatures bool `toml:"prehashed_presignatures,omitempty"`
	// Open says how long a host keeps its share opened in memory. "held": from the
	// start of the agent on. A duration such as "15m", 1s to 24h: that long after the
	// hardware opened it, used or not; the next use has the hardware open it again.
	// "each": for one use. Without "held" there are no presignatures. Default: "held".
	// docs/seal-policy.md says against whom each helps.
	Open Opening `toml:"open"`
	// Refresh is how old shares may get, such as "720h", 1m to 87600h: then the hosts
	// make new ones, under the same public key, and old ones are of no use. Empty: they
	// are replaced when hosts or quorum change, and by "conseal key refresh".
	Refresh Delay `toml:"refresh,omitempty"`
	// DeleteAfter is how long a deletion waits, such as "24h", 0s to 8760h: each host
	// counts from when it first took up a roster with state "deleted", and then erases
	// what it holds. Until then a newer roster with another state revokes it. A roster
	// that leaves the key out neither deletes nor revokes. Default: "168h".
	DeleteAfter Delay `toml:"delete_after"`
}

// DefaultDeleteAfter is [Key.DeleteAfter] where the roster does not say.
const DefaultDeleteAfter = Delay(7 * 24 * time.Hour)

// Delay is a duration; as text such as "168h".
type Delay time.Duration

func (d Delay) String() string { return time.Duration(d).String() }

// MarshalText is [Delay.String].
func (d Delay) MarshalText() ([]byte, error) { return []byte(d.String()), nil }

// UnmarshalText reads what [time.ParseDuration] does.
func (d *Delay) UnmarshalText(text []byte) error {
	n, err := time.ParseDuration(string(text))
	if err != nil {
		return errors.New(`a duration such as "168h"`)
	}
	*d = Delay(n)
	return nil
}

// PublicKey is a public key in the form of its scheme; hexadecimal as text.
type PublicKey []byte

func (k PublicKey) String() string { return hex.EncodeToString(k) }

// MarshalText is [PublicKey.String].
func (k PublicKey) MarshalText() ([]byte, error) { return []byte(k.String()), nil }

// UnmarshalText reads hexadecimal digits.
func (k *PublicKey) UnmarshalText(text []byte) error {
	b, err := hex.DecodeString(string(text))
	if err != nil {
		return fmt.Errorf("a public key in hexadecimal digits")
	}
	*k = b
	return nil
}

// LoadRoster reads the roster in the file at path. The error is [Problems].
func LoadRoster(path string) (*Roster, error) {
	r := newReport(path)
	return r.roster(r.read(path))
}

// ParseRoster reads a roster of at most 1 MiB. It keeps b. The error is [Problems].
func ParseRoster(b []byte) (*Roster, error) {
	if b == nil {
		b = []byte{}
	}
	return newReport("roster").roster(b)
}

func (r *report) roster(b []byte) (*Roster, error) {
	doc := r.parse(b, reflect.TypeFor[Roster]())
	if doc == nil {
		return nil, r.err()
	}
	roster := &Roster{Bytes: b}
	r.decodeTable(doc, reflect.ValueOf(roster).Elem(), "")
	for i := range roster.Keys {
		if path := fmt.Sprintf("key[%d].incarnation", i); r.lines[path] == 0 {
			roster.Keys[i].Incarnation = 1
		}
		if path := fmt.Sprintf("key[%d].delete_after", i); r.lines[path] == 0 {
			roster.Keys[i].DeleteAfter = DefaultDeleteAfter
		}
		if roster.Keys[i].Open == "" {
			roster.Keys[i].Open = OpenHeld
		}
	}
	roster.check(r)
	if err := r.err(); err != nil {
		return nil, err
	}
	return roster, nil
}

// Host returns the host of that name.
func (r *Roster) Host(name string) (*Member, bool) {
	return find(r.Hosts, func(m *Member) bool { return m.Name == name })
}

// HostByPin returns the host with that identity.
func (r *Roster) HostByPin(pin Pin) (*Member, bool) {
	return find(r.Hosts, func(m *Member) bool { return m.Identity == pin && pin != Pin{} })
}

// Key returns the key of that name.
func (r *Roster) Key(name string) (*Key, bool) {
	return find(r.Keys, func(k *Key) bool { return k.Name == name })
}

func find[T any](list []T, is func(*T) bool) (*T, bool) {
	for i := range list {
		if is(&list[i]) {
			return &list[i], true
		}
	}
	return nil, false
}

// Digest is the SHA-256 of what the roster says, whatever its spelling: two
// rosters that differ in order, white space or comments have the same.
//
// Every item is hashed as its length in 4 bytes and itself, numbers being 8
// bytes, all big-endian; a list is its length as a number and its items. In
// order:
//
//	"conseal roster v1", fleet, version,
//	hosts by name: name, address, identity pin, protector, role;
//	keys by name: name, incarnation, scheme, quorum, hosts*, state, purpose,
//	    generate (0 or 1), public key, users*, askers*,       (* sorted)
//	    prehashed, prehashed_presignatures (0 or 1), open, and, if it
//	    is set, "refresh =" and refresh in nanoseconds, and, if it is
//	    another than [DefaultDeleteAfter], "delete_after =" and that
func (r *Roster) Digest() [32]byte {
	h := digest{sha256.New()}
	h.text("conseal roster v1", r.Fleet)
	h.number(r.Version)
	h.number(uint64(len(r.Hosts)))
	for _, m := range slices.SortedFunc(slices.Values(r.Hosts), func(a, b Member) int { return cmp.Compare(a.Name, b.Name) }) {
		h.text(m.Name, m.Address, string(m.Identity[:]), m.Protector, m.Role)
	}
	h.number(uint64(len(r.Keys)))
	for _, k := range slices.SortedFunc(slices.Values(r.Keys), func(a, b Key) int { return cmp.Compare(a.Name, b.Name) }) {
		h.text(k.Name)
		h.number(k.Incarnation)
		h.text(k.Scheme)
		h.number(uint64(k.Quorum))
		h.set(k.Hosts)
		h.text(k.State, k.Purpose)
		h.flag(k.Generate)
		h.text(string(k.PublicKey))
		h.set(k.Users)
		h.set(k.Askers)
		h.flag(k.Prehashed)
		h.flag(k.PrehashedPresignatures)
		h.text(string(k.Open))
		if k.Refresh != 0 { // what was not known to an earlier version and is not used changes no digest
			h.text("refresh =")
			h.number(uint64(k.Refresh))
		}
		if k.DeleteAfter != DefaultDeleteAfter {
			h.text("delete_after =")
			h.number(uint64(k.DeleteAfter))
		}
	}
	return h.sum()
}

// EntryDigest is the SHA-256 of what the holders of a key must agree on before
// they run a protocol with it, encoded as in [Roster.Digest]:
//
//	"conseal roster entry v1", name, incarnation, scheme, quorum,
//	the key's hosts by name: name, identity pin
//
// and nothing else: no address, version, state, purpose or user, so that a
// change of these, or of another key, stops no host from signing while the
// others catch up. Not open either: how a share rests and is opened is a matter
// between a host and its hardware, and no protocol depends on it.
func (r *Roster) EntryDigest(key string) ([32]byte, error) {
	k, found := r.Key(key)
	if !found {
		return [32]byte{}, fmt.Errorf("key %q is not in the roster", key)
	}
	h := digest{sha256.New()}
	h.text("conseal roster entry v1", k.Name)
	h.number(k.Incarnation)
	h.text(k.Scheme)
	h.number(uint64(k.Quorum))
	h.number(uint64(len(k.Hosts)))
	for _, name := range slices.Sorted(slices.Values(k.Hosts)) {
		m, found := r.Host(name)
		if !found {
			return [32]byte{}, fmt.Errorf("key %q: host %q is not in the roster", key, name)
		}
		h.text(m.Name, string(m.Identity[:]))
	}
	return h.sum(), nil
}

// digest hashes items so that no two lists of items hash the same bytes.
type digest struct{ h hash.Hash }

func (d digest) text(items ...string) {
	for _, s := range items {
		var n [4]byte
		binary.BigEndian.PutUint32(n[:], uint32(len(s)))
		d.h.Write(n[:])
		d.h.Write([]byte(s))
	}
}

func (d digest) number(n uint64) {
	d.text(string(binary.BigEndian.AppendUint64(nil, n)))
}

func (d digest) flag(b bool) {
	if b {
		d.number(1)
	} else {
		d.number(0)
	}
}

func (d digest) set(items []string) {
	d.number(uint64(len(items)))
	d.text(slices.Sorted(slices.Values(items))...)
}

func (d digest) sum() [32]byte { return [32]byte(d.h.Sum(nil)) }
