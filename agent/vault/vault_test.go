package vault_test

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"conseal/agent/vault"
	"conseal/agent/vault/vaulttest"
	"conseal/internal/secret"
)

const host = "web1"

var (
	payments = key("payments", 1)
	backups  = key("backups", 1)
	n11      = number(1, 1)
	n12      = number(1, 2)
	n13      = number(1, 3)
	n21      = number(2, 1)
)

func key(name string, incarnation uint64) vault.KeyID {
	return vault.KeyID{Name: name, Incarnation: incarnation}
}
func number(roster, attempt uint64) vault.Number {
	return vault.Number{Roster: roster, Attempt: attempt}
}

// content is what the tests stage as a share.
func content(id vault.KeyID, n vault.Number) []byte {
	b := sha256.Sum256(fmt.Appendf(nil, "share %s %d %s", id.Name, id.Incarnation, n))
	return b[:]
}

func output(id vault.KeyID, n vault.Number) vault.Output {
	return sha256.Sum256(fmt.Appendf(nil, "output %s %d %s", id.Name, id.Incarnation, n))
}

func certificate(id vault.KeyID, n vault.Number) []byte {
	return fmt.Appendf(nil, "certificate %s %d %s", id.Name, id.Incarnation, n)
}

func public(id vault.KeyID, n vault.Number) []byte {
	return fmt.Appendf(nil, "public %s %d %s", id.Name, id.Incarnation, n)
}

// testVault is an open vault with what a test does to it.
type testVault struct {
	*vault.Vault
	t   testing.TB
	dir string
	hw  *hardware
}

func newVault(t testing.TB) *testVault {
	t.Helper()
	v := &testVault{t: t, dir: filepath.Join(t.TempDir(), "vault"), hw: newHardware()}
	must(t, vault.Create(t.Context(), v.dir, host, v.hw))
	v.reopen()
	t.Cleanup(func() {
		if v.Vault != nil {
			v.Close()
		}
	})
	return v
}

// reopen is a restart of the agent.
func (v *testVault) reopen() {
	v.t.Helper()
	if v.Vault != nil {
		v.Close()
		v.Vault = nil
	}
	opened, err := vault.Open(v.t.Context(), v.dir, host, v.hw)
	must(v.t, err)
	v.Vault = opened
}

// wantOpenError closes the vault and opens it in vain.
func (v *testVault) wantOpenError(want error, texts ...string) {
	v.t.Helper()
	if v.Vault != nil {
		v.Close()
		v.Vault = nil
	}
	opened, err := vault.Open(v.t.Context(), v.dir, host, v.hw)
	if err == nil {
		opened.Close()
	}
	wantError(v.t, err, want, texts...)
}

func (v *testVault) see(id vault.KeyID, entry byte) error {
	return v.See(v.t.Context(), id, [32]byte{entry})
}

func (v *testVault) stage(id vault.KeyID, n vault.Number) error {
	share := secret.Copy(content(id, n))
	defer share.Wipe()
	return v.Stage(v.t.Context(), vault.Held, id, n, output(id, n), vault.Origin{}, public(id, n), share)
}

func (v *testVault) vote(id vault.KeyID, n vault.Number) error {
	return v.Vote(v.t.Context(), id, n, output(id, n))
}

func (v *testVault) activate(id vault.KeyID, n vault.Number) error {
	return v.Activate(v.t.Context(), id, n, certificate(id, n))
}

func (v *testVault) drop(id vault.KeyID, numbers ...vault.Number) error {
	var drops []vault.Drop
	for _, n := range numbers {
		drops = append(drops, vault.Drop{Key: id, Number: n})
	}
	return v.Drop(v.t.Context(), drops)
}

// born makes a key with an active epoch.
func (v *testVault) born(id vault.KeyID, n vault.Number) {
	v.t.Helper()
	must(v.t, v.stage(id, n))
	must(v.t, v.vote(id, n))
	must(v.t, v.activate(id, n))
}

// lends returns the error of lending a share, also if it is another one.
func (v *testVault) lends(id vault.KeyID, n vault.Number) error {
	lent := false
	err := v.Lend(v.t.Context(), id, n, func(b []byte) error {
		lent = true
		if !bytes.Equal(b, content(id, n)) {
			return errors.New("it is another share")
		}
		return nil
	})
	if err == nil && !lent {
		return errors.New("no error and no share")
	}
	return err
}

