// Package agent is the agent of one host: it holds shares of the keys that the
// roster gives to the host, makes keys with the other hosts' agents, signs with
// them, and serves two local sockets.
//
// Make one with [New] and run it with [Agent.Run]; main hands in the hardware.
package agent

import (
	"context"
	"crypto"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/time/rate"

	"conseal/agent/peer"
	"conseal/agent/peer/peerpb"
	"conseal/agent/vault"
	"conseal/config"
	"conseal/protocol"
)

// Options is what main hands in.
type Options struct {
	Config    *config.Host
	Roster    *config.Roster
	Protector vault.Protector
	Seal      SealControl   // nil where the protector does not open by signed policies
	Identity  crypto.Signer // ECDSA P-256, in the hardware
	Version   string
	Log       *slog.Logger
	// Erasure and ErasureWhy are what the status says of an HSM's; both empty for a TPM.
	Erasure, ErasureWhy string
}

// Agent is one host's agent.
type Agent struct {
	self                protocol.HostID
	config              *config.Host
	protector           vault.Protector
	seal                SealControl
	identity            crypto.Signer
	version             string
	erasure, erasureWhy string
	log                 *slog.Logger
	started             time.Time
	told                atomic.Pointer[told]
	taking              sync.Mutex // held while a roster is taken up

	net      *peer.Net
	ledger   *ledger
	sessions *sessions
	callers  *limits[uint32]          // by user id
	uncalled *limits[protocol.HostID] // new epochs that others lead and the roster does not call for
	erasures *rate.Limiter            // of shares that new epochs replaced
	calm     calm
	// presigning is held by the one presigning under way, led or joined.
	presigning sync.Mutex
	wake       chan struct{} // tells reconcile to look
	tasks      sync.WaitGroup
	ctx        context.Context // ends with Run; for work that peers' frames start

	vault      atomic.Pointer[vault.Vault] // nil until the hardware opens it
	vaultError atomic.Pointer[string]
	vaultRetry retry       // owned by reconcile
	vaultNow   atomic.Bool // do not wait for vaultRetry
	// resealAgain: shares may not rest as the roster says.
	resealAgain atomic.Bool

	suspended  suspensions
	complaints complaints

	peersMu sync.Mutex
	peers   map[protocol.HostID]uint64 // roster version of each peer that is up
}

// New checks what it is given and opens the audit log; it does not touch the
// hardware yet.
func New(o Options) (*Agent, error) {
	if !o.Config.InsecureLab {
		return nil, errors.New("the roster is not signed: this version runs with unsigned rosters only, and only where the configuration says `insecure_lab = true`")
	}
	a := &Agent{
		self: protocol.HostID(o.Config.Name), config: o.Config, protector: o.Protector, seal: o.Seal,
		identity: o.Identity, version: o.Version, erasure: o.Erasure, erasureWhy: o.ErasureWhy, log: o.Log, started: time.Now(),
		wake: make(chan struct{}, 1), peers: map[protocol.HostID]uint64{},
		sessions:   newSessions(o.Config.Limits.SessionsPerPeer),
		callers:    newLimits[uint32](rate.Limit(o.Config.Limits.CallerRate), o.Config.Limits.CallerRate),
		erasures:   rate.NewLimiter(rate.Limit(o.Config.Limits.ErasuresPerHour)/rate.Limit(time.Hour/time.Second), erasuresAtOnce),
		uncalled:   newLimits[protocol.HostID](rate.Every(uncalledEvery), o.Config.Limits.EpochsPerPeer),
		complaints: complaints{limit: rate.NewLimiter(10, 50)},
	}
	a.suspended.keys = map[string]*suspension{}
	if err := a.checkSelf(o.Roster); err != nil {
		return nil, err
	}
	t, err := a.read(o.Roster)
	if err != nil {
		return nil, err
	}
	a.told.Store(t)
	a.resealAgain.Store(true)
	if err := a.network(); err != nil {
		return nil, err
	}
	if a.ledger, err = openLedger(o.Config.State); err != nil {
		return nil, err
	}
	if err := a.readMarker(); err != nil {
		a.ledger.Close()
		return nil, err
	}
	return a, nil
}

// maxFrame is the same on all hosts, whatever message each of them takes: the
// largest message that any may be configured to take, and what goes with it.
const maxFrame = 4<<20 + 64<<10

func (a *Agent) network() error {
	var err error
	a.net, err = peer.New(peer.Config{
		Self: a.self, Fleet: a.roster().Fleet, Identity: a.identity, Listen: a.config.Listen.Address, Hosts: peerHosts(a.roster()),
		Hello: func() *peerpb.Hello {
			return &peerpb.Hello{Fleet: a.roster().Fleet, RosterVersion: a.roster().Version, RosterDigest: a.rosterDigest()}
		},
		MaxFrame: maxFrame, Rate: a.config.Limits.PeerRate, Log: a.log,
	}, network{a})
	return err
}

