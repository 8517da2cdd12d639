//go:build cgo

package hsm

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"
	"unsafe"

	"github.com/miekg/pkcs11"

	"conseal/internal/pin"
	"conseal/internal/secret"
)

// HSM is a host's part of a token: it seals shares' keys, keeps the root and
// signs as the host. Make it with [Open] and end it with Close. Its methods may
// be called by several goroutines.
//
// A context is honoured while waiting for a session and between calls. A call
// into the vendor's library cannot be interrupted: if it hangs, its goroutine
// and one session hang with it.
type HSM struct {
	cfg    Config
	uri    *URI
	pin    pin.Source
	kept   *secret.Bytes // the PIN of a source that can be read once; else nil
	mod    *module
	method *method
	wrap   keyID     // of the wrapping key, from Open on
	signer *identity // of a method that is signed, from Open on

	slots chan struct{} // holds one element for each operation under way
	done  chan struct{} // closed by Close

	rootMu sync.Mutex // one Root or SetRoot at a time

	mu      sync.Mutex  // guards what follows; taken after mod.mu, never before
	conn    *connection // nil: connect at the next operation
	wait    time.Time   // the token was gone: do not look for it before this
	waitErr error       // and say this meanwhile
	closed  bool
}

// connection is one login on one token. Handles in it are void once the module
// is in another epoch.
type connection struct {
	epoch  uint64
	slot   uint
	info   pkcs11.TokenInfo
	anchor pkcs11.SessionHandle   // keeps the login while no operation is under way
	idle   []pkcs11.SessionHandle // that saw no error; guarded by HSM.mu
}

// session is a session lent to one operation.
type session struct {
	p      *pkcs11.Ctx
	h      pkcs11.SessionHandle
	slot   uint
	cfg    *Config
	asks   bool // the token asks for a login before it shows private objects
	method *method
}

// tokenPause is how long a lost token is left alone: looking for it restarts the
// module, which everybody in the process would feel.
const tokenPause = 250 * time.Millisecond

// busyPause is how long a token that is out of sessions or memory gets to recover.
const busyPause = 20 * time.Millisecond

var errClosed = errors.New("hsm: used after Close")

// Open logs in to a host's token, which [Provision] has prepared, and checks that
// the host's keys are there, cannot leave the token and work.
//
// A PIN that the token refuses is sent once and never again, by any process, until
// it changes or [ClearLatch] is called; a crash during the login counts as a refusal,
// for nobody knows what the token made of it. A login that another part of this process
// already made is used, whatever the PIN.
func Open(ctx context.Context, cfg Config) (*HSM, error) {
	h, err := connect(ctx, cfg)
	if err != nil {
		return nil, err
	}
	err = h.do(ctx, func(s *session) error { return s.sentinel() })
	if err == nil {
		h.wrap, err = h.checkWrap(ctx)
	}
	if err != nil {
		h.Close()
		return nil, fmt.Errorf("hsm: opening %s: %w", h.Name(), err)
	}
	return h, nil
}

// connect gives a logged-in HSM whose objects were not looked at.
func connect(ctx context.Context, cfg Config) (*HSM, error) {
	uri, err := cfg.validate()
	if err != nil {
		return nil, err
	}
	source, err := cfg.pinSource(uri)
	if err != nil {
		return nil, fmt.Errorf("hsm: %w", err)
	}
	mod, err := loadModule(uri.ModulePath, cfg.Modules, cfg.InitArgs)
	if err != nil {
		return nil, err
	}
	h := &HSM{cfg: cfg, uri: uri, pin: source, mod: mod, method: methodOf(cmp.Or(cfg.Method, DefaultMethod)), done: make(chan struct{}), slots: make(chan struct{}, 1)}
	if source.Once() {
		if h.kept, err = source.Read(); err != nil {
			return nil, fmt.Errorf("hsm: %w", err)
		}
	}
	var info pkcs11.TokenInfo
	err = h.do(ctx, func(*session) error {
		h.mu.Lock()
		defer h.mu.Unlock()
		info = h.conn.info
		return nil
	})
	if err != nil {
		h.Close()
		return nil, fmt.Errorf("hsm: connecting to %s: %w", h.Name(), err)
	}
	h.slots = make(chan struct{}, sessionLimit(cfg, info)) // nobody else has h yet
	return h, nil
}

