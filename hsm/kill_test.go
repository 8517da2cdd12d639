//go:build cgo

package hsm_test

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"conseal/agent/vault"
	"conseal/hsm"
	"conseal/internal/secret"
	"conseal/testenv"
)

// kills is how often a test kills a process.
func kills() int {
	if *soak {
		return 300
	}
	return 30
}

var killKey = vault.KeyID{Name: "payments", Incarnation: 1}

func killNumber(n int) vault.Number { return vault.Number{Roster: 1, Attempt: uint64(n)} }

// killShare is the share of the n-th epoch, and its output's digest.
func killShare(n int) (*secret.Bytes, vault.Output) {
	h := sha256.Sum256(fmt.Append(nil, "share ", n))
	return secret.Copy(h[:]), sha256.Sum256(fmt.Append(nil, "output ", n))
}

func vaultFolder(cfg hsm.Config) string { return filepath.Join(cfg.StateDir, "vault") }

// epochs goes from epoch to epoch as an agent does, until it is killed, and says
// what it is about to do and what is done.
func epochs(ctx context.Context, h *hsm.HSM, cfg hsm.Config) error {
	v, err := vault.Open(ctx, vaultFolder(cfg), "web1", h)
	if err != nil {
		return err
	}
	for {
		r, _ := v.Record(killKey)
		n := int(r.Active.Attempt) + 1
		for _, s := range r.Staged { // by a process that was killed
			n = max(n, int(s.Number.Attempt)+1)
		}
		share, output := killShare(n)
		steps := []func() error{
			func() error {
				return v.Stage(ctx, vault.Held, killKey, killNumber(n), output, vault.Origin{}, []byte("public"), share)
			},
			func() error { return v.Vote(ctx, killKey, killNumber(n), output) },
			func() error { return v.Activate(ctx, killKey, killNumber(n), []byte("certificate")) },
			func() error {
				var older []vault.Drop
				for _, s := range r.Staged {
					if s.Number != killNumber(n) {
						older = append(older, vault.Drop{Key: killKey, Number: s.Number})
					}
				}
				return v.Drop(ctx, older)
			},
		}
		first := 0
		if r.Voted != nil && r.Voted.Number.Compare(r.Active) > 0 { // it was killed before it activated that
			n, first = int(r.Voted.Number.Attempt), 2
		}
		for i, step := range steps {
			if i < first {
				continue
			}
			fmt.Println("try", n, i)
			if err := step(); err != nil {
				return err
			}
			fmt.Println("done", n, i)
		}
	}
}

// killed is what is known of a vault whose process was killed.
type killed struct {
	t      *testing.T
	cfg    hsm.Config
	voted  int // the highest epoch that must have this host's vote
	active int // the highest that must be active
	trying int // the highest that may be there
}

// read follows what the child said.
func (k *killed) read(said string) {
	for line := range strings.Lines(said) {
		var n, step int
		if _, err := fmt.Sscanf(line, "try %d %d\n", &n, &step); err == nil {
			k.trying = max(k.trying, n)
		}
		if _, err := fmt.Sscanf(line, "done %d %d\n", &n, &step); err == nil {
			if step >= 1 {
				k.voted = max(k.voted, n)
			}
			if step >= 2 {
				k.active = max(k.active, n)
			}
		}
	}
}

// check sees that every share that the vault has opens and is what was staged, that
// none is lost, and that one root key is left.
func (k *killed) check() {
	k.t.Helper()
	h := open(k.t, k.cfg)
	defer h.Close()
	v, err := vault.Open(k.t.Context(), vaultFolder(k.cfg), "web1", h)
	if err != nil {
		k.t.Fatalf("epochs %d to %d: %v", k.active, k.trying, err)
	}
	defer v.Close()
	r, _ := v.Record(killKey)
	active := int(r.Active.Attempt)
	if active < k.active || active > k.trying || k.voted > 0 && (r.Voted == nil || int(r.Voted.Number.Attempt) < k.voted) {
		k.t.Errorf("epoch %d is active and %v has the vote: %d was active, %d had the vote, %d was tried", active, r.Voted, k.active, k.voted, k.trying)
	}
	held := 0
	for _, s := range r.Staged {
		want, output := killShare(int(s.Number.Attempt))
		if s.Output != output {
			k.t.Errorf("epoch %s has another output", s.Number)
		}
		if s.Number == r.Active || r.Voted != nil && s.Number == r.Voted.Number {
			held++
		}
		if err := v.Lend(context.Background(), killKey, s.Number, func(got []byte) error {
			if !want.Equal(secret.Copy(got)) {
				k.t.Errorf("the share of epoch %s is another", s.Number)
			}
			return nil
		}); err != nil {
			k.t.Errorf("the share of epoch %s is lost: %v", s.Number, err)
		}
	}
	if r.Voted != nil && (held < 1 || r.Voted.Number != r.Active && active > 0 && held < 2) {
		k.t.Errorf("%d shares are held of %v and %s", held, r.Voted, r.Active)
	}
	if rootKeys(k.t, h) > 1 { // one above the root is left from a SetRoot that never was: the next destroys it
		takeNewRoot(k.t, v)
	}
	if n := rootKeys(k.t, h); n != 1 {
		k.t.Errorf("%d root keys after the recovery", n)
	}
}

