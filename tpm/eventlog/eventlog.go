// Package eventlog reads what firmware, boot loader and kernel say that they measured:
// the event log of the TCG PC Client Platform Firmware Profile, in the crypto agile
// format, for SHA-256 PCRs. Use [Read], and [Log.Check] where the PCRs come from a quote.
//
// Nothing authenticates a log but its replay to PCR values, and a PCR's value only the
// digests of its events: names of files and kinds of events are what whoever wrote the
// log says ([Event.Measured] tells which words are in the digest). A host that lies
// about its PCRs can write a log that fits them.
//
// Parsing and replay are those of go-eventlog, the parser of go-tpm-tools.
package eventlog

import (
	"bytes"
	"crypto"
	"crypto/sha256"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/google/go-eventlog/extract"
	"github.com/google/go-eventlog/register"
	"github.com/google/go-eventlog/tcg"

	"conseal/tpm/policy"
)

// Log is an event log beside the PCRs that it must explain. Events of other PCRs are
// not in it.
type Log struct {
	PCRs []PCR // ascending
}

// PCR is one register with what the log says of it.
type PCR struct {
	Index   int
	Value   []byte
	Verdict Verdict
	Events  []Event // in order, without those that are not measured (EV_NO_ACTION)

	raw []tcg.Event
}

// Verdict is what the replay of a PCR came to.
type Verdict int

const (
	Differs   Verdict = iota // the events give another value: the log is not of this state, or lies
	Silent                   // there is a value, and the log has no events for it
	Untouched                // no events, and the value that it has after a reset
	Replays                  // the events give the value
)

// Read parses a log and replays it to the values of PCRs. An empty log is an error;
// that PCRs do not replay is not: see [PCR.Verdict].
func Read(raw []byte, pcrs policy.State) (*Log, error) {
	if len(raw) == 0 {
		return nil, errors.New("the event log is empty")
	}
	if len(raw) > policy.MaxEventLog {
		return nil, fmt.Errorf("an event log of %d bytes: at most %d are read", len(raw), policy.MaxEventLog)
	}
	parsed, err := tcg.ParseEventLog(raw, tcg.ParseOpts{})
	if err != nil {
		return nil, errors.New("malformed event log: " + printable(err.Error())) // it may quote the log
	}
	if !slices.Contains(parsed.Algs, register.HashSHA256) {
		return nil, errors.New("the event log has no SHA-256 digests: it is of another bank, or of TPM 1.2")
	}
	l := &Log{}
	for _, i := range pcrs.Indices() {
		if len(pcrs[i]) != sha256.Size {
			return nil, fmt.Errorf("PCR %d: a value of %d bytes, not %d", i, len(pcrs[i]), sha256.Size)
		}
		l.PCRs = append(l.PCRs, replay(parsed, i, pcrs[i]))
	}
	return l, nil
}

func replay(parsed *tcg.EventLog, index int, value []byte) PCR {
	p := PCR{Index: index, Value: value}
	events, err := parsed.Verify([]register.MR{register.PCR{Index: index, Digest: value, DigestAlg: crypto.SHA256}})
	switch {
	case err != nil:
		for _, e := range parsed.Events(register.HashSHA256) {
			if e.Index == index && e.Type != tcg.NoAction {
				p.raw = append(p.raw, e)
			}
		}
	case len(events) > 0:
		p.Verdict, p.raw = Replays, events
	case bytes.Equal(value, reset(index)): // go-eventlog passes any value without events
		p.Verdict = Untouched
	default:
		p.Verdict = Silent
	}
	for _, e := range p.raw {
		p.Events = append(p.Events, describe(e))
	}
	return p
}

// reset is the value of a PCR after TPM Reset: TCG PC Client Platform TPM Profile,
// section 4.6.2.
func reset(index int) []byte {
	if index >= 17 && index <= 22 {
		return bytes.Repeat([]byte{0xff}, sha256.Size)
	}
	return make([]byte, sha256.Size)
}

// Check reads a log beside PCRs that a TPM has quoted, and wants that it explains each
// of them: see [conseal/tpm/attest.Pending.Verify].
func Check(raw []byte, quoted policy.State) (*Log, error) {
	l, err := Read(raw, quoted)
	if err != nil {
		return nil, err
	}
	var not []int
	explained := false
	for _, p := range l.PCRs {
		if p.Verdict == Differs || p.Verdict == Silent {
			not = append(not, p.Index)
		}
		explained = explained || p.Verdict == Replays
	}
	if len(not) > 0 {
		return nil, fmt.Errorf("the event log does not replay to PCRs %v", not)
	}
	if !explained {
		return nil, fmt.Errorf("the event log says nothing of PCRs %v", quoted.Indices())
	}
	return l, nil
}