func (v *testVault) wantLends(id vault.KeyID, numbers ...vault.Number) {
	v.t.Helper()
	for _, n := range numbers {
		if err := v.lends(id, n); err != nil {
			v.t.Errorf("lending %s %s: %v", id.Name, n, err)
		}
		got, err := v.Public(id, n)
		if err != nil || !bytes.Equal(got, public(id, n)) {
			v.t.Errorf("public output of %s %s: %q, %v", id.Name, n, got, err)
		}
	}
}

func (v *testVault) wantGone(id vault.KeyID, n vault.Number) {
	v.t.Helper()
	wantError(v.t, v.lends(id, n), vault.ErrNoShare)
	_, err := v.Public(id, n)
	wantError(v.t, err, vault.ErrNoShare)
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// wantError checks an error, and that its text has each of texts.
func wantError(t testing.TB, err, want error, texts ...string) {
	t.Helper()
	if err == nil || want != nil && !errors.Is(err, want) {
		t.Errorf("got %v, want %v", err, want)
		return
	}
	for _, text := range texts {
		if !strings.Contains(err.Error(), text) {
			t.Errorf("the text does not have %q: %v", text, err)
		}
	}
}

// files are all files below a folder but the lock, which is for people only.
func files(t testing.TB, dir string) map[string][]byte {
	t.Helper()
	out := map[string][]byte{}
	must(t, filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || d.Name() == "lock" {
			return err
		}
		name, _ := filepath.Rel(dir, path)
		out[name], err = os.ReadFile(path)
		return err
	}))
	return out
}

// wantSameFiles checks that nothing was changed, made or removed.
func wantSameFiles(t testing.TB, dir string, want map[string][]byte) {
	t.Helper()
	got := files(t, dir)
	for name, b := range want {
		if !bytes.Equal(got[name], b) {
			t.Errorf("%s was changed or removed", name)
		}
	}
	for name := range got {
		if _, ok := want[name]; !ok {
			t.Errorf("%s was made", name)
		}
	}
}

// putBack makes dir have just these files.
func putBack(t testing.TB, dir string, saved map[string][]byte) {
	t.Helper()
	for name := range files(t, dir) {
		must(t, os.Remove(filepath.Join(dir, name)))
	}
	for name, b := range saved {
		path := filepath.Join(dir, name)
		must(t, os.MkdirAll(filepath.Dir(path), 0o700))
		must(t, os.WriteFile(path, b, 0o600))
	}
}

func TestFakeConforms(t *testing.T) {
	vaulttest.Run(t, func(*testing.T) vaulttest.Host {
		h := newHardware()
		return vaulttest.Host{Protector: h, Reopen: func() vault.Protector { return h }}
	})
}

func TestVoteRules(t *testing.T) {
	v := newVault(t)
	must(t, v.stage(payments, n11))
	must(t, v.stage(payments, n12))
	roots := v.Stats().Roots
	wantError(t, v.vote(payments, n13), vault.ErrNoShare) // not staged
	wantError(t, v.vote(backups, n11), vault.ErrNoShare)
	wantError(t, v.Vote(t.Context(), payments, n11, output(payments, n12)), vault.ErrNoShare, "with that output")
	if got := v.Stats(); got.Roots != roots || got.Keys != 1 {
		t.Errorf("votes that were refused left something: %+v", got)
	}

	must(t, v.vote(payments, n12))
	if got := v.Stats().Roots; got != roots+1 {
		t.Errorf("%d roots after a vote, want %d", got, roots+1)
	}
	root := v.hw.root()
	must(t, v.vote(payments, n12)) // again
	if !bytes.Equal(root, v.hw.root()) || v.Stats().Roots != roots+1 {
		t.Error("the same vote took another root")
	}
	must(t, v.stage(payments, n13))
	for _, n := range []vault.Number{n11, n13} {
		wantError(t, v.vote(payments, n), nil, "born once", "1.2")
	}
	v.reopen()
	for _, n := range []vault.Number{n11, n13} {
		wantError(t, v.vote(payments, n), nil, "born once")
	}
	must(t, v.vote(payments, n12))

	must(t, v.activate(payments, n12))
	wantError(t, v.vote(payments, n11), nil, "higher")
	must(t, v.stage(payments, n21))
	must(t, v.vote(payments, n21))
	wantError(t, v.vote(payments, n13), nil, "higher") // above the active one, below the vote
	r, _ := v.Record(payments)
	if r.Voted.Number != n21 || r.Active != n12 {
		t.Errorf("%+v", r)
	}
	must(t, v.stage(key("payments", 2), n11)) // another birth
	must(t, v.vote(key("payments", 2), n11))
}

