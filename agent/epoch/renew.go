package epoch

import (
	"fmt"
	"slices"

	"conseal/agent/vault"
	"conseal/protocol"
)

// Base is the highest epoch of a key of which a host has the certificate; the zero
// Base is none.
type Base struct {
	Number      vault.Number
	Certificate [32]byte
	Quorum      int
	Holders     []protocol.HostID // sorted
	// Entry is the digest of the roster's entry that it was made for.
	Entry [32]byte
}

// Born is a key that exists, at a host that holds a share of it, is to hold one, or
// held one.
type Born struct {
	Self    protocol.HostID
	Base    Base
	Holders []protocol.HostID // of the next epoch, by the roster; sorted
	Entry   [32]byte          // digest of the key's entry in the roster
	Roster  uint64            // version of the roster
	// Dealers are the holders of Base that the roster still has, under the identities
	// that signed for it.
	Dealers []protocol.HostID
	// Due: the next epoch is wanted, because the roster's entry is another than that of
	// Base, the shares are old, or a person asked.
	Due bool
	// Reach is the highest attempt that what others say may make this host go beyond.
	Reach uint64
	// Views are what hosts say. Of what this host has staged, its own has only what is
	// for Holders and their quorum.
	Views map[protocol.HostID]View
}

// Renew decides what a host does about the next epoch of a key. The rules:
//
//   - A host votes for what all holders of the next epoch say they have staged, in rising
//     order of numbers. So of one number there is one output at all honest hosts, and
//     whoever has the statements of all holders knows that each honest one has its share.
//   - The highest certificate counts. Shares below it are dropped only when a quorum of
//     its holders has it too ([Born.Confirmed]): then no loss of messages or of fewer
//     hosts than that leaves the key without a usable epoch.
//   - Whoever holds a share of the base may deal, and whoever deals may lead. Several
//     that lead at once are in each other's way and nothing worse.
//
// A birth is stricter ([Next]): two epochs of one key are the same key, two births
// are not. In an Action of step Lead, Missing is empty and Rank tells who is to lead
// before this host.
func Renew(b *Born) Action {
	if choice, ok := b.next(); ok {
		if action, ok := b.commit(choice); ok {
			return action
		}
	}
	if !b.Due {
		return Action{Step: Settled}
	}
	if !slices.Contains(b.Dealers, b.Self) {
		return Action{Step: Wait, Why: "waiting for a holder of the key to deal new shares"}
	}
	if missing := b.missing(); len(missing) > 0 {
		return Action{Step: Wait, Why: "waiting for " + list(missing), Missing: missing}
	}
	if differ := b.differing(); len(differ) > 0 {
		return Action{Step: Wait, Missing: differ,
			Why: fmt.Sprintf("the rosters differ on this key: here and at %s; give all hosts the same roster", list(differ))}
	}
	if n, ok := b.committing(); ok {
		return Action{Step: Wait, Why: fmt.Sprintf("waiting for the hosts to commit epoch %s", n)}
	}
	able := b.Able()
	if !slices.Contains(able, b.Self) {
		return Action{Step: Wait, Why: "waiting for a holder of the key to deal new shares: this host does not have its own ready"}
	}
	if len(able) < b.Base.Quorum {
		return Action{Step: Wait, Why: fmt.Sprintf("%d of %d hosts that can deal new shares are there: %s", len(able), b.Base.Quorum, list(able))}
	}
	n := b.number()
	if n.Roster > b.Roster {
		return Action{Step: Wait, Why: fmt.Sprintf("epoch %s was made by a later roster than version %d, which this host has; give it the roster that the others have", b.Base.Number, b.Roster)}
	}
	return Action{Step: Lead, Number: n, Rank: slices.Index(able, b.Self)}
}

// commit says how far the hosts are with a choice that all holders have staged; not ok
// if it is done with.
func (b *Born) commit(choice Staged) (Action, bool) {
	own := b.Views[b.Self].Voted
	if own == nil || *own != choice {
		return Action{Step: Vote, Choice: choice}, own == nil || choice.Number.Compare(own.Number) > 0
	}
	var missing []protocol.HostID
	for _, h := range b.Holders {
		if v := b.Views[h].Voted; v == nil || *v != choice {
			missing = append(missing, h)
		}
	}
	if len(missing) == 0 {
		return Action{Step: Certify, Choice: choice}, true
	}
	return Action{Step: Wait, Missing: missing, Why: "waiting for the statements of " + list(missing)}, true
}

