// Package tpm guards a host's shares with its TPM 2.0: keys that open only in
// the measured state in which they were sealed, one erasable root in NV memory,
// and an identity key that cannot leave the chip.
//
// Call [Provision] once for a host and keep what it returns; [Open] then gives a
// [TPM], which seals, opens and keeps the root, and whose [TPM.Identity] signs.
//
// What it relies on: the storage root key (SRK) is known by its name, so that a
// TPM that was cleared, replaced or is played by something on the bus is refused;
// whatever is secret crosses the bus in a session salted to that key. What it does
// not give: root on the running host, in a permitted state, can do all that the
// agent can, and so can who sends commands of its own over the bus meanwhile, without a
// PIN; what plays the TPM when the host is provisioned is taken for it; a PCR value says what was measured, not that it was good; refusals of
// a TPM are not authenticated, so that something on the bus can deny service and
// can claim that there is no root yet; and go-tpm's own buffers are not wiped.
package tpm

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/google/go-tpm/tpm2"

	"conseal/tpm/policy"
)

const (
	// DefaultTimeout is for one command. Slow TPMs take seconds to make a key.
	DefaultTimeout = 30 * time.Second
	// DefaultNVRoot is the NV index of the root, in the owner's range: TCG
	// Registry of Reserved TPM 2.0 Handles and Localities.
	DefaultNVRoot = 0x01800600
	// DefaultNVReceipts is the NV index of the counter of receipts, also there.
	DefaultNVReceipts = 0x01800602
	// DefaultSRKHandle keeps the SRK if [StandardSRKHandle] has another's key.
	DefaultSRKHandle = 0x81000600
	// StandardSRKHandle is where the storage root key is kept by convention: TCG
	// TPM v2.0 Provisioning Guidance.
	StandardSRKHandle = 0x81000001
)

// Config says which TPM and what of it is ours. Two agents can share a TPM if
// their NV indices differ.
type Config struct {
	// Device is "device:/dev/tpmrm0" (the kernel's resource manager), or
	// "unix:PATH" or "tcp:HOST:PORT" for a TPM that nobody else uses meanwhile
	// (that of a virtual machine, swtpm).
	Device string
	// Timeout bounds one command, and for how long one is tried again that the TPM says it
	// did not start; zero is [DefaultTimeout].
	Timeout time.Duration
	// PCRs (0 to 23, but 16 and 23, which any process may reset) of the SHA-256 bank
	// that state the host's condition. At least one.
	PCRs []int
	// NVRoot is the NV index of the root; zero is [DefaultNVRoot].
	NVRoot uint32
	// NVReceipts is the NV index of the counter of receipts; zero is [DefaultNVReceipts].
	NVReceipts uint32
	// SRKHandle is the persistent handle for the SRK if the standard one has
	// another's key, which is never evicted; zero is [DefaultSRKHandle].
	SRKHandle uint32

	// Authority, if set, signs policies that say in which states the host may open
	// what is sealed; else that is the state in which it was provisioned.
	Authority *Authority

	// PINSource, if set, says where the host's PIN is, 6 to 32 bytes: "file:/path", "fd:N" or
	// "cred:NAME". The root and what is sealed then open with it only, or by a signed
	// policy that does not want it. It cannot be changed once the host was provisioned.
	PINSource string
	// StateDir is a folder (0700) in which refused PINs are remembered; wanted with a PIN.
	StateDir string

	// SRKName, PCRWanted and Identity are what [Provision] returned. Open needs
	// the first two, the second without an Authority. Provision makes what is nil, and holds the TPM to the rest.
	SRKName   []byte
	PCRWanted map[int][]byte
	Identity  []byte
}

// TPM is a provisioned TPM. It satisfies the vault's Protector. Its methods may be
// called by several goroutines: each is one transaction, one after the other. The
// deadline of a context bounds waiting and transaction; its cancellation is noticed
// while waiting and between two commands. After a time-out or a cut the next call
// connects anew.
type TPM struct {
	cfg    Config // checked, with defaults filled in; not changed afterwards
	addr   address
	wanted policy.State // of the NV root without an authority

	authority *authority
	pin       *hostPIN // nil: the host has none; used by who has the turn
	rule      rule     // of the NV root; nil if it is not known yet

	turn   chan struct{} // one slot; who filled it owns what follows
	conn   *conn         // nil: dialled by the next transaction
	srk    *srk          // as verified on conn; nil: not yet
	closed bool
}