// TestVoteReadsTheDisk: a share that is open in memory and damaged on the disk is
// not voted for.
func TestVoteReadsTheDisk(t *testing.T) {
	v := newVault(t)
	must(t, v.stage(payments, n11))
	must(t, v.stage(payments, n12))
	v.wantLends(payments, n11)
	flip(t, v.ShareFile(payments, n11), -1)
	wantError(t, v.vote(payments, n11), vault.ErrDamaged)
	must(t, os.Remove(v.ShareFile(payments, n11)))
	wantError(t, v.vote(payments, n11), fs.ErrNotExist)
	must(t, v.vote(payments, n12))
}

// TestVoteIsDurableBeforeItReturns kills nothing: what is on the disk when Vote
// returns has the vote, and what was there before is refused.
func TestVoteIsDurableBeforeItReturns(t *testing.T) {
	v := newVault(t)
	must(t, v.stage(payments, n11))
	before := files(t, v.dir)
	must(t, v.vote(payments, n11))
	after := files(t, v.dir)
	v.Close()
	putBack(t, v.dir, before)
	v.Vault = nil
	v.wantOpenError(vault.ErrStale)
	putBack(t, v.dir, after)
	v.reopen()
	if r, _ := v.Record(payments); r.Voted == nil || *r.Voted != (vault.Staged{Number: n11, Output: output(payments, n11)}) {
		t.Errorf("%+v", r)
	}
}

