package peer_test

import (
	"bytes"
	"errors"
	"io"
	"testing"

	"google.golang.org/protobuf/encoding/protodelim"
	"google.golang.org/protobuf/proto"

	"conseal/agent/peer"
	"conseal/agent/peer/peerpb"
)

func step(session string, round uint32, body []byte) *peerpb.Frame {
	return &peerpb.Frame{Body: &peerpb.Frame_Step{Step: &peerpb.Step{Session: []byte(session), Round: round, Body: body}}}
}

// The encoding is protodelim's, read and written.
func TestFramesAreDelimitedAsProtodelimDoes(t *testing.T) {
	want := []*peerpb.Frame{
		step("s", 1, nil),
		step("s", 2, bytes.Repeat([]byte{7}, 1000)), // longer than the reader's buffer
		{Body: &peerpb.Frame_Ping{Ping: &peerpb.Ping{}}},
	}
	var theirs, ours []byte
	for _, f := range want {
		var buf bytes.Buffer
		if _, err := protodelim.MarshalTo(&buf, f); err != nil {
			t.Fatal(err)
		}
		theirs = append(theirs, buf.Bytes()...)
		var err error
		if ours, err = peer.AppendFrame(ours, f, 1100); err != nil {
			t.Fatal(err)
		}
	}
	if !bytes.Equal(ours, theirs) {
		t.Errorf("got %x, want %x", ours, theirs)
	}
	got, err := peer.ReadFrames(bytes.NewReader(theirs), 1100)
	if err != io.EOF || len(got) != len(want) {
		t.Fatalf("got %d frames and %v, want %d and EOF", len(got), err, len(want))
	}
	for i := range want {
		if !proto.Equal(got[i], want[i]) {
			t.Errorf("frame %d: got %v, want %v", i, got[i], want[i])
		}
	}
	for cut := 1; cut < 5; cut++ {
		if _, err := peer.ReadFrames(bytes.NewReader(theirs[:cut]), 1100); !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Errorf("cut after %d bytes: got %v, want unexpected EOF", cut, err)
		}
	}
}

func TestFramesThatCannotBeSent(t *testing.T) {
	for name, f := range map[string]*peerpb.Frame{
		"nil":       nil,
		"no body":   {},
		"too long":  step("s", 1, make([]byte, 100)),
		"not UTF-8": {Body: &peerpb.Frame_End{End: &peerpb.End{Text: "\xff"}}},
	} {
		got, err := peer.AppendFrame([]byte("before"), f, 100)
		if err == nil || string(got) != "before" {
			t.Errorf("%s: got %q, %v", name, got, err)
		}
	}
}

// FuzzRead feeds the reader what a peer may send after the handshake. What is
// accepted has a body and encodes to what reads back the same.
func FuzzRead(f *testing.F) {
	for _, seed := range hostileBytes() {
		f.Add(seed)
	}
	seed, err := peer.AppendFrame(nil, step("session", 3, []byte("body")), 1000)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(append(seed, seed...))
	f.Fuzz(func(t *testing.T, data []byte) {
		const limit = 4096
		frames, err := peer.ReadFrames(bytes.NewReader(data), limit)
		if err == nil {
			t.Fatal("the end of the data was not noticed")
		}
		for _, frame := range frames {
			if frame.Body == nil {
				t.Fatal("a frame without a body was accepted")
			}
			encoded, err := peer.AppendFrame(nil, frame, 2*limit) // a varint may have been shorter than ours
			if err != nil {
				t.Fatalf("accepted and not encoded: %v", err)
			}
			again, err := peer.ReadFrames(bytes.NewReader(encoded), 2*limit)
			if err != io.EOF || len(again) != 1 || !proto.Equal(again[0], frame) {
				t.Fatalf("got %v and %v, want %v", again, err, frame)
			}
		}
	})
}

// hostileBytes is what ends a stream, by what the error says.
func hostileBytes() map[string][]byte {
	fields := bytes.Repeat([]byte{0x2a, 0}, 1025) // empty KeyStatus.staged
	return map[string][]byte{
		"over the limit of":           {0x80, 0x80, 0x80, 0x80, 0x08},
		"without a valid length":      bytes.Repeat([]byte{0xff}, 11),
		"without a body":              {0},
		"of an unknown kind":          {3, 0xfa, 0x3f, 0}, // field 1023
		"not valid protobuf":          {3, 0x22, 1, 0xff},
		"without exactly one body":    {4, 0x12, 0, 0x12, 0},
		"more than 1024 fields":       append([]byte{0x85, 0x10, 0x32, 0x82, 0x10}, fields...),
		"frame is not valid protobuf": {6, 0x2a, 4, 0x12, 2, 0xff, 0xfe}, // End.reason
	}
}

func TestHostileBytes(t *testing.T) {
	for want, data := range hostileBytes() {
		frames, err := peer.ReadFrames(bytes.NewReader(data), 4096)
		if len(frames) > 0 || !peer.IsMalformed(err) || !bytes.Contains([]byte(err.Error()), []byte(want)) {
			t.Errorf("got %d frames and %v, want an error with %q", len(frames), err, want)
		}
	}
}
