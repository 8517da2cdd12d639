package tpm

import (
	"bytes"
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/google/go-tpm/tpm2"

	"conseal/tpm/policy"
)

// Authority is the security team: its key, by which the TPM knows its policies, and
// where those are.
type Authority struct {
	policy.Host
	// Installed reads the policies that are there now. They need not be valid any more.
	Installed func() ([]*policy.Policy, error)
}

// authority is the rule that a signed policy must allow it.
type authority struct {
	Authority
	fingerprint string
	key         tpm2.TPMTPublic
	keyName     tpm2.TPM2BName
}

func newAuthority(a *Authority) (*authority, error) {
	public, err := policy.KeyPublic(a.Key)
	if err != nil {
		return nil, fmt.Errorf("tpm: policy key: %w", err)
	}
	name, err := tpm2.ObjectName(&public)
	if err != nil {
		return nil, err
	}
	fingerprint, err := policy.Fingerprint(a.Key)
	if err != nil {
		return nil, err
	}
	if a.Name == "" || a.Installed == nil || a.Counter>>24 != uint32(tpm2.TPMHTNVIndex) {
		return nil, fmt.Errorf("tpm: an authority for host %q with counter %#x and without what is installed", a.Name, a.Counter)
	}
	return &authority{*a, fingerprint, public, *name}, nil
}

func (a *authority) authPolicy() ([]byte, error) { return a.AuthPolicy() }

// prepare takes a policy that is valid in the present state.
func (a *authority) prepare(x *tx) (*way, error) {
	s, err := a.survey(x)
	if err != nil {
		return nil, err
	}
	if s.opens == nil {
		return nil, s.refusal()
	}
	return &way{s.opens.PIN, func(session tpm2.TPMHandle) error { return a.follow(x, s.opens, session) }}, nil
}

// follow runs a signed policy.
func (a *authority) follow(x *tx, p *policy.Policy, session tpm2.TPMHandle) error {
	state, notRevoked, err := p.Steps(&a.Host, session)
	if err != nil {
		return err
	}
	approval, err := p.Approval(&a.Host)
	if err != nil {
		return err
	}
	ticket, err := a.ticket(x, approval)
	if err != nil {
		return err
	}
	if _, err := run(x, state); err != nil {
		return err
	}
	if _, err := run(x, notRevoked); err != nil {
		return err
	}
	if p.PIN {
		if _, err := run(x, tpm2.PolicyAuthValue{PolicySession: session}); err != nil {
			return err
		}
	}
	return a.authorize(x, session, approval, ticket)
}

// explain looks again: a PCR or the counter changed in between.
func (a *authority) explain(x *tx, err error) error {
	s, readErr := a.survey(x)
	if readErr != nil {
		return errors.Join(err, readErr)
	}
	if s.opens == nil {
		return s.refusal()
	}
	return err
}

// ticket has the TPM check a signature; the ticket says that it did.
func (a *authority) ticket(x *tx, approval *policy.Approval) (tpm2.TPMTTKVerified, error) {
	var none tpm2.TPMTTKVerified
	// Under the owner: a ticket of the null hierarchy is void.
	loaded, err := run(x, tpm2.LoadExternal{InPublic: tpm2.New2B(a.key), Hierarchy: tpm2.TPMRHOwner})
	if err != nil {
		return none, err
	}
	defer x.flush(loaded.ObjectHandle)
	checked, err := run(x, tpm2.VerifySignature{
		KeyHandle: tpm2.NamedHandle{Handle: loaded.ObjectHandle, Name: a.keyName},
		Digest:    tpm2.TPM2BDigest{Buffer: approval.Digest},
		Signature: approval.Signature,
	})
	if err != nil {
		return none, fmt.Errorf("the TPM refuses the signature of a policy: %w", err)
	}
	return checked.Validation, nil
}

func (a *authority) authorize(x *tx, session tpm2.TPMHandle, approval *policy.Approval, ticket tpm2.TPMTTKVerified) error {
	_, err := run(x, tpm2.PolicyAuthorize{
		PolicySession:  session,
		ApprovedPolicy: tpm2.TPM2BDigest{Buffer: approval.Policy},
		PolicyRef:      tpm2.TPM2BDigest{Buffer: approval.Ref},
		KeySign:        a.keyName,
		CheckTicket:    ticket,
	})
	return err
}

// survey is which of the installed policies opens now, and why the others do not.
type survey struct {
	counter  uint64
	state    policy.State
	opens    *policy.Policy // nil: none
	verdicts []Verdict      // newest first
}

// Verdict is what a TPM makes of one installed policy in the present state.
type Verdict struct {
	Policy  *policy.Policy
	Revoked bool        // the counter is beyond its version
	NoPIN   bool        // it wants a PIN, and the host was initialised without
	Changed []PCRChange // PCRs that it wants otherwise
}

