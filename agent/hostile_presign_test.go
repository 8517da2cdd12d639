package agent

import (
	"crypto/rand"
	"crypto/sha256"
	"fmt"
	"slices"
	"strings"
	"testing"

	"conseal/agent/peer/peerpb"
	"conseal/protocol"
)

// onlineRound is the round in which a signer sends its share of a signature.
const onlineRound = 8

// presign makes a presignature with one other host. The rogue leads and owns it, or
// has heard the request of the other, who owns it.
func (r *rogue) presign(share shareholder, b *protocol.Binding, owner, with protocol.HostID) *presigned {
	r.t.Helper()
	box, err := r.sessions.open(b.ID(), r.self, []protocol.HostID{with})
	ok(r.t, err)
	defer r.sessions.close(box)
	if owner == r.self {
		r.open(with, b, nil)
		_, err = gather(r.ctx, box, box.parties)
		ok(r.t, err)
	}
	r.send(with, readyFrame(box.id))
	var early []event
	if owner != r.self {
		early, err = gather(r.ctx, box, box.parties)
		ok(r.t, err)
	}
	session, err := share.(presigner).presign(signing{id: box.id, self: r.self, coordinator: owner, signers: b.Parties})
	ok(r.t, err)
	defer session.Close()
	ok(r.t, drive(r.ctx, r.self, session, box, r.net.Send, early))
	made, err := session.result()
	ok(r.t, err)
	return &presigned{made, box.id, owner, b.Parties}
}

// use is a binding of a signature over message with a presignature.
func (r *rogue) use(witness, message string, id protocol.SessionID, signers ...protocol.HostID) *protocol.Binding {
	b := r.signing(witness, []byte(message), signers...)
	b.Operation, b.Nonce = opOnline, id
	return b
}

// TestPresigners has one key for all that is tried on it: it takes half a minute to make.
func TestPresigners(t *testing.T) {
	l := newLabOf(t, "ecdsa-p256")
	for _, h := range l.hosts {
		h.config.Limits.Presignatures = 0       // alpha is told below when to make one
		h.config.Limits.SignDeadline = patience // for slow machines
	}
	l.birth()
	t.Run("none unless held", func(t *testing.T) { noPresignaturesUnlessHeld(t, l) })
	t.Run("one that lies", func(t *testing.T) { lyingPresigner(t, l) })
}

