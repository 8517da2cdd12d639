package dealing_test

import (
	"bytes"
	"crypto/ed25519"
	"crypto/sha256"
	"errors"
	mathrand "math/rand/v2"
	"slices"
	"strings"
	"testing"

	ed "filippo.io/edwards25519"

	"conseal/protocol"
	"conseal/protocol/dealing"
	"conseal/protocol/frost"
	"conseal/protocol/protocoltest"
)

// run is one resharing: of a key of a, b and c by a and b, to b, c and d.
type run struct {
	configs map[protocol.HostID]frost.ReshareConfig
	net     protocoltest.Network[*frost.Reshare]
	gave    bool // the honest dealer sent a value
}

const (
	honest = protocol.HostID("a") // a dealer that gets no share
	liar   = protocol.HostID("b") // a dealer that gets one
	victim = protocol.HostID("c")
)

var oldShares = func() map[protocol.HostID]*frost.Share {
	t, hosts := protocoltest.Aside{}, protocoltest.Hosts(3)
	net := protocoltest.Connect(t, hosts, func(id protocol.SessionID, h protocol.HostID) (*frost.Keygen, error) {
		return frost.NewKeygen(frost.KeygenConfig{Session: id, Self: h, Holders: hosts, Quorum: 2})
	})
	net.MustRun(t)
	return protocoltest.Shares(t, net.Sessions, hosts)
}()

func newRun(t testing.TB, session protocol.SessionID) *run {
	t.Helper()
	r := &run{configs: map[protocol.HostID]frost.ReshareConfig{}}
	dealers, holders := []protocol.HostID{"a", "b"}, []protocol.HostID{"b", "c", "d"}
	r.net = protocoltest.Connect(t, protocoltest.Hosts(4), func(_ protocol.SessionID, h protocol.HostID) (*frost.Reshare, error) {
		cfg := frost.ReshareConfig{Plan: protocoltest.Plan(session, h, dealers, holders, 2), Old: oldShares["a"].Group}
		if slices.Contains(dealers, h) {
			cfg.Share = oldShares[h]
		}
		r.configs[h] = cfg
		return frost.NewReshare(cfg)
	})
	for _, s := range r.net.Sessions {
		t.Cleanup(s.Close)
	}
	return r
}

// sign is a body of round 1 whose content is signed by the liar.
func (r *run) sign(content []byte) []byte {
	digest := r.net.Sessions[liar].ToSign(liar, content)
	return append(bytes.Clone(content), ed25519.Sign(protocoltest.Identity(liar), digest[:])...)
}

// content is a body of round 1 without its signature.
func content(body []byte) []byte { return bytes.Clone(body[:len(body)-ed25519.SignatureSize]) }

// changed is a body of round 1 with other content, signed.
func (r *run) changed(change func(content []byte)) func(body []byte) []byte {
	return func(body []byte) []byte {
		c := content(body)
		change(c)
		return r.sign(c)
	}
}

// echoing is the liar's echo, with its own dealing as it sent it.
func (r *run) echoing(echo []byte, sent []byte) []byte {
	digest := dealing.ContentDigest(content(sent))
	at := len(echo) - len(digest) - 2 - ed25519.SignatureSize
	return slices.Concat(echo[:at], digest[:], []byte{0, ed25519.SignatureSize}, sent[len(sent)-ed25519.SignatureSize:])
}

// hashAt is where the hash of the value for the victim is in a dealing's content.
const hashAt = 2*32 + 1*sha256.Size

// badShare has the liar deal the victim a wrong value, under a hash that fits it.
func badShare(r *run, bad func(opening []byte)) func(m protocol.Message) []byte {
	opening := bytes.Repeat([]byte{5}, 64)
	bad(opening)
	dealt := r.changed(func(c []byte) {
		hash := r.net.Sessions[liar].Hide(liar, 1, opening)
		copy(c[hashAt:], hash[:])
	})
	var sent []byte
	return func(m protocol.Message) []byte {
		switch {
		case m.Round == 1:
			sent = dealt(m.Body)
			return sent
		case m.Round == 2:
			return r.echoing(m.Body, sent)
		case m.Round == 3 && m.To == victim:
			return opening
		}
		return m.Body
	}
}

