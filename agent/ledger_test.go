package agent

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

func ok(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// logged opens a ledger in dir, appends n entries and closes it.
func logged(t *testing.T, dir string, n int) {
	t.Helper()
	l, err := openLedger(dir)
	ok(t, err)
	defer l.Close()
	for i := range n {
		ok(t, l.Append(entry{Event: "sign", Key: fmt.Sprintf("key-%d", i)})(t.Context()))
	}
}

// ledgerLines reads the file as it is.
func ledgerLines(t *testing.T, dir string) []string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(dir, "audit.log"))
	ok(t, err)
	if len(b) > 0 && b[len(b)-1] != '\n' {
		t.Fatalf("the log ends with an unfinished line: %q", b[max(0, len(b)-60):])
	}
	return strings.SplitAfter(strings.TrimSuffix(string(b), "\n"), "\n")
}

// wantChain opens the log, which verifies it, and wants n lines.
func wantChain(t *testing.T, dir string, n int) {
	t.Helper()
	l, err := openLedger(dir)
	ok(t, err)
	defer l.Close()
	if l.sequence != uint64(n) {
		t.Errorf("%d lines, want %d", l.sequence, n)
	}
}

func TestLedgerNamesTheChangedLine(t *testing.T) {
	for name, c := range map[string]struct {
		change func(lines []string) []string
		line   int // that the error names; 0: the log is good
	}{
		"nothing":               {func(l []string) []string { return l }, 0},
		"a changed line":        {func(l []string) []string { l[1] = strings.Replace(l[1], "key-1", "key-9", 1); return l }, 3},
		"a line taken out":      {func(l []string) []string { return append(l[:1], l[2:]...) }, 2},
		"the first taken out":   {func(l []string) []string { return l[1:] }, 1},
		"two lines swapped":     {func(l []string) []string { l[1], l[2] = l[2], l[1]; return l }, 2},
		"a line twice":          {func(l []string) []string { return append(l[:2], l[1:]...) }, 3},
		"an empty line":         {func(l []string) []string { return append([]string{"\n"}, l...) }, 1},
		"no JSON":               {func(l []string) []string { l[3] = "hello\n"; return l }, 4},
		"a space at a line end": {func(l []string) []string { l[0] = strings.Replace(l[0], "\n", " \n", 1); return l }, 2},
		"a carriage return":     {func(l []string) []string { l[0] = strings.Replace(l[0], "\n", "\r\n", 1); return l }, 2},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			logged(t, dir, 4)
			lines := ledgerLines(t, dir)
			lines[3] += "\n"
			path := filepath.Join(dir, "audit.log")
			changed := []byte(strings.Join(c.change(lines), ""))
			ok(t, os.WriteFile(path, changed, 0o600))
			l, err := openLedger(dir)
			if err == nil {
				l.Close()
			}
			if c.line == 0 {
				ok(t, err)
				return
			}
			if err == nil || !strings.Contains(err.Error(), fmt.Sprintf("line %d does not", c.line)) {
				t.Fatalf("error %v, want one that names line %d", err, c.line)
			}
			if now, _ := os.ReadFile(path); !bytes.Equal(now, changed) {
				t.Error("the evidence was changed")
			}
		})
	}
}

func TestLedgerCutsALineTornAnywhere(t *testing.T) {
	dir := t.TempDir()
	logged(t, dir, 3)
	path := filepath.Join(dir, "audit.log")
	whole, err := os.ReadFile(path)
	ok(t, err)
	last := bytes.LastIndexByte(whole[:len(whole)-1], '\n') + 1
	for _, cut := range []int{last + 1, (last + len(whole)) / 2, len(whole) - 1} {
		ok(t, os.WriteFile(path, whole[:cut], 0o600))
		logged(t, dir, 2) // continues after line 2
		wantChain(t, dir, 4)
		if lines := ledgerLines(t, dir); strings.Contains(strings.Join(lines, ""), "key-2") {
			t.Errorf("cut at %d: the torn line is still there", cut)
		}
	}
}

