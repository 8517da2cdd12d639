package policy

import (
	"fmt"
	"strconv"
	"strings"
	"time"

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
}

const kindMeasurement = "conseal seal measurement 1"

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
	return []byte(b.String())
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
	}
	if len(b) > MaxDocument {
		return nil, fmt.Errorf("%d bytes are no measurement", len(b))
	}
	if err := decode(b, &f, kindMeasurement); err != nil {
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
	m := &Measurement{f.Host, uint32(counter), f.Revoked, f.Next, f.Key, taken, f.Selected, f.PIN, pcrs}
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
