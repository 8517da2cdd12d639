package tpm

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"
	"syscall"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"

	"conseal/tpm/policy"
)

// Class says what can be done about an error of this package.
type Class int

// The classes. [ClassOf] tells which an error has.
const (
	ClassUnknown   Class = iota
	ClassTransient       // try again
	ClassReset           // the connection or the TPM's volatile state is gone; the next call connects again
	ClassPolicy          // the host is not in the measured state that is wanted
	ClassNoRoot          // provisioned, and no root was ever set
	ClassAuth            // something has a password that we do not know
	ClassLockout         // the TPM's dictionary attack protection is on
	ClassEvicted         // our storage root key is not where it was: provision again, nothing is lost
	ClassLost            // cleared, replaced or undefined: what it guarded is gone
	ClassCorrupt         // a blob is damaged, or not from this TPM
	ClassFull            // no room in the TPM
	ClassReboot          // the TPM wants a power cycle
	ClassAbsent          // no TPM at that address
)

// advice is what a person is to do; it ends the text of an error.
var advice = map[Class]string{
	ClassTransient: "try again",
	ClassReset:     "try again: the next use connects anew",
	ClassPolicy:    "compare the host's PCRs with those wanted",
	ClassAuth:      "an authorization that is not ours is set (tpm2_getcap properties-variable shows which): ask who owns the TPM",
	ClassLockout:   "wait for the lockout to end, or reset it with the lockout authorization (tpm2_dictionarylockout)",
	ClassCorrupt:   "the blob is damaged or was made by another TPM: restore it, or make it anew",
	ClassFull:      "free NV indices or persistent objects of the TPM (tpm2_getcap handles-nv-index, handles-persistent)",
	ClassReboot:    "power-cycle the host; if that does not help, the TPM is broken",
	ClassAbsent:    "check that the TPM is enabled in the firmware, that the address is right and that this user may open it",
}

// ClassOf tells the class of an error of this package, else [ClassUnknown].
func ClassOf(err error) Class {
	var c interface{ Class() Class }
	if errors.As(err, &c) {
		return c.Class()
	}
	return ClassUnknown
}

// CommandError is a TPM's refusal of one command.
type CommandError struct {
	Command string     // as in TPM 2.0 part 3: "TPM2_Load"
	RC      tpm2.TPMRC // why
}

func (e *CommandError) Error() string {
	s := fmt.Sprintf("%s: %v (%#x)", e.Command, e.RC, uint32(e.RC))
	if a := advice[e.Class()]; a != "" {
		s += "; " + a
	}
	return s
}

// Unwrap makes errors.Is with the codes of go-tpm work.
func (e *CommandError) Unwrap() error { return e.RC }

// Class is by the response code, and for codes that say little by the command.
func (e *CommandError) Class() Class {
	switch e.RC {
	case tpm2.TPMRCRetry, tpm2.TPMRCYielded, tpm2.TPMRCTesting, tpm2.TPMRCNVRate, tpm2.TPMRCNVUnavailable, tpm2.TPMRCPCRChanged:
		return ClassTransient
	case tpm2.TPMRCInitialize, tpm2.TPMRCObjectMemory, tpm2.TPMRCSessionMemory, tpm2.TPMRCMemory, tpm2.TPMRCReferenceH0,
		tpm2.TPMRCReferenceH1, tpm2.TPMRCReferenceS0, tpm2.TPMRCReferenceS1, tpm2.TPMRCReferenceS2:
		return ClassReset
	case tpm2.TPMRCLockout:
		return ClassLockout
	case tpm2.TPMRCNVSpace:
		return ClassFull
	case tpm2.TPMRCFailure, tpm2.TPMRCUpgrade, tpm2.TPMRCReboot:
		return ClassReboot
	}
	switch { // format 1 codes also say which handle, parameter or session: Is leaves that out
	case e.RC.Is(tpm2.TPMRCPolicyFail), e.Command == "TPM2_PolicyPCR" && e.RC.Is(tpm2.TPMRCValue):
		return ClassPolicy
	case e.RC.Is(tpm2.TPMRCAuthFail), e.RC.Is(tpm2.TPMRCBadAuth):
		return ClassAuth
	case e.RC.Is(tpm2.TPMRCHandle): // the SRK was evicted under us: the next use finds out
		return ClassReset
	case e.Command == "TPM2_Load":
		return ClassCorrupt
	}
	return ClassUnknown
}

// linkError is a failure between us and the TPM.
type linkError struct{ err error }