// ErrClosed is returned by every method after [TPM.Close].
var ErrClosed = errors.New("tpm: closed")

// Open connects to a TPM that was provisioned and checks it: that the SHA-256
// bank measures the PCRs, that the SRK is the one with cfg.SRKName, and that the
// NV index of the root is as it was defined. ctx bounds this call only.
func Open(ctx context.Context, cfg Config) (*TPM, error) {
	t, err := newTPM(cfg)
	if err != nil {
		return nil, err
	}
	if len(cfg.SRKName) == 0 || t.rule == nil {
		return nil, errors.New("tpm: the SRK's name and the PCR values of the root are not known: provision the TPM and keep what that returns")
	}
	err = t.transact(ctx, "opening", func(x *tx) error {
		if err := x.checkBank(t.cfg.PCRs); err != nil {
			return err
		}
		_, err := x.rootName()
		return err
	})
	if err != nil {
		return nil, errors.Join(err, t.hangUp())
	}
	return t, nil
}

// newTPM checks cfg and fills in defaults.
func newTPM(cfg Config) (*TPM, error) {
	addr, err := parseAddress(cfg.Device)
	if err != nil {
		return nil, err
	}
	cfg.Timeout = cmp.Or(cfg.Timeout, DefaultTimeout)
	cfg.NVRoot = cmp.Or(cfg.NVRoot, DefaultNVRoot)
	cfg.NVReceipts = cmp.Or(cfg.NVReceipts, DefaultNVReceipts)
	cfg.SRKHandle = cmp.Or(cfg.SRKHandle, DefaultSRKHandle)
	cfg.SRKName = bytes.Clone(cfg.SRKName)
	cfg.PCRs = slices.Clone(cfg.PCRs)
	slices.Sort(cfg.PCRs)
	if err := checkPCRs(cfg.PCRs); err != nil {
		return nil, err
	}
	if err := cfg.checkIndices(); err != nil {
		return nil, err
	}
	wanted, err := parseWanted(cfg.PCRWanted, cfg.PCRs)
	switch {
	case err != nil:
		return nil, err
	case cfg.Timeout < 0:
		return nil, fmt.Errorf("tpm: time-out %v is negative", cfg.Timeout)
	case cfg.SRKHandle < 0x81000000 || cfg.SRKHandle > 0x817fffff:
		return nil, fmt.Errorf("tpm: %#x is not a persistent handle of the owner: those are 0x81000000 to 0x817fffff", cfg.SRKHandle)
	}
	t := &TPM{cfg: cfg, addr: addr, wanted: wanted, turn: make(chan struct{}, 1)}
	if t.pin, err = newHostPIN(cfg.PINSource, cfg.StateDir); err != nil {
		return nil, err
	}
	switch {
	case cfg.Authority != nil:
		if t.authority, err = newAuthority(cfg.Authority); err != nil {
			return nil, err
		}
		t.rule = t.authority
	case wanted != nil:
		t.rule = fixed{wanted, t.pin != nil}
	}
	return t, nil
}

// Name says which TPM it is: "tpm device:/dev/tpmrm0".
func (t *TPM) Name() string { return "tpm " + t.cfg.Device }

// Kind is "tpm".
func (t *TPM) Kind() string { return "tpm" }

// Close waits for the transaction under way, tells the TPM to save its state
// (TPM2_Shutdown; where the kernel manages it, the kernel does that) and hangs up.
func (t *TPM) Close(ctx context.Context) error {
	release, err := t.acquire(ctx)
	if errors.Is(err, ErrClosed) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("%s: closing: %w", t.Name(), err)
	}
	defer release()
	t.closed = true
	t.pin.close()
	if t.conn != nil && !t.addr.managed() {
		_, err = run(t.newTx(ctx), tpm2.Shutdown{ShutdownType: tpm2.TPMSUClear})
	}
	return errors.Join(err, t.hangUp())
}

