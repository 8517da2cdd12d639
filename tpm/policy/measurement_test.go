package policy_test

import (
	"bytes"
	"compress/gzip"
	"crypto/rand"
	"encoding/base64"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"conseal/tpm/policy"
)

func someMeasurement() *policy.Measurement {
	return &policy.Measurement{
		Host: "alpha", Counter: 0x01800601, Revoked: 1, Next: 3, Key: "SHA256:x", Taken: at, Selected: []int{4},
		PCRs: policy.State{4: bytes.Repeat([]byte{4}, 32), 7: bytes.Repeat([]byte{7}, 32)},
	}
}

func TestMeasurementWithLog(t *testing.T) {
	for name, m := range map[string]*policy.Measurement{"none": someMeasurement(), "short": someMeasurement(), "long": someMeasurement()} {
		switch name {
		case "none":
			m.NoEventLog = `open "/sys": permission denied`
		case "short":
			m.EventLog = []byte("a log")
		case "long":
			m.EventLog = bytes.Repeat([]byte("grub_cmd: set root"), policy.MaxEventLog/18)
		}
		b := m.Encode()
		if len(b) > policy.MaxMeasurement {
			t.Errorf("%s: %d bytes", name, len(b))
		}
		got, err := policy.ParseMeasurement(b)
		if err != nil {
			t.Fatalf("%s: %v in\n%.2000s", name, err, b)
		}
		if !bytes.Equal(got.EventLog, m.EventLog) {
			t.Errorf("%s: a log of %d bytes became another of %d", name, len(m.EventLog), len(got.EventLog))
		}
		if diff := cmp.Diff(got, m, cmp.Comparer(bytes.Equal)); diff != "" {
			t.Errorf("%s: got -, want +:\n%s", name, diff)
		}
	}
	m := someMeasurement()
	m.EventLog = make([]byte, policy.MaxEventLog)
	rand.Read(m.EventLog) // cannot be packed
	got, err := policy.ParseMeasurement(m.Encode())
	if err != nil || got.EventLog != nil || !strings.Contains(got.NoEventLog, "too many") {
		t.Errorf("a log that cannot be packed: %d bytes, %q, %v", len(got.EventLog), got.NoEventLog, err)
	}
	m = someMeasurement()
	m.NoEventLog = "a\nb\x1b" + strings.Repeat("é", 1000)
	if got, err = policy.ParseMeasurement(m.Encode()); err != nil || !strings.HasPrefix(got.NoEventLog, "a.b.é") {
		t.Errorf("a long reason: %v", err)
	}
}

func TestMeasurementRefused(t *testing.T) {
	m := someMeasurement()
	m.EventLog = []byte("a log")
	good := string(m.Encode())
	table := good[strings.Index(good, "\n[event_log]"):]
	pack := func(n int) string {
		var b bytes.Buffer
		z := gzip.NewWriter(&b)
		z.Write(make([]byte, n))
		z.Close()
		return base64.StdEncoding.EncodeToString(b.Bytes())
	}
	packed := func(text string) string {
		return strings.Replace(good, table, "\n[event_log]\nmissing = \"\"\npacked = \""+text+"\"\n", 1)
	}
	version1 := func(s string) string { return strings.Replace(s, "measurement 2", "measurement 1", 1) }
	if _, err := policy.ParseMeasurement([]byte(packed(pack(policy.MaxEventLog)))); err != nil {
		t.Errorf("control: %v", err)
	}
	got, err := policy.ParseMeasurement([]byte(version1(strings.Replace(good, table, "", 1))))
	if err != nil || got.EventLog != nil || got.NoEventLog == "" {
		t.Errorf("version 1: %+v, %v", got, err)
	}
	for name, test := range map[string]struct{ text, want string }{
		"version 1 with a log":     {version1(good), "event_log"},
		"version 2 without":        {strings.Replace(good, table, "", 1), "event_log"},
		"version 3":                {strings.Replace(good, "measurement 2", "measurement 3", 1), "kind"},
		"more in the table":        {good + "more = 1\n", "strict mode"},
		"a bomb":                   {packed(pack(policy.MaxEventLog + 1)), "more than 1048576 bytes"},
		"no gzip":                  {packed("AAAA"), "event_log"},
		"no base64":                {packed("!"), "event_log"},
		"cut off":                  {packed(pack(100)[:16]), "event_log"},
		"a reason with escapes":    {strings.Replace(good, `missing = ""`, `missing = "\u001b"`, 1), "cannot be printed"},
		"a reason that is endless": {strings.Replace(good, `missing = ""`, `missing = "`+strings.Repeat("x", 1000)+`"`, 1), "too long"},
		"too large":                {good + "#" + strings.Repeat("x", policy.MaxMeasurement), "bytes"},
	} {
		if _, err := policy.ParseMeasurement([]byte(test.text)); err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s: got %v, want %q", name, err, test.want)
		}
	}
}
