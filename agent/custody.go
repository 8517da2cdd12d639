package agent

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"
)

// errSealed is the error of a session whose share the hardware does not open.
var errSealed = errors.New("sealed")

// errOver is the error of a session that is late: its epoch has been replaced.
var errOver = errors.New("the epoch is over")

// custody is how this host has the share of an active epoch: opened as long as the
// epoch lasts, for a time after each opening, or for one session.
type custody struct {
	held    shareholder                                // opened for good; nil unless the key is "held"
	keep    time.Duration                              // how long after its opening a share serves sessions that begin; 0: one session
	open    func(context.Context) (shareholder, error) // asks the hardware
	changed func()                                     // told when the hardware begins to refuse, and when that ends

	turn chan struct{} // has room for the one session that opens a share for a time

	mu      sync.Mutex // guards what follows
	closed  bool
	ended   bool               // no session begins any more
	users   int                // sessions that have held
	current *loan              // what sessions that begin join; nil if none
	loans   map[*loan]struct{} // what is opened
	refused error              // what the hardware said at the last opening; nil if it opened
}

// loan is an opened share. It is wiped when nobody needs it: under no session that uses
// it, unless the epoch ends.
type loan struct {
	shareholder
	until time.Time // no session begins with it any more; by the wall clock, which goes on while the machine sleeps
	timer *time.Timer
	needs int // sessions that have it, and one more while it is current
}

func newCustody(keep time.Duration, open func(context.Context) (shareholder, error), changed func()) *custody {
	return &custody{keep: keep, open: open, changed: changed, turn: make(chan struct{}, 1), loans: map[*loan]struct{}{}}
}

// borrow returns the share for one session, which calls done at its end. If the
// hardware has to be asked, that is here; an error is [errSealed].
func (c *custody) borrow(ctx context.Context) (share shareholder, done func(), err error) {
	if c.held != nil {
		return c.lendHeld()
	}
	l := c.join()
	if l == nil && c.keep > 0 {
		select { // one opening serves all that wait for it
		case c.turn <- struct{}{}:
			defer func() { <-c.turn }()
		case <-ctx.Done():
			return nil, nil, fmt.Errorf("%w: waiting for the hardware: %w", errSealed, context.Cause(ctx))
		}
		l = c.join()
	}
	if l == nil {
		if l, err = c.ask(ctx); err != nil {
			return nil, nil, fmt.Errorf("%w: %w", errSealed, err)
		}
	}
	return l.shareholder, func() { c.release(l) }, nil
}

// lendHeld lends the share that is opened for good.
func (c *custody) lendHeld() (share shareholder, done func(), err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.ended || c.closed {
		return nil, nil, errOver
	}
	c.users++
	return c.held, func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		if c.users--; c.users == 0 && c.ended {
			c.held.close()
		}
	}, nil
}

// end lets the sessions that have the share finish, for as long as one may last. None
// begins any more.
func (c *custody) end(last time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.ended || c.closed {
		return
	}
	c.ended = true
	c.retire()
	if c.held != nil && c.users == 0 {
		c.held.close()
	}
	time.AfterFunc(last, c.close)
}

// join takes part in the loan that is current; nil if there is none.
func (c *custody) join() *loan {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.current == nil || !time.Now().Before(c.current.until) {
		return nil
	}
	c.current.needs++
	return c.current
}

// ask has the hardware open the share. Its time counts from before the hardware is
// asked: what it decides by may change from then on.
func (c *custody) ask(ctx context.Context) (*loan, error) {
	asked := time.Now()
	share, err := c.open(ctx)
	c.note(ctx, err)
	if err != nil {
		return nil, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed || c.ended {
		share.close()
		return nil, errOver
	}
	l := &loan{shareholder: share, needs: 1}
	c.loans[l] = struct{}{}
	if c.keep > 0 {
		c.retire() // of which the time is over by the wall clock only
		l.needs++
		l.until = asked.Add(c.keep).Round(0)
		l.timer = time.AfterFunc(time.Until(asked.Add(c.keep)), func() { c.expire(l) })
		c.current = l
	}
	return l, nil
}

// note remembers for people whether the hardware refused. A caller who left says
// nothing about it.
func (c *custody) note(ctx context.Context, err error) {
	if err != nil && errors.Is(context.Cause(ctx), context.Canceled) {
		return
	}
	c.mu.Lock()
	changed := (err == nil) != (c.refused == nil)
	c.refused = err
	c.mu.Unlock()
	if changed {
		c.changed()
	}
}

// refusal is what the hardware said at the last opening, if it refused.
func (c *custody) refusal() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.refused
}

func (c *custody) release(l *loan) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.drop(l)
}

func (c *custody) expire(l *loan) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.current == l {
		c.retire()
	}
}

// retire ends the time of the current loan; c.mu is held.
func (c *custody) retire() {
	if l := c.current; l != nil {
		l.timer.Stop()
		c.current = nil
		c.drop(l)
	}
}

// drop wipes a share that nobody needs any more; c.mu is held.
func (c *custody) drop(l *loan) {
	if l.needs--; l.needs == 0 {
		l.close()
		delete(c.loans, l)
	}
}

// close ends the epoch: what is opened is wiped, under sessions too.
func (c *custody) close() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.closed = true
	c.retire()
	for l := range c.loans {
		l.close()
	}
	if c.held != nil {
		c.held.close()
	}
}
