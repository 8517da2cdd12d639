package epoch_test

import (
	"crypto/sha256"
	"encoding/binary"
	"flag"
	"fmt"
	"hash/maphash"
	"math"
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"conseal/agent/epoch"
	"conseal/agent/vault"
	"conseal/protocol"
)

var soak = flag.Bool("soak", false, "explore the epochs of a key much further")

// most bounds the hosts of a model.
const most = 7

// entry is what one version of the roster says of the key.
type entry struct {
	version uint64
	digest  [32]byte
	quorum  int
	holders []protocol.HostID
}

// deal is one resharing session: what it is for and what comes out of it.
type deal struct {
	id      uint32
	number  vault.Number
	output  vault.Output
	parent  *certificate
	entry   *entry
	dealers []int
	right   bool // its dealers had shares of one epoch, so that the key stays the same
}

func (d *deal) staged() epoch.Staged { return epoch.Staged{Number: d.number, Output: d.output} }

// certificate is the statements of all holders of a deal, about an entry.
type certificate struct {
	id    uint32
	name  [32]byte // as [epoch.Subject.ID] makes it
	deal  *deal
	entry *entry
}

// member is one honest host. It is never changed once it is made, and there is one for
// each content: so what Renew decides is asked once.
type member struct {
	id uint32
	durable
	lost

	says   *view // made when it is first wanted, as the rest
	born   *epoch.Born
	action epoch.Action
}

// durable is what a crash leaves.
type durable struct {
	host   int
	roster int // index of the entry; -1 for the final one
	record vault.Record
	active *certificate // of record.Active
}

// lost is what a crash takes.
type lost struct {
	known   *certificate // the highest that it has
	asked   bool         // a person wants the next epoch
	joining *deal        // session under way
	views   [most]*view  // what others said; nil: nothing on the present connection
}

type view struct {
	id uint32
	epoch.View
}

// state is the whole fleet at one moment.
type state struct {
	members                           [most]*member // nil for the liar
	flight                            [most][most]*view
	signed                            []uint32 // statements that honest hosts ever signed, sorted
	certs                             []uint32 // certificates that anybody ever put together, sorted
	crashes, asks, leads, lies, lates int

	from *state // for the trace
	note note
}

type note struct {
	what   string
	i, j   int
	detail fmt.Stringer
}

func (n note) String() string {
	text := fmt.Sprintf("%s %c", n.what, 'a'+n.i)
	if n.j >= 0 {
		text += fmt.Sprintf(" %c", 'a'+n.j)
	}
	if n.detail != nil {
		text += " " + n.detail.String()
	}
	return text
}

// world is the rules of one exploration, and one copy of each thing in it.
type world struct {
	n                                 int
	liar                              int // -1 if nobody lies
	entries                           []*entry
	final                             *entry // for the calm: what the roster says when the liar is out
	crashes, asks, leads, lies, lates int
	flight                            bool // views may be under way

	seed    maphash.Seed
	members map[string]*member
	views   map[string]*view
	deals   map[string]*deal
	certs   map[string]*certificate
	byCert  []*certificate
	byDeal  []*deal
	byName  map[epoch.Staged]*deal
	bad     string // what broke, found while a step was made
}

func name(i int) protocol.HostID { return protocol.HostID(rune('a' + i)) }

func index(h protocol.HostID) int { return int(h[0] - 'a') }

// roster makes the entries: each is a quorum and the holders, as in "2abc".
func newWorld(liar int, texts ...string) *world {
	w := &world{liar: liar, seed: maphash.MakeSeed(), members: map[string]*member{}, views: map[string]*view{},
		deals: map[string]*deal{}, certs: map[string]*certificate{}, byName: map[epoch.Staged]*deal{}}
	for _, text := range texts {
		w.entries = append(w.entries, w.entry(uint64(len(w.entries)+1), text))
	}
	return w
}

func (w *world) entry(version uint64, text string) *entry {
	e := &entry{version: version, digest: sha256.Sum256([]byte(text)), quorum: int(text[0] - '0')}
	for _, h := range text[1:] {
		e.holders = append(e.holders, protocol.HostID(h))
		w.n = max(w.n, index(protocol.HostID(h))+1)
	}
	return e
}

// first is the fleet after the birth of the key, when all have heard of each other.
func (w *world) first() *state {
	s := &state{note: note{what: "birth", j: -1}}
	born := w.deal(vault.Number{Roster: 1, Attempt: 1}, nil, w.entries[0], nil, 0)
	born.right = true
	c := w.certificate(born, w.entries[0])
	s.certs = []uint32{c.id}
	for i := range w.n {
		if i == w.liar {
			continue
		}
		m := &member{durable: durable{host: i}}
		if slices.Contains(w.entries[0].holders, name(i)) {
			m.record = vault.Record{Active: born.number, Staged: []vault.Staged{vault.Staged(born.staged())}}
			m.record.Voted = &m.record.Staged[0]
			m.active, m.known = c, c
			s.signed = append(s.signed, w.statement(i, born, w.entries[0]))
		}
		s.members[i] = w.intern(m)
	}
	for i := range w.n {
		for j := range w.n {
			if i != j && s.members[i] != nil && s.members[j] != nil {
				s = w.tell(s, i, j)
			}
		}
	}
	s.from = nil
	return s
}

