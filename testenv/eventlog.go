package testenv

import (
	"bytes"
	"crypto/sha256"
	"embed"
	"encoding/binary"
	"errors"
	"fmt"
	"unicode/utf16"
)

//go:embed eventlogs/*.bin
var eventLogs embed.FS

// FirmwareLog is the event log of a real machine: testenv/eventlogs/README.md.
func FirmwareLog(name string) (*EventLog, error) {
	raw, err := eventLogs.ReadFile("eventlogs/" + name + ".bin")
	if err != nil {
		return nil, err
	}
	return ParseEventLog(raw)
}

// EventLog is a crypto agile event log, to be changed and written again: TCG PC Client
// Platform Firmware Profile, section 10.2.
type EventLog struct {
	header []byte
	sizes  map[uint16]int // of digests
	Events []LogEvent
}

// LogEvent is one event.
type LogEvent struct {
	PCR, Type uint32
	SHA256    []byte // its digest of the SHA-256 bank
	Data      []byte

	before, after []byte // its digests of other banks
	digests       uint32
}

// EventNoAction is the type of events that are not measured.
const EventNoAction = 3

var errShortLog = errors.New("the event log ends early")

// ParseEventLog is not for logs that somebody else made up: package eventlog is.
func ParseEventLog(raw []byte) (*EventLog, error) {
	if len(raw) < 32+28 {
		return nil, errShortLog
	}
	le := binary.LittleEndian
	spec, end := raw[32:], 32+int(le.Uint32(raw[28:]))
	l := &EventLog{header: raw[:end], sizes: map[uint16]int{}}
	for i := range int(le.Uint32(spec[24:])) {
		l.sizes[le.Uint16(spec[28+4*i:])] = int(le.Uint16(spec[30+4*i:]))
	}
	for b := raw[end:]; len(b) > 0; {
		e := LogEvent{PCR: le.Uint32(b), Type: le.Uint32(b[4:]), digests: le.Uint32(b[8:])}
		b = b[12:]
		for range e.digests {
			n := 2 + l.sizes[le.Uint16(b)]
			switch {
			case le.Uint16(b) == 0x000b:
				e.SHA256 = b[2:n]
			case e.SHA256 == nil:
				e.before = append(e.before, b[:n]...)
			default:
				e.after = append(e.after, b[:n]...)
			}
			b = b[n:]
		}
		n := 4 + int(le.Uint32(b))
		if e.SHA256 == nil || n > len(b) {
			return nil, fmt.Errorf("event %d: %w", len(l.Events), errShortLog)
		}
		e.Data, b = b[4:n], b[n:]
		l.Events = append(l.Events, e)
	}
	return l, nil
}

// Encode writes the log as the kernel gives it out.
func (l *EventLog) Encode() []byte {
	le := binary.LittleEndian
	raw := append([]byte(nil), l.header...)
	for _, e := range l.Events {
		raw = le.AppendUint32(raw, e.PCR)
		raw = le.AppendUint32(raw, e.Type)
		raw = le.AppendUint32(raw, e.digests)
		raw = append(raw, e.before...)
		raw = le.AppendUint16(raw, 0x000b)
		raw = append(raw, e.SHA256...)
		raw = append(raw, e.after...)
		raw = le.AppendUint32(raw, uint32(len(e.Data)))
		raw = append(raw, e.Data...)
	}
	return raw
}

// PCRs are the values of PCRs 0 to 23 that a boot with this log leaves.
func (l *EventLog) PCRs() map[int][]byte {
	pcrs := map[int][]byte{}
	for i := range 24 {
		pcrs[i] = make([]byte, sha256.Size)
		for j := range pcrs[i] {
			if i >= 17 && i <= 22 {
				pcrs[i][j] = 0xff
			}
		}
	}
	for _, e := range l.Events {
		if e.Type != EventNoAction {
			v := sha256.Sum256(append(pcrs[int(e.PCR)], e.SHA256...))
			pcrs[int(e.PCR)] = v[:]
		}
	}
	return pcrs
}

// Replace gives the first event of a PCR whose data holds text, as it is or in UTF-16,
// another digest, as if another version of what it names had been measured.
func (l *EventLog) Replace(pcr uint32, text string) error {
	for i := range l.Events {
		e := &l.Events[i]
		if e.PCR == pcr && contains(e.Data, text) {
			other := sha256.Sum256(e.SHA256)
			e.SHA256 = other[:]
			return nil
		}
	}
	return fmt.Errorf("the log has no event of PCR %d with %q", pcr, text)
}

func contains(data []byte, text string) bool {
	var wide []byte
	for _, unit := range utf16.Encode([]rune(text)) {
		wide = binary.LittleEndian.AppendUint16(wide, unit)
	}
	return bytes.Contains(data, []byte(text)) || bytes.Contains(data, wide)
}
