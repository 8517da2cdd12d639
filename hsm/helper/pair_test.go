//go:build cgo

package helper_test

import (
	"bufio"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"conseal/agent/vault"
	"conseal/agent/vault/vaulttest"
	"conseal/hsm"
	"conseal/hsm/helper"
	"conseal/internal/secret"
	"conseal/testenv"
)

var _ vault.Protector = (*helper.Pair)(nil)

// twoTokens are of one host: the second has the keys that the first had before it had
// any root.
type twoTokens struct {
	first, second *testenv.Token
	state         string // the folder of both state folders
	cfg           helper.PairConfig
}

func newPair(t *testing.T) *twoTokens {
	t.Helper()
	p := &twoTokens{state: t.TempDir()}
	var err error
	p.first, err = testenv.NewToken(t.Context(), tokenDir)
	must(t, err)
	p.cfg.First = p.config(t, p.first, false)
	_, err = helper.Provision(t.Context(), p.cfg.First)
	must(t, err)
	p.second, err = p.first.Copy()
	must(t, err)
	p.cfg.Second = p.config(t, p.second, true)
	_, err = helper.Provision(t.Context(), p.cfg.Second)
	must(t, err)
	p.cfg.Recheck = time.Millisecond
	return p
}

func (p *twoTokens) config(t *testing.T, tok *testenv.Token, second bool) helper.Config {
	t.Helper()
	dir := filepath.Join(p.state, map[bool]string{false: "hsm", true: "hsm-second"}[second])
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	return helper.Config{
		HSM:     hsm.Config{URI: tok.URI, Name: "web1", StateDir: dir, Second: second},
		Timeout: time.Minute, Environment: []string{"SOFTHSM2_CONF", "HELPER_TEST_MODULE"},
	}
}

func (p *twoTokens) open(t *testing.T) *helper.Pair {
	t.Helper()
	h, err := helper.OpenPair(t.Context(), p.cfg)
	must(t, err)
	t.Cleanup(h.Close)
	return h
}

func take(t *testing.T, tok *testenv.Token) (back func()) {
	t.Helper()
	putBack, err := tok.Take()
	must(t, err)
	return func() { t.Helper(); must(t, putBack()) }
}

func wantRoot(t *testing.T, h vault.Protector, want *secret.Bytes) {
	t.Helper()
	got, err := h.Root(t.Context())
	if err != nil || !got.Equal(want) {
		t.Errorf("another root, or none: %v", err)
	}
}

// setAlone sets the root of one token as a SetRoot does that was cut off in between.
func setAlone(t *testing.T, cfg helper.Config, root *secret.Bytes) {
	t.Helper()
	h := open(t, cfg)
	defer h.Close()
	must(t, h.SetRoot(t.Context(), root))
}

func wantAlone(t *testing.T, cfg helper.Config, want *secret.Bytes) {
	t.Helper()
	h := open(t, cfg)
	defer h.Close()
	wantRoot(t, h, want)
}

func TestConformanceOfPairs(t *testing.T) {
	vaulttest.Run(t, func(t *testing.T) vaulttest.Host {
		p := newPair(t)
		h := p.open(t)
		return vaulttest.Host{
			Protector: h,
			Reopen: func() vault.Protector {
				h.Close()
				h = p.open(t)
				return h
			},
			State: p.state,
		}
	})
}

// TestFailOver takes each token away while the pair is used, and both.
func TestFailOver(t *testing.T) {
	p := newPair(t)
	var mu sync.Mutex
	var told []string
	p.cfg.Changed = func(name string, err error) {
		mu.Lock()
		defer mu.Unlock()
		told = append(told, name)
	}
	h := p.open(t)
	root := secret.Random(32)
	must(t, h.SetRoot(t.Context(), root))
	signer, err := h.Identity(t.Context())
	must(t, err)
	works := func() {
		t.Helper()
		key, blob, err := h.Seal(t.Context(), "k")
		must(t, err)
		if got, err := h.Open(t.Context(), "k", blob); err != nil || !got.Equal(key) {
			t.Errorf("open: %v", err)
		}
		digest := sha256.Sum256([]byte("x"))
		if sig, err := signer.Sign(nil, digest[:], crypto.SHA256); err != nil || !ecdsa.VerifyASN1(signer.Public().(*ecdsa.PublicKey), digest[:], sig) {
			t.Errorf("sign: %v", err)
		}
		wantRoot(t, h, root)
	}
	works()
	if !strings.HasSuffix(h.Name(), p.first.Serial+" (first of two)") {
		t.Errorf("uses %s", h.Name())
	}
	for _, c := range []struct {
		away       *testenv.Token
		place, now string
	}{
		{p.first, "first", p.second.Serial + " (second of two, the first is away)"},
		{p.second, "second", p.first.Serial + " (first of two, the second is away)"},
	} {
		back := take(t, c.away)
		works()
		err := h.SetRoot(t.Context(), secret.Random(32))
		if err == nil || !strings.Contains(err.Error(), "the "+c.place+" token: ") {
			t.Errorf("setting the root while the %s is away: %v", c.place, err)
		}
		works()
		if !strings.HasSuffix(h.Name(), c.now) {
			t.Errorf("uses %s", h.Name())
		}
		back()
		until(t, "it is back", func() bool { return strings.HasSuffix(h.Name(), p.first.Serial+" (first of two)") })
		root = secret.Random(32)
		must(t, h.SetRoot(t.Context(), root))
		works()
	}
	backs := []func(){take(t, p.first), take(t, p.second)}
	if _, _, err := h.Seal(t.Context(), "k"); hsm.ClassOf(err) != hsm.ClassToken || !strings.Contains(err.Error(), "the second token") {
		t.Errorf("without both: %v", err)
	}
	if _, err := h.Root(t.Context()); hsm.ClassOf(err) != hsm.ClassToken {
		t.Errorf("the root without both: %v", err)
	}
	for _, back := range backs {
		back()
	}
	until(t, "both are back", func() bool { return strings.HasSuffix(h.Name(), "(first of two)") })
	works()
	mu.Lock()
	defer mu.Unlock()
	if len(told) < 6 || !strings.Contains(told[0], "the first is away") {
		t.Errorf("told %q", told)
	}
}