// deal makes the outcome of a session; same for the same content.
func (w *world) deal(n vault.Number, parent *certificate, e *entry, dealers []int, salt int) *deal {
	b := fmt.Appendf(nil, "%v %x %v %d", n, e.digest, dealers, salt)
	if parent != nil {
		b = append(b, parent.name[:]...)
	}
	if d := w.deals[string(b)]; d != nil {
		return d
	}
	d := &deal{id: uint32(len(w.byDeal)), number: n, output: sha256.Sum256(b), parent: parent, entry: e, dealers: dealers}
	w.deals[string(b)] = d
	w.byDeal = append(w.byDeal, d)
	w.byName[d.staged()] = d
	return d
}

func (w *world) certificate(d *deal, e *entry) *certificate {
	subject := epoch.Subject{Fleet: "lab", Key: vault.KeyID{Name: "k", Incarnation: 1}, Scheme: "x", Number: d.number, Entry: e.digest, Output: d.output}
	if d.parent != nil {
		subject.Parent = d.parent.name
	}
	key := fmt.Sprintf("%d %x", d.id, e.digest)
	if c := w.certs[key]; c != nil {
		return c
	}
	c := &certificate{id: uint32(len(w.byCert)), name: subject.ID(), deal: d, entry: e}
	w.certs[key] = c
	w.byCert = append(w.byCert, c)
	return c
}

// statement numbers the word of a host about a deal and an entry.
func (w *world) statement(host int, d *deal, e *entry) uint32 {
	return w.certificate(d, e).id<<4 | uint32(host)
}

// sign notes what an honest host has signed.
func (w *world) sign(s *state, host int, d *deal, e *entry) {
	s.signed = with(s.signed, w.statement(host, d, e))
}

// complete tells whether every holder has signed; the liar signs anything.
func (w *world) complete(s *state, d *deal, e *entry) bool {
	for _, h := range d.entry.holders {
		if index(h) != w.liar && !has(s.signed, w.statement(index(h), d, e)) {
			return false
		}
	}
	return true
}

func with(sorted []uint32, x uint32) []uint32 {
	at, found := slices.BinarySearch(sorted, x)
	if found {
		return sorted
	}
	return slices.Insert(slices.Clone(sorted), at, x)
}

func has(sorted []uint32, x uint32) bool {
	_, found := slices.BinarySearch(sorted, x)
	return found
}

func (w *world) internView(v epoch.View) *view {
	b := append([]byte(nil), v.Entry[:]...)
	for _, s := range v.Staged {
		b = appendStaged(b, s)
	}
	b = append(b, '|')
	if v.Voted != nil {
		b = appendStaged(b, *v.Voted)
	}
	if v.Active {
		b = append(append(b, 1), v.Certificate[:]...)
	}
	b = appendNumber(b, v.Number)
	if got := w.views[string(b)]; got != nil {
		return got
	}
	got := &view{uint32(len(w.views) + 1), v}
	w.views[string(b)] = got
	return got
}

func appendNumber(b []byte, n vault.Number) []byte {
	return binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint32(b, uint32(n.Roster)), uint32(n.Attempt))
}

func appendStaged(b []byte, s epoch.Staged) []byte {
	return append(appendNumber(b, s.Number), s.Output[:]...)
}

// intern returns the one member of this content.
func (w *world) intern(m *member) *member {
	var b [200]byte
	key := append(b[:0], byte(m.host), byte(m.roster), boolean(m.asked))
	number := func(id uint32) { key = binary.BigEndian.AppendUint16(key, uint16(id)) }
	for _, c := range []*certificate{m.active, m.known} {
		if c == nil {
			number(0)
		} else {
			number(c.id + 1)
		}
	}
	if m.joining != nil {
		number(m.joining.id + 1)
	} else {
		number(0)
	}
	for _, s := range m.record.Staged {
		number(w.byName[epoch.Staged(s)].id + 1)
	}
	number(0)
	if m.record.Voted != nil {
		number(w.byName[epoch.Staged(*m.record.Voted)].id + 1)
	}
	number(0)
	key = appendNumber(key, m.record.Active)
	for _, v := range m.views {
		id := uint32(0)
		if v != nil {
			id = v.id
		}
		key = binary.BigEndian.AppendUint32(key, id)
	}
	if got := w.members[string(key)]; got != nil {
		return got
	}
	m.id, m.born, m.says = uint32(len(w.members)+1), nil, nil
	w.members[string(key)] = m
	return m
}

func boolean(b bool) byte {
	if b {
		return 1
	}
	return 0
}

// key hashes all that the future depends on.
func (w *world) key(s *state) uint64 {
	var h maphash.Hash
	h.SetSeed(w.seed)
	var b [512]byte
	key := append(b[:0], byte(s.crashes), byte(s.asks), byte(s.leads), byte(s.lies), byte(s.lates))
	for i, m := range s.members[:w.n] {
		id := uint32(0)
		if m != nil {
			id = m.id
		}
		key = binary.BigEndian.AppendUint32(key, id)
		for _, v := range s.flight[i][:w.n] {
			if v != nil {
				key = binary.BigEndian.AppendUint32(append(key, byte(i)), v.id)
			}
		}
	}
	for _, x := range s.signed {
		key = binary.BigEndian.AppendUint32(key, x)
	}
	for _, x := range s.certs {
		key = binary.BigEndian.AppendUint32(key, x)
	}
	h.Write(key)
	return h.Sum64()
}