// Opens tells whether it allows to open.
func (v *Verdict) Opens() bool { return !v.Revoked && !v.NoPIN && len(v.Changed) == 0 }

func (a *authority) survey(x *tx) (*survey, error) {
	installed, err := a.Installed()
	if err != nil {
		return nil, fmt.Errorf("reading the seal policies: %w", err)
	}
	var s survey
	if s.counter, err = a.readCounter(x); err != nil {
		return nil, err
	}
	wanted := map[int]bool{}
	for _, p := range installed {
		for i := range p.State {
			wanted[i] = true
		}
	}
	if len(wanted) > 0 {
		if s.state, err = x.readPCRs(slices.Sorted(maps.Keys(wanted))); err != nil {
			return nil, err
		}
	}
	slices.SortFunc(installed, func(p, q *policy.Policy) int { return cmp.Compare(q.Version, p.Version) })
	for _, p := range installed {
		v := Verdict{p, p.Version < s.counter, p.PIN && x.pin == nil, changes(s.state, p.State)}
		s.verdicts = append(s.verdicts, v)
		if v.Opens() && (s.opens == nil || s.opens.PIN && !p.PIN) { // a policy without PIN spares the PIN
			s.opens = p
		}
	}
	return &s, nil
}

func (s *survey) refusal() error { return &PolicyError{s.counter, s.verdicts} }

// readCounter reads the counter, in a session that proves who answers.
func (a *authority) readCounter(x *tx) (uint64, error) {
	name, written, err := a.counterName(x)
	if err != nil {
		return 0, err
	}
	if !written {
		return 0, fail(ClassLost, "NV counter %#x was never counted up: provision again", a.Counter)
	}
	index := tpm2.TPMHandle(a.Counter)
	rsp, err := run(x, tpm2.NVRead{
		AuthHandle: tpm2.AuthHandle{Handle: index, Name: name, Auth: tpm2.PasswordAuth(nil)},
		NVIndex:    tpm2.NamedHandle{Handle: index, Name: name},
		Size:       8,
	}, x.srk.witness())
	if err != nil {
		return 0, err
	}
	if n := len(rsp.Data.Buffer); n != 8 {
		return 0, x.distrust("TPM2_NV_Read", fmt.Errorf("a counter of %d bytes", n))
	}
	return binary.BigEndian.Uint64(rsp.Data.Buffer), nil
}

// counterName is the name of the counter as we defined it.
func (a *authority) counterName(x *tx) (name tpm2.TPM2BName, written bool, err error) {
	found, err := x.readIndex(a.Counter)
	if err != nil {
		return name, false, err
	}
	if found == nil {
		return name, false, fail(ClassLost, "NV counter %#x is not defined any more: the TPM's owner removed it; provision again, "+
			"and look with `conseal seal status` which policies the counter has left behind then: have those signed anew", a.Counter)
	}
	ours, err := a.CounterPublic(found.Attributes.Written)
	if err != nil {
		return name, false, err
	}
	if !bytes.Equal(tpm2.Marshal(ours), tpm2.Marshal(*found)) {
		return name, false, fail(ClassLost, "NV index %#x is not the counter of this host and policy key: configure a free index, or the key that it was provisioned with", a.Counter)
	}
	n, err := tpm2.NVName(&ours)
	if err != nil {
		return name, false, err
	}
	return *n, found.Attributes.Written, nil
}

// provideCounter finds or makes the counter, and counts up once.
func (x *tx) provideCounter() (made bool, err error) {
	a := x.authority
	found, err := x.readIndex(a.Counter)
	if err != nil {
		return false, err
	}
	if found == nil {
		public, err := a.CounterPublic(false)
		if err != nil {
			return false, err
		}
		if _, err := run(x, tpm2.NVDefineSpace{AuthHandle: tpm2.TPMRHOwner, PublicInfo: tpm2.New2B(public)}); err != nil {
			return false, fmt.Errorf("defining NV counter %#x: %w", a.Counter, err)
		}
	}
	_, written, err := a.counterName(x)
	if err != nil || written {
		return false, err
	}
	err = a.countUp(x, func(session tpm2.TPMHandle) error {
		if _, err := run(x, tpm2.PolicyNVWritten{PolicySession: session, WrittenSet: false}); err != nil {
			return err
		}
		_, err := run(x, tpm2.PolicyCommandCode{PolicySession: session, Code: tpm2.TPMCCNVIncrement})
		return err
	})
	if err != nil {
		return false, err
	}
	_, err = a.readCounter(x)
	return true, err
}

