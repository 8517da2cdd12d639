// Package vault keeps a host's shares on disk, so that only this host's
// hardware, in a state that its policy allows, opens them, and so that what was
// erased stays erased.
//
// [Create] makes a vault once, [Open] opens it; [Vault.Stage], [Vault.Vote],
// [Vault.Activate], [Vault.Lend] and [Vault.Drop] are a share's life, and
// [Vault.Delete] ends that of a key.
//
// The manifest holds an erasure key for each share and is encrypted under the
// root, the one erasable secret of the [Protector]. A share is encrypted under
// HKDF(sealed key, erasure key, header), where the hardware seals that key: one for
// all shares of class [Held], which an open vault keeps, or one for each of class
// [Own], which it does not. [Vault.Reseal] moves a share to the other class.
// What must not be forgotten or come back is written under a new root, and
// [Protector.SetRoot] is the commit: older copies of the folder are noise from
// then on. What is only added is written under the same root.
package vault

import (
	"cmp"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"conseal/internal/disk"
	"conseal/internal/failpoint"
	"conseal/internal/secret"
)

// Limits of what a vault takes.
const (
	MaxShare       = 64 << 10 // bytes
	MaxPublic      = 64 << 10
	MaxCertificate = 256 << 10
	MaxStaged      = 64 // shares of one key that have no certificate
)

// Errors that callers tell apart.
var (
	// ErrExists: Create found a vault that opens.
	ErrExists = errors.New("there is a vault already")
	// ErrNotProvisioned: there is no vault and none was ever made with this hardware.
	ErrNotProvisioned = errors.New("there is no vault yet: run `conseald init`")
	// ErrNoRoot: there is a vault, but the hardware says that it never had a root.
	ErrNoRoot = errors.New("the hardware has no root although there is a vault: it was cleared or replaced, and this host's shares are lost; have them recovered by the others")
	// ErrStale: the hardware's root opens no manifest of this folder.
	ErrStale = errors.New("the state folder is not the one that this host's hardware committed to last: it is an older copy, another host's, or its manifest was removed; put the present folder back, or have this host's shares recovered by the others")
	// ErrDamaged: a file is gone, or does not have the content that was written.
	ErrDamaged = errors.New("damaged")
	// ErrUnsure: the hardware did not say whether it took a new root; nothing is written until it does.
	ErrUnsure = errors.New("the hardware did not say which root it has; nothing is written until it answers")
	// ErrNoShare: the vault has no such share.
	ErrNoShare = errors.New("no such share")
	// ErrDeleted: a key of that name was deleted, and the name is never used again.
	ErrDeleted = errors.New("a key of this name was deleted, and the name is never used again")
)

// KeyID names a key: a name is used again only with a higher incarnation.
type KeyID struct {
	Name        string
	Incarnation uint64
}

// Number orders the epochs of a key: the version of the roster that asked for
// it, then the attempt. Attempts start at 1; the zero Number is none.
type Number struct{ Roster, Attempt uint64 }

// Compare is negative if n is before o, zero if they are the same.
func (n Number) Compare(o Number) int {
	return cmp.Or(cmp.Compare(n.Roster, o.Roster), cmp.Compare(n.Attempt, o.Attempt))
}

func (n Number) String() string { return fmt.Sprintf("%d.%d", n.Roster, n.Attempt) }

// Output is the digest of all public output of an epoch.
type Output [32]byte

// Staged is a share that rests in the vault.
type Staged struct {
	Number Number
	Output Output
}

// Origin is what a share was made from and for.
type Origin struct {
	Parent [32]byte // certificate of the epoch that it was made from; zero at birth
	Entry  [32]byte // digest of the roster's entry that the hosts of the session agreed on
}

// Record is what the vault has of a key; a copy, without secrets.
type Record struct {
	Key    KeyID
	Entry  [32]byte // digest of the roster's entry, as first seen with the mark to generate; zero if never
	Voted  *Staged  // what this host signed, or is about to sign, that it staged
	Staged []Staged // every share that it holds, the active one too
	Active Number   // the highest epoch of which the host has a certificate; zero if none

	Since    time.Time // when this host took that up, to the second
	Deleting time.Time // since when its deletion waits; zero: it does not
}

