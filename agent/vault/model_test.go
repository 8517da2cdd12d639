package vault_test

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"conseal/agent/vault"
	"conseal/internal/secret"
)

// op is one call of a vault, as a test plans it and a child process does it.
type op struct {
	Kind     string // create, open, see, stage, vote, activate, retire, drop, reseal, await, revoke, delete, receipt
	Key      vault.KeyID
	Class    vault.Class // of stage and reseal
	Number   vault.Number
	Also     vault.Number // dropped with it, unless zero
	Entry    byte
	Instance int // tells apart what is staged as one number, one after the other
}

func (o op) String() string {
	return fmt.Sprintf("%s %s/%d %s", o.Kind, o.Key.Name, o.Key.Incarnation, o.Number)
}

// instance is the share that an op stages, and its output too.
func instance(id vault.KeyID, n vault.Number, i int) [32]byte {
	return sha256.Sum256(fmt.Appendf(nil, "%s %d %s %d", id.Name, id.Incarnation, n, i))
}

// do returns what the vault returns.
func (o op) do(t testing.TB, v *vault.Vault) error {
	ctx, share := t.Context(), instance(o.Key, o.Number, o.Instance)
	switch o.Kind {
	case "see":
		return v.See(ctx, o.Key, [32]byte{o.Entry})
	case "stage":
		return v.Stage(ctx, o.Class, o.Key, o.Number, vault.Output(share), vault.Origin{}, share[:8], secret.Copy(share[:]))
	case "vote":
		return v.Vote(ctx, o.Key, o.Number, outputOf(v, o.Key, o.Number))
	case "activate":
		return v.Activate(ctx, o.Key, o.Number, certificate(o.Key, o.Number))
	case "retire":
		return v.Retire(ctx, o.Key, o.Number, certificate(o.Key, o.Number))
	case "await":
		return v.AwaitDeletion(ctx, o.Key, time.Unix(int64(o.Entry), 0))
	case "revoke":
		return v.AwaitDeletion(ctx, o.Key, time.Time{})
	case "delete":
		return v.Delete(ctx, o.Key, [32]byte{o.Entry})
	case "receipt":
		return v.KeepReceipt(ctx, o.Key, []byte{o.Entry})
	case "drop":
		drops := []vault.Drop{{Key: o.Key, Number: o.Number}}
		if o.Also != (vault.Number{}) {
			drops = append(drops, vault.Drop{Key: o.Key, Number: o.Also})
		}
		return v.Drop(ctx, drops)
	case "reseal":
		return v.Reseal(ctx, map[vault.KeyID]vault.Class{o.Key: o.Class})
	}
	return fmt.Errorf("the test knows no %q", o.Kind)
}

// outputOf is the output of what is staged; of what this host voted for, if that
// is gone.
func outputOf(v *vault.Vault, id vault.KeyID, n vault.Number) vault.Output {
	r, _ := v.Record(id)
	for _, s := range r.Staged {
		if s.Number == n {
			return s.Output
		}
	}
	if r.Voted != nil && r.Voted.Number == n {
		return r.Voted.Output
	}
	return vault.Output{}
}

// model is what a vault should have; a value, copied by apply.
type model map[vault.KeyID]rests

// rests is a record, and which of its shares rest under keys of their own.
type rests struct {
	vault.Record
	Own       []vault.Number
	Tombstone byte   // first byte of the public key's digest, 0: there is none
	Receipts  string // sorted
}

// own filters the numbers of what is staged and rests so.
func (r rests) own(is func(vault.Number) bool) (own []vault.Number) {
	for _, s := range r.Staged {
		if is(s.Number) {
			own = append(own, s.Number)
		}
	}
	return own
}

