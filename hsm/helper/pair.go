package helper

import (
	"cmp"
	"context"
	"crypto"
	"crypto/ecdsa"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"time"

	"conseal/hsm"
	"conseal/internal/disk"
	"conseal/internal/secret"
)

// PairConfig says how to reach the two tokens of a host.
type PairConfig struct {
	// First and Second have a state folder each, and Second has [hsm.Config.Second].
	First, Second Config
	// Recheck is how long a token that is away is left alone before it is tried again;
	// the pauses double up to a minute. 0 means 5s.
	Recheck time.Duration
	// Changed, if not nil, is told when another token is used, or one is away or back:
	// what [Pair.Name] gives now, and why; nil if one is back.
	Changed func(name string, err error)
}

const (
	defaultRecheck = 5 * time.Second
	longestRecheck = time.Minute
)

// Pair is a host's two tokens, as one. Make it with [OpenPair] and end it with Close.
// Its methods may be called by several goroutines.
//
// The identity and the wrapping key of the second are copies of the first's, made once
// by the vendor's means: either token opens, seals and signs. The first that works is
// used, and the first again when it is back.
//
// The root is wrapped in each by keys of its own, for those are made anew with each root
// and no copy may outlive them. So a change of the root needs both tokens:
//
//  1. write a mark that a change is under way, and sync it;
//  2. set the root in the first, then in the second;
//  3. remove the mark: the commit.
//
// While the mark is there, the root is given out only when both tokens are there: the
// first's counts and is set in the second before. So no root is given out while an
// older one can be had from either. Without the mark both have the same root, and one
// of them is enough.
type Pair struct {
	cfg   PairConfig
	sides [2]*side

	ctx    context.Context // ends with Close
	cancel context.CancelFunc
	watch  sync.WaitGroup

	rootMu sync.Mutex // one Root or SetRoot at a time; taken before mu

	mu    sync.Mutex // guards the sides' state
	proof *proof     // of the token that was there first; join's
}

// proof is by what a token shows that its keys are the other one's, also if that is away.
type proof struct {
	public crypto.PublicKey // the identity's
	key    *secret.Bytes    // thrown away, and sealed by the wrapping key
	blob   []byte
}

// side is one of the two tokens.
type side struct {
	place string // "first" or "second"
	cfg   Config

	h      *HSM          // nil: was never there
	signer crypto.Signer // by h
	away   error         // why it is not used; nil if it may be
}

// OpenPair opens what of the two tokens is there: it fails if neither is. The other
// one is looked for from then on.
func OpenPair(ctx context.Context, cfg PairConfig) (*Pair, error) {
	if cfg.Recheck == 0 {
		cfg.Recheck = defaultRecheck
	}
	never := errors.New("not tried yet")
	p := &Pair{cfg: cfg, sides: [2]*side{{place: "first", cfg: cfg.First, away: never}, {place: "second", cfg: cfg.Second, away: never}}}
	p.ctx, p.cancel = context.WithCancel(context.Background())
	var errs [2]error
	for i, s := range p.sides {
		errs[i] = p.join(ctx, s)
	}
	if errs[0] != nil && errs[1] != nil {
		p.Close()
		return nil, errors.Join(errs[:]...)
	}
	for _, err := range errs {
		if err != nil {
			p.tell(err)
		}
	}
	p.watch.Go(p.lookOut)
	return p, nil
}

// Close ends both helpers.
func (p *Pair) Close() {
	p.cancel()
	p.watch.Wait()
	for _, s := range p.sides {
		if s.h != nil {
			s.h.Close()
		}
	}
	if p.proof != nil {
		p.proof.key.Wipe()
	}
}