// takeNewRoot lets the vault take a new root: it stages and drops a share.
func takeNewRoot(t *testing.T, v *vault.Vault) {
	t.Helper()
	other := vault.KeyID{Name: "other", Incarnation: 1}
	share, output := killShare(0)
	err := v.Stage(t.Context(), vault.Held, other, killNumber(1), output, vault.Origin{}, []byte("public"), share)
	if err == nil {
		err = v.Drop(t.Context(), []vault.Drop{{Key: other, Number: killNumber(1)}})
	}
	if err != nil {
		t.Fatal(err)
	}
}

// wantStale sees that a copy of the folder from before does not open, and puts the
// present one back.
func (k *killed) wantStale(old string) {
	k.t.Helper()
	present := filepath.Join(k.t.TempDir(), "present")
	replace := func(from, to string) {
		k.t.Helper()
		if err := errors.Join(os.RemoveAll(to), copyState(from, to)); err != nil {
			k.t.Fatal(err)
		}
	}
	replace(k.cfg.StateDir, present)
	replace(old, k.cfg.StateDir)
	h := open(k.t, k.cfg)
	defer h.Close()
	if v, err := vault.Open(k.t.Context(), vaultFolder(k.cfg), "web1", h); err == nil {
		v.Close()
		k.t.Error("an older state opens")
	} else if !errors.Is(err, hsm.ErrStale) && !errors.Is(err, vault.ErrStale) {
		k.t.Errorf("an older state: %v", err)
	}
	// The older vault with the present root is no better.
	replace(present, k.cfg.StateDir)
	replace(vaultFolder(hsm.Config{StateDir: old}), vaultFolder(k.cfg))
	if v, err := vault.Open(k.t.Context(), vaultFolder(k.cfg), "web1", h); err == nil {
		v.Close()
		k.t.Error("an older vault opens")
	} else if !errors.Is(err, vault.ErrStale) {
		k.t.Errorf("an older vault: %v", err)
	}
	replace(present, k.cfg.StateDir)
}

// copyState copies a state folder with modes that the vault takes.
func copyState(from, to string) error {
	if err := os.CopyFS(to, os.DirFS(from)); err != nil {
		return err
	}
	return filepath.WalkDir(to, func(path string, d os.DirEntry, err error) error {
		if err == nil && d.IsDir() {
			return os.Chmod(path, 0o700)
		}
		if err == nil {
			return os.Chmod(path, 0o600)
		}
		return err
	})
}

// TestKillInEpochs kills a process that goes from epoch to epoch, at random moments.
func TestKillInEpochs(t *testing.T) {
	h, cfg := newHost(t)
	if err := vault.Create(t.Context(), vaultFolder(cfg), "web1", h); err != nil {
		t.Fatal(err)
	}
	h.Close()
	k := &killed{t: t, cfg: cfg}
	old, oldVote, stale := "", 0, 0
	for kill := range kills() {
		out := newLines(1 + rand.IntN(16)) // 8 are an epoch, however long it takes
		cmd := childCommand(t, "epochs", cfg)
		cmd.Stdout = out
		p, err := testenv.StartProcess(cmd)
		if err != nil {
			t.Fatal(err)
		}
		select {
		case <-out.ready:
			select {
			case <-time.After(time.Duration(rand.IntN(20_000)) * time.Microsecond):
			case <-p.Done():
			}
		case <-p.Done():
		}
		select {
		case <-p.Done():
			t.Fatalf("kill %d: the child ended: %v", kill, p.Wait())
		default:
		}
		p.Kill()
		k.read(out.buf.String())
		if kill%3 == 2 {
			continue // the next process meets what this one left
		}
		k.check()
		if old != "" && k.voted > oldVote { // a vote takes a new root
			k.wantStale(old)
			old = ""
			stale++
		}
		if old == "" {
			old, oldVote = filepath.Join(t.TempDir(), "old"), k.trying
			if err := copyState(cfg.StateDir, old); err != nil {
				t.Fatal(err)
			}
		}
	}
	k.check()
	if k.active < kills()/4 || stale == 0 {
		t.Errorf("only %d epochs in %d kills, and %d older states tried", k.active, kills(), stale)
	}
	t.Logf("%d kills, %d epochs, %d older states", kills(), k.active, stale)
}
