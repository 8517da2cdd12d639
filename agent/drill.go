package agent

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"conseal/agent/api/apipb"
	"conseal/agent/vault"
	"conseal/protocol"
)

// What the loss of a host does to a key; stable, for programs.
const (
	lossSigns = "signs"
	lossWaits = "waits"
	lossLost  = "lost"
)

// Drill says what the loss of each host would do to each key of this host.
func (s adminAPI) Drill(context.Context, *apipb.DrillRequest) (*apipb.DrillResponse, error) {
	a := s.a
	out := &apipb.DrillResponse{Host: string(a.self), RosterVersion: a.roster().Version}
	for _, k := range a.keys() {
		switch {
		case k.entry().State == "deleted":
		case !a.mine(k):
			out.Elsewhere = append(out.Elsewhere, k.id.Name)
		default:
			out.Keys = append(out.Keys, a.drill(k))
		}
	}
	return out, nil
}

// drill collects what is known of one key and its hosts.
func (a *Agent) drill(k *key) *apipb.DrilledKey {
	d := &apipb.DrilledKey{Name: k.id.Name}
	k.mu.Lock()
	n, next := k.known, k.next
	k.mu.Unlock()
	switch {
	case n == nil && a.vault.Load() == nil:
		d.Problem = "this host's vault is not open: " + a.vaultProblem()
		return d
	case n == nil && k.exists():
		d.Problem = "other hosts say that the key exists, and this one does not have its certificate"
		return d
	case n == nil:
		d.Problem = "the key does not exist yet"
		return d
	}
	d.EpochRoster, d.EpochAttempt = n.number().Roster, n.number().Attempt
	d.Quorum = uint32(n.output.quorum)
	if ahead := a.ahead(k, n); len(ahead) > 0 {
		d.Problem = fmt.Sprintf("%s says that there is a later epoch than %s, of which this host does not have the certificate: ask there", list(ahead), n.number())
	}
	for _, h := range n.output.holders {
		d.Hosts = append(d.Hosts, a.drillHost(k, n, h))
	}
	if k.entry().State == "suspended" {
		d.Notes = append(d.Notes, "the roster suspends the key: it does not sign; what is said of signing is for when it is resumed")
	}
	if n.certificate.Subject.Entry != k.digest() {
		d.Notes = append(d.Notes, "the roster wants other hosts, identities or another quorum, and this is about the epoch that is in force until that is done")
	}
	if next != "" {
		d.Notes = append(d.Notes, "next epoch: "+next)
	}
	assess(d)
	return d
}

// ahead lists the hosts that say they have a later epoch than this one knows.
func (a *Agent) ahead(k *key, n *known) (ahead []protocol.HostID) {
	k.mu.Lock()
	defer k.mu.Unlock()
	for h, view := range k.views {
		if h != a.self && view.Active && view.Number.Compare(n.number()) > 0 {
			ahead = append(ahead, h)
		}
	}
	slices.Sort(ahead)
	return ahead
}

// drillHost says what one holder has of an epoch.
func (a *Agent) drillHost(k *key, n *known, h protocol.HostID) *apipb.DrilledHost {
	d := &apipb.DrilledHost{Name: string(h)}
	if _, same := n.statement(k, h); !same {
		d.State = "the roster has this host no more, or under another identity: its share is of no use"
		return d
	}
	if h == a.self {
		d.Live, d.Share, d.State = a.drillSelf(k, n)
	} else {
		d.Live, d.Share, d.State = a.drillPeer(k, n, h)
	}
	if member, ok := a.roster().Host(string(h)); ok && member.Role == "recovery" {
		d.Live = false // whatever it does now, it is not there to sign
		d.State = "recovery host: " + d.State
	}
	return d
}

// drillSelf looks at this host's own share: at its file too, as what is opened in memory
// says nothing of the next start.
func (a *Agent) drillSelf(k *key, n *known) (live, share bool, state string) {
	v := a.vault.Load()
	if v == nil {
		return false, true, "its vault is not open: " + a.vaultProblem()
	}
	_, err := v.Public(k.id, n.number())
	switch {
	case errors.Is(err, vault.ErrNoShare):
		return false, false, "has no share of this epoch"
	case err != nil:
		return false, false, "its share does not survive a restart: " + err.Error()
	}
	act := k.active.Load()
	if act == nil || act.id != n.id {
		return false, true, "has a share, and does not sign with it now"
	}
	if err := act.share.refusal(); err != nil {
		return false, true, "its hardware did not open the share when it was used last: " + err.Error()
	}
	return a.signing(k, a.self)
}

// signing is the state of a host that has the epoch.
func (a *Agent) signing(k *key, h protocol.HostID) (live, share bool, state string) {
	if k.active.Load() != nil && !slices.Contains(k.live(a.self), h) {
		return false, true, "has its share, and does not sign now"
	}
	return true, true, "has its share"
}

// drillPeer takes another host's word, as it gave it on the connection that is up.
func (a *Agent) drillPeer(k *key, n *known, h protocol.HostID) (live, share bool, state string) {
	k.mu.Lock()
	view := k.views[h]
	k.mu.Unlock()
	a.peersMu.Lock() // after its word: who hangs up is no peer any more before that is forgotten
	_, connected := a.peers[h]
	a.peersMu.Unlock()
	switch {
	case !connected:
		return false, true, "not connected; it had its share"
	case !view.Heard:
		return false, true, "connected, and says nothing of the key; it had its share"
	case view.Unreadable:
		return false, true, "cannot open its vault or its share now"
	case view.Certificate == n.id:
		return a.signing(k, h)
	}
	for _, s := range view.Staged {
		if s.Number == n.number() && s.Output == n.certificate.Subject.Output {
			return false, true, "has its share, and not yet the certificate"
		}
	}
	return false, false, "says that it has no share of this epoch"
}

// assess counts, and says what the loss of each host would do.
func assess(d *apipb.DrilledKey) {
	var waiting []string // have a share and do not sign
	for _, h := range d.Hosts {
		switch {
		case h.Live:
			d.Live++
		case h.Share:
			waiting = append(waiting, h.Name)
		}
		if h.Share {
			d.Shares++
		}
	}
	d.SpareLive, d.SpareShares = int32(d.Live)-int32(d.Quorum), int32(d.Shares)-int32(d.Quorum)
	for _, h := range d.Hosts {
		live, shares := d.SpareLive, d.SpareShares
		if h.Live {
			live--
		}
		if h.Share {
			shares--
		}
		switch {
		case shares < 0:
			h.Loss, h.Text = lossLost, fmt.Sprintf("LOST: %d of the %d shares that it takes would be left", int32(d.Quorum)+shares, d.Quorum)
		case live < 0:
			others := slices.DeleteFunc(slices.Clone(waiting), func(name string) bool { return name == h.Name })
			h.Loss, h.Text = lossWaits, fmt.Sprintf("cannot sign until %s back, but is not lost", some(int(-live), others))
		case live == 0:
			h.Loss, h.Text = lossSigns, "signs, and may lose no more"
		default:
			h.Loss, h.Text = lossSigns, fmt.Sprintf("signs, and may lose %d more", live)
		}
	}
}

// some says "gamma is" or "2 of gamma, delta are".
func some(n int, names []string) string {
	verb := "are"
	if n == 1 {
		verb = "is"
	}
	if len(names) == 1 {
		return names[0] + " " + verb
	}
	return fmt.Sprintf("%d of %s %s", n, strings.Join(names, ", "), verb)
}

// list names hosts for people.
func list(hosts []protocol.HostID) string { return strings.Join(names(hosts), ", ") }