// Holds tells whether the host has the share of epoch n.
func (r *Record) Holds(n Number) bool {
	return slices.ContainsFunc(r.Staged, func(s Staged) bool { return s.Number == n })
}

// Highest is the highest epoch that the host has, voted for or staged.
func (r *Record) Highest() Number {
	highest := r.Active
	if r.Voted != nil && r.Voted.Number.Compare(highest) > 0 {
		highest = r.Voted.Number
	}
	for _, s := range r.Staged {
		if s.Number.Compare(highest) > 0 {
			highest = s.Number
		}
	}
	return highest
}

// Drop names a share to erase.
type Drop struct {
	Key    KeyID
	Number Number
}

// Stats are figures for operators.
type Stats struct {
	Keys  int
	Roots uint64 // taken in the vault's life: NV memory endures some 100,000 writes
}

// Vault is an open vault. Its methods may be called by several goroutines.
type Vault struct {
	dir       string
	host      string
	protector Protector
	lock      *os.File
	class     *secret.Bytes // key of the class [Held], as long as the vault is open

	now atomic.Pointer[manifest] // what the current slot says; never changed, only replaced

	writing sync.Mutex    // held by the one writer; guards what follows
	root    *secret.Bytes // the hardware's, as far as is known
	slot    int           // the slot that root opens
	unsure  *pending      // a root that the hardware may or may not have taken

	opened struct {
		sync.Mutex
		shares map[fileName]*secret.Bytes // opened shares, by file
	}
	closed  bool         // changed while writing and opened are held
	erasing sync.RWMutex // held for reading while an erasure key is in use
}

// pending is a change whose commit is not known to have happened.
type pending struct {
	m      *manifest
	root   *secret.Bytes
	slot   int
	erased []share // of the present manifest and not of m
}

// classID binds the class key to its purpose and host.
func classID(host string) string { return "class/held/" + host }

// Open opens the vault in dir. The error is [ErrNotProvisioned], [ErrStale],
// [ErrDamaged] or what the hardware says.
func Open(ctx context.Context, dir, host string, p Protector) (*Vault, error) {
	v, err := newVault(dir, host, p)
	if errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("vault %s: %w", dir, ErrNotProvisioned)
	}
	if err != nil {
		return nil, err
	}
	if err := v.open(ctx); err != nil {
		v.Close()
		return nil, fmt.Errorf("opening the vault %s: %w", dir, err)
	}
	return v, nil
}

// newVault locks the folder.
func newVault(dir, host string, p Protector) (*Vault, error) {
	lock, err := lockFolder(dir)
	if err != nil {
		return nil, err
	}
	v := &Vault{dir: dir, host: host, protector: p, lock: lock}
	v.opened.shares = map[fileName]*secret.Bytes{}
	return v, nil
}

func (v *Vault) open(ctx context.Context) error {
	root, err := v.protector.Root(ctx)
	var none NoRoot
	if errors.As(err, &none) && none.NoRoot() {
		if v.unfinished() {
			return ErrNotProvisioned
		}
		return fmt.Errorf("%w: %w", ErrNoRoot, err)
	}
	if err != nil {
		return fmt.Errorf("reading the root: %w", err)
	}
	v.root = root
	m, slot, err := v.readSlots(root)
	if err != nil {
		return err
	}
	if m.host != v.host {
		return fmt.Errorf("it is the vault of host %q, not of %q", m.host, v.host)
	}
	blob, err := readFile(filepath.Join(v.dir, classFile), MaxShare)
	if err != nil {
		return err
	}
	if v.class, err = v.protector.Open(ctx, classID(v.host), blob); err != nil {
		return fmt.Errorf("opening %s: %w", classFile, err)
	}
	v.slot = slot
	v.now.Store(m)
	if err := os.Remove(v.markPath()); err != nil && !errors.Is(err, os.ErrNotExist) { // Create was cut off after its commit
		return err
	}
	return v.sweep(m)
}

