//go:build failpoints

package peer

import (
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"

	"conseal/agent/peer/peerpb"
	"conseal/protocol"
)

// liar has an agent lie to its peers while LIES, a seed, is in its environment. The
// agent behind it is honest: only its words are not. Phases in which it says the truth
// come between those in which it lies; in the latter it draws for each kind of frame,
// and for each peer or for all alike, what becomes of it for a while. What it lied is
// in the log, at level debug.
type liar struct {
	log *slog.Logger

	mu     sync.Mutex // guards what follows
	rand   *rand.Rand
	lying  bool             // in the present phase
	ends   time.Time        // of the present phase
	spans  map[string]*span // of the present phase, by kind and peer
	alike  map[string]bool  // kinds of which all peers are told the same, in this phase
	said   map[string][]*peerpb.Frame
	steps  map[string]map[protocol.HostID][]byte // bodies by session and round
	staged map[string][]*peerpb.Staged           // what others say they have staged, by key
}

// span is a time for which one lie is told.
type span struct {
	ends time.Time
	lie  *lie   // nil: the truth
	at   uint64 // where to change what, for all that time
}

// lie changes a frame, which is the liar's own copy, and says how many times it is sent.
type lie struct {
	name string
	tell func(l *liar, at uint64, to protocol.HostID, f *peerpb.Frame) int
}

// Means of exponential distributions.
const (
	truthful = 500 * time.Millisecond
	lyingFor = 2 * time.Second
	spanFor  = time.Second
)

const remembered = 16 // statuses and certificates of a key that it said before

// newLiar returns nil if the agent is to be honest, and who is to handle frames.
func newLiar(log *slog.Logger, h Handler) (*liar, Handler) {
	seed, err := strconv.ParseUint(os.Getenv("LIES"), 10, 64)
	if err != nil {
		return nil, h
	}
	log.Warn("this agent lies to its peers", "seed", seed)
	l := &liar{
		log: log, rand: rand.New(rand.NewPCG(seed, 0)), said: map[string][]*peerpb.Frame{},
		steps: map[string]map[protocol.HostID][]byte{}, staged: map[string][]*peerpb.Staged{},
	}
	return l, listener{h, l}
}

// listener notes what peers say that they have staged.
type listener struct {
	Handler
	*liar
}

func (l listener) Frame(from protocol.HostID, f *peerpb.Frame) {
	if s := f.GetKey(); s != nil && len(s.Staged) > 0 {
		l.mu.Lock()
		l.staged[s.Key] = s.Staged
		l.mu.Unlock()
	}
	l.Handler.Frame(from, f)
}

