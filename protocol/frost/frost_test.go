package frost

import (
	"bytes"
	"crypto/ed25519"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"

	ed "filippo.io/edwards25519"
	"pgregory.net/rapid"

	"conseal/protocol"
	"conseal/protocol/dealing"
	"conseal/protocol/protocoltest"
)

var testSession = protocol.SessionID{7}

func hostNames(n int) (out []protocol.HostID) {
	for i := range n {
		out = append(out, protocol.HostID(fmt.Sprintf("h%03d", i)))
	}
	return out
}

// network carries messages between sessions; tamper may change, drop (nil) or
// multiply each one.
type network struct {
	sessions map[protocol.HostID]protocol.Session
	queue    []protocol.Message
	pick     func(n int) int
	tamper   func(m protocol.Message) []protocol.Message
	errs     map[protocol.HostID]error
}

func (n *network) push(ms []protocol.Message) {
	for _, m := range ms {
		m.Body = bytes.Clone(m.Body)
		if n.tamper == nil {
			n.queue = append(n.queue, m)
			continue
		}
		n.queue = append(n.queue, n.tamper(m)...)
	}
}

func (n *network) run() {
	n.errs = map[protocol.HostID]error{}
	step := func(h protocol.HostID, ready protocol.Ready, err error) {
		if err != nil && n.errs[h] == nil {
			n.errs[h] = err
		}
		n.push(ready.Send)
		if w, ok := n.sessions[h].(protocol.Worker); ok && err == nil {
			if err := w.Work(); err != nil {
				n.errs[h] = err
			}
		}
	}
	names := make([]protocol.HostID, 0, len(n.sessions))
	for h := range n.sessions {
		names = append(names, h)
	}
	slices.Sort(names)
	for _, h := range names {
		ready, err := n.sessions[h].Start()
		step(h, ready, err)
	}
	for len(n.queue) > 0 {
		i := 0
		if n.pick != nil {
			i = n.pick(len(n.queue))
		}
		m := n.queue[i]
		n.queue = slices.Delete(n.queue, i, i+1)
		if n.errs[m.To] != nil { // the driver gave up
			continue
		}
		ready, err := n.sessions[m.To].Step(m)
		step(m.To, ready, err)
	}
}

// connect makes the sessions of a network.
func connect[S protocol.Session](t testing.TB, hosts []protocol.HostID, build func(_ protocol.SessionID, h protocol.HostID) (S, error)) *network {
	t.Helper()
	return &network{sessions: protocoltest.Connect(t, hosts, build).Untyped()}
}

// ended are the sessions of a network that was run and in which nothing failed.
func ended[S protocol.Session](t testing.TB, net *network) map[protocol.HostID]S {
	t.Helper()
	if len(net.errs) > 0 {
		t.Fatal(net.errs)
	}
	out := map[protocol.HostID]S{}
	for h, s := range net.sessions {
		out[h] = s.(S)
	}
	return out
}

func keygens(t testing.TB, quorum, n int) *network {
	t.Helper()
	return connect(t, hostNames(n), func(_ protocol.SessionID, h protocol.HostID) (*Keygen, error) {
		return NewKeygen(KeygenConfig{Session: testSession, Self: h, Holders: hostNames(n), Quorum: quorum})
	})
}

// close wipes what the sessions hold: each locked secret is a mapping, of which a
// process has 65,530 at most.
func (n *network) close() {
	for _, s := range n.sessions {
		s.Close()
	}
}

func shares(t testing.TB, net *network) map[protocol.HostID]*Share {
	t.Helper()
	sessions := ended[*Keygen](t, net)
	for h, k := range sessions {
		if k.echo == ([32]byte{}) {
			t.Fatalf("%s has no transcript", h)
		}
	}
	return protocoltest.Shares(t, sessions, hostNames(len(sessions)))
}

