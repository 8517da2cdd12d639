//go:build cgo

package hsm

import (
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/miekg/pkcs11"

	"conseal/internal/disk"
	"conseal/internal/secret"
)

// rootChange is one SetRoot.
//
// The root of generation g is wrapped by a key of its own in the token, whatever the
// method (with RSA, a private key), and the wrapped root is the file hsm-root.<g>.
// SetRoot does, each step durable before the next:
//
//  1. plan: choose g, above every key and root file that exists, and the id of its
//     key, and write a plan of that id as hsm-root.<g>;
//  2. make the key;
//  3. wrap the next root and replace the plan by it;
//  4. read the file back, open it and compare;
//  5. destroy every older root key and see that it is gone: the commit;
//  6. remove older files, which are noise by now.
//
// Root, and SetRoot before it begins, judge by these rules:
//
//   - The root is that of the highest generation whose file opens. A crash before
//     step 3 was done leaves the old one, after it the new one.
//   - If that generation opens while older keys exist, a SetRoot was interrupted:
//     steps 5 and 6 are done first, so that no root is given out while an older one
//     can be had. Hence while the key of g exists and its file opens, no later root
//     was ever given out, and keys above g are left from SetRoots that never were.
//   - A newer file that did not open is set aside, as hsm-root.<g>.refused, before an
//     older root is given out: it may open another time, and the vault does not write
//     for two roots.
//   - A key above the root is never destroyed, whatever it is, except by a later
//     SetRoot, which goes above it.
//   - If there are files and none opens, the state folder is not the one that
//     belongs to the token ([ErrStale]), or the key is lost ([ErrLost]), or the
//     file is damaged ([ErrNotAuthentic]). Nothing is touched.
//   - If there is no file but a plan, the first SetRoot was interrupted: there is no
//     root. If there is a key without even a plan, the folder is empty by mistake,
//     say because it is not mounted: [ErrStale]. The plan is there to tell these two.
//   - That the token shows no key means something only while it shows the sentinel.
//
// Destroying a key erases as well as the token's storage does: a token that is a
// file, like SoftHSM's, can be restored from a copy, and so can some HSMs by their
// vendor's backup.
type rootChange struct {
	h      *HSM
	next   *secret.Bytes
	key    keyID     // of the next root's key
	file   *envelope // the next root, wrapped
	placed bool      // the file may be in its place, so the key must stay
}

const (
	rootFilePrefix = "hsm-root."
	// giveUpTime bounds the wait for a session to clean up after a failure.
	giveUpTime = 5 * time.Second
)

// rootState is what token and folder hold.
type rootState struct {
	keys  []keyID    // ascending
	files []rootFile // ascending
	key   keyID      // of the root
	root  *secret.Bytes
}

// rootFile is one hsm-root.<generation>.
type rootFile struct {
	generation uint64
	content    *envelope // nil: damaged
}

func (f rootFile) plan() bool { return f.content != nil && f.content.kind == kindPlan }

// Root is the host's one erasable secret, 32 bytes. If none was ever set, the
// error has a method NoRoot. It finishes an interrupted SetRoot.
func (h *HSM) Root(ctx context.Context) (*secret.Bytes, error) {
	h.rootMu.Lock()
	defer h.rootMu.Unlock()
	st, err := h.survey(ctx)
	if err == nil {
		err = h.setAside(st)
	}
	if err == nil && st.leftovers() {
		err = h.finish(ctx, st.key)
	}
	if err != nil {
		st.root.Wipe()
		return nil, fmt.Errorf("hsm: root in %s: %w", h.Name(), err)
	}
	return st.root, nil
}

