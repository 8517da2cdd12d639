package protocoltest

import (
	"bytes"
	"crypto/ed25519"
	"crypto/sha256"
	"errors"
	"slices"
	"testing"

	"conseal/protocol"
	"conseal/protocol/dealing"
)

// Identity is the key by which a host signs its dealings.
func Identity(h protocol.HostID) ed25519.PrivateKey {
	seed := sha256.Sum256([]byte(h))
	return ed25519.NewKeyFromSeed(seed[:])
}

// Plan is a resharing at one host, with the identities of [Identity].
func Plan(id protocol.SessionID, self protocol.HostID, dealers, holders []protocol.HostID, quorum int) dealing.Plan {
	return dealing.Plan{
		Session: id, Self: self, Dealers: dealers, Holders: holders, Quorum: quorum,
		Sign: func(digest [32]byte) ([]byte, error) { return ed25519.Sign(Identity(self), digest[:]), nil },
		Verify: func(h protocol.HostID, digest [32]byte, signature []byte) error {
			if !ed25519.Verify(Identity(h).Public().(ed25519.PublicKey), digest[:], signature) {
				return errors.New("not signed by this host")
			}
			return nil
		},
	}
}

// Share is a share of a group, which is what is public of it.
type Share interface{ Public() []byte }

// Sharing is a session that ends in a share.
type Sharing[H Share] interface {
	protocol.Session
	Result() (H, error)
}

// Shares are the results of sessions that end in shares of one group, which the holders
// have and nobody else. It closes the sessions.
func Shares[S Sharing[H], H Share](t testing.TB, sessions map[protocol.HostID]S, holders []protocol.HostID) map[protocol.HostID]H {
	t.Helper()
	out := map[protocol.HostID]H{}
	for h, s := range sessions {
		share, err := s.Result()
		if holds := slices.Contains(holders, h); holds != (err == nil) {
			t.Fatalf("%s is a holder: %v, and has: %v", h, holds, err)
		}
		s.Close()
		if err == nil {
			out[h] = share
		}
	}
	if len(out) == 0 || len(out) != len(holders) {
		t.Fatalf("%d of %d holders have a share", len(out), len(holders))
	}
	for h, share := range out {
		if !bytes.Equal(share.Public(), out[holders[0]].Public()) {
			t.Fatalf("%s has another group", h)
		}
	}
	return out
}

// NewShares are the results of resharings, whose hosts agree on what was dealt: see
// [Shares].
func NewShares[S interface {
	Sharing[H]
	Transcript() ([32]byte, error)
}, H Share](t testing.TB, sessions map[protocol.HostID]S, holders []protocol.HostID) map[protocol.HostID]H {
	t.Helper()
	want, err := sessions[holders[0]].Transcript()
	for h, s := range sessions {
		had, bad := s.Transcript()
		if err := errors.Join(err, bad); err != nil || had != want {
			t.Fatalf("%s: another transcript: %v", h, err)
		}
	}
	return Shares(t, sessions, holders)
}

// Refuses wants that a good configuration makes a session, and that none of its changes
// does.
func Refuses[C, S any](t *testing.T, build func(C) (S, error), good func() C, changes map[string]func(*C)) {
	t.Helper()
	if _, err := build(good()); err != nil {
		t.Fatal(err)
	}
	for name, change := range changes {
		c := good()
		change(&c)
		if _, err := build(c); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}