func signs(t testing.TB, group map[protocol.HostID]*Share, signers []protocol.HostID, coordinator protocol.HostID, message []byte) *network {
	t.Helper()
	parties := slices.Clone(signers)
	if !slices.Contains(parties, coordinator) {
		parties = append(parties, coordinator)
	}
	return connect(t, parties, func(_ protocol.SessionID, h protocol.HostID) (*Sign, error) {
		return NewSign(SignConfig{Session: testSession, Self: h, Coordinator: coordinator, Signers: signers, Group: group[h].Group, Share: group[h], Message: message})
	})
}

func TestVectorsOfRFC9591(t *testing.T) {
	var v struct {
		PublicKey string `json:"public_key"`
		Message   string
		Shares    []string
		Signers   []struct {
			Identifier int
			HR         string `json:"hiding_randomness"`
			BR         string `json:"binding_randomness"`
			HN         string `json:"hiding_nonce"`
			BN         string `json:"binding_nonce"`
			HC         string `json:"hiding_commitment"`
			BC         string `json:"binding_commitment"`
			Share      string `json:"signature_share"`
		}
		Signature string
	}
	file, err := os.ReadFile("testdata/rfc9591-e1.json")
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(file, &v); err != nil {
		t.Fatal(err)
	}
	un := func(s string) []byte {
		b, err := hex.DecodeString(s)
		if err != nil || len(b) == 0 {
			t.Fatalf("%q: %v", s, err)
		}
		return b
	}
	equal := func(what string, got []byte, want string) {
		t.Helper()
		if want != "" && hex.EncodeToString(got) != want {
			t.Errorf("%s: got %x, want %s", what, got, want)
		}
	}
	var points []*ed.Point
	for _, s := range v.Shares {
		x, err := decodeScalar(un(s))
		if err != nil {
			t.Fatal(err)
		}
		points = append(points, new(ed.Point).ScalarBaseMult(x))
	}
	public, err := decodePoint(un(v.PublicKey))
	if err != nil {
		t.Fatal(err)
	}
	group := newGroup(2, hostNames(3), public, points)
	if err := group.consistent(); err != nil {
		t.Fatal(err)
	}
	signers := []protocol.HostID{"h000", "h002"}
	net := &network{sessions: map[protocol.HostID]protocol.Session{}}
	for i, h := range signers {
		in := v.Signers[i]
		share, err := LoadShare(group, h, un(v.Shares[in.Identifier-1]))
		if err != nil {
			t.Fatal(err)
		}
		s, err := NewSign(SignConfig{Session: testSession, Self: h, Coordinator: "h000", Signers: signers, Group: group, Share: share, Message: un(v.Message)})
		if err != nil {
			t.Fatal(err)
		}
		if s.nonces, err = commitWith(share, un(in.HR), un(in.BR)); err != nil {
			t.Fatal(err)
		}
		s.started = true // with the vector's nonces
		equal("hiding nonce", s.nonces.hiding.Bytes(), in.HN)
		equal("binding nonce", s.nonces.binding.Bytes(), in.BN)
		equal("hiding commitment", s.nonces.commitment[:32], in.HC)
		equal("binding commitment", s.nonces.commitment[32:], in.BC)
		net.sessions[h] = s
	}
	first, third := net.sessions["h000"].(*Sign), net.sessions["h002"].(*Sign)
	ready, err := first.Step(third.mail.Message("h000", roundCommit, third.nonces.commitment[:]))
	if err != nil || len(ready.Send) != 1 {
		t.Fatal(ready, err)
	}
	if err := first.Work(); err != nil {
		t.Fatal(err)
	}
	equal("share of 1", first.own.Bytes(), v.Signers[0].Share)
	answer, err := third.Step(ready.Send[0])
	if err != nil {
		t.Fatal(err)
	}
	equal("share of 3", answer.Send[0].Body, v.Signers[1].Share)
	if done, err := first.Step(answer.Send[0]); err != nil || !done.Done {
		t.Fatal(done, err)
	}
	sig, err := first.Signature()
	if err != nil {
		t.Fatal(err)
	}
	equal("signature", sig, v.Signature)
}

