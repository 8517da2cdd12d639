package agent

import (
	"bytes"
	"log/slog"
	"strings"
	"testing"

	"golang.org/x/time/rate"

	"conseal/agent/peer/peerpb"
	"conseal/config"
	"conseal/protocol"
)

// A hello on a stream that is up says which roster the peer has now.
func TestLaterHello(t *testing.T) {
	var log bytes.Buffer
	a := &Agent{
		log:   slog.New(slog.NewTextHandler(&log, nil)),
		peers: map[protocol.HostID]uint64{"beta": 2}, complaints: complaints{limit: rate.NewLimiter(10, 50)},
	}
	a.told.Store(&told{roster: &config.Roster{Version: 3}, digest: [32]byte{1}})
	for version, digest := range map[uint64][]byte{4: make([]byte, 32), 3: a.rosterDigest()} {
		network{a}.Hello("beta", &peerpb.Hello{RosterVersion: version, RosterDigest: digest})
		if got := a.peers["beta"]; got != version || log.Len() > 0 {
			t.Errorf("got version %d, want %d; log %q", got, version, log.String())
		}
	}
	network{a}.Hello("beta", &peerpb.Hello{RosterVersion: 3, RosterDigest: make([]byte, 32)})
	if !strings.Contains(log.String(), "two different rosters of one version") {
		t.Errorf("log is %q", log.String())
	}
}
