package dealing

import (
	"fmt"

	"conseal/protocol"
)

// KeygenConfig is what all holders of a key generation have in common, and who this
// one is.
type KeygenConfig struct {
	Session protocol.SessionID
	Self    protocol.HostID
	Holders []protocol.HostID // sorted; all take part
	Quorum  int
}

// MaxHolders bounds a group; so that sums and messages stay small.
const MaxHolders = 255

// maxName bounds the names in an encoded group, in bytes.
const maxName = 255

// CheckHolders refuses groups that make no sense.
func CheckHolders(quorum int, holders []protocol.HostID) error {
	if quorum < 2 || quorum > len(holders) || len(holders) > MaxHolders {
		return fmt.Errorf("quorum %d of %d holders: want 2 <= quorum <= holders <= %d", quorum, len(holders), MaxHolders)
	}
	for _, h := range holders {
		if len(h) > maxName {
			return fmt.Errorf("a holder's name has %d bytes", len(h))
		}
	}
	return protocol.CheckParties(holders[0], holders)
}