// TestAnyQuorumSigns draws group, delivery order, signers and message.
func TestAnyQuorumSigns(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		n := rapid.IntRange(2, 6).Draw(rt, "holders")
		quorum := rapid.IntRange(2, n).Draw(rt, "quorum")
		pick := func(n int) int { return rapid.IntRange(0, n-1).Draw(rt, "next") }
		net := keygens(t, quorum, n)
		net.pick = pick
		net.run()
		group := shares(t, net)
		var encoded []byte
		for h, s := range group {
			if e := s.Group.Encode(); encoded != nil && !bytes.Equal(e, encoded) {
				rt.Fatalf("%s has another group", h)
			} else {
				encoded = e
			}
			decoded, err := DecodeGroup(s.Group.Encode())
			if err != nil {
				rt.Fatal(err)
			}
			secret, err := s.Secret()
			if err != nil {
				rt.Fatal(err)
			}
			err = secret.Use(func(b []byte) error { _, err := LoadShare(decoded, h, b); return err })
			if err != nil {
				rt.Fatal(err)
			}
		}
		signers := slices.Clone(rapid.Permutation(hostNames(n)).Draw(rt, "signers")[:quorum])
		slices.Sort(signers)
		coordinator := rapid.SampledFrom(hostNames(n)).Draw(rt, "coordinator")
		message := rapid.SliceOfN(rapid.Byte(), 1, 300).Draw(rt, "message")
		signing := signs(t, group, signers, coordinator, message)
		signing.pick = pick
		signing.run()
		sig, err := signing.sessions[coordinator].(*Sign).Signature()
		if err != nil {
			rt.Fatal(err, signing.errs)
		}
		key := group[coordinator].Group.PublicKey
		if !ed25519.Verify(key[:], message, sig) || ed25519.Verify(key[:], append(message, 1), sig) {
			rt.Fatal("crypto/ed25519 disagrees")
		}
	})
}

// TestQuorumIsExact interpolates shares: t of them are the key, t-1 are not.
func TestQuorumIsExact(t *testing.T) {
	net := keygens(t, 3, 5)
	net.run()
	group := shares(t, net)
	interpolate := func(positions []int) [32]byte {
		sum := ed.NewScalar()
		for _, p := range positions {
			err := group[hostNames(5)[p]].use(func(x *ed.Scalar) error {
				sum.MultiplyAdd(lagrange(p, positions, nil), x, sum)
				return nil
			})
			if err != nil {
				t.Fatal(err)
			}
		}
		return [32]byte(new(ed.Point).ScalarBaseMult(sum).Bytes())
	}
	want := group["h000"].Group.PublicKey
	if interpolate([]int{0, 2, 4}) != want || interpolate([]int{1, 2, 3}) != want {
		t.Error("a quorum of shares is not the key")
	}
	if interpolate([]int{0, 2}) == want || interpolate([]int{4}) == want {
		t.Error("fewer than a quorum of shares are the key")
	}
}

// culprit returns the host that an error proves at fault.
func culprit(err error) protocol.HostID {
	var f *protocol.Fault
	if errors.As(err, &f) {
		return f.Host
	}
	return ""
}