// change makes the state in which one member is another.
func (w *world) change(s *state, i int, n note, edit func(m *member)) *state {
	m := *s.members[i]
	edit(&m)
	next := *s
	next.from, next.note = s, n
	next.members[i] = w.intern(&m)
	return &next
}

func (w *world) entryOf(m *member) *entry {
	if m.roster < 0 {
		return w.final
	}
	return w.entries[m.roster]
}

// signs is the certificate of the epoch that a host signs with and can deal; nil if none.
func (m *member) signs() *certificate {
	if m.active != nil && m.known == m.active && m.record.Holds(m.record.Active) {
		return m.active
	}
	return nil
}

// own is the view that a host has of itself: the agent's ownView.
func (w *world) own(m *member) epoch.View {
	v := epoch.View{Heard: true, Entry: w.entryOf(m).digest, Active: m.record.Holds(m.record.Active), Number: m.record.Active}
	if act := m.signs(); act != nil {
		v.Certificate = act.name
	}
	for _, s := range m.record.Staged {
		if s.Number.Compare(m.record.Active) > 0 {
			v.Staged = append(v.Staged, epoch.Staged(s))
		}
	}
	if m.record.Voted != nil && m.record.Voted.Number.Compare(m.record.Active) > 0 {
		voted := epoch.Staged(*m.record.Voted)
		v.Voted = &voted
	}
	return v
}

// said is what it tells others: the agent's keyStatus.
func (w *world) said(m *member) *view {
	if m.says != nil {
		return m.says
	}
	v := w.own(m)
	if m.signs() == nil {
		v.Active, v.Number = false, vault.Number{}
	}
	if v.Voted != nil && w.speaksFor(m, w.byName[*v.Voted]).digest != w.entryOf(m).digest {
		v.Voted = nil
	}
	m.says = w.internView(v)
	return m.says
}

// speaksFor is the entry for which a host signs its statement about a deal.
func (w *world) speaksFor(_ *member, d *deal) *entry { return d.entry }

// renew is what the agent's born makes, and what Renew says to it.
func (w *world) renew(i int, m *member) (*epoch.Born, epoch.Action) {
	if m.born != nil {
		return m.born, m.action
	}
	e := w.entryOf(m)
	b := &epoch.Born{Self: name(i), Holders: e.holders, Entry: e.digest, Roster: e.version, Reach: math.MaxUint64, Views: map[protocol.HostID]epoch.View{}}
	if c := m.known; c != nil {
		b.Base = epoch.Base{Number: c.deal.number, Certificate: c.name, Quorum: c.deal.entry.quorum, Holders: c.deal.entry.holders, Entry: c.entry.digest}
		b.Dealers = c.deal.entry.holders
	}
	for j, v := range m.views {
		if v != nil {
			b.Views[name(j)] = v.View
		}
	}
	own := w.own(m)
	own.Staged = slices.DeleteFunc(own.Staged, func(s epoch.Staged) bool { return !w.fits(w.byName[s], e) })
	b.Views[name(i)] = own
	b.Due = b.Base.Entry != b.Entry || m.asked
	m.born, m.action = b, epoch.Renew(b)
	return m.born, m.action
}

// fits tells whether a share was dealt for an entry: the agent's fitting.
func (w *world) fits(d *deal, e *entry) bool { return d.entry.digest == e.digest }

// tell has one host hear what another has now.
func (w *world) tell(s *state, from, to int) *state {
	v := w.said(s.members[from])
	return w.hear(s, from, to, v, note{what: "tell", i: from, j: to})
}

func (w *world) hear(s *state, from, to int, v *view, n note) *state {
	if s.members[to].views[from] == v {
		return nil
	}
	return w.change(s, to, n, func(m *member) { m.views[from] = v })
}

// takes tells whether a host takes up a certificate: the agent's checkCertificate.
func (w *world) takes(s *state, i int, m *member, c *certificate) bool {
	e := w.entryOf(m)
	if c.entry.digest == e.digest {
		return c.deal.entry.digest == e.digest
	}
	return m.record.Holds(c.deal.number) && has(s.signed, w.statement(i, c.deal, c.entry))
}

// adopt is the agent's adopt. It returns nil if nothing changes.
func (w *world) adopt(s *state, i int, c *certificate, n note) *state {
	m := s.members[i]
	number := c.deal.number
	higher := m.known == nil || m.known.deal.number.Compare(number) < 0
	if m.record.Active.Compare(number) >= 0 || !higher || !w.takes(s, i, m, c) {
		return nil
	}
	return w.change(s, i, n, func(m *member) {
		m.known, m.asked = c, false
		if m.record.Holds(number) {
			m.active, m.record.Active = c, number
		}
	})
}

