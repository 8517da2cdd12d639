package taproot

import (
	"testing"

	"conseal/protocol"
	"conseal/protocol/guard"
	"conseal/protocol/protocoltest"
)

type builder func(testing.TB) map[protocol.HostID]protocol.Session

func fuzzKeygen(testing.TB) builder {
	return func(t testing.TB) map[protocol.HostID]protocol.Session {
		out := map[protocol.HostID]protocol.Session{}
		id := protocoltest.SessionID()
		for _, h := range protocoltest.Hosts(2) {
			k, err := NewKeygen(KeygenConfig{Session: id, Self: h, Holders: protocoltest.Hosts(2), Quorum: 2})
			if err != nil {
				t.Fatal(err)
			}
			out[h] = k
		}
		return out
	}
}

func fuzzSign(t testing.TB) builder {
	net := protocoltest.Network[protocol.Session]{Sessions: fuzzKeygen(t)(t)}
	net.MustRun(t)
	key := map[protocol.HostID]*Share{}
	for h, k := range net.Sessions {
		share, err := k.(*Keygen).Result()
		if err != nil {
			t.Fatal(err)
		}
		key[h] = share
	}
	return func(t testing.TB) map[protocol.HostID]protocol.Session {
		out := map[protocol.HostID]protocol.Session{}
		id := protocoltest.SessionID()
		for _, h := range protocoltest.Hosts(2) {
			s, err := NewSign(SignConfig{Session: id, Share: key[h], Signers: protocoltest.Hosts(2), Message: []byte("a message")})
			if err != nil {
				t.Fatal(err)
			}
			out[h] = s
		}
		return out
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
