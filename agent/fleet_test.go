package agent_test

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/x509"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"conseal/agent/api"
	"conseal/agent/vault"
	"conseal/testenv"
	"conseal/tpm"
)

var (
	soak = flag.Bool("soak", false, "kill ten times as often")
	seed = flag.Uint64("seed", 0, "of the random kills; 0 draws one")
	runs = flag.Int("runs", 1, "of TestChaos, with seeds from -seed on")
)

func TestMain(m *testing.M) {
	code := m.Run()
	testenv.Clean()
	os.Exit(code)
}

// newFleet starts three hosts with one key, "first". Deadlines are generous: they
// only end what hangs.
func newFleet(t *testing.T, flags ...string) (context.Context, *testenv.Fleet) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 15*time.Minute)
	t.Cleanup(cancel)
	bin, err := testenv.Build(ctx, flags...)
	if err != nil {
		t.Fatal(err)
	}
	f, err := testenv.NewFleet(ctx, bin, "tpm", "tpm", "hsm")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			for _, h := range f.Hosts {
				t.Logf("log of %s:\n%s", h.Name, h.LogTail())
			}
		}
		if err := f.Close(); err != nil {
			t.Error(err)
		}
	})
	must(t, f.Init(ctx))
	f.Keys = f.Key("first", "ed25519", 2)
	must(t, f.WriteRoster(1))
	return ctx, f
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// checkKey wants the same public key and certificate on all hosts, and a good
// signature through each.
func checkKey(ctx context.Context, t *testing.T, f *testenv.Fleet, name string) {
	t.Helper()
	var public, certificate []byte
	for _, h := range f.Hosts {
		if !h.Running() {
			continue
		}
		k, err := h.Client().GetKey(ctx, name)
		must(t, err)
		if public == nil {
			public, certificate = k.PublicKey, k.Certificate
		}
		if len(public) == 0 || !bytes.Equal(k.PublicKey, public) || !bytes.Equal(k.Certificate, certificate) {
			t.Fatalf("%s has key %x under %x, others %x under %x", h.Name, k.PublicKey, k.Certificate, public, certificate)
		}
		message := []byte("signed through " + h.Name)
		r, err := h.Client().Sign(ctx, name, message)
		must(t, err)
		if !bytes.Equal(r.PublicKey, public) {
			t.Fatalf("%s signs for key %x, not %x", h.Name, r.PublicKey, public)
		}
		must(t, verifyScheme(k.Scheme, r, message))
	}
}

// shareFiles counts the shares on a host's disk.
func shareFiles(t *testing.T, h *testenv.Host) int {
	t.Helper()
	files, err := os.ReadDir(filepath.Join(h.State(), "vault", "shares"))
	must(t, err)
	return len(files)
}

// waitShareFiles waits until every host has erased what is not the one share of each key.
func waitShareFiles(ctx context.Context, t *testing.T, f *testenv.Fleet, keys int) {
	t.Helper()
	for _, h := range f.Hosts {
		waitFor(ctx, t, fmt.Sprintf("%s has one share file for each of %d keys", h.Name, keys), func() bool { return shareFiles(t, h) == keys })
	}
}

// failpoints are all places where an agent may be killed in a new epoch, but others,
// from the sources, so that none is forgotten.
func failpoints(t *testing.T, others ...string) (names []string) {
	t.Helper()
	hit := regexp.MustCompile(`failpoint\.Hit\("([^"]+)"\)`)
	write := regexp.MustCompile(`writeFile\([^\n]*"(vault/[a-z]+)"\)`)
	for _, pattern := range []string{"*.go", "vault/*.go"} {
		files, err := filepath.Glob(pattern)
		must(t, err)
		for _, file := range files {
			code, err := os.ReadFile(file)
			must(t, err)
			for _, m := range hit.FindAllSubmatch(code, -1) {
				names = append(names, string(m[1]))
			}
			for _, m := range write.FindAllSubmatch(code, -1) {
				names = append(names, string(m[1])+"/written", string(m[1])+"/renamed")
			}
		}
	}
	slices.Sort(names)
	names = slices.Compact(names)
	if len(names) < 12 {
		t.Fatalf("found only %q", names)
	}
	// Creating a vault, sealing shares anew, deleting and signing are no part of a new epoch.
	return slices.DeleteFunc(names, func(n string) bool {
		return strings.HasPrefix(n, "vault/class") || strings.HasPrefix(n, "vault/mark") || strings.HasPrefix(n, "vault/reseal") || strings.HasPrefix(n, "vault/receipt") || strings.HasPrefix(n, "sign/") ||
			slices.Contains(others, n)
	})
}

