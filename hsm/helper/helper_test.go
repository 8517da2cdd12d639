//go:build cgo

package helper_test

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"conseal/agent/vault"
	"conseal/agent/vault/vaulttest"
	"conseal/hsm"
	"conseal/hsm/helper"
	"conseal/internal/pin"
	"conseal/internal/secret"
	"conseal/testenv"
)

var _ vault.Protector = (*helper.HSM)(nil)

// tokenDir holds the tokens of all tests.
var tokenDir string

func TestMain(m *testing.M) {
	if helper.Called() {
		os.Exit(helperMain())
	}
	if mode := os.Getenv("HELPER_TEST_AGENT"); mode == "roots" {
		os.Exit(rootsMain())
	} else if mode != "" {
		os.Exit(agentMain(mode))
	}
	os.Exit(runWithTokens(m))
}

func runWithTokens(m *testing.M) int {
	unix.Umask(0o022) // folders that a group can change are not trusted
	base := "/dev/shm"
	if _, err := os.Stat(base); err != nil {
		base = ""
	}
	dir, err := os.MkdirTemp(base, "conseal-helper-")
	if err == nil {
		err = os.Setenv("SOFTHSM2_CONF", filepath.Join(dir, "softhsm2.conf"))
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	defer testenv.Clean()
	tokenDir = dir
	return m.Run()
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// newConfig is a host's that was not provisioned, on a token of its own.
func newConfig(t *testing.T) helper.Config {
	t.Helper()
	tok, err := testenv.NewToken(t.Context(), tokenDir)
	must(t, err)
	dir := t.TempDir()
	must(t, os.Chmod(dir, 0o700))
	return helper.Config{
		HSM:         hsm.Config{URI: tok.URI, Name: "web1", StateDir: dir},
		Timeout:     time.Minute, // for slow machines; tests of hangs set it
		Environment: []string{"SOFTHSM2_CONF", "HELPER_TEST_MODULE"},
	}
}

func open(t *testing.T, cfg helper.Config) *helper.HSM {
	t.Helper()
	h, err := helper.Open(t.Context(), cfg)
	must(t, err)
	t.Cleanup(h.Close)
	return h
}

func newHost(t *testing.T) (*helper.HSM, helper.Config) {
	t.Helper()
	cfg := newConfig(t)
	_, err := helper.Provision(t.Context(), cfg)
	must(t, err)
	return open(t, cfg), cfg
}

// children are the helpers of a process.
func children(t *testing.T, parent int) []int {
	t.Helper()
	pids, err := testenv.Helpers(parent)
	must(t, err)
	return pids
}

// theHelper is the only helper of this process.
func theHelper(t *testing.T) int {
	t.Helper()
	pids := children(t, os.Getpid())
	if len(pids) != 1 {
		t.Fatalf("%d helpers: %v", len(pids), pids)
	}
	return pids[0]
}

// until waits for a condition that another process or goroutine brings about.
func until(t *testing.T, what string, holds func() bool) {
	t.Helper()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for !holds() {
		select {
		case <-tick.C:
		case <-t.Context().Done():
			t.Fatalf("%s: never", what)
		}
	}
}

// stop holds a helper up.
func stop(t *testing.T, pid int) {
	t.Helper()
	if stopped, err := testenv.Freeze(pid); !stopped || err != nil {
		t.Fatalf("the helper has not stopped: %v", err)
	}
}

func gone(pid int) bool { return errors.Is(unix.Kill(pid, 0), unix.ESRCH) }

func TestConformance(t *testing.T) {
	vaulttest.Run(t, func(t *testing.T) vaulttest.Host {
		h, cfg := newHost(t)
		return vaulttest.Host{
			Protector: h,
			Reopen: func() vault.Protector {
				h.Close() // one process at a time has the state folder
				h = open(t, cfg)
				return h
			},
			State: cfg.HSM.StateDir,
		}
	})
}

func TestProvision(t *testing.T) {
	cfg := newConfig(t)
	if _, err := helper.Open(t.Context(), cfg); hsm.ClassOf(err) != hsm.ClassToken || !strings.Contains(err.Error(), "never provisioned") {
		t.Errorf("opening an empty token: %v", err)
	}
	for _, want := range []string{"made", "already there"} {
		p, err := helper.Provision(t.Context(), cfg)
		must(t, err)
		if len(p.Steps) != 3 || p.Steps[0].Done != want || !strings.HasPrefix(p.Token, "pkcs11:token=") {
			t.Errorf("provisioned %v, want it %s", p, want)
		}
	}
	h := open(t, cfg)
	if h.Kind() != "hsm" || !strings.HasPrefix(h.Name(), "hsm pkcs11:token=test-") {
		t.Errorf("kind %q, name %q", h.Kind(), h.Name())
	}
}

func TestIdentity(t *testing.T) {
	h, _ := newHost(t)
	signer, err := h.Identity(t.Context())
	must(t, err)
	digest := sha256.Sum256([]byte("x"))
	for range 2 {
		sig, err := signer.Sign(nil, digest[:], crypto.SHA256)
		if err != nil || !ecdsa.VerifyASN1(signer.Public().(*ecdsa.PublicKey), digest[:], sig) {
			t.Errorf("signing a digest: %v", err)
		}
		must(t, unix.Kill(theHelper(t), unix.SIGKILL)) // the next helper signs by the same key
	}
	for _, bad := range []struct {
		digest []byte
		opts   crypto.SignerOpts
	}{{digest[:31], crypto.SHA256}, {digest[:], crypto.SHA384}, {digest[:], nil}} {
		if _, err := signer.Sign(nil, bad.digest, bad.opts); err == nil {
			t.Errorf("signed %d bytes with %v", len(bad.digest), bad.opts)
		}
	}
}

func TestErrorsOfTheToken(t *testing.T) {
	h, cfg := newHost(t)
	_, blob, err := h.Seal(t.Context(), "k")
	must(t, err)
	if _, err := h.Open(t.Context(), "other", blob); !errors.Is(err, hsm.ErrNotAuthentic) || hsm.ClassOf(err) != hsm.ClassData {
		t.Errorf("under another id: %v", err)
	}
	if _, err := h.Open(t.Context(), "k", make([]byte, 1<<20)); err == nil {
		t.Error("opened a megabyte")
	}
	if _, _, err := h.Seal(t.Context(), strings.Repeat("x", 1025)); err == nil || !strings.Contains(err.Error(), "1 to 1024") {
		t.Errorf("sealing for a long id: %v", err)
	}
	if _, err := helper.Open(t.Context(), cfg); err == nil || !strings.Contains(err.Error(), "in use by another process") {
		t.Errorf("a second one on the state folder: %v", err)
	}
	h.Close()
	h.Close()
	if _, err := h.Root(t.Context()); err == nil || !strings.Contains(err.Error(), "after Close") {
		t.Errorf("after Close: %v", err)
	}
	if left := children(t, os.Getpid()); len(left) != 0 {
		t.Errorf("helpers %v are left", left)
	}
	wrong := cfg
	wrong.HSM.PINSource = filepath.Join(t.TempDir(), "pin")
	must(t, os.WriteFile(wrong.HSM.PINSource, []byte("wrong"), 0o600))
	for range 2 {
		if _, err := helper.Open(t.Context(), wrong); !errors.Is(err, pin.ErrRefused) || hsm.ClassOf(err) != hsm.ClassAuth {
			t.Errorf("with a wrong PIN: %v", err)
		}
	}
	for reason, change := range map[string]func(*helper.Config){
		"pin-value":        func(c *helper.Config) { c.HSM.URI += "&pin-value=1" },
		"make it with":     func(c *helper.Config) { c.HSM.StateDir += "/none" },
		"no token matches": func(c *helper.Config) { c.HSM.URI = strings.Replace(cfg.HSM.URI, "token=test", "token=none", 1) },
		"9<FILE":           func(c *helper.Config) { c.HSM.PINSource = "fd:9999" },
		"negative":         func(c *helper.Config) { c.HSM.MaxSessions = -1 },
	} {
		c := cfg
		change(&c)
		if _, err := helper.Open(t.Context(), c); err == nil || !strings.Contains(err.Error(), reason) {
			t.Errorf("got %v, want an error with %q", err, reason)
		}
	}
}

// TestACrashIsNotNoticed ends the helper while calls are under way, which the stopped
// helper cannot answer, and between calls.
func TestACrashIsNotNoticed(t *testing.T) {
	h, cfg := newHost(t)
	h.Close()
	var lost []error // guarded by what the calls below wait for
	cfg.Lost = func(err error) { lost = append(lost, err) }
	h = open(t, cfg)
	root := secret.Random(32)
	must(t, h.SetRoot(t.Context(), root))
	key, blob, err := h.Seal(t.Context(), "k")
	must(t, err)
	for _, signal := range []unix.Signal{unix.SIGKILL, unix.SIGSEGV, unix.SIGABRT} {
		pid := theHelper(t)
		stop(t, pid)
		var wg sync.WaitGroup
		for range 3 {
			wg.Go(func() {
				if got, err := h.Open(t.Context(), "k", blob); err != nil || !got.Equal(key) {
					t.Errorf("%v: open: %v", signal, err)
				}
			})
			wg.Go(func() {
				if got, err := h.Root(t.Context()); err != nil || !got.Equal(root) {
					t.Errorf("%v: root: %v", signal, err)
				}
			})
		}
		until(t, "six calls are under way", func() bool { return h.Pending() == 6 })
		must(t, unix.Kill(pid, signal))
		_ = unix.Kill(pid, unix.SIGCONT) // it may be gone already
		wg.Wait()
		if next := theHelper(t); next == pid {
			t.Errorf("%v: the helper lives", signal)
		}
	}
	if len(lost) != 3 || hsm.ClassOf(lost[0]) != hsm.ClassCrash || !strings.Contains(lost[0].Error(), "killed") {
		t.Errorf("the ends that were told: %v", lost)
	}
}

// TestAHangEndsAtItsDeadline stops the helper. The call whose deadline passes fails;
// the other is repeated.
func TestAHangEndsAtItsDeadline(t *testing.T) {
	h, cfg := newHost(t)
	root := secret.Random(32)
	must(t, h.SetRoot(t.Context(), root))
	h.Close()
	cfg.Timeout = 2 * time.Second // that of a root or of the identity is three times as long
	h = open(t, cfg)
	pid := theHelper(t)
	stop(t, pid)
	hung := make(chan error, 1)
	go func() { _, _, err := h.Seal(t.Context(), "k"); hung <- err }()
	until(t, "the call is under way", func() bool { return h.Pending() == 1 || len(hung) == 1 })
	if got, err := h.Root(t.Context()); err != nil || !got.Equal(root) {
		t.Errorf("the other call: %v", err)
	}
	if err := <-hung; hsm.ClassOf(err) != hsm.ClassHang || !strings.Contains(err.Error(), "no answer in 2s") {
		t.Errorf("the call that hung: %v", err)
	}
	if _, err := h.Identity(t.Context()); err != nil || !gone(pid) {
		t.Errorf("the next call: %v", err)
	}
}

// asked is a context that tells when somebody first asked for its error: then a call that
// begins has seen that it may, and one that waits for its end has.
type asked struct {
	context.Context
	once sync.Once
	done chan struct{}
}

func newAsked(t *testing.T) (*asked, context.CancelFunc) {
	ctx, cancel := context.WithCancel(t.Context())
	t.Cleanup(cancel)
	return &asked{Context: ctx, done: make(chan struct{})}, cancel
}

func (a *asked) Err() error {
	err := a.Context.Err()
	a.once.Do(func() { close(a.done) })
	return err
}

// TestAContextEndsTheWaitOnly leaves a call, and another that waits for its session. Only
// the first one's deadline would end the helper.
func TestAContextEndsTheWaitOnly(t *testing.T) {
	cfg := newConfig(t)
	cfg.HSM.MaxSessions = 1
	_, err := helper.Provision(t.Context(), cfg)
	must(t, err)
	h := open(t, cfg)
	pid := theHelper(t)
	stop(t, pid)
	for _, want := range []string{"sealing: context canceled", "waiting for one of 1 sessions"} {
		ctx, cancel := newAsked(t)
		left := make(chan error, 1)
		go func() { _, _, err := h.Seal(ctx, "k"); left <- err }()
		<-ctx.done
		until(t, "a call is under way", func() bool { return h.Pending() == 1 })
		cancel()
		if err := <-left; !errors.Is(err, context.Canceled) || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want %q", err, want)
		}
	}
	must(t, unix.Kill(pid, unix.SIGCONT))
	_, _, err = h.Seal(t.Context(), "k")
	must(t, err)
	if theHelper(t) != pid {
		t.Error("the helper was ended")
	}
}

// TestSetRootIsNotRepeated ends the helper inside SetRoot.
func TestSetRootIsNotRepeated(t *testing.T) {
	h, _ := newHost(t)
	old, next := secret.Random(32), secret.Random(32)
	must(t, h.SetRoot(t.Context(), old))
	pid := theHelper(t)
	stop(t, pid)
	failed := make(chan error, 1)
	go func() { failed <- h.SetRoot(t.Context(), next) }()
	until(t, "it is under way", func() bool { return h.Pending() == 1 })
	must(t, unix.Kill(pid, unix.SIGKILL))
	if err := <-failed; hsm.ClassOf(err) != hsm.ClassCrash || !strings.Contains(err.Error(), "setting the root") {
		t.Errorf("SetRoot: %v", err)
	}
	if left := children(t, os.Getpid()); len(left) != 0 {
		t.Errorf("SetRoot was tried again: %v", left)
	}
	if got, err := h.Root(t.Context()); err != nil || !got.Equal(old) {
		t.Errorf("root: %v", err)
	}
}

// TestARootThatWasReadStays leaves a SetRoot that the helper has not begun, asks for the
// root, and lets the helper go on: the answer must not be overtaken.
func TestARootThatWasReadStays(t *testing.T) {
	h, _ := newHost(t)
	must(t, h.SetRoot(t.Context(), secret.Random(32)))
	pid := theHelper(t)
	for range 30 {
		stop(t, pid)
		ctx, cancel := context.WithCancel(t.Context())
		left := make(chan error, 1)
		go func() { left <- h.SetRoot(ctx, secret.Random(32)) }()
		until(t, "SetRoot is under way", func() bool { return h.Pending() == 1 })
		cancel()
		if err := <-left; !errors.Is(err, context.Canceled) {
			t.Fatal(err)
		}
		read := make(chan *secret.Bytes, 1)
		go func() {
			r, err := h.Root(t.Context())
			if err != nil {
				t.Error(err)
			}
			read <- r
		}()
		until(t, "Root is under way", func() bool { return h.Pending() == 2 })
		must(t, unix.Kill(pid, unix.SIGCONT))
		first := <-read
		until(t, "SetRoot has ended", func() bool { return h.Pending() == 0 })
		if again, err := h.Root(t.Context()); err != nil || !again.Equal(first) {
			t.Fatalf("the root changed after it was read: %v", err)
		}
	}
}

// TestHelpersOfNoUseArePaused breaks each new helper at once.
func TestHelpersOfNoUseArePaused(t *testing.T) {
	h, cfg := newHost(t)
	h.Close()
	var ended atomic.Int32
	cfg.Lost = func(error) { ended.Add(1) }
	h = open(t, cfg)
	_, _, err := h.Seal(t.Context(), "k")
	must(t, err)
	starts := filepath.Join(t.TempDir(), "starts")
	must(t, os.WriteFile(starts, nil, 0o600))
	t.Setenv("HELPER_TEST_MODULE", "broken:"+starts)
	must(t, unix.Kill(theHelper(t), unix.SIGKILL))
	paused := 0
	for range 300 {
		_, _, err := h.Seal(t.Context(), "k")
		if hsm.ClassOf(err) != hsm.ClassCrash {
			t.Fatalf("of a broken helper: %v", err)
		}
		if strings.Contains(err.Error(), "not tried again before") {
			paused++
		}
	}
	b, err := os.ReadFile(starts)
	if err != nil || len(b) == 0 || len(b) > 20 || paused < 200 {
		t.Errorf("%d helpers were started for 300 calls, of which %d were told to wait, %v", len(b), paused, err)
	}
	t.Setenv("HELPER_TEST_MODULE", "liar:noise") // opens the token, and nothing more
	ended.Store(0)
	until(t, "the pause is over", func() bool { _, _, err = h.Seal(t.Context(), "k"); return ended.Load() > 0 })
	for range 300 {
		if _, _, err := h.Seal(t.Context(), "k"); hsm.ClassOf(err) != hsm.ClassCrash {
			t.Fatalf("of a helper that answers nothing: %v", err)
		}
	}
	if n := ended.Load(); n > 20 {
		t.Errorf("%d helpers were started that answered nothing", n)
	}
	t.Setenv("HELPER_TEST_MODULE", "")
	until(t, "it works again", func() bool { _, _, err := h.Seal(t.Context(), "k"); return err == nil })
}

// helperMain is a helper of a test: what HELPER_TEST_MODULE says, or a real one.
func helperMain() int {
	kind, arg, _ := strings.Cut(os.Getenv("HELPER_TEST_MODULE"), ":")
	switch kind {
	case "broken":
		if f, err := os.OpenFile(arg, os.O_APPEND|os.O_WRONLY, 0); err == nil {
			_, _ = f.WriteString("x")
			f.Close()
		}
		return 3
	case "liar":
		helper.Lie(os.Stdin, arg)
		return 0
	case "curious":
		return curious(arg)
	}
	return helper.Main()
}

// TestALyingHelper has helpers that answer otherwise than was asked.
func TestALyingHelper(t *testing.T) {
	for kind, want := range map[string]string{
		"empty": "gave no", "short": "gave no", "other-key": "another key signed", "other-id": "crashed", "question": "crashed", "noise": "crashed", "bad-error": "the helper's error",
	} {
		cfg := newConfig(t)
		t.Setenv("HELPER_TEST_MODULE", "liar:"+kind)
		h := open(t, cfg)
		wrong := func(what string, err error) {
			t.Helper()
			if err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("%s: %s: got %v, want an error with %q", kind, what, err, want)
			}
		}
		if kind == "other-key" {
			signer, err := h.Identity(t.Context())
			must(t, err)
			_, err = signer.Sign(nil, make([]byte, 32), crypto.SHA256)
			wrong("sign", err)
			h.Close()
			continue
		}
		_, _, err := h.Seal(t.Context(), "k")
		wrong("seal", err)
		_, err = h.Open(t.Context(), "k", []byte("blob"))
		wrong("open", err)
		_, err = h.Root(t.Context())
		wrong("root", err)
		_, err = h.Identity(t.Context())
		wrong("identity", err)
		h.Close()
	}
}

