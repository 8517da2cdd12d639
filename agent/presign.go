package agent

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	mathrand "math/rand/v2"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"conseal/agent/api/apipb"
	"conseal/agent/peer/peerpb"
	"conseal/protocol"
)

const (
	opPresign = "presign"
	// stockEvery is how often an idle host looks whether its stock is full.
	stockEvery = 100 * time.Millisecond
	// idleFor is how long nothing must have been signed before stock is made.
	idleFor = 500 * time.Millisecond
	// maxHeld bounds the presignatures of one key that another host owns here.
	maxHeld = 512
	// background is the nice value of the threads that presign.
	background = 10
)

// presigner is a shareholder that can prepare signatures.
type presigner interface {
	presign(signing) (presigning, error)
}

// presigning is a session of presigning. result is valid once the session is done.
type presigning interface {
	protocol.Session
	result() (presignature, error)
}

// presignature is this host's part of a signature to be. sign takes it, whatever
// comes of it.
type presignature interface {
	sign(id protocol.SessionID, digest [32]byte) (signature, error)
	discard()
}

// stock is the presignatures of one epoch of a key at this host, in memory only. A
// presignature has the id of the session that made it, one owner, which coordinated
// that session and alone may use it, and its signers. It leaves the stock before
// anything that uses it leaves the host, and never comes back: a presignature used
// for two messages gives the private key away.
type stock struct {
	mu     sync.Mutex
	closed bool
	held   map[protocol.SessionID]*presigned
}

// presigned is a presignature in stock, or taken out of it.
type presigned struct {
	presignature
	id      protocol.SessionID
	owner   protocol.HostID
	signers []protocol.HostID
}

// name is the presignature's id in the audit log; "" for none.
func (p *presigned) name() string {
	if p == nil {
		return ""
	}
	return hex.EncodeToString(p.id[:])
}

func newStock() *stock { return &stock{held: map[protocol.SessionID]*presigned{}} }

// add takes a presignature in. It is discarded if the epoch is over, or there are too
// many of its owner.
func (s *stock) add(p *presigned) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.closed:
		p.discard()
		return errors.New("the epoch is over")
	case s.held[p.id] != nil || s.count(func(o *presigned) bool { return o.owner == p.owner }) >= maxHeld:
		p.discard()
		return errors.New("too many presignatures of one host")
	}
	s.held[p.id] = p
	return nil
}

func (s *stock) count(of func(*presigned) bool) (n int) {
	for _, p := range s.held {
		if of(p) {
			n++
		}
	}
	return n
}

// take takes out a presignature by its id, for its owner only.
func (s *stock) take(id protocol.SessionID, owner protocol.HostID) *presigned {
	s.mu.Lock()
	defer s.mu.Unlock()
	p := s.held[id]
	if p == nil || p.owner != owner {
		return nil
	}
	delete(s.held, id)
	return p
}

// any takes out a presignature of self's whose signers all fit.
func (s *stock) any(self protocol.HostID, fits func(protocol.HostID) bool) *presigned {
	s.mu.Lock()
	defer s.mu.Unlock()
	for id, p := range s.held {
		if p.owner == self && !slices.ContainsFunc(p.signers, func(h protocol.HostID) bool { return !fits(h) }) {
			delete(s.held, id)
			return p
		}
	}
	return nil
}

// ready counts what self may use with these signers.
func (s *stock) ready(self protocol.HostID, signers []protocol.HostID) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.count(func(p *presigned) bool { return p.owner == self && slices.Equal(p.signers, signers) })
}

// drop discards what needs a host whose connection is lost: it may have restarted,
// and then has nothing.
func (s *stock) drop(host protocol.HostID) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for id, p := range s.held {
		if slices.Contains(p.signers, host) {
			delete(s.held, id)
			p.discard()
		}
	}
}

// empty discards everything.
func (s *stock) empty() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for id, p := range s.held {
		delete(s.held, id)
		p.discard()
	}
}

// close discards everything and takes nothing more in.
func (s *stock) close() {
	s.mu.Lock()
	s.closed = true
	s.mu.Unlock()
	s.empty()
}

// calm knows whether this host has signed lately.
type calm struct {
	signing atomic.Int64 // sessions under way
	last    atomic.Int64 // when one ended, Unix nanoseconds
}

// enter counts a session that signs until the returned function is called.
func (c *calm) enter() func() {
	c.signing.Add(1)
	return func() {
		c.last.Store(time.Now().UnixNano())
		c.signing.Add(-1)
	}
}

func (c *calm) idle() bool {
	return c.signing.Load() == 0 && time.Since(time.Unix(0, c.last.Load())) > idleFor
}

// keepStock makes presignatures while the host is idle, until ctx ends.
func (a *Agent) keepStock(ctx context.Context) {
	tick := time.NewTicker(stockEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		for _, k := range a.keys() {
			if !a.calm.idle() || ctx.Err() != nil {
				break
			}
			a.fill(ctx, k)
		}
	}
}