// startAndDie starts all agents, victim so that it ends at a failpoint, and waits until it
// has.
func startAndDie(ctx context.Context, t *testing.T, f *testenv.Fleet, victim *testenv.Host, point string) {
	t.Helper()
	log := filepath.Join(f.Dir, "hit")
	os.Remove(log)
	victim.Env = []string{"FAILPOINT=" + point, "FAILPOINT_LOG=" + log}
	for _, h := range f.Hosts {
		if err := h.Start(ctx); err != nil && h != victim { // it may die before it answers
			t.Fatal(err)
		}
	}
	died(ctx, t, victim, point, log)
}

// died waits until an agent has ended at a failpoint, and lets its host start as before.
func died(ctx context.Context, t *testing.T, victim *testenv.Host, point, log string) {
	t.Helper()
	if p := victim.Process(); p != nil {
		select {
		case <-p.Done():
		case <-ctx.Done():
			t.Fatalf("failpoint %s was not reached on %s", point, victim.Name)
		}
	}
	if hit, err := os.ReadFile(log); err != nil || strings.TrimSpace(string(hit)) != point {
		t.Fatalf("failpoint %s on %s: hit %q, %v", point, victim.Name, hit, err)
	}
	victim.Kill()
	victim.Env = nil
}

// TestCrashAtEachFailpoint kills an agent at every named place of a birth. Each
// time the fleet gets by itself to one key that every host holds once.
func TestCrashAtEachFailpoint(t *testing.T) {
	ctx, f := newFleet(t, "-tags", "failpoints")
	must(t, f.Start(ctx))
	must(t, f.WaitReady(ctx, "first"))
	keys := 1
	for i, point := range failpoints(t, "reshare/before-start", "reshare/done") {
		victim := f.Hosts[i%len(f.Hosts)]
		must(t, f.Stop(ctx))
		name := fmt.Sprintf("key%d", keys)
		f.Keys += f.Key(name, "ed25519", 2)
		keys++
		must(t, f.WriteRoster(keys))
		startAndDie(ctx, t, f, victim, point)
		must(t, victim.Start(ctx))
		must(t, f.WaitReady(ctx, name))
		checkKey(ctx, t, f, name)
		waitShareFiles(ctx, t, f, keys)
	}
}

// TestRosterChangesBeforeAHostHearsOfTheBirth kills a host that has voted before it has the
// certificate, and changes the key in the roster: it takes part in what comes next.
func TestRosterChangesBeforeAHostHearsOfTheBirth(t *testing.T) {
	ctx, f := newFleet(t, "-tags", "failpoints")
	victim := f.Hosts[1]
	startAndDie(ctx, t, f, victim, "vault/activate/certificate")
	must(t, f.WaitReady(ctx, "first"))
	k, err := f.Hosts[0].Client().GetKey(ctx, "first")
	must(t, err)
	public, err := x509.ParsePKIXPublicKey(k.PublicKey)
	must(t, err)
	must(t, f.SetKey("first", map[string]string{"quorum": "3", "generate": "", "public_key": fmt.Sprintf("%q", hex.EncodeToString(public.(ed25519.PublicKey)))}))
	must(t, f.WriteRoster(2))
	for _, h := range []*testenv.Host{f.Hosts[0], f.Hosts[2]} {
		_, err := h.Client().LoadRoster(ctx)
		must(t, err)
	}
	must(t, victim.Start(ctx))
	must(t, f.WaitReady(ctx, "first"))
	checkKey(ctx, t, f, "first")
}

// TestCrashAtEachFailpointOfRefresh kills an agent at every named place of a refresh, of
// who leads it or of another. Each time the fleet gets by itself, or by the next refresh,
// to one epoch of the same key, of which every host holds one share.
func TestCrashAtEachFailpointOfRefresh(t *testing.T) {
	ctx, f := newFleet(t, "-tags", "failpoints")
	must(t, f.Start(ctx))
	must(t, f.WaitReady(ctx, "first"))
	epoch := func(h *testenv.Host) [2]uint64 {
		k, err := h.Client().GetKey(ctx, "first")
		must(t, err)
		return [2]uint64{k.EpochRoster, k.EpochAttempt}
	}
	first, err := f.Hosts[0].Client().GetKey(ctx, "first")
	must(t, err)
	for i, point := range failpoints(t, "keygen/before-start", "keygen/done") {
		victim, leader := f.Hosts[i%3], f.Hosts[i%2]
		before := epoch(leader)
		must(t, victim.Stop(ctx))
		log := filepath.Join(f.Dir, "hit")
		os.Remove(log)
		victim.Env = []string{"FAILPOINT=" + point, "FAILPOINT_LOG=" + log}
		must(t, victim.Start(ctx))
		must(t, f.WaitReady(ctx, "first"))
		asked := make(chan error, 1)
		go func() { _, err := leader.Client().Refresh(ctx, "first"); asked <- err }()
		died(ctx, t, victim, point, log)
		must(t, victim.Start(ctx))
		if err := <-asked; err != nil && leader != victim {
			t.Errorf("after %s on %s: the refresh by %s: %v", point, victim.Name, leader.Name, err)
		}
		must(t, f.WaitReady(ctx, "first"))
		if _, err := leader.Client().Refresh(ctx, "first"); err != nil {
			t.Fatalf("after %s on %s: %v", point, victim.Name, err)
		}
		now := epoch(leader)
		if now == before {
			t.Fatalf("after %s on %s: still at epoch %v", point, victim.Name, now)
		}
		for _, h := range f.Hosts {
			waitFor(ctx, t, h.Name+" has one share, of the epoch that the others have", func() bool { return epoch(h) == now && shareFiles(t, h) == 1 })
		}
		checkKey(ctx, t, f, "first")
		if k, err := victim.Client().GetKey(ctx, "first"); err != nil || !bytes.Equal(k.PublicKey, first.PublicKey) {
			t.Fatalf("after %s on %s: another key: %v", point, victim.Name, err)
		}
	}
}

