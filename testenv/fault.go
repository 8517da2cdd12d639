package testenv

import (
	"bytes"
	"context"
	_ "embed"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"unsafe"
)

//go:embed fault/module.c
var faultSource []byte

// Action is what a [Fault] does to a call.
type Action string

const (
	ReturnValue  Action = "rv"            // return Value and do nothing
	ReturnAfter  Action = "rv-after"      // do it, and return Value all the same
	Segv         Action = "segv"          // a segmentation fault
	Abort        Action = "abort"         // abort(3)
	Hang         Action = "hang"          // do not return as long as the rule stands
	Slow         Action = "slow"          // wait for Value milliseconds, then do it
	LoseSessions Action = "lose-sessions" // close all sessions, and with them the login, then do it
	// Gone is a token that was pulled out: sessions are lost, C_GetSlotList finds no
	// slot, and what needs one returns Value. C_Initialize, C_Finalize and C_GetInfo work.
	Gone  Action = "gone"
	Flags Action = "flags" // of C_GetTokenInfo: set the bits of Value in the flags

	// Of C_EncryptInit with AES-GCM.
	ReplaceIV Action = "replace-iv" // another IV than the caller's, written back, as CloudHSM does
	AppendIV  Action = "append-iv"  // an own IV of 16 bytes, which C_Encrypt appends after the tag, as Luna does in FIPS mode
	// Of C_Encrypt.
	ShortSize Action = "short-size" // the answer to the question for the size forgets the tag, as NSS does
)

// onlyAt says at which call an action does something; "" is any.
var onlyAt = map[Action]string{
	ReturnValue: "", ReturnAfter: "", Segv: "", Abort: "", Hang: "", Slow: "", LoseSessions: "", Gone: "",
	Flags: "C_GetTokenInfo", ReplaceIV: "C_EncryptInit", AppendIV: "C_EncryptInit", ShortSize: "C_Encrypt",
}

// Fault is a rule of a [FaultModule].
type Fault struct {
	Call  string // "C_Decrypt"; "*" is every call
	Do    Action
	Value uint // a CKR_ value, flags or milliseconds
	Times int  // how many calls it strikes; 0: all
	After int  // how many calls it lets pass first
}

// Rule names a fault that was set.
type Rule int

// FaultModule is a PKCS#11 module that passes all calls on to a real one, but for
// faults that [FaultModule.Set] puts in their way:
//
//	m, err := testenv.NewFaultModule(ctx, t.TempDir(), token.Module)
//	uri := strings.Replace(token.URI, token.Module, m.Path, 1)
//	rule, err := m.Set(testenv.Fault{Call: "C_Decrypt", Do: testenv.ReturnValue, Value: 0x32, Times: 1})
//	... what must stand it
//	hits, err := m.Hits(rule) // 1, or the test showed nothing
//
// Rules and counts are in a file that all processes with the module share: faults
// reach processes that run, and counts outlive those that end. Of several faults for
// one call the first that was set strikes, and the others do not see it. Several modules
// in one process do not know of each other, nor of the real one under its own path.
type FaultModule struct {
	Path string // of the library

	faults string // the path of a faultFile
	mu     sync.Mutex
	next   Rule
}

// faultFile is struct faults of fault/module.c.
type faultFile struct {
	Functions [80]struct {
		Name  [32]byte
		Calls uint64
	}
	From, To uint64 // the rules that stand
	Rules    [8192]faultRule
}

type faultRule struct {
	Call                [32]byte
	Do                  [16]byte
	Value, Times, After uint64
	Seen, Hits          uint64
}

func ruleAt(r Rule) uintptr {
	return unsafe.Offsetof(faultFile{}.Rules) + uintptr(r)*unsafe.Sizeof(faultRule{})
}

// NewFaultModule makes a module without rules in dir, a folder of its own, that
// passes calls on to a copy of the library real.
func NewFaultModule(ctx context.Context, dir, real string) (*FaultModule, error) {
	library, err := buildFault(ctx)
	if err != nil {
		return nil, fmt.Errorf("building the fault module: %w", err)
	}
	m := &FaultModule{Path: filepath.Join(dir, "fault.so"), faults: filepath.Join(dir, "faults")}
	err = os.WriteFile(m.faults, make([]byte, unsafe.Sizeof(faultFile{})), 0o600)
	err = errors.Join(err, copyFile(library, m.Path), copyFile(real, filepath.Join(dir, "real.so")))
	if err != nil {
		return nil, fmt.Errorf("making a fault module: %w", err)
	}
	return m, nil
}

