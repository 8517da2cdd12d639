//go:build fuzz

// Behind a tag: the sessions take a minute to bring to where they are fuzzed, and the
// tests screen the same messages.

package cmp

import (
	"sync"
	"testing"

	"github.com/luxfi/threshold/pkg/party"

	"conseal/protocol"
	"conseal/protocol/dealing"
	"conseal/protocol/guard"
	"conseal/protocol/protocoltest"
)

func keygens(t testing.TB) protocoltest.Network[*Keygen] {
	return protocoltest.Connect(t, protocoltest.Hosts(2), func(id protocol.SessionID, h protocol.HostID) (*Keygen, error) {
		return NewKeygen(P256, KeygenConfig{Session: id, Self: h, Holders: protocoltest.Hosts(2), Quorum: 2})
	})
}

func fuzzShares(t testing.TB) map[protocol.HostID]*Share {
	t.Helper()
	net := keygens(t)
	net.MustRun(t)
	return protocoltest.Shares(t, net.Sessions, protocoltest.Hosts(2))
}

var sharesOnce struct {
	sync.Once
	shares map[protocol.HostID]*Share
}

func oneKey(t testing.TB) map[protocol.HostID]*Share {
	t.Helper()
	sharesOnce.Do(func() { sharesOnce.shares = fuzzShares(t) })
	return sharesOnce.shares
}

type builder func(testing.TB) map[protocol.HostID]protocol.Session

// sessions makes a builder of one that makes a session of a host.
func sessions[S protocol.Session](one func(id protocol.SessionID, h protocol.HostID) (S, error)) builder {
	return func(t testing.TB) map[protocol.HostID]protocol.Session {
		return protocoltest.Connect(t, protocoltest.Hosts(2), one).Untyped()
	}
}

func buildKeygen(testing.TB) builder {
	return func(t testing.TB) map[protocol.HostID]protocol.Session { return keygens(t).Untyped() }
}

func buildRefresh(t testing.TB) builder {
	key, hosts := oneKey(t), protocoltest.Hosts(2)
	return sessions(func(id protocol.SessionID, h protocol.HostID) (*Reshare, error) {
		return NewReshare(ReshareConfig{Old: key[h].Group, Share: key[h], Plan: dealing.Plan{
			Session: id, Self: h, Dealers: hosts, Holders: hosts, Quorum: 2,
			Sign:   func([32]byte) ([]byte, error) { return []byte{1}, nil }, // not what is fuzzed
			Verify: func(protocol.HostID, [32]byte, []byte) error { return nil },
		}})
	})
}

func buildSign(t testing.TB) builder {
	key := oneKey(t)
	return sessions(func(id protocol.SessionID, h protocol.HostID) (*Sign, error) {
		return NewSign(SignConfig{Session: id, Share: key[h], Signers: protocoltest.Hosts(2), Digest: [32]byte{1}})
	})
}

func buildPresign(t testing.TB) builder {
	key := oneKey(t)
	return sessions(func(id protocol.SessionID, h protocol.HostID) (*Presign, error) {
		return NewPresign(SignConfig{Session: id, Share: key[h], Signers: protocoltest.Hosts(2)})
	})
}

func buildOnline(t testing.TB) builder {
	presign := buildPresign(t)
	return func(t testing.TB) map[protocol.HostID]protocol.Session {
		net := protocoltest.Network[protocol.Session]{Sessions: presign(t)}
		net.MustRun(t)
		return sessions(func(id protocol.SessionID, h protocol.HostID) (*Sign, error) {
			made, err := net.Sessions[h].(*Presign).Result()
			if err != nil {
				return nil, err
			}
			return NewOnline(id, made, [32]byte{1})
		})(t)
	}
}

func fuzz(f *testing.F, build builder, rounds []guard.Round, round uint16, kind byte) {
	f.Helper()
	fuzzFrom(f, build, rounds, 0, round, kind)
}

// fuzzFrom fuzzes a message of a protocol that goes on from another's rounds.
func fuzzFrom(f *testing.F, build builder, rounds []guard.Round, offset, round uint16, kind byte) {
	f.Helper()
	for _, r := range rounds {
		if r.Number != round {
			continue
		}
		shape := r.Direct
		if kind == 'b' {
			shape = r.Broadcast(guard.ID(1))
		}
		protocoltest.Fuzz(f, build, round+offset, kind, func(content []byte) bool { return guard.All(shape, content) == nil }, true)
		return
	}
	f.Fatalf("no round %d", round)
}