// expectation is what comes of an attack: who of the others can find the liar out, and
// by which kind of complaint, 0 for none.
type expectation struct {
	named []protocol.HostID
	kind  byte
}

func inRound(round uint16, change func(body []byte) []byte) func(*run) func(m protocol.Message) []byte {
	return func(*run) func(m protocol.Message) []byte {
		return func(m protocol.Message) []byte {
			if m.Round == round {
				return change(m.Body)
			}
			return m.Body
		}
	}
}

// resigned changes the content of the liar's dealing to all, or to one host.
func resigned(to protocol.HostID, change func(content []byte)) func(*run) func(m protocol.Message) []byte {
	return func(r *run) func(m protocol.Message) []byte {
		var sent []byte
		return func(m protocol.Message) []byte {
			switch {
			case m.Round == 1 && (to == "" || m.To == to):
				sent = r.changed(change)(m.Body)
				return sent
			case m.Round == 2 && to == "":
				return r.echoing(m.Body, sent)
			}
			return m.Body
		}
	}
}

func point(n byte) []byte {
	s, err := ed.NewScalar().SetCanonicalBytes(append([]byte{n}, make([]byte, 31)...))
	if err != nil {
		panic(err)
	}
	return new(ed.Point).ScalarBaseMult(s).Bytes()
}

// attacks are what the liar does with its messages.
var attacks = map[string]struct {
	do   func(r *run) func(m protocol.Message) []byte
	want expectation
}{
	"another constant":           {resigned("", func(c []byte) { copy(c, point(9)) }), expectation{everybody, dealing.WrongDealing}},
	"a constant of zero":         {resigned("", func(c []byte) { copy(c, ed.NewIdentityPoint().Bytes()) }), expectation{everybody, dealing.WrongDealing}},
	"a coefficient of zero":      {resigned("", func(c []byte) { copy(c[32:], ed.NewIdentityPoint().Bytes()) }), expectation{everybody, dealing.WrongDealing}},
	"a point of small order":     {resigned("", func(c []byte) { clear(c[32:64]) }), expectation{everybody, dealing.WrongDealing}},
	"a point not canonical":      {resigned("", func(c []byte) { copy(c[32:], bytes.Repeat([]byte{0xff}, 32)) }), expectation{everybody, dealing.WrongDealing}},
	"a constant's other sign":    {resigned("", func(c []byte) { c[31] ^= 0x80 }), expectation{everybody, dealing.WrongDealing}},
	"another constant to one":    {resigned(victim, func(c []byte) { copy(c, point(9)) }), expectation{[]protocol.HostID{victim}, dealing.WrongDealing}},
	"two dealings":               {resigned(victim, func(c []byte) { copy(c[32:], point(9)) }), expectation{everybody, dealing.TwoDealings}},
	"two dealings, by a hash":    {resigned(victim, func(c []byte) { c[len(c)-1] ^= 1 }), expectation{everybody, dealing.TwoDealings}},
	"another coefficient to all": {resigned("", func(c []byte) { copy(c[32:], point(9)) }), expectation{[]protocol.HostID{victim, "d"}, dealing.WrongShare}},
	"an unsigned change":         {inRound(1, func(b []byte) []byte { b[40] ^= 1; return b }), expectation{everybody, 0}},
	"a changed signature":        {inRound(1, func(b []byte) []byte { b[len(b)-1] ^= 1; return b }), expectation{everybody, 0}},
	"a longer polynomial":        {inRound(1, func(b []byte) []byte { return append(point(9), b...) }), expectation{everybody, 0}},
	"a much longer polynomial":   {inRound(1, func(b []byte) []byte { return append(bytes.Repeat(point(9), 100), b...) }), expectation{everybody, 0}},
	"a shorter polynomial":       {inRound(1, func(b []byte) []byte { return b[32:] }), expectation{everybody, 0}},
	"no signature":               {inRound(1, content), expectation{everybody, 0}},
	"an empty dealing":           {inRound(1, func([]byte) []byte { return nil }), expectation{everybody, 0}},
	"an empty echo":              {inRound(2, func([]byte) []byte { return nil }), expectation{everybody, 0}},
	"a short echo":               {inRound(2, func(b []byte) []byte { return b[:len(b)-1] }), expectation{everybody, 0}},
	"a long echo":                {inRound(2, func(b []byte) []byte { return append(b, 0) }), expectation{everybody, 0}},
	"an echo without signatures": {inRound(2, func(b []byte) []byte { clear(b[32:34]); return b }), expectation{everybody, 0}},
	"an echo of one dealing":     {inRound(2, func(b []byte) []byte { return append(b[:98:98], b[:98]...) }), expectation{everybody, 0}},
	// The echo accuses the honest dealer of another dealing, which it did not sign.
	"an echo that accuses": {inRound(2, func(b []byte) []byte { b[0] ^= 1; return b }), expectation{everybody, 0}},
	// The value is not the one that the dealing has the hash of: nothing proves it to others.
	"a wrong share":        {inRound(3, func(b []byte) []byte { b[0] ^= 1; return b }), expectation{[]protocol.HostID{victim, "d"}, 0}},
	"a wrong salt":         {inRound(3, func(b []byte) []byte { b[63] ^= 1; return b }), expectation{[]protocol.HostID{victim, "d"}, 0}},
	"a short share":        {inRound(3, func(b []byte) []byte { return b[:63] }), expectation{[]protocol.HostID{victim, "d"}, 0}},
	"a signed wrong share": {func(r *run) func(protocol.Message) []byte { return badShare(r, func(o []byte) { clear(o[8:32]) }) }, expectation{[]protocol.HostID{victim}, dealing.WrongShare}},
	"a signed zero share":  {func(r *run) func(protocol.Message) []byte { return badShare(r, func(o []byte) { clear(o[:32]) }) }, expectation{[]protocol.HostID{victim}, dealing.WrongShare}},
	"a signed share that is none": {
		func(r *run) func(protocol.Message) []byte {
			return badShare(r, func(o []byte) { copy(o, bytes.Repeat([]byte{0xff}, 32)) })
		}, expectation{[]protocol.HostID{victim}, dealing.WrongShare},
	},
}