// apply returns what is there after an op and whether the op is in order, by the
// rules as docs and epochs have them.
func (m model) apply(o op) (model, bool) {
	r := m[o.Key]
	r.Key, r.Staged = o.Key, slices.Clone(r.Staged)
	staged := slices.IndexFunc(r.Staged, func(s vault.Staged) bool { return s.Number == o.Number })
	ok, changed := false, true
	if m.deleted(o.Key.Name) {
		return m.applyDeleted(o)
	}
	switch o.Kind {
	case "await":
		ok, changed = true, r.Deleting.IsZero()
		r.Deleting = time.Unix(int64(o.Entry), 0)
	case "revoke":
		ok, changed = true, !r.Deleting.IsZero()
		r.Deleting = time.Time{}
	case "delete":
		next := maps.Clone(m)
		next[o.Key] = r
		for id, r := range next {
			if id.Name == o.Key.Name {
				r.Staged, r.Own, r.Deleting = nil, nil, time.Time{}
				if id == o.Key {
					r.Tombstone = o.Entry
				}
				next[id] = r
			}
		}
		return next, true
	case "receipt":
		ok, changed = true, !strings.Contains(r.Receipts, string(rune(o.Entry)))
		r = r.receive(o)
	case "create", "open":
		return m, true
	case "see":
		ok = r.Entry == [32]byte{} || r.Entry == [32]byte{o.Entry}
		r.Entry = [32]byte{o.Entry}
	case "stage":
		ok = staged < 0 && o.Number.Compare(r.Active) > 0
		r.Staged = append(r.Staged, vault.Staged{Number: o.Number, Output: vault.Output(instance(o.Key, o.Number, o.Instance))})
		r.Own = r.own(func(n vault.Number) bool {
			return n == o.Number && o.Class == vault.Own || n != o.Number && slices.Contains(r.Own, n)
		})
	case "reseal":
		own := r.own(func(vault.Number) bool { return o.Class == vault.Own })
		ok, changed = true, !slices.Equal(own, r.Own)
		r.Own = own
	case "vote":
		if r.Voted != nil && r.Voted.Number == o.Number && (staged < 0 || r.Staged[staged] == *r.Voted) {
			return m, true
		}
		ok = staged >= 0 && o.Number.Compare(r.Active) > 0 &&
			(r.Voted == nil || r.Active != vault.Number{} && o.Number.Compare(r.Voted.Number) > 0)
		if ok {
			vote := r.Staged[staged]
			r.Voted = &vote
		}
	case "activate":
		ok = staged >= 0 && o.Number.Compare(r.Active) >= 0
		r.Active = o.Number
	case "retire":
		above := slices.ContainsFunc(r.Staged, func(s vault.Staged) bool { return s.Number.Compare(o.Number) >= 0 })
		if o.Number.Compare(r.Active) < 0 || o.Number == r.Active && len(r.Staged) == 0 {
			return m, true
		}
		ok, r.Active, r.Staged, r.Own = !above, o.Number, nil, nil
	case "drop":
		r.Staged, ok, changed = m.drop(r.Record, o)
		r.Own = r.own(func(n vault.Number) bool { return slices.Contains(r.Own, n) })
	}
	if !ok || !changed {
		return m, ok
	}
	next := maps.Clone(m)
	next[o.Key] = r
	return next, true
}

// receive adds a receipt.
func (r rests) receive(o op) rests {
	if !strings.Contains(r.Receipts, string(rune(o.Entry))) {
		all := []byte(r.Receipts + string(rune(o.Entry)))
		slices.Sort(all)
		r.Receipts = string(all)
	}
	return r
}

// deleted tells whether a name has a tombstone.
func (m model) deleted(name string) bool {
	for id, r := range m {
		if id.Name == name && r.Tombstone != 0 {
			return true
		}
	}
	return false
}

// applyDeleted is apply for a name that has one: nothing is added any more but receipts.
func (m model) applyDeleted(o op) (model, bool) {
	switch o.Kind {
	case "create", "open", "drop", "delete":
		return m, true
	case "reseal":
		return m, true
	case "receipt":
		next := maps.Clone(m)
		r := m[o.Key]
		r.Key = o.Key
		next[o.Key] = r.receive(o)
		return next, true
	}
	return m, false
}

func (m model) drop(r vault.Record, o op) (left []vault.Staged, ok, changed bool) {
	born := false // later than what this host voted for
	for id, other := range m {
		born = born || id.Name == o.Key.Name && other.Active != (vault.Number{}) &&
			(id.Incarnation > o.Key.Incarnation || id == o.Key && r.Voted != nil && other.Active.Compare(r.Voted.Number) > 0)
	}
	for _, s := range r.Staged {
		switch {
		case s.Number != o.Number && s.Number != o.Also:
			left = append(left, s)
		case s.Number == r.Active, r.Voted != nil && s.Number == r.Voted.Number && !born:
			return nil, false, false
		}
	}
	return left, true, len(left) < len(r.Staged)
}