// step does what Renew says; nil if it is nothing.
func (w *world) step(s *state, i int, emit func(*state)) {
	m := s.members[i]
	b, action := w.renew(i, m)
	switch action.Step {
	case epoch.Vote:
		d := w.byName[action.Choice]
		if !m.record.Holds(d.number) || m.record.Voted != nil && d.number.Compare(m.record.Voted.Number) <= 0 || d.number.Compare(m.record.Active) <= 0 {
			w.bad = fmt.Sprintf("host %s is to vote for %s, which its vault refuses", b.Self, d.number)
		}
		next := w.change(s, i, note{"vote", i, -1, d.number}, func(m *member) {
			voted := vault.Staged(action.Choice)
			m.record.Voted, m.joining = &voted, nil
		})
		w.sign(next, i, d, w.entryOf(m))
		emit(next)
	case epoch.Certify:
		d := w.byName[action.Choice]
		if !w.complete(s, d, w.entryOf(m)) {
			w.bad = fmt.Sprintf("host %s certifies %s without the statements of all holders", b.Self, d.number)
		}
		c := w.certificate(d, w.entryOf(m))
		if next := w.adopt(s, i, c, note{"certify", i, -1, d.number}); next != nil {
			next.certs = with(next.certs, c.id)
			emit(next)
		}
	case epoch.Lead:
		if s.leads >= w.leads {
			return
		}
		for _, dealers := range w.quorums(i, b.Able(), b.Base.Quorum) {
			if next := w.lead(s, i, m.known, w.entryOf(m), action.Number, dealers); next != nil {
				emit(next)
			}
		}
	}
}

// quorums lists the sets of dealers that a leader may choose.
func (w *world) quorums(leader int, able []protocol.HostID, quorum int) (all [][]int) {
	var hosts []int
	for _, h := range able {
		hosts = append(hosts, index(h))
	}
	for set := range 1 << len(hosts) {
		var chosen []int
		for bit, h := range hosts {
			if set>>bit&1 == 1 {
				chosen = append(chosen, h)
			}
		}
		if len(chosen) == quorum && slices.Contains(chosen, leader) {
			all = append(all, chosen)
		}
	}
	return all
}

// lead opens a resharing. It comes to something if all its hosts join.
func (w *world) lead(s *state, leader int, base *certificate, e *entry, n vault.Number, dealers []int) *state {
	d := w.deal(n, base, e, dealers, s.leads)
	d.right = base.deal.right
	parties := slices.Clone(dealers)
	for _, h := range e.holders {
		if !slices.Contains(parties, index(h)) {
			parties = append(parties, index(h))
		}
	}
	for _, p := range parties {
		if p != w.liar && !w.joins(s.members[p], d) {
			return nil
		}
	}
	next := *s
	next.from, next.note = s, note{"lead", leader, -1, n}
	next.leads++
	for _, p := range parties {
		if p != w.liar {
			m := *s.members[p]
			m.joining = d
			next.members[p] = w.intern(&m)
		}
	}
	return &next
}

// joins is the agent's checkBase and mayReshare.
func (w *world) joins(m *member, d *deal) bool {
	if w.entryOf(m).digest != d.entry.digest {
		return false
	}
	if own := m.known; own != nil {
		if c := own.deal.number.Compare(d.parent.deal.number); c > 0 || c == 0 && own.name != d.parent.name {
			return false
		}
	}
	for _, dealer := range d.dealers {
		if m.host == dealer {
			if act := m.signs(); act == nil || act.name != d.parent.name {
				return false
			}
		}
	}
	return d.number.Compare(m.record.Highest()) > 0 && d.number.Roster <= w.entryOf(m).version
}

// stage has one host get to the end of the session that it is in.
func (w *world) stage(s *state, i int, emit func(*state)) {
	m := s.members[i]
	d := m.joining
	if d == nil {
		return
	}
	holds := slices.Contains(d.entry.holders, name(i)) && !m.record.Holds(d.number) && d.number.Compare(m.record.Active) > 0
	emit(w.change(s, i, note{"stage", i, -1, d.number}, func(m *member) {
		m.joining = nil
		if holds {
			m.record.Staged = append(slices.Clone(m.record.Staged), vault.Staged(d.staged()))
		}
	}))
}

// crash takes what is not durable, and the connections.
func (w *world) crash(s *state, i int) *state {
	next := w.change(s, i, note{"crash", i, -1, nil}, func(m *member) {
		m.lost = lost{known: m.active}
	})
	next.crashes++
	for j, m := range s.members[:w.n] {
		next.flight[i][j], next.flight[j][i] = nil, nil
		if m != nil && j != i {
			other := *m
			other.views[i] = nil
			next.members[j] = w.intern(&other)
		}
	}
	return next
}

// follow has a host take up a version of the roster.
func (w *world) follow(s *state, i, roster int) *state {
	before := w.entryOf(s.members[i])
	next := w.change(s, i, note{"roster", i, -1, nil}, func(m *member) {
		m.roster = roster
		if w.entryOf(m).digest != before.digest {
			m.joining = nil
		}
	})
	m := next.members[i]
	if v := m.record.Voted; v != nil && v.Number.Compare(m.record.Active) > 0 {
		d := w.byName[epoch.Staged(*v)]
		w.sign(next, i, d, w.speaksFor(m, d))
	}
	return next
}

// erase is the agent's erase.
func (w *world) erase(s *state, i int) *state {
	m := s.members[i]
	b, _ := w.renew(i, m)
	numbers, leaves := b.Erasable(&m.record)
	if (leaves || len(numbers) > 0) && w.having(s, m.known) < b.Base.Quorum {
		w.bad = fmt.Sprintf("I1: host %s erases what is below %s before a quorum has that epoch", b.Self, b.Base.Number)
	}
	if leaves {
		return w.change(s, i, note{"retire", i, -1, b.Base.Number}, func(m *member) {
			m.record.Staged, m.record.Active, m.active = nil, b.Base.Number, m.known
		})
	}
	if len(numbers) == 0 {
		return nil
	}
	return w.change(s, i, note{"erase", i, -1, b.Base.Number}, func(m *member) {
		m.record.Staged = slices.DeleteFunc(slices.Clone(m.record.Staged), func(s vault.Staged) bool { return slices.Contains(numbers, s.Number) })
	})
}