// TestRandomKillsDuringBirth kills a random agent at a random moment of a birth,
// again and again.
func TestRandomKillsDuringBirth(t *testing.T) {
	s := *seed
	if s == 0 {
		s = rand.Uint64()
	}
	t.Logf("replay with -seed %d", s)
	for _, of := range []struct {
		scheme      string
		times, soak int
		within      time.Duration // about as long as a birth takes
	}{
		{"ed25519", 20, 500, 80 * time.Millisecond},
		{"bip340", 5, 100, 80 * time.Millisecond},
		{"ecdsa-p256", 2, 50, 6 * time.Second},
		{"ecdsa-secp256k1", 0, 50, 6 * time.Second},
	} {
		if *soak {
			of.times = of.soak
		}
		if of.times > 0 {
			t.Run(of.scheme, func(t *testing.T) { killDuringBirths(t, of.scheme, of.times, of.within, rand.New(rand.NewPCG(s, 1))) })
		}
	}
}

func killDuringBirths(t *testing.T, scheme string, times int, within time.Duration, random *rand.Rand) {
	ctx, f := newFleet(t)
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Duration(times+10)*time.Minute)
	defer cancel()
	f.Keys, f.Limits = "", "[limits]\nkeygen_deadline = \"5m\"\nsign_deadline = \"1m\"\npresignatures = 0\n"
	for _, h := range f.Hosts {
		must(t, h.WriteConfig())
	}
	unborn := 0
	for i := range times {
		name := fmt.Sprintf("key%d", i)
		f.Keys += f.Key(name, scheme, 2)
		must(t, f.WriteRoster(i+1))
		must(t, f.Start(ctx))
		victim := f.Hosts[random.IntN(3)]
		<-time.After(time.Duration(random.Int64N(int64(within)))) // the experiment, not a wait for something
		if k, err := victim.Client().GetKey(ctx, name); err == nil && k.Condition != "ready" {
			unborn++
		}
		victim.Kill()
		must(t, victim.Start(ctx))
		must(t, f.WaitReady(ctx, name))
		checkKey(ctx, t, f, name)
		waitShareFiles(ctx, t, f, i+1)
		must(t, f.Stop(ctx))
	}
	t.Logf("%d of %d kills hit before the key was ready", unborn, times)
	if unborn == 0 {
		t.Error("no kill hit a birth: the experiment shows nothing")
	}
}

// openTPM opens a stopped host's TPM as its agent does.
func openTPM(ctx context.Context, t *testing.T, h *testenv.Host, state string) *tpm.TPM {
	t.Helper()
	var kept struct {
		SRKName   []byte         `json:"srk_name"`
		PCRWanted map[int][]byte `json:"pcr_wanted"`
	}
	b, err := os.ReadFile(filepath.Join(state, "tpm.json"))
	must(t, err)
	must(t, json.Unmarshal(b, &kept))
	p, err := tpm.Open(ctx, tpm.Config{Device: h.Tap.Address(), PCRs: []int{0, 2, 4, 7}, SRKName: kept.SRKName, PCRWanted: kept.PCRWanted})
	must(t, err)
	return p
}

// secretsOf reads what must not be found anywhere from a stopped host.
func secretsOf(ctx context.Context, t *testing.T, h *testenv.Host) map[string][]byte {
	t.Helper()
	p := openTPM(ctx, t, h, h.State())
	defer p.Close(ctx)
	return vaultSecrets(ctx, t, h, p)
}