func TestStageRefusals(t *testing.T) {
	v := newVault(t)
	share := secret.Random(32)
	for name, c := range map[string]struct {
		id     vault.KeyID
		n      vault.Number
		share  int
		public int
	}{
		"no share":        {payments, n11, 0, 0},
		"large share":     {payments, n11, vault.MaxShare + 1, 0},
		"large public":    {payments, n11, 32, vault.MaxPublic + 1},
		"no roster":       {payments, number(0, 1), 32, 0},
		"no attempt":      {payments, number(1, 0), 32, 0},
		"no name":         {key("", 1), n11, 32, 0},
		"no incarnation":  {key("payments", 0), n11, 32, 0},
		"name over 4 kiB": {key(strings.Repeat("n", 5000), 1), n11, vault.MaxShare, vault.MaxPublic},
	} {
		if err := v.Stage(t.Context(), vault.Held, c.id, c.n, vault.Output{}, vault.Origin{}, make([]byte, c.public), secret.Random(c.share)); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	if err := v.Stage(t.Context(), vault.Held, payments, n11, vault.Output{}, vault.Origin{}, nil, new(secret.Bytes)); err == nil {
		t.Error("a wiped share was staged")
	}
	if len(v.Keys()) != 0 {
		t.Errorf("what was refused left records: %v", v.Keys())
	}
	must(t, v.Stage(t.Context(), vault.Held, payments, n12, vault.Output{}, vault.Origin{}, make([]byte, vault.MaxPublic), secret.Random(vault.MaxShare)))
	wantError(t, v.Stage(t.Context(), vault.Held, payments, n12, vault.Output{}, vault.Origin{}, nil, share), nil, "already")
	must(t, v.Vote(t.Context(), payments, n12, vault.Output{}))
	must(t, v.activate(payments, n12))
	wantError(t, v.stage(payments, n11), nil, "1.2 is active")
	if share.Len() != 32 {
		t.Error("the caller's share was wiped")
	}
}

func TestStagedLimit(t *testing.T) {
	v := newVault(t)
	for i := range vault.MaxStaged {
		must(t, v.stage(payments, number(1, uint64(i)+1)))
	}
	v.reopen()
	over := number(1, vault.MaxStaged+1)
	wantError(t, v.stage(payments, over), nil, "raise the key's `incarnation`")
	must(t, v.stage(key("payments", 2), n11))
	must(t, v.drop(payments, n12))
	must(t, v.stage(payments, over))
	v.wantLends(payments, n11, over)
	if shares := len(files(t, filepath.Join(v.dir, "shares"))); shares != vault.MaxStaged+1 {
		t.Errorf("%d files, want %d", shares, vault.MaxStaged+1)
	}
}

func TestSee(t *testing.T) {
	v := newVault(t)
	wantError(t, v.see(payments, 0), nil, "no digest")
	must(t, v.see(payments, 1))
	must(t, v.see(payments, 1))
	wantError(t, v.see(payments, 2), nil, "changed")
	must(t, v.stage(payments, n11))
	must(t, v.drop(payments, n11))
	v.reopen()
	wantError(t, v.see(payments, 2), nil, "changed") // to drop all is not to forget
	must(t, v.see(payments, 1))
	must(t, v.see(key("payments", 2), 2))
}

func TestActivate(t *testing.T) {
	v := newVault(t)
	wantError(t, v.activate(payments, n11), vault.ErrNoShare)
	if _, ok := v.Record(payments); ok {
		t.Error("what was refused left a record")
	}
	for _, n := range []vault.Number{n11, n12, n13} {
		must(t, v.stage(payments, n))
	}
	for _, size := range []int{0, vault.MaxCertificate + 1} {
		if err := v.Activate(t.Context(), payments, n11, make([]byte, size)); err == nil {
			t.Errorf("a certificate of %d bytes was taken", size)
		}
	}
	_, err := v.Certificate(payments)
	wantError(t, err, vault.ErrNoShare)
	must(t, v.activate(payments, n12))
	must(t, v.activate(payments, n12))
	wantError(t, v.activate(payments, n11), nil, "1.2 is active")
	wantError(t, v.activate(payments, n21), vault.ErrNoShare)
	must(t, v.activate(payments, n13))
	v.wantLends(payments, n11, n12, n13)
	v.reopen()
	got, err := v.Certificate(payments)
	if err != nil || !bytes.Equal(got, certificate(payments, n13)) {
		t.Errorf("%q, %v", got, err)
	}
	if certs := len(files(t, filepath.Join(v.dir, "certs"))); certs != 1 {
		t.Errorf("%d certificates, want the active one", certs)
	}
}

// TestSharedCertificate: one certificate for two keys is one file, and stays as
// long as one of them needs it.
func TestSharedCertificate(t *testing.T) {
	v := newVault(t)
	for _, id := range []vault.KeyID{payments, backups} {
		must(t, v.stage(id, n11))
		must(t, v.stage(id, n12))
		must(t, v.Activate(t.Context(), id, n11, []byte("one for both")))
	}
	must(t, v.activate(payments, n12))
	must(t, v.drop(payments, n11))
	v.reopen()
	got, err := v.Certificate(backups)
	if err != nil || string(got) != "one for both" {
		t.Errorf("%q, %v", got, err)
	}
}

func TestDropRules(t *testing.T) {
	v := newVault(t)
	root := v.hw.root()
	must(t, v.Drop(t.Context(), nil))
	must(t, v.drop(payments, n11)) // never heard of it
	must(t, v.stage(backups, n11))
	must(t, v.drop(backups, n12))
	if !bytes.Equal(root, v.hw.root()) || len(v.Keys()) != 1 {
		t.Errorf("dropping nothing took a root, or left records: %+v", v.Keys())
	}

	for _, n := range []vault.Number{n11, n12, n13} {
		must(t, v.stage(payments, n))
	}
	must(t, v.vote(payments, n12))
	wantError(t, v.drop(payments, n11, n12), nil, "voted for it")
	v.wantLends(payments, n11, n12, n13) // all or nothing
	must(t, v.drop(payments, n11, n11))  // named twice, and unborn
	v.wantGone(payments, n11)
	must(t, v.activate(payments, n12))
	wantError(t, v.drop(payments, n13, n12), nil, "active one")
	v.wantLends(payments, n12, n13)

	// A vote for an epoch above the active one binds too: its certificate may be
	// elsewhere, with this share needed.
	must(t, v.stage(payments, n21))
	must(t, v.vote(payments, n21))
	wantError(t, v.drop(payments, n21), nil, "voted for it")
	must(t, v.activate(payments, n21))
	must(t, v.drop(payments, n12, n13))
	v.reopen()
	v.wantLends(payments, n21)
	v.wantLends(backups, n11)
	for _, n := range []vault.Number{n11, n12, n13} {
		v.wantGone(payments, n)
	}
}

// TestDropAcrossIncarnations: a vote that came to nothing binds until a later
// incarnation is born, and an earlier one's birth is none.
func TestDropAcrossIncarnations(t *testing.T) {
	v := newVault(t)
	v.born(key("payments", 1), n11)
	must(t, v.stage(key("payments", 2), n11))
	must(t, v.vote(key("payments", 2), n11))
	wantError(t, v.drop(key("payments", 2), n11), nil, "voted for it")
	v.born(key("other", 3), n11)
	wantError(t, v.drop(key("payments", 2), n11), nil, "voted for it")
	v.born(key("payments", 3), n11)
	must(t, v.drop(key("payments", 2), n11))
	wantError(t, v.drop(key("payments", 1), n11), nil, "active one")
}

func TestRecordsAreCopies(t *testing.T) {
	v := newVault(t)
	v.born(payments, n11)
	want, _ := v.Record(payments)
	got := v.Keys()[0]
	got.Voted.Number, got.Staged[0].Number = n21, n21
	again, _ := v.Record(payments)
	if diff := cmp.Diff(want, again); diff != "" {
		t.Errorf("a caller changed the vault's record:\n%s", diff)
	}
}

func TestOneWriter(t *testing.T) {
	v := newVault(t)
	pid := fmt.Sprintf("process %d", os.Getpid())
	_, err := vault.Open(t.Context(), v.dir, host, v.hw)
	wantError(t, err, nil, pid, "in use")
	wantError(t, vault.Create(t.Context(), v.dir, host, v.hw), nil, pid)
	wantError(t, vault.InUse(v.dir), nil, pid)
	must(t, v.stage(payments, n11))
	v.Close()
	must(t, vault.InUse(v.dir))
	must(t, vault.InUse(filepath.Join(v.dir, "none")))
	v.reopen()
	v.wantLends(payments, n11)
}

func TestAnotherHostsName(t *testing.T) {
	v := newVault(t)
	v.Close()
	_, err := vault.Open(t.Context(), v.dir, "web2", v.hw)
	wantError(t, err, nil, `"web1"`, `"web2"`)
	v.reopen()
}

// TestClosed: a vault that was closed writes nothing, as another process may have
// it open, and lends nothing.
func TestClosed(t *testing.T) {
	v := newVault(t)
	v.born(payments, n11)
	must(t, v.stage(payments, n12))
	v.wantLends(payments, n11)
	v.Close()
	v.Close()
	before, root := files(t, v.dir), v.hw.root()
	for name, err := range map[string]error{
		"See":      v.see(backups, 1),
		"Stage":    v.stage(payments, n13),
		"Vote":     v.vote(payments, n12),
		"Activate": v.activate(payments, n12),
		"Drop":     v.drop(payments, n12),
		"Lend":     v.lends(payments, n11),
	} {
		if err == nil {
			t.Errorf("%s went on", name)
		}
	}
	wantSameFiles(t, v.dir, before)
	if !bytes.Equal(root, v.hw.root()) {
		t.Error("the root changed after Close")
	}
	v.reopen()
	v.wantLends(payments, n11, n12)
}

// TestConcurrency lends in 16 goroutines while others write, and closes the vault
// under them.
func TestConcurrency(t *testing.T) {
	v := newVault(t)
	v.born(payments, n11)
	must(t, v.stage(payments, n12))
	var writers, lenders sync.WaitGroup
	done := make(chan struct{})
	lend := func(closed bool) {
		if err := v.lends(payments, n11); err != nil && !closed {
			t.Errorf("the active share: %v", err)
		}
		// May be dropped by now: then it is no such share, and not a damaged one.
		if err := v.lends(payments, n12); err != nil && !closed && !errors.Is(err, vault.ErrNoShare) {
			t.Errorf("a share that is dropped meanwhile: %v", err)
		}
		if _, err := v.Public(payments, n11); err != nil { // resealed meanwhile
			t.Errorf("the active share's public output: %v", err)
		}
	}
	for range 16 {
		lenders.Go(func() {
			for {
				select {
				case <-done:
					return
				default:
					lend(false)
					v.Keys()
					v.Stats()
				}
			}
		})
	}
	for w := range 3 {
		id := key(fmt.Sprint("key", w), 1)
		writers.Go(func() {
			for i := range uint64(4) {
				n := number(i+1, 1)
				for _, err := range []error{v.see(id, 1), v.stage(id, n), v.vote(id, n), v.activate(id, n), v.lends(id, n)} {
					if err != nil {
						t.Errorf("%s %s: %v", id.Name, n, err)
					}
				}
			}
		})
	}
	writers.Go(func() {
		if err := v.drop(payments, n12); err != nil {
			t.Error(err)
		}
	})
	writers.Go(func() {
		for i := range 9 {
			class := []vault.Class{vault.Own, vault.Held}[i%2]
			if err := v.Reseal(t.Context(), map[vault.KeyID]vault.Class{payments: class}); err != nil {
				t.Error(err)
			}
		}
	})
	writers.Wait()
	close(done)
	lenders.Wait()
	for range 4 {
		lenders.Go(func() {
			for range 20 {
				lend(true)
			}
		})
	}
	v.Close()
	lenders.Wait()
	v.reopen()
	v.wantLends(payments, n11)
	if own := v.Own(payments); len(own) != 1 {
		t.Errorf("in the end %v rest under keys of their own, want epoch 1.1", own)
	}
	for w := range 3 {
		v.wantLends(key(fmt.Sprint("key", w), 1), number(1, 1), number(4, 1))
	}
}

// flip changes one byte of a file; -1 is the last.
func flip(t testing.TB, path string, at int) {
	t.Helper()
	b, err := os.ReadFile(path)
	must(t, err)
	if at < 0 {
		at += len(b)
	}
	b[at] ^= 1 << (at % 8)
	must(t, os.WriteFile(path, b, 0o600))
}

// TestSuspend: what is suspended is in the manifest, under a root of its own, through all
// that becomes of the key.
func TestSuspend(t *testing.T) {
	v := newVault(t)
	v.born(payments, n11)
	since := time.Unix(1_800_000_000, 0)
	want := vault.Suspensions{All: since.Add(time.Hour), Keys: map[string]time.Time{"payments": since, "not-here": since}}
	set := func(s vault.Suspensions, roots uint64) {
		t.Helper()
		before := v.Stats().Roots
		must(t, v.Suspend(t.Context(), s))
		if got := v.Stats().Roots - before; got != roots {
			t.Errorf("it took %d roots, want %d", got, roots)
		}
	}
	check := func(want vault.Suspensions) {
		t.Helper()
		for range 2 {
			if diff := cmp.Diff(v.Suspensions(), want); diff != "" {
				t.Errorf("got, want: %s", diff)
			}
			v.reopen()
		}
	}
	older := t.TempDir()
	must(t, os.CopyFS(older, os.DirFS(v.dir)))
	set(want, 1)
	set(want, 0)
	check(want)
	must(t, v.stage(payments, n12))
	must(t, v.Activate(t.Context(), payments, n12, certificate(payments, n12)))
	must(t, v.Drop(t.Context(), []vault.Drop{{Key: payments, Number: n11}}))
	must(t, v.stage(key("payments", 2), n21)) // of a later incarnation
	check(want)
	must(t, v.Retire(t.Context(), payments, n13, certificate(payments, n13)))
	check(want)

	v.Close()
	v.Vault = nil
	now := v.dir
	v.dir = older
	v.wantOpenError(vault.ErrStale)
	v.dir = now
	v.reopen()
	delete(want.Keys, "payments")
	set(want, 1)
	check(want)
	set(vault.Suspensions{}, 1)
	set(vault.Suspensions{}, 0)
	check(vault.Suspensions{Keys: map[string]time.Time{}})
}