// having counts the holders that have a certificate, or have gone beyond it to a higher
// one, where no crash takes it. The liar may have it.
func (w *world) having(s *state, c *certificate) (n int) {
	for _, h := range c.deal.entry.holders {
		if m := s.members[index(h)]; m == nil || m.active != nil && m.active.deal.number.Compare(c.deal.number) >= 0 {
			n++
		}
	}
	return n
}

// next emits every state that one step leads to. What a host hears counts when it acts:
// with hearing, it may hear from any others just before it does; a view that it has for
// longer, and that is old by then, is a step of its own, and there are w.lates of these.
func (w *world) next(s *state, hearing bool, emit func(*state)) {
	some := func(next *state) {
		if next != nil {
			emit(next)
		}
	}
	for i, m := range s.members[:w.n] {
		if m == nil {
			w.lie(s, hearing, some)
			continue
		}
		if hearing {
			w.hearAndAct(s, i, emit)
		} else {
			w.act(s, i, emit)
		}
		w.stage(s, i, emit)
		if s.crashes < w.crashes {
			emit(w.crash(s, i))
		}
		if m.roster+1 < len(w.entries) {
			emit(w.follow(s, i, m.roster+1))
		}
		if act := m.signs(); act != nil && !m.asked && s.asks < w.asks {
			next := w.change(s, i, note{"ask", i, -1, nil}, func(m *member) { m.asked = true })
			next.asks++
			emit(next)
		}
		for j, other := range s.members[:w.n] {
			if j == i || other == nil {
				continue
			}
			if !hearing {
				w.talk(s, i, j, some)
			} else if next := w.tell(s, i, j); s.lates < w.lates && next != nil {
				next.lates++
				emit(next)
			}
			if m.known != nil {
				some(w.adopt(s, j, m.known, note{"offer", i, j, m.known.deal.number}))
			}
		}
	}
}

// act has a host do what it wants to.
func (w *world) act(s *state, i int, emit func(*state)) {
	w.step(s, i, emit)
	if next := w.erase(s, i); next != nil {
		emit(next)
	}
}

// hearAndAct has a host hear from some others, and anything from the liar, and act on it.
func (w *world) hearAndAct(s *state, i int, emit func(*state)) {
	claims := []*view{nil}
	if w.liar >= 0 {
		claims = append(claims, w.claims(s.members[i], w.seen(s))...)
	}
	var tried []*member
	news := 0
	for j, m := range s.members[:w.n] {
		if m != nil && j != i && w.said(m) != s.members[i].views[j] {
			news |= 1 << j
		}
	}
	for set := range 1 << w.n {
		if set&^news != 0 {
			continue
		}
		for _, claim := range claims {
			heard := *s.members[i]
			for j := range w.n {
				if set>>j&1 == 1 {
					heard.views[j] = w.said(s.members[j])
				}
			}
			if w.liar >= 0 {
				heard.views[w.liar] = claim
			}
			m := w.intern(&heard)
			if slices.Contains(tried, m) {
				continue
			}
			tried = append(tried, m)
			before := *s
			before.from, before.members[i] = s, m
			before.note = note{"hear", i, -1, from{set, claim}}
			w.act(&before, i, func(next *state) { emit(w.forget(next, i, s.members[i])) })
		}
	}
}

// forget gives a host the views back that it had before it heard what it acted on: it
// may hear the same again, or later news.
func (w *world) forget(s *state, i int, before *member) *state {
	m := *s.members[i]
	m.views = before.views
	s.members[i] = w.intern(&m)
	return s
}

// from tells for the trace whom a host heard.
type from struct {
	set   int
	claim *view
}

func (h from) String() string {
	text := "from"
	for j := range most {
		if h.set>>j&1 == 1 {
			text += fmt.Sprintf(" %c", 'a'+j)
		}
	}
	if h.claim != nil {
		text += ", and from the liar:" + h.claim.String()
	}
	return text
}

// talk has one host say what it has to another: at once, or later.
func (w *world) talk(s *state, i, j int, some func(*state)) {
	if !w.flight {
		some(w.tell(s, i, j))
		return
	}
	if v := s.flight[i][j]; v != nil {
		next := w.hear(s, i, j, v, note{what: "deliver", i: i, j: j})
		if next == nil {
			copied := *s
			next = &copied
		}
		next.flight[i][j] = nil
		some(next)
		return
	}
	if v := w.said(s.members[i]); v != s.members[j].views[i] {
		next := *s
		next.from, next.note = s, note{what: "send", i: i, j: j}
		next.flight[i][j] = v
		some(&next)
	}
}

// lie emits what the liar may do: say anything to anybody, show what it can put together,
// and lead a session of its own.
func (w *world) lie(s *state, hearing bool, some func(*state)) {
	deals := w.seen(s)
	for i, m := range s.members[:w.n] {
		if m == nil {
			continue
		}
		for _, d := range deals {
			for _, e := range w.entries {
				if w.complete(s, d, e) && (d.entry == e || w.anySigned(s, d, e)) {
					c := w.certificate(d, e)
					if next := w.adopt(s, i, c, note{"show", w.liar, i, d.number}); next != nil {
						next.certs = with(next.certs, c.id)
						some(next)
					}
				}
			}
		}
		if s.lies < w.lies {
			for _, v := range w.claims(m, deals) {
				if hearing {
					break
				}
				if next := w.hear(s, w.liar, i, v, note{"claim", w.liar, i, v}); next != nil {
					next.lies++
					some(next)
				}
			}
			w.leadLies(s, i, m, some)
		}
	}
}