// vaultSecrets reads share, root and data key from a stopped host's vault.
func vaultSecrets(ctx context.Context, t *testing.T, h *testenv.Host, p vault.Protector) map[string][]byte {
	t.Helper()
	v, err := vault.Open(ctx, filepath.Join(h.State(), "vault"), h.Name, p)
	must(t, err)
	defer v.Close()
	out := map[string][]byte{}
	keep := func(name string) func([]byte) error {
		return func(b []byte) error { out[name] = bytes.Clone(b); return nil }
	}
	r := v.Keys()[0]
	must(t, v.Lend(ctx, r.Key, r.Active, keep("share")))
	root, err := p.Root(ctx)
	must(t, err)
	must(t, root.Use(keep("root")))
	blob, err := os.ReadFile(filepath.Join(h.State(), "vault", "class-held.sealed"))
	must(t, err)
	class, err := p.Open(ctx, "class/held/"+h.Name, blob)
	must(t, err)
	must(t, class.Use(keep("data key")))
	for name, s := range out {
		if len(s) != 32 {
			t.Fatalf("%s has %d bytes", name, len(s))
		}
	}
	return out
}

// traces are the forms in which a secret may lie about.
func traces(s []byte) (out [][]byte) {
	reversed := bytes.Clone(s)
	slices.Reverse(reversed)
	for _, b := range [][]byte{s, reversed} {
		out = append(out, b, []byte(hex.EncodeToString(b)), []byte(strings.ToUpper(hex.EncodeToString(b))), []byte(base64.RawStdEncoding.EncodeToString(b)[:len(b)*5/4]), []byte(base64.RawURLEncoding.EncodeToString(b)[:len(b)*5/4]))
	}
	return append(out, []byte(strings.Trim(fmt.Sprint(s), "[]")))
}

func search(t *testing.T, dir string, secrets map[string][]byte, bus []byte) (found []string, files int) {
	t.Helper()
	look := func(where string, content []byte) {
		for name, s := range secrets {
			for _, trace := range traces(s) {
				if bytes.Contains(content, trace) {
					found = append(found, fmt.Sprintf("%s in %s", name, where))
				}
			}
		}
	}
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		b, err := os.ReadFile(path)
		files++
		look(path, b)
		return err
	})
	must(t, err)
	look("the TPM's bus", bus)
	return found, files
}

// recorder collects what crosses a TPM's socket.
type recorder struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (r *recorder) Write(b []byte) (int, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.b.Write(b)
}

// TestNoSecretAnywhere looks for share, data key and root in all files of the
// fleet, logs at debug level and TPM state among them, and on a TPM's bus.
func TestNoSecretAnywhere(t *testing.T) {
	ctx, f := newFleet(t)
	alpha := f.Host("alpha")
	bus := &recorder{}
	alpha.Tap.Record(bus)
	must(t, f.Start(ctx))
	must(t, f.WaitReady(ctx, "first"))
	checkKey(ctx, t, f, "first")
	must(t, f.Stop(ctx))
	must(t, f.Start(ctx)) // opens the share again
	must(t, f.WaitReady(ctx, "first"))
	checkKey(ctx, t, f, "first")
	must(t, f.Stop(ctx))
	alpha.Tap.Cut()
	secrets := secretsOf(ctx, t, alpha)
	found, files := search(t, f.Dir, secrets, bus.b.Bytes())
	// The root rests in the TPM, and swtpm's chip is a file; neither share nor data
	// key may be there.
	found = slices.DeleteFunc(found, func(s string) bool { return strings.HasPrefix(s, "root in "+filepath.Join(alpha.Dir, "tpm", "state")) })
	if len(found) > 0 {
		t.Errorf("found %q", found)
	}
	if files < 20 || bus.b.Len() < 10_000 {
		t.Errorf("looked into %d files and %d bytes of the bus only", files, bus.b.Len())
	}
	for i, trace := range traces(secrets["share"]) { // control
		planted := filepath.Join(alpha.State(), "planted")
		must(t, os.WriteFile(planted, append([]byte("x"), trace...), 0o600))
		if found, _ := search(t, f.Dir, secrets, nil); len(found) == 0 {
			t.Errorf("trace %d of a planted share is not found", i)
		}
		must(t, os.Remove(planted))
	}
	if found, _ := search(t, f.Dir, secrets, secrets["root"]); len(found) == 0 {
		t.Error("a root on the bus is not found")
	}
}

func copyFolder(t *testing.T, from, to string) {
	t.Helper()
	must(t, os.RemoveAll(to))
	must(t, os.CopyFS(to, os.DirFS(from)))
	must(t, os.Chmod(to, 0o700))
	must(t, filepath.WalkDir(to, func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() {
			return os.Chmod(path, 0o700)
		}
		if err == nil {
			return os.Chmod(path, 0o600)
		}
		return err
	}))
}

