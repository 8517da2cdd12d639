package main

import (
	"bytes"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"conseal/tpm/eventlog"
	"conseal/tpm/policy"
)

func sealExplain(e *env) *cobra.Command {
	return &cobra.Command{
		Use:   "explain MEASUREMENT",
		Short: "Say in words what a host has measured, by the event log in its measurement",
		Long: `Say in words what a host has measured, by the event log of its firmware that its
measurement carries, and whether the log replays to the PCRs.

The words are those of the log. Where a line ends in a digest, the digest is of what
the line names, as of a file, and nobody has measured the name. Nothing proves that
the host does not lie: compare with a machine that you trust.`,
		Args: args(1, 1),
		RunE: func(_ *cobra.Command, a []string) error {
			m, err := readMeasurement(a[0])
			if err != nil {
				return err
			}
			return explain(e.out, m)
		},
	}
}

// readLog reads the event log of a measurement; if it says nothing, why is what to tell.
func readLog(m *policy.Measurement) (l *eventlog.Log, why string) {
	if len(m.EventLog) == 0 {
		return nil, "the measurement has no event log: " + m.NoEventLog
	}
	l, err := eventlog.Read(m.EventLog, m.PCRs)
	if err != nil {
		return nil, "!! THE EVENT LOG CANNOT BE READ: " + err.Error()
	}
	return l, ""
}

// explain writes all that was measured.
func explain(w io.Writer, m *policy.Measurement) error {
	var b strings.Builder
	fmt.Fprintf(&b, "What host %q says that it has measured, at %s:\n", m.Host, m.Taken.UTC().Format("2006-01-02 15:04:05 UTC"))
	if l, why := readLog(m); l == nil {
		fmt.Fprintln(&b, why)
	} else {
		secureBoot(&b, l)
		for i := range l.PCRs {
			explainPCR(&b, m, &l.PCRs[i])
		}
	}
	_, err := io.WriteString(w, b.String())
	return err
}

func secureBoot(b *strings.Builder, l *eventlog.Log) {
	said := "off"
	if on, err := l.SecureBoot(); err != nil {
		said = "not to be told: " + err.Error()
	} else if on {
		said = "on"
	}
	fmt.Fprintf(b, "Secure Boot: %s\n", said)
}

func explainPCR(b *strings.Builder, m *policy.Measurement, p *eventlog.PCR) {
	selected := ""
	if slices.Contains(m.Selected, p.Index) {
		selected = ", selected"
	}
	name := fmt.Sprintf("PCR %d (%s)%s", p.Index, policy.PCRWords(p.Index), selected)
	switch p.Verdict {
	case eventlog.Untouched:
		return
	case eventlog.Replays:
		fmt.Fprintf(b, "\n%s: the log replays to its value %.4x…\n", name, p.Value)
	default:
		fmt.Fprintf(b, "\n%s: %s\n", name, unexplained(p))
	}
	for _, event := range p.Events {
		fmt.Fprintf(b, "    %s\n", event)
	}
}

// unexplained says that the log does not account for a PCR's value.
func unexplained(p *eventlog.PCR) string {
	said := fmt.Sprintf("!! THE LOG DOES NOT REPLAY to its value %.4x…: it is not what was measured", p.Value)
	if p.Verdict == eventlog.Silent {
		said = fmt.Sprintf("!! THE LOG HAS NO EVENTS for its value %.4x…: nothing says what was measured", p.Value)
	}
	if p.Index >= 8 && p.Index <= 15 {
		said += "; the operating system may have measured on after the firmware's log had ended, as IMA and systemd do"
	}
	return said
}

// explainChange says which events make the selected PCRs differ from one state to
// another, and which values of the other the log does not account for.
func explainChange(w io.Writer, was, is *policy.Measurement) error {
	var b strings.Builder
	after, why := readLog(is)
	if after == nil {
		fmt.Fprintln(&b, why)
		_, err := io.WriteString(w, b.String())
		return err
	}
	before, why := readLog(was)
	for _, i := range was.Selected {
		p := after.PCR(i)
		name := fmt.Sprintf("PCR %d (%s)", i, policy.PCRWords(i))
		switch {
		case p.Verdict != eventlog.Replays && p.Verdict != eventlog.Untouched:
			fmt.Fprintf(&b, "%s: %s\n", name, unexplained(p))
		case bytes.Equal(was.PCRs[i], is.PCRs[i]):
		case before == nil:
			fmt.Fprintf(&b, "%s: of before, %s\n", name, why)
		case before.PCR(i).Verdict != eventlog.Replays && before.PCR(i).Verdict != eventlog.Untouched:
			fmt.Fprintf(&b, "%s: of before, %s\n", name, unexplained(before.PCR(i)))
		default:
			for _, line := range eventlog.Diff(before.PCR(i), p) {
				fmt.Fprintf(&b, "%s: %s\n", name, line)
			}
		}
	}
	_, err := io.WriteString(w, b.String())
	return err
}
