//go:build cgo

package helper_test

import (
	"bufio"
	"bytes"
	"context"
	"crypto"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"conseal/hsm"
	"conseal/hsm/helper"
	"conseal/internal/pin"
	"conseal/internal/secret"
	"conseal/testenv"
)

// command is a helper with its socket, which nobody restricted.
func command(t *testing.T, socket *os.File) *exec.Cmd {
	t.Helper()
	cmd := exec.Command("/proc/self/exe", helper.Command)
	cmd.Stdin = socket
	return cmd
}

// agent is a process of its own that has a token open.
type agent struct {
	*testenv.Process
	stdin io.WriteCloser
	said  *bufio.Reader
}

// startAgent waits until the agent has done its work and is idle. pipe, if not nil,
// becomes its descriptor 3.
func startAgent(t *testing.T, mode string, cfg hsm.Config, pipe *os.File, env ...string) *agent {
	t.Helper()
	text, err := json.Marshal(cfg)
	must(t, err)
	exe, err := os.Executable()
	must(t, err)
	cmd := exec.Command(exe)
	if mode == "bounded" { // a service whose unit takes that away
		must(t, testenv.Need("setpriv", "util-linux"))
		cmd = exec.Command("setpriv", "--bounding-set", "-setpcap", exe)
		mode = "protected"
	}
	cmd.Env = append(append(os.Environ(), "HELPER_TEST_AGENT="+mode, "HELPER_TEST_CONFIG="+string(text)), env...)
	if pipe != nil {
		cmd.ExtraFiles = []*os.File{pipe}
	}
	cmd.Stderr = os.Stderr
	stdin, err := cmd.StdinPipe()
	must(t, err)
	r, w, err := os.Pipe()
	must(t, err)
	cmd.Stdout = w
	p, err := testenv.StartProcess(cmd)
	must(t, err)
	w.Close()
	t.Cleanup(p.Kill)
	t.Cleanup(func() { r.Close() })
	a := &agent{p, stdin, bufio.NewReader(r)}
	if line, err := a.said.ReadString('\n'); err != nil || line != "ready\n" {
		t.Fatalf("the agent said %q, %v", line, err)
	}
	return a
}

// agentMain is an agent: it opens its token, works, says "ready", and for each byte of its
// standard input works again.
func agentMain(mode string) int {
	var cfg hsm.Config
	err := json.Unmarshal([]byte(os.Getenv("HELPER_TEST_CONFIG")), &cfg)
	if err == nil && mode == "protected" {
		err = unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0)
	}
	var h *helper.HSM
	if err == nil {
		h, err = helper.Open(context.Background(), helper.Config{HSM: cfg, Environment: []string{"SOFTHSM2_CONF", "HELPER_TEST_MODULE"}})
	}
	for err == nil {
		var key *secret.Bytes
		if key, _, err = h.Seal(context.Background(), "k"); err != nil {
			break
		}
		key.Wipe()
		fmt.Println("ready")
		_, err = os.Stdin.Read([]byte{0})
	}
	if err == io.EOF {
		h.Close()
		return 0
	}
	fmt.Println(err)
	return 1
}

func status(t *testing.T, pid int) map[string]string {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	must(t, err)
	all := map[string]string{}
	for line := range strings.Lines(string(b)) {
		name, value, _ := strings.Cut(line, ":")
		all[name] = strings.TrimSpace(value)
	}
	return all
}

// TestTheHelperHasLittle looks at a helper from outside.
func TestTheHelperHasLittle(t *testing.T) {
	t.Setenv("HELPER_TEST_CANARY", "canary")
	t.Setenv("HELPER_TEST_MODULE", "real")
	h, cfg := newHost(t)
	pid := theHelper(t)
	s := status(t, pid)
	if s["NoNewPrivs"] != "1" {
		t.Error("it may gain privileges")
	}
	for _, set := range []string{"CapPrm", "CapEff", "CapBnd", "CapInh", "CapAmb"} {
		caps, err := strconv.ParseUint(s[set], 16, 64)
		must(t, err)
		if os.Geteuid() == 0 && caps&^(1<<unix.CAP_DAC_OVERRIDE|1<<unix.CAP_IPC_LOCK) != 0 || os.Geteuid() != 0 && set == "CapEff" && caps != 0 {
			t.Errorf("%s is %x", set, caps)
		}
	}
	if !unrestricted(t) {
		t.Error("this process is restricted too, so this shows nothing")
	}
	limits, err := os.ReadFile(fmt.Sprintf("/proc/%d/limits", pid))
	must(t, err)
	if fields := strings.Fields(string(limits[bytes.Index(limits, []byte("Max core")):])); fields[4] != "0" || fields[5] != "0" {
		t.Errorf("core files: %v", fields[:6])
	}
	if session, err := unix.Getsid(pid); err != nil || session != pid {
		t.Errorf("its session is %d, %v", session, err)
	}
	if os.Geteuid() == 0 {
		lookInside(t, pid, cfg)
	} else if _, err := os.ReadFile(fmt.Sprintf("/proc/%d/environ", pid)); !errors.Is(err, os.ErrPermission) {
		t.Errorf("its user can look inside: %v", err)
	}
	for _, signal := range []unix.Signal{unix.SIGTERM, unix.SIGINT, unix.SIGHUP} { // of a terminal, or of a service's stop
		must(t, unix.Kill(pid, signal))
	}
	for range 20 { // one that got a deadly signal may answer a little longer
		_, _, err = h.Seal(t.Context(), "k")
		must(t, err)
	}
	if theHelper(t) != pid {
		t.Error("a signal ended it")
	}
}