// TestTamperedKeygen changes what one holder sends, in every round: nobody ends
// with a share that others do not match, and whoever is named is the liar.
func TestTamperedKeygen(t *testing.T) {
	const liar = protocol.HostID("h001")
	otherPoint := new(ed.Point).ScalarBaseMult(identifier(41)).Bytes()
	for name, test := range map[string]struct {
		round  uint16
		change func(body []byte, to protocol.HostID) []byte
		named  bool // the liar is proven at fault to whoever got it
	}{
		"longer polynomial":  {roundDeal, func(b []byte, _ protocol.HostID) []byte { return append(bytes.Clone(otherPoint), b...) }, true},
		"shorter polynomial": {roundDeal, func(b []byte, _ protocol.HostID) []byte { return b[pointSize:] }, true},
		"empty":              {roundDeal, func([]byte, protocol.HostID) []byte { return nil }, true},
		"identity":           {roundDeal, func(b []byte, _ protocol.HostID) []byte { copy(b, ed.NewIdentityPoint().Bytes()); return b }, true},
		"small order":        {roundDeal, func(b []byte, _ protocol.HostID) []byte { clear(b[pointSize : 2*pointSize]); return b }, true},
		"not canonical": {roundDeal, func(b []byte, _ protocol.HostID) []byte {
			for i := range 32 {
				b[i] = 0xff
			}
			return b
		}, true},
		"foreign constant": {roundDeal, func(b []byte, _ protocol.HostID) []byte { copy(b, otherPoint); return b }, true},
		"bad proof":        {roundDeal, func(b []byte, _ protocol.HostID) []byte { b[len(b)-32] ^= 1; return b }, true},
		"equivocation": {roundDeal, func(b []byte, to protocol.HostID) []byte {
			if to == "h000" {
				copy(b[pointSize:], otherPoint)
			}
			return b
		}, false},
		"lying echo":  {roundEcho, func(b []byte, to protocol.HostID) []byte { b[0] ^= 1; return b }, false},
		"short echo":  {roundEcho, func(b []byte, to protocol.HostID) []byte { return b[:31] }, true},
		"wrong share": {roundShare, func(b []byte, _ protocol.HostID) []byte { b[0] ^= 1; return b }, true},
		"share over the order": {roundShare, func(b []byte, _ protocol.HostID) []byte {
			for i := range b {
				b[i] = 0xff
			}
			return b
		}, true},
		"share of zero": {roundShare, func(b []byte, _ protocol.HostID) []byte { clear(b); return b }, true},
	} {
		t.Run(name, func(t *testing.T) {
			net := keygens(t, 2, 3)
			net.tamper = func(m protocol.Message) []protocol.Message {
				if m.From == liar && m.Round == test.round {
					m.Body = test.change(m.Body, m.To)
				}
				return []protocol.Message{m}
			}
			net.run()
			named := false
			for _, h := range []protocol.HostID{"h000", "h002"} {
				err := net.errs[h]
				if c := culprit(err); c != "" && c != liar {
					t.Errorf("%s blames %s: %v", h, c, err)
				}
				named = named || culprit(err) == liar
				if _, done := net.sessions[h].(*Keygen).Result(); done == nil {
					t.Errorf("%s has a share", h)
				}
			}
			if named != test.named {
				t.Errorf("the liar was named: %v, want %v: %v", named, test.named, net.errs)
			}
		})
	}
}

// TestCopiedProof has a dealer send another's dealing as its own.
func TestCopiedProof(t *testing.T) {
	net := keygens(t, 2, 3)
	var copied []byte
	net.tamper = func(m protocol.Message) []protocol.Message {
		if m.Round == roundDeal && m.From == "h000" {
			copied = m.Body
		}
		if m.Round == roundDeal && m.From == "h001" {
			m.Body = bytes.Clone(copied)
		}
		return []protocol.Message{m}
	}
	net.run()
	for _, h := range []protocol.HostID{"h000", "h002"} {
		if culprit(net.errs[h]) != "h001" {
			t.Errorf("%s: %v", h, net.errs[h])
		}
	}
}

func signingGroup(t testing.TB, quorum, n int) map[protocol.HostID]*Share {
	t.Helper()
	net := keygens(t, quorum, n)
	net.run()
	return shares(t, net)
}

// TestLyingSigners sends wrong signature shares: every liar is named and nobody else.
func TestLyingSigners(t *testing.T) {
	group := signingGroup(t, 4, 5)
	signers := hostNames(4)
	for _, liars := range [][]protocol.HostID{{"h001"}, {"h001", "h003"}, {"h001", "h002", "h003"}} {
		net := signs(t, group, signers, "h000", []byte("m"))
		net.tamper = func(m protocol.Message) []protocol.Message {
			if at := slices.Index(liars, m.From); m.Round == roundSign && at >= 0 {
				z, err := decodeScalar(m.Body)
				if err != nil {
					t.Error(err)
				}
				m.Body = z.Add(z, identifier(at)).Bytes() // no two lies cancel out
			}
			return []protocol.Message{m}
		}
		net.run()
		text := fmt.Sprint(net.errs["h000"])
		for _, h := range signers {
			if strings.Contains(text, fmt.Sprintf("host %q", h)) != slices.Contains(liars, h) {
				t.Errorf("liars %q: %s", liars, text)
			}
		}
		if _, err := net.sessions["h000"].(*Sign).Signature(); err == nil {
			t.Error("there is a signature")
		}
	}
}