func (v *view) String() string {
	text := ""
	for _, s := range v.Staged {
		text += " staged " + s.Number.String()
	}
	if v.Voted != nil {
		text += " voted " + v.Voted.Number.String()
	}
	if v.Active {
		text += " active " + v.Number.String()
	}
	return text
}

// anySigned tells whether an honest host signed for a deal and an entry.
func (w *world) anySigned(s *state, d *deal, e *entry) bool {
	for _, h := range d.entry.holders {
		if index(h) != w.liar && has(s.signed, w.statement(index(h), d, e)) {
			return true
		}
	}
	return false
}

// seen lists the deals that honest hosts have to do with.
func (w *world) seen(s *state) (deals []*deal) {
	add := func(d *deal) {
		if d != nil && !slices.Contains(deals, d) {
			deals = append(deals, d)
		}
	}
	for _, m := range s.members[:w.n] {
		if m == nil {
			continue
		}
		add(m.joining)
		for _, st := range m.record.Staged {
			add(w.byName[epoch.Staged(st)])
		}
	}
	return deals
}

// claims lists what the liar may say to a host.
func (w *world) claims(m *member, deals []*deal) (views []*view) {
	e := w.entryOf(m)
	truth := epoch.View{Heard: true, Entry: e.digest}
	if c := m.known; c != nil {
		truth.Active, truth.Number, truth.Certificate = true, c.deal.number, c.name
	}
	add := func(edit func(v *epoch.View)) {
		v := truth
		edit(&v)
		views = append(views, w.internView(v))
	}
	add(func(*epoch.View) {})
	for _, d := range deals {
		if staged := d.staged(); m.record.Holds(d.number) && d.number.Compare(m.record.Active) > 0 && d.entry.digest == e.digest {
			add(func(v *epoch.View) { v.Staged = []epoch.Staged{staged} })
			add(func(v *epoch.View) { v.Staged, v.Voted = []epoch.Staged{staged}, &staged })
		}
	}
	return append(views, w.raise(truth, e))
}

// raise is a claim of a number of the roster after this one.
func (w *world) raise(v epoch.View, e *entry) *view {
	d := w.deal(vault.Number{Roster: e.version + 1, Attempt: 1}, nil, e, nil, -1)
	v.Staged = []epoch.Staged{d.staged()}
	return w.internView(v)
}

// leadLies has the liar lead a session with honest dealers and a number of its choice.
func (w *world) leadLies(s *state, i int, m *member, some func(*state)) {
	base := m.signs()
	if base == nil || s.leads >= w.leads || !slices.Contains(base.deal.entry.holders, name(w.liar)) {
		return
	}
	e := w.entryOf(m)
	highest := m.record.Highest()
	for _, n := range []vault.Number{{Roster: highest.Roster, Attempt: highest.Attempt + 1}, {Roster: e.version + 1, Attempt: 1}} {
		for _, dealers := range w.quorums(w.liar, base.deal.entry.holders, base.deal.entry.quorum) {
			if next := w.lead(s, w.liar, base, e, n, dealers); next != nil {
				next.lies++
				some(next)
			}
		}
	}
}

// check returns which invariant a state breaks; "" if none.
func (w *world) check(s *state) string {
	if w.bad != "" {
		return w.bad
	}
	var top *certificate
	for x, id := range s.certs {
		c := w.byCert[id]
		if !c.deal.right {
			return fmt.Sprintf("I3: epoch %s is of another key", c.deal.number)
		}
		for _, other := range s.certs[:x] {
			if o := w.byCert[other]; o.deal.number == c.deal.number && o.name != c.name {
				return fmt.Sprintf("I2: two certificates of epoch %s", c.deal.number)
			}
		}
	}
	for i, m := range s.members[:w.n] {
		if m == nil {
			continue
		}
		if c := m.known; c != nil && (top == nil || c.deal.number.Compare(top.deal.number) > 0) {
			top = c
		}
		if act := m.signs(); act != nil && act.deal.number.Compare(m.known.deal.number) < 0 {
			return fmt.Sprintf("I4: host %c signs below what it knows", 'a'+i)
		}
	}
	for _, h := range top.deal.entry.holders {
		m := s.members[index(h)]
		switch {
		case m == nil:
		case !m.record.Holds(top.deal.number):
			return fmt.Sprintf("I1: host %s has no share of epoch %s, which is certified", h, top.deal.number)
		case m.known != top && !w.takes(s, index(h), m, top):
			return fmt.Sprintf("I1: host %s does not take up epoch %s, of which it holds a share", h, top.deal.number)
		}
	}
	return ""
}

// calm lets all honest hosts talk under one roster until nothing happens, and returns
// what is not as it should be then.
func (w *world) calm(s *state) (*state, string) {
	do := func(next *state) {
		if next != nil {
			s = next
		}
	}
	last := len(w.entries) - 1
	if w.final != nil {
		last = -1
	}
	for i, m := range s.members[:w.n] {
		if m == nil {
			continue
		}
		do(w.follow(s, i, last))
		if w.liar >= 0 {
			do(w.change(s, i, note{"silence", i, -1, nil}, func(m *member) { m.views[w.liar] = nil }))
		}
	}
	for range 12 {
		before := s.members
		if w.calmRound(s, do, &s); s.members == before {
			break
		}
	}
	return s, w.calmed(s)
}