// sessionLimit leaves one of the token's sessions to the anchor.
func sessionLimit(cfg Config, info pkcs11.TokenInfo) int {
	limit := cfg.MaxSessions
	if limit == 0 {
		limit = maxSessions
	}
	for _, most := range []uint{info.MaxSessionCount, info.MaxRwSessionCount} {
		if most != pkcs11.CK_EFFECTIVELY_INFINITE && most != pkcs11.CK_UNAVAILABLE_INFORMATION && most <= uint(limit) {
			limit = int(most) - 1
		}
	}
	return max(limit, 1)
}

// Close waits for operations under way, closes the sessions and forgets the
// PIN. The login ends with the last session that this process has on the token.
func (h *HSM) Close() {
	h.mu.Lock()
	closed := h.closed
	h.closed = true
	h.mu.Unlock()
	if closed {
		return
	}
	close(h.done)
	for range cap(h.slots) {
		h.slots <- struct{}{}
	}
	h.mu.Lock()
	c := h.conn
	h.mu.Unlock()
	h.drop(c)
	h.kept.Wipe()
}

// aside runs fn with one more session: after an error in it, s is as it was. Objects of
// the session s can be used there.
func (s *session) aside(fn func(*session) error) error {
	sh, err := s.p.OpenSession(s.slot, pkcs11.CKF_SERIAL_SESSION|pkcs11.CKF_RW_SESSION)
	if err != nil {
		return failed("C_OpenSession", err)
	}
	other := *s
	other.h = sh
	err = fn(&other)
	_ = s.p.CloseSession(sh) // whatever it says, what fn did is done
	return err
}

// do runs fn with a session of its own. If the session, the login or a handle
// was lost, or the token is gone or busy, it repairs that and runs fn once more: fn
// must do the same thing when it runs twice.
func (h *HSM) do(ctx context.Context, fn func(*session) error) error {
	return h.perform(ctx, fn, h.mod.mu.RLocker())
}

// change is do for an fn that makes or destroys objects: while it runs, nothing else
// in the process uses the module. SoftHSM fails with CKR_GENERAL_ERROR when one thread
// reads the list of objects while another one writes it.
func (h *HSM) change(ctx context.Context, fn func(*session) error) error {
	return h.perform(ctx, fn, &h.mod.mu)
}

func (h *HSM) perform(ctx context.Context, fn func(*session) error, module sync.Locker) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	select {
	case <-h.done:
		return errClosed
	case <-ctx.Done():
		return fmt.Errorf("waiting for one of %d sessions: %w", cap(h.slots), ctx.Err())
	case h.slots <- struct{}{}:
	}
	defer func() { <-h.slots }()
	if err := h.paused(); err != nil {
		return err
	}
	a := h.once(fn, module)
	if a.err == nil || !h.repair(ctx, &a) {
		return a.err
	}
	a = h.once(fn, module)
	switch ClassOf(a.err) {
	case ClassToken:
		h.pause(a.err)
		fallthrough
	case ClassSession, ClassLogin:
		h.drop(a.conn)
	}
	return a.err
}

// attempt is how one run of an operation went.
type attempt struct {
	conn  *connection // nil if there was none
	epoch uint64      // of the module
	err   error
}

func (h *HSM) once(fn func(*session) error, module sync.Locker) attempt {
	module.Lock()
	defer module.Unlock()
	conn, sh, err := h.borrow()
	if err == nil {
		err = fn(&session{h.mod.p, sh, conn.slot, &h.cfg, conn.info.Flags&pkcs11.CKF_LOGIN_REQUIRED != 0, h.method})
		h.giveBack(conn, sh, err)
	}
	return attempt{conn, h.mod.epoch, err}
}

// repair tells whether another try makes sense, and prepares it.
func (h *HSM) repair(ctx context.Context, a *attempt) bool {
	switch ClassOf(a.err) {
	case ClassBusy:
		select {
		case <-ctx.Done():
			return false
		case <-time.After(busyPause):
			return true
		}
	case ClassSession, ClassLogin, ClassHandle: // an object of a session that was lost is a bad handle
		h.drop(a.conn)
		return true
	case ClassToken:
		h.drop(a.conn)
		err := h.mod.restart(a.epoch)
		if err != nil {
			a.err = fmt.Errorf("%w; and starting the module again: %w", a.err, err)
		}
		return err == nil
	}
	return false
}

