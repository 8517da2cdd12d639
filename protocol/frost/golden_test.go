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

// TestTranscript holds every message of a key generation and two signatures, with
// fixed randomness, to testdata/transcript.txt: what agents of this version send.
func TestTranscript(t *testing.T) {
	const file = "testdata/transcript.txt"
	cryptotest.SetGlobalRandom(t, 1)
	var out bytes.Buffer
	record := func(title string, net *network) {
		fmt.Fprintf(&out, "# %s\n", title)
		net.tamper = func(m protocol.Message) []protocol.Message {
			fmt.Fprintf(&out, "%s -> %s  round %d  %x\n", m.From, m.To, m.Round, m.Body)
			return []protocol.Message{m}
		}
		net.run()
		if len(net.errs) > 0 {
			t.Fatal(title, net.errs)
		}
	}
	generation := keygens(t, 2, 3)
	record("key generation, 2 of 3", generation)
	_, transcript, err := generation.sessions["h000"].(*Keygen).Result()
	if err != nil {
		t.Fatal(err)
	}
	group := shares(t, generation)
	fmt.Fprintf(&out, "transcript %x\ngroup %x\n", transcript, group["h000"].Group.Encode())
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
	if *update {
		if err := os.WriteFile(file, out.Bytes(), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatalf("%v; make it with go test ./protocol/frost -run Transcript -update", err)
	}
	if diff := cmp.Diff(string(want), out.String()); diff != "" {
		t.Errorf("agents of this version would not understand it (-want +got):\n%s", diff)
	}
}