// PCR returns one register; nil if the log is not beside it.
func (l *Log) PCR(index int) *PCR {
	for i := range l.PCRs {
		if l.PCRs[i].Index == index {
			return &l.PCRs[i]
		}
	}
	return nil
}

// SecureBoot says whether Secure Boot was on, as [extract.ParseSecurebootState] judges:
// it knows the ways in which a log that replays can still deceive.
func (l *Log) SecureBoot() (on bool, err error) {
	p := l.PCR(7)
	if p == nil || p.Verdict != Replays {
		return false, errors.New("the event log does not replay to PCR 7")
	}
	seen := false
	for i, e := range p.raw {
		// What it would panic on, or take gigabytes for.
		if _, known := e.Type.KnownName(); !known {
			return false, fmt.Errorf("PCR 7 has an event of the unknown type %#x", uint32(e.Type))
		}
		if v, err := variable(e); err == nil && e.Type == tcg.EFIVariableDriverConfig && keyLists[v.VarName()] != "" {
			if _, err := parseSignatures(v.VariableData); err != nil {
				return false, err
			}
		}
		seen = seen || p.Events[i].Subject == subjectSecureBoot
	}
	if !seen {
		return false, errors.New("the event log does not say")
	}
	state, err := extract.ParseSecurebootState(p.raw, extract.TPMRegisterConfig, extract.Opts{AllowEmptySBVar: true})
	if err != nil {
		return false, errors.New(printable(err.Error()))
	}
	return state.Enabled, nil
}

// Diff says in words what a PCR has measured otherwise in another log; both must
// replay.
func Diff(was, is *PCR) []string {
	gone, come := without(was.Events, is.Events), without(is.Events, was.Events)
	if len(gone)+len(come) == 0 {
		if slices.EqualFunc(was.Events, is.Events, same) {
			return nil
		}
		return []string{"the same events in another order"}
	}
	var lines []string
	paired := map[string]int{} // by subject
	now := map[string][]Event{}
	for _, e := range come {
		now[e.Subject] = append(now[e.Subject], e)
	}
	for _, old := range gone {
		if same := now[old.Subject]; len(same) > 0 {
			lines = append(lines, changed(old, same[0]))
			now[old.Subject] = same[1:]
			paired[old.Subject]++
			continue
		}
		lines = append(lines, "no more: "+old.String())
	}
	for _, e := range come {
		if paired[e.Subject]--; paired[e.Subject] < 0 {
			lines = append(lines, "new: "+e.String())
		}
	}
	return lines
}

func changed(old, now Event) string {
	if old.Measured && now.Measured && old.Detail != now.Detail {
		return fmt.Sprintf("%s changed from %q to %q", old.Subject, old.Detail, now.Detail)
	}
	return fmt.Sprintf("%s changed from digest %x to %x", old.Subject, old.Digest, now.Digest)
}

func same(a, b Event) bool { return a.Type == b.Type && bytes.Equal(a.Digest, b.Digest) }

// without returns the events that are more often in a than in b.
func without(a, b []Event) (left []Event) {
	key := func(e Event) string { return e.Type + string(e.Digest) }
	count := map[string]int{}
	for _, e := range b {
		count[key(e)]++
	}
	for _, e := range a {
		if count[key(e)]--; count[key(e)] < 0 {
			left = append(left, e)
		}
	}
	return left
}

// Event is one measurement in words.
type Event struct {
	Type    string // TCG name, as "EV_IPL"; the log's say
	Digest  []byte // SHA-256; nil if the log has none
	Subject string // what was measured, in the same words in each log
	Detail  string // what it was; may be empty
	// Measured: these words are what the digest is of. Else the digest is of something
	// else, as of the file that Subject names, and the words are only the log's say.
	Measured bool
}

// String is one line of printable text.
func (e Event) String() string {
	var b strings.Builder
	b.WriteString(e.Subject)
	if e.Detail != "" {
		b.WriteString(": " + e.Detail)
	}
	if !e.Measured {
		fmt.Fprintf(&b, " [digest %x]", e.Digest)
	}
	return b.String()
}
