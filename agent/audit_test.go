package agent

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"conseal/agent/peer/peerpb"
	"conseal/protocol"
)

func fillLedger(t *testing.T, dir string, entries int) {
	t.Helper()
	l, err := openLedger(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	var wg sync.WaitGroup
	for i := range entries {
		wg.Go(func() {
			wait := l.Append(entry{Event: "sign", Key: fmt.Sprint("key", i), Asker: "alpha"})
			for range 2 { // as often as one likes
				if err := wait(t.Context()); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
}

func TestLedgerKeepsEveryEntry(t *testing.T) {
	dir := t.TempDir()
	fillLedger(t, dir, 300)
	fillLedger(t, dir, 1) // goes on after a restart
	b, err := os.ReadFile(filepath.Join(dir, "audit.log"))
	if err != nil {
		t.Fatal(err)
	}
	if n := bytes.Count(b, []byte("\n")); n != 301 {
		t.Errorf("%d lines for 301 entries", n)
	}
	for i := range 300 {
		if !bytes.Contains(b, []byte(fmt.Sprintf(`"key":"key%d"`, i))) {
			t.Errorf("entry %d is missing", i)
		}
	}
}

func TestLedgerRefusesWhatWasChanged(t *testing.T) {
	for name, change := range map[string]func(lines []string) []string{
		"a word changed": func(l []string) []string { l[3] = strings.Replace(l[3], "alpha", "gamma", 1); return l },
		"a line removed": func(l []string) []string { return append(l[:4], l[5:]...) },
		"lines swapped":  func(l []string) []string { l[4], l[5] = l[5], l[4]; return l },
		"a line twice":   func(l []string) []string { return append(l[:5], l[4:]...) },
		"start cut off":  func(l []string) []string { return l[2:] },
		"garbage":        func(l []string) []string { l[6] = "{}"; return l },
	} {
		dir := t.TempDir()
		fillLedger(t, dir, 10)
		path := filepath.Join(dir, "audit.log")
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		lines := change(strings.Split(strings.TrimSuffix(string(b), "\n"), "\n"))
		changed := strings.Join(lines, "\n") + "\n"
		if err := os.WriteFile(path, []byte(changed), 0o600); err != nil {
			t.Fatal(err)
		}
		if l, err := openLedger(dir); err == nil {
			l.Close()
			t.Errorf("%s: the log was taken", name)
		} else if !strings.Contains(err.Error(), "was changed: line") {
			t.Errorf("%s: %v", name, err)
		}
		if after, _ := os.ReadFile(path); string(after) != changed {
			t.Errorf("%s: the evidence was touched", name)
		}
	}
}

func TestLedgerCutsATornLineOff(t *testing.T) {
	dir := t.TempDir()
	fillLedger(t, dir, 3)
	path := filepath.Join(dir, "audit.log")
	f, err := os.OpenFile(path, os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	fmt.Fprint(f, `{"seq":4,"time":"20`)
	f.Close()
	fillLedger(t, dir, 2)
	fillLedger(t, dir, 1) // verifies
	b, _ := os.ReadFile(path)
	if n := bytes.Count(b, []byte("\n")); n != 6 {
		t.Errorf("%d lines, want 6", n)
	}
}

func TestLedgerHasOneWriterAndEnds(t *testing.T) {
	dir := t.TempDir()
	l, err := openLedger(dir)
	if err != nil {
		t.Fatal(err)
	}
	if second, err := openLedger(dir); err == nil || !strings.Contains(err.Error(), "another agent") {
		second.Close()
		t.Errorf("a second writer: %v", err)
	}
	l.Close()
	if err := l.Append(entry{})(t.Context()); !errors.Is(err, errLedger) {
		t.Errorf("after Close: %v", err)
	}
}

// TestLedgerRecovers lets a write fail, as on a full disk: the entry is refused,
// and the next one follows the last that counts.
func TestLedgerRecovers(t *testing.T) {
	dir := t.TempDir()
	fillLedger(t, dir, 2)
	l, err := openLedger(dir)
	if err != nil {
		t.Fatal(err)
	}
	good := l.f
	readOnly, err := os.Open(good.Name())
	if err != nil {
		t.Fatal(err)
	}
	defer readOnly.Close()
	l.f = readOnly // the writer is idle
	if err := l.Append(entry{Event: "sign"})(t.Context()); !errors.Is(err, errLedger) {
		t.Errorf("on a file that cannot be written: %v", err)
	}
	l.f = good
	if err := l.Append(entry{Event: "sign"})(t.Context()); err != nil {
		t.Error(err)
	}
	l.Close()
	fillLedger(t, dir, 1) // verifies
}

// fakeSession answers each step as the test says.
type fakeSession struct {
	start protocol.Ready
	step  func(protocol.Message) (protocol.Ready, error)
}

func (f *fakeSession) Start() (protocol.Ready, error)                  { return f.start, nil }
func (f *fakeSession) Step(m protocol.Message) (protocol.Ready, error) { return f.step(m) }
func (f *fakeSession) Close()                                          {}
func silentSender(protocol.HostID, *peerpb.Frame) error                { return nil }
func stepEvent(from protocol.HostID) event                             { return event{from: from, step: &peerpb.Step{Round: 1}} }
func party(t *testing.T, err error) protocol.HostID {
	t.Helper()
	var p *partyError
	if !errors.As(err, &p) {
		t.Fatalf("%v names no party", err)
	}
	return p.host
}

func TestDriveNamesWhoIsSilent(t *testing.T) {
	s := newSessions(1)
	box, err := s.open(protocol.SessionID{1}, "a", []protocol.HostID{"a", "b", "c"})
	if err != nil {
		t.Fatal(err)
	}
	s.deliver(box.id[:], stepEvent("b"))
	ctx, cancel := context.WithCancelCause(t.Context())
	err = drive(ctx, "a", &fakeSession{step: func(protocol.Message) (protocol.Ready, error) {
		cancel(context.DeadlineExceeded) // b has been heard by now
		return protocol.Ready{}, nil
	}}, box, silentSender, nil)
	if party(t, err) != "c" {
		t.Errorf("got %v, want c to be silent", err)
	}
}

func TestSessionsKeepPartiesApart(t *testing.T) {
	s := newSessions(2)
	box, err := s.open(protocol.SessionID{1}, "a", []protocol.HostID{"a", "b", "c"})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.open(protocol.SessionID{1}, "a", []protocol.HostID{"b"}); !errors.Is(err, errReplay) {
		t.Errorf("the same id twice: %v", err)
	}
	for range 1000 {
		s.deliver(box.id[:], stepEvent("b"))        // floods
		s.deliver(box.id[:], stepEvent("stranger")) // is no party
		s.deliver([]byte("short"), stepEvent("b"))
	}
	s.deliver(box.id[:], stepEvent("c"))
	s.gone("c", errors.New("cut"))
	var fromC, gone int
	for range len(box.events) {
		switch ev := <-box.events; {
		case ev.from == "stranger":
			t.Fatal("a stranger's step arrived")
		case ev.from == "c" && ev.err != nil:
			gone++
		case ev.from == "c":
			fromC++
		}
	}
	if fromC != 1 || gone != 1 {
		t.Errorf("of c came %d steps and %d ends, want one each", fromC, gone)
	}
	s.close(box)
	s.deliver(box.id[:], stepEvent("b"))
	if len(box.events) != 0 {
		t.Error("a closed session got a step")
	}
	for i, want := range []bool{true, true, false} {
		if s.admit("b") != want {
			t.Errorf("session %d of b: want %v", i+1, want)
		}
	}
	if !s.admit("c") {
		t.Error("b's sessions count for c")
	}
	s.release("b")
	if !s.admit("b") {
		t.Error("a session that ended still counts")
	}
}