// A host that lies about presignatures gets one signature share for each that it owns
// and none for those of others, and is named when its own share is wrong.
func lyingPresigner(t *testing.T, l *lab) {
	r := l.betray("gamma")
	share := r.share()
	defer share.close()
	r.claim("alpha")
	alpha := l.hosts["alpha"].agent
	held := func() int {
		s := l.key("alpha").active.Load().stock
		s.mu.Lock()
		defer s.mu.Unlock()
		return len(s.held)
	}
	shares := func(b *protocol.Binding) int {
		return len(r.all(func(from protocol.HostID, f *peerpb.Frame) bool {
			return from == "alpha" && stepOf(b.ID(), onlineRound)(f)
		}))
	}
	own := func() *presigned { // one that the rogue owns
		r.until("alpha is idle", func() bool {
			if !alpha.calm.idle() || !alpha.presigning.TryLock() { // of the one before, whose result is there already
				return false
			}
			alpha.presigning.Unlock()
			return true
		})
		before := held()
		b := r.signing("alpha", nil, "alpha", "gamma")
		b.Operation, b.Request = opPresign, [32]byte{}
		p := r.presign(share, b, r.self, "alpha")
		r.until("alpha holds its part", func() bool { return held() > before })
		return p
	}
	theirs := func() *presigned { // one that alpha owns
		before := held()
		made := make(chan error, 1)
		k := l.key("alpha")
		seen := len(r.all(func(_ protocol.HostID, f *peerpb.Frame) bool {
			return f.GetOpen().GetBinding().GetOperation() == opPresign
		}))
		go func() { made <- alpha.leadPresign(l.ctx, k, k.active.Load(), []protocol.HostID{"alpha", "gamma"}) }()
		var open *peerpb.Open
		r.until("alpha presigns", func() bool {
			all := r.all(func(_ protocol.HostID, f *peerpb.Frame) bool {
				return f.GetOpen().GetBinding().GetOperation() == opPresign
			})
			if len(all) > seen {
				open = all[len(all)-1].GetOpen()
			}
			return open != nil
		})
		p := r.presign(share, r.binding(open), "alpha", "alpha")
		ok(t, <-made)
		if held() != before+1 {
			t.Fatal("alpha has no presignature of its own")
		}
		return p
	}

	t.Run("one of its own for two messages at once", func(t *testing.T) {
		p := own()
		one, two := r.use("alpha", "one", p.id, p.signers...), r.use("alpha", "two", p.id, p.signers...)
		r.open("alpha", one, []byte("one"))
		r.open("alpha", two, []byte("two"))
		for _, b := range []*protocol.Binding{one, two} {
			r.send("alpha", readyFrame(b.ID()))
		}
		r.until("one session has ended for want of it", func() bool {
			return len(r.all(func(_ protocol.HostID, f *peerpb.Frame) bool {
				return f.GetEnd().GetReason() == reasonNoPresignature && (endOf(one.ID())(f) || endOf(two.ID())(f))
			})) == 1
		})
		r.until("the other has given its share", func() bool { return shares(one)+shares(two) >= 1 })
		again := r.use("alpha", "again", p.id, p.signers...)
		r.open("alpha", again, []byte("again"))
		r.hears("an end", "alpha", endOf(again.ID()))
		r.open("alpha", one, []byte("one"))
		r.open("alpha", two, []byte("two"))
		r.settled("alpha")
		if n := shares(one) + shares(two) + shares(again); n != 1 {
			t.Errorf("one presignature gave %d signature shares", n)
		}
		for _, b := range []*protocol.Binding{one, two} { // else alpha waits for the rogue's share
			r.send("alpha", endFrame(b.ID(), reasonAborted, "done"))
		}
		p.discard()
	})
	for name, wrong := range map[string]func(p *presigned) (*protocol.Binding, string){
		"another message than it says": func(p *presigned) (*protocol.Binding, string) {
			return r.use("alpha", "said", p.id, p.signers...), "sent"
		},
		"other signers": func(p *presigned) (*protocol.Binding, string) {
			return r.use("alpha", "m", p.id, "alpha", "beta"), "m"
		},
		"a digest": func(p *presigned) (*protocol.Binding, string) {
			b := r.use("alpha", "m", p.id, p.signers...)
			b.Operation = opOnlineDigest
			return b, ""
		},
		"another epoch": func(p *presigned) (*protocol.Binding, string) {
			b := r.use("alpha", "m", p.id, p.signers...)
			b.Epoch[1]++
			return b, "m"
		},
	} {
		t.Run("one of its own with "+name, func(t *testing.T) {
			p := own()
			before := held()
			b, message := wrong(p)
			r.open("alpha", b, []byte(message))
			r.hears("a refusal", "alpha", endOf(b.ID()))
			good := r.use("alpha", "good", p.id, p.signers...)
			r.open("alpha", good, []byte("good"))
			if f := r.hears("an end", "alpha", endOf(good.ID())); f.GetEnd().Reason != reasonNoPresignature {
				t.Errorf("after a refusal the presignature is used: %v", f)
			}
			if shares(b)+shares(good) > 0 || held() != before-1 {
				t.Errorf("%d shares sent, %d of %d presignatures left", shares(b)+shares(good), held(), before)
			}
			p.discard()
		})
	}
	t.Run("one that alpha owns", func(t *testing.T) {
		p := theirs()
		before := held()
		b := r.use("alpha", "m", p.id, p.signers...)
		r.open("alpha", b, []byte("m"))
		if f := r.hears("an end", "alpha", endOf(b.ID())); f.GetEnd().Reason != reasonNoPresignature {
			t.Errorf("ended with %v", f)
		}
		if shares(b) > 0 || held() != before {
			t.Errorf("%d shares sent, %d of %d presignatures left", shares(b), held(), before)
		}
		l.key("alpha").active.Load().stock.drop("gamma")
		p.discard()
	})
	for name, lie := range map[string]func(f *peerpb.Step){
		"control: none": func(*peerpb.Step) {},
		"a wrong share": func(f *peerpb.Step) { f.Body[len(f.Body)-1] ^= 1 },
		"a cut message": func(f *peerpb.Step) { f.Body = f.Body[:5] },
		"another round": func(f *peerpb.Step) { f.Round = 2 },
	} {
		t.Run("alpha asks and gets "+name, func(t *testing.T) {
			p := theirs()
			r.react(func(_ protocol.HostID, f *peerpb.Frame) {
				open := f.GetOpen()
				if open == nil {
					return
				}
				go func() {
					b := r.binding(open)
					if b.Operation != opOnline {
						_ = r.net.Send("alpha", endFrame(b.ID(), reasonRefused, "not now"))
						return
					}
					box, err := r.sessions.open(b.ID(), r.self, b.Parties)
					if err != nil {
						t.Error(err)
						return
					}
					defer r.sessions.close(box)
					_ = r.net.Send("alpha", readyFrame(box.id))
					early, err := gather(l.ctx, box, box.parties)
					if err != nil {
						t.Error(err)
						return
					}
					session, err := p.sign(box.id, sha256.Sum256(open.Message))
					if err != nil {
						t.Error(err)
						return
					}
					defer session.Close()
					_ = drive(l.ctx, r.self, session, box, func(to protocol.HostID, f *peerpb.Frame) error {
						if step := f.GetStep(); step != nil {
							lie(step)
						}
						return r.net.Send(to, f)
					}, early)
				}()
			})
			defer r.react(nil)
			said := len(l.hosts["alpha"].log.String())
			signers, err := l.sign("alpha", fmt.Append(nil, name, rand.Text()))
			ok(t, err)
			text := l.hosts["alpha"].log.String()[said:]
			if strings.HasPrefix(name, "control") {
				if !slices.Contains(signers, "gamma") {
					t.Errorf("signed by %q: gamma was not asked, and what follows shows nothing", signers)
				}
				return
			}
			if !slices.Equal(signers, []string{"alpha", "beta"}) || !strings.Contains(text, `host \"gamma\"`) {
				t.Errorf("signed by %q; logged %q, want host gamma named", signers, text)
			}
		})
	}
}