func TestLedgerIsOpenedOnceAndNotThroughALink(t *testing.T) {
	dir := t.TempDir()
	l, err := openLedger(dir)
	ok(t, err)
	if other, err := openLedger(dir); err == nil {
		other.Close()
		t.Error("two agents have one log")
	} else if !strings.Contains(err.Error(), "another agent") {
		t.Error(err)
	}
	ok(t, l.Close())
	if info, err := os.Stat(filepath.Join(dir, "audit.log")); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%v: mode %v", err, info.Mode())
	}
	elsewhere := filepath.Join(t.TempDir(), "elsewhere")
	linked := t.TempDir()
	ok(t, os.Symlink(elsewhere, filepath.Join(linked, "audit.log")))
	if l, err := openLedger(linked); err == nil {
		l.Close()
		t.Error("the log was opened through a link")
	}
	if _, err := os.Lstat(elsewhere); !errors.Is(err, os.ErrNotExist) {
		t.Error("a file was made through a link")
	}
}

func TestLedgerConcurrentAppends(t *testing.T) {
	const writers, each = 32, 25
	dir := t.TempDir()
	l, err := openLedger(dir)
	ok(t, err)
	var wg sync.WaitGroup
	for w := range writers {
		wg.Go(func() {
			for i := range each {
				wait := l.Append(entry{Event: "sign", Session: fmt.Sprintf("%d/%d", w, i)})
				for range 2 { // as often as it is called
					if err := wait(t.Context()); err != nil {
						t.Error(err)
					}
				}
			}
		})
	}
	wg.Wait()
	ok(t, l.Close())
	wantChain(t, dir, writers*each)
	next := make([]int, writers)
	for _, line := range ledgerLines(t, dir) {
		var e entry
		ok(t, json.Unmarshal([]byte(line), &e))
		var w, i int
		_, err := fmt.Sscanf(e.Session, "%d/%d", &w, &i)
		ok(t, err)
		if next[w] != i {
			t.Errorf("writer %d: entry %d comes after %d", w, i, next[w]-1)
		}
		next[w] = i + 1
	}
}

// Entries that wait when the writer gets to them are on disk together: when the
// first has returned, all are there.
func TestLedgerSharesOneSync(t *testing.T) {
	dir := t.TempDir()
	l, err := openLedger(dir)
	ok(t, err)
	l.stop() // and start the writer anew, with a queue that has filled meanwhile
	<-l.done
	l.done = make(chan struct{})
	var waits []func(context.Context) error
	for range cap(l.in) {
		waits = append(waits, l.Append(entry{Event: "sign"}))
	}
	ctx, stop := context.WithCancel(context.Background())
	l.stop = stop
	go l.write(ctx)
	ok(t, waits[0](t.Context()))
	if n := len(ledgerLines(t, dir)); n != len(waits) {
		t.Errorf("%d lines are there when the first is settled, want %d", n, len(waits))
	}
	for _, wait := range waits {
		ok(t, wait(t.Context()))
	}
	ok(t, l.Close())
	wantChain(t, dir, len(waits))
}

func TestLedgerAfterClose(t *testing.T) {
	l, err := openLedger(t.TempDir())
	ok(t, err)
	before := l.Append(entry{Event: "sign"})
	ok(t, before(t.Context()))
	ok(t, l.Close())
	ok(t, before(t.Context())) // what is on disk stays so
	for range 100 {            // also once its queue is full
		after := l.Append(entry{Event: "sign"})
		for range 2 {
			if err := after(t.Context()); !errors.Is(err, errLedger) {
				t.Fatalf("after Close: %v", err)
			}
		}
	}
}

func TestLedgerWaitEndsWithItsContext(t *testing.T) {
	l := &ledger{in: make(chan *pendingEntry, 1), done: make(chan struct{})} // a writer that hangs
	ctx, cancel := context.WithCancelCause(t.Context())
	wait := l.Append(entry{})
	cancel(errors.New("the caller left"))
	if err := wait(ctx); !errors.Is(err, errLedger) || !strings.Contains(err.Error(), "the caller left") {
		t.Error(err)
	}
}

// child runs another test of this binary as a process of its own.
func child(t *testing.T, test, dir string) *exec.Cmd {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^"+test+"$", "-test.count=1")
	cmd.Env = append(os.Environ(), childFolder+"="+dir)
	cmd.Stderr = os.Stderr
	return cmd
}

const childFolder = "CONSEAL_TEST_CHILD" // the folder a child works in; unset in the tests themselves