// TestStartWithOneToken starts without each, and goes back to the first.
func TestStartWithOneToken(t *testing.T) {
	p := newPair(t)
	root := secret.Random(32)
	h := p.open(t)
	must(t, h.SetRoot(t.Context(), root))
	h.Close()
	for _, tok := range []*testenv.Token{p.first, p.second} {
		back := take(t, tok)
		h := p.open(t)
		wantRoot(t, h, root)
		if err := h.Settle(t.Context()); hsm.ClassOf(err) != hsm.ClassToken {
			t.Errorf("settled without one: %v", err)
		}
		back()
		until(t, "it is back", func() bool { return strings.HasSuffix(h.Name(), p.first.Serial+" (first of two)") })
		must(t, h.Settle(t.Context()))
		h.Close()
	}
	defer take(t, p.first)()
	defer take(t, p.second)()
	if _, err := helper.OpenPair(t.Context(), p.cfg); err == nil || !strings.Contains(err.Error(), "first token") || !strings.Contains(err.Error(), "second token") {
		t.Errorf("opened without both: %v", err)
	}
}

// TestAnInterruptedChangeNeedsBoth is the attack on erasure by a token that was away:
// the second has the older root still.
func TestAnInterruptedChangeNeedsBoth(t *testing.T) {
	p := newPair(t)
	h := p.open(t)
	older, newer := secret.Random(32), secret.Random(32)
	must(t, h.SetRoot(t.Context(), older))
	h.Close()
	mark := filepath.Join(p.state, "hsm-second", "root-change")
	if _, err := os.Stat(mark); !errors.Is(err, os.ErrNotExist) {
		t.Fatalf("a change that was done has its mark: %v", err)
	}
	must(t, os.WriteFile(mark, nil, 0o600))
	setAlone(t, p.cfg.First, newer)
	wantAlone(t, p.cfg.Second, older) // it could be had

	for _, tok := range []*testenv.Token{p.first, p.second} {
		back := take(t, tok)
		h := p.open(t)
		if _, err := h.Root(t.Context()); hsm.ClassOf(err) != hsm.ClassToken || !strings.Contains(err.Error(), "needs both tokens") {
			t.Errorf("a root is given out: %v", err)
		}
		if err := h.SetRoot(t.Context(), secret.Random(32)); hsm.ClassOf(err) != hsm.ClassToken {
			t.Errorf("a root was set: %v", err)
		}
		if tok == p.second { // it is brought to the newer root without being asked
			back()
			until(t, "the change was finished", func() bool { _, err := os.Stat(mark); return errors.Is(err, os.ErrNotExist) })
			wantRoot(t, h, newer)
			h.Close()
		} else {
			h.Close()
			back()
		}
	}
	wantAlone(t, p.cfg.First, newer)
	wantAlone(t, p.cfg.Second, newer)
}