// tx is one transaction: commands between which nobody else's come.
type tx struct {
	*TPM
	ctx     context.Context // bounds the transaction
	answers [][]byte        // go-tpm decrypts in them; wiped at the end
}

func (t *TPM) newTx(ctx context.Context) *tx { return &tx{TPM: t, ctx: ctx} }

// transact runs fn as one transaction with a verified SRK. Waiting for its turn
// counts into ctx. Errors say which TPM and what failed.
func (t *TPM) transact(ctx context.Context, what string, fn func(*tx) error) error {
	release, err := t.acquire(ctx)
	if err == nil {
		defer release()
		err = t.verified(ctx, fn)
	}
	if err != nil {
		return fmt.Errorf("%s: %s: %w", t.Name(), what, err)
	}
	return nil
}

// acquire takes the turn; release gives it back.
func (t *TPM) acquire(ctx context.Context) (release func(), err error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	select {
	case t.turn <- struct{}{}:
	case <-ctx.Done():
		return nil, fmt.Errorf("waiting for other uses of the TPM: %w", ctx.Err())
	}
	release = func() { <-t.turn }
	if t.closed {
		release()
		return nil, ErrClosed
	}
	return release, nil
}

// verified is attempt once the SRK is known to be the pinned one.
func (t *TPM) verified(ctx context.Context, fn func(*tx) error) error {
	return t.attempt(ctx, func(x *tx) error {
		if err := x.verifySRK(); err != nil {
			return err
		}
		return fn(x)
	})
}

// attempt runs fn on the connection, which it dials if there is none, and drops
// if it can no longer be trusted. The turn is held.
func (t *TPM) attempt(ctx context.Context, fn func(*tx) error) error {
	x := t.newTx(ctx)
	defer x.wipe()
	if t.conn == nil {
		if err := x.connect(); err != nil {
			return errors.Join(err, t.hangUp())
		}
	}
	err := fn(x)
	if t.conn.broken || ClassOf(err) == ClassReset || ClassOf(err) == ClassLost {
		_ = t.hangUp() // err says more
	}
	return err
}

// connect dials. A TPM without a resource manager may still hold what a former
// client left; with one, what it lists may be others'.
func (x *tx) connect() error {
	c, err := dial(x.ctx, x.addr, x.cfg.Timeout)
	if err != nil {
		return err
	}
	x.conn = c
	if x.addr.managed() {
		return nil
	}
	return x.flushStale()
}

// hangUp drops the connection and what was known about its other end. The turn
// is held, or t is not shared yet.
func (t *TPM) hangUp() error {
	c := t.conn
	t.conn, t.srk = nil, nil
	if c == nil {
		return nil
	}
	return c.s.Close()
}

func (x *tx) wipe() {
	for _, a := range x.answers {
		clear(a)
	}
}

// flushStale frees all transient objects and sessions.
func (x *tx) flushStale() error {
	for _, kind := range []tpm2.TPMHT{tpm2.TPMHTTransient, tpm2.TPMHTHMACSession, tpm2.TPMHTPolicySession} {
		for more := true; more; {
			rsp, err := run(x, tpm2.GetCapability{Capability: tpm2.TPMCapHandles, Property: uint32(kind) << 24, PropertyCount: 64})
			if err != nil {
				return err
			}
			list, err := rsp.CapabilityData.Data.Handles()
			if err != nil {
				return x.distrust("TPM2_GetCapability", err)
			}
			for _, h := range list.Handle {
				if _, err := run(x, tpm2.FlushContext{FlushHandle: h}); err != nil {
					return fmt.Errorf("freeing handle %#x that a former client left: %w", uint32(h), err)
				}
			}
			more = bool(rsp.MoreData) && len(list.Handle) > 0
		}
	}
	return nil
}

// flush frees a handle of ours. If that fails, dropping the connection does it:
// by the resource manager, or by the next connect.
func (x *tx) flush(h tpm2.TPMHandle) {
	if _, err := run(x, tpm2.FlushContext{FlushHandle: h}); err != nil {
		x.conn.broken = true
	}
}
