package frost

import (
	"crypto/ed25519"
	"slices"
	"testing"

	ed "filippo.io/edwards25519"
	"pgregory.net/rapid"

	"conseal/protocol"
	"conseal/protocol/dealing"
	"conseal/protocol/protocoltest"
)

func reshareConfig(old map[protocol.HostID]*Share, self protocol.HostID, dealers, holders []protocol.HostID, quorum int) ReshareConfig {
	cfg := ReshareConfig{Plan: protocoltest.Plan(testSession, self, dealers, holders, quorum), Old: old[dealers[0]].Group}
	if slices.Contains(dealers, self) {
		cfg.Share = old[self]
	}
	return cfg
}

func reshares(t testing.TB, old map[protocol.HostID]*Share, dealers, holders []protocol.HostID, quorum int) *network {
	t.Helper()
	return connect(t, slices.Concat(dealers, holders), func(_ protocol.SessionID, h protocol.HostID) (*Reshare, error) {
		return NewReshare(reshareConfig(old, h, dealers, holders, quorum))
	})
}

// newShares are the results of a resharing, whose hosts agree on it.
func newShares(t testing.TB, net *network, holders []protocol.HostID) map[protocol.HostID]*Share {
	t.Helper()
	out := protocoltest.NewShares(t, ended[*Reshare](t, net), holders)
	if _, err := DecodeGroup(out[holders[0]].Public()); err != nil {
		t.Fatal(err)
	}
	return out
}