// Run serves until ctx ends, and leaves nothing running.
func (a *Agent) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	a.ctx = ctx
	defer func() {
		cancel(nil)
		a.tasks.Wait()
		for _, k := range a.keys() {
			if act := k.active.Load(); act != nil {
				act.close()
			}
		}
		if v := a.vault.Load(); v != nil {
			v.Close()
		}
		a.ledger.Close()
		a.suspended.marker.close()
	}()
	a.openVault(ctx)
	sockets, err := a.listen()
	if err != nil {
		return err
	}
	run := func(name string, f func(context.Context) error) {
		a.tasks.Go(func() {
			if err := f(ctx); err != nil && ctx.Err() == nil {
				cancel(fmt.Errorf("%s: %w", name, err))
			}
		})
	}
	run("sockets", sockets.serve)
	run("peers", a.net.Run)
	run("presignatures", func(ctx context.Context) error { a.keepStock(ctx); return nil })
	run("reconcile", func(ctx context.Context) error { a.reconcile(ctx); return nil })
	a.log.Info("running", "host", a.self, "fleet", a.roster().Fleet, "roster", a.roster().Version, "protector", a.protector.Name(),
		"peers", a.config.Listen.Address, "sign", a.config.Listen.SignSocket, "admin", a.config.Listen.AdminSocket)
	<-ctx.Done()
	if cause := context.Cause(ctx); !errors.Is(cause, context.Canceled) {
		return cause
	}
	return nil
}

// openVault opens the vault if it is not open. While the hardware refuses (a PCR
// changed, a token is away), the agent runs on, says so, and tries again.
func (a *Agent) openVault(ctx context.Context) {
	if a.vault.Load() != nil || !a.vaultNow.Swap(false) && time.Now().Before(a.vaultRetry.after) {
		return
	}
	v, err := vault.Open(ctx, VaultFolder(a.config), a.config.Name, a.protector)
	if err != nil {
		a.vaultRetry.fail(err)
		text := err.Error()
		if old := a.vaultError.Swap(&text); old == nil || *old != text {
			a.log.Error("the vault does not open", "error", err)
		}
		return
	}
	a.vaultError.Store(nil)
	a.adoptSuspensions(v) // before any share is opened
	a.vault.Store(v)
	a.log.Info("vault open", "protector", a.protector.Name(), "keys", len(v.Keys()), "roots", v.Stats().Roots)
}

func (a *Agent) vaultProblem() string {
	if text := a.vaultError.Load(); text != nil {
		return *text
	}
	return "the vault is not open yet"
}

// VaultFolder is where a host keeps its shares.
func VaultFolder(c *config.Host) string { return filepath.Join(c.State, "vault") }

// network is the agent as its peers' handler.
type network struct{ a *Agent }

// Up tells a peer what this host has of the keys they hold together.
func (n network) Up(host protocol.HostID, hello *peerpb.Hello) {
	a := n.a
	if a.greeted(host, hello) {
		a.log.Error("two different rosters of one version", "peer", host, "version", hello.RosterVersion)
	}
	for _, k := range a.keys() {
		if a.mine(k) && k.concerns(host) {
			a.tell(host, k)
		}
	}
	a.nudge()
}

// Hello takes up which roster a peer has now.
func (n network) Hello(host protocol.HostID, hello *peerpb.Hello) {
	if n.a.greeted(host, hello) {
		n.a.complain("two different rosters of one version", "peer", host, "version", hello.RosterVersion)
	}
}

// greeted notes which roster a peer has, and says whether it is another of the
// version of this host's.
func (a *Agent) greeted(host protocol.HostID, hello *peerpb.Hello) bool {
	a.peersMu.Lock()
	defer a.peersMu.Unlock()
	a.peers[host] = hello.RosterVersion
	return hello.RosterVersion == a.roster().Version && string(hello.RosterDigest) != string(a.rosterDigest())
}

// Down ends what was under way with a peer.
func (n network) Down(host protocol.HostID, cause error) {
	a := n.a
	a.peersMu.Lock()
	delete(a.peers, host)
	a.peersMu.Unlock()
	for _, k := range a.keys() {
		k.lost(host)
		if act := k.active.Load(); act != nil {
			act.stock.drop(host)
		}
	}
	a.sessions.gone(host, cause)
	a.nudge()
}