// erased are the outputs of what is in m and not in next.
func (m model) erased(next model) (out []vault.Output) {
	for id, r := range m {
		for _, s := range r.Staged {
			if !slices.Contains(next[id].Staged, s) {
				out = append(out, s.Output)
			}
		}
	}
	return out
}

// diff compares a vault with the model, and opens every share.
func (m model) diff(v *vault.Vault) string {
	got := model{}
	for _, r := range v.Keys() {
		if (r.Active != vault.Number{}) != (time.Since(r.Since) < time.Hour) {
			return fmt.Sprintf("epoch %s is active since %s", r.Active, r.Since)
		}
		r.Since = time.Time{}
		entry := rests{Record: r, Own: v.Own(r.Key)}
		if t, ok := v.Deleted(r.Key.Name); ok && t.Key == r.Key {
			entry.Tombstone = t.Public[0]
			if time.Since(t.At) > time.Hour || t.RootsAfter != t.RootsBefore+1 || t.RootsAfter > v.Stats().Roots {
				return fmt.Sprintf("tombstone %v", t)
			}
		}
		receipts, err := v.ReceiptsOf(r.Key)
		if err != nil {
			return err.Error()
		}
		entry.Receipts = receipts
		got[r.Key] = entry
		for _, s := range r.Staged {
			err := v.Lend(context.Background(), r.Key, s.Number, func(b []byte) error {
				if [32]byte(b) != [32]byte(s.Output) {
					return errors.New("another share")
				}
				return nil
			})
			if err != nil {
				return err.Error()
			}
		}
		if r.Active != (vault.Number{}) {
			if c, err := v.Certificate(r.Key); err != nil || string(c) != string(certificate(r.Key, r.Active)) {
				return fmt.Sprintf("certificate %q: %v", c, err)
			}
		}
	}
	return cmp.Diff(m, got)
}

// wantTidy checks that there is no file but what the vault needs.
func wantTidy(t fataler, dir string, m model) {
	shares, certs, receipts := 0, map[string]bool{}, map[rune]bool{}
	for _, r := range m {
		shares += len(r.Staged)
		for _, receipt := range r.Receipts {
			receipts[receipt] = true
		}
		if r.Active != (vault.Number{}) {
			certs[string(certificate(r.Key, r.Active))] = true
		}
	}
	count := map[string]int{}
	_ = filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
		if err == nil && !d.IsDir() {
			count[filepath.Ext(path)]++
		}
		return err
	})
	if count[".share"] != shares || count[".cert"] != len(certs) || count[".receipt"] != len(receipts) || count[".new"] != 0 {
		t.Fatalf("%v files, want %d shares, %d certificates and %d receipts", count, shares, len(certs), len(receipts))
	}
	if _, err := os.Stat(filepath.Join(dir, "unfinished")); err == nil {
		t.Fatalf("it still has the mark of an unfinished vault")
	}
}

// fataler is a test of testing or of rapid.
type fataler interface {
	Helper()
	Fatalf(format string, args ...any)
}

func drawOp(t *rapid.T, i int) op {
	kinds := []string{"see", "stage", "stage", "stage", "vote", "activate", "drop", "drop", "retire", "reseal", "reseal", "open", "await", "revoke", "receipt", "delete"}
	numbers := []vault.Number{n11, n12, n13, n21}
	return op{
		Kind:     rapid.SampledFrom(kinds).Draw(t, "kind"),
		Key:      rapid.SampledFrom([]vault.KeyID{payments, key("payments", 2), backups}).Draw(t, "key"),
		Number:   rapid.SampledFrom(numbers).Draw(t, "number"),
		Also:     rapid.SampledFrom(append(numbers, vault.Number{})).Draw(t, "also"),
		Class:    rapid.SampledFrom([]vault.Class{vault.Held, vault.Own}).Draw(t, "class"),
		Entry:    byte(rapid.IntRange(1, 2).Draw(t, "entry")),
		Instance: i,
	}
}

// attack is a vault, its model, and every state in which its folder ever was.
type attack struct {
	*testVault
	rt     *rapid.T
	m      model
	erased map[vault.Output]bool
	copies []map[string][]byte
}

