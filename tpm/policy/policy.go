// Package policy is the statements by which a security team lets a TPM open what it
// guards: the states of a host that they allow, signed with one key that the TPM knows.
//
// What a host seals trusts the key, not a state (TPM2_PolicyAuthorize, TPM 2.0 part 3,
// section 23.16): another kernel needs another signature, and nothing is sealed again.
// Several policies may be valid at once. Each has a version; a counter in the TPM's NV
// memory says which versions are revoked, and only a signature of the same key moves it.
//
// Nothing here talks to a TPM.
package policy

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"slices"

	"github.com/google/go-tpm/tpm2"
)

// Host is what all policies of one host have in common: what its TPM was provisioned
// for.
type Host struct {
	Name    string           // of the host in the roster
	Key     *ecdsa.PublicKey // of the security team, on P-256
	Counter uint32           // NV index of the counter of revocations
}

// The roles: what the TPM does for a signed statement of each.
const (
	roleOpen   = "open"   // read and write the root, open sealed keys
	roleRevoke = "revoke" // count up
)

// State is PCRs of the SHA-256 bank with the value that each must have, 32 bytes.
type State map[int][]byte

// LastPCR is the highest that every PC client TPM has.
const LastPCR = 23

// Indices are the PCRs, ascending.
func (s State) Indices() []int { return slices.Sorted(maps.Keys(s)) }

// Check refuses what is no state, and what is in every state.
func (s State) Check() error {
	if len(s) == 0 {
		return errors.New("no PCRs: it would open in any state of the host")
	}
	for i, v := range s {
		if i < 0 || i > LastPCR {
			return fmt.Errorf("PCR %d does not exist: they are 0 to %d", i, LastPCR)
		}
		if i == 16 || i == 23 {
			return fmt.Errorf("PCR %d can be reset by any process: it says nothing", i)
		}
		if len(v) != sha256.Size {
			return fmt.Errorf("PCR %d: a value of %d bytes, not %d", i, len(v), sha256.Size)
		}
	}
	return nil
}

// Fits tells whether a host with these values is in the state.
func (s State) Fits(values State) bool {
	for i, v := range s {
		if !bytes.Equal(values[i], v) {
			return false
		}
	}
	return len(s) > 0
}

// AuthPolicy is the policy of what opens in this state and in no other, and with the
// host's PIN if it has one.
func (s State) AuthPolicy(pin bool) ([]byte, error) {
	if len(s) == 0 {
		return nil, errors.New("a policy without PCRs")
	}
	steps := []step{s.Command(0)}
	if pin {
		steps = append(steps, tpm2.PolicyAuthValue{})
	}
	return digest(steps...)
}

// Command is TPM2_PolicyPCR for the state.
func (s State) Command(session tpm2.TPMHandle) tpm2.PolicyPCR {
	h := sha256.New()
	var list []uint
	for _, i := range s.Indices() {
		h.Write(s[i])
		list = append(list, uint(i))
	}
	return tpm2.PolicyPCR{
		PolicySession: session,
		PcrDigest:     tpm2.TPM2BDigest{Buffer: h.Sum(nil)},
		Pcrs: tpm2.TPMLPCRSelection{PCRSelections: []tpm2.TPMSPCRSelection{
			{Hash: tpm2.TPMAlgSHA256, PCRSelect: tpm2.PCClientCompatible.PCRs(list...)},
		}},
	}
}

// KeyPublic is the security team's key as a TPM loads it (TPM2_LoadExternal).
func KeyPublic(key *ecdsa.PublicKey) (tpm2.TPMTPublic, error) {
	point, err := key.Bytes()
	if err != nil {
		return tpm2.TPMTPublic{}, err
	}
	if len(point) != 65 {
		return tpm2.TPMTPublic{}, errors.New("the policy key is not on P-256")
	}
	return tpm2.TPMTPublic{
		Type:             tpm2.TPMAlgECC,
		NameAlg:          tpm2.TPMAlgSHA256,
		ObjectAttributes: tpm2.TPMAObject{SignEncrypt: true, UserWithAuth: true},
		Parameters:       tpm2.NewTPMUPublicParms(tpm2.TPMAlgECC, &tpm2.TPMSECCParms{CurveID: tpm2.TPMECCNistP256}),
		Unique: tpm2.NewTPMUPublicID(tpm2.TPMAlgECC, &tpm2.TPMSECCPoint{
			X: tpm2.TPM2BECCParameter{Buffer: point[1:33]},
			Y: tpm2.TPM2BECCParameter{Buffer: point[33:]},
		}),
	}, nil
}

// ref is the policyRef of a role: what a signature for it may be used for.
func (h *Host) ref(role string) []byte {
	b := []byte("conseal seal policy 1")
	for _, s := range []string{role, h.Name} {
		b = binary.BigEndian.AppendUint16(b, uint16(len(s)))
		b = append(b, s...)
	}
	d := sha256.Sum256(binary.BigEndian.AppendUint32(b, h.Counter))
	return d[:]
}