// Create makes an empty vault in dir. It returns [ErrExists] if there is one that
// opens; what a crash of an earlier Create left is made anew.
func Create(ctx context.Context, dir, host string, p Protector) error {
	for _, folder := range []string{sharesFolder, certsFolder} {
		if err := os.MkdirAll(filepath.Join(dir, folder), 0o700); err != nil {
			return fmt.Errorf("making the vault: %w", err)
		}
	}
	if err := errors.Join(disk.Sync(dir), disk.Sync(filepath.Dir(dir))); err != nil {
		return fmt.Errorf("making the vault: %w", err)
	}
	v, err := newVault(dir, host, p)
	if err != nil {
		return err
	}
	defer v.Close()
	switch err := v.open(ctx); {
	case err == nil:
		return ErrExists
	case !errors.Is(err, ErrNotProvisioned):
		return fmt.Errorf("opening the vault %s: %w", dir, err)
	}
	if err := v.create(ctx); err != nil {
		return fmt.Errorf("making the vault %s: %w", dir, err)
	}
	return nil
}

// create commits by the first root. Until then the hardware has none, and Create
// starts again.
func (v *Vault) create(ctx context.Context) error {
	if err := writeFile(v.markPath(), []byte("conseal init did not finish\n"), "vault/mark"); err != nil {
		return err
	}
	class, blob, err := v.protector.Seal(ctx, classID(v.host))
	if err != nil {
		return fmt.Errorf("sealing a key: %w", err)
	}
	defer class.Wipe()
	if err := writeFile(filepath.Join(v.dir, classFile), blob, "vault/class"); err != nil {
		return err
	}
	v.slot = 1 // so that the first is 0
	if err := v.commit(ctx, &manifest{host: v.host, keys: map[KeyID]*record{}}, true, nil); err != nil {
		return err
	}
	return os.Remove(v.markPath())
}

// markPath is a file that is there from the start of Create until the first root.
func (v *Vault) markPath() string { return filepath.Join(v.dir, "unfinished") }

// unfinished tells whether a hardware without a root is no loss: Create did not
// get to it, or not even to the first manifest.
func (v *Vault) unfinished() bool {
	if _, err := os.Stat(v.markPath()); err == nil {
		return true
	}
	for slot := range slots {
		if _, err := os.Lstat(v.slotPath(slot)); !errors.Is(err, os.ErrNotExist) {
			return false // it is there, or the disk does not say
		}
	}
	return true
}

// Close wipes what the vault has opened and lets go of the folder.
func (v *Vault) Close() {
	v.writing.Lock()
	defer v.writing.Unlock()
	v.opened.Lock()
	defer v.opened.Unlock()
	v.closed = true
	for file, s := range v.opened.shares {
		s.Wipe()
		delete(v.opened.shares, file)
	}
	v.root.Wipe()
	v.class.Wipe()
	if v.unsure != nil {
		v.unsure.root.Wipe()
	}
	v.lock.Close()
}

// Keys returns every key's record, sorted.
func (v *Vault) Keys() []Record {
	m := v.now.Load()
	var out []Record
	for _, id := range m.sorted() {
		out = append(out, m.keys[id].export(id))
	}
	return out
}

// Record returns what the vault has of a key.
func (v *Vault) Record(id KeyID) (Record, bool) {
	r := v.now.Load().keys[id]
	if r == nil {
		return Record{Key: id}, false
	}
	return r.export(id), true
}

// Stats returns figures for operators.
func (v *Vault) Stats() Stats {
	m := v.now.Load()
	return Stats{Keys: len(m.keys), Roots: m.roots}
}

// See notes for which entry of the roster a key is to be generated. The first
// that is seen counts; another is an error.
func (v *Vault) See(ctx context.Context, id KeyID, entry [32]byte) error {
	if entry == ([32]byte{}) {
		return fmt.Errorf("key %q: no digest of its entry", id.Name)
	}
	return v.change(ctx, id, false, func(r *record) error {
		switch r.entry {
		case entry:
			return errNoChange
		case [32]byte{}:
			r.entry = entry
			return nil
		}
		return errors.New("its entry in the roster changed since it was first seen")
	})
}

