// Package protocol says what a session of a threshold protocol is.
//
// A session is a state machine with no clock, goroutine, disk, network or
// logger. Its driver calls [Session.Start] once, sends what is ready, and hands
// every message that an authenticated peer sent to [Session.Step] until
// [Ready.Done]. The typed result is then on the concrete session (see the
// subpackages). Deadlines are the driver's: it gives up by [Session.Close].
package protocol

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"slices"
	"strconv"
)

// HostID names a host, as the roster does.
type HostID string

// SessionID binds a session to everything its parties must agree on: see [Binding].
type SessionID [32]byte

func (id SessionID) String() string { return hex.EncodeToString(id[:8]) }

// Message is one message of a session. From is what the transport
// authenticated, never what the message claims. Every message goes to one host;
// what a protocol broadcasts is sent to each host, and echoed where agreement
// matters.
type Message struct {
	Session  SessionID
	From, To HostID
	Round    uint16
	Body     []byte
}

// Ready is what a step produced.
type Ready struct {
	Send []Message // the session keeps no reference to the bodies
	Done bool      // the result is there; the session takes no more messages
}

// Session is one run of one protocol at one host. It is not safe for
// concurrent use.
//
// An error of Start or Step ends the session: the driver closes it and never
// steps it again. A [*Fault] names a culprit whose fault the session can prove
// to itself; any other error blames nobody.
//
// A message that arrives a round early is kept; one that is repeated, replayed
// or of a round that is over is refused.
type Session interface {
	Start() (Ready, error)
	Step(Message) (Ready, error)
	Close() // wipes every secret of the session; may be called twice
}

// Worker is a session that can compute ahead while its messages travel. A driver
// that has sent what was ready may call Work; an error ends the session as one of
// Step does. The session works as well without.
type Worker interface {
	Work() error
}

// Fault is an error whose culprit is proven: the message that Host sent is
// wrong whatever any other host did.
type Fault struct {
	Host   HostID
	Reason string
}

func (f *Fault) Error() string { return fmt.Sprintf("host %q: %s", f.Host, f.Reason) }

// Faultf returns a [*Fault].
func Faultf(host HostID, format string, args ...any) error {
	return &Fault{Host: host, Reason: fmt.Sprintf(format, args...)}
}

// Version is the version of the protocols spoken here. It is part of every
// session's id.
const Version = 1

// Binding is everything that the parties of a session must agree on before the
// first protocol message. Hosts exchange it in the clear, compare it by
// [Binding.Differs], and run under [Binding.ID].
type Binding struct {
	Operation   string    // "keygen", "sign", ...
	Scheme      string    // "ed25519", ...
	Key         string    // name of the key
	Incarnation uint64    // of the key's name; 1 is the first
	Epoch       [2]uint64 // number of the epoch used or being made: roster version, attempt
	Entry       [32]byte  // digest of the key's entry and its hosts' entries
	Certificate [32]byte  // hash of the active certificate; zero at birth
	Quorum      uint64
	Parties     []HostID // sorted
	Request     [32]byte // SHA-256 of what is asked for: the message to sign
	Nonce       [32]byte // fresh, from the host that opened the session
}

// fields lists name, bytes and a readable form of every field, in hashing order.
func (b *Binding) fields() [][3]string {
	u := func(v uint64) string { return string(binary.BigEndian.AppendUint64(nil, v)) }
	var parties []byte
	for _, p := range b.Parties {
		parties = binary.BigEndian.AppendUint32(parties, uint32(len(p)))
		parties = append(parties, p...)
	}
	digest := func(d [32]byte) (string, string) { return string(d[:]), hex.EncodeToString(d[:6]) }
	entry, entryText := digest(b.Entry)
	cert, certText := digest(b.Certificate)
	request, requestText := digest(b.Request)
	nonce, nonceText := digest(b.Nonce)
	return [][3]string{
		{"operation", b.Operation, b.Operation},
		{"scheme", b.Scheme, b.Scheme},
		{"key", b.Key, b.Key},
		{"incarnation", u(b.Incarnation), strconv.FormatUint(b.Incarnation, 10)},
		{"epoch", u(b.Epoch[0]) + u(b.Epoch[1]), fmt.Sprintf("%d.%d", b.Epoch[0], b.Epoch[1])},
		{"roster entry", entry, entryText},
		{"certificate", cert, certText},
		{"quorum", u(b.Quorum), strconv.FormatUint(b.Quorum, 10)},
		{"parties", string(parties), fmt.Sprint(b.Parties)},
		{"request", request, requestText},
		{"nonce", nonce, nonceText},
	}
}

// ID is the hash of the version and every field, each with its length.
func (b *Binding) ID() SessionID {
	h := sha256.New()
	part := func(s string) {
		var n [4]byte
		binary.BigEndian.PutUint32(n[:], uint32(len(s)))
		h.Write(n[:])
		h.Write([]byte(s))
	}
	part("conseal session")
	part(strconv.Itoa(Version))
	for _, f := range b.fields() {
		part(f[1])
	}
	return SessionID(h.Sum(nil))
}

// Differs says in words on which fields two bindings disagree; "" if on none.
func (b *Binding) Differs(other *Binding) string {
	mine, theirs := b.fields(), other.fields()
	text := ""
	for i := range mine {
		if mine[i][1] == theirs[i][1] {
			continue
		}
		if text != "" {
			text += "; "
		}
		text += fmt.Sprintf("%s: here %s, there %s", mine[i][0], mine[i][2], theirs[i][2])
	}
	return text
}

// CheckParties refuses lists that are empty, unsorted, repeat a host or do not
// hold self.
func CheckParties(self HostID, parties []HostID) error {
	if len(parties) == 0 {
		return fmt.Errorf("no parties")
	}
	for i, p := range parties {
		if p == "" {
			return fmt.Errorf("party %d has no name", i+1)
		}
		if i > 0 && parties[i-1] >= p {
			return fmt.Errorf("parties are not sorted and distinct at %q", p)
		}
	}
	if !slices.Contains(parties, self) {
		return fmt.Errorf("this host, %q, is not among the parties", self)
	}
	return nil
}
