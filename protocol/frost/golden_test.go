package frost

import (
	"bytes"
	"flag"
	"fmt"
	"os"
	"testing"
	"testing/cryptotest"

	"github.com/google/go-cmp/cmp"

	"conseal/protocol"
)

var update = flag.Bool("update", false, "write the transcripts in testdata anew")

// recorder writes down every message of sessions with fixed randomness.
type recorder struct {
	t *testing.T
	bytes.Buffer
}

func (r *recorder) record(title string, net *network) {
	fmt.Fprintf(r, "# %s\n", title)
	net.tamper = func(m protocol.Message) []protocol.Message {
		fmt.Fprintf(r, "%s -> %s  round %d  %x\n", m.From, m.To, m.Round, m.Body)
		return []protocol.Message{m}
	}
	net.run()
	if len(net.errs) > 0 {
		r.t.Fatal(title, net.errs)
	}
}

// compare holds what was written to a file.
func (r *recorder) compare(file string) {
	if *update {
		if err := os.WriteFile(file, r.Bytes(), 0o644); err != nil {
			r.t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		r.t.Fatalf("%v; make it with go test ./protocol/frost -run Transcript -update", err)
	}
	if diff := cmp.Diff(string(want), r.String()); diff != "" {
		r.t.Errorf("agents of this version would not understand it (-want +got):\n%s", diff)
	}
}

// TestTranscript holds every message of a key generation and two signatures, with
// fixed randomness, to testdata/transcript.txt: what agents of this version send.
func TestTranscript(t *testing.T) {
	cryptotest.SetGlobalRandom(t, 1)
	out := recorder{t: t}
	record := out.record
	generation := keygens(t, 2, 3)
	record("key generation, 2 of 3", generation)
	group := shares(t, generation)
	fmt.Fprintf(&out, "transcript %x\ngroup %x\n", generation.sessions["h000"].(*Keygen).echo, group["h000"].Group.Encode())
	sign := func(title string, net *network) {
		record(title, net)
		sig, err := net.sessions["h001"].(*Sign).Signature()
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(&out, "signature %x\n", sig)
	}
	signers := []protocol.HostID{"h000", "h002"}
	sign("signature of h000 and h002, asked for by h001", signs(t, group, signers, "h001", []byte("message")))
	sign("signature of h000 and h001, which asks for it", signs(t, group, []protocol.HostID{"h000", "h001"}, "h001", []byte("message")))
	out.compare("testdata/transcript.txt")
}

// TestReshareTranscript does the same for a resharing.
func TestReshareTranscript(t *testing.T) {
	cryptotest.SetGlobalRandom(t, 2)
	old := signingGroup(t, 2, 3)
	out := recorder{t: t}
	holders := []protocol.HostID{"h001", "h002", "h003"}
	net := reshares(t, old, []protocol.HostID{"h000", "h002"}, holders, 2)
	out.record("resharing by h000 and h002, to 2 of h001, h002 and h003", net)
	transcript, err := net.sessions["h000"].(*Reshare).Transcript()
	if err != nil {
		t.Fatal(err)
	}
	fmt.Fprintf(&out, "transcript %x\ngroup %x\n", transcript, newShares(t, net, holders)["h003"].Group.Encode())
	out.compare("testdata/reshare.txt")
}
