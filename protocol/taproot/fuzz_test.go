package taproot

import (
	"testing"

	"conseal/protocol"
	"conseal/protocol/guard"
	"conseal/protocol/protocoltest"
)

type builder func(testing.TB) map[protocol.HostID]protocol.Session

func keygens(t testing.TB) protocoltest.Network[*Keygen] {
	return protocoltest.Connect(t, protocoltest.Hosts(2), func(id protocol.SessionID, h protocol.HostID) (*Keygen, error) {
		return NewKeygen(KeygenConfig{Session: id, Self: h, Holders: protocoltest.Hosts(2), Quorum: 2})
	})
}

func fuzzKeygen(testing.TB) builder {
	return func(t testing.TB) map[protocol.HostID]protocol.Session { return keygens(t).Untyped() }
}

func fuzzSign(t testing.TB) builder {
	net := keygens(t)
	net.MustRun(t)
	key := protocoltest.Shares(t, net.Sessions, protocoltest.Hosts(2))
	return func(t testing.TB) map[protocol.HostID]protocol.Session {
		return protocoltest.Connect(t, protocoltest.Hosts(2), func(id protocol.SessionID, h protocol.HostID) (*Sign, error) {
			return NewSign(SignConfig{Session: id, Share: key[h], Signers: protocoltest.Hosts(2), Message: []byte("a message")})
		}).Untyped()
	}
}

func fuzz(f *testing.F, build builder, rounds []guard.Round, round uint16, kind byte) {
	f.Helper()
	r := rounds[round-2]
	shape := r.Direct
	if kind == 'b' {
		shape = r.Broadcast(guard.ID(1))
	}
	protocoltest.Fuzz(f, build, round, kind, func(content []byte) bool { return guard.All(shape, content) == nil }, false)
}

func FuzzKeygen2Broadcast(f *testing.F) { fuzz(f, fuzzKeygen(f), keygenRounds(2), 2, 'b') }
func FuzzKeygen3Broadcast(f *testing.F) { fuzz(f, fuzzKeygen(f), keygenRounds(2), 3, 'b') }
func FuzzKeygen3Direct(f *testing.F)    { fuzz(f, fuzzKeygen(f), keygenRounds(2), 3, 'd') }
func FuzzSign2Broadcast(f *testing.F)   { fuzz(f, fuzzSign(f), signRounds(), 2, 'b') }
func FuzzSign3Broadcast(f *testing.F)   { fuzz(f, fuzzSign(f), signRounds(), 3, 'b') }