// TestAnOldCopyDoesNotWin puts the first token back as it was yesterday, with its folder:
// the root that the second has alone is what the host's shares hang on.
func TestAnOldCopyDoesNotWin(t *testing.T) {
	p := newPair(t)
	h := p.open(t)
	older, newer := secret.Random(32), secret.Random(32)
	must(t, h.SetRoot(t.Context(), older))
	yesterday, err := p.first.Copy()
	must(t, err)
	folder := t.TempDir()
	must(t, os.Chmod(folder, 0o700))
	must(t, os.CopyFS(folder, os.DirFS(p.cfg.First.HSM.StateDir)))
	must(t, h.SetRoot(t.Context(), newer))
	h.Close()

	now := p.cfg.First
	p.cfg.First = p.config(t, yesterday, false)
	p.cfg.First.HSM.StateDir = folder
	wantAlone(t, p.cfg.First, older)
	h = p.open(t)
	refused := func(what string, err error) {
		t.Helper()
		if hsm.ClassOf(err) != hsm.ClassPolicy || !strings.Contains(err.Error(), "different roots") {
			t.Errorf("%s: %v", what, err)
		}
	}
	_, err = h.Root(t.Context())
	refused("root", err)
	refused("settling", h.Settle(t.Context()))
	refused("setting the root", h.SetRoot(t.Context(), secret.Random(32)))
	h.Close()
	wantAlone(t, p.cfg.Second, newer)
	p.cfg.First = now
	wantRoot(t, p.open(t), newer)
}

// TestAStrangerWhileTheOtherIsAway: there is nothing to compare its keys with at that
// moment, and it must not seal or sign for the host all the same.
func TestAStrangerWhileTheOtherIsAway(t *testing.T) {
	p := newPair(t)
	stranger, err := testenv.NewToken(t.Context(), tokenDir)
	must(t, err)
	p.cfg.First = p.config(t, stranger, false)
	_, err = helper.Provision(t.Context(), p.cfg.First)
	must(t, err)
	back := take(t, stranger)
	h := p.open(t)
	_, _, err = h.Seal(t.Context(), "k")
	must(t, err)
	defer take(t, p.second)()
	if _, _, err := h.Seal(t.Context(), "k"); hsm.ClassOf(err) != hsm.ClassToken {
		t.Errorf("without both: %v", err)
	}
	back()
	until(t, "the stranger was looked at", func() bool {
		err := h.Settle(t.Context())
		return err != nil && (strings.Contains(err.Error(), "identity key is not that of") || strings.HasSuffix(h.Name(), "(first of two, the second is away)"))
	})
	if _, _, err := h.Seal(t.Context(), "k"); hsm.ClassOf(err) != hsm.ClassToken {
		t.Errorf("the stranger sealed for the host: %v", err)
	}
}

// rootsMain is an agent with two tokens that sets roots, and says which before and after.
func rootsMain() int {
	var hsms [2]hsm.Config
	err := json.Unmarshal([]byte(os.Getenv("HELPER_TEST_CONFIG")), &hsms)
	environment := []string{"SOFTHSM2_CONF"}
	var h *helper.Pair
	if err == nil {
		h, err = helper.OpenPair(context.Background(), helper.PairConfig{
			First: helper.Config{HSM: hsms[0], Environment: environment}, Second: helper.Config{HSM: hsms[1], Environment: environment}})
	}
	for err == nil {
		var b [32]byte
		rand.Read(b[:])
		fmt.Printf("try %x\n", b)
		said := fmt.Sprintf("done %x\n", b)
		if err = h.SetRoot(context.Background(), secret.Take(b[:])); err == nil {
			fmt.Print(said)
		}
	}
	fmt.Println(err)
	return 1
}

// TestKillInAChangeOfBoth kills an agent that sets roots, at random moments.
func TestKillInAChangeOfBoth(t *testing.T) {
	p := newPair(t)
	text, err := json.Marshal([2]hsm.Config{p.cfg.First.HSM, p.cfg.Second.HSM})
	must(t, err)
	between := 0
	for kill := 0; kill < 12 || between == 0 && kill < 200; kill++ { // a slow machine comes to the change later
		cmd := exec.CommandContext(t.Context(), "/proc/self/exe")
		cmd.Env = append(os.Environ(), "HELPER_TEST_AGENT=roots", "HELPER_TEST_CONFIG="+string(text))
		out, err := cmd.StdoutPipe()
		must(t, err)
		must(t, cmd.Start())
		lines := bufio.NewReader(out)
		done, tried := "", ""
		read := func() bool {
			line, err := lines.ReadString('\n')
			word, root, _ := strings.Cut(strings.TrimSpace(line), " ")
			switch word {
			case "try":
				tried = root
			case "done":
				done = root
			}
			return err == nil
		}
		for range 3 { // a change is done, and the next begun
			read()
		}
		time.AfterFunc(time.Duration(kill)*2*time.Millisecond, func() { _ = cmd.Process.Kill() })
		for read() {
		}
		_ = cmd.Wait()
		for _, cfg := range []helper.Config{p.cfg.First, p.cfg.Second} {
			untilFree(t, cfg)
		}
		if done == "" {
			t.Fatalf("kill %d: no root was set: %s", kill, tried)
		}
		if _, err := os.Stat(filepath.Join(p.state, "hsm-second", "root-change")); err == nil {
			between++
		}
		h := p.open(t)
		root, err := h.Root(t.Context())
		must(t, err)
		_ = root.Use(func(b []byte) error {
			if got := hex.EncodeToString(b); got != done && got != tried {
				t.Errorf("kill %d: the root is none of the last", kill)
			}
			return nil
		})
		h.Close()
		wantAlone(t, p.cfg.First, root)
		wantAlone(t, p.cfg.Second, root)
	}
	if between == 0 {
		t.Error("no kill came inside a change")
	}
}