func FuzzKeygen2Broadcast(f *testing.F) {
	fuzz(f, buildKeygen(f), keygenRounds(P256.group, 2, false), 2, 'b')
}
func FuzzKeygen3Broadcast(f *testing.F) {
	fuzz(f, buildKeygen(f), keygenRounds(P256.group, 2, false), 3, 'b')
}
func FuzzKeygen4Broadcast(f *testing.F) {
	fuzz(f, buildKeygen(f), keygenRounds(P256.group, 2, false), 4, 'b')
}
func FuzzKeygen4Direct(f *testing.F) {
	fuzz(f, buildKeygen(f), keygenRounds(P256.group, 2, false), 4, 'd')
}
func FuzzKeygen5Broadcast(f *testing.F) {
	fuzz(f, buildKeygen(f), keygenRounds(P256.group, 2, false), 5, 'b')
}

func FuzzRefresh3Broadcast(f *testing.F) {
	fuzzFrom(f, buildRefresh(f), keygenRounds(P256.group, 2, true), refreshOffset, 3, 'b')
}

func FuzzSign2Broadcast(f *testing.F) {
	fuzz(f, buildSign(f), signRounds(P256.group), 2, 'b')
}
func FuzzSign2Direct(f *testing.F) {
	fuzz(f, buildSign(f), signRounds(P256.group), 2, 'd')
}
func FuzzSign3Broadcast(f *testing.F) {
	fuzz(f, buildSign(f), signRounds(P256.group), 3, 'b')
}
func FuzzSign3Direct(f *testing.F) {
	fuzz(f, buildSign(f), signRounds(P256.group), 3, 'd')
}
func FuzzSign4Broadcast(f *testing.F) {
	fuzz(f, buildSign(f), signRounds(P256.group), 4, 'b')
}
func FuzzSign4Direct(f *testing.F) {
	fuzz(f, buildSign(f), signRounds(P256.group), 4, 'd')
}
func FuzzSign5Broadcast(f *testing.F) {
	fuzz(f, buildSign(f), signRounds(P256.group), 5, 'b')
}

func FuzzPresign2Broadcast(f *testing.F) {
	fuzz(f, buildPresign(f), presignRounds(P256.group, []party.ID{guard.ID(0), guard.ID(1)}), 2, 'b')
}
func FuzzPresign2Direct(f *testing.F) {
	fuzz(f, buildPresign(f), presignRounds(P256.group, []party.ID{guard.ID(0), guard.ID(1)}), 2, 'd')
}
func FuzzPresign3Broadcast(f *testing.F) {
	fuzz(f, buildPresign(f), presignRounds(P256.group, []party.ID{guard.ID(0), guard.ID(1)}), 3, 'b')
}
func FuzzPresign3Direct(f *testing.F) {
	fuzz(f, buildPresign(f), presignRounds(P256.group, []party.ID{guard.ID(0), guard.ID(1)}), 3, 'd')
}
func FuzzPresign4Broadcast(f *testing.F) {
	fuzz(f, buildPresign(f), presignRounds(P256.group, []party.ID{guard.ID(0), guard.ID(1)}), 4, 'b')
}
func FuzzPresign5Broadcast(f *testing.F) {
	fuzz(f, buildPresign(f), presignRounds(P256.group, []party.ID{guard.ID(0), guard.ID(1)}), 5, 'b')
}
func FuzzPresign5Direct(f *testing.F) {
	fuzz(f, buildPresign(f), presignRounds(P256.group, []party.ID{guard.ID(0), guard.ID(1)}), 5, 'd')
}
func FuzzPresign6Broadcast(f *testing.F) {
	fuzz(f, buildPresign(f), presignRounds(P256.group, []party.ID{guard.ID(0), guard.ID(1)}), 6, 'b')
}
func FuzzPresign7Broadcast(f *testing.F) {
	fuzz(f, buildPresign(f), presignRounds(P256.group, []party.ID{guard.ID(0), guard.ID(1)}), 7, 'b')
}

func FuzzOnline8Broadcast(f *testing.F) {
	fuzz(f, buildOnline(f), onlineRounds(P256.group), 8, 'b')
}