// tell returns what is sent instead of a frame, and how many times.
func (l *liar) tell(to protocol.HostID, f *peerpb.Frame) (*peerpb.Frame, int) {
	if l == nil {
		return f, 1
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.turn(time.Now())
	kind, about := kindOf(f)
	defer l.remember(kind, about, to, f)
	if !l.lying {
		return f, 1
	}
	kinds := []string{"anything", kind}
	if kind == "hello" { // a stream begins with it
		kinds = kinds[1:]
	}
	for _, kind := range kinds {
		s := l.span(kind, to)
		if s.lie == nil {
			continue
		}
		told := proto.Clone(f).(*peerpb.Frame)
		times := s.lie.tell(l, s.at, to, told)
		if times != 1 || !proto.Equal(told, f) {
			l.log.Debug("lie", "to", to, "kind", kind, "is", s.lie.name, "about", about)
		}
		return told, times
	}
	return f, 1
}

// turn begins the next phase if the present one is over.
func (l *liar) turn(now time.Time) {
	if now.Before(l.ends) {
		return
	}
	mean := lyingFor
	if l.lying = !l.lying; !l.lying {
		mean = truthful
	}
	l.ends = now.Add(l.exponential(mean))
	l.spans, l.alike = map[string]*span{}, map[string]bool{}
	for kind := range lies {
		l.alike[kind] = l.rand.IntN(4) == 0
	}
	l.log.Debug("lie", "phase", l.lying)
}

func (l *liar) exponential(mean time.Duration) time.Duration {
	return time.Duration(l.rand.ExpFloat64() * float64(mean))
}

func (l *liar) span(kind string, to protocol.HostID) *span {
	name := kind
	if !l.alike[kind] {
		name = fmt.Sprintf("%s to %s", kind, to)
	}
	s := l.spans[name]
	if now := time.Now(); s == nil || now.After(s.ends) {
		s = &span{ends: now.Add(l.exponential(spanFor)), at: l.rand.Uint64()}
		chance := 0.6
		if kind == "anything" {
			chance = 0.1
		}
		if l.rand.Float64() < chance {
			s.lie = &lies[kind][l.rand.IntN(len(lies[kind]))]
		}
		l.spans[name] = s
	}
	return s
}

// kindOf is the kind of a frame and what it is about.
func kindOf(f *peerpb.Frame) (kind, about string) {
	switch b := f.Body.(type) {
	case *peerpb.Frame_Hello:
		return "hello", ""
	case *peerpb.Frame_Open:
		return "open", fmt.Sprintf("%s of %s", b.Open.GetBinding().GetOperation(), b.Open.GetBinding().GetKey())
	case *peerpb.Frame_Step:
		return "step", fmt.Sprintf("%x round %d", b.Step.Session[:8], b.Step.Round)
	case *peerpb.Frame_End:
		return "end", fmt.Sprintf("%x", b.End.Session[:8])
	case *peerpb.Frame_Key:
		return "status", b.Key.Key
	case *peerpb.Frame_Certificate:
		return "certificate", ""
	}
	return "other", ""
}

// remember keeps what was true, to be said at another time or to another host.
func (l *liar) remember(kind, about string, to protocol.HostID, f *peerpb.Frame) {
	switch kind {
	case "step":
		if l.steps[about] == nil {
			l.steps[about] = map[protocol.HostID][]byte{}
		}
		l.steps[about][to] = slices.Clone(f.GetStep().Body)
	case "status", "certificate":
		name := kind + about
		l.said[name] = append(l.said[name], proto.Clone(f).(*peerpb.Frame))
		if n := len(l.said[name]) - remembered; n > 0 {
			l.said[name] = l.said[name][n:]
		}
	}
}

var (
	drop  = lie{"dropped", func(*liar, uint64, protocol.HostID, *peerpb.Frame) int { return 0 }}
	again = lie{"sent again", func(*liar, uint64, protocol.HostID, *peerpb.Frame) int { return 2 }}
	stale = lie{"what was true before", func(l *liar, at uint64, _ protocol.HostID, f *peerpb.Frame) int {
		kind, about := kindOf(f)
		if before := l.said[kind+about]; len(before) > 0 {
			f.Body = proto.Clone(before[at%uint64(len(before))]).(*peerpb.Frame).Body
		}
		return 1
	}}
)

// lies are what may become of a frame, by its kind; "anything" is all that is said to a
// peer.
var lies = map[string][]lie{
	"anything":    {drop},
	"other":       {drop, again},
	"certificate": {drop, stale, {"a changed byte", lieCertificate}},
	"hello": {
		{"a later roster", lieHello(func(h *peerpb.Hello) { h.RosterVersion++ })},
		{"an earlier roster", lieHello(func(h *peerpb.Hello) { h.RosterVersion-- })},
		{"another roster", lieHello(func(h *peerpb.Hello) { flip(h.RosterDigest, 0) })},
	},
	"step": {
		drop, again,
		{"a changed byte", func(_ *liar, at uint64, _ protocol.HostID, f *peerpb.Frame) int { flip(f.GetStep().Body, at); return 1 }},
		{"the next round", func(_ *liar, _ uint64, _ protocol.HostID, f *peerpb.Frame) int { f.GetStep().Round++; return 1 }},
		{"the round before", func(_ *liar, _ uint64, _ protocol.HostID, f *peerpb.Frame) int { f.GetStep().Round--; return 1 }},
		{"what another got", lieAnothers},
		{"it leaves", lieLeaves},
	},
	"end": {drop, {"another reason", lieEnd}},
	"open": {
		drop, again,
		lieOpen("a changed entry", func(_ uint64, o *peerpb.Open) { flip(o.Binding.Entry, 0) }),
		lieOpen("a changed certificate", func(at uint64, o *peerpb.Open) { flip(o.Certificate, at) }),
		lieOpen("no certificate", func(_ uint64, o *peerpb.Open) { o.Certificate = nil }),
		lieOpen("another base", func(_ uint64, o *peerpb.Open) { flip(o.Binding.Certificate, 0) }),
		lieOpen("a party less", func(_ uint64, o *peerpb.Open) {
			o.Binding.Parties = o.Binding.Parties[:max(0, len(o.Binding.Parties)-1)]
		}),
		lieOpen("a dealer less", func(_ uint64, o *peerpb.Open) { o.Dealers = o.Dealers[:max(0, len(o.Dealers)-1)] }),
		lieOpen("another quorum", func(at uint64, o *peerpb.Open) { o.Binding.Quorum += 1 - 2*(at&1) }),
		lieOpen("another epoch", func(at uint64, o *peerpb.Open) { o.Binding.Epoch.Attempt += jump(at) }),
		lieOpen("nothing staged", func(_ uint64, o *peerpb.Open) { o.Staged = nil }),
		lieOpen("another message", func(at uint64, o *peerpb.Open) { flip(o.Message, at) }),
		lieOpen("another request", func(_ uint64, o *peerpb.Open) { flip(o.Binding.Request, 0) }),
		lieOpen("another nonce", func(_ uint64, o *peerpb.Open) { flip(o.Binding.Nonce, 0) }),
	},
	"status": {
		drop, drop, stale, stale, again,
		lieStatus("nothing staged", func(_ *liar, _ uint64, s *peerpb.KeyStatus) { s.Staged = nil }),
		lieStatus("a staged share less", func(_ *liar, at uint64, s *peerpb.KeyStatus) {
			if n := uint64(len(s.Staged)); n > 0 {
				s.Staged = slices.Delete(s.Staged, int(at%n), int(at%n)+1)
			}
		}),
		lieStatus("another output", func(_ *liar, at uint64, s *peerpb.KeyStatus) {
			if n := uint64(len(s.Staged)); n > 0 {
				flip(s.Staged[at%n].Output, 0)
			}
		}),
		lieStatus("a share more", func(_ *liar, at uint64, s *peerpb.KeyStatus) {
			n := proto.Clone(highest(s)).(*peerpb.Number)
			n.Attempt += jump(at)
			s.Staged = append(s.Staged, &peerpb.Staged{Number: n, Output: make([]byte, 32)})
		}),
		lieStatus("what others have", func(l *liar, _ uint64, s *peerpb.KeyStatus) { s.Staged = l.staged[s.Key] }),
		lieStatus("no vote", func(_ *liar, _ uint64, s *peerpb.KeyStatus) { s.Voted, s.Statement = nil, nil }),
		lieStatus("another vote", func(_ *liar, at uint64, s *peerpb.KeyStatus) {
			if s.Voted != nil {
				s.Voted.Number.Attempt += jump(at)
			}
		}),
		lieStatus("a vote without a signature", func(l *liar, _ uint64, s *peerpb.KeyStatus) {
			if theirs := l.staged[s.Key]; len(theirs) > 0 {
				s.Voted = theirs[len(theirs)-1]
			}
		}),
		lieStatus("a broken statement", func(_ *liar, at uint64, s *peerpb.KeyStatus) { flip(s.Statement, at) }),
		lieStatus("a higher epoch", func(_ *liar, at uint64, s *peerpb.KeyStatus) {
			s.Active = proto.Clone(highest(s)).(*peerpb.Number)
			s.Active.Attempt += jump(at)
			s.Certificate = make([]byte, 32)
		}),
		lieStatus("a lower epoch", func(_ *liar, _ uint64, s *peerpb.KeyStatus) {
			if s.Active != nil {
				s.Active.Attempt--
			}
		}),
		lieStatus("no epoch", func(_ *liar, _ uint64, s *peerpb.KeyStatus) { s.Active, s.Certificate = nil, nil }),
		lieStatus("another certificate", func(_ *liar, _ uint64, s *peerpb.KeyStatus) { flip(s.Certificate, 0) }),
		lieStatus("unknown", func(_ *liar, _ uint64, s *peerpb.KeyStatus) { s.Unknown = true }),
		lieStatus("suspended", func(_ *liar, _ uint64, s *peerpb.KeyStatus) { s.Suspended = uint64(time.Now().Unix()) }),
		lieStatus("another entry", func(_ *liar, _ uint64, s *peerpb.KeyStatus) { flip(s.Entry, 0) }),
		lieStatus("another incarnation", func(_ *liar, _ uint64, s *peerpb.KeyStatus) { s.Incarnation++ }),
	},
}

// flip changes a bit.
func flip(b []byte, at uint64) {
	if n := uint64(len(b)); n > 0 {
		b[at%n] ^= 1 << (at >> 61)
	}
}

// jump is by how much a number is raised.
func jump(at uint64) uint64 { return []uint64{1, 1, 1, 2, 3, 500}[at%6] }

// highest is the highest number in a status.
func highest(s *peerpb.KeyStatus) *peerpb.Number {
	n := &peerpb.Number{Roster: 1, Attempt: 1}
	raise := func(o *peerpb.Number) {
		if o.GetRoster() > n.Roster || o.GetRoster() == n.Roster && o.GetAttempt() > n.Attempt {
			n = o
		}
	}
	raise(s.Active)
	for _, st := range s.Staged {
		raise(st.Number)
	}
	return n
}

func lieStatus(name string, change func(*liar, uint64, *peerpb.KeyStatus)) lie {
	return lie{name, func(l *liar, at uint64, _ protocol.HostID, f *peerpb.Frame) int { change(l, at, f.GetKey()); return 1 }}
}

func lieOpen(name string, change func(uint64, *peerpb.Open)) lie {
	return lie{name, func(_ *liar, at uint64, _ protocol.HostID, f *peerpb.Frame) int { change(at, f.GetOpen()); return 1 }}
}

func lieHello(change func(*peerpb.Hello)) func(*liar, uint64, protocol.HostID, *peerpb.Frame) int {
	return func(_ *liar, _ uint64, _ protocol.HostID, f *peerpb.Frame) int { change(f.GetHello()); return 1 }
}

func lieCertificate(_ *liar, at uint64, _ protocol.HostID, f *peerpb.Frame) int {
	flip(f.GetCertificate().Certificate, at)
	return 1
}

// lieAnothers sends a host what another got in the same round.
func lieAnothers(l *liar, _ uint64, to protocol.HostID, f *peerpb.Frame) int {
	_, about := kindOf(f)
	for other, body := range l.steps[about] {
		if other != to {
			f.GetStep().Body = body
		}
	}
	return 1
}

var reasons = []string{"DIFFERS", "NOT_READY", "REFUSED", "BUSY", "ABORTED", "NO_LEDGER", "SUSPENDED", "BEHIND", "SEALED", "NO_PRESIGNATURE", "?"}

// lieLeaves ends a session for a peer instead of going on.
func lieLeaves(_ *liar, at uint64, _ protocol.HostID, f *peerpb.Frame) int {
	f.Body = &peerpb.Frame_End{End: &peerpb.End{Session: f.GetStep().Session, Reason: reasons[at%uint64(len(reasons))], Text: "it lies"}}
	return 1
}

func lieEnd(_ *liar, at uint64, _ protocol.HostID, f *peerpb.Frame) int {
	end := f.GetEnd()
	end.Reason, end.Complaint = reasons[at%uint64(len(reasons))], make([]byte, at%100)
	return 1
}
