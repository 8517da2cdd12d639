package epoch_test

import (
	"fmt"
	"slices"
	"testing"

	"pgregory.net/rapid"

	"conseal/agent/epoch"
	"conseal/agent/vault"
	"conseal/protocol"
)

// host is a holder in the model: what is durable survives a crash, the rest not.
type host struct {
	name protocol.HostID
	// durable
	staged []epoch.Staged
	voted  *epoch.Staged
	active *epoch.Staged
	// lost in a crash
	views   map[protocol.HostID]epoch.View
	joining *vault.Number // generation that this host takes part in
}

// fleet is a model of the holders of one key. Messages are the views that hosts
// tell each other; a view on its way may be old when it comes.
type fleet struct {
	t       *rapid.T
	names   []protocol.HostID
	hosts   map[protocol.HostID]*host
	mail    []mail
	runs    map[vault.Number]*run
	outputs byte
	births  map[epoch.Staged]bool // certificates that anybody put together
}

type mail struct {
	from, to protocol.HostID
	view     epoch.View
}

// run is a key generation: who agreed to take part on a count that fits.
type run struct {
	output vault.Output
	joined map[protocol.HostID]bool
}

func newFleet(t *rapid.T, n int) *fleet {
	f := &fleet{t: t, hosts: map[protocol.HostID]*host{}, runs: map[vault.Number]*run{}, births: map[epoch.Staged]bool{}}
	for i := range n {
		name := protocol.HostID(fmt.Sprintf("h%d", i))
		f.names = append(f.names, name)
		f.hosts[name] = &host{name: name, views: map[protocol.HostID]epoch.View{}}
	}
	return f
}

func (h *host) view() epoch.View {
	return epoch.View{Heard: true, Staged: slices.Clone(h.staged), Voted: h.voted, Active: h.active != nil}
}

func (f *fleet) announce(h *host) {
	for _, to := range f.names {
		if to != h.name {
			f.mail = append(f.mail, mail{h.name, to, h.view()})
		}
	}
}

func (f *fleet) unborn(h *host) *epoch.Unborn {
	h.views[h.name] = h.view()
	return &epoch.Unborn{Self: h.name, Holders: f.names, Generate: true, Roster: 1, Views: h.views}
}

// step lets one host do what comes next.
func (f *fleet) step(h *host) {
	if h.active != nil {
		return
	}
	switch action := epoch.Next(f.unborn(h)); action.Step {
	case epoch.Stuck:
		f.t.Fatalf("host %s is stuck although nobody lies: %s", h.name, action.Why)
	case epoch.Generate:
		f.generate(h, action.Number)
	case epoch.Vote:
		if h.voted != nil && *h.voted != action.Choice {
			f.t.Fatalf("host %s votes twice", h.name)
		}
		if !slices.Contains(h.staged, action.Choice) {
			f.t.Fatalf("host %s votes for a share that it does not hold", h.name)
		}
		choice := action.Choice
		h.voted = &choice
		f.announce(h)
	case epoch.Certify:
		f.births[action.Choice] = true
		if len(f.births) > 1 {
			f.t.Fatalf("two births: %v", f.births)
		}
		choice := action.Choice
		h.active = &choice
		f.announce(h)
	case epoch.Fetch:
		if from := f.hosts[action.From]; from.active != nil && slices.Contains(h.staged, *from.active) {
			h.active = from.active
			f.announce(h)
		} else {
			f.t.Fatalf("host %s lost its share", h.name)
		}
	}
}

// generate opens a generation at every holder, which joins only if it was
// counted right; that is the agent's joinKeygen.
func (f *fleet) generate(leader *host, n vault.Number) {
	f.outputs++
	r := &run{output: vault.Output{f.outputs}, joined: map[protocol.HostID]bool{}}
	f.runs[n] = r
	for _, name := range f.names {
		h := f.hosts[name]
		counted := leader.views[name].Staged
		same := len(counted) == len(h.staged)
		for _, s := range counted {
			same = same && slices.Contains(h.staged, s)
		}
		if !same || h.voted != nil || h.active != nil {
			return // refused: nobody gets to the end
		}
	}
	for _, name := range f.names {
		r.joined[name] = true
		f.hosts[name].joining = &n
	}
}

// stage lets one host finish the generation that it takes part in.
func (f *fleet) stage(h *host) {
	if h.joining == nil || len(f.runs[*h.joining].joined) != len(f.names) {
		return
	}
	h.staged = append(h.staged, epoch.Staged{Number: *h.joining, Output: f.runs[*h.joining].output})
	h.joining = nil
	f.announce(h)
}

func (f *fleet) crash(h *host) {
	h.views, h.joining = map[protocol.HostID]epoch.View{}, nil
	f.mail = slices.DeleteFunc(f.mail, func(m mail) bool { return m.to == h.name || m.from == h.name })
	for _, other := range f.hosts {
		delete(other.views, h.name) // its connections broke
	}
}