// Stage stores a new share beside all others: written, synced, read back,
// decrypted and compared before it counts. public is the public output that
// output is the digest of; made is what the session was about. The caller keeps share.
func (v *Vault) Stage(ctx context.Context, class Class, id KeyID, n Number, output Output, made Origin, public []byte, share *secret.Bytes) error {
	switch {
	case share.Len() == 0 || share.Len() > MaxShare || len(public) > MaxPublic:
		return fmt.Errorf("staging epoch %s of key %q: a share of %d and public output of %d bytes are outside the limits", n, id.Name, share.Len(), len(public))
	case n.Roster == 0 || n.Attempt == 0 || id.Name == "" || id.Incarnation == 0:
		return fmt.Errorf("staging epoch %s of key %q, incarnation %d: numbers start at 1", n, id.Name, id.Incarnation)
	}
	return v.change(ctx, id, false, func(r *record) error {
		switch {
		case r.share(n) != nil:
			return fmt.Errorf("staging epoch %s: it is there already", n)
		case n.Compare(r.active) <= 0:
			return fmt.Errorf("staging epoch %s: %s is active", n, r.active)
		case len(r.shares) >= MaxStaged:
			return fmt.Errorf("staging epoch %s: %d shares are staged already: raise the key's `incarnation` in the roster", n, MaxStaged)
		}
		s, err := v.writeShare(ctx, class, id, n, output, public, share)
		if err != nil {
			return fmt.Errorf("staging epoch %s: %w", n, err)
		}
		failpoint.Hit("vault/stage/file")
		s.made = made
		r.shares = append(r.shares, *s)
		return nil
	})
}

// Vote makes durable, before anybody hears of it, that this host says it has
// staged n with that output. It refuses unless the share is there and opens, and
// n is above all that the host voted for or activated; for a birth it votes once. The vote takes a new root, so that no older disk forgets it.
// Voting the same again is no error.
func (v *Vault) Vote(ctx context.Context, id KeyID, n Number, output Output) error {
	vote := Staged{n, output}
	return v.change(ctx, id, true, func(r *record) error {
		s := r.share(n)
		switch {
		case r.voted != nil && *r.voted == vote:
			return errNoChange
		case s == nil || s.output != output:
			return fmt.Errorf("voting for epoch %s: %w with that output", n, ErrNoShare)
		case r.voted != nil && r.active == (Number{}) && s.made.Parent == [32]byte{}:
			return fmt.Errorf("voting for epoch %s: this host voted for %s, and a key is born once", n, r.voted.Number)
		case r.voted != nil && n.Compare(r.voted.Number) <= 0 || n.Compare(r.active) <= 0:
			return fmt.Errorf("voting for epoch %s: a higher one has this host's vote", n)
		}
		plain, err := v.readShare(ctx, id, s) // from the disk, whatever is opened in memory
		if err != nil {
			return fmt.Errorf("voting for epoch %s: %w", n, err)
		}
		plain.Wipe()
		r.voted = &vote
		return nil
	})
}

// Activate makes a staged epoch the active one. The caller has verified the
// certificate. Shares of other epochs stay until [Vault.Drop].
func (v *Vault) Activate(ctx context.Context, id KeyID, n Number, certificate []byte) error {
	if len(certificate) == 0 || len(certificate) > MaxCertificate {
		return fmt.Errorf("activating epoch %s of key %q: a certificate of %d bytes", n, id.Name, len(certificate))
	}
	return v.change(ctx, id, false, func(r *record) error {
		if r.share(n) == nil {
			return fmt.Errorf("activating epoch %s: %w", n, ErrNoShare)
		}
		if n.Compare(r.active) < 0 {
			return fmt.Errorf("activating epoch %s: %s is active", n, r.active)
		}
		digest, err := v.writeCertificate(certificate)
		if err != nil {
			return fmt.Errorf("activating epoch %s: %w", n, err)
		}
		failpoint.Hit("vault/activate/certificate")
		r.active, r.certificate, r.since = n, digest, uint64(time.Now().Unix())
		return nil
	})
}