// join takes a token into use that works and has the same keys as the other one.
func (p *Pair) join(ctx context.Context, s *side) (err error) {
	p.mu.Lock()
	h, signer := s.h, s.signer
	p.mu.Unlock()
	known := h != nil
	if !known {
		h, err = Open(ctx, s.cfg)
	}
	if err == nil {
		signer, err = h.Identity(ctx)
	}
	if err == nil {
		err = p.match(ctx, h, signer)
	}
	if err != nil && !known && h != nil {
		h.Close()
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if err == nil {
		if s.away = nil; !known {
			s.h, s.signer = h, signer
		}
	} else {
		s.away = fmt.Errorf("the %s token: %w", s.place, err)
	}
	return s.away
}

// match compares a token's keys with those of the token that was there first. Only one
// join runs at a time.
func (p *Pair) match(ctx context.Context, h *HSM, signer crypto.Signer) error {
	const id = "conseal pair v1"
	if p.proof == nil {
		key, blob, err := h.Seal(ctx, id)
		if err == nil {
			p.proof = &proof{signer.Public(), key, blob}
		}
		return err
	}
	if !signer.Public().(*ecdsa.PublicKey).Equal(p.proof.public) {
		return mismatch("identity")
	}
	got, err := h.Open(ctx, id, p.proof.blob)
	if hsm.ClassOf(err) == hsm.ClassData || err == nil && !got.Equal(p.proof.key) {
		err = mismatch("wrapping")
	}
	got.Wipe()
	return err
}

func mismatch(key string) error {
	return &hsm.Error{Class: hsm.ClassPolicy, What: "hsm: the " + key + " key is not that of the host's other token: copy it from there by the vendor's means"}
}

func (p *Pair) other(s *side) *side {
	if s == p.sides[0] {
		return p.sides[1]
	}
	return p.sides[0]
}

// leave takes a token out of use.
func (p *Pair) leave(s *side, err error) {
	p.mu.Lock()
	was := s.away
	s.away = fmt.Errorf("the %s token: %w", s.place, err)
	p.mu.Unlock()
	if was == nil {
		p.tell(err)
	}
}

func (p *Pair) tell(err error) {
	if p.cfg.Changed != nil {
		p.cfg.Changed(p.Name(), err)
	}
}

// lookOut tries tokens that are away.
func (p *Pair) lookOut() {
	pause := p.cfg.Recheck
	for {
		select {
		case <-p.ctx.Done():
			return
		case <-time.After(pause):
		}
		pause = min(pause*2, longestRecheck)
		if p.lookAgain() {
			pause = p.cfg.Recheck
		}
	}
}

// lookAgain tells whether both tokens are there now.
func (p *Pair) lookAgain() bool {
	all := true
	for _, s := range p.sides {
		p.mu.Lock()
		away := s.away
		p.mu.Unlock()
		if away == nil {
			continue
		}
		if p.join(p.ctx, s) != nil {
			all = false
			continue
		}
		p.tell(nil)
	}
	if all && p.pending() { // an older root is destroyed as soon as its token is seen again
		all = p.Settle(p.ctx) == nil
	}
	return all
}

// Name says which token is used, and whether the other one is there.
func (p *Pair) Name() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	s := p.order()[0]
	switch o := p.other(s); {
	case s.away != nil:
		return s.h.Name() + " (" + s.place + " of two, both are away)"
	case o.away != nil:
		return s.h.Name() + " (" + s.place + " of two, the " + o.place + " is away)"
	}
	return s.h.Name() + " (" + s.place + " of two)"
}

// Kind is "hsm".
func (p *Pair) Kind() string { return "hsm" }

// use asks the first token that works.
func (p *Pair) use(ctx context.Context, ask func(*side) error) error {
	var errs error
	p.mu.Lock()
	order := p.order()
	p.mu.Unlock()
	for _, s := range order {
		err := ask(s)
		if err == nil || !gone(ctx, err) {
			return err
		}
		p.leave(s, err)
		errs = errors.Join(errs, fmt.Errorf("the %s token: %w", s.place, err))
	}
	return errs
}

// order are the tokens in use; if there is none, those that once were. The caller holds
// mu.
func (p *Pair) order() []*side {
	var used, known []*side
	for _, s := range p.sides {
		if s.h != nil {
			known = append(known, s)
			if s.away == nil {
				used = append(used, s)
			}
		}
	}
	if used == nil {
		return known
	}
	return used
}

// gone tells whether a failure is the token's own, so that the other one may do better.
func gone(ctx context.Context, err error) bool {
	if ctx.Err() != nil {
		return false
	}
	switch hsm.ClassOf(err) {
	case hsm.ClassData, hsm.ClassPolicy:
		return false
	case "":
		return errors.Is(err, hsm.ErrLost)
	}
	return true
}

// Seal is [hsm.HSM.Seal]; either token opens what it made.
func (p *Pair) Seal(ctx context.Context, id string) (key *secret.Bytes, blob []byte, err error) {
	err = p.use(ctx, func(s *side) (err error) { key, blob, err = s.h.Seal(ctx, id); return err })
	return key, blob, err
}

// Open is [hsm.HSM.Open].
func (p *Pair) Open(ctx context.Context, id string, blob []byte) (key *secret.Bytes, err error) {
	err = p.use(ctx, func(s *side) (err error) { key, err = s.h.Open(ctx, id, blob); return err })
	return key, err
}

// pairIdentity signs with the key that both tokens have.
type pairIdentity struct {
	p      *Pair
	public crypto.PublicKey
}

// Identity gives the host's key, as [HSM.Identity] does.
func (p *Pair) Identity(context.Context) (crypto.Signer, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, s := range p.sides {
		if s.signer != nil {
			return &pairIdentity{p, s.signer.Public()}, nil
		}
	}
	return nil, errClosed // OpenPair has one
}

func (i *pairIdentity) Public() crypto.PublicKey { return i.public }

func (i *pairIdentity) Sign(rand io.Reader, digest []byte, opts crypto.SignerOpts) (der []byte, err error) {
	err = i.p.use(i.p.ctx, func(s *side) (err error) { der, err = s.signer.Sign(rand, digest, opts); return err })
	return der, err
}

// markPath is a file that is there while a change of the root is under way.
func (p *Pair) markPath() string {
	return filepath.Join(p.cfg.Second.HSM.StateDir, "root-change")
}

// pending tells whether a change of the root was begun and not finished; if that cannot
// be told, it was.
func (p *Pair) pending() bool {
	_, err := os.Lstat(p.markPath())
	return !errors.Is(err, fs.ErrNotExist)
}