// TestModel does random operations on hardware that fails at times, and puts back
// every older copy of the folder in the end.
func TestModel(t *testing.T) {
	base := newVault(t)
	empty, root := files(t, base.dir), base.hw.root()
	rapid.Check(t, func(rt *rapid.T) {
		base.Close()
		base.Vault = nil
		base.hw.onSetRoot, base.hw.onRoot = nil, nil
		base.hw.setRootTo(root)
		putBack(t, base.dir, empty)
		base.reopen()
		a := &attack{testVault: base, rt: rt, m: model{}, erased: map[vault.Output]bool{}}
		for i := range rapid.IntRange(1, 25).Draw(rt, "operations") {
			a.step(drawOp(rt, i))
			a.copies = append(a.copies, files(t, a.dir))
		}
		a.rollBack()
	})
}

// step does an op, as the hardware lets it.
func (a *attack) step(o op) {
	if o.Kind == "open" {
		a.reopen()
		wantTidy(a.rt, a.dir, a.m)
	} else {
		a.call(o, rapid.SampledFrom([]string{"", "", "", "took", "did not", "took, unsure", "did not, unsure"}).Draw(a.rt, "hardware"))
	}
	if d := a.m.diff(a.Vault); d != "" {
		a.rt.Fatalf("after %s: %s", o, d)
	}
}

func (a *attack) call(o op, fault string) {
	asked := false
	if fault != "" {
		a.hw.onSetRoot = func(take func()) error {
			asked = true
			if strings.HasPrefix(fault, "took") {
				take()
			}
			return errHardware
		}
	}
	if strings.HasSuffix(fault, "unsure") {
		a.hw.onRoot = func() error { return errHardware }
	}
	next, inOrder := a.m.apply(o)
	err := o.do(a.t, a.Vault)
	a.hw.onSetRoot, a.hw.onRoot = nil, nil
	unsure := asked && strings.HasSuffix(fault, "unsure")
	happened := inOrder && !(asked && strings.HasPrefix(fault, "did not"))
	if wantOK := happened && !unsure; (err == nil) != wantOK || unsure != errors.Is(err, vault.ErrUnsure) {
		a.rt.Fatalf("%s, hardware %q: %v, want success: %v", o, fault, err, wantOK)
	}
	if unsure {
		if d := a.m.diff(a.Vault); d != "" {
			a.rt.Fatalf("while it is unsure: %s", d)
		}
		_ = a.Vote(a.t.Context(), key("none", 1), n11, vault.Output{}) // settles it
	}
	if happened {
		for _, output := range a.m.erased(next) {
			a.erased[output] = true
		}
		a.m = next
	}
}

// rollBack puts every copy on the present hardware. One of the present root opens,
// and may have forgotten what was added under it: but no vote, and it has nothing
// that was erased.
func (a *attack) rollBack() {
	present := files(a.t, a.dir)
	a.Close()
	a.Vault = nil
	for i, c := range a.copies {
		putBack(a.t, a.dir, c)
		v, err := vault.Open(a.t.Context(), a.dir, host, a.hw)
		if err != nil {
			if !errors.Is(err, vault.ErrStale) {
				a.rt.Fatalf("copy %d: %v", i, err)
			}
			continue
		}
		a.wantNothingBack(v, i)
		v.Close()
	}
	putBack(a.t, a.dir, present)
	a.reopen()
	if d := a.m.diff(a.Vault); d != "" {
		a.rt.Fatalf("after putting the present folder back: %s", d)
	}
}

func (a *attack) wantNothingBack(v *vault.Vault, i int) {
	for id, r := range a.m {
		if got, _ := v.Record(id); r.Voted != nil && (got.Voted == nil || *got.Voted != *r.Voted) {
			a.rt.Fatalf("copy %d forgot the vote for %s %s", i, id.Name, r.Voted.Number)
		}
		if got, _ := v.Record(id); !got.Deleting.IsZero() && !got.Deleting.Equal(r.Deleting) {
			a.rt.Fatalf("copy %d has a deletion of %s that was revoked", i, id.Name)
		}
	}
	for id := range a.m {
		if _, ok := v.Deleted(id.Name); ok != a.m.deleted(id.Name) {
			a.rt.Fatalf("copy %d: %s is deleted: %v", i, id.Name, ok)
		}
	}
	for _, r := range v.Keys() {
		for _, s := range r.Staged {
			if a.erased[s.Output] {
				a.rt.Fatalf("copy %d has %s %s, which was erased", i, r.Key.Name, s.Number)
			}
		}
	}
}