// Retire notes that an epoch is active of which this host is no holder, and erases every
// share of the key, as [Vault.Drop] does. The caller has verified the certificate, and
// that a quorum of the epoch's holders has taken it up.
func (v *Vault) Retire(ctx context.Context, id KeyID, n Number, certificate []byte) error {
	if len(certificate) == 0 || len(certificate) > MaxCertificate {
		return fmt.Errorf("retiring from key %q at epoch %s: a certificate of %d bytes", id.Name, n, len(certificate))
	}
	v.writing.Lock()
	defer v.writing.Unlock()
	if err := v.settle(ctx); err != nil {
		return err
	}
	next := v.now.Load().clone()
	if _, deleted := next.tombstone(id.Name); deleted {
		return fmt.Errorf("retiring from key %q at epoch %s: %w", id.Name, n, ErrDeleted)
	}
	r := next.edit(id)
	if n.Compare(r.active) < 0 || n == r.active && len(r.shares) == 0 {
		return nil
	}
	for _, s := range r.shares {
		if s.number.Compare(n) >= 0 {
			return fmt.Errorf("retiring from key %q at epoch %s: it holds a share of %s", id.Name, n, s.number)
		}
	}
	digest, err := v.writeCertificate(certificate)
	if err != nil {
		return fmt.Errorf("retiring from key %q at epoch %s: %w", id.Name, n, err)
	}
	erased := r.shares
	r.active, r.certificate, r.since, r.shares = n, digest, uint64(time.Now().Unix()), nil
	if err := v.commit(ctx, next, true, erased); err != nil {
		return fmt.Errorf("retiring from key %q at epoch %s: %w", id.Name, n, err)
	}
	return nil
}

// Suspensions is with which keys a host signs nothing, and since when, to the second.
type Suspensions struct {
	All  time.Time            // with every key, also those to come; zero: not so
	Keys map[string]time.Time // by name: a name is suspended in every incarnation
}

// Suspensions returns what the manifest has.
func (v *Vault) Suspensions() Suspensions {
	m := v.now.Load()
	out := Suspensions{All: moment(m.suspended), Keys: map[string]time.Time{}}
	for name, since := range m.suspensions() {
		out.Keys[name] = moment(since)
	}
	return out
}

// Suspend makes the manifest have these suspensions and no others. What changes takes
// one new root, so that no older copy of the folder lifts a suspension.
func (v *Vault) Suspend(ctx context.Context, s Suspensions) error {
	v.writing.Lock()
	defer v.writing.Unlock()
	if err := v.settle(ctx); err != nil {
		return err
	}
	next := v.now.Load().clone()
	old := next.suspensions()
	changed := next.suspended != seconds(s.All)
	next.suspended = seconds(s.All)
	for name, since := range s.Keys {
		if old[name] != seconds(since) {
			next.suspend(name, seconds(since))
			changed = true
		}
	}
	for name := range old {
		if _, stays := s.Keys[name]; !stays {
			next.suspend(name, 0)
			changed = true
		}
	}
	if !changed {
		return nil
	}
	if err := v.commit(ctx, next, true, nil); err != nil {
		return fmt.Errorf("entering which keys are suspended: %w", err)
	}
	return nil
}

// Origin tells what a share was made from and for.
func (v *Vault) Origin(id KeyID, n Number) (made Origin, ok bool) {
	s := v.find(id, n)
	if s == nil {
		return made, false
	}
	return s.made, true
}

// Drop erases shares for good: once it returns nil, no copy of the folder, older
// or not, opens them on this host's hardware. It refuses the active share, and one
// that this host voted for until a later one of the key's name is active: its
// certificate may be elsewhere. Shares that are not there are passed over.
func (v *Vault) Drop(ctx context.Context, drops []Drop) error {
	if len(drops) == 0 {
		return nil
	}
	v.writing.Lock()
	defer v.writing.Unlock()
	if err := v.settle(ctx); err != nil {
		return err
	}
	next := v.now.Load().clone()
	var erased []share
	for _, d := range drops {
		if next.keys[d.Key] == nil || next.keys[d.Key].share(d.Number) == nil {
			continue
		}
		r := next.edit(d.Key)
		switch {
		case r.active == d.Number:
			return fmt.Errorf("dropping epoch %s of key %q: it is the active one", d.Number, d.Key.Name)
		case r.voted != nil && r.voted.Number == d.Number && !next.supersedes(d):
			return fmt.Errorf("dropping epoch %s of key %q: this host voted for it, and no later one is active", d.Number, d.Key.Name)
		}
		erased = append(erased, *r.share(d.Number))
		r.shares = slices.DeleteFunc(r.shares, func(s share) bool { return s.number == d.Number })
	}
	if len(erased) == 0 {
		return nil
	}
	if err := v.commit(ctx, next, true, erased); err != nil {
		return fmt.Errorf("dropping %d shares: %w", len(erased), err)
	}
	return nil
}