// untilFree waits for the end of a killed agent's helper, which syncs a file at that moment.
func untilFree(t *testing.T, cfg helper.Config) {
	t.Helper()
	f, err := os.Open(filepath.Join(cfg.HSM.StateDir, "hsm.lock"))
	must(t, err)
	defer f.Close()
	until(t, "the helper has ended", func() bool { return unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB) == nil })
}

// TestAddAndReplaceTokens: a token without a root gets the other's.
func TestAddAndReplaceTokens(t *testing.T) {
	p := newPair(t)
	root := secret.Random(32)
	setAlone(t, p.cfg.First, root)
	h := p.open(t)
	must(t, h.Settle(t.Context()))
	h.Close()
	wantAlone(t, p.cfg.Second, root)

	backFirst := take(t, p.first) // for good, and a copy of the second takes its place
	replaced, err := p.second.Copy()
	must(t, err)
	p.cfg.First = p.config(t, replaced, false)
	must(t, os.RemoveAll(p.cfg.First.HSM.StateDir))
	must(t, os.Mkdir(p.cfg.First.HSM.StateDir, 0o700))
	h = p.open(t)
	if err := h.Settle(t.Context()); hsm.ClassOf(err) != hsm.ClassPolicy || !strings.Contains(err.Error(), "1 keys conseal/web1/root-second") {
		t.Errorf("a copy with the root key of the other: %v", err)
	}
	h.Close()
	destroy(t, replaced, "conseal/web1/root-second")
	h = p.open(t)
	must(t, h.Settle(t.Context()))
	h.Close()
	wantAlone(t, p.cfg.First, root)
	wantAlone(t, p.cfg.Second, root)
	backFirst()
}

// destroy destroys a secret key as its owner does by hand.
func destroy(t *testing.T, tok *testenv.Token, label string) {
	t.Helper()
	pin, err := os.ReadFile(tok.PINFile)
	must(t, err)
	out, err := exec.CommandContext(t.Context(), "pkcs11-tool", "--module", tok.Module, "--token-label", tok.Label, "--login", "--pin", strings.TrimSpace(string(pin)),
		"--slot", slotOf(t, tok), "--delete-object", "--type", "secrkey", "--label", label).CombinedOutput()
	if err != nil {
		t.Fatalf("pkcs11-tool: %v: %s", err, out)
	}
}

// slotOf is SoftHSM's slot number, which it makes of the last 31 bits of the serial number.
func slotOf(t *testing.T, tok *testenv.Token) string {
	t.Helper()
	n, err := strconv.ParseUint(tok.Serial[8:], 16, 32)
	must(t, err)
	return fmt.Sprintf("0x%x", n&0x7fffffff)
}

// TestTokensThatAreNoPair are refused when both are wanted, and the second is not used.
func TestTokensThatAreNoPair(t *testing.T) {
	p := newPair(t)
	stranger, err := testenv.NewToken(t.Context(), tokenDir)
	must(t, err)
	cfg := p.config(t, stranger, true)
	if _, err := helper.Provision(t.Context(), cfg); err == nil || !strings.Contains(err.Error(), "identity key pair") || !strings.Contains(err.Error(), "copy it there") {
		t.Errorf("a second token without copies: %v", err)
	}
	cfg.HSM.Second = false
	_, err = helper.Provision(t.Context(), cfg) // as the first of another pair
	must(t, err)
	cfg.HSM.Second = true
	other := p.cfg
	other.Second = cfg
	h, err := helper.OpenPair(t.Context(), other)
	must(t, err)
	if err := h.Settle(t.Context()); err == nil || !strings.Contains(err.Error(), "identity key is not that of") {
		t.Errorf("a stranger's identity: %v", err)
	}
	if !strings.HasSuffix(h.Name(), "(first of two, the second is away)") {
		t.Errorf("uses %s", h.Name())
	}
	h.Close()

	h = p.open(t)
	must(t, h.SetRoot(t.Context(), secret.Random(32)))
	h.Close()
	p.cfg.Second.HSM.URI = p.cfg.First.HSM.URI
	h = p.open(t)
	if err := h.Settle(t.Context()); hsm.ClassOf(err) != hsm.ClassPolicy || !strings.Contains(err.Error(), "it is the same token") {
		t.Errorf("one token as two: %v", err)
	}
}