// lookInside looks at what only root can see of a helper.
func lookInside(t *testing.T, pid int, cfg helper.Config) {
	t.Helper()
	environment, err := os.ReadFile(fmt.Sprintf("/proc/%d/environ", pid))
	must(t, err)
	var names []string
	for v := range strings.SplitSeq(strings.Trim(string(environment), "\x00"), "\x00") {
		name, _, _ := strings.Cut(v, "=")
		if !strings.HasPrefix(name, "glibc.") { // the C library cuts GLIBC_TUNABLES to pieces
			names = append(names, name)
		}
	}
	if got := strings.Join(names, " "); got != "GOTRACEBACK SOFTHSM2_CONF HELPER_TEST_MODULE GLIBC_TUNABLES" {
		t.Errorf("its environment has %s", got)
	}
	u, err := hsm.ParseURI(cfg.HSM.URI)
	must(t, err)
	secretPIN, err := os.ReadFile(strings.TrimPrefix(u.PINSource, "file:"))
	must(t, err)
	if bytes.Contains(environment, bytes.TrimSpace(secretPIN)) || !bytes.Contains(environment, []byte(tokenDir)) {
		t.Error("its environment has the PIN, or does not have what it should")
	}
	files, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	must(t, err)
	for _, f := range files {
		to, err := os.Readlink(fmt.Sprintf("/proc/%d/fd/%s", pid, f.Name()))
		if err == nil && !strings.HasPrefix(to, "socket:") && !strings.HasPrefix(to, "anon_inode:") && !strings.HasPrefix(to, tokenDir) &&
			!strings.HasPrefix(to, "/sys/fs/cgroup/") && to != "/dev/null" && filepath.Base(to) != "hsm.lock" && f.Name() != "2" {
			t.Errorf("descriptor %s is %s", f.Name(), to)
		}
	}
}

// unrestricted tells whether a thread of this process has what a helper has not.
func unrestricted(t *testing.T) bool {
	t.Helper()
	threads, err := os.ReadDir("/proc/self/task")
	must(t, err)
	for _, thread := range threads {
		tid, err := strconv.Atoi(thread.Name())
		must(t, err)
		caps, err := strconv.ParseUint(status(t, tid)["CapBnd"], 16, 64)
		must(t, err)
		if status(t, tid)["NoNewPrivs"] == "0" && caps&(1<<unix.CAP_SYS_PTRACE) != 0 {
			return true
		}
	}
	return false
}

// curious is a helper whose module looks for secrets in the agent's memory.
func curious(file string) int {
	memory, err := os.Open(fmt.Sprintf("/proc/%d/mem", os.Getppid()))
	said := "it is open"
	if err != nil {
		said = err.Error()
	} else {
		memory.Close()
	}
	if err := os.WriteFile(file, []byte(said), 0o600); err != nil {
		return 4
	}
	return helper.Main()
}