func (p *Pair) mark() error { return disk.WriteFile(p.markPath(), []byte("1\n")) }

func (p *Pair) unmark() error {
	if err := os.Remove(p.markPath()); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return disk.Sync(p.cfg.Second.HSM.StateDir)
}

// Root is the root of the token that is there, and both have the same. After a change
// that was interrupted both must be there, and have the same before it is given.
func (p *Pair) Root(ctx context.Context) (*secret.Bytes, error) {
	p.rootMu.Lock()
	defer p.rootMu.Unlock()
	return p.root(ctx, p.pending())
}

// Settle checks that both tokens are there and have the same root, and sets the root
// that one of them has in the other if that has none.
func (p *Pair) Settle(ctx context.Context) error {
	p.rootMu.Lock()
	defer p.rootMu.Unlock()
	return p.settle(ctx)
}

func (p *Pair) settle(ctx context.Context) error {
	root, err := p.root(ctx, true)
	root.Wipe()
	if hasNone(err) {
		return nil
	}
	return err
}

// SetRoot is [hsm.HSM.SetRoot], in both tokens. If one is away it changes nothing, for
// an older root would stay in that one, and the error says which.
func (p *Pair) SetRoot(ctx context.Context, next *secret.Bytes) error {
	p.rootMu.Lock()
	defer p.rootMu.Unlock()
	if err := p.settle(ctx); err != nil { // so that what cannot be finished is not begun
		return err
	}
	if err := p.mark(); err != nil {
		return fmt.Errorf("hsm: setting the root: %w", err)
	}
	for _, s := range p.sides {
		if err := s.h.SetRoot(ctx, next); err != nil {
			if gone(ctx, err) {
				p.leave(s, err)
			}
			return fmt.Errorf("in the %s token: %w", s.place, err)
		}
	}
	return p.unmark()
}

// hasNone tells whether an error says that there never was a root.
func hasNone(err error) bool {
	var none interface{ NoRoot() bool }
	return errors.As(err, &none) && none.NoRoot()
}

// present gives a token to ask for its root, or says why not: it is away, and the other
// one is not.
func (p *Pair) present(s *side) (*HSM, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if s.h == nil || s.away != nil && p.other(s).away == nil {
		return nil, s.away
	}
	return s.h, nil
}

// root reads the root of the tokens that are there. If both are, they agree when it
// returns; if not, it fails if both must be. The caller holds rootMu.
func (p *Pair) root(ctx context.Context, both bool) (*secret.Bytes, error) {
	var roots [2]*secret.Bytes
	var none, missing error
	for i, s := range p.sides {
		h, err := p.present(s)
		if err != nil {
			missing = errors.Join(missing, err)
			continue
		}
		switch roots[i], err = h.Root(ctx); {
		case err == nil:
		case hasNone(err):
			none = err
		case gone(ctx, err):
			p.leave(s, err)
			missing = errors.Join(missing, fmt.Errorf("the %s token: %w", s.place, err))
		default:
			roots[0].Wipe()
			return nil, fmt.Errorf("the %s token: %w", s.place, err)
		}
	}
	if missing == nil {
		return p.agree(ctx, roots[0], roots[1], none)
	}
	root := cmp.Or(roots[0], roots[1])
	switch {
	case root == nil:
		return nil, fmt.Errorf("hsm: no root: %w", missing)
	case both:
		root.Wipe()
		return nil, fmt.Errorf("hsm: a change of the root, and its end if it was interrupted, needs both tokens, for an older root may be in one that is away: %w", missing)
	}
	return root, nil
}

// agree makes the root of both tokens the same one: the first's, where a change begins,
// or that of the one that has a root. It takes the roots over.
func (p *Pair) agree(ctx context.Context, first, second *secret.Bytes, none error) (*secret.Bytes, error) {
	root, to := first, p.sides[1]
	var err error
	switch {
	case first == nil && second == nil:
		return nil, none
	case first == nil && p.pending():
		second.Wipe()
		return nil, fmt.Errorf("hsm: the first token lost its root during a change: %w", hsm.ErrLost)
	case first == nil: // and it has no older one
		root, to = second, p.sides[0]
		err = to.h.SetRoot(ctx, root)
	case second == nil: // the same
		err = to.h.SetRoot(ctx, root)
	case !first.Equal(second) && !p.pending(): // the newer one must not make way for the older
		first.Wipe()
		second.Wipe()
		return nil, &hsm.Error{Class: hsm.ClassPolicy, What: "hsm: the two tokens have different roots, and no change was under way: one was put back from an old copy, with its folder, or was used alone. Find out which; destroy its root keys, empty its folder and run conseald init"}
	case !first.Equal(second):
		err = to.h.SetRoot(ctx, root)
		second.Wipe()
	default:
		second.Wipe()
	}
	if err == nil && p.pending() {
		err = p.unmark()
	}
	if err != nil {
		root.Wipe()
		return nil, fmt.Errorf("hsm: setting the root of one token in the %s: %w", to.place, err)
	}
	return root, nil
}