func (w *world) calmRound(s *state, do func(*state), now **state) {
	leads := w.leads
	defer func() { w.leads = leads }()
	w.leads = 1 << 20
	honest := func(f func(i int)) {
		for i, m := range s.members[:w.n] {
			if m != nil {
				f(i)
			}
		}
	}
	talk := func() {
		honest(func(i int) {
			honest(func(j int) {
				if i == j {
					return
				}
				(*now).flight[i][j] = nil
				do(w.tell(*now, i, j))
				if known := (*now).members[i].known; known != nil {
					do(w.adopt(*now, j, known, note{"offer", i, j, known.deal.number}))
				}
			})
		})
	}
	honest(func(i int) { w.stage(*now, i, do) })
	talk()
	led := false
	for _, lead := range []bool{false, true} {
		honest(func(i int) {
			_, action := w.renew(i, (*now).members[i])
			if (action.Step == epoch.Lead) != lead || led {
				return
			}
			w.step(*now, i, func(next *state) {
				if lead && (led || w.liar >= 0 && slices.Contains(next.members[i].joining.dealers, w.liar)) {
					return
				}
				led = led || lead
				do(next)
			})
		})
		talk()
	}
	honest(func(i int) { do(w.erase(*now, i)) })
}

func (w *world) calmed(s *state) string {
	if bad := w.check(s); bad != "" {
		return "in the calm: " + bad
	}
	var top *certificate
	for _, m := range s.members[:w.n] {
		if m != nil && m.known != nil && (top == nil || m.known.deal.number.Compare(top.deal.number) > 0) {
			top = m.known
		}
	}
	for i, m := range s.members[:w.n] {
		if m == nil {
			continue
		}
		holder := slices.Contains(w.entryOf(m).holders, name(i))
		switch act := m.signs(); {
		case holder && (act == nil || act.name != top.name || m.record.Staged[0].Number != top.deal.number):
			_, action := w.renew(i, m)
			return fmt.Sprintf("I5: after calm, host %c is not at epoch %s but at %s, with %d shares: %+v", 'a'+i, top.deal.number, m.record.Active, len(m.record.Staged), action)
		case !holder && len(m.record.Staged) > 0:
			return fmt.Sprintf("I5: after calm, host %c still holds %d shares", 'a'+i, len(m.record.Staged))
		case m.asked:
			return fmt.Sprintf("I5: after calm, host %c still waits for the next epoch that was asked for", 'a'+i)
		case holder && top.entry.digest != w.entryOf(m).digest:
			return fmt.Sprintf("I5: after calm, epoch %s is not for the roster", top.deal.number)
		}
	}
	return ""
}

// trace tells how a state came to be.
func trace(s *state) string {
	var lines []string
	for ; s != nil; s = s.from {
		lines = append(lines, s.note.String())
	}
	slices.Reverse(lines)
	return strings.Join(lines, "\n  ")
}

// explore visits every state, up to a limit, breadth first, so that what it finds
// is found on a shortest way. Calm is tried from one state in each.
func (w *world) explore(t *testing.T, limit int, each uint64) {
	t.Helper()
	first := w.first()
	visited := map[uint64]struct{}{w.key(first): {}}
	layer := []*state{first}
	calms, deep := 0, 0
	for deep = 0; len(layer) > 0 && len(visited) < limit; deep++ {
		var next []*state
		for _, s := range layer {
			if len(visited) > limit {
				break
			}
			w.next(s, true, func(to *state) {
				if bad := w.check(to); bad != "" {
					t.Fatalf("%s\n  %s", bad, trace(to))
				}
				key := w.key(to)
				if _, old := visited[key]; old {
					return
				}
				visited[key] = struct{}{}
				next = append(next, to)
				if key%each == 0 {
					calms++
					if end, bad := w.calm(to); bad != "" {
						t.Fatalf("%s\n  %s", bad, trace(end))
					}
				}
			})
		}
		layer = next
	}
	t.Logf("%d states, %d steps deep, %d left at the edge, %d calms, %d members, %d deals", len(visited), deep, len(layer), calms, len(w.members), len(w.byDeal))
}

func TestEpochs(t *testing.T) {
	for _, test := range []struct {
		name                              string
		liar                              int
		final                             string
		rosters                           []string
		crashes, asks, leads, lies, lates int
		states                            int // to visit; -soak visits a million
	}{
		{"refresh", -1, "", []string{"2abc"}, 1, 1, 2, 0, 1, 4_000},
		{"reshare", -1, "", []string{"2abc", "3bcd"}, 1, 0, 2, 0, 1, 4_000},
		{"grow", -1, "", []string{"2abc", "3abcd"}, 1, 0, 2, 0, 0, 6_000},
		{"reshare twice", -1, "", []string{"2abc", "2bcd", "2abd"}, 1, 0, 2, 0, 0, 4_000},
		{"refresh with a liar", 2, "2abd", []string{"2abc"}, 1, 1, 2, 1, 0, 3_000},
		{"reshare with a liar", 2, "2ab", []string{"2abc", "2bcd"}, 0, 0, 2, 1, 0, 20_000},
		{"reshare twice with a liar", 2, "2abd", []string{"2abc", "2acd", "2abd"}, 0, 0, 2, 1, 0, 3_000},
		{"an epoch and two rosters with a liar", 2, "2abd", []string{"2abc", "2acd", "2abd"}, 0, 0, 1, 1, 0, 8_000},
		{"four and a liar", 2, "2abde", []string{"2abcd", "3bcde"}, 0, 0, 1, 1, 0, 4_000},
	} {
		t.Run(test.name, func(t *testing.T) {
			w := newWorld(test.liar, test.rosters...)
			w.crashes, w.asks, w.leads, w.lies, w.lates = test.crashes, test.asks, test.leads, test.lies, test.lates
			if test.final != "" {
				w.final = w.entry(uint64(len(test.rosters)+1), test.final)
			}
			t.Parallel()
			limit := test.states
			if *soak {
				limit = 1_000_000
			}
			w.explore(t, limit, 100)
		})
	}
}