// TestSecretsThatNobodyAskedFor would fill the agent's locked memory, for nobody wipes them.
func TestSecretsThatNobodyAskedFor(t *testing.T) {
	locked := func() int {
		t.Helper()
		n, err := strconv.Atoi(strings.Fields(status(t, os.Getpid())["VmLck"])[0])
		must(t, err)
		return n
	}
	before := locked()
	held := secret.Random(32)
	if locked() == before {
		t.Fatal("nothing is locked here, so this shows nothing")
	}
	held.Wipe()
	for _, kind := range []string{"secrets", "secrets-in-errors"} {
		t.Setenv("HELPER_TEST_MODULE", "liar:"+kind)
		h := open(t, newConfig(t))
		before := locked()
		for range 100 {
			if _, err := h.Identity(t.Context()); err == nil {
				t.Errorf("%s: an identity", kind)
			}
		}
		if n := locked() - before; n > 100 {
			t.Errorf("%s: %d kB of locked memory more", kind, n)
		}
		h.Close()
	}
}

func TestAHelperIsStrict(t *testing.T) {
	for what, send := range map[string]func(w io.Writer) error{
		"nothing":                   func(io.Writer) error { return nil },
		"a question before a token": func(w io.Writer) error { return helper.Send(w, 1, 5, "", nil) },
		"an answer":                 func(w io.Writer) error { return helper.Send(w, 1, 11, "", nil) },
		"half a frame":              func(w io.Writer) error { _, err := w.Write([]byte("0123")); return err },
		"an unknown setting":        func(w io.Writer) error { return helper.Send(w, 1, 1, `{"PIN": "1"}`, nil) },
	} {
		fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		must(t, err)
		ours, theirs := os.NewFile(uintptr(fds[0]), "ours"), os.NewFile(uintptr(fds[1]), "theirs")
		p, err := testenv.StartProcess(command(t, theirs))
		must(t, err)
		theirs.Close()
		must(t, send(ours))
		must(t, unix.Shutdown(fds[0], unix.SHUT_WR))
		said, err := io.ReadAll(ours)
		ours.Close()
		<-p.Done()
		if bytes.Contains(said, []byte{1, 11}) || what == "an unknown setting" && !bytes.Contains(said, []byte("unknown field")) {
			t.Errorf("%s: answered %q, %v", what, said, err)
		}
	}
}