func copyFile(from, to string) error {
	b, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	return os.WriteFile(to, b, 0o700)
}

// builtFault is the library that [Clean] removes.
var builtFault string

// buildFault compiles the module once for this process.
func buildFault(ctx context.Context) (string, error) {
	buildMu.Lock()
	defer buildMu.Unlock()
	if builtFault != "" {
		return builtFault, nil
	}
	if err := Need("gcc", "gcc libc6-dev"); err != nil {
		return "", err
	}
	headers, err := exec.CommandContext(ctx, "go", "list", "-m", "-f", "{{.Dir}}", "github.com/miekg/pkcs11").Output()
	if err != nil {
		return "", fmt.Errorf("looking for the headers of PKCS#11: go list: %w", err)
	}
	dir, err := os.MkdirTemp("", "conseal-fault-")
	if err != nil {
		return "", err
	}
	library := filepath.Join(dir, "fault.so")
	cmd := exec.CommandContext(ctx, "gcc", "-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror", "-pthread",
		"-I", strings.TrimSpace(string(headers)), "-o", library, "-x", "c", "-", "-ldl")
	cmd.Stdin = bytes.NewReader(faultSource)
	if out, err := cmd.CombinedOutput(); err != nil {
		os.RemoveAll(dir)
		return "", fmt.Errorf("gcc: %w (if a header is missing: apt-get install libc6-dev)\n%s", err, out)
	}
	builtFault = library
	return library, nil
}

// Set adds a fault. One module takes some thousand in its life.
func (m *FaultModule) Set(f Fault) (Rule, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	rule := faultRule{Value: uint64(f.Value), Times: uint64(f.Times), After: uint64(f.After)}
	call, known := onlyAt[f.Do]
	switch {
	case !known || f.Call == "" || len(f.Call) >= len(rule.Call) || call != "" && f.Call != call:
		return 0, fmt.Errorf("fault %+v: there is no such action or not at that call", f)
	case f.Times < 0 || f.After < 0:
		return 0, fmt.Errorf("fault %+v: counts from 0", f)
	case int(m.next) == len(faultFile{}.Rules):
		return 0, fmt.Errorf("fault %+v is one too many: make another module", f)
	}
	copy(rule.Call[:], f.Call)
	copy(rule.Do[:], f.Do)
	err := m.write(ruleAt(m.next), rule)
	if err == nil {
		err = m.write(unsafe.Offsetof(faultFile{}.To), uint64(m.next+1))
	}
	m.next++
	return m.next - 1, err
}

// Clear ends all faults. Their hits stay.
func (m *FaultModule) Clear() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.write(unsafe.Offsetof(faultFile{}.From), uint64(m.next))
}

func (m *FaultModule) write(at uintptr, what any) error {
	b, err := binary.Append(nil, binary.NativeEndian, what)
	if err != nil {
		return err
	}
	f, err := os.OpenFile(m.faults, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteAt(b, int64(at))
	return errors.Join(err, f.Close())
}

func (m *FaultModule) read(at uintptr, into any) error {
	f, err := os.Open(m.faults)
	if err != nil {
		return err
	}
	defer f.Close()
	return binary.Read(io.NewSectionReader(f, int64(at), int64(binary.Size(into))), binary.NativeEndian, into)
}

// Hits tells how many calls a fault struck.
func (m *FaultModule) Hits(r Rule) (int, error) {
	var rule faultRule
	err := m.read(ruleAt(r), &rule)
	return int(rule.Hits), err
}

// Calls tells how often each function was called, by all processes, since the
// module was made.
func (m *FaultModule) Calls() (map[string]int, error) {
	functions := faultFile{}.Functions
	err := m.read(unsafe.Offsetof(faultFile{}.Functions), &functions)
	calls := map[string]int{}
	for _, f := range functions {
		if f.Calls > 0 {
			calls[string(bytes.TrimRight(f.Name[:], "\x00"))] = int(f.Calls)
		}
	}
	return calls, err
}
