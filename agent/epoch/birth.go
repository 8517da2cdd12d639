package epoch

import (
	"fmt"
	"slices"
	"strings"

	"conseal/agent/vault"
	"conseal/protocol"
)

// Staged is a share that a host holds of an epoch without a certificate.
type Staged struct {
	Number vault.Number
	Output vault.Output
}

// View is what one holder has of a key, as far as another knows it. The zero
// View means that nothing was heard.
type View struct {
	Heard      bool     // on the connection that is up now
	Unreadable bool     // it cannot read its vault: what follows is not meant
	Entry      [32]byte // digest of the key's entry in its roster
	Staged     []Staged
	Voted      *Staged
	Active     bool
	// Of the epoch that is active.
	Number      vault.Number
	Certificate [32]byte
}

// Step is what to do next about a key.
type Step int

// The steps.
const (
	Wait     Step = iota // nothing can be done now: see Why
	Stuck                // nothing can be done until a person acts: see Why
	Generate             // run a key generation for Number
	Vote                 // make a vote for Choice durable, sign it, tell all
	Certify              // all holders voted for Choice: put the certificate together
	Fetch                // ask host From for its certificate
	Lead                 // run a resharing for Number, after Rank others had the time to
	Settled              // nothing is wanted
)

// Action is what [Next] or [Renew] decided.
type Action struct {
	Step   Step
	Number vault.Number // Generate, Lead
	Rank   int          // Lead
	Choice Staged       // Vote, Certify
	From   protocol.HostID
	Why    string // Wait, Stuck: for people
	// Missing are the hosts that a Wait is for.
	Missing []protocol.HostID
}

// Unborn is a key without a certificate at this host.
type Unborn struct {
	Self     protocol.HostID
	Holders  []protocol.HostID // sorted
	Entry    [32]byte          // digest of the key's entry, as first seen here
	Generate bool              // the roster marks the key to be generated
	Roster   uint64            // version of the roster at which this host first saw the entry
	Views    map[protocol.HostID]View
}

// Next decides what this host does about an unborn key. The rules, from which
// it follows that a key id has at most one certificate as long as one holder is
// honest, and that crashes alone never leave a key stuck:
//
//   - A host votes only for a number whose share every holder says it has
//     staged, with the same output, and it votes once for a key id. (A host
//     that staged a share never drops it but at the birth or deletion of the
//     key's name, or if its file is damaged before this host voted for it.) So
//     once anybody voted, everybody has the share, and no crash takes it away.
//   - A new generation starts only when no number is staged at all holders; each
//     of them agrees to start only if what it has staged is what the first
//     holder counted, and from then on stages nothing of earlier numbers. So no
//     earlier number can become complete behind the back of a later one.
func Next(u *Unborn) Action {
	for _, h := range u.Holders {
		if v := u.Views[h]; h != u.Self && v.Heard && v.Active {
			return Action{Step: Fetch, From: h}
		}
	}
	if missing := u.missing(); len(missing) > 0 {
		return Action{Step: Wait, Why: "waiting for " + list(missing), Missing: missing}
	}
	if differ := u.differing(); len(differ) > 0 {
		return Action{Step: Wait, Missing: differ,
			Why: fmt.Sprintf("the rosters differ on this key: here and at %s; give all hosts the same roster", list(differ))}
	}
	if action, ok := u.voted(); ok {
		return action
	}
	if choice, ok := u.complete(); ok {
		return Action{Step: Vote, Choice: choice}
	}
	if !u.Generate {
		return Action{Step: Wait, Why: "no host holds a share and the roster does not mark the key `generate = true`"}
	}
	if u.Holders[0] != u.Self {
		return Action{Step: Wait, Why: fmt.Sprintf("waiting for %q to start the key generation", u.Holders[0])}
	}
	return Action{Step: Generate, Number: u.next()}
}

// missing lists the holders that have not said what they have.
func (u *Unborn) missing() (missing []protocol.HostID) {
	for _, h := range u.Holders {
		if v := u.Views[h]; !v.Heard || v.Unreadable {
			missing = append(missing, h)
		}
	}
	return missing
}

func (u *Unborn) differing() (differ []protocol.HostID) {
	for _, h := range u.Holders {
		if u.Views[h].Entry != u.Entry {
			differ = append(differ, h)
		}
	}
	return differ
}

// voted handles a key id for which some holder has voted.
func (u *Unborn) voted() (Action, bool) {
	var choice *Staged
	votes := 0
	for _, h := range u.Holders {
		v := u.Views[h].Voted
		switch {
		case v == nil:
			continue
		case choice == nil:
			choice = v
		case *choice != *v:
			return stuck("hosts have voted for different key generations (%s and %s)", choice.Number, v.Number), true
		}
		votes++
	}
	if choice == nil {
		return Action{}, false
	}
	for _, h := range u.Holders {
		if !slices.Contains(u.Views[h].Staged, *choice) {
			return stuck("key generation %s was voted for, but host %q does not have its share", choice.Number, h), true
		}
	}
	switch {
	case u.Views[u.Self].Voted == nil:
		return Action{Step: Vote, Choice: *choice}, true
	case votes == len(u.Holders):
		return Action{Step: Certify, Choice: *choice}, true
	}
	var missing []protocol.HostID
	for _, h := range u.Holders {
		if u.Views[h].Voted == nil {
			missing = append(missing, h)
		}
	}
	return Action{Step: Wait, Missing: missing, Why: "waiting for the statements of " + list(missing)}, true
}

func stuck(format string, args ...any) Action {
	return Action{Step: Stuck, Why: fmt.Sprintf(format, args...) + "; no signature was made with this key: raise its `incarnation` in the roster to make it anew"}
}

// complete finds the highest number that all holders have staged with one output.
func (u *Unborn) complete() (best Staged, ok bool) {
	for _, mine := range u.Views[u.Self].Staged {
		everywhere := true
		for _, h := range u.Holders {
			everywhere = everywhere && slices.Contains(u.Views[h].Staged, mine)
		}
		if everywhere && (!ok || mine.Number.Compare(best.Number) > 0) {
			best, ok = mine, true
		}
	}
	return best, ok
}

// next is a number above all that any holder has staged.
func (u *Unborn) next() vault.Number {
	n := vault.Number{Roster: u.Roster}
	for _, v := range u.Views {
		for _, s := range v.Staged {
			if s.Number.Compare(n) > 0 {
				n = s.Number
			}
		}
	}
	n.Attempt++
	return n
}

func list(hosts []protocol.HostID) string {
	var quoted []string
	for _, h := range hosts {
		quoted = append(quoted, fmt.Sprintf("%q", h))
	}
	return strings.Join(quoted, ", ")
}
