package tpm_test

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"

	"conseal/agent/vault"
	"conseal/internal/secret"
	"conseal/testenv"
	"conseal/tpm"
	"conseal/tpm/policy"
)

// killFlag has the test binary use a vault until it is killed.
const killFlag = "-vault-until-killed"

// victim is what the process that is killed needs to know.
type victim struct {
	Device  string
	SRKName []byte
	TeamKey []byte // PEM
	Policy  []byte // document
	Vault   string
}

var killedKey = vault.KeyID{Name: "release", Incarnation: 1}

func epochNumber(attempt uint64) vault.Number { return vault.Number{Roster: 1, Attempt: attempt} }

func shareOf(n vault.Number) []byte { return bytes.Repeat([]byte(n.String()+"|"), 50) }

func outputOf(n vault.Number) vault.Output {
	return vault.Output{1, byte(n.Attempt), byte(n.Attempt >> 8)}
}

func (v *victim) open(ctx context.Context) (*tpm.TPM, *vault.Vault, error) {
	team, err := policy.ParsePublicKey(v.TeamKey)
	if err != nil {
		return nil, nil, err
	}
	signed, err := policy.Parse(v.Policy, team)
	if err != nil {
		return nil, nil, err
	}
	d, err := tpm.Open(ctx, tpm.Config{
		Device: v.Device, PCRs: []int{4}, SRKName: v.SRKName,
		Authority: &tpm.Authority{
			Host:      policy.Host{Name: "alpha", Key: team, Counter: counterIndex},
			Installed: func() ([]*policy.Policy, error) { return []*policy.Policy{signed.(*policy.Policy)}, nil },
		},
	})
	if err != nil {
		return nil, nil, err
	}
	w, err := vault.Open(ctx, v.Vault, "alpha", d)
	if err != nil {
		return nil, nil, errors.Join(err, d.Close(ctx))
	}
	return d, w, nil
}

// live replaces the share again and again, and says after each step that it is done.
// An error ends it: the TPM may be gone.
func live(file string) int {
	var v victim
	b, err := os.ReadFile(file)
	if err == nil {
		err = json.Unmarshal(b, &v)
	}
	if err == nil {
		err = v.live(context.Background())
	}
	fmt.Println("error", err)
	return 1
}

func (v *victim) live(ctx context.Context) error {
	_, w, err := v.open(ctx)
	if err != nil {
		return err
	}
	r, _ := w.Record(killedKey)
	if r.Voted != nil && r.Voted.Number.Compare(r.Active) > 0 { // it was killed before it activated that
		n := r.Voted.Number
		if err := w.Activate(ctx, killedKey, n, []byte("certificate "+n.String())); err != nil {
			return err
		}
		r, _ = w.Record(killedKey)
	}
	next := r.Active.Attempt
	for _, s := range r.Staged {
		next = max(next, s.Number.Attempt)
	}
	for {
		fmt.Println("active", r.Active.Attempt)
		next++
		n := epochNumber(next)
		share := secret.Copy(shareOf(n))
		if err := w.Stage(ctx, vault.Class(next%2), killedKey, n, outputOf(n), vault.Origin{}, []byte("public"), share); err != nil {
			return err
		}
		fmt.Println("staged", next)
		if err := w.Vote(ctx, killedKey, n, outputOf(n)); err != nil {
			return err
		}
		fmt.Println("voted", next)
		if err := w.Activate(ctx, killedKey, n, []byte("certificate "+n.String())); err != nil {
			return err
		}
		fmt.Println("active", next)
		r, _ = w.Record(killedKey)
		var drops []vault.Drop
		for _, s := range r.Staged {
			if s.Number != r.Active {
				drops = append(drops, vault.Drop{Key: killedKey, Number: s.Number})
			}
		}
		if err := w.Drop(ctx, drops); err != nil {
			return err
		}
		fmt.Println("dropped", next-1)
	}
}

// said is what a victim said to have done, the highest of each.
type said map[string]uint64

// run lets the victim live until it is killed by kill, which is called some time after it
// has said so many things.
func (v *victim) run(t *testing.T, file string, things int, after time.Duration, kill func(*os.Process)) said {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), os.Args[0], killFlag, file)
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	done := said{}
	lines := bufio.NewScanner(out)
	var killing sync.WaitGroup
	for lines.Scan() {
		var what string
		var n uint64
		if _, err := fmt.Sscanf(lines.Text(), "%s %d", &what, &n); err == nil {
			done[what] = max(done[what], n)
		}
		if things--; things == 0 {
			killing.Go(func() {
				<-time.After(after)
				kill(cmd.Process)
			})
		}
	}
	_ = cmd.Wait() // it was killed, or says why it ended
	killing.Wait()
	return done
}