// TestLedgerFullDisk limits the size of files in a process of its own: the kernel
// then refuses a write in the middle, as a full disk does.
func TestLedgerFullDisk(t *testing.T) {
	if dir := os.Getenv(childFolder); dir != "" {
		fillDisk(t, dir)
		return
	}
	dir := t.TempDir()
	out, err := child(t, "TestLedgerFullDisk", dir).Output()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	wantChain(t, dir, len(ledgerLines(t, dir)))
	var sessions []string
	for _, line := range ledgerLines(t, dir) {
		var e entry
		ok(t, json.Unmarshal([]byte(line), &e))
		sessions = append(sessions, e.Session)
	}
	if got := strings.Join(sessions, " "); got != "before 0 1 2 after" && got != "before 0 1 after" {
		t.Errorf("the log has %q", got)
	}
}

func fillDisk(t *testing.T, dir string) {
	signal.Ignore(unix.SIGXFSZ)
	l, err := openLedger(dir)
	ok(t, err)
	ok(t, l.Append(entry{Session: "before"})(t.Context()))
	limit := func(bytes uint64) {
		var r unix.Rlimit
		ok(t, unix.Getrlimit(unix.RLIMIT_FSIZE, &r))
		r.Cur = bytes
		ok(t, unix.Setrlimit(unix.RLIMIT_FSIZE, &r))
	}
	limit(900)
	failed := 0
	for i := range 20 {
		err := l.Append(entry{Session: fmt.Sprint(i)})(t.Context())
		if err != nil {
			failed++
			if !errors.Is(err, errLedger) || !errors.Is(err, unix.EFBIG) || !strings.Contains(err.Error(), dir) {
				t.Fatalf("entry %d: %v", i, err)
			}
		} else if failed > 0 {
			t.Fatalf("entry %d went in after another did not, into %d bytes", i, 900)
		}
	}
	if failed == 0 {
		t.Fatal("the disk never was full")
	}
	if info, err := os.Stat(filepath.Join(dir, "audit.log")); err != nil || info.Size() != 900 {
		t.Fatalf("%v: the write that failed left no trace, so this tests nothing: %d bytes", err, info.Size())
	}
	limit(unix.RLIM_INFINITY)
	ok(t, l.Append(entry{Session: "after"})(t.Context()))
	ok(t, l.Close())
}

// What was acknowledged is in the log of a process that was killed.
func TestLedgerSurvivesAKill(t *testing.T) {
	if dir := os.Getenv(childFolder); dir != "" {
		appendForEver(t, dir)
		return
	}
	dir := t.TempDir()
	cmd := child(t, "TestLedgerSurvivesAKill", dir)
	pipe, err := cmd.StdoutPipe()
	ok(t, err)
	ok(t, cmd.Start())
	var acknowledged []string
	lines := bufio.NewScanner(pipe)
	for lines.Scan() {
		if acknowledged = append(acknowledged, lines.Text()); len(acknowledged) == 200 {
			ok(t, cmd.Process.Kill())
		}
	}
	if err := cmd.Wait(); err == nil || len(acknowledged) < 200 {
		t.Fatalf("the child ended by itself after %d entries: %v", len(acknowledged), err)
	}
	l, err := openLedger(dir)
	ok(t, err)
	ok(t, l.Close())
	there := map[string]bool{}
	for _, line := range ledgerLines(t, dir) {
		var e entry
		ok(t, json.Unmarshal([]byte(line), &e))
		there[e.Session] = true
	}
	for _, session := range acknowledged[:len(acknowledged)-1] { // the last line may be torn
		if !there[session] {
			t.Errorf("entry %q was acknowledged and is not in the log", session)
		}
	}
}

func appendForEver(t *testing.T, dir string) {
	l, err := openLedger(dir)
	ok(t, err)
	var mu sync.Mutex
	var wg sync.WaitGroup
	for w := range 8 {
		wg.Go(func() {
			for i := 0; ; i++ {
				session := fmt.Sprintf("%d/%d", w, i)
				if err := l.Append(entry{Session: session})(t.Context()); err != nil {
					return
				}
				mu.Lock()
				_, err := io.WriteString(os.Stdout, session+"\n")
				mu.Unlock()
				if err != nil {
					return
				}
			}
		})
	}
	wg.Wait()
}