// TestMalformedCommitment: the coordinator names the signer that sent it.
func TestMalformedCommitment(t *testing.T) {
	group := signingGroup(t, 3, 3)
	for _, body := range [][]byte{make([]byte, commitmentSize), bytes.Repeat([]byte{0xff}, commitmentSize), make([]byte, 63), nil} {
		net := signs(t, group, hostNames(3), "h000", []byte("m"))
		net.tamper = func(m protocol.Message) []protocol.Message {
			if m.Round == roundCommit && m.From == "h001" {
				m.Body = body
			}
			return []protocol.Message{m}
		}
		net.run()
		if culprit(net.errs["h000"]) != "h001" {
			t.Errorf("%x: %v", body, net.errs["h000"])
		}
	}
}

// TestLyingCoordinator sends lists that are not what the signers committed to.
func TestLyingCoordinator(t *testing.T) {
	group := signingGroup(t, 2, 3)
	for name, change := range map[string]func([]byte) []byte{
		"own commitment changed": func(b []byte) []byte {
			copy(b[commitmentSize:], new(ed.Point).ScalarBaseMult(identifier(8)).Bytes())
			return b
		},
		"own commitment left out": func(b []byte) []byte { copy(b[commitmentSize:], b[:commitmentSize]); return b },
		"a point of small order":  func(b []byte) []byte { clear(b[:pointSize]); return b },
		"too short":               func(b []byte) []byte { return b[:commitmentSize] },
		"empty":                   func([]byte) []byte { return nil },
	} {
		net := signs(t, group, []protocol.HostID{"h000", "h001"}, "h000", []byte("m"))
		leaked := false
		net.tamper = func(m protocol.Message) []protocol.Message {
			if m.Round == roundList {
				m.Body = change(m.Body)
			}
			leaked = leaked || m.Round == roundSign
			return []protocol.Message{m}
		}
		net.run()
		if culprit(net.errs["h001"]) != "h000" || leaked {
			t.Errorf("%s: %v, a share left: %v", name, net.errs["h001"], leaked)
		}
	}
}

// TestNonceServesOnce asks a signer for a second share under the same nonces. As
// a control, three such shares give the secret away.
func TestNonceServesOnce(t *testing.T) {
	group := signingGroup(t, 2, 2)
	signer := signs(t, group, hostNames(2), "h000", []byte("m")).sessions["h001"].(*Sign)
	ready, err := signer.Start()
	if err != nil {
		t.Fatal(err)
	}
	list := func() protocol.Message {
		other, err := commit(group["h000"])
		if err != nil {
			t.Fatal(err)
		}
		return protocol.Message{Session: testSession, From: "h000", To: "h001", Round: roundList, Body: append(other.commitment[:], ready.Send[0].Body...)}
	}
	used := signer.nonces
	kept := *used
	kept.hiding, kept.binding = ed.NewScalar().Set(used.hiding), ed.NewScalar().Set(used.binding)
	first := list()
	if _, err := signer.Step(first); err != nil {
		t.Fatal(err)
	}
	for _, m := range []protocol.Message{first, list()} {
		if r, err := signer.Step(m); err == nil || len(r.Send) > 0 {
			t.Fatal("a second share left the session")
		}
	}
	if used.hiding.Equal(ed.NewScalar()) != 1 || used.binding.Equal(ed.NewScalar()) != 1 || signer.nonces != nil {
		t.Error("the nonces were not wiped")
	}
	// Control: z_k = d + rho_k*e + w_k*x, for three lists, are three equations for d, e and x.
	var z, rho, w [3]*ed.Scalar
	for k := range z {
		s := signs(t, group, hostNames(2), "h000", []byte("m")).sessions["h001"].(*Sign)
		again := kept
		again.hiding, again.binding = ed.NewScalar().Set(kept.hiding), ed.NewScalar().Set(kept.binding)
		s.nonces = &again
		l, err := s.newList(list().Body, 1)
		if err != nil {
			t.Fatal(err)
		}
		if z[k], err = s.share(l, 1); err != nil {
			t.Fatal(err)
		}
		rho[k], w[k] = l.factors[1], ed.NewScalar().Multiply(s.lambda(1), l.challenge)
	}
	minus := func(v [3]*ed.Scalar, k int) *ed.Scalar { return ed.NewScalar().Subtract(v[0], v[k]) }
	cross := func(v [3]*ed.Scalar) *ed.Scalar {
		a, b := ed.NewScalar().Multiply(minus(v, 1), minus(rho, 2)), ed.NewScalar().Multiply(minus(v, 2), minus(rho, 1))
		return a.Subtract(a, b)
	}
	x := ed.NewScalar().Multiply(cross(z), ed.NewScalar().Invert(cross(w)))
	if new(ed.Point).ScalarBaseMult(x).Equal(group["h001"].Group.shares[1]) != 1 {
		t.Error("the control does not find the secret: the attack is not what it says")
	}
}