// fill makes one presignature of a key, if one is wanted.
func (a *Agent) fill(ctx context.Context, k *key) {
	act := k.active.Load()
	if act == nil || a.halted(k) != nil || !k.asks(a.self) || time.Now().Before(k.presignAfter) {
		return
	}
	for _, signers := range a.signerSets(k, act) {
		if act.stock.ready(a.self, signers) >= a.config.Limits.Presignatures {
			continue
		}
		err := errors.New("another presigning is under way")
		if a.presigning.TryLock() {
			inBackground(func() { err = a.leadPresign(ctx, k, act, signers) })
			a.presigning.Unlock()
		}
		if err != nil {
			// Hosts that prepare for each other at once meet again at other times.
			k.presignAfter = time.Now().Add(time.Duration(100+mathrand.IntN(900)) * time.Millisecond)
			a.log.Debug("no presignature made", "key", k.id.Name, "signers", signers, "error", err)
		}
		return
	}
}

// signerSets lists the quorums that stock is kept for: this host with its neighbours
// in the circle of live holders, so that every other host is in as many as any.
func (a *Agent) signerSets(k *key, act *active) (sets [][]protocol.HostID) {
	if _, ok := act.presigner(); !ok || a.config.Limits.Presignatures == 0 {
		return nil
	}
	others := slices.DeleteFunc(k.live(a.self), func(h protocol.HostID) bool { return h == a.self })
	return circle(a.self, others, act.output.quorum-1)
}

// circle lists self with each run of need neighbours among others.
func circle(self protocol.HostID, others []protocol.HostID, need int) (sets [][]protocol.HostID) {
	for i := range others {
		if len(others) < need || i > 0 && len(others) == need {
			break
		}
		set := []protocol.HostID{self}
		for j := range need {
			set = append(set, others[(i+j)%len(others)])
		}
		slices.Sort(set)
		sets = append(sets, set)
	}
	return sets
}

// inBackground runs f on a thread that yields to all others, and waits for it.
func inBackground(f func()) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		_ = unix.Setpriority(unix.PRIO_PROCESS, 0, background)
		f()
	}()
	<-done
}

// leadPresign makes a presignature that this host will own.
func (a *Agent) leadPresign(ctx context.Context, k *key, act *active, signers []protocol.HostID) error {
	ctx, cancel := context.WithTimeoutCause(ctx, a.config.Limits.KeygenDeadline, errors.New("the presigning took too long"))
	defer cancel()
	ctx, ended := k.begins(ctx)
	defer ended()
	var nonce [32]byte
	rand.Read(nonce[:])
	b := a.signBinding(opPresign, k, act, signers, [32]byte{}, nonce)
	box, err := a.sessions.open(b.ID(), a.self, signers)
	if err != nil {
		return err
	}
	defer a.sessions.close(box)
	open := &peerpb.Frame{Body: &peerpb.Frame_Open{Open: &peerpb.Open{Binding: wireBinding(&b)}}}
	for _, h := range box.parties {
		if err := a.net.Send(h, open); err != nil {
			hangUp(box, a.net.Send, err)
			return err
		}
	}
	if err := a.letGo(ctx, k, box); err != nil {
		hangUp(box, a.net.Send, err)
		return err
	}
	return a.runPresign(ctx, k, act, a.self, signers, box, nil)
}

// joinPresign takes part in a presigning that another host leads and will own, if
// this host is idle.
func (a *Agent) joinPresign(ctx context.Context, from protocol.HostID, k *key, b *protocol.Binding, box *inbox) (err error) {
	act := k.active.Load()
	if err := a.mayTakePart(from, k, act, b); err != nil {
		return err
	}
	if _, ok := act.presigner(); !ok || b.Request != [32]byte{} {
		return &partyError{host: a.self, reason: reasonRefused, text: "the key has no presignatures, by its scheme or by `open` in this host's roster"}
	}
	if !a.calm.idle() || !a.presigning.TryLock() {
		return &partyError{host: a.self, reason: reasonBusy, text: "it is not idle"}
	}
	defer a.presigning.Unlock()
	ctx, cancel := context.WithTimeoutCause(ctx, a.config.Limits.KeygenDeadline, errors.New("the presigning took too long"))
	defer cancel()
	ctx, ended := k.begins(ctx)
	defer ended()
	inBackground(func() {
		var early []event
		if early, err = a.waitGo(ctx, k, from, box); err == nil {
			err = a.runPresign(ctx, k, act, from, b.Parties, box, early)
		}
	})
	return err
}

func (a *Agent) runPresign(ctx context.Context, k *key, act *active, owner protocol.HostID, signers []protocol.HostID, box *inbox, early []event) error {
	session, err := act.share.held.(presigner).presign(signing{id: box.id, self: a.self, coordinator: owner, signers: signers})
	if err != nil {
		hangUp(box, a.net.Send, err)
		return err
	}
	defer session.Close()
	if err := drive(ctx, a.self, session, box, a.gate(k), early); err != nil {
		return err
	}
	made, err := session.result()
	if err != nil {
		return err
	}
	err = a.unlessHalted(k, func() error {
		return act.stock.add(&presigned{presignature: made, id: box.id, owner: owner, signers: signers})
	})
	if a.haltsHere(err) {
		made.discard()
	}
	if err != nil {
		return fmt.Errorf("presignature of key %q: %w", k.id.Name, err)
	}
	return nil
}

// presignatures says for people how much stock there is.
func (a *Agent) presignatures(k *key) (out []*apipb.Presignatures) {
	act := k.active.Load()
	if act == nil {
		return nil
	}
	for _, signers := range a.signerSets(k, act) {
		out = append(out, &apipb.Presignatures{
			Signers: names(signers), Ready: uint32(act.stock.ready(a.self, signers)), Wanted: uint32(a.config.Limits.Presignatures),
		})
	}
	return out
}
