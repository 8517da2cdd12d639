package helper

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"sync"
	"time"

	"conseal/hsm"
	"conseal/internal/pin"
)

// HSM is a host's part of a token whose module runs in a helper. Make it with
// [Open] and end it with Close. Its methods may be called by several goroutines.
//
// A helper that ended is started again by the next call. A call that was under way
// then is repeated once if that can do no harm, so that its caller does not notice.
// When the context of a call ends, the call returns; the helper may go on with it.
type HSM struct {
	cfg   Config
	name  string        // of the token, from Open on
	lock  *os.File      // of the state folder; each helper has it too
	slots chan struct{} // holds one element for each question that a helper has

	mu      sync.Mutex // guards what follows; taken before a process's, never after
	process *process   // nil: the next call starts one
	launch  *launch    // under way, or nil
	closed  bool

	failures int       // helpers in a row that were of no use
	notUntil time.Time // when the next may be started
	reason   error     // why not before
	cutOff   error     // a helper ended while it opened the token
}

// launch is the start of a helper, for which several calls may wait.
type launch struct {
	done chan struct{} // closed once err is set, and the helper is gone if the HSM is closed
	err  error
}

const (
	// Pauses between starts of helpers that are of no use double from the first to
	// the longest.
	firstPause   = 100 * time.Millisecond
	longestPause = 10 * time.Second
	// stopTime is how long a helper may take to finish when it is not needed more.
	stopTime = 3 * time.Second
)

var errClosed = errors.New("hsm: used after Close")

// Open starts a helper, in which it does what [hsm.Open] does.
//
// If the module crashes or hangs inside the login, its PIN counts as refused, and no
// helper sends it again until [hsm.ClearLatch]: nobody knows what the token made of it.
func Open(ctx context.Context, cfg Config) (*HSM, error) {
	lock, err := prepare(ctx, &cfg)
	if err != nil {
		return nil, err
	}
	sessions := cfg.HSM.MaxSessions
	if sessions <= 0 { // 0 is the default, and package hsm refuses less
		sessions = defaultSessions
	}
	h := &HSM{cfg: cfg, lock: lock, slots: make(chan struct{}, sessions)}
	if _, err := h.helper(ctx); err != nil {
		h.Close()
		return nil, err
	}
	return h, nil
}

// Close lets the helper finish what it does and ends it. One that opens the token is waited
// for: this process may end next, and the helper with it, inside the login.
func (h *HSM) Close() {
	h.mu.Lock()
	closed, p, l := h.closed, h.process, h.launch
	h.closed = true
	h.mu.Unlock()
	if closed {
		return
	}
	if l != nil { // start sees that it is closed
		<-l.done
		return
	}
	if p != nil {
		p.stop(stopTime)
	}
	h.lock.Close()
}

// ask asks a helper, and once more if it ended by no fault of the question.
func (h *HSM) ask(ctx context.Context, q *frame) answer {
	a := h.once(ctx, q)
	if a.again && q.op != opSetRoot {
		a = h.once(ctx, q)
	}
	return a
}

func (h *HSM) once(ctx context.Context, q *frame) answer {
	if err := ctx.Err(); err != nil {
		return answer{err: fmt.Errorf("hsm: %s: %w", q.op, err)}
	}
	waiting, cancel := context.WithTimeout(ctx, h.cfg.deadline(opStart)+h.cfg.deadline(q.op))
	defer cancel()
	select {
	case h.slots <- struct{}{}:
	case <-waiting.Done():
		if ctx.Err() == nil {
			return answer{err: &hsm.Error{Class: hsm.ClassBusy, What: fmt.Sprintf("hsm: %s: %d calls are under way and none came to its end", q.op, cap(h.slots))}}
		}
		return answer{err: fmt.Errorf("hsm: %s: waiting for one of %d sessions: %w", q.op, cap(h.slots), ctx.Err())}
	}
	p, c, err := h.send(waiting, q)
	if err != nil {
		<-h.slots
		return answer{err: err}
	}
	select {
	case a := <-c.answer:
		return a
	case <-ctx.Done():
		p.leave(c)
		return answer{err: fmt.Errorf("hsm: %s: %w", q.op, ctx.Err())}
	}
}

// send asks a helper that takes questions.
func (h *HSM) send(ctx context.Context, q *frame) (*process, *call, error) {
	for {
		p, err := h.helper(ctx)
		if err != nil {
			return nil, nil, err
		}
		c, err := p.send(q, h.cfg.deadline(q.op), func() { <-h.slots })
		if !errors.Is(err, errEnding) {
			return p, c, err
		}
	}
}