// TestEnvelopes sends well-formed bodies with wrong envelopes, at wrong times.
func TestEnvelopes(t *testing.T) {
	good := func() (*Keygen, protocol.Message) {
		net := keygens(t, 2, 3)
		k := net.sessions["h000"].(*Keygen)
		if _, err := k.Start(); err != nil {
			t.Fatal(err)
		}
		ready, err := net.sessions["h001"].Start()
		if err != nil {
			t.Fatal(err)
		}
		return k, ready.Send[0] // to h000
	}
	for name, change := range map[string]func(*protocol.Message){
		"another session": func(m *protocol.Message) { m.Session[5]++ },
		"another host's":  func(m *protocol.Message) { m.To = "h002" },
		"a stranger's":    func(m *protocol.Message) { m.From = "eve" },
		"our own":         func(m *protocol.Message) { m.From = "h000" },
		"round 0":         func(m *protocol.Message) { m.Round = 0 },
		"round 3":         func(m *protocol.Message) { m.Round = 3 },
		"round 65535":     func(m *protocol.Message) { m.Round = 65535 },
	} {
		k, m := good()
		change(&m)
		if _, err := k.Step(m); err == nil {
			t.Errorf("%s was taken", name)
		}
	}
	k, m := good()
	if _, err := k.Step(m); err != nil {
		t.Fatal(err)
	}
	if _, err := k.Step(m); err == nil || culprit(err) != "" {
		t.Errorf("a repeated message: %v", err)
	}
	k.Close()
	if _, err := k.Step(m); err == nil {
		t.Error("a closed session took a message")
	}
	fresh := keygens(t, 2, 3).sessions["h000"]
	if _, err := fresh.Step(m); err == nil {
		t.Error("a session that was not started took a message")
	}
}