// SetRoot replaces the root by next, 32 bytes. Once it has returned nil, no
// earlier root can be had from this token. After a crash or an error inside,
// Root gives the old or the new one.
func (h *HSM) SetRoot(ctx context.Context, next *secret.Bytes) error {
	h.rootMu.Lock()
	defer h.rootMu.Unlock()
	c := &rootChange{h: h, next: next}
	for _, step := range c.steps() {
		if err := step(ctx); err != nil {
			c.giveUp(ctx)
			return fmt.Errorf("hsm: setting the root in %s: %w", h.Name(), err)
		}
	}
	return nil
}

func (c *rootChange) steps() []func(context.Context) error {
	return []func(context.Context) error{c.plan, c.makeKey, c.writeFile, c.readBack, c.commit}
}

func (c *rootChange) plan(ctx context.Context) error {
	if n := c.next.Len(); n != keySize {
		return fmt.Errorf("the next root has %d bytes: must be %d", n, keySize)
	}
	st, err := c.h.survey(ctx)
	st.root.Wipe()
	var none *noRoot
	if err != nil && !errors.As(err, &none) {
		return err
	}
	g := st.highest()
	if g == math.MaxUint64 {
		return errors.New("there is no generation left: an object was planted in the token, or a file in the state folder")
	}
	binary.BigEndian.PutUint64(c.key[:8], g+1)
	rand.Read(c.key[8:])
	return c.h.putRootFile(c.h.envelope(kindPlan, c.key))
}

func (c *rootChange) makeKey(ctx context.Context) error {
	return c.h.change(ctx, func(s *session) error { return s.makeKey(s.label(s.cfg.rootName()), c.key) })
}

func (c *rootChange) writeFile(ctx context.Context) error {
	c.file = c.h.envelope(kindRoot, c.key)
	if err := c.h.seal(ctx, c.file, c.h.cfg.rootName(), "root", c.next); err != nil {
		return err
	}
	c.placed = true
	return c.h.putRootFile(c.file)
}

func (c *rootChange) readBack(ctx context.Context) error {
	f, err := readRootFile(c.h.cfg.StateDir, c.key.generation())
	if err != nil {
		return err
	}
	if f.content == nil || !bytes.Equal(f.content.encode(), c.file.encode()) {
		return errors.New("the root's file is not what was written: check the disk")
	}
	got, err := c.h.open(ctx, f.content, c.h.cfg.rootName(), "root")
	if err != nil {
		return err
	}
	defer got.Wipe()
	if !got.Equal(c.next) {
		return errors.New("the token gives back another root than it was given")
	}
	return nil
}

func (c *rootChange) commit(ctx context.Context) error { return c.h.finish(ctx, c.key) }

// giveUp removes the key of a SetRoot that failed before its file was placed, lest
// failures fill the token. The plan without a key is nothing and is overwritten.
func (c *rootChange) giveUp(ctx context.Context) {
	if c.key == (keyID{}) || c.placed {
		return
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), giveUpTime)
	defer cancel()
	_ = c.h.change(ctx, func(s *session) error { // if it stays, the next SetRoot takes it
		return s.destroyAll(s.find(anyClass, s.label(s.cfg.rootName()), attr(pkcs11.CKA_ID, c.key[:])))
	})
}

// survey reads folder and token and opens the root. Its error may be [noRoot];
// then keys and files are there all the same.
func (h *HSM) survey(ctx context.Context) (st rootState, err error) {
	if st.files, err = readRootFiles(h.cfg.StateDir); err != nil {
		return st, err
	}
	if st.keys, err = h.rootKeys(ctx); err != nil {
		return st, err
	}
	for _, f := range slices.Backward(st.files) {
		if f.content == nil || f.plan() || !slices.Contains(st.keys, f.content.key) {
			continue
		}
		st.root, err = h.open(ctx, f.content, h.cfg.rootName(), "root")
		if err == nil {
			st.key = f.content.key
			return st, nil
		}
		if !errors.Is(err, ErrNotAuthentic) {
			return st, err // it may open another time, so no older one may take its place
		}
	}
	return st, st.judge(label(h.cfg.Name, h.cfg.rootName()), methodNumber(h.method.name))
}