// committing finds an epoch that holders have begun to vote for and all of them have
// staged. A holder waits for it in commit; a host that is none would otherwise lead
// again and again, and where voting takes long the holders would never get to the end.
func (b *Born) committing() (n vault.Number, ok bool) {
	for _, h := range b.Holders {
		voted := b.Views[h].Voted
		everywhere := !slices.Contains(b.Holders, b.Self) && voted != nil && voted.Number.Compare(b.Base.Number) > 0
		for _, o := range b.Holders {
			everywhere = everywhere && slices.Contains(b.Views[o].Staged, *voted)
		}
		if everywhere {
			return voted.Number, true
		}
	}
	return n, false
}

// next finds the highest number above the base that all holders have staged with one
// output, or that they say they had: a host that has voted has it.
func (b *Born) next() (best Staged, ok bool) {
	if !slices.Contains(b.Holders, b.Self) {
		return best, false
	}
	for _, mine := range b.Views[b.Self].Staged {
		everywhere := mine.Number.Compare(b.Base.Number) > 0
		for _, h := range b.Holders {
			v := b.Views[h]
			everywhere = everywhere && v.Heard && !v.Unreadable && v.Entry == b.Entry && slices.Contains(v.Staged, mine)
		}
		if everywhere && (!ok || mine.Number.Compare(best.Number) > 0) {
			best, ok = mine, true
		}
	}
	return best, ok
}

// missing lists the holders of the next epoch that have not said what they have.
func (b *Born) missing() (missing []protocol.HostID) {
	for _, h := range b.Holders {
		if v := b.Views[h]; !v.Heard || v.Unreadable {
			missing = append(missing, h)
		}
	}
	return missing
}

func (b *Born) differing() (differ []protocol.HostID) {
	for _, h := range b.Holders {
		if b.Views[h].Entry != b.Entry {
			differ = append(differ, h)
		}
	}
	return differ
}

// Able lists the hosts that can deal now: those of [Born.Dealers] that have the base.
func (b *Born) Able() (able []protocol.HostID) {
	for _, h := range b.Dealers {
		if v := b.Views[h]; v.Heard && v.Certificate == b.Base.Certificate {
			able = append(able, h)
		}
	}
	return able
}

// number is above all that any holder has staged or voted for. What one says of a later
// roster than this host's is left out: if it is true, that host refuses the number, and
// if not, the epochs of rosters to come would get no higher numbers than this one. So is
// what is beyond this host's reach, else one lie would use the numbers up.
func (b *Born) number() vault.Number {
	n := vault.Number{Roster: b.Roster}
	raise := func(o vault.Number) {
		if o.Compare(n) > 0 && o.Roster <= b.Roster && o.Attempt <= b.Reach {
			n = o
		}
	}
	for _, h := range b.Holders {
		v := b.Views[h]
		for _, s := range v.Staged {
			raise(s.Number)
		}
		if v.Voted != nil {
			raise(v.Voted.Number)
		}
	}
	if b.Base.Number.Compare(n) > 0 {
		n = b.Base.Number
	}
	n.Attempt++
	return n
}

// Ahead lists the hosts that say they have a higher certificate than this one. One may
// lie, so nothing waits for what they say.
func (b *Born) Ahead() (ahead []protocol.HostID) {
	for h, v := range b.Views {
		if h != b.Self && v.Heard && v.Active && v.Number.Compare(b.Base.Number) > 0 {
			ahead = append(ahead, h)
		}
	}
	slices.Sort(ahead)
	return ahead
}

// Confirmed tells whether a quorum of the base's holders have its certificate: then
// what is below it may be erased.
func (b *Born) Confirmed() bool {
	n := 0
	for _, h := range b.Base.Holders {
		if v := b.Views[h]; v.Heard && v.Active && v.Certificate == b.Base.Certificate {
			n++
		}
	}
	return b.Base.Quorum > 0 && n >= b.Base.Quorum
}

// Erasable says what a host may erase of a key of which its vault has record: the
// shares of epochs below the base, or, if it is no holder of the base, everything. That
// is nothing while the base is not [Born.Confirmed], or the host has not taken it up.
func (b *Born) Erasable(record *vault.Record) (numbers []vault.Number, leaves bool) {
	holder := slices.Contains(b.Base.Holders, b.Self)
	switch {
	case len(record.Staged) == 0 || !b.Confirmed():
		return nil, false
	case !holder:
		return nil, !slices.ContainsFunc(record.Staged, func(s vault.Staged) bool { return s.Number.Compare(b.Base.Number) >= 0 })
	case record.Active != b.Base.Number || !record.Holds(b.Base.Number):
		return nil, false
	}
	for _, s := range record.Staged {
		if s.Number.Compare(b.Base.Number) < 0 {
			numbers = append(numbers, s.Number)
		}
	}
	return numbers, false
}