func (h *HSM) paused() error {
	h.mu.Lock()
	defer h.mu.Unlock()
	select {
	case <-h.done: // Close may have won the race for the slot
		return errClosed
	default:
	}
	if time.Now().Before(h.wait) {
		return h.waitErr
	}
	return nil
}

func (h *HSM) pause(err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.wait, h.waitErr = time.Now().Add(tokenPause), err
}

// borrow gives an idle session or a new one, and connects first if need be. The
// caller holds mod.mu until it has given the session back.
func (h *HSM) borrow() (*connection, pkcs11.SessionHandle, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.conn == nil || h.conn.epoch != h.mod.epoch {
		c, err := h.dial()
		if err != nil {
			return nil, 0, err
		}
		h.conn = c
	}
	if n := len(h.conn.idle); n > 0 {
		sh := h.conn.idle[n-1]
		h.conn.idle = h.conn.idle[:n-1]
		return h.conn, sh, nil
	}
	sh, err := h.mod.openSession(h.conn.slot)
	return h.conn, sh, err
}

// giveBack keeps a session that saw no error. Any other may have an operation
// active on it, and is closed.
func (h *HSM) giveBack(c *connection, sh pkcs11.SessionHandle, err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if err == nil && h.conn == c {
		c.idle = append(c.idle, sh)
		return
	}
	_ = h.mod.p.CloseSession(sh) // it may be gone already
}

// drop closes a connection's idle sessions, so that the next operation makes a
// new connection. Operations under way on it end by themselves.
func (h *HSM) drop(c *connection) {
	h.mod.mu.RLock()
	defer h.mod.mu.RUnlock()
	h.mu.Lock()
	defer h.mu.Unlock()
	if c == nil || h.conn != c {
		return
	}
	h.conn = nil
	if c.epoch != h.mod.epoch {
		return // its handles may be somebody else's by now
	}
	for _, sh := range append(c.idle, c.anchor) {
		_ = h.mod.p.CloseSession(sh) // it may be gone already
	}
}

func (m *module) openSession(slot uint) (pkcs11.SessionHandle, error) {
	sh, err := m.p.OpenSession(slot, pkcs11.CKF_SERIAL_SESSION|pkcs11.CKF_RW_SESSION)
	return sh, failed("C_OpenSession", err)
}

// dial makes a connection. The caller holds mu and mod.mu.
func (h *HSM) dial() (*connection, error) {
	slot, info, err := h.mod.findToken(h.uri)
	if err != nil {
		return nil, err
	}
	anchor, err := h.mod.openSession(slot)
	if err != nil {
		return nil, err
	}
	if err := h.logIn(anchor, slot); err != nil {
		_ = h.mod.p.CloseSession(anchor)
		return nil, err
	}
	return &connection{epoch: h.mod.epoch, slot: slot, info: info, anchor: anchor}, nil
}

// findToken finds the one token that the URI selects. Slot numbers and their
// order change, so that every token is looked at.
func (m *module) findToken(uri *URI) (slot uint, info pkcs11.TokenInfo, err error) {
	slots, err := m.p.GetSlotList(true)
	if err != nil {
		return 0, info, failed("C_GetSlotList", err)
	}
	found := 0
	mute := "" // why a slot did not say what is in it
	for _, s := range slots {
		ti, err := m.p.GetTokenInfo(s)
		if err != nil { // one bad slot must not hide the others
			mute = fmt.Sprintf("; C_GetTokenInfo of slot %d: %v", s, err)
			continue
		}
		if !matches(uri, s, ti) {
			continue
		}
		slot, info = s, ti
		found++
	}
	switch found {
	case 0:
		return 0, info, &Error{Class: ClassToken, What: fmt.Sprintf("no token matches %s in %d slots of %s%s", uri.path(), len(slots), m.path, mute)}
	case 1:
		return slot, info, nil
	}
	return 0, info, fmt.Errorf("%d tokens match %s: add serial= to the URI", found, uri.path())
}