var everybody = []protocol.HostID{"a", "c", "d"}

// attack runs a resharing with an attack.
func attack(t testing.TB, r *run, do func(r *run) func(protocol.Message) []byte) map[protocol.HostID]error {
	t.Helper()
	change := do(r)
	var original []byte
	r.net.Alter = func(m protocol.Message) []protocol.Message {
		r.gave = r.gave || m.From == honest && m.Round == 3
		switch {
		case m.From == liar:
			if m.Round == 1 {
				original = bytes.Clone(m.Body)
			}
			m.Body = change(m)
		case m.To == liar && m.Round == 2: // it does not fall out with itself
			m.Body = r.echoing(m.Body, original)
		}
		return []protocol.Message{m}
	}
	failed, _ := r.net.Run(t)
	return failed
}

// TestLiars: whoever is named is the liar. Who can find it out names it, or waits for one
// that has done so; where there is proof, a host that took no part believes it.
func TestLiars(t *testing.T) {
	for name, a := range attacks {
		t.Run(name, func(t *testing.T) {
			r := newRun(t, protocol.SessionID{2})
			failed, found := attack(t, r, a.do), false
			for _, h := range everybody {
				var fault *protocol.Fault
				var complaint *dealing.Complaint
				named := errors.As(failed[h], &fault)
				proven := errors.As(failed[h], &complaint)
				if named && fault.Host != liar {
					t.Errorf("%s blames %s: %v", h, fault.Host, failed[h])
				}
				if may := slices.Contains(a.want.named, h); named && !may || failed[h] != nil && !named {
					t.Errorf("%s fails, and should not, or without a name: %v", h, failed[h])
				}
				if proven != (named && a.want.kind != 0) || proven && complaint.Kind() != a.want.kind {
					t.Errorf("%s has a proof: %v, want kind %d: %v", h, proven, a.want.kind, failed[h])
				}
				if proven && !found {
					convinces(t, r, complaint)
				}
				found = found || named
				if slices.Contains(a.want.named, h) {
					if _, err := r.net.Sessions[h].Result(); err == nil {
						t.Errorf("%s has a share", h)
					}
				}
			}
			if r.gave && slices.Contains(a.want.named, honest) || !r.gave && a.want.kind == dealing.WrongShare {
				t.Errorf("the honest dealer sent values: %v", r.gave)
			}
			if !found {
				t.Errorf("nobody names the liar: %v", failed)
			}
		})
	}
}

