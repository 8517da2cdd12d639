package agent

import (
	"context"
	"crypto/sha256"
	"errors"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"conseal/agent/vault"
	"conseal/config"
	"conseal/internal/secret"
	"conseal/protocol"
)

// plainShare is a share of which a test sees whether it is wiped.
type plainShare struct{ plain *secret.Bytes }

func (s plainShare) sign(signing) (signature, error) { return nil, errors.New("it only lies here") }
func (s plainShare) close()                          { s.plain.Wipe() }
func (s plainShare) wiped() bool                     { return s.plain.Len() == 0 }

// vaulted is a custody whose hardware takes a second.
type vaulted struct {
	*custody
	t      *testing.T
	opened []plainShare
	mu     sync.Mutex
	refuse error
	noted  atomic.Int64 // changes between opening and refusing
}

func newVaulted(t *testing.T, keep time.Duration) *vaulted {
	v := &vaulted{t: t}
	v.custody = newCustody(keep, func(ctx context.Context) (shareholder, error) {
		select {
		case <-time.After(time.Second):
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
		v.mu.Lock()
		defer v.mu.Unlock()
		if v.refuse != nil {
			return nil, v.refuse
		}
		s := plainShare{secret.Random(32)}
		v.opened = append(v.opened, s)
		return s, nil
	}, func() { v.noted.Add(1) })
	return v
}

// use borrows the share, wants it opened, and returns what ends the use.
func (v *vaulted) use() (plainShare, func()) {
	v.t.Helper()
	s, done, err := v.borrow(v.t.Context())
	ok(v.t, err)
	if s.(plainShare).wiped() {
		v.t.Error("a wiped share was lent")
	}
	return s.(plainShare), done
}

func (v *vaulted) wantOpened(times, now int) {
	v.t.Helper()
	synctest.Wait()
	v.mu.Lock()
	defer v.mu.Unlock()
	left := 0
	for _, s := range v.opened {
		if !s.wiped() {
			left++
		}
	}
	if len(v.opened) != times || left != now {
		v.t.Errorf("it was opened %d times and %d are opened now, want %d and %d", len(v.opened), left, times, now)
	}
}

// TestTimedShareIsWipedInTime: counted from when the hardware was asked, however much
// the share is used; the next use asks it again.
func TestTimedShareIsWipedInTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		v := newVaulted(t, 15*time.Minute)
		began := time.Now()
		for range 14 {
			_, done := v.use()
			done()
			v.wantOpened(1, 1)
			time.Sleep(time.Minute)
		}
		time.Sleep(time.Until(began.Add(15*time.Minute - time.Nanosecond)))
		_, done := v.use()
		done()
		v.wantOpened(1, 1)
		time.Sleep(time.Nanosecond)
		v.wantOpened(1, 0)
		time.Sleep(time.Hour)
		_, done = v.use()
		done()
		v.wantOpened(2, 1)
		v.close()
		v.wantOpened(2, 0)
	})
}

// TestTimedShareUnderASession is wiped after the session that uses it, and serves no
// other meanwhile.
func TestTimedShareUnderASession(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		v := newVaulted(t, time.Minute)
		first, firstDone := v.use()
		_, secondDone := v.use()
		time.Sleep(2 * time.Minute)
		v.wantOpened(1, 1)
		other, otherDone := v.use()
		v.wantOpened(2, 2)
		if first == other {
			t.Error("a share was lent after its time")
		}
		firstDone()
		v.wantOpened(2, 2) // the second session has it
		secondDone()
		v.wantOpened(2, 1)
		if !first.wiped() {
			t.Error("the share of before is not the one that was wiped")
		}
		time.Sleep(2 * time.Minute)
		v.wantOpened(2, 1)
		otherDone()
		v.wantOpened(2, 0)
	})
}

// TestTimedShareOfAMachineThatSlept: timers stand still meanwhile, the wall clock does
// not.
func TestTimedShareOfAMachineThatSlept(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		v := newVaulted(t, time.Hour)
		_, done := v.use()
		done()
		v.current.until = time.Now().Round(0)
		_, done = v.use()
		v.wantOpened(2, 1)
		done()
		time.Sleep(time.Hour - 2*time.Second) // the first would have been over
		v.wantOpened(2, 1)
		time.Sleep(time.Second)
		v.wantOpened(2, 0)
	})
}

// TestEachUseOpens, also at the same time, and wipes at its end.
func TestEachUseOpens(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		v := newVaulted(t, 0)
		var ends []func()
		for i := range 3 {
			_, done := v.use()
			ends = append(ends, done)
			v.wantOpened(i+1, i+1)
		}
		for i, done := range ends {
			done()
			v.wantOpened(3, 2-i)
		}
	})
}