func matches(u *URI, slot uint, ti pkcs11.TokenInfo) bool {
	same := func(want, got string) bool {
		return want == "" || want == strings.TrimRight(got, " \x00") // padded by blanks, by some with NULs
	}
	return ti.Flags&pkcs11.CKF_TOKEN_INITIALIZED != 0 && (u.SlotID == nil || *u.SlotID == slot) &&
		same(u.Token, ti.Label) && same(u.Serial, ti.SerialNumber) &&
		same(u.Manufacturer, ti.ManufacturerID) && same(u.Model, ti.Model)
}

// logIn logs in unless this process already is, and sends no PIN that the token
// has refused before nor one whose refusal would lock the token.
func (h *HSM) logIn(sh pkcs11.SessionHandle, slot uint) error {
	si, err := h.mod.p.GetSessionInfo(sh)
	if err != nil {
		return failed("C_GetSessionInfo", err)
	}
	info, err := h.mod.p.GetTokenInfo(slot) // the flags of this moment
	if err != nil {                         // whatever the reason, a token that cannot say what it is is away
		return &Error{Class: ClassToken, What: fmt.Sprintf("C_GetTokenInfo: %v", err)}
	}
	if si.State == pkcs11.CKS_RW_USER_FUNCTIONS || info.Flags&pkcs11.CKF_LOGIN_REQUIRED == 0 {
		return nil // a login belongs to the whole process
	}
	if err := mayTry(info.Flags); err != nil {
		return err
	}
	value := h.kept
	if value == nil {
		if value, err = h.pin.Read(); err != nil {
			return err
		}
		defer value.Wipe()
	}
	return h.sendPIN(sh, value)
}

// mayTry refuses to send a PIN to a token that is locked or would lock.
func mayTry(flags uint) error {
	switch {
	case flags&pkcs11.CKF_USER_PIN_LOCKED != 0:
		return &Error{Class: ClassAuth, What: "the token's user PIN is locked: unlock it with the security officer's PIN"}
	case flags&pkcs11.CKF_USER_PIN_FINAL_TRY != 0:
		return &Error{Class: ClassAuth, What: "one more wrong PIN locks the token: log in once with the vendor's own tool, then start again"}
	}
	return nil
}

// sendPIN enters the PIN in the latch, sends it, and takes it out if the token
// accepted it or never judged it.
func (h *HSM) sendPIN(sh pkcs11.SessionHandle, value *secret.Bytes) error {
	l := latch(h.cfg.StateDir)
	if err := l.Arm(value); err != nil {
		return err
	}
	err := h.mod.logIn(sh, pkcs11.CKU_USER, value)
	var rv pkcs11.Error
	switch errors.As(err, &rv); {
	case err == nil:
		return l.Accepted()
	case rv == pkcs11.CKR_USER_ALREADY_LOGGED_IN: // somebody else was faster
		return l.Disarm()
	// It was so before the call. CKR_SESSION_CLOSED and CKR_DEVICE_REMOVED came to be during it
	// (PKCS#11 v2.40 section 5.1), and the PIN may have been judged.
	case rv == pkcs11.CKR_SESSION_HANDLE_INVALID, rv == pkcs11.CKR_TOKEN_NOT_PRESENT,
		rv == pkcs11.CKR_CRYPTOKI_NOT_INITIALIZED, rv == pkcs11.CKR_USER_ANOTHER_ALREADY_LOGGED_IN:
		return errors.Join(failed("C_Login", err), l.Disarm())
	case rv == pkcs11.CKR_PIN_LOCKED:
		return fmt.Errorf("%w, which is locked (C_Login: %w): unlock it with the security officer's PIN", pin.ErrRefused, err)
	}
	return fmt.Errorf("%w from %s (C_Login: %w): put the right PIN there; this one is not sent again", pin.ErrRefused, h.pin, err)
}

// logIn sends the PIN.
func (m *module) logIn(sh pkcs11.SessionHandle, user uint, value *secret.Bytes) error {
	return value.Use(func(b []byte) error {
		// No copy in Go's heap. The binding's own copy in C's is not wiped.
		return m.p.Login(sh, user, unsafe.String(unsafe.SliceData(b), len(b)))
	})
}