// supersedes tells whether a later epoch of the key, or one of a later key of its
// name, is active.
func (m *manifest) supersedes(d Drop) bool {
	for id, r := range m.keys {
		if id.Name != d.Key.Name || r.active == (Number{}) {
			continue
		}
		if id.Incarnation > d.Key.Incarnation || id == d.Key && r.active.Compare(d.Number) > 0 {
			return true
		}
	}
	return false
}

// Reseal has the shares of each key in want rest under that class. What rests under
// the other is written anew, as [Vault.Stage] does; then all that was is committed
// under one new root and the old files are forgotten: no copy of them opens any more.
// It does what it can, and returns what it could not do.
func (v *Vault) Reseal(ctx context.Context, want map[KeyID]Class) error {
	v.writing.Lock()
	defer v.writing.Unlock()
	if err := v.settle(ctx); err != nil {
		return err
	}
	next := v.now.Load().clone()
	var old []share
	var failed []error
	for _, id := range next.sorted() {
		class, ok := want[id]
		if !ok {
			continue
		}
		r := next.edit(id)
		for i, s := range r.shares {
			anew, err := v.rewrite(ctx, class, id, &s)
			switch {
			case err != nil:
				failed = append(failed, fmt.Errorf("sealing the share of key %q, epoch %s, anew: %w", id.Name, s.number, err))
			case anew != nil:
				old = append(old, s)
				r.shares[i] = *anew
			}
		}
	}
	if len(old) == 0 {
		return errors.Join(failed...)
	}
	if err := v.commit(ctx, next, true, old); err != nil {
		failed = append(failed, fmt.Errorf("sealing %d shares anew: %w", len(old), err))
	}
	return errors.Join(failed...)
}

// Rests tells as which class a share rests, by its file.
func (v *Vault) Rests(id KeyID, n Number) (Class, error) {
	f, err := v.shareFile(id, n)
	if err != nil {
		return 0, fmt.Errorf("the share of key %q, epoch %s: %w", id.Name, n, err)
	}
	return f.class, nil
}

// rewrite writes a share to a new file of that class; nil if it is of it already. The
// old file is left: it counts until the commit.
func (v *Vault) rewrite(ctx context.Context, class Class, id KeyID, s *share) (*share, error) {
	f, err := v.readShareFile(id, s)
	if err != nil || f.class == class {
		return nil, err
	}
	plain, err := v.decrypt(ctx, id, s, f)
	if err != nil {
		return nil, err
	}
	defer plain.Wipe()
	anew, err := v.writeShare(ctx, class, id, s.number, s.output, f.public, plain)
	if err != nil {
		return nil, err
	}
	anew.made = s.made
	failpoint.Hit("vault/reseal/file")
	return anew, nil
}

// Lend opens a share and lends it to fn, which must not keep it. For a share of class
// [Own] it asks the hardware each time, and keeps nothing.
func (v *Vault) Lend(ctx context.Context, id KeyID, n Number, fn func(share []byte) error) error {
	s := v.find(id, n)
	if s == nil {
		return fmt.Errorf("opening the share of key %q, epoch %s: %w", id.Name, n, ErrNoShare)
	}
	lent := false
	err := v.lend(ctx, id, s, func(share []byte) error {
		lent = true
		return fn(share)
	})
	if err == nil || lent {
		return err
	}
	if !v.holds(id, s) { // erased or resealed meanwhile, and what is left of it looks damaged or is wiped
		return v.Lend(ctx, id, n, fn)
	}
	return fmt.Errorf("opening the share of key %q, epoch %s: %w", id.Name, n, err)
}