// TestOneOpeningServesAllWhoWait, and if it fails because its caller left, another
// takes over.
func TestOneOpeningServesAllWhoWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		v := newVaulted(t, time.Hour)
		leaves, leave := context.WithCancel(t.Context())
		go func() {
			if _, _, err := v.borrow(leaves); !errors.Is(err, context.Canceled) {
				t.Errorf("who left: %v", err)
			}
		}()
		synctest.Wait()
		var wg sync.WaitGroup
		for range 8 {
			wg.Go(func() {
				_, done := v.use()
				time.Sleep(time.Second)
				done()
			})
		}
		impatient, cancel := context.WithTimeoutCause(t.Context(), time.Millisecond, errors.New("too slow"))
		defer cancel()
		if _, _, err := v.borrow(impatient); !errors.Is(err, errSealed) || !strings.Contains(err.Error(), "too slow") {
			t.Errorf("who cannot wait: %v", err)
		}
		leave()
		wg.Wait()
		v.wantOpened(1, 1)
		if v.refusal() != nil {
			t.Errorf("a caller who left counts as a refusal: %v", v.refusal())
		}
		v.close()
	})
}

// TestEndOfAnEpoch wipes what is opened, under sessions and under an opening too.
func TestEndOfAnEpoch(t *testing.T) {
	for _, keep := range []time.Duration{0, time.Hour} {
		synctest.Test(t, func(t *testing.T) {
			v := newVaulted(t, keep)
			s, done := v.use()
			time.Sleep(2 * time.Hour) // so that the next opens
			late := make(chan error)
			go func() {
				_, _, err := v.borrow(t.Context())
				late <- err
			}()
			synctest.Wait()
			v.close()
			if !s.wiped() {
				t.Error("a session's share outlives the epoch")
			}
			if err := <-late; err == nil {
				t.Error("a share was lent after the epoch")
			}
			v.wantOpened(2, 0)
			done()
			v.close()
		})
	}
}

func TestRefusalIsNoted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		v := newVaulted(t, time.Minute)
		v.refuse = errors.New("PCR 4 differs")
		for range 2 {
			if _, _, err := v.borrow(t.Context()); !errors.Is(err, errSealed) || !errors.Is(err, v.refuse) {
				t.Errorf("got %v, want what the hardware says", err)
			}
		}
		if v.refusal() != v.refuse || v.noted.Load() != 1 {
			t.Errorf("noted %v, %d times", v.refusal(), v.noted.Load())
		}
		v.refuse = nil
		_, done := v.use()
		done()
		if v.refusal() != nil || v.noted.Load() != 2 {
			t.Errorf("after it opened: noted %v, %d times", v.refusal(), v.noted.Load())
		}
		v.close()
	})
}

// labOpen is a fleet whose key is opened so.
func labOpen(t *testing.T, scheme string, open config.Opening) *lab {
	l := newLabOf(t, scheme)
	l.setOpen(open)
	return l
}

// setOpen gives the agents that are started from now on another roster.
func (l *lab) setOpen(open config.Opening) {
	changed := *l.roster
	changed.Keys = slices.Clone(l.roster.Keys)
	changed.Keys[0].Open = open
	l.roster = &changed
}

// refuseOwn makes a host's hardware open no share that rests under a key of its own.
func (h *hardware) refuseOwn(err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.onOpen = func(id string) error {
		if strings.HasPrefix(id, "share/own/") {
			return err
		}
		return nil
	}
}

// TestSealedHostRefuses: where the hardware does not open the share, that host says so
// and the others sign; and it is asked again at each use.
func TestSealedHostRefuses(t *testing.T) {
	for _, open := range []config.Opening{"each", "1h"} {
		t.Run(string(open), func(t *testing.T) {
			l := labOpen(t, "ed25519", open)
			l.birth()
			l.hosts["beta"].protector.refuseOwn(errors.New("PCR 4 is not as it was"))
			alpha, k := l.hosts["alpha"].agent, l.key("alpha")
			_, _, err := alpha.attempt(l.ctx, &request{k: k, act: k.active.Load(), message: []byte("m"), digest: sha256.Sum256([]byte("m"))},
				[]protocol.HostID{"alpha", "beta"}, nil)
			var party *partyError
			if !errors.As(err, &party) || party.host != "beta" || party.reason != reasonSealed {
				t.Errorf("a session with beta: %v", err)
			}
			for range 5 {
				signers, err := l.sign("alpha", []byte("m"))
				ok(t, err)
				if slices.Contains(signers, "beta") {
					t.Error("beta signed without its share")
				}
			}
			_, err = l.sign("beta", []byte("m"))
			var refused *apiError
			if !errors.As(err, &refused) || refused.reason != "KEY_NOT_READY" || !strings.Contains(refused.text, "PCR 4 is not as it was") {
				t.Errorf("asked on beta: %v", err)
			}
			l.untilSays("beta", "sealed", "PCR 4 is not as it was")
			ok(t, l.hosts["gamma"].stop())
			l.until("alpha sees that gamma left", func() bool { return len(l.key("alpha").live("alpha")) == 2 })
			_, err = l.sign("alpha", []byte("m"))
			if !errors.As(err, &refused) || refused.reason != "NO_QUORUM" || !strings.Contains(refused.text, `host "beta": sealed: `) || !strings.Contains(refused.text, "PCR 4 is not as it was") {
				t.Errorf("asked on alpha without gamma: %v", err)
			}
			l.hosts["beta"].protector.refuseOwn(nil)
			signers, err := l.sign("alpha", []byte("m"))
			ok(t, err)
			if !slices.Contains(signers, "beta") {
				t.Errorf("%q signed", signers)
			}
			l.start("gamma")
			l.untilSays("beta", "ready")
		})
	}
}

