package testenv_test

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"conseal/testenv"
)

func TestMain(m *testing.M) {
	code := m.Run()
	testenv.Clean()
	os.Exit(code)
}

// faulty is a fault module before a fresh token, used by pkcs11-tool.
type faulty struct {
	*testenv.FaultModule
	t     *testing.T
	token *testenv.Token
}

func newFaulty(t *testing.T) faulty {
	t.Helper()
	if err := testenv.Need("pkcs11-tool", "opensc"); err != nil {
		t.Fatal(err)
	}
	token, err := testenv.NewToken(t.Context(), t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	m, err := testenv.NewFaultModule(t.Context(), t.TempDir(), token.Module)
	if err != nil {
		t.Fatal(err)
	}
	return faulty{m, t, token}
}

func (f faulty) set(fault testenv.Fault) testenv.Rule {
	f.t.Helper()
	r, err := f.Set(fault)
	if err != nil {
		f.t.Fatal(err)
	}
	return r
}

func (f faulty) hits(r testenv.Rule) int {
	f.t.Helper()
	n, err := f.Hits(r)
	if err != nil {
		f.t.Fatal(err)
	}
	return n
}

func (f faulty) clear() {
	f.t.Helper()
	if err := f.Clear(); err != nil {
		f.t.Fatal(err)
	}
}

func (f faulty) tool(args ...string) *exec.Cmd {
	cmd := exec.CommandContext(f.t.Context(), "pkcs11-tool", append([]string{"--module", f.Path}, args...)...)
	cmd.Env = append(os.Environ(), f.token.Env()...)
	return cmd
}

// list runs pkcs11-tool --list-slots, which prints the token's label and flags.
func (f faulty) list() (string, syscall.Signal) {
	f.t.Helper()
	out, err := f.tool("--list-slots").CombinedOutput()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return string(out), max(0, exit.Sys().(syscall.WaitStatus).Signal()) // -1: it ended by itself
	}
	if err != nil {
		f.t.Fatal(err)
	}
	return string(out), 0
}

func (f faulty) wantWorks() {
	f.t.Helper()
	if out, signal := f.list(); !strings.Contains(out, f.token.Label) || signal > 0 {
		f.t.Errorf("without a fault: signal %v\n%s", signal, out)
	}
}

func TestFaults(t *testing.T) {
	f := newFaulty(t)
	f.wantWorks()
	for _, c := range []struct {
		fault  testenv.Fault
		want   string // in the output of --list-slots
		signal syscall.Signal
	}{
		{testenv.Fault{Call: "C_GetTokenInfo", Do: testenv.ReturnValue, Value: 0x30, Times: 1}, "CKR_DEVICE_ERROR", 0},
		{testenv.Fault{Call: "C_GetSlotInfo", Do: testenv.ReturnAfter, Value: 0x31, Times: 1}, "CKR_DEVICE_MEMORY", 0},
		{testenv.Fault{Call: "C_GetTokenInfo", Do: testenv.Segv, Times: 1}, "", syscall.SIGSEGV},
		{testenv.Fault{Call: "C_GetTokenInfo", Do: testenv.Abort, Times: 1}, "", syscall.SIGABRT},
		{testenv.Fault{Call: "C_GetTokenInfo", Do: testenv.Slow, Value: 20, Times: 1}, f.token.Label, 0},
		{testenv.Fault{Call: "C_GetTokenInfo", Do: testenv.Flags, Value: 0x20000, Times: 1}, "final user PIN try", 0},
		{testenv.Fault{Call: "C_GetSlotList", Do: testenv.Gone, Value: 0xE0, Times: 1}, "No slots", 0},
	} {
		r := f.set(c.fault)
		out, signal := f.list()
		if signal != c.signal || !strings.Contains(out, c.want) || f.hits(r) != c.fault.Times {
			t.Errorf("%+v: signal %v, %d hits\n%s", c.fault, signal, f.hits(r), out)
		}
		f.wantWorks() // the fault is used up
		f.clear()
	}
}

// TestFaultsAreCounted: a rule lets calls pass, strikes some, and lets the rest pass,
// and ends when it is taken away.
func TestFaultsAreCounted(t *testing.T) {
	f := newFaulty(t)
	f.wantWorks()
	calls, err := f.Calls()
	if n := calls["C_GetTokenInfo"]; err != nil || n == 0 || calls["C_Initialize"] != 1 || calls["C_Encrypt"] != 0 {
		t.Fatalf("calls %v, %v", calls, err)
	}
	a := f.set(testenv.Fault{Call: "C_Initialize", Do: testenv.Slow, Times: 2, After: 1})
	b := f.set(testenv.Fault{Call: "*", Do: testenv.Slow, Value: 0})
	for run, want := range []int{0, 1, 2, 2} {
		f.wantWorks()
		if got := f.hits(a); got != want {
			t.Errorf("run %d: %d hits, want %d", run, got, want)
		}
	}
	before := f.hits(b)
	f.clear()
	f.wantWorks()
	if before == 0 || f.hits(b) != before {
		t.Errorf("a rule that was taken away struck %d times, %d before", f.hits(b), before)
	}
	for _, bad := range []testenv.Fault{{}, {Call: "C_Sign"}, {Call: "C_Sign", Do: testenv.Abort, Times: -1},
		{Call: "C_Sign", Do: "explode"}, {Call: "C_Sign", Do: testenv.Flags}} {
		if _, err := f.Set(bad); err == nil {
			t.Errorf("took %+v", bad)
		}
	}
}

func TestAHangEndsWithItsRule(t *testing.T) {
	f := newFaulty(t)
	r := f.set(testenv.Fault{Call: "C_GetTokenInfo", Do: testenv.Hang, Times: 1})
	cmd := f.tool("--list-slots")
	var out bytes.Buffer
	cmd.Stdout = &out
	p, err := testenv.StartProcess(cmd)
	if err != nil {
		t.Fatal(err)
	}
	defer p.Kill()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for f.hits(r) == 0 {
		select {
		case <-tick.C:
		case <-p.Done():
			t.Fatalf("it ended before it hung: %v", p.Wait())
		}
	}
	for range 10 { // while the rule stands
		<-tick.C
		select {
		case <-p.Done():
			t.Fatalf("it ended while the rule stood: %v", p.Wait())
		default:
		}
	}
	f.clear()
	if err := p.Wait(); err != nil || !strings.Contains(out.String(), f.token.Label) {
		t.Errorf("after the hang: %v\n%s", err, &out)
	}
}

// TestLoseSessions: the token itself then knows nothing of the session.
func TestLoseSessions(t *testing.T) {
	f := newFaulty(t)
	pin, err := os.ReadFile(f.token.PINFile)
	if err != nil {
		t.Fatal(err)
	}
	login := func() (string, error) {
		out, err := f.tool("--login", "--pin", strings.TrimSpace(string(pin)), "--token-label", f.token.Label, "--list-objects").CombinedOutput()
		return string(out), err
	}
	if out, err := login(); err != nil {
		t.Fatalf("without a fault: %v\n%s", err, out)
	}
	r := f.set(testenv.Fault{Call: "C_FindObjectsInit", Do: testenv.LoseSessions, Times: 1})
	if out, err := login(); err == nil || !strings.Contains(out, "CKR_SESSION_HANDLE_INVALID") || f.hits(r) != 1 {
		t.Errorf("with its sessions lost: %v, %d hits\n%s", err, f.hits(r), out)
	}
}
