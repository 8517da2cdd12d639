//go:build cgo

package hsm_test

import (
	"bytes"
	"context"
	"crypto"
	"crypto/sha256"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"conseal/agent/vault"
	"conseal/hsm"
	"conseal/internal/secret"
	"conseal/testenv"
)

func wantRoot(t *testing.T, h *hsm.HSM, want *secret.Bytes) {
	t.Helper()
	got, err := h.Root(context.Background())
	if err != nil {
		t.Errorf("root: %v", err)
		return
	}
	defer got.Wipe()
	if !got.Equal(want) {
		t.Error("another root than expected")
	}
}

func wantNoRoot(t *testing.T, h *hsm.HSM) {
	t.Helper()
	_, err := h.Root(t.Context())
	var none vault.NoRoot
	if !errors.As(err, &none) || !none.NoRoot() {
		t.Errorf("root where none was set: %v", err)
	}
}

func rootKeys(t *testing.T, h *hsm.HSM) int {
	t.Helper()
	n, err := h.RootKeys(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func rootFiles(t *testing.T, cfg hsm.Config) []string {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(cfg.StateDir, "hsm-root.*"))
	if err != nil {
		t.Fatal(err)
	}
	return files
}

// wantClean sees that one key and one file are left, and nothing else.
func wantClean(t *testing.T, h *hsm.HSM, cfg hsm.Config) {
	t.Helper()
	entries, err := os.ReadDir(cfg.StateDir)
	if n := rootKeys(t, h); n != 1 || err != nil || len(entries) != 1 {
		t.Errorf("%d root keys, state folder %v, %v", n, entries, err)
	}
}

func setRoot(t *testing.T, h *hsm.HSM) *secret.Bytes {
	t.Helper()
	r := secret.Random(32)
	if err := h.SetRoot(t.Context(), r); err != nil {
		t.Fatal(err)
	}
	return r
}

func TestRoot(t *testing.T) {
	h, cfg := newHost(t)
	wantNoRoot(t, h)
	for range 3 {
		root := setRoot(t, h)
		wantRoot(t, h, root)
		wantRoot(t, open(t, cfg), root)
		wantClean(t, h, cfg)
	}
	root := setRoot(t, h)
	for _, n := range []int{0, 31, 33} {
		if err := h.SetRoot(t.Context(), secret.Random(n)); err == nil {
			t.Errorf("took a root of %d bytes", n)
		}
	}
	wantRoot(t, h, root)
}

// TestCrashInSetRoot stops SetRoot after each of its steps: steps before the file
// is written leave the old root, later ones the new.
func TestCrashInSetRoot(t *testing.T) {
	const written = 3
	for first := range 2 { // with an old root, without
		for n := range hsm.RootSteps + 1 {
			t.Run(fmt.Sprintf("old roots %d, after step %d", 1-first, n), func(t *testing.T) {
				h, cfg := newHost(t)
				var old *secret.Bytes
				if first == 0 {
					old = setRoot(t, h)
				}
				next := secret.Random(32)
				if err := h.CrashInSetRoot(t.Context(), next, n); err != nil {
					t.Fatal(err)
				}
				h = open(t, cfg)
				for range 2 {
					switch {
					case n >= written:
						wantRoot(t, h, next)
						wantClean(t, h, cfg)
					case old != nil:
						wantRoot(t, h, old)
					default:
						wantNoRoot(t, h)
					}
				}
				last := setRoot(t, h)
				wantRoot(t, open(t, cfg), last)
				wantClean(t, h, cfg)
			})
		}
	}
}

func TestCrashUponCrash(t *testing.T) {
	h, cfg := newHost(t)
	possible := setRoot(t, h)
	for range 60 {
		n := rand.IntN(hsm.RootSteps + 1)
		next := secret.Random(32)
		if err := h.CrashInSetRoot(t.Context(), next, n); err != nil {
			t.Fatal(err)
		}
		if n >= 3 {
			possible = next
		}
		if rand.IntN(3) == 0 {
			wantRoot(t, h, possible)
		}
	}
	last := setRoot(t, h)
	wantRoot(t, h, last)
	wantClean(t, h, cfg)
}

func TestFailuresDoNotFillTheToken(t *testing.T) {
	h, cfg := newHost(t)
	old := setRoot(t, h)
	for n := range 12 {
		if err := h.FailInSetRoot(t.Context(), secret.Random(32), n%3); err != nil {
			t.Fatal(err)
		}
	}
	wantRoot(t, h, old)
	if keys, files := rootKeys(t, h), rootFiles(t, cfg); keys != 1 || len(files) > 2 {
		t.Errorf("%d root keys, files %v", keys, files)
	}
}

// TestOldStateFolder restores a folder from before the last SetRoot.
func TestOldStateFolder(t *testing.T) {
	h, cfg := newHost(t)
	empty, older, newest := filepath.Join(t.TempDir(), "e"), filepath.Join(t.TempDir(), "o"), filepath.Join(t.TempDir(), "n")
	save := func(to string) {
		t.Helper()
		if err := os.CopyFS(to, os.DirFS(cfg.StateDir)); err != nil {
			t.Fatal(err)
		}
	}
	restore := func(from string) {
		t.Helper()
		for _, f := range rootFiles(t, cfg) {
			if err := os.Remove(f); err != nil {
				t.Fatal(err)
			}
		}
		if err := os.CopyFS(cfg.StateDir, os.DirFS(from)); err != nil {
			t.Fatal(err)
		}
	}
	save(empty)
	setRoot(t, h)
	save(older)
	root := setRoot(t, h)
	save(newest)
	for _, from := range []string{older, empty} {
		restore(from)
		if _, err := h.Root(t.Context()); !errors.Is(err, hsm.ErrStale) {
			t.Errorf("root: %v", err)
		}
		if err := h.SetRoot(t.Context(), secret.Random(32)); !errors.Is(err, hsm.ErrStale) {
			t.Errorf("setting the root: %v", err)
		}
		if n := rootKeys(t, h); n != 1 {
			t.Errorf("%d root keys", n)
		}
	}
	restore(newest)
	wantRoot(t, h, root)
	// The folder goes back to before a SetRoot that was interrupted: no commit was.
	if err := h.CrashInSetRoot(t.Context(), secret.Random(32), 4); err != nil {
		t.Fatal(err)
	}
	restore(newest)
	wantRoot(t, h, root)
	if n := rootKeys(t, h); n != 2 {
		t.Errorf("%d root keys: the newer one was touched", n)
	}
	wantRoot(t, h, root)
	last := setRoot(t, h)
	wantRoot(t, h, last)
	wantClean(t, h, cfg)
}

func TestDamagedRootFile(t *testing.T) {
	h, cfg := newHost(t)
	root := setRoot(t, h)
	name := rootFiles(t, cfg)[0]
	whole, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	damaged := [][]byte{{}, whole[:len(whole)-1], append(whole[:len(whole):len(whole)], 0), []byte("x")}
	for _, at := range []int{0, 4, 5, 13, 30, 45, len(whole) - 1} {
		b := bytes.Clone(whole)
		b[at] ^= 1
		damaged = append(damaged, b)
	}
	for _, b := range damaged {
		if err := os.WriteFile(name, b, 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := h.Root(t.Context()); !errors.Is(err, hsm.ErrNotAuthentic) {
			t.Errorf("file %x: %v", b, err)
		}
		if err := h.SetRoot(t.Context(), secret.Random(32)); !errors.Is(err, hsm.ErrNotAuthentic) {
			t.Errorf("setting the root over file %x: %v", b, err)
		}
	}
	if err := os.WriteFile(name, whole, 0o600); err != nil {
		t.Fatal(err)
	}
	wantRoot(t, h, root)
	destroy(t, h, "conseal/web1/root")
	if _, err := h.Root(t.Context()); !errors.Is(err, hsm.ErrLost) {
		t.Errorf("root without its key: %v", err)
	}
	if err := h.SetRoot(t.Context(), secret.Random(32)); !errors.Is(err, hsm.ErrLost) {
		t.Errorf("setting the root over a lost one: %v", err)
	}
}

// nthRoot is the root that the child process sets as its n-th.
func nthRoot(n int) *secret.Bytes {
	h := sha256.Sum256(fmt.Append(nil, "root ", n))
	return secret.Take(h[:])
}

// lines collects a child's output and tells when it is ready: after so many lines.
type lines struct {
	mu    sync.Mutex
	buf   bytes.Buffer
	after int
	ready chan struct{}
	once  sync.Once
}

func newLines(after int) *lines { return &lines{after: after, ready: make(chan struct{})} }

func (l *lines) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	n, err := l.buf.Write(b)
	if bytes.Count(l.buf.Bytes(), []byte("\n")) >= l.after {
		l.once.Do(func() { close(l.ready) })
	}
	return n, err
}

// childCommand is this test binary in another role.
func childCommand(t *testing.T, mode string, cfg hsm.Config, env ...string) *exec.Cmd {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), exe)
	cmd.Env = append(os.Environ(), "HSM_TEST_CHILD="+mode, "HSM_TEST_URI="+cfg.URI, "HSM_TEST_PIN="+cfg.PINSource, "HSM_TEST_STATE="+cfg.StateDir)
	cmd.Env = append(cmd.Env, env...)
	return cmd
}