// TestRefusalAfterTheEnd: the hardware refuses a session of an epoch that has ended, and none
// has begun.
func TestRefusalAfterTheEnd(t *testing.T) {
	l := labOpen(t, "ed25519", "each")
	l.birth()
	l.hosts["alpha"].protector.refuseOwn(errors.New("PCR 4 is not as it was"))
	k := l.key("alpha")
	act := k.active.Load()
	k.supersede(vault.Number{Roster: 2}, time.Minute)
	if _, _, err := act.share.borrow(t.Context()); !errors.Is(err, errSealed) {
		t.Errorf("it is lent: %v", err)
	}
}

// TestSlowHardwareStopsNoOtherKey: while it opens the share of one key, the host signs
// with others, and with that key where the share is opened.
func TestSlowHardwareStopsNoOtherKey(t *testing.T) {
	l := labOpen(t, "ed25519", "each")
	other := l.roster.Keys[0]
	other.Name, other.Quorum, other.Open = "other", 3, config.OpenHeld
	l.roster.Keys = append(l.roster.Keys, other)
	l.birth()
	for name, h := range l.hosts {
		l.until("the other key is active on "+name, func() bool { return h.agent.told.Load().keys["other"].active.Load() != nil })
	}
	asked, answer := make(chan struct{}, 1), make(chan struct{})
	alpha := l.hosts["alpha"]
	l.until("alpha knows who has the other key", func() bool { return len(alpha.agent.told.Load().keys["other"].live("alpha")) == 3 })
	alpha.protector.mu.Lock()
	alpha.protector.onOpen = func(string) error {
		asked <- struct{}{}
		<-answer
		return nil
	}
	alpha.protector.mu.Unlock()
	signed := make(chan error)
	go func() {
		_, err := l.sign("alpha", []byte("m"))
		signed <- err
	}()
	<-asked
	for range 3 {
		k := alpha.agent.told.Load().keys["other"]
		_, err := alpha.agent.sign(l.ctx, &request{k: k, act: k.active.Load(), message: []byte("m"), digest: sha256.Sum256([]byte("m"))})
		ok(t, err)
	}
	close(answer)
	ok(t, <-signed)
}

// noPresignaturesUnlessHeld: a presignature signs without the share, so neither a host
// that opens it for a time makes one nor takes part when another does.
func noPresignaturesUnlessHeld(t *testing.T, l *lab) {
	signers := []protocol.HostID{"alpha", "beta"}
	lead := func() (err error) {
		alpha, k := l.hosts["alpha"].agent, l.key("alpha")
		l.until("beta is there", func() bool { return slices.Contains(k.live("alpha"), "beta") })
		l.until("beta takes part or refuses for good", func() bool { // not because it just signed
			err = alpha.leadPresign(l.ctx, k, k.active.Load(), signers)
			var party *partyError
			return !errors.As(err, &party) || party.reason != reasonBusy
		})
		return err
	}
	ok(t, lead()) // the control: it is held
	restart := func(open config.Opening) {
		l.leaves("beta")
		l.setOpen(open)
		l.start("beta")
		l.untilActive("beta")
	}
	held := l.roster.Keys[0].Open
	for _, open := range []config.Opening{"each", "1h"} {
		restart(open)
		if own, keep := l.key("beta").active.Load().share.held, l.key("beta").entry().Open; own != nil {
			t.Errorf("beta holds a share of which the roster says %q", keep)
		}
		var party *partyError
		if err := lead(); !errors.As(err, &party) || party.host != "beta" || party.reason != reasonRefused {
			t.Errorf("beta opens its share %q, and presigning with it: %v", open, err)
		}
		beta := l.hosts["beta"].agent
		beta.config.Limits.Presignatures = 1
		if sets := beta.signerSets(l.key("beta"), l.key("beta").active.Load()); len(sets) > 0 {
			t.Errorf("beta keeps stock with %q", sets)
		}
		beta.config.Limits.Presignatures = 0
	}
	signed, err := l.sign("alpha", []byte("m"))
	ok(t, err)
	t.Logf("%q signed", signed)
	restart(held)
}