// judge says why no root opens.
func (st rootState) judge(label string, method byte) error {
	var newest *rootFile // that is no plan
	var planned []keyID
	for _, f := range st.files {
		if f.plan() {
			planned = append(planned, f.content.key)
		} else {
			newest = &f
		}
	}
	unplanned := func(k keyID) bool { return !slices.Contains(planned, k) }
	switch {
	case newest == nil && slices.ContainsFunc(st.keys, unplanned):
		return fmt.Errorf("%d root keys and no root file: %w", len(st.keys), ErrStale)
	case newest == nil:
		return &noRoot{label}
	case newest.content != nil && newest.content.method != method:
		return fmt.Errorf("%s%d: %w", rootFilePrefix, newest.generation, newest.content.made(method))
	case newest.content == nil || slices.Contains(st.keys, newest.content.key):
		return fmt.Errorf("%s%d: %w", rootFilePrefix, newest.generation, ErrNotAuthentic)
	case len(st.keys) > 0 && st.keys[len(st.keys)-1].generation() >= newest.generation:
		return fmt.Errorf("newest root file is of generation %d, newest key of %d: %w", newest.generation, st.keys[len(st.keys)-1].generation(), ErrStale)
	}
	return fmt.Errorf("%s of generation %d: %w", label, newest.generation, ErrLost)
}

// highest is the highest generation of a key or a root file, 0 if there is none.
// A plan without a key does not count: its generation is taken again.
func (st rootState) highest() (g uint64) {
	for _, k := range st.keys {
		g = max(g, k.generation())
	}
	for _, f := range st.files {
		if !f.plan() {
			g = max(g, f.generation)
		}
	}
	return g
}

// leftovers tells whether a SetRoot of the root's generation was interrupted.
func (st rootState) leftovers() bool {
	return slices.ContainsFunc(st.keys, func(k keyID) bool { return older(k, st.key) }) ||
		slices.ContainsFunc(st.files, func(f rootFile) bool { return f.generation < st.key.generation() })
}

// setAside takes newer files than the root's out of the way.
func (h *HSM) setAside(st rootState) error {
	for _, f := range st.files {
		if f.generation <= st.key.generation() || f.plan() {
			continue
		}
		path := filepath.Join(h.cfg.StateDir, rootFileName(f.generation))
		if err := errors.Join(os.Rename(path, path+".refused"), disk.Sync(h.cfg.StateDir)); err != nil {
			return err
		}
	}
	return nil
}

// older tells whether a key must go once root is the root's key.
func older(k, root keyID) bool { return k != root && k.generation() <= root.generation() }

// finish commits to a root whose file is in place and opens. A crash may have come
// before its file was durable, so that is done again first.
func (h *HSM) finish(ctx context.Context, root keyID) error {
	path := filepath.Join(h.cfg.StateDir, rootFileName(root.generation()))
	if err := errors.Join(disk.Sync(path), disk.Sync(h.cfg.StateDir)); err != nil {
		return err
	}
	if err := h.destroyOlder(ctx, root); err != nil {
		return err
	}
	files, err := readRootFiles(h.cfg.StateDir)
	for _, f := range files {
		if f.generation < root.generation() {
			_ = os.Remove(filepath.Join(h.cfg.StateDir, rootFileName(f.generation))) // its key is gone: it is noise
		}
	}
	return err
}

// destroyOlder destroys the older root keys and sees that they are gone. It destroys
// none while the root's own is not there, and sees that it still is.
func (h *HSM) destroyOlder(ctx context.Context, root keyID) error {
	return h.change(ctx, func(s *session) error {
		keys, err := s.rootKeysWith(root)
		if err != nil {
			return err
		}
		for _, k := range keys {
			if older(k.id, root) {
				if err := s.p.DestroyObject(s.h, k.handle); err != nil {
					return failed("C_DestroyObject", err)
				}
			}
		}
		if keys, err = s.rootKeysWith(root); err != nil {
			return err
		}
		if slices.ContainsFunc(keys, func(k rootKey) bool { return older(k.id, root) }) {
			return &Error{Class: ClassPolicy, What: "an older root key is still in the token after it was destroyed"}
		}
		return nil
	})
}