// countUp increments the counter by one of its branches.
func (a *authority) countUp(x *tx, branch func(session tpm2.TPMHandle) error) error {
	branches, err := a.CounterBranches()
	if err != nil {
		return err
	}
	name, _, err := a.counterName(x)
	if err != nil {
		return err
	}
	s, _, err := tpm2.PolicySession(x, tpm2.TPMAlgSHA256, 16)
	if err != nil {
		return x.explain("TPM2_StartAuthSession", err)
	}
	defer x.flush(s.Handle())
	if err := branch(s.Handle()); err != nil {
		return err
	}
	if _, err := run(x, tpm2.PolicyOr{PolicySession: s.Handle(), PHashList: branches}); err != nil {
		return err
	}
	index := tpm2.TPMHandle(a.Counter)
	_, err = run(x, tpm2.NVIncrement{
		AuthHandle: tpm2.AuthHandle{Handle: index, Name: name, Auth: s},
		NVIndex:    tpm2.NamedHandle{Handle: index, Name: name},
	})
	return err
}

// Revoke ends all policies below r.Below, for good, and returns the counter's value. It
// may be called again, also after a crash in the middle.
func (t *TPM) Revoke(ctx context.Context, r *policy.Revocation) (counter uint64, err error) {
	err = t.transact(ctx, fmt.Sprintf("revoking seal policies below version %d", r.Below), func(x *tx) error {
		counter, err = x.revoke(r)
		return err
	})
	return counter, err
}

func (x *tx) revoke(r *policy.Revocation) (uint64, error) {
	a := x.authority
	if a == nil {
		return 0, errors.New("this host is configured without a policy key")
	}
	if r.Host != a.Name || r.Counter != a.Counter {
		return 0, fmt.Errorf("the revocation is for host %q with counter %#x; this is %q with %#x", r.Host, r.Counter, a.Name, a.Counter)
	}
	counter, err := a.readCounter(x)
	if err != nil {
		return 0, err
	}
	if r.Below > counter && r.Below-counter > policy.MaxSteps {
		return counter, fmt.Errorf("it is %d steps from version %d to %d, more than %d: is the number right?", r.Below-counter, counter, r.Below, policy.MaxSteps)
	}
	approval, err := r.Approval(&a.Host)
	if err != nil {
		return counter, err
	}
	for counter < r.Below {
		err := a.countUp(x, func(session tpm2.TPMHandle) error {
			below, countUp, err := r.Steps(&a.Host, session)
			if err != nil {
				return err
			}
			ticket, err := a.ticket(x, approval)
			if err != nil {
				return err
			}
			if _, err := run(x, below); err != nil {
				return err
			}
			if _, err := run(x, countUp); err != nil {
				return err
			}
			return a.authorize(x, session, approval, ticket)
		})
		if err != nil {
			return counter, err
		}
		before := counter
		if counter, err = a.readCounter(x); err != nil {
			return counter, err
		}
		if counter <= before {
			return counter, x.distrust("TPM2_NV_Increment", fmt.Errorf("the counter is still at %d", counter))
		}
	}
	return counter, nil
}

// Measure reads the state of the host, for the security team.
func (t *TPM) Measure(ctx context.Context) (*policy.Measurement, error) {
	var m *policy.Measurement
	err := t.transact(ctx, "measuring", func(x *tx) (err error) {
		m, err = x.measure()
		return err
	})
	return m, err
}

func (x *tx) measure() (*policy.Measurement, error) {
	a := x.authority
	if a == nil {
		return nil, errors.New("this host is configured without a policy key")
	}
	s, err := a.survey(x)
	if err != nil {
		return nil, err
	}
	var all []int
	for i := range policy.LastPCR + 1 {
		all = append(all, i)
	}
	m := &policy.Measurement{
		Host: a.Name, Counter: a.Counter, Revoked: s.counter, Next: s.counter, Key: a.fingerprint,
		Taken: time.Now().UTC().Truncate(time.Second), Selected: x.cfg.PCRs, PIN: x.pin != nil,
	}
	for _, v := range s.verdicts {
		m.Next = max(m.Next, v.Policy.Version+1)
	}
	m.PCRs, err = x.readPCRs(all)
	return m, err
}

// Verdicts says of each installed policy, newest first, whether it opens now.
func (t *TPM) Verdicts(ctx context.Context) (counter uint64, verdicts []Verdict, err error) {
	err = t.transact(ctx, "judging the seal policies", func(x *tx) error {
		if x.authority == nil {
			return errors.New("this host is configured without a policy key")
		}
		s, err := x.authority.survey(x)
		if err == nil {
			counter, verdicts = s.counter, s.verdicts
		}
		return err
	})
	return counter, verdicts, err
}