func (v *Vault) lend(ctx context.Context, id KeyID, s *share, fn func([]byte) error) error {
	plain, class, err := v.openShare(ctx, id, s)
	if err != nil {
		return err
	}
	if class == Own {
		defer plain.Wipe()
	}
	return plain.Use(fn)
}

func (v *Vault) find(id KeyID, n Number) *share {
	if r := v.now.Load().keys[id]; r != nil {
		return r.share(n)
	}
	return nil
}

// openShare returns a share, which the caller wipes if it is of class [Own].
func (v *Vault) openShare(ctx context.Context, id KeyID, s *share) (*secret.Bytes, Class, error) {
	v.opened.Lock()
	plain := v.opened.shares[s.file]
	v.opened.Unlock()
	if plain != nil {
		return plain, Held, nil
	}
	f, err := v.readShareFile(id, s)
	if err == nil {
		plain, err = v.decrypt(ctx, id, s, f)
	}
	if err != nil {
		return nil, 0, err
	}
	v.opened.Lock()
	defer v.opened.Unlock()
	first := v.opened.shares[s.file]
	switch {
	case v.closed:
		plain.Wipe()
		return nil, 0, secret.ErrWiped
	case !v.holds(id, s): // erased meanwhile
		plain.Wipe()
		return nil, 0, ErrNoShare
	case f.class == Own:
		return plain, Own, nil
	case first != nil:
		plain.Wipe()
		return first, Held, nil
	}
	v.opened.shares[s.file] = plain
	return plain, Held, nil
}

func (v *Vault) holds(id KeyID, s *share) bool {
	now := v.find(id, s.number)
	return now != nil && now.file == s.file
}

// shareFile reads the file of a share, and again if the share was resealed meanwhile.
func (v *Vault) shareFile(id KeyID, n Number) (*shareFile, error) {
	s := v.find(id, n)
	if s == nil {
		return nil, ErrNoShare
	}
	f, err := v.readShareFile(id, s)
	if err != nil && !v.holds(id, s) {
		return v.shareFile(id, n)
	}
	return f, err
}

// forget removes what is left in memory and on disk of shares that were erased.
func (v *Vault) forget(erased []share) {
	for _, s := range erased {
		v.erasing.Lock()
		clear(s.erasure[:])
		v.erasing.Unlock()
		v.opened.Lock()
		v.opened.shares[s.file].Wipe()
		delete(v.opened.shares, s.file)
		v.opened.Unlock()
		os.Remove(v.sharePath(s.file)) // noise already; swept at the next start if it stays
	}
}

// Public returns the public output of a share that the vault holds.
func (v *Vault) Public(id KeyID, n Number) ([]byte, error) {
	f, err := v.shareFile(id, n)
	if err != nil {
		return nil, fmt.Errorf("public output of key %q, epoch %s: %w", id.Name, n, err)
	}
	return f.public, nil
}

// Certificate returns the certificate of the active epoch.
func (v *Vault) Certificate(id KeyID) ([]byte, error) {
	r := v.now.Load().keys[id]
	if r == nil || r.active == (Number{}) {
		return nil, fmt.Errorf("certificate of key %q: %w", id.Name, ErrNoShare)
	}
	return v.readCertificate(r.certificate)
}

var errClosed = errors.New("the vault is closed")

// errNoChange is returned by an edit that finds everything as it should be.
var errNoChange = errors.New("no change")

// change edits one key's record and commits.
func (v *Vault) change(ctx context.Context, id KeyID, newRoot bool, edit func(*record) error) error {
	v.writing.Lock()
	defer v.writing.Unlock()
	if err := v.settle(ctx); err != nil {
		return err
	}
	next := v.now.Load().clone()
	if _, deleted := next.tombstone(id.Name); deleted {
		return fmt.Errorf("key %q: %w", id.Name, ErrDeleted)
	}
	switch err := edit(next.edit(id)); {
	case errors.Is(err, errNoChange):
		return nil
	case err != nil:
		return fmt.Errorf("key %q: %w", id.Name, err)
	}
	if err := v.commit(ctx, next, newRoot, nil); err != nil {
		return fmt.Errorf("key %q: writing the manifest: %w", id.Name, err)
	}
	return nil
}