// rootKey is a root key in one session.
type rootKey struct {
	id     keyID
	handle pkcs11.ObjectHandle
}

// rootKeys gives all root keys, oldest first, whatever their class: one that another
// method made could open an old root as well. That there is none is believed only of a
// token that shows the sentinel.
func (s *session) rootKeys() ([]rootKey, error) {
	handles, err := s.find(anyClass, s.label(s.cfg.rootName()))
	if err != nil {
		return nil, err
	}
	if err := s.noCopies(); err != nil {
		return nil, err
	}
	if err := s.sentinel(); err != nil {
		return nil, err
	}
	var keys []rootKey
	for _, h := range handles {
		id, err := s.keyID(h)
		if err != nil {
			return nil, err
		}
		keys = append(keys, rootKey{id, h})
	}
	slices.SortFunc(keys, func(a, b rootKey) int { return slices.Compare(a.id[:], b.id[:]) })
	return keys, nil
}

// rootKeysWith gives all root keys, if the root's is among them.
func (s *session) rootKeysWith(root keyID) ([]rootKey, error) {
	keys, err := s.rootKeys()
	if err == nil && !slices.ContainsFunc(keys, func(k rootKey) bool { return k.id == root }) {
		err = fmt.Errorf("%s of generation %d: %w", s.label(s.cfg.rootName()), root.generation(), ErrLost)
	}
	return keys, err
}

// noCopies is nil if no root key of the other one of two tokens is in this one: there it
// would outlive its destruction.
func (s *session) noCopies() error {
	copies, err := s.find(anyClass, s.label(s.cfg.otherRootName()))
	if err == nil && len(copies) > 0 {
		err = &Error{Class: ClassPolicy, What: fmt.Sprintf("%d keys %s of the other one of this host's two tokens are in this one: it is the same token, or was copied with them (destroy them here), or copies keys by itself (use the vendor's one token for both)",
			len(copies), s.label(s.cfg.otherRootName()))}
	}
	return err
}

func (h *HSM) rootKeys(ctx context.Context) (ids []keyID, err error) {
	err = h.do(ctx, func(s *session) error {
		keys, err := s.rootKeys()
		ids = nil
		for _, k := range keys {
			ids = append(ids, k.id)
		}
		return err
	})
	return ids, err
}

func rootFileName(generation uint64) string {
	return rootFilePrefix + strconv.FormatUint(generation, 10)
}

func (h *HSM) putRootFile(e *envelope) error {
	return disk.WriteFile(filepath.Join(h.cfg.StateDir, rootFileName(e.key.generation())), e.encode())
}

// readRootFiles reads every root file, oldest first.
func readRootFiles(dir string) ([]rootFile, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	var files []rootFile
	for _, e := range entries {
		digits, ok := strings.CutPrefix(e.Name(), rootFilePrefix)
		g, err := strconv.ParseUint(digits, 10, 64)
		if !ok || err != nil || rootFileName(g) != e.Name() {
			continue
		}
		f, err := readRootFile(dir, g)
		if err != nil {
			return nil, err
		}
		files = append(files, f)
	}
	slices.SortFunc(files, func(a, b rootFile) int { return cmp.Compare(a.generation, b.generation) })
	return files, nil
}

func readRootFile(dir string, generation uint64) (rootFile, error) {
	f := rootFile{generation: generation}
	b, err := disk.ReadSmall(filepath.Join(dir, rootFileName(generation)), 4096)
	if err != nil {
		return f, err
	}
	e, err := decodeEnvelope(b)
	if err == nil && e.kind != kindShare && e.key.generation() == generation {
		f.content = e
	}
	return f, nil
}