// TestAModuleCannotReadTheAgentsMemory has a module that tries, and a child that is no
// helper as a control.
func TestAModuleCannotReadTheAgentsMemory(t *testing.T) {
	h, cfg := newHost(t)
	h.Close()
	file := filepath.Join(t.TempDir(), "found")
	module := "HELPER_TEST_MODULE=curious:" + file
	modes := []string{"protected"}
	if os.Geteuid() == 0 { // other users have no capabilities to lose
		modes = append(modes, "bounded")
	}
	for _, mode := range modes {
		a := startAgent(t, mode, cfg.HSM, nil, module)
		must(t, a.stdin.Close())
		must(t, a.Wait())
		if said, err := os.ReadFile(file); err != nil || !strings.Contains(string(said), "permission denied") {
			t.Errorf("the memory of an agent that is %s: %q, %v", mode, said, err)
		}
	}
	if os.Geteuid() != 0 {
		if scope, err := os.ReadFile("/proc/sys/kernel/yama/ptrace_scope"); err == nil && scope[0] != '0' {
			return // the kernel protects every process: there is no control
		}
	}
	child := command(t, nil)
	child.Env = append(os.Environ(), module)
	if child.Run() == nil { // it has no socket
		t.Error("a helper served nobody")
	}
	if said, err := os.ReadFile(file); err != nil || string(said) != "it is open" {
		t.Errorf("the memory of a process that is not protected: %q, %v", said, err)
	}
}

// TestTheHelperDiesWithTheAgent kills an agent, with a helper that works and with one
// that reads its socket no more.
func TestTheHelperDiesWithTheAgent(t *testing.T) {
	h, cfg := newHost(t)
	h.Close()
	for _, module := range []string{"", "liar:deaf"} {
		a := startAgent(t, "open", cfg.HSM, nil, "HELPER_TEST_MODULE="+module)
		pids := children(t, a.Pid())
		if len(pids) != 1 {
			t.Fatalf("helpers: %v", pids)
		}
		fd, err := unix.PidfdOpen(pids[0], 0)
		must(t, err)
		a.Kill()
		n, err := 0, error(unix.EINTR)
		for err == unix.EINTR {
			n, err = unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 60_000)
		}
		if n != 1 || err != nil {
			t.Errorf("module %q: the helper lives: %v", module, err)
		}
		unix.Close(fd)
		open(t, cfg).Close() // the state folder is free
	}
}

// TestAPINFromAPipeServesEveryHelper has an agent whose PIN comes from a pipe, and ends
// its helpers.
func TestAPINFromAPipeServesEveryHelper(t *testing.T) {
	h, cfg := newHost(t)
	h.Close()
	u, err := hsm.ParseURI(cfg.HSM.URI)
	must(t, err)
	value, err := os.ReadFile(strings.TrimPrefix(u.PINSource, "file:"))
	must(t, err)
	r, w, err := os.Pipe()
	must(t, err)
	_, err = w.Write(value)
	must(t, err)
	w.Close()
	cfg.HSM.PINSource = "fd:3"
	a := startAgent(t, "open", cfg.HSM, r)
	r.Close()
	for range 2 {
		must(t, unix.Kill(children(t, a.Pid())[0], unix.SIGKILL))
		_, err := a.stdin.Write([]byte{1})
		must(t, err)
		if line, err := a.said.ReadString('\n'); line != "ready\n" {
			t.Fatalf("the agent said %q, %v", line, err)
		}
	}
	if at := search(t, a.Pid(), bytes.TrimSpace(value)); at != "" {
		t.Errorf("the PIN from a pipe is in the agent's memory: %s", at)
	}
}

// TestThePINIsNotInTheAgent looks through an agent's memory for the PIN, and for the token's
// label, which is there.
func TestThePINIsNotInTheAgent(t *testing.T) {
	h, cfg := newHost(t)
	h.Close()
	u, err := hsm.ParseURI(cfg.HSM.URI)
	must(t, err)
	value, err := os.ReadFile(strings.TrimPrefix(u.PINSource, "file:"))
	must(t, err)
	a := startAgent(t, "open", cfg.HSM, nil)
	if at := search(t, a.Pid(), bytes.TrimSpace(value)); at != "" {
		t.Errorf("the PIN is in the agent's memory: %s", at)
	}
	if search(t, a.Pid(), []byte(u.Token)) == "" {
		t.Error("the search does not find what is there")
	}
}

// search looks for a text in the memory of a process and says in which part it is.
func search(t *testing.T, pid int, text []byte) string {
	t.Helper()
	maps, err := os.ReadFile(fmt.Sprintf("/proc/%d/maps", pid))
	must(t, err)
	memory, err := os.Open(fmt.Sprintf("/proc/%d/mem", pid))
	must(t, err)
	defer memory.Close()
	read := 0
	for line := range strings.Lines(string(maps)) {
		var from, to int64
		var mode string
		if n, err := fmt.Sscanf(line, "%x-%x %s", &from, &to, &mode); n != 3 || err != nil || !strings.HasPrefix(mode, "rw") || to-from > 1<<28 {
			continue
		}
		b := make([]byte, to-from)
		n, _ := memory.ReadAt(b, from) // what is not there is not readable
		read += n
		if bytes.Contains(b[:n], text) {
			return line
		}
	}
	if read == 0 {
		t.Fatal("nothing of the memory could be read")
	}
	return ""
}