// convinces has a host that knows only what is public judge a complaint, and every
// change of it.
func convinces(t *testing.T, r *run, c *dealing.Complaint) {
	t.Helper()
	public := r.configs[victim]
	public.Self, public.Share, public.Sign = "z", nil, nil
	judge := func(cfg frost.ReshareConfig, encoded []byte) error {
		c, err := dealing.DecodeComplaint(encoded)
		if err != nil {
			return err
		}
		if !bytes.Equal(c.Encode(), encoded) {
			t.Error("a complaint does not encode back")
		}
		return dealing.VerifyComplaint(cfg, c)
	}
	encoded := c.Encode()
	if err := judge(public, encoded); err != nil {
		t.Fatalf("a third host does not believe: %v", err)
	}
	for i := 0; i < len(encoded); i += 1 + mathrand.IntN(8) {
		changed := bytes.Clone(encoded)
		changed[i] ^= 1
		if judge(public, changed) == nil {
			t.Errorf("byte %d of the complaint changed: believed", i)
		}
	}
	for _, b := range [][]byte{nil, encoded[:1], encoded[:len(encoded)-1], append(bytes.Clone(encoded), 0), make([]byte, 1<<17)} {
		if _, err := dealing.DecodeComplaint(b); err == nil {
			t.Errorf("%d bytes are a complaint", len(b))
		}
	}
	for name, change := range map[string]func(*frost.ReshareConfig){
		"session": func(cfg *frost.ReshareConfig) { cfg.Session[0]++ },
		"holders": func(cfg *frost.ReshareConfig) { cfg.Holders = []protocol.HostID{"b", "c", "e"} },
		"dealers": func(cfg *frost.ReshareConfig) { cfg.Dealers = []protocol.HostID{"b", "c"} },
		"quorum":  func(cfg *frost.ReshareConfig) { cfg.Quorum = 3 },
	} {
		other := public
		change(&other)
		if judge(other, encoded) == nil {
			t.Errorf("believed in a session of other %s", name)
		}
	}
}

// TestForgedComplaints makes every complaint about an honest dealer that a receiver
// can make.
func TestForgedComplaints(t *testing.T) {
	r := newRun(t, protocol.SessionID{3})
	var dealt, opening []byte
	r.net.Alter = func(m protocol.Message) []protocol.Message {
		if m.From == honest && m.To == victim {
			switch m.Round {
			case 1:
				dealt = bytes.Clone(m.Body)
			case 3:
				opening = bytes.Clone(m.Body)
			}
		}
		return []protocol.Message{m}
	}
	r.net.MustRun(t)
	c, signature := content(dealt), dealt[len(dealt)-ed25519.SignatureSize:]
	digest := func(content []byte) []byte {
		h := sha256.Sum256(append([]byte("\x00\x00\x00\x1aconseal dealing content v1"), content...))
		return h[:]
	}
	other := bytes.Clone(c)
	other[40] ^= 1
	changed := bytes.Clone(opening)
	changed[0] ^= 1
	for _, x := range []struct {
		name      string
		complaint *dealing.Complaint
		want      string
	}{
		{"a right dealing", dealing.NewComplaint(dealing.WrongDealing, honest, c, signature), "the dealing is right"},
		{"a changed dealing", dealing.NewComplaint(dealing.WrongDealing, honest, other, signature), "not signed"},
		{"no dealing", dealing.NewComplaint(dealing.WrongDealing, honest, nil, nil), "not signed"},
		{"another's dealing", dealing.NewComplaint(dealing.WrongDealing, liar, c, signature), "not signed"},
		{"a host that does not deal", dealing.NewComplaint(dealing.WrongDealing, victim, c, signature), "no dealer"},
		{"parts that are missing", dealing.NewComplaint(dealing.WrongShare, honest, c, signature), "no dealer"},
		{"a kind that is none", dealing.NewComplaint(9, honest, c, signature), "no dealer"},
		{"a right share", dealing.NewComplaint(dealing.WrongShare, honest, c, signature, []byte(victim), opening), "the share is right"},
		{"a changed share", dealing.NewComplaint(dealing.WrongShare, honest, c, signature, []byte(victim), changed), "not the one"},
		{"another's share", dealing.NewComplaint(dealing.WrongShare, honest, c, signature, []byte("d"), opening), "not the one"},
		{"a share of no holder", dealing.NewComplaint(dealing.WrongShare, honest, c, signature, []byte("z"), opening), "no holder"},
		{"no share", dealing.NewComplaint(dealing.WrongShare, honest, c, signature, []byte(victim), nil), "not the one"},
		{"one dealing twice", dealing.NewComplaint(dealing.TwoDealings, honest, digest(c), signature, digest(c), signature), "the same"},
		{"a dealing it never signed", dealing.NewComplaint(dealing.TwoDealings, honest, digest(c), signature, digest(other), signature), "not signed"},
		{"no digests", dealing.NewComplaint(dealing.TwoDealings, honest, nil, signature, []byte{1}, signature), "no digest"},
	} {
		if err := dealing.VerifyComplaint(r.configs[victim], x.complaint); err == nil || !strings.Contains(err.Error(), x.want) {
			t.Errorf("%s: %v, want %q", x.name, err, x.want)
		}
	}
}