// interpolate is the secret that shares make up, if they are enough.
func interpolate(t testing.TB, shares map[protocol.HostID]*Share, hosts []protocol.HostID) *ed.Scalar {
	t.Helper()
	var positions []int
	for _, h := range hosts {
		positions = append(positions, shares[h].position)
	}
	sum := ed.NewScalar()
	for i, h := range hosts {
		err := shares[h].use(func(x *ed.Scalar) error {
			sum.MultiplyAdd(lagrange(positions[i], positions, nil), x, sum)
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	return sum
}

func mustSign(t testing.TB, shares map[protocol.HostID]*Share, signers []protocol.HostID, key [32]byte) {
	t.Helper()
	message := []byte("after a resharing")
	net := signs(t, shares, signers, signers[0], message)
	net.run()
	defer net.close()
	sig, err := net.sessions[signers[0]].(*Sign).Signature()
	if err != nil || !ed25519.Verify(key[:], message, sig) {
		t.Fatalf("%q do not sign: %v, %v", signers, err, net.errs)
	}
}

// drawn is a sorted choice of hosts.
func drawn(rt *rapid.T, name string, from []protocol.HostID, n int) []protocol.HostID {
	return slices.Sorted(slices.Values(rapid.Permutation(from).Draw(rt, name)[:n]))
}

// TestReshareChains draws sets of holders, quorums, dealers and orders of delivery, one
// after the other: the key stays the same, any quorum signs, fewer know nothing of it,
// and what was there before still works.
func TestReshareChains(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		pick := func(n int) int { return rapid.IntRange(0, n-1).Draw(rt, "next") }
		n := rapid.IntRange(2, 5).Draw(rt, "holders")
		shares := signingGroup(t, rapid.IntRange(2, n).Draw(rt, "quorum"), n)
		holders := hostNames(n)
		group := shares["h000"].Group
		secret := interpolate(t, shares, holders[:group.Quorum])
		for range 3 {
			quorum := group.Quorum
			dealers := drawn(rt, "dealers", holders, quorum)
			next := drawn(rt, "new holders", hostNames(8), rapid.IntRange(2, 6).Draw(rt, "holders"))
			nextQuorum := rapid.IntRange(2, len(next)).Draw(rt, "quorum")
			if rapid.Bool().Draw(rt, "refresh") {
				next, nextQuorum = holders, quorum
			}
			net := reshares(t, shares, dealers, next, nextQuorum)
			net.pick = pick
			net.run()
			fresh := newShares(t, net, next)
			for i, h := range next {
				if at := group.position(h); at >= 0 && fresh[h].Group.VerificationShares[i] == group.VerificationShares[at] {
					rt.Fatalf("the share of %s did not change", h)
				}
			}
			signers := drawn(rt, "signers", next, nextQuorum)
			if interpolate(t, fresh, signers).Equal(secret) != 1 {
				rt.Fatal("the shares are of another secret")
			}
			if interpolate(t, fresh, signers[1:]).Equal(secret) == 1 {
				rt.Fatal("fewer than a quorum of shares are the key")
			}
			mustSign(t, fresh, signers, group.PublicKey)
			mustSign(t, shares, dealers, group.PublicKey)
			for _, s := range shares {
				s.Wipe()
			}
			shares, holders, group = fresh, next, fresh[next[0]].Group
		}
	})
}

// TestLargeFleets reshares between fleets of the sizes that are supported.
func TestLargeFleets(t *testing.T) {
	all := hostNames(15)
	shares := signingGroup(t, 4, 7)
	key := shares["h000"].Group.PublicKey
	for _, step := range []struct {
		dealers, holders []protocol.HostID
		quorum           int
	}{
		{all[3:7], all[:7], 4}, // a refresh
		{all[1:5], all, 8},
		{all[7:], all, 8},
		{all[2:10], all[8:], 4}, // of no dealer of the first
	} {
		net := reshares(t, shares, step.dealers, step.holders, step.quorum)
		net.run()
		shares = newShares(t, net, step.holders)
		mustSign(t, shares, step.holders[len(step.holders)-step.quorum:], key)
	}
}

// TestSharesOfTwoEpochsDoNotMix: neither with the signing session's checks, nor without
// them by arithmetic.
func TestSharesOfTwoEpochsDoNotMix(t *testing.T) {
	old := signingGroup(t, 2, 3)
	net := reshares(t, old, hostNames(2), hostNames(3), 2)
	net.run()
	fresh := newShares(t, net, hostNames(3))
	mixed := map[protocol.HostID]*Share{"h000": fresh["h000"], "h001": old["h001"]}
	if interpolate(t, mixed, hostNames(2)).Equal(interpolate(t, old, hostNames(2))) == 1 {
		t.Error("shares of two epochs are the key")
	}
	cfg := SignConfig{Self: "h001", Coordinator: "h000", Signers: hostNames(2), Group: fresh["h000"].Group, Share: old["h001"], Message: []byte("m")}
	if _, err := NewSign(cfg); err == nil {
		t.Error("an old share signs for the new group")
	}
	// Each signs by its own epoch: the coordinator finds the share of the other wrong.
	for _, coordinator := range hostNames(2) {
		net := signs(t, mixed, hostNames(2), coordinator, []byte("m"))
		net.run()
		if _, err := net.sessions[coordinator].(*Sign).Signature(); err == nil || net.errs[coordinator] == nil {
			t.Error("shares of two epochs sign")
		}
	}
}

func TestReshareConfigurationsThatMakeNoSense(t *testing.T) {
	old := signingGroup(t, 2, 3)
	other := signingGroup(t, 2, 3)
	good := func() ReshareConfig {
		return reshareConfig(old, "h000", hostNames(2), hostNames(3), 2)
	}
	protocoltest.Refuses(t, NewReshare, good, map[string]func(*ReshareConfig){
		"no group":             func(c *ReshareConfig) { c.Old = nil },
		"a group made by hand": func(c *ReshareConfig) { c.Old = &Group{Quorum: 2, Holders: hostNames(3)} },
		"no dealers":           func(c *ReshareConfig) { c.Dealers = nil },
		"a dealer too few":     func(c *ReshareConfig) { c.Dealers = hostNames(1) },
		"a dealer too many":    func(c *ReshareConfig) { c.Dealers = hostNames(3) },
		"a dealer twice":       func(c *ReshareConfig) { c.Dealers = []protocol.HostID{"h000", "h000"} },
		"unsorted dealers":     func(c *ReshareConfig) { c.Dealers = []protocol.HostID{"h001", "h000"} },
		"a dealer of no share": func(c *ReshareConfig) { c.Dealers = []protocol.HostID{"h000", "h009"} },
		"no share":             func(c *ReshareConfig) { c.Share = nil },
		"another's share":      func(c *ReshareConfig) { c.Share = old["h001"] },
		"another key's share":  func(c *ReshareConfig) { c.Share = other["h000"] },
		"a share too many":     func(c *ReshareConfig) { c.Self, c.Share = "h002", old["h002"] },
		"a stranger":           func(c *ReshareConfig) { c.Self, c.Share = "h009", nil },
		"no holders":           func(c *ReshareConfig) { c.Holders = nil },
		"unsorted holders":     func(c *ReshareConfig) { c.Holders = []protocol.HostID{"h001", "h000"} },
		"a holder twice":       func(c *ReshareConfig) { c.Holders = []protocol.HostID{"h000", "h000"} },
		"too many holders":     func(c *ReshareConfig) { c.Holders = hostNames(dealing.MaxHolders + 1) },
		"a quorum of one":      func(c *ReshareConfig) { c.Quorum = 1 },
		"a quorum of more":     func(c *ReshareConfig) { c.Quorum = 4 },
		"no way to sign":       func(c *ReshareConfig) { c.Sign = nil },
		"no way to verify":     func(c *ReshareConfig) { c.Verify = nil },
	})
}

// TestWipedShareDealsNothing: an error and no panic.
func TestWipedShareDealsNothing(t *testing.T) {
	old := signingGroup(t, 2, 2)
	s, err := NewReshare(reshareConfig(old, "h000", hostNames(2), hostNames(2), 2))
	if err != nil {
		t.Fatal(err)
	}
	old["h000"].Wipe()
	if ready, err := s.Start(); err == nil || len(ready.Send) > 0 {
		t.Error("a wiped share was dealt")
	}
	if _, err := s.Result(); err == nil {
		t.Error("a result of nothing")
	}
}

// TestDealingsThatCancel: neither key nor share may be the identity.
func TestDealingsThatCancel(t *testing.T) {
	one := dealing.Deal(curve, identifier(4), 2).Commitments
	negated := []*ed.Point{new(ed.Point).Negate(one[0]), new(ed.Point).Negate(one[1])}
	atSecond := []*ed.Point{new(ed.Point).Negate(dealing.Evaluate(curve, one, 1)), ed.NewIdentityPoint()} // cancels the share of the second
	for name, other := range map[string][]*ed.Point{"the key": negated, "a share": atSecond} {
		if _, _, err := dealing.Total(curve, [][]*ed.Point{one, other}, 3); err == nil {
			t.Errorf("%s is the identity: no error", name)
		}
	}
	if _, _, err := dealing.Total(curve, [][]*ed.Point{one, one}, 3); err != nil {
		t.Error(err)
	}
}

// TestGroupOfAnotherKey reshares under a group whose public key is not that of its
// shares, as no group of a key generation or of DecodeGroup has.
func TestGroupOfAnotherKey(t *testing.T) {
	old := signingGroup(t, 2, 2)
	g := old["h000"].Group
	wrong := newGroup(2, g.Holders, new(ed.Point).ScalarBaseMult(identifier(3)), g.shares)
	for _, s := range old {
		s.Group = wrong
	}
	net := reshares(t, old, hostNames(2), hostNames(2), 2)
	net.run()
	for h, s := range net.sessions {
		if _, err := s.(*Reshare).Result(); err == nil || net.errs[h] == nil || culprit(net.errs[h]) != "" {
			t.Errorf("%s: %v", h, net.errs[h])
		}
	}
}