// TestStateFolderOpensNowhereElse copies alpha's folder to another TPM and under a token.
func TestStateFolderOpensNowhereElse(t *testing.T) {
	ctx, f := newFleet(t)
	must(t, f.Start(ctx))
	must(t, f.WaitReady(ctx, "first"))
	must(t, f.Stop(ctx))
	alpha, beta, gamma := f.Host("alpha"), f.Host("beta"), f.Host("gamma")
	for _, other := range []*testenv.Host{beta, gamma} {
		own := filepath.Join(f.Dir, "own-"+other.Name)
		copyFolder(t, other.State(), own)
		copyFolder(t, alpha.State(), other.State())
		if err := other.Start(ctx); err == nil {
			t.Errorf("an agent started with alpha's whole folder on %s's hardware", other.Name)
		}
		// the vault alone, beside the host's own provisioning
		copyFolder(t, own, other.State())
		copyFolder(t, filepath.Join(alpha.State(), "vault"), filepath.Join(other.State(), "vault"))
		must(t, other.Start(ctx))
		waitCondition(ctx, t, other, "first", "sealed", "")
		s, err := other.Client().Status(ctx)
		must(t, err)
		if !strings.Contains(s.ProtectorError, "not the one that this host's hardware committed to") {
			t.Errorf("alpha's vault on %s: %q", other.Name, s.ProtectorError)
		}
		must(t, other.Stop(ctx))
		copyFolder(t, own, other.State())
	}
	must(t, f.Start(ctx)) // each with its own again
	must(t, f.WaitReady(ctx, "first"))
	checkKey(ctx, t, f, "first")
}

// TestOldStateFolderIsRefused puts a folder back from before a birth.
func TestOldStateFolderIsRefused(t *testing.T) {
	ctx, f := newFleet(t)
	must(t, f.Start(ctx))
	must(t, f.WaitReady(ctx, "first"))
	must(t, f.Stop(ctx))
	for _, h := range []*testenv.Host{f.Host("alpha"), f.Host("gamma")} {
		copyFolder(t, h.State(), filepath.Join(f.Dir, "old-"+h.Name))
	}
	f.Keys += f.Key("second", "ed25519", 2)
	must(t, f.WriteRoster(2))
	must(t, f.Start(ctx))
	must(t, f.WaitReady(ctx, "second"))
	must(t, f.Stop(ctx))
	for _, h := range []*testenv.Host{f.Host("alpha"), f.Host("gamma")} {
		now := filepath.Join(f.Dir, "now-"+h.Name)
		copyFolder(t, h.State(), now)
		copyFolder(t, filepath.Join(f.Dir, "old-"+h.Name), h.State())
		if err := h.Start(ctx); err == nil {
			s, err := h.Client().Status(ctx)
			must(t, err)
			if s.ProtectorError == "" {
				t.Errorf("%s opened an old state folder", h.Name)
			}
			for _, k := range s.Keys {
				waitCondition(ctx, t, h, k.Name, "sealed", "")
			}
			must(t, h.Stop(ctx))
		}
		copyFolder(t, now, h.State())
	}
	must(t, f.Start(ctx))
	must(t, f.WaitReady(ctx, "second"))
	checkKey(ctx, t, f, "second")
}

// TestChangedPCR closes the vault, by name, and opens it again after a reboot
// into the old state.
func TestChangedPCR(t *testing.T) {
	ctx, f := newFleet(t)
	must(t, f.Start(ctx))
	must(t, f.WaitReady(ctx, "first"))
	alpha := f.Host("alpha")
	must(t, alpha.Stop(ctx))
	must(t, alpha.Tap.Extend(4, "another boot loader"))
	must(t, alpha.Start(ctx))
	waitCondition(ctx, t, alpha, "first", "sealed", "")
	s, err := alpha.Client().Status(ctx)
	must(t, err)
	if !strings.Contains(s.ProtectorError, "PCR 4") {
		t.Errorf("after a change of PCR 4: %q", s.ProtectorError)
	}
	if _, err := alpha.Client().Sign(ctx, "first", []byte("m")); reason(err) != "KEY_NOT_READY" {
		t.Errorf("signing on a sealed host: %v", err)
	}
	_, err = f.Host("beta").Client().Sign(ctx, "first", []byte("m"))
	must(t, err)
	must(t, alpha.Stop(ctx))
	must(t, alpha.TPM.Restart(ctx))
	alpha.Tap.Connect(alpha.TPM)
	must(t, alpha.Start(ctx))
	must(t, f.WaitReady(ctx, "first"))
	checkKey(ctx, t, f, "first")
}

func reason(err error) string {
	var e *api.Error
	if errors.As(err, &e) {
		return e.Reason
	}
	return fmt.Sprint(err)
}