// Crashes of the agent and of the TPM, at any moment of storing, replacing and erasing
// shares: what was said to be done is, and what was erased stays so.
func TestKilled(t *testing.T) {
	rounds := 30
	if *soak {
		rounds = 200
	}
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	dice := rand.New(rand.NewPCG(seed, 1))
	m := newTeam(t)
	h := newGovernedHost(t, m, 4)
	allowed := m.allow(t, h, "now")
	document, err := allowed.Sign(m)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	v := &victim{Device: h.tap.Address(), SRKName: h.cfg.SRKName, TeamKey: m.pem(t), Policy: document, Vault: filepath.Join(dir, "vault")}
	if err := vault.Create(t.Context(), v.Vault, "alpha", h.TPM); err != nil {
		t.Fatal(err)
	}
	if err := h.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	h.reboot(t)
	b, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(dir, "victim.json")
	if err := os.WriteFile(file, b, 0o600); err != nil {
		t.Fatal(err)
	}
	hits := map[string]int{} // what was said in how many rounds, and how many images were stale
	var killed atomic.Int32  // writes of the root during which the TPM was killed
	var cuts sync.WaitGroup  // kills of the TPM under way: a late one must not hit the next round
	var before vault.Record
	for round := range rounds {
		image := filepath.Join(dir, fmt.Sprint("image", round))
		if err := os.CopyFS(image, os.DirFS(v.Vault)); err != nil {
			t.Fatal(err)
		}
		how, kill := "agent", func(p *os.Process) { _ = p.Kill() }
		if round%3 == 2 { // mid-command: the next write of the root is on its way
			how, kill = "TPM", func(*os.Process) {
				h.tap.Intercept(func(cmd []byte, next testenv.Exchange) ([]byte, error) {
					if code(cmd) == tpm2.TPMCCNVWrite {
						killed.Add(1)
						cuts.Go(h.device.Kill)
					}
					return next(cmd)
				})
			}
		}
		// By turns, so that enough happens in any run: after five things an epoch is dropped.
		done := v.run(t, file, 1+round%8, time.Duration(dice.IntN(30))*time.Millisecond, kill)
		h.tap.Intercept(nil)
		h.tap.Drain()
		cuts.Wait()
		if how == "TPM" {
			h.reboot(t)
		}
		before = v.wantWhole(t, h, before, done, hits)
		if v.wantStale(t, image, before) {
			hits["stale"]++
		}
		if err := os.RemoveAll(image); err != nil {
			t.Fatal(err)
		}
		if t.Failed() {
			t.Fatalf("round %d, killed: %s, it said %v", round, how, done)
		}
	}
	t.Logf("%d rounds, epoch %s, %v, TPM killed in %d writes", rounds, before.Active, hits, killed.Load())
	if n := rounds / 5; before.Active.Attempt < uint64(n) || hits["stale"] < n || hits["dropped"] < n || killed.Load() < int32(n) {
		t.Error("too little happens between the kills")
	}
	if got := failedTries(t, h); got != 0 {
		t.Errorf("%d failed tries are counted", got)
	}
	d := open(t, h.cfg)
	if counter, _, err := d.Verdicts(t.Context()); err != nil || counter != allowed.Version {
		t.Errorf("the counter of revocations is at %d, not %d: %v", counter, allowed.Version, err)
	}
	wantNoHandles(t, h.tap)
}

// wantWhole opens what is there, and compares it with what was said.
func (v *victim) wantWhole(t *testing.T, h *host, before vault.Record, done said, hits map[string]int) vault.Record {
	t.Helper()
	d, w, err := v.open(t.Context())
	if err != nil {
		t.Fatalf("nothing opens: %v", err)
	}
	defer d.Close(t.Context())
	defer w.Close()
	r, _ := w.Record(killedKey)
	held := map[uint64]bool{}
	for _, s := range r.Staged {
		held[s.Number.Attempt] = true
		err := w.Lend(t.Context(), killedKey, s.Number, func(b []byte) error {
			if !bytes.Equal(b, shareOf(s.Number)) {
				t.Errorf("epoch %s has another share", s.Number)
			}
			return nil
		})
		if err != nil {
			t.Errorf("epoch %s: %v", s.Number, err)
		}
	}
	if r.Active.Attempt < max(before.Active.Attempt, done["active"]) {
		t.Errorf("epoch %s is active, %d was before", r.Active, done["active"])
	}
	if r.Active.Attempt > 0 && !held[r.Active.Attempt] {
		t.Errorf("the share of the active epoch %s is lost", r.Active)
	}
	if n := done["staged"]; n > r.Active.Attempt && !held[n] {
		t.Errorf("epoch %d was staged and is lost", n)
	}
	if n := done["voted"]; n > 0 && (r.Voted == nil || r.Voted.Number.Attempt < n) {
		t.Errorf("the vote for epoch %d is forgotten: %v", n, r.Voted)
	}
	if n := done["dropped"]; n > 0 && held[n] {
		t.Errorf("epoch %d was erased and is back", n)
	}
	for what := range done {
		hits[what]++
	}
	return r
}

// wantStale puts the image of the disk before the round back. It opens only if no root
// was taken since: then it has nothing that was erased.
func (v *victim) wantStale(t *testing.T, image string, now vault.Record) (stale bool) {
	t.Helper()
	old := *v
	old.Vault = image
	d, w, err := old.open(t.Context())
	if errors.Is(err, vault.ErrStale) {
		return true
	}
	if err != nil {
		t.Errorf("the old image: %v", err)
		return false
	}
	defer d.Close(t.Context())
	defer w.Close()
	r, _ := w.Record(killedKey)
	for _, s := range r.Staged {
		if !slices.ContainsFunc(now.Staged, func(n vault.Staged) bool { return n == s }) {
			t.Errorf("the old image gives epoch %s, which was erased", s.Number)
		}
	}
	if now.Voted != nil && (r.Voted == nil || r.Voted.Number != now.Voted.Number) {
		t.Error("the old image forgets a vote")
	}
	return false
}