// reconnect lets two hosts tell each other what they have.
func (f *fleet) reconnect() {
	for _, name := range f.names {
		f.announce(f.hosts[name])
	}
}

func (f *fleet) deliver(i int) {
	m := f.mail[i]
	f.mail = slices.Delete(f.mail, i, i+1)
	f.hosts[m.to].views[m.from] = m.view
}

// deliverable are the oldest letters of each pair: a stream keeps order.
func (f *fleet) deliverable() (first []int) {
	seen := map[[2]protocol.HostID]bool{}
	for i, m := range f.mail {
		if pair := [2]protocol.HostID{m.from, m.to}; !seen[pair] {
			seen[pair] = true
			first = append(first, i)
		}
	}
	return first
}

// TestBirth lets hosts act, crash and talk in any order. There is never a second
// certificate for a key, nobody ever gets stuck or loses a share that is
// certified, and once the crashes end every host gets to the same key.
func TestBirth(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		f := newFleet(t, rapid.IntRange(2, 4).Draw(t, "hosts"))
		f.reconnect()
		for range rapid.IntRange(1, 120).Draw(t, "steps") {
			h := f.hosts[f.names[rapid.IntRange(0, len(f.names)-1).Draw(t, "host")]]
			switch rapid.IntRange(0, 7).Draw(t, "what") {
			case 0, 1, 2:
				if first := f.deliverable(); len(first) > 0 {
					f.deliver(first[rapid.IntRange(0, len(first)-1).Draw(t, "letter")])
				}
			case 3, 4:
				f.step(h)
			case 5:
				f.stage(h)
			case 6:
				f.reconnect()
			case 7:
				f.crash(h)
			}
		}
		for range 20 { // calm
			f.reconnect()
			for len(f.mail) > 0 {
				f.deliver(0)
			}
			for _, name := range f.names {
				f.step(f.hosts[name])
			}
			for _, name := range f.names {
				f.stage(f.hosts[name])
			}
		}
		for _, name := range f.names {
			if h := f.hosts[name]; h.active == nil || !f.births[*h.active] {
				t.Fatalf("host %s did not get to the key: %+v, next %+v", name, h, epoch.Next(f.unborn(h)))
			}
		}
	})
}

// TestBirthOfLiars has one holder say what is not: that it staged a share, to
// some and not to others. There may be no birth, but never two.
func TestBirthOfLiars(t *testing.T) {
	first, second := epoch.Staged{Number: vault.Number{Roster: 1, Attempt: 1}, Output: vault.Output{1}}, epoch.Staged{Number: vault.Number{Roster: 1, Attempt: 2}, Output: vault.Output{2}}
	holders := []protocol.HostID{"a", "b", "liar"}
	view := func(voted *epoch.Staged, staged ...epoch.Staged) epoch.View {
		return epoch.View{Heard: true, Staged: staged, Voted: voted}
	}
	for _, test := range []struct {
		name  string
		views map[protocol.HostID]epoch.View
		want  epoch.Step
	}{
		{"votes for what it does not hold", map[protocol.HostID]epoch.View{"a": view(nil, first), "b": view(nil, first), "liar": view(&first)}, epoch.Stuck},
		{"votes for another than we did", map[protocol.HostID]epoch.View{"a": view(&first, first, second), "b": view(nil, first, second), "liar": view(&second, first, second)}, epoch.Stuck},
		{"takes its share back after we voted", map[protocol.HostID]epoch.View{"a": view(&first, first), "b": view(&first, first), "liar": view(nil)}, epoch.Stuck},
		{"stages another output", map[protocol.HostID]epoch.View{"a": view(nil, first), "b": view(nil, first), "liar": view(nil, epoch.Staged{Number: first.Number, Output: vault.Output{9}})}, epoch.Generate},
		{"says nothing", map[protocol.HostID]epoch.View{"a": view(&first, first), "b": view(&first, first)}, epoch.Wait},
		{"has another roster", map[protocol.HostID]epoch.View{"a": view(nil, first), "b": view(nil, first), "liar": {Heard: true, Entry: [32]byte{1}, Staged: []epoch.Staged{first}}}, epoch.Wait},
		{"cannot read its vault", map[protocol.HostID]epoch.View{"a": view(nil), "b": view(nil), "liar": {Heard: true, Unreadable: true}}, epoch.Wait},
	} {
		got := epoch.Next(&epoch.Unborn{Self: "a", Holders: holders, Generate: true, Roster: 1, Views: test.views})
		if got.Step != test.want {
			t.Errorf("%s: got %+v, want step %v", test.name, got, test.want)
		}
		if (got.Step == epoch.Wait || got.Step == epoch.Stuck) && got.Why == "" {
			t.Errorf("%s: no reason given", test.name)
		}
	}
}