// helper gives the helper, and starts one if there is none. There never are two: the
// next starts when nothing is left of the one before.
func (h *HSM) helper(ctx context.Context) (*process, error) {
	for {
		p, l, err := h.look()
		if err != nil {
			return nil, err
		}
		var wait <-chan struct{}
		switch {
		case l != nil:
			wait = l.done
		case p.alive():
			return p, nil
		default:
			wait = p.gone
		}
		select {
		case <-wait:
		case <-ctx.Done():
			return nil, fmt.Errorf("hsm: waiting for the PKCS#11 module to be started: %w", ctx.Err())
		}
		if l != nil && l.err != nil {
			return nil, l.err
		}
	}
}

// look gives the helper that is there or the launch that is under way, and begins one
// if there is neither.
func (h *HSM) look() (*process, *launch, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	switch {
	case h.closed:
		return nil, nil, errClosed
	case h.process != nil:
		return h.process, nil, nil
	case h.launch == nil && time.Now().Before(h.notUntil):
		return nil, nil, fmt.Errorf("hsm: not tried again before %s: %w", h.notUntil.Format(time.TimeOnly), h.reason)
	case h.launch == nil:
		h.launch = &launch{done: make(chan struct{})}
		go h.start(h.launch)
	}
	return nil, h.launch, nil
}

// start starts a helper. No caller's context ends it, for a login that is cut off
// counts as refused.
func (h *HSM) start(l *launch) {
	p, a := begin(context.Background(), &h.cfg, h.lock, opStart)
	h.mu.Lock()
	h.launch = nil
	l.err = a.err
	if h.closed {
		l.err = errors.Join(l.err, errClosed)
	} else if l.err == nil && !p.tell(func() { h.lost(p) }) {
		l.err = p.ended("")
	}
	if l.err == nil {
		h.process, h.cutOff = p, nil
		if h.name == "" {
			h.name = a.text
		}
	} else {
		l.err = h.useless(l.err)
	}
	closed := h.closed
	h.mu.Unlock()
	if closed {
		if p != nil {
			p.stop(stopTime)
		}
		h.lock.Close()
	}
	close(l.done)
}

// useless counts a helper that did not open the token. The caller holds mu.
func (h *HSM) useless(err error) error {
	switch c := hsm.ClassOf(err); {
	case c == hsm.ClassCrash || c == hsm.ClassHang:
		err = fmt.Errorf("%w; if this was inside the login, its PIN counts as refused", err)
		h.cutOff = err
	case errors.Is(err, pin.ErrRefused) && h.cutOff != nil:
		err = fmt.Errorf("%w; before that, %v", err, h.cutOff)
	}
	h.failures++
	h.pause(err)
	return err
}

// lost forgets a helper that ended. The next is started at once, unless this one was
// of no use, as the one before.
func (h *HSM) lost(p *process) {
	err := p.ended("")
	h.mu.Lock()
	closed := h.closed
	h.process = nil
	if p.useful() {
		h.failures = 0
	} else if h.failures++; h.failures > 1 {
		h.pause(err)
	}
	h.mu.Unlock()
	if !closed && h.cfg.Lost != nil {
		h.cfg.Lost(err)
	}
}

// pause makes the next start wait. The caller holds mu.
func (h *HSM) pause(err error) {
	h.reason = err
	h.notUntil = time.Now().Add(min(longestPause, firstPause<<min(h.failures-1, 10)))
}

// begin starts a helper and asks the first question. If the answer is an error, the
// helper is gone when begin returns, and p is nil.
func begin(ctx context.Context, cfg *Config, lock *os.File, o op) (*process, answer) {
	text, err := json.Marshal(cfg.HSM)
	if err != nil {
		return nil, answer{err: fmt.Errorf("hsm: %w", err)}
	}
	p, err := spawn(cfg, lock)
	if err != nil {
		return nil, answer{err: err}
	}
	var a answer
	c, err := p.send(&frame{op: o, text: string(text)}, cfg.deadline(o), func() {})
	if err != nil {
		a.err = err
	} else {
		stop := context.AfterFunc(ctx, func() { _ = p.write(&frame{id: c.id, op: opCancel}) })
		a = <-c.answer
		stop()
	}
	if a.err != nil {
		p.end()
		<-p.gone
		return nil, a
	}
	return p, a
}
