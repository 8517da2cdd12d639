//go:build !failpoints

package peer

import (
	"log/slog"

	"conseal/agent/peer/peerpb"
	"conseal/protocol"
)

// liar changes what this host says, in a build with the tag "failpoints", which is
// never shipped. Here it is nothing.
type liar struct{}

func newLiar(_ *slog.Logger, h Handler) (*liar, Handler) { return nil, h }

// tell returns what is sent instead of a frame, and how many times.
func (*liar) tell(_ protocol.HostID, f *peerpb.Frame) (*peerpb.Frame, int) { return f, 1 }