// TestEpochsLong takes fleets of up to six hosts through several rosters, with crashes,
// views that come late and a host that may lie, step by random step; then calm.
func TestEpochsLong(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		liar := rapid.IntRange(-1, 2).Draw(t, "liar")
		var rosters []string
		for range rapid.IntRange(1, 4).Draw(t, "rosters") {
			hosts := rapid.Permutation([]rune("abcdef")).Draw(t, "hosts")[:rapid.IntRange(3, 5).Draw(t, "size")]
			slices.Sort(hosts)
			rosters = append(rosters, fmt.Sprintf("%d%s", rapid.IntRange(2, len(hosts)-1).Draw(t, "quorum"), string(hosts)))
		}
		w := newWorld(liar, append(rosters, "2abcdef")...)
		w.entries, w.final = w.entries[:len(rosters)], w.entries[len(rosters)]
		if liar >= 0 {
			w.final = w.entry(w.final.version, "2"+strings.ReplaceAll("abcdef", string(name(liar)), ""))
		}
		w.flight, w.crashes, w.asks, w.leads, w.lies, w.lates = true, 4, 4, 10, 30, 10
		s := w.first()
		for range rapid.IntRange(1, 150).Draw(t, "steps") {
			hearing := rapid.Bool().Draw(t, "hearing")
			kinds, next := []string(nil), map[string][]*state{}
			w.next(s, hearing, func(to *state) {
				what := to.note.what
				if next[what] == nil {
					kinds = append(kinds, what)
				}
				next[what] = append(next[what], to)
			})
			if len(kinds) == 0 {
				break
			}
			s = rapid.SampledFrom(next[rapid.SampledFrom(kinds).Draw(t, "what")]).Draw(t, "which")
			if bad := w.check(s); bad != "" {
				t.Fatalf("%s\n  %s", bad, trace(s))
			}
		}
		if end, bad := w.calm(s); bad != "" {
			t.Fatalf("rosters %q: %s\n  %s", rosters, bad, trace(end))
		}
	})
}

// TestRenewLead has a host decide whether to lead, and with which number, where others
// claim what is not so or it lacks its own share.
func TestRenewLead(t *testing.T) {
	base := epoch.Base{Number: vault.Number{Roster: 1, Attempt: 3}, Certificate: [32]byte{1}, Quorum: 2, Holders: []protocol.HostID{"a", "b", "c"}}
	has := func(staged ...vault.Number) epoch.View {
		v := epoch.View{Heard: true, Active: true, Number: base.Number, Certificate: base.Certificate}
		for _, n := range staged {
			v.Staged = append(v.Staged, epoch.Staged{Number: n})
		}
		return v
	}
	for _, test := range []struct {
		name    string
		a, c    epoch.View
		version uint64
		want    epoch.Step
		number  vault.Number
	}{
		{"nothing is staged", has(), has(), 1, epoch.Lead, vault.Number{Roster: 1, Attempt: 4}},
		{"one has staged", has(), has(vault.Number{Roster: 1, Attempt: 8}), 1, epoch.Lead, vault.Number{Roster: 1, Attempt: 9}},
		{"as far as it reaches", has(), has(vault.Number{Roster: 1, Attempt: 1003}), 1, epoch.Lead, vault.Number{Roster: 1, Attempt: 1004}},
		{"too far, as one says", has(), has(vault.Number{Roster: 1, Attempt: 1004}), 1, epoch.Lead, vault.Number{Roster: 1, Attempt: 4}},
		{"by a later roster, as one says", has(), has(vault.Number{Roster: 2, Attempt: 8}), 1, epoch.Lead, vault.Number{Roster: 1, Attempt: 4}},
		{"by this roster", has(), has(vault.Number{Roster: 2, Attempt: 8}), 2, epoch.Lead, vault.Number{Roster: 2, Attempt: 9}},
		{"the base is of a later roster", has(), has(), 0, epoch.Wait, vault.Number{}},
		{"without a share", epoch.View{Heard: true}, has(), 1, epoch.Wait, vault.Number{}},
	} {
		got := epoch.Renew(&epoch.Born{Self: "a", Base: base, Holders: base.Holders, Dealers: base.Holders, Roster: test.version, Due: true, Reach: 1003,
			Views: map[protocol.HostID]epoch.View{"a": test.a, "b": has(), "c": test.c}})
		if got.Step != test.want || got.Number != test.number || got.Step == epoch.Wait && got.Why == "" {
			t.Errorf("%s: got %+v, want step %v, number %s", test.name, got, test.want, test.number)
		}
	}
}