// TestDealingOfAnotherSession replays a dealer's dealing.
func TestDealingOfAnotherSession(t *testing.T) {
	first := newRun(t, protocol.SessionID{4})
	var old []byte
	first.net.Alter = func(m protocol.Message) []protocol.Message {
		if m.Round == 1 && m.From == liar {
			old = bytes.Clone(m.Body)
		}
		return []protocol.Message{m}
	}
	first.net.MustRun(t)
	second := newRun(t, protocol.SessionID{5})
	failed := attack(t, second, inRound(1, func([]byte) []byte { return bytes.Clone(old) }))
	for _, h := range everybody {
		var fault *protocol.Fault
		if !errors.As(failed[h], &fault) || fault.Host != liar {
			t.Errorf("%s: %v", h, failed[h])
		}
	}
}

// TestSecretsAreWiped: of sessions that ended well, failed, and were given up.
func TestSecretsAreWiped(t *testing.T) {
	good := newRun(t, protocol.SessionID{6})
	good.net.MustRun(t)
	if n := good.net.Sessions[victim].Kept(); n != 1 {
		t.Errorf("a holder that is done keeps %d secrets, want its share", n)
	}
	bad := newRun(t, protocol.SessionID{7})
	failed := attack(t, bad, resigned("", func(c []byte) { copy(c, point(9)) }))
	given := newRun(t, protocol.SessionID{8})
	if _, err := given.net.Sessions[liar].Start(); err != nil {
		t.Fatal(err)
	}
	if given.net.Sessions[liar].Kept() == 0 {
		t.Error("a dealer keeps nothing: the test is not what it says")
	}
	for h := range failed {
		if n := bad.net.Sessions[h].Kept(); n != 0 {
			t.Errorf("%s, which failed, keeps %d secrets", h, n)
		}
	}
	for _, r := range []*run{good, given} {
		for h, s := range r.net.Sessions {
			s.Close()
			s.Close()
			if n := s.Kept(); n != 0 {
				t.Errorf("%s keeps %d secrets", h, n)
			}
			if _, err := s.Start(); err == nil {
				t.Errorf("%s starts when closed", h)
			}
		}
	}
}

// TestSigningFails: a host that cannot sign as the others verify deals nothing.
func TestSigningFails(t *testing.T) {
	for name, sign := range map[string]func([32]byte) ([]byte, error){
		"an error":       func([32]byte) ([]byte, error) { return nil, errors.New("the TPM is busy") },
		"nothing":        func([32]byte) ([]byte, error) { return nil, nil },
		"much too much":  func([32]byte) ([]byte, error) { return make([]byte, 513), nil },
		"of another key": func(d [32]byte) ([]byte, error) { return ed25519.Sign(protocoltest.Identity("z"), d[:]), nil },
	} {
		cfg := newRun(t, protocol.SessionID{9}).configs[liar]
		cfg.Sign = sign
		s, err := frost.NewReshare(cfg)
		if err != nil {
			t.Fatal(err)
		}
		ready, err := s.Start()
		if err == nil || len(ready.Send) > 0 || s.Kept() > 0 {
			t.Errorf("%s: %v, %d messages, keeps %d", name, err, len(ready.Send), s.Kept())
		}
	}
}