// Frame takes what a peer says.
func (n network) Frame(from protocol.HostID, f *peerpb.Frame) {
	a := n.a
	var err error
	switch body := f.Body.(type) {
	case *peerpb.Frame_Step:
		if body.Step.Round > 0xffff {
			err = errors.New("a round over 65535")
			break
		}
		a.sessions.deliver(body.Step.Session, event{from: from, step: body.Step})
	case *peerpb.Frame_End:
		a.sessions.deliver(body.End.Session, event{from: from, err: &partyError{from, clean(body.End.Reason), clean(body.End.Text), body.End.Complaint}})
	case *peerpb.Frame_Open:
		err = a.opened(from, body.Open)
	case *peerpb.Frame_Key:
		err = a.hear(from, body.Key)
	case *peerpb.Frame_Want:
		a.offer(from, body.Want)
	case *peerpb.Frame_Certificate:
		err = a.offered(from, body.Certificate)
	default:
		err = fmt.Errorf("a frame of unknown kind %T", body)
	}
	if err != nil {
		a.complain("bad frame", "peer", from, "error", err)
	}
}

// complaints bounds what peers can make this host log.
type complaints struct {
	limit   *rate.Limiter
	dropped atomic.Int64
}

// complain logs something that a peer did, unless there were many just now.
func (a *Agent) complain(text string, args ...any) {
	for i, arg := range args {
		if err, ok := arg.(error); ok {
			args[i] = clean(err.Error()) // it may quote what the peer sent
		}
	}
	if !a.complaints.limit.Allow() {
		a.complaints.dropped.Add(1)
		return
	}
	if n := a.complaints.dropped.Swap(0); n > 0 {
		args = append(args, "not logged before", n)
	}
	a.log.Warn(text, args...)
}

// opened joins a session that a peer coordinates, in a goroutine of its own. The
// session's inbox is there before the next frame of the peer is read: a peer that
// leaves at once is heard.
func (a *Agent) opened(from protocol.HostID, open *peerpb.Open) error {
	b, err := parseBinding(open.Binding)
	if err != nil {
		return err
	}
	if !a.sessions.admit(from) {
		_ = a.net.Send(from, endFrame(b.ID(), reasonBusy, "too many sessions under way")) // it may be gone
		return nil
	}
	k := a.key(b.Key)
	parties := []protocol.HostID{from}
	switch {
	case k == nil:
	case b.Operation == "keygen":
		parties = k.holders()
	case b.Operation == opReshare:
		parties = slices.DeleteFunc(slices.Clone(b.Parties), func(h protocol.HostID) bool { return !k.declared.Load().has(h) })
	case k.scheme.traits().mesh:
		parties = slices.DeleteFunc(slices.Clone(b.Parties), func(h protocol.HostID) bool { return !k.holds(h) })
		if !slices.Contains(parties, from) {
			parties = append(parties, from)
		}
	}
	box, busy := a.sessions.open(b.ID(), a.self, parties)
	a.tasks.Go(func() {
		defer a.sessions.release(from)
		var err error
		if busy != nil {
			err = &partyError{host: a.self, reason: reasonBusy, text: busy.Error()}
		} else {
			defer a.sessions.close(box)
			err = a.join(from, k, b, open, box)
		}
		if err == nil || a.ctx.Err() != nil {
			return
		}
		a.complain("session refused or failed", "operation", b.Operation, "key", b.Key, "session", b.ID().String(), "peer", from, "error", err)
		reason, text := reasonAborted, err.Error()
		var party *partyError
		switch {
		case errors.As(err, &party) && party.reason != "":
			reason, text = party.reason, party.text
		case errors.Is(err, errLedger):
			reason = reasonNoLedger
		case errors.Is(err, errOver):
			reason = reasonBehind
		case errors.Is(err, errSealed):
			reason = reasonSealed
		}
		_ = a.net.Send(from, endFrame(b.ID(), reason, text)) // it may be gone
	})
	return nil
}

func (a *Agent) join(from protocol.HostID, k *key, b *protocol.Binding, open *peerpb.Open, box *inbox) error {
	switch {
	case k == nil:
		return &partyError{host: a.self, reason: reasonDiffers, text: fmt.Sprintf("its roster gives it no key %q", b.Key)}
	case b.Operation == opPresign:
		return a.joinPresign(a.ctx, from, k, b, box)
	case signs(b.Operation):
		return a.joinSign(a.ctx, from, k, b, open.Message, box)
	case b.Operation == opReshare:
		return a.joinReshare(a.ctx, from, k, b, open, box)
	case b.Operation == "keygen":
		return a.joinKeygen(a.ctx, from, k, b, open.Staged, box)
	}
	return &partyError{host: a.self, reason: reasonDiffers, text: fmt.Sprintf("it does not know operation %q", b.Operation)}
}
