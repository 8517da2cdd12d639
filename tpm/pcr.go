package tpm

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"slices"

	"github.com/google/go-tpm/tpm2"

	"conseal/tpm/policy"
)

// checkPCRs wants a sorted list.
func checkPCRs(indices []int) error {
	if len(indices) == 0 {
		return errors.New("tpm: no PCRs given: what is sealed would open in any state of the host; give at least one, as 7 for secure boot")
	}
	for i, n := range indices {
		if n < 0 || n > policy.LastPCR {
			return fmt.Errorf("tpm: PCR %d does not exist: they are 0 to %d", n, policy.LastPCR)
		}
		if n == 16 || n == 23 {
			return fmt.Errorf("tpm: PCR %d can be reset by any process: it says nothing", n)
		}
		if i > 0 && indices[i-1] == n {
			return fmt.Errorf("tpm: PCR %d is given twice", n)
		}
	}
	return nil
}

// parseWanted takes the values over from a Config; nil for nil.
func parseWanted(wanted map[int][]byte, indices []int) (policy.State, error) {
	if len(wanted) == 0 {
		return nil, nil
	}
	set := policy.State{}
	for n, v := range wanted {
		if len(v) != sha256.Size {
			return nil, fmt.Errorf("tpm: the value wanted of PCR %d has %d bytes, not %d", n, len(v), sha256.Size)
		}
		set[n] = bytes.Clone(v)
	}
	if got := set.Indices(); !slices.Equal(got, indices) {
		return nil, fmt.Errorf("tpm: PCRs %v are configured and the root was made under PCRs %v: use those, or provision anew", indices, got)
	}
	return set, nil
}

// rule is a policy under which the TPM opens what is ours.
type rule interface {
	// authPolicy is its digest.
	authPolicy() ([]byte, error)
	// prepare finds a way to satisfy it in the present state.
	prepare(x *tx) (*way, error)
	// explain says why it was refused with err.
	explain(x *tx, err error) error
}

// way is a way to satisfy a rule.
type way struct {
	pin   bool                               // the session needs the host's PIN
	steps func(session tpm2.TPMHandle) error // runs the policy in a session
}

// fixed is the rule of what opens in one measured state only, and with the host's PIN
// if it has one.
type fixed struct {
	state policy.State
	pin   bool
}

func (f fixed) authPolicy() ([]byte, error) { return f.state.AuthPolicy(f.pin) }

func (f fixed) prepare(x *tx) (*way, error) {
	return &way{f.pin, func(session tpm2.TPMHandle) error {
		_, err := run(x, f.state.Command(session))
		if err == nil && f.pin {
			_, err = run(x, tpm2.PolicyAuthValue{PolicySession: session})
		}
		return err
	}}, nil
}

// explain finds out which PCRs it was.
func (f fixed) explain(x *tx, err error) error {
	found, readErr := x.readPCRs(f.state.Indices())
	if readErr != nil {
		return errors.Join(err, readErr)
	}
	if changed := changes(found, f.state); changed != nil {
		return &PCRError{changed}
	}
	return err // changed and changed back, or another policy
}

// changes lists the PCRs of wanted that have another value in found.
func changes(found, wanted policy.State) (list []PCRChange) {
	for _, i := range wanted.Indices() {
		if !bytes.Equal(found[i], wanted[i]) {
			list = append(list, PCRChange{i, bytes.Clone(found[i]), bytes.Clone(wanted[i])})
		}
	}
	return list
}

func selection(indices []int) tpm2.TPMLPCRSelection {
	var list []uint
	for _, n := range indices {
		list = append(list, uint(n))
	}
	return tpm2.TPMLPCRSelection{PCRSelections: []tpm2.TPMSPCRSelection{
		{Hash: tpm2.TPMAlgSHA256, PCRSelect: tpm2.PCClientCompatible.PCRs(list...)},
	}}
}

// checkBank makes sure that the SHA-256 bank measures the PCRs: a policy over a
// bank that is not allocated is always satisfied.
func (x *tx) checkBank(indices []int) error {
	rsp, err := run(x, tpm2.GetCapability{Capability: tpm2.TPMCapPCRs, PropertyCount: 1})
	if err != nil {
		return err
	}
	assigned, err := rsp.CapabilityData.Data.AssignedPCR()
	if err != nil {
		return x.distrust("TPM2_GetCapability", err)
	}
	var bank []byte
	for _, s := range assigned.PCRSelections {
		if s.Hash == tpm2.TPMAlgSHA256 {
			bank = s.PCRSelect
		}
	}
	for _, n := range indices {
		if n/8 >= len(bank) || bank[n/8]>>(n%8)&1 == 0 {
			return fmt.Errorf("the TPM does not keep PCR %d in SHA-256: allocate that bank (tpm2_pcrallocate sha256:all, then reboot)", n)
		}
	}
	return nil
}

// readPCRs reads the present state, in a session that proves who answers. One
// command gives at most 8 values; the update counter shows if PCRs changed
// between two.
func (x *tx) readPCRs(indices []int) (policy.State, error) {
	set := policy.State{}
	var counter uint32
	for batch := range slices.Chunk(indices, 8) {
		rsp, err := run(x, tpm2.PCRRead{PCRSelectionIn: selection(batch)}, x.srk.witness())
		if err != nil {
			return nil, err
		}
		if !bytes.Equal(tpm2.Marshal(rsp.PCRSelectionOut), tpm2.Marshal(selection(batch))) || len(rsp.PCRValues.Digests) != len(batch) {
			return nil, fmt.Errorf("the TPM gave %d of the SHA-256 values of PCRs %v: that bank does not keep them all", len(rsp.PCRValues.Digests), batch)
		}
		if len(set) > 0 && rsp.PCRUpdateCounter != counter {
			return nil, fail(ClassTransient, "PCRs changed while they were read: try again")
		}
		counter = rsp.PCRUpdateCounter
		for i, d := range rsp.PCRValues.Digests {
			if len(d.Buffer) != sha256.Size {
				return nil, fmt.Errorf("the TPM gave %d bytes for PCR %d, not %d", len(d.Buffer), batch[i], sha256.Size)
			}
			set[batch[i]] = bytes.Clone(d.Buffer)
		}
	}
	return set, nil
}

// under lends fn a policy session that satisfies a rule. If the TPM refuses that, the
// error says why.
func (x *tx) under(r rule, fn func(session tpm2.Session) error) error {
	w, err := r.prepare(x)
	if err != nil {
		return err
	}
	if w.pin {
		// Salted, or what the PIN is could be tried out on what passes over the bus.
		err = x.pinned(func(pin []byte) error { return x.inPolicySession(w, fn, x.srk.salt(), tpm2.Auth(pin)) })
	} else {
		err = x.inPolicySession(w, fn)
	}
	var refused *CommandError
	if errors.As(err, &refused) && (refused.Class() == ClassPolicy || refused.RC == tpm2.TPMRCPCRChanged) {
		return r.explain(x, err)
	}
	return err
}

// inPolicySession lends fn a session in which the steps were run. It encrypts nothing:
// see srk.salted.
func (x *tx) inPolicySession(w *way, fn func(session tpm2.Session) error, opts ...tpm2.AuthOption) error {
	s, _, err := tpm2.PolicySession(x, tpm2.TPMAlgSHA256, 16, opts...)
	if err != nil {
		return x.explain("TPM2_StartAuthSession", err)
	}
	defer x.flush(s.Handle())
	if err := w.steps(s.Handle()); err != nil {
		return err
	}
	return fn(s)
}