func TestConfigurationsThatMakeNoSense(t *testing.T) {
	for _, c := range []KeygenConfig{
		{Self: "h000", Holders: hostNames(3), Quorum: 1},
		{Self: "h000", Holders: hostNames(3), Quorum: 4},
		{Self: "h000", Holders: nil, Quorum: 2},
		{Self: "eve", Holders: hostNames(3), Quorum: 2},
		{Self: "h000", Holders: []protocol.HostID{"h000", "h000"}, Quorum: 2},
		{Self: "h000", Holders: []protocol.HostID{"h001", "h000"}, Quorum: 2},
		{Self: "h000", Holders: hostNames(dealing.MaxHolders + 1), Quorum: 2},
	} {
		if _, err := NewKeygen(c); err == nil {
			t.Errorf("%+v was taken", c)
		}
	}
	group := signingGroup(t, 2, 3)
	g := group["h000"].Group
	for _, c := range []SignConfig{
		{Self: "h000", Coordinator: "h000", Signers: hostNames(2), Group: g, Share: group["h000"]},                                            // no message
		{Self: "h000", Coordinator: "h000", Signers: hostNames(3), Group: g, Share: group["h000"], Message: []byte("m")},                      // too many
		{Self: "h000", Coordinator: "h000", Signers: hostNames(1), Group: g, Share: group["h000"], Message: []byte("m")},                      // too few
		{Self: "h000", Coordinator: "h000", Signers: hostNames(2), Group: g, Share: group["h001"], Message: []byte("m")},                      // another's share
		{Self: "h000", Coordinator: "h000", Signers: hostNames(2), Group: g, Message: []byte("m")},                                            // no share
		{Self: "h000", Coordinator: "h000", Signers: []protocol.HostID{"h001", "h001"}, Group: g, Share: group["h000"], Message: []byte("m")}, // twice
		{Self: "h002", Coordinator: "h000", Signers: hostNames(2), Group: g, Share: group["h002"], Message: []byte("m")},                      // no part
		{Self: "h000", Coordinator: "h000", Signers: []protocol.HostID{"eve", "h000"}, Group: g, Share: group["h000"], Message: []byte("m")},  // stranger
	} {
		if _, err := NewSign(c); err == nil {
			t.Errorf("%+v was taken", c)
		}
	}
}

func FuzzDecodeGroup(f *testing.F) {
	f.Add(signingGroup(f, 2, 3)["h000"].Group.Encode())
	f.Add(signingGroup(f, 3, 3)["h000"].Group.Encode())
	f.Fuzz(func(t *testing.T, b []byte) {
		if g, err := DecodeGroup(b); err == nil && !bytes.Equal(g.Encode(), b) {
			t.Errorf("%x encodes back as %x", b, g.Encode())
		}
	})
}

func FuzzKeygenStep(f *testing.F) {
	f.Add(uint16(1), make([]byte, 128))
	f.Add(uint16(2), make([]byte, 32))
	f.Fuzz(func(t *testing.T, round uint16, body []byte) {
		net := keygens(t, 2, 2)
		defer net.close()
		net.tamper = func(m protocol.Message) []protocol.Message {
			if m.From == "h001" && m.Round == round {
				m.Body = body
			}
			return []protocol.Message{m}
		}
		net.run()
		if c := culprit(net.errs["h000"]); c != "" && c != "h001" {
			t.Errorf("blames %s", c)
		}
	})
}

func FuzzSignStep(f *testing.F) {
	group := signingGroup(f, 2, 2)
	f.Add(uint16(1), make([]byte, 64))
	f.Add(uint16(2), make([]byte, 128))
	f.Add(uint16(3), make([]byte, 32))
	f.Fuzz(func(t *testing.T, round uint16, body []byte) {
		net := signs(t, group, hostNames(2), "h000", []byte("m"))
		defer net.close()
		changed := false
		net.tamper = func(m protocol.Message) []protocol.Message {
			if m.Round == round && !bytes.Equal(m.Body, body) {
				m.Body, changed = body, true
			}
			return []protocol.Message{m}
		}
		net.run()
		if _, err := net.sessions["h000"].(*Sign).Signature(); err == nil && changed {
			t.Error("signed over a changed message")
		}
	})
}

func benchmarkSign(b *testing.B, quorum, n int) {
	group := signingGroup(b, quorum, n)
	for b.Loop() {
		net := signs(b, group, hostNames(quorum), "h000", []byte("a message"))
		net.run()
		if _, err := net.sessions["h000"].(*Sign).Signature(); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkSign2of3(b *testing.B) { benchmarkSign(b, 2, 3) }
func BenchmarkSign3of5(b *testing.B) { benchmarkSign(b, 3, 5) }
func BenchmarkKeygen2of3(b *testing.B) {
	for b.Loop() {
		net := keygens(b, 2, 3)
		net.run()
		shares(b, net)
	}
}