// TestHostsThatAreAway stops, pauses and kills hosts under a caller.
func TestHostsThatAreAway(t *testing.T) {
	ctx, f := newFleet(t)
	must(t, f.Start(ctx))
	must(t, f.WaitReady(ctx, "first"))
	alpha := f.Host("alpha").Client()
	for _, h := range []*testenv.Host{f.Host("beta"), f.Host("gamma")} {
		must(t, syscall.Kill(h.Process().Pid(), syscall.SIGSTOP)) // hangs, and does not hang up
		for range 3 {
			r, err := alpha.Sign(ctx, "first", []byte("m"))
			must(t, err)
			if slices.Contains(r.Signers, h.Name) {
				t.Errorf("%s signed while it was stopped", h.Name)
			}
		}
		must(t, syscall.Kill(h.Process().Pid(), syscall.SIGCONT))
		must(t, f.WaitReady(ctx, "first"))
	}
	f.Host("beta").Kill()
	_, err := alpha.Sign(ctx, "first", []byte("m"))
	must(t, err)
	f.Host("gamma").Kill()
	for { // until alpha has seen it: asked before, it says what the attempt failed of
		k, err := alpha.GetKey(ctx, "first")
		must(t, err)
		if len(k.Live) == 1 {
			break
		}
	}
	_, err = alpha.Sign(ctx, "first", []byte("m"))
	if reason(err) != "NO_QUORUM" || !strings.Contains(err.Error(), "1 of 2 hosts") || !strings.Contains(err.Error(), "beta") || !strings.Contains(err.Error(), "gamma") {
		t.Errorf("with two hosts gone: %v", err)
	}
}

// TestLostShareIsNotReplaced removes a host's vault; and asks for a key that
// exists under a raised incarnation.
func TestLostShareIsNotReplaced(t *testing.T) {
	ctx, f := newFleet(t)
	must(t, f.Start(ctx))
	must(t, f.WaitReady(ctx, "first"))
	before, err := f.Hosts[0].Client().GetKey(ctx, "first")
	must(t, err)
	alpha := f.Host("alpha")
	must(t, alpha.Stop(ctx))
	vaultFolder := filepath.Join(alpha.State(), "vault")
	saved := filepath.Join(f.Dir, "saved")
	copyFolder(t, vaultFolder, saved)
	must(t, os.RemoveAll(vaultFolder))
	if err := alpha.Init(ctx); err == nil {
		t.Error("conseald init made a new vault over hardware that has a root")
	}
	must(t, alpha.Start(ctx))
	waitCondition(ctx, t, alpha, "first", "sealed", "")
	must(t, f.Stop(ctx))
	must(t, os.RemoveAll(vaultFolder))
	copyFolder(t, saved, vaultFolder)
	f.Keys = strings.Replace(f.Keys, "generate = true", "generate = true\nincarnation = 2", 1)
	must(t, f.WriteRoster(2))
	must(t, f.Start(ctx))
	for _, h := range f.Hosts {
		waitCondition(ctx, t, h, "first", "refused", "incarnation 1")
	}
	must(t, f.Stop(ctx))
	f.Keys = strings.Replace(f.Keys, "incarnation = 2", "incarnation = 1", 1)
	must(t, f.WriteRoster(3))
	must(t, f.Start(ctx))
	must(t, f.WaitReady(ctx, "first"))
	after, err := f.Hosts[0].Client().GetKey(ctx, "first")
	must(t, err)
	if !bytes.Equal(before.PublicKey, after.PublicKey) {
		t.Error("the key changed")
	}
}

// TestWrongPINIsSentOnce: the latch keeps a restarted agent from trying again.
func TestWrongPINIsSentOnce(t *testing.T) {
	ctx, f := newFleet(t)
	gamma := f.Host("gamma")
	pin, err := os.ReadFile(gamma.Token.PINFile)
	must(t, err)
	must(t, os.WriteFile(gamma.Token.PINFile, []byte("0000wrong"), 0o600))
	for i, want := range []string{"PIN", "not sent again"} {
		err := gamma.Start(ctx)
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("start %d with a wrong PIN: %v, want %q in it", i+1, err, want)
		}
	}
	must(t, os.WriteFile(gamma.Token.PINFile, pin, 0o600))
	must(t, f.Start(ctx))
	must(t, f.WaitReady(ctx, "first"))
}

// opened adds a key that is opened so.
func opened(f *testenv.Fleet, name string, open string) string {
	return f.Key(name, "ed25519", 2) + fmt.Sprintf("open = %q\n", open)
}

// unseals counts the commands TPM2_Unseal (TPM 2.0 part 2, 6.5.2) on a host's bus.
func unseals(h *testenv.Host) *atomic.Int64 {
	count := &atomic.Int64{}
	h.Tap.Intercept(func(cmd []byte, next testenv.Exchange) ([]byte, error) {
		if binary.BigEndian.Uint32(cmd[6:]) == 0x15e {
			count.Add(1)
		}
		return next(cmd)
	})
	return count
}

