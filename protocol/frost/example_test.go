package frost_test

import (
	"crypto/ed25519"
	"fmt"
	"log"

	"conseal/protocol"
	"conseal/protocol/frost"
)

// exchange is what the network does: it carries every message that is ready to
// the session of its receiver.
func exchange(sessions map[protocol.HostID]protocol.Session) error {
	var queue []protocol.Message
	for _, s := range sessions {
		ready, err := s.Start()
		if err != nil {
			return err
		}
		queue = append(queue, ready.Send...)
	}
	for len(queue) > 0 {
		m := queue[0]
		ready, err := sessions[m.To].Step(m)
		if err != nil {
			return err
		}
		queue = append(queue[1:], ready.Send...)
	}
	return nil
}

// Three hosts make a key; two of them sign. In production each session is on a
// host of its own, and its id is that of a [protocol.Binding].
func Example() {
	hosts := []protocol.HostID{"alpha", "beta", "gamma"}
	sessions := map[protocol.HostID]protocol.Session{}
	for _, h := range hosts {
		k, err := frost.NewKeygen(frost.KeygenConfig{Session: protocol.SessionID{1}, Self: h, Holders: hosts, Quorum: 2})
		if err != nil {
			log.Fatal(err)
		}
		defer k.Close()
		sessions[h] = k
	}
	if err := exchange(sessions); err != nil {
		log.Fatal(err)
	}
	shares := map[protocol.HostID]*frost.Share{}
	for h, s := range sessions {
		share, err := s.(*frost.Keygen).Result()
		if err != nil {
			log.Fatal(err)
		}
		defer share.Wipe()
		shares[h] = share
	}

	signers := []protocol.HostID{"alpha", "gamma"}
	message := []byte("release 1.2.3")
	sessions = map[protocol.HostID]protocol.Session{}
	for _, h := range signers {
		s, err := frost.NewSign(frost.SignConfig{
			Session: protocol.SessionID{2}, Self: h, Coordinator: "alpha", Signers: signers,
			Group: shares[h].Group, Share: shares[h], Message: message,
		})
		if err != nil {
			log.Fatal(err)
		}
		defer s.Close()
		sessions[h] = s
	}
	if err := exchange(sessions); err != nil {
		log.Fatal(err)
	}
	signature, err := sessions["alpha"].(*frost.Sign).Signature()
	if err != nil {
		log.Fatal(err)
	}
	key := shares["alpha"].Group.PublicKey
	fmt.Println(ed25519.Verify(key[:], message, signature))
	// Output: true
}