// commit writes a manifest to the slot that the root does not open, and under a
// new root lets the hardware commit it. v.writing is held, or the vault is new,
// and v is settled.
func (v *Vault) commit(ctx context.Context, next *manifest, newRoot bool, erased []share) error {
	next.sequence++
	root := v.root
	if newRoot {
		next.roots++
		root = secret.Random(32)
	}
	slot := 1 - v.slot
	if err := v.writeSlot(slot, next, root); err != nil {
		if newRoot {
			root.Wipe()
		}
		return err
	}
	if !newRoot {
		v.slot = slot
		v.now.Store(next)
		return nil
	}
	failpoint.Hit("vault/root/before")
	v.unsure = &pending{next, root, slot, erased}
	setErr := v.protector.SetRoot(ctx, root)
	failpoint.Hit("vault/root/after")
	asking, cancel := context.WithTimeout(context.WithoutCancel(ctx), settleTimeout)
	defer cancel()
	if err := v.settle(asking); err != nil {
		return errors.Join(setErr, err)
	}
	if v.now.Load() != next {
		return errors.Join(setErr, errors.New("the hardware kept the root that it had"))
	}
	return nil // whatever SetRoot said, the hardware has it
}

// settleTimeout bounds the question which root the hardware has, when the caller
// has left already.
const settleTimeout = 30 * time.Second

// settle finds out which root the hardware has, if that is open: it is read back
// after each change, and after an error it tells what happened. v.writing is held.
// A vault that was closed is nobody's to write.
func (v *Vault) settle(ctx context.Context) error {
	if v.closed {
		return errClosed
	}
	if v.unsure == nil {
		return nil
	}
	root, err := v.protector.Root(ctx)
	var none NoRoot
	if v.root == nil && errors.As(err, &none) && none.NoRoot() { // Create, and it was not taken
		v.unsure.root.Wipe()
		v.unsure = nil
		return nil
	}
	if err != nil {
		return fmt.Errorf("%w: %w", ErrUnsure, err)
	}
	defer root.Wipe()
	p := v.unsure
	switch {
	case root.Equal(p.root):
		v.root.Wipe()
		v.root, v.slot, v.unsure = p.root, p.slot, nil
		v.now.Store(p.m)
		os.Remove(v.slotPath(1 - p.slot)) // noise from now on
		v.forget(p.erased)
	case v.root != nil && root.Equal(v.root):
		p.root.Wipe()
		v.unsure = nil
	default:
		return fmt.Errorf("%w: it has a root that this vault never gave it; does another agent use the same hardware slot?", ErrUnsure)
	}
	return nil
}

// InUse returns an error that names the process that has the vault in dir open,
// if one has.
func InUse(dir string) error {
	lock, err := lockFolder(dir)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	return lock.Close()
}

// lockFolder makes sure of one writer.
func lockFolder(dir string) (*os.File, error) {
	path := filepath.Join(dir, "lock")
	if _, err := os.Stat(dir); err != nil {
		return nil, fmt.Errorf("vault: %w", err)
	}
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, fmt.Errorf("locking the vault: %w", err)
	}
	err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	if err != nil && !errors.Is(err, unix.EWOULDBLOCK) {
		f.Close()
		return nil, fmt.Errorf("locking the vault %s: %w", dir, err)
	}
	if err != nil {
		holder := make([]byte, 32)
		n, _ := f.Read(holder)
		f.Close()
		return nil, fmt.Errorf("the vault %s is in use by process %s: stop that agent first", dir, strings.TrimSpace(string(holder[:n])))
	}
	if err := f.Truncate(0); err == nil {
		_, _ = fmt.Fprintf(f, "%d\n", os.Getpid()) // for people only
	}
	return f, nil
}

// fileName is the random name of a share's file.
type fileName [16]byte

func (f fileName) String() string { return hex.EncodeToString(f[:]) }