// TestManyKills ends helpers at random moments while four callers work. No answer is
// wrong, and the root is always the one that was set or the one before.
func TestManyKills(t *testing.T) {
	const kills = 60
	store := testenv.Token{Store: filepath.Join(tokenDir, "tokens")}
	h, cfg := newHost(t)
	key, blob, err := h.Seal(t.Context(), "k")
	must(t, err)
	root := secret.Random(32)
	must(t, h.SetRoot(t.Context(), root))
	h.Close()
	patient := cfg
	cfg.Timeout = 2 * time.Second
	h = open(t, cfg)
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	signer, err := h.Identity(ctx)
	must(t, err)
	var done [3]int
	var answered atomic.Int64
	var wg sync.WaitGroup
	work := func(n *int, fn func() error) {
		wg.Go(func() {
			for ctx.Err() == nil {
				err := fn()
				switch c := hsm.ClassOf(err); {
				case err == nil:
					*n++
					answered.Add(1)
				case errors.Is(err, pin.ErrRefused): // it died inside the login
					if err := hsm.ClearLatch(cfg.HSM.StateDir); err != nil {
						t.Error(err)
					}
				case c != hsm.ClassCrash && c != hsm.ClassHang:
					t.Errorf("class %q: %v", c, err)
					return
				}
			}
		})
	}
	work(&done[0], func() error {
		got, err := h.Open(context.WithoutCancel(ctx), "k", blob)
		if err == nil && !got.Equal(key) {
			t.Error("another key")
		}
		got.Wipe()
		return err
	})
	work(&done[1], func() error {
		digest := sha256.Sum256([]byte(strconv.Itoa(done[1])))
		_, err := signer.Sign(nil, digest[:], crypto.SHA256)
		return err
	})
	var next *secret.Bytes // that may be the root
	work(&done[2], func() error {
		if next == nil {
			next = secret.Random(32)
			if err := h.SetRoot(context.WithoutCancel(ctx), next); err == nil {
				root, next = next, nil
				return nil
			}
		}
		got, err := h.Root(context.WithoutCancel(ctx))
		if err != nil {
			return err
		}
		if got.Equal(next) {
			root = next
		} else if !got.Equal(root) {
			t.Error("a root that is neither the old nor the new one")
		}
		next = nil
		return nil
	})
	for n := range kills {
		before := answered.Load()
		// Most of them while it works, some while it starts.
		until(t, "a helper works", func() bool { return answered.Load() > before+int64(n%4) && len(children(t, os.Getpid())) > 0 })
		time.Sleep(time.Duration(rand.IntN(40_000)) * time.Microsecond) // a random moment
		signal := []unix.Signal{unix.SIGKILL, unix.SIGSEGV, unix.SIGABRT}[n%3]
		if pids := children(t, os.Getpid()); len(pids) > 0 {
			stopped, err := store.Freeze(pids[0])
			must(t, err)
			if n == kills/2 {
				continue // it hangs
			}
			if stopped { // it may have ended meanwhile
				_ = unix.Kill(pids[0], signal)
				_ = unix.Kill(pids[0], unix.SIGCONT)
			}
		}
	}
	until(t, "it works again", func() bool { _, err := h.Root(t.Context()); return err == nil })
	stop()
	wg.Wait()
	h.Close()
	want := func(a *secret.Bytes) bool { return a.Equal(root) || next != nil && a.Equal(next) }
	_ = hsm.ClearLatch(cfg.HSM.StateDir)
	h = open(t, patient)
	if got, err := h.Root(t.Context()); err != nil || !want(got) {
		t.Errorf("the last root: %v", err)
	}
	// Each change that was cut off may have left its plan; the next one that succeeds takes
	// all away.
	if err := h.SetRoot(t.Context(), secret.Random(32)); err != nil {
		t.Errorf("the root after all kills: %v", err)
	}
	files, err := filepath.Glob(filepath.Join(cfg.HSM.StateDir, "hsm-root.*"))
	if err != nil || len(files) != 1 {
		t.Errorf("root files: %v, %v", files, err)
	}
	for i, n := range done {
		if n == 0 {
			t.Errorf("no call of worker %d was answered", i)
		}
	}
	t.Logf("%d kills; opened, signed and set %v times", kills, done)
}