// TestOpenings: how often a TPM is asked for the share of a key that is held, opened for
// a time or for each use; and what a changed PCR does to each while the agent runs.
func TestOpenings(t *testing.T) {
	ctx, f := newFleet(t)
	f.Keys += opened(f, "timed", "1h") + opened(f, "each", "each")
	must(t, f.WriteRoster(2))
	must(t, f.Start(ctx))
	keys := []string{"first", "timed", "each"}
	for _, key := range keys {
		must(t, f.WaitReady(ctx, key))
	}
	alpha, beta := f.Host("alpha"), f.Host("beta")
	count := unseals(alpha)
	signs := func(key string, asks int64) {
		t.Helper()
		before := count.Load()
		for range 3 {
			r, err := alpha.Client().Sign(ctx, key, []byte("m"))
			must(t, err)
			must(t, verifyScheme("ed25519", r, []byte("m")))
		}
		if got := count.Load() - before; got != asks {
			t.Errorf("three signatures of key %q unsealed %d times, want %d", key, got, asks)
		}
	}
	signs("first", 0)
	signs("timed", 1)
	signs("each", 3)

	must(t, alpha.Tap.Extend(4, "another boot loader"))
	signs("first", 0)
	signs("timed", 0)
	if _, err := alpha.Client().Sign(ctx, "each", []byte("m")); reason(err) != "KEY_NOT_READY" || !strings.Contains(err.Error(), "PCR 4") {
		t.Errorf("after a change of PCR 4: %v", err)
	}
	for _, h := range []*testenv.Host{beta, f.Host("gamma")} {
		r, err := h.Client().Sign(ctx, "each", []byte("m"))
		must(t, err)
		if slices.Contains(r.Signers, "alpha") {
			t.Errorf("%q signed", r.Signers)
		}
	}
	waitCondition(ctx, t, alpha, "each", "sealed", "PCR 4")
	must(t, f.Host("gamma").Stop(ctx))
	if _, err := beta.Client().Sign(ctx, "each", []byte("m")); reason(err) != "NO_QUORUM" || !strings.Contains(err.Error(), `"alpha": sealed`) || !strings.Contains(err.Error(), "PCR 4") {
		t.Errorf("asked on beta, with alpha only: %v", err)
	}

	must(t, alpha.Stop(ctx))
	must(t, alpha.TPM.Restart(ctx))
	alpha.Tap.Connect(alpha.TPM)
	must(t, alpha.Start(ctx))
	must(t, f.Host("gamma").Start(ctx))
	for _, key := range keys {
		must(t, f.WaitReady(ctx, key))
		checkKey(ctx, t, f, key)
	}
	signs("each", 3)
}

