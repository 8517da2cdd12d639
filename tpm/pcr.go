package tpm

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"maps"
	"slices"

	"github.com/google/go-tpm/tpm2"
)

// pcrSet is PCRs of the SHA-256 bank with a value each: a measured state.
// Ascending, without repeats, never empty.
type pcrSet []pcr

type pcr struct {
	index int
	value [sha256.Size]byte
}

// lastPCR is the highest that every PC client TPM has.
const lastPCR = 23

// checkPCRs wants a sorted list.
func checkPCRs(indices []int) error {
	if len(indices) == 0 {
		return errors.New("tpm: no PCRs given: what is sealed would open in any state of the host; give at least one, as 7 for secure boot")
	}
	for i, n := range indices {
		if n < 0 || n > lastPCR {
			return fmt.Errorf("tpm: PCR %d does not exist: they are 0 to %d", n, lastPCR)
		}
		if i > 0 && indices[i-1] == n {
			return fmt.Errorf("tpm: PCR %d is given twice", n)
		}
	}
	return nil
}

// parseWanted takes the values over from a Config; nil for nil.
func parseWanted(wanted map[int][]byte, indices []int) (pcrSet, error) {
	if len(wanted) == 0 {
		return nil, nil
	}
	if got := slices.Sorted(maps.Keys(wanted)); !slices.Equal(got, indices) {
		return nil, fmt.Errorf("tpm: PCRs %v are configured and the root was made under PCRs %v: use those, or provision anew", indices, got)
	}
	var set pcrSet
	for _, n := range indices {
		if len(wanted[n]) != sha256.Size {
			return nil, fmt.Errorf("tpm: the value wanted of PCR %d has %d bytes, not %d", n, len(wanted[n]), sha256.Size)
		}
		set = append(set, pcr{n, [sha256.Size]byte(wanted[n])})
	}
	return set, nil
}

// values is the inverse of parseWanted.
func (s pcrSet) values() map[int][]byte {
	m := map[int][]byte{}
	for _, p := range s {
		m[p.index] = bytes.Clone(p.value[:])
	}
	return m
}

func (s pcrSet) indices() []int {
	var list []int
	for _, p := range s {
		list = append(list, p.index)
	}
	return list
}

// command is TPM2_PolicyPCR for this state: TPM 2.0 part 3, section 23.7.
func (s pcrSet) command(session tpm2.TPMHandle) tpm2.PolicyPCR {
	h := sha256.New()
	for _, p := range s {
		h.Write(p.value[:])
	}
	return tpm2.PolicyPCR{
		PolicySession: session,
		PcrDigest:     tpm2.TPM2BDigest{Buffer: h.Sum(nil)},
		Pcrs:          selection(s.indices()),
	}
}

// policy is the authPolicy of what opens in this state only.
func (s pcrSet) policy() ([]byte, error) {
	if len(s) == 0 {
		return nil, errors.New("tpm: a policy without PCRs")
	}
	calc, err := tpm2.NewPolicyCalculator(tpm2.TPMAlgSHA256)
	if err != nil {
		return nil, err
	}
	if err := s.command(0).Update(calc); err != nil {
		return nil, err
	}
	return calc.Hash().Digest, nil
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
func (x *tx) readPCRs(indices []int) (pcrSet, error) {
	var set pcrSet
	var counter uint32
	for batch := range slices.Chunk(indices, 8) {
		rsp, err := run(x, tpm2.PCRRead{PCRSelectionIn: selection(batch)}, x.srk.witness())
		if err != nil {
			return nil, err
		}
		if !bytes.Equal(tpm2.Marshal(rsp.PCRSelectionOut), tpm2.Marshal(selection(batch))) || len(rsp.PCRValues.Digests) != len(batch) {
			return nil, fmt.Errorf("the TPM gave %d of the SHA-256 values of PCRs %v: that bank does not keep them all", len(rsp.PCRValues.Digests), batch)
		}
		if set != nil && rsp.PCRUpdateCounter != counter {
			return nil, fail(ClassTransient, "PCRs changed while they were read: try again")
		}
		counter = rsp.PCRUpdateCounter
		for i, d := range rsp.PCRValues.Digests {
			if len(d.Buffer) != sha256.Size {
				return nil, fmt.Errorf("the TPM gave %d bytes for PCR %d, not %d", len(d.Buffer), batch[i], sha256.Size)
			}
			set = append(set, pcr{batch[i], [sha256.Size]byte(d.Buffer)})
		}
	}
	return set, nil
}

// inState lends fn a policy session that is satisfied if the host is in the state
// want. If it is not, the error is a [PCRError].
func (x *tx) inState(want pcrSet, fn func(policy tpm2.Session) error) error {
	s, _, err := tpm2.PolicySession(x, tpm2.TPMAlgSHA256, 16) // no secret passes on it: see srk.salted
	if err != nil {
		return x.explain("TPM2_StartAuthSession", err)
	}
	_, err = run(x, want.command(s.Handle()))
	if err == nil {
		err = fn(s)
	}
	x.flush(s.Handle())
	var refused *CommandError
	if errors.As(err, &refused) && (refused.Class() == ClassPolicy || refused.RC == tpm2.TPMRCPCRChanged) {
		return x.nameChanged(want, err)
	}
	return err
}

// nameChanged finds out which PCRs had a policy refused with err.
func (x *tx) nameChanged(want pcrSet, err error) error {
	found, readErr := x.readPCRs(want.indices())
	if readErr != nil {
		return errors.Join(err, readErr)
	}
	var changed []PCRChange
	for i, p := range want {
		if found[i].value != p.value {
			changed = append(changed, PCRChange{p.index, bytes.Clone(found[i].value[:]), bytes.Clone(p.value[:])})
		}
	}
	if changed == nil { // changed and changed back, or another policy
		return err
	}
	return &PCRError{changed}
}
