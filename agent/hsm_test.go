package agent_test

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"conseal/hsm"
	"conseal/testenv"
)

// faultyToken puts a fault module before the token of a host that is not running.
func faultyToken(ctx context.Context, t *testing.T, h *testenv.Host) *testenv.FaultModule {
	t.Helper()
	m, err := testenv.NewFaultModule(ctx, t.TempDir(), h.Token.Module)
	must(t, err)
	h.Token.URI = strings.Replace(h.Token.URI, h.Token.Module, m.Path, 1)
	h.Token.Module = m.Path
	must(t, h.WriteConfig())
	return m
}

// TestTokenGoneForAWhile pulls the token of one host out, so that it can neither meet
// its peers nor store a share, and puts it back.
func TestTokenGoneForAWhile(t *testing.T) {
	ctx, f := newFleet(t)
	gamma := f.Host("gamma")
	m := faultyToken(ctx, t, gamma)
	must(t, gamma.Start(ctx))
	calls, err := m.Calls()
	must(t, err)
	if calls["C_Login"] != 1 {
		t.Fatalf("the agent does not use the fault module: %v", calls)
	}
	gone, err := m.Set(testenv.Fault{Call: "*", Do: testenv.Gone, Value: 0xE0}) // CKR_TOKEN_NOT_PRESENT
	must(t, err)
	must(t, f.Host("alpha").Start(ctx))
	must(t, f.Host("beta").Start(ctx))
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for hits := 0; hits < 20; <-tick.C { // it looks for the token again and again
		hits, err = m.Hits(gone)
		must(t, err)
		must(t, ctx.Err())
		if !gamma.Running() {
			t.Fatalf("the agent ended with its token:\n%s", gamma.LogTail())
		}
	}
	_, err = gamma.Client().Status(ctx)
	must(t, err)
	key, err := gamma.Client().GetKey(ctx, "first")
	must(t, err)
	if key.Condition == "ready" || key.Condition == "lost" || key.Condition == "refused" {
		t.Errorf("without its token the host says that the key is %s: %s", key.Condition, key.Detail)
	}
	t.Logf("key %s: %s", key.Condition, key.Detail)
	if log, err := os.ReadFile(gamma.LogFile()); err != nil || !strings.Contains(string(log), "class token") {
		t.Errorf("the log does not say that the token is gone: %v", err)
	}
	must(t, m.Clear())
	must(t, f.WaitReady(ctx, "first"))
	checkKey(ctx, t, f, "first")
	if calls, err = m.Calls(); err != nil || calls["C_Login"] < 2 {
		t.Errorf("%d logins: the token was never away, %v", calls["C_Login"], err)
	}
}

// pinOf reads a host's PIN.
func pinOf(t *testing.T, h *testenv.Host) []byte {
	t.Helper()
	b, err := os.ReadFile(h.Token.PINFile)
	must(t, err)
	return bytes.TrimSpace(b)
}

// ofProcess is what others can see of a process.
func ofProcess(t *testing.T, pid int) []byte {
	t.Helper()
	var all []byte
	for _, name := range []string{"environ", "cmdline", "status", "maps"} {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/%s", pid, name))
		if err != nil && !os.IsPermission(err) { // what we cannot read nobody like us can
			t.Fatal(err)
		}
		all = append(all, b...)
	}
	if !bytes.Contains(all, []byte("Threads:")) {
		t.Fatalf("nothing was read of process %d", pid)
	}
	return all
}

// TestNoPINAnywhere looks for the PIN of a host with an HSM, its share, data key and
// root, in all files of the fleet, logs at debug level among them, and in what is seen
// of the agent's process.
func TestNoPINAnywhere(t *testing.T) {
	ctx, f := newFleet(t)
	gamma := f.Host("gamma")
	must(t, f.Start(ctx))
	must(t, f.WaitReady(ctx, "first"))
	checkKey(ctx, t, f, "first")
	pid := gamma.Process().Pid()
	seen := ofProcess(t, pid)
	limits, err := os.ReadFile(fmt.Sprintf("/proc/%d/limits", pid))
	must(t, err)
	if !slices.ContainsFunc(strings.Split(string(limits), "\n"), func(line string) bool {
		fields := strings.Fields(line)
		return strings.HasPrefix(line, "Max core file size") && len(fields) >= 6 && fields[4] == "0" && fields[5] == "0"
	}) {
		t.Errorf("the agent may write a core file:\n%s", limits)
	}
	must(t, f.Stop(ctx))
	secrets := hsmSecretsOf(ctx, t, gamma)
	pin := secrets["PIN"]
	must(t, os.Remove(gamma.Token.PINFile)) // the one place where it belongs
	found, files := search(t, f.Dir, secrets, nil)
	for name, s := range secrets {
		if bytes.Contains(seen, s) {
			found = append(found, name+" in /proc")
		}
	}
	if len(found) > 0 || files < 20 {
		t.Errorf("in %d files found %q", files, found)
	}
	// The same search finds what is there.
	for _, name := range []string{"PIN", "data key"} {
		planted := filepath.Join(gamma.State(), "planted")
		must(t, os.WriteFile(planted, append([]byte("x"), secrets[name]...), 0o600))
		if found, _ := search(t, f.Dir, secrets, nil); len(found) == 0 {
			t.Errorf("a planted %s is not found", name)
		}
		must(t, os.Remove(planted))
	}
	inEnvironment, inArguments := exec.Command("cat"), exec.Command("cat", "-", string(pin))
	inEnvironment.Env = append(os.Environ(), "PIN="+string(pin))
	for _, cmd := range []*exec.Cmd{inEnvironment, inArguments} {
		in, err := cmd.StdinPipe()
		must(t, err)
		out, err := cmd.StdoutPipe()
		must(t, err)
		p, err := testenv.StartProcess(cmd)
		must(t, err)
		_, err = in.Write([]byte("x"))
		must(t, err)
		_, err = io.ReadFull(out, make([]byte, 1)) // a process has no environment yet while it starts
		must(t, err)
		if !bytes.Contains(ofProcess(t, p.Pid()), pin) {
			t.Errorf("the PIN is not found in what is seen of %v", cmd.Args)
		}
		p.Kill()
	}
}

// hsmSecretsOf reads what must not be found anywhere from a stopped host with an HSM.
func hsmSecretsOf(ctx context.Context, t *testing.T, h *testenv.Host) map[string][]byte {
	t.Helper()
	t.Setenv("SOFTHSM2_CONF", h.Token.Conf)
	pin := pinOf(t, h)
	module := h.Token.Module
	m := faultyToken(ctx, t, h) // a module of its own, whatever tokens this process saw before
	p, err := hsm.Open(ctx, hsm.Config{URI: h.Token.URI, Name: h.Name, StateDir: filepath.Join(h.State(), "hsm")})
	must(t, err)
	defer p.Close()
	if calls, err := m.Calls(); err != nil || calls["C_Login"] != 1 {
		t.Fatalf("calls %v, %v", calls, err)
	}
	h.Token.URI, h.Token.Module = strings.Replace(h.Token.URI, m.Path, module, 1), module
	out := vaultSecrets(ctx, t, h, p)
	out["PIN"] = pin
	return out
}
