package policy

import (
	"bytes"
	"compress/gzip"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"
	"unicode"

	"github.com/pelletier/go-toml/v2"
)

// Measurement is what a host says of its state, for the security team to sign a policy
// by. Nothing proves it: compare it with that of a machine that you trust.
type Measurement struct {
	Host     string
	Counter  uint32 // NV index
	Revoked  uint64 // the counter's value: policies below it are revoked
	Next     uint64 // a version that no policy of the host has yet
	Key      string // fingerprint of the policy key that the host trusts
	Taken    time.Time
	Selected []int // the PCRs that the host is configured to be judged by
	PIN      bool  // the host has a PIN, which policies may want
	PCRs     State // all of the SHA-256 bank

	// EventLog is the firmware's log of what it measured, as the kernel gives it out
	// (TCG PC Client Platform Firmware Profile, section 10); package eventlog reads it.
	// If it is empty, NoEventLog says why.
	EventLog   []byte
	NoEventLog string
}

const (
	// MaxEventLog bounds an event log, in bytes.
	MaxEventLog = 1 << 20
	// MaxMeasurement bounds a measurement's document, in bytes.
	MaxMeasurement = MaxDocument + MaxEventLog/2

	maxMissing = 600
)

const (
	kindMeasurement1 = "conseal seal measurement 1" // has no event log
	kindMeasurement  = "conseal seal measurement 2"
)

// Encode writes the measurement as a file that people read.
func (m *Measurement) Encode() []byte {
	var b strings.Builder
	fmt.Fprintf(&b, "# What the TPM of host %q has measured. It proves nothing: compare it with a machine that you trust.\n", m.Host)
	selected, _ := toml.Marshal(map[string][]int{"selected": m.Selected})
	fmt.Fprintf(&b, "kind = %q\nhost = %q\ntaken = %q\nkey = %q\ncounter = \"%#08x\"\nrevoked_below = %d\nnext_version = %d\n%s",
		kindMeasurement, m.Host, m.Taken.UTC().Format(time.RFC3339), m.Key, m.Counter, m.Revoked, m.Next, selected)
	writePIN(&b, m.PIN)
	b.WriteString("\n[pcrs] # SHA-256 bank\n")
	writeState(&b, m.PCRs)
	packed, missing := packLog(m.EventLog), m.NoEventLog[:min(len(m.NoEventLog), maxMissing/3)]
	if len(packed) > MaxMeasurement-MaxDocument {
		packed, missing = nil, fmt.Sprintf("the event log has %d bytes, and %d when packed: too many", len(m.EventLog), len(packed))
	}
	fmt.Fprintf(&b, "\n[event_log] # of the firmware; `conseal seal explain` shows it\nmissing = %q\npacked = \"\"\"\n%s\"\"\"\n", strings.Map(orDot, missing), packed)
	return []byte(b.String())
}

func orDot(r rune) rune {
	if !unicode.IsPrint(r) {
		return '.'
	}
	return r
}

const lineLen = 120

// packLog is gzip in lines of base64; empty for no log.
func packLog(raw []byte) []byte {
	if len(raw) == 0 {
		return nil
	}
	var packed, lines bytes.Buffer
	z, _ := gzip.NewWriterLevel(&packed, gzip.BestCompression)
	z.Write(raw) // to memory: no errors
	z.Close()
	text := base64.StdEncoding.EncodeToString(packed.Bytes())
	for ; len(text) > lineLen; text = text[lineLen:] {
		lines.WriteString(text[:lineLen] + "\n")
	}
	lines.WriteString(text + "\n")
	return lines.Bytes()
}

func unpackLog(text string) ([]byte, error) {
	if text == "" {
		return nil, nil
	}
	z, err := gzip.NewReader(base64.NewDecoder(base64.StdEncoding, strings.NewReader(text)))
	if err != nil {
		return nil, err
	}
	raw, err := io.ReadAll(io.LimitReader(z, MaxEventLog+1))
	if err == nil && len(raw) > MaxEventLog {
		err = fmt.Errorf("more than %d bytes", MaxEventLog)
	}
	return raw, err
}

// ParseMeasurement reads what Encode wrote.
func ParseMeasurement(b []byte) (*Measurement, error) {
	var f struct {
		Kind     string            `toml:"kind"`
		Host     string            `toml:"host"`
		Taken    string            `toml:"taken"`
		Key      string            `toml:"key"`
		Counter  string            `toml:"counter"`
		Revoked  uint64            `toml:"revoked_below"`
		Next     uint64            `toml:"next_version"`
		Selected []int             `toml:"selected"`
		PIN      bool              `toml:"pin"`
		PCRs     map[string]string `toml:"pcrs"`
		EventLog *struct {
			Missing string `toml:"missing"`
			Packed  string `toml:"packed"`
		} `toml:"event_log"`
	}
	if len(b) > MaxMeasurement {
		return nil, fmt.Errorf("%d bytes are no measurement", len(b))
	}
	if err := decode(b, &f, kindMeasurement1, kindMeasurement); err != nil {
		return nil, fmt.Errorf("not a measurement of `conseal seal measure`: %w", err)
	}
	counter, err := strconv.ParseUint(f.Counter, 0, 32)
	if err != nil {
		return nil, fmt.Errorf("counter = %q is no NV index", f.Counter)
	}
	taken, err := time.Parse(time.RFC3339, f.Taken)
	if err != nil {
		return nil, fmt.Errorf("taken = %q is no time as 2026-01-02T15:04:05Z", f.Taken)
	}
	pcrs, err := parseState(f.PCRs)
	if err != nil {
		return nil, err
	}
	m := &Measurement{Host: f.Host, Counter: uint32(counter), Revoked: f.Revoked, Next: f.Next, Key: f.Key, Taken: taken, Selected: f.Selected, PIN: f.PIN, PCRs: pcrs}
	if (f.EventLog == nil) != (f.Kind == kindMeasurement1) {
		return nil, fmt.Errorf("a %s has an event_log table from version 2 on, and only then", f.Kind)
	}
	if m.NoEventLog = "the measurement is of an agent that sent none"; f.EventLog != nil {
		m.NoEventLog = f.EventLog.Missing
		if m.EventLog, err = unpackLog(f.EventLog.Packed); err != nil {
			return nil, fmt.Errorf("event_log: %w", err)
		}
		if len(m.NoEventLog) > maxMissing || strings.Map(orDot, m.NoEventLog) != m.NoEventLog {
			return nil, errors.New("event_log: its `missing` is too long, or has what cannot be printed")
		}
	}
	for _, i := range m.Selected {
		if pcrs[i] == nil {
			return nil, fmt.Errorf("PCR %d is selected and has no value", i)
		}
	}
	return m, checkCommon(m.Host, "", m.Counter)
}

// Policy is a policy for the state that was measured, over the selected PCRs. It wants
// the host's PIN if there is one.
func (m *Measurement) Policy(comment string, signed time.Time) *Policy {
	p := &Policy{Host: m.Host, Counter: m.Counter, Version: m.Next, State: State{}, PIN: m.PIN, Comment: comment, Signed: signed}
	for _, i := range m.Selected {
		p.State[i] = m.PCRs[i]
	}
	return p
}