func (e *linkError) Error() string {
	return fmt.Sprintf("no answer from the TPM: %v; %s", e.err, advice[e.Class()])
}
func (e *linkError) Unwrap() error { return e.err }
func (e *linkError) Class() Class {
	if errors.Is(e.err, fs.ErrNotExist) || errors.Is(e.err, fs.ErrPermission) || errors.Is(e.err, syscall.ECONNREFUSED) {
		return ClassAbsent
	}
	return ClassReset
}

// Timeout tells whether time ran out, as [net.Error] does.
func (e *linkError) Timeout() bool { return errors.Is(e.err, os.ErrDeadlineExceeded) }

// failure is any other error with a class. Its text says what to do.
type failure struct {
	class Class
	err   error
}

func (e *failure) Error() string { return e.err.Error() }
func (e *failure) Unwrap() error { return e.err }
func (e *failure) Class() Class  { return e.class }

func fail(c Class, format string, a ...any) error {
	return &failure{c, fmt.Errorf(format, a...)}
}

// noRootError satisfies the vault's NoRoot.
type noRootError struct{ index uint32 }

func (e *noRootError) Error() string {
	return fmt.Sprintf("NV index %#x was provisioned and no root was ever set", e.index)
}
func (e *noRootError) NoRoot() bool { return true }
func (e *noRootError) Class() Class { return ClassNoRoot }

// PCRChange is a PCR whose value is not the one wanted.
type PCRChange struct {
	PCR           int
	Found, Wanted []byte // SHA-256 digests
}

// PCRError says that the host is not in the measured state in which something
// opens, and by which PCRs. Changed is never empty.
type PCRError struct{ Changed []PCRChange }

func (e *PCRError) Error() string {
	var s []string
	for _, c := range e.Changed {
		s = append(s, fmt.Sprintf("PCR %d is %.4x…, wanted %.4x…", c.PCR, c.Found, c.Wanted))
	}
	return strings.Join(s, ", ") + ": firmware, boot loader or kernel differ from those it was sealed under; " +
		"boot those again, or provision this host anew and reshare its keys"
}

// Class is [ClassPolicy].
func (e *PCRError) Class() Class { return ClassPolicy }

// PolicyError says that no installed policy allows to open in the present state, and
// why of each.
type PolicyError struct {
	Counter  uint64 // versions below are revoked
	Verdicts []Verdict
}

func (e *PolicyError) Error() string {
	s := []string{"no seal policy is installed"}
	for i, v := range e.Verdicts {
		if i == 0 {
			s = nil
		}
		why := fmt.Sprintf("seal policy %d (%s)", v.Policy.Version, v.Policy.Comment)
		if v.Revoked {
			why += fmt.Sprintf(" is revoked, as all below %d", e.Counter)
		} else if len(v.Changed) > 0 {
			why += " wants another state"
		}
		if v.NoPIN {
			why += " wants a PIN, and this host was initialised without one"
		}
		for _, c := range v.Changed {
			why += fmt.Sprintf(", PCR %d (%s) is %.4x…, wanted %.4x…", c.PCR, policy.PCRWords(c.PCR), c.Found, c.Wanted)
		}
		s = append(s, why)
	}
	return strings.Join(s, "; ") + ": boot what they were signed for, or have this state signed: " +
		"`conseal seal measure` here, `conseal seal sign` at the security team, `conseal seal install` here"
}

// Class is [ClassPolicy].
func (e *PolicyError) Class() Class { return ClassPolicy }

// command is any command of go-tpm whose response is an R.
type command[R any] interface {
	Execute(transport.TPM, ...tpm2.Session) (*R, error)
}

// run executes one command of a transaction.
func run[R any](x *tx, cmd command[R], sessions ...tpm2.Session) (*R, error) {
	rsp, err := cmd.Execute(x, sessions...)
	if err == nil {
		return rsp, nil
	}
	return nil, x.explain(commandNames.Replace(fmt.Sprintf("%T", cmd)), err)
}

// commandNames turns go-tpm's names of commands into those of TPM 2.0 part 3.
var commandNames = strings.NewReplacer("tpm2.NV", "TPM2_NV_", "tpm2.PCR", "TPM2_PCR_", "tpm2.", "TPM2_")

// explain gives an error of go-tpm its class.
func (x *tx) explain(command string, err error) error {
	var rc tpm2.TPMRC
	switch {
	case errors.As(err, &rc):
		return &CommandError{command, rc}
	case x.conn.broken:
		return fmt.Errorf("%s: %w", command, err)
	}
	return x.distrust(command, err)
}

// distrust is for an answer that is malformed or whose HMAC is wrong: go-tpm does
// not tell which. Either way something other than our TPM made it.
func (x *tx) distrust(command string, err error) error {
	x.conn.broken = true
	return fail(ClassReset, "%s: the answer is not what our TPM would send: %w; if it happens again, something on the bus alters answers", command, err)
}