// authorized is the digest of "what the key has signed for this role".
func (h *Host) authorized(role string) ([]byte, error) {
	public, err := KeyPublic(h.Key)
	if err != nil {
		return nil, err
	}
	name, err := tpm2.ObjectName(&public)
	if err != nil {
		return nil, err
	}
	// The calculator starts at zero, to which the TPM sets the digest here; go-tpm's
	// Update would not.
	return digest(tpm2.PolicyAuthorize{KeySign: *name, PolicyRef: tpm2.TPM2BDigest{Buffer: h.ref(role)}})
}

// AuthPolicy is the policy of what the host seals.
func (h *Host) AuthPolicy() ([]byte, error) { return h.authorized(roleOpen) }

// CounterPublic is the NV counter: anybody on the host may read it; it is counted up
// once to come into being, and then only by a signed [Revocation]. A counter that the
// owner removes and makes anew starts above all that ever were.
func (h *Host) CounterPublic(written bool) (tpm2.TPMSNVPublic, error) {
	branches, err := h.CounterBranches()
	if err != nil {
		return tpm2.TPMSNVPublic{}, err
	}
	policy, err := digest(tpm2.PolicyOr{PHashList: branches})
	return tpm2.TPMSNVPublic{
		NVIndex: tpm2.TPMHandle(h.Counter),
		NameAlg: tpm2.TPMAlgSHA256,
		Attributes: tpm2.TPMANV{
			AuthRead:    true,
			PolicyWrite: true,
			NoDA:        true,
			Written:     written,
			NT:          tpm2.TPMNTCounter,
		},
		AuthPolicy: tpm2.TPM2BDigest{Buffer: policy},
		DataSize:   8,
	}, err
}

// CounterBranches are the two ways to count up: the first, and by a revocation.
func (h *Host) CounterBranches() (list tpm2.TPMLDigest, err error) {
	first, err := digest(tpm2.PolicyNVWritten{WrittenSet: false}, tpm2.PolicyCommandCode{Code: tpm2.TPMCCNVIncrement})
	if err != nil {
		return list, err
	}
	revoke, err := h.authorized(roleRevoke)
	if err != nil {
		return list, err
	}
	list.Digests = []tpm2.TPM2BDigest{{Buffer: first}, {Buffer: revoke}}
	return list, nil
}

// counterIs compares the counter with a value (TPM2_PolicyNV).
func (h *Host) counterIs(session tpm2.TPMHandle, op tpm2.TPMEO, value uint64) (cmd tpm2.PolicyNV, err error) {
	public, err := h.CounterPublic(true)
	if err != nil {
		return cmd, err
	}
	name, err := tpm2.NVName(&public)
	if err != nil {
		return cmd, err
	}
	return tpm2.PolicyNV{
		AuthHandle:    tpm2.AuthHandle{Handle: public.NVIndex, Name: *name, Auth: tpm2.PasswordAuth(nil)},
		NVIndex:       tpm2.NamedHandle{Handle: public.NVIndex, Name: *name},
		PolicySession: session,
		OperandB:      tpm2.TPM2BOperand{Buffer: binary.BigEndian.AppendUint64(nil, value)},
		Operation:     op,
	}, nil
}

// SealedPublic is the public part of a sealed data object that opens under a policy
// only: UserWithAuth is clear, so that there is no other way in. unique is the object's
// own, 32 bytes, or nil where the TPM is still to make it.
// pin tells whether it has the host's PIN as its authorization value; wrong ones then
// count as a dictionary attack.
func SealedPublic(authPolicy, unique []byte, pin bool) tpm2.TPMTPublic {
	return tpm2.TPMTPublic{
		Type:    tpm2.TPMAlgKeyedHash,
		NameAlg: tpm2.TPMAlgSHA256,
		ObjectAttributes: tpm2.TPMAObject{
			FixedTPM:        true,
			FixedParent:     true,
			AdminWithPolicy: true,
			NoDA:            !pin,
		},
		AuthPolicy: tpm2.TPM2BDigest{Buffer: authPolicy},
		Parameters: tpm2.NewTPMUPublicParms(tpm2.TPMAlgKeyedHash, &tpm2.TPMSKeyedHashParms{
			Scheme: tpm2.TPMTKeyedHashScheme{Scheme: tpm2.TPMAlgNull},
		}),
		Unique: tpm2.NewTPMUPublicID(tpm2.TPMAlgKeyedHash, &tpm2.TPM2BDigest{Buffer: unique}),
	}
}

// step is a command of a policy: TPM2_PolicyPCR and others.
type step interface {
	Update(*tpm2.PolicyCalculator) error
}

func digest(steps ...step) ([]byte, error) {
	calc, err := tpm2.NewPolicyCalculator(tpm2.TPMAlgSHA256)
	if err != nil {
		return nil, err
	}
	for _, s := range steps {
		if err := s.Update(calc); err != nil {
			return nil, err
		}
	}
	return bytes.Clone(calc.Hash().Digest), nil
}