func child(mode string) int {
	ctx := context.Background()
	cfg := hsm.Config{URI: os.Getenv("HSM_TEST_URI"), PINSource: os.Getenv("HSM_TEST_PIN"), StateDir: os.Getenv("HSM_TEST_STATE"), Name: "web1"}
	if mode == "key" {
		key, done, err := hsm.OpenKey(hsm.KeyConfig{URI: cfg.URI, PINSource: cfg.PINSource})
		if err == nil {
			defer done()
			_, err = key.Sign(nil, make([]byte, sha256.Size), crypto.SHA256)
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		return 0
	}
	if mode == "provision" {
		fmt.Println("ready")
		if _, err := hsm.Provision(ctx, cfg); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		return 0
	}
	h, err := hsm.Open(ctx, cfg)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer h.Close()
	if mode == "epochs" {
		fmt.Fprintln(os.Stderr, epochs(ctx, h, cfg))
		return 1
	}
	if mode != "roots" {
		return 0
	}
	n, err := strconv.Atoi(os.Getenv("HSM_TEST_FROM"))
	for ; err == nil; n++ {
		fmt.Println("try", n)
		if err = h.SetRoot(ctx, nthRoot(n)); err == nil {
			fmt.Println("done", n)
		}
	}
	fmt.Fprintln(os.Stderr, err)
	return 1
}

// TestKillInSetRoot kills a process that sets roots, at random moments.
func TestKillInSetRoot(t *testing.T) {
	h, cfg := newHost(t)
	h.Close()
	n := 0                // the next root's number
	possible := []int{-1} // numbers of the roots that may be it; -1: none
	for kill := range kills() {
		out := newLines(1)
		cmd := childCommand(t, "roots", cfg, fmt.Sprint("HSM_TEST_FROM=", n))
		cmd.Stdout = out
		p, err := testenv.StartProcess(cmd)
		if err != nil {
			t.Fatal(err)
		}
		select {
		case <-out.ready:
		case <-p.Done():
			t.Fatalf("kill %d: the child ended: %v", kill, p.Wait())
		}
		select {
		case <-time.After(time.Duration(rand.IntN(60_000)) * time.Microsecond):
		case <-p.Done():
			t.Fatalf("kill %d: the child ended: %v", kill, p.Wait())
		}
		p.Kill()
		for line := range strings.Lines(out.buf.String()) {
			var i int
			if _, err := fmt.Sscanf(line, "try %d\n", &i); err == nil {
				possible, n = append(possible, i), i+1
			}
			if _, err := fmt.Sscanf(line, "done %d\n", &i); err == nil {
				possible = []int{i}
			}
		}
		if kill%3 != 2 { // else let the next process meet what this one left
			possible = []int{whichRoot(t, cfg, possible)}
		}
	}
	if n < kills() {
		t.Errorf("only %d roots were tried in %d kills", n, kills())
	}
	h = open(t, cfg)
	setRoot(t, h)
	wantClean(t, h, cfg)
	t.Logf("%d kills, %d roots", kills(), n)
}

// whichRoot tells which of the possible roots it is.
func whichRoot(t *testing.T, cfg hsm.Config, possible []int) int {
	t.Helper()
	h, err := hsm.Open(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	root, err := h.Root(t.Context())
	var none vault.NoRoot
	if errors.As(err, &none) && possible[0] == -1 {
		return -1
	}
	if err != nil {
		t.Fatalf("of %v: %v", possible, err)
	}
	for _, i := range possible {
		if i >= 0 && root.Equal(nthRoot(i)) {
			wantOneWrapped(t, cfg)
			return i
		}
	}
	t.Fatalf("the root is none of %v", possible)
	return 0
}

// wantOneWrapped sees that one wrapped root is left once the root was given out.
// Plans of SetRoots that never were may stand above it.
func wantOneWrapped(t *testing.T, cfg hsm.Config) {
	t.Helper()
	wrapped := 0
	for _, name := range rootFiles(t, cfg) {
		b, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		if bytes.HasPrefix(b, []byte("CSHM\x01r")) {
			wrapped++
		}
	}
	if wrapped != 1 {
		t.Errorf("%d wrapped roots in %q", wrapped, rootFiles(t, cfg))
	}
}

// TestKillInProvision kills a process that provisions, at random moments.
func TestKillInProvision(t *testing.T) {
	for kill := range 12 {
		tok := newToken(t)
		cfg := config(t, tok, "web1")
		out := newLines(1)
		cmd := childCommand(t, "provision", cfg)
		cmd.Stdout = out
		p, err := testenv.StartProcess(cmd)
		if err != nil {
			t.Fatal(err)
		}
		<-out.ready
		select {
		case <-time.After(time.Duration(rand.IntN(120_000)) * time.Microsecond):
		case <-p.Done():
		}
		if _, err := tok.Freeze(p.Pid()); err != nil {
			t.Fatal(err)
		}
		p.Kill()
		if err := hsm.ClearLatch(cfg.StateDir); err != nil { // it may have died in its login, which counts
			t.Fatal(err)
		}
		if _, err := hsm.Provision(t.Context(), cfg); err != nil {
			t.Errorf("kill %d: %v", kill, err)
			continue
		}
		open(t, cfg)
	}
}