func waitCondition(ctx context.Context, t *testing.T, h *testenv.Host, key, condition string, words string) {
	t.Helper()
	for {
		k, err := h.Client().GetKey(ctx, key)
		if err == nil && k.Condition == condition && strings.Contains(k.Detail, words) {
			return
		}
		select {
		case <-ctx.Done():
			t.Fatalf("key %q on %s is %s: %s (%v)", key, h.Name, k.GetCondition(), k.GetDetail(), err)
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// TestOpenChanges moves resting shares with the roster, there and back, and kills alpha at
// each place on the way.
func TestOpenChanges(t *testing.T) {
	ctx, f := newFleet(t, "-tags", "failpoints")
	f.Keys += f.Key("second", "ed25519", 2)
	must(t, f.WriteRoster(1))
	must(t, f.Start(ctx))
	keys := []string{"first", "second"}
	for _, key := range keys {
		must(t, f.WaitReady(ctx, key))
	}
	alpha, held := f.Host("alpha"), f.Keys
	for i, point := range []string{"", "vault/share/written", "vault/share/renamed", "vault/reseal/file", "vault/reseal/file:2", "vault/manifest/written",
		"vault/manifest/renamed", "vault/root/before", "vault/root/after", ""} {
		must(t, f.Stop(ctx))
		asks := int64(0)
		if f.Keys = held; i%2 == 0 {
			f.Keys, asks = strings.ReplaceAll(held, "[[key]]\n", "[[key]]\nopen = \"each\"\n"), 1
		}
		must(t, f.WriteRoster(2+i))
		roots := rootsOf(ctx, t, alpha)
		if point != "" {
			hit := filepath.Join(f.Dir, "hit")
			os.Remove(hit)
			alpha.Env = []string{"FAILPOINT=" + point, "FAILPOINT_LOG=" + hit}
			if err := alpha.Start(ctx); err == nil { // it may die before it answers
				select {
				case <-alpha.Process().Done():
				case <-ctx.Done():
					t.Fatalf("failpoint %s was not reached", point)
				}
				alpha.Kill()
			}
			name, _, _ := strings.Cut(point, ":")
			if b, err := os.ReadFile(hit); err != nil || strings.TrimSpace(string(b)) != name {
				t.Fatalf("failpoint %s: hit %q, %v", point, b, err)
			}
			alpha.Env = nil
		}
		must(t, f.Start(ctx))
		count := unseals(alpha)
		for _, key := range keys {
			must(t, f.WaitReady(ctx, key))
			before := count.Load()
			_, err := alpha.Client().Sign(ctx, key, []byte("m"))
			must(t, err)
			if got := count.Load() - before; got != asks {
				t.Errorf("after %q: a signature of %q unsealed %d times, want %d", point, key, got, asks)
			}
			checkKey(ctx, t, f, key)
		}
		s, err := alpha.Client().Status(ctx)
		must(t, err)
		if s.Roots != roots+1 {
			t.Errorf("after %q: two shares were sealed anew under %d roots, want one", point, s.Roots-roots)
		}
		for _, h := range f.Hosts {
			if got := shareFiles(t, h); got != len(keys) {
				t.Errorf("after %q, %s has %d share files for %d keys", point, h.Name, got, len(keys))
			}
		}
	}
}

// rootsOf is how many roots a stopped host has taken.
func rootsOf(ctx context.Context, t *testing.T, h *testenv.Host) uint64 {
	t.Helper()
	p := openTPM(ctx, t, h, h.State())
	defer p.Close(ctx)
	v, err := vault.Open(ctx, filepath.Join(h.State(), "vault"), h.Name, p)
	must(t, err)
	defer v.Close()
	return v.Stats().Roots
}

// waitFor waits for something that comes by itself.
func waitFor(ctx context.Context, t *testing.T, what string, there func() bool) {
	t.Helper()
	for !there() {
		select {
		case <-ctx.Done():
			t.Fatalf("in vain: %s", what)
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// TestOldSharesAreDead puts the state folders of all hosts back as they were before a
// refresh, on their own hardware: a quorum of old shares that nobody would sign with.
// With the folders of after, the same hosts sign.
func TestOldSharesAreDead(t *testing.T) {
	ctx, f := newFleet(t)
	must(t, f.Start(ctx))
	must(t, f.WaitReady(ctx, "first"))
	must(t, f.Stop(ctx))
	saved := t.TempDir()
	swap := func(to, from string) {
		for _, h := range f.Hosts {
			must(t, os.CopyFS(filepath.Join(saved, to, h.Name), os.DirFS(h.State())))
			if from != "" {
				must(t, os.RemoveAll(h.State()))
				must(t, os.CopyFS(h.State(), os.DirFS(filepath.Join(saved, from, h.Name))))
				must(t, os.Chmod(h.State(), 0o700))
			}
		}
	}
	swap("old", "")
	must(t, f.Start(ctx))
	must(t, f.WaitReady(ctx, "first"))
	before, err := f.Hosts[0].Client().GetKey(ctx, "first")
	must(t, err)
	after, err := f.Hosts[1].Client().Refresh(ctx, "first")
	must(t, err)
	for _, h := range f.Hosts {
		waitFor(ctx, t, h.Name+" has the new share only", func() bool {
			k, err := h.Client().GetKey(ctx, "first")
			return err == nil && k.EpochAttempt == after.EpochAttempt && k.EpochRoster == after.EpochRoster && shareFiles(t, h) == 1
		})
	}
	if !bytes.Equal(before.PublicKey, after.PublicKey) || bytes.Equal(before.Certificate, after.Certificate) {
		t.Fatalf("key %x at %x, then %x at %x", before.PublicKey, before.Certificate, after.PublicKey, after.Certificate)
	}
	must(t, f.Stop(ctx))
	swap("new", "old")
	must(t, f.Start(ctx))
	for _, h := range f.Hosts {
		waitCondition(ctx, t, h, "first", "sealed", "")
		_, err := h.Client().Sign(ctx, "first", []byte("with an old share"))
		if err == nil || !strings.Contains(err.Error(), "not ready on this host: sealed") {
			t.Errorf("%s, with its old folder: %v", h.Name, err)
		}
		s, err := h.Client().Status(ctx)
		if err != nil || !strings.Contains(s.ProtectorError, "older copy") && !strings.Contains(s.ProtectorError, "older than the token") {
			t.Errorf("%s, with its old folder: %q, %v", h.Name, s.GetProtectorError(), err)
		}
	}
	must(t, f.Stop(ctx))
	swap("dead", "new") // the control
	must(t, f.Start(ctx))
	must(t, f.WaitReady(ctx, "first"))
	checkKey(ctx, t, f, "first")

	// One host with its old folder stops nobody, and it is said which.
	must(t, f.Hosts[0].Stop(ctx))
	h := f.Hosts[0]
	must(t, os.RemoveAll(h.State()))
	must(t, os.CopyFS(h.State(), os.DirFS(filepath.Join(saved, "old", h.Name))))
	must(t, os.Chmod(h.State(), 0o700))
	must(t, h.Start(ctx))
	if _, err := f.Hosts[1].Client().Sign(ctx, "first", []byte("by the others")); err != nil {
		t.Error(err)
	}
	must(t, f.Hosts[2].Stop(ctx))
	_, err = f.Hosts[1].Client().Sign(ctx, "first", []byte("by nobody"))
	if err == nil || !strings.Contains(err.Error(), fmt.Sprintf("%q", h.Name)) {
		t.Errorf("with one old folder and one host away: %v", err)
	}
}