// TestProgress names who is missing.
func TestProgress(t *testing.T) {
	r := newRun(t, protocol.SessionID{10})
	r.net.Alter = func(m protocol.Message) []protocol.Message {
		if m.From == "d" && m.To == victim {
			return nil
		}
		return []protocol.Message{m}
	}
	if failed, waiting := r.net.Run(t); len(failed) > 0 || !slices.Equal(waiting, []protocol.HostID{victim}) {
		t.Fatalf("failed %v, waiting %v", failed, waiting)
	}
	round, rounds, missing := r.net.Sessions[victim].Progress()
	if round != 2 || rounds != 3 || !slices.Equal(missing, []protocol.HostID{"d"}) {
		t.Errorf("round %d of %d, missing %q", round, rounds, missing)
	}
	if _, err := r.net.Sessions[victim].Transcript(); err == nil {
		t.Error("a transcript that is not agreed on")
	}
}

// FuzzComplaint: what is decoded encodes back, and nothing that is not signed twice or
// wrongly convinces anybody.
func FuzzComplaint(f *testing.F) {
	r := newRun(f, protocol.SessionID{11})
	r.net.Alter = func(m protocol.Message) []protocol.Message {
		if m.To == victim && m.Round == 1 {
			f.Add(dealing.NewComplaint(dealing.WrongDealing, m.From, content(m.Body), m.Body[len(m.Body)-64:]).Encode())
			f.Add(dealing.NewComplaint(dealing.WrongShare, m.From, content(m.Body), m.Body[len(m.Body)-64:], []byte(victim), make([]byte, 64)).Encode())
			f.Add(dealing.NewComplaint(dealing.TwoDealings, m.From, make([]byte, 32), m.Body[len(m.Body)-64:], make([]byte, 32), nil).Encode())
		}
		return []protocol.Message{m}
	}
	if failed, _ := r.net.Run(f); len(failed) > 0 {
		f.Fatal(failed)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		c, err := dealing.DecodeComplaint(b)
		if err != nil {
			return
		}
		if !bytes.Equal(c.Encode(), b) {
			t.Errorf("%x encodes back as %x", b, c.Encode())
		}
		if dealing.VerifyComplaint(r.configs[victim], c) == nil {
			t.Errorf("an honest dealer is blamed: %x", b)
		}
	})
}

// FuzzStep cuts out some of one message of the liar to the victim and puts in
// something else. Whatever it is, the victim blames nobody else, and has a share only
// if what changed does not count.
func FuzzStep(f *testing.F) {
	for round := range uint16(4) {
		f.Add(round, uint16(0), uint16(1), []byte{7})
		f.Add(round, uint16(40), uint16(32), point(9))
		f.Add(round, uint16(0), uint16(32), []byte{})
		f.Add(round, uint16(63), uint16(0), []byte{0})
	}
	f.Fuzz(func(t *testing.T, round, at, cut uint16, insert []byte) {
		r := newRun(t, protocol.SessionID{12})
		changed := false
		failed := attack(t, r, func(*run) func(protocol.Message) []byte {
			return func(m protocol.Message) []byte {
				if m.Round != round || m.To != victim {
					return m.Body
				}
				from := min(int(at), len(m.Body))
				body := slices.Concat(m.Body[:from], insert, m.Body[min(from+int(cut), len(m.Body)):])
				changed = !bytes.Equal(body, m.Body)
				return body
			}
		})
		var fault *protocol.Fault
		if errors.As(failed[victim], &fault) && fault.Host != liar {
			t.Errorf("blames %s: %v", fault.Host, failed[victim])
		}
		if _, err := r.net.Sessions[victim].Result(); err == nil && changed && round != 2 {
			t.Errorf("a share after a changed message of round %d", round)
		}
		for h, s := range r.net.Sessions {
			if share, err := s.Result(); err == nil {
				if share.Group.PublicKey != oldShares["a"].Group.PublicKey {
					t.Errorf("%s has another public key", h)
				}
				share.Wipe()
			}
			s.Close()
		}
	})
}
