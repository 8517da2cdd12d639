package testenv

import (
	"bytes"
	"context"
	_ "embed"
	"encoding/binary"
	"errors"
	"fmt"
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
// The module reads its rules at each call, so that they reach processes that run,
// and counts in a file, so that counts outlive processes. Of several rules for one call
// the first that was set strikes; the others do not see it. Several modules in one
// process do not know of each other, nor of the real one under its own path.
type FaultModule struct {
	Path string // of the library

	dir   string
	mu    sync.Mutex
	next  Rule
	rules string // the file's text
}

// Sizes of struct counts in fault/module.c.
const (
	faultFunctions = 80
	faultRules     = 8192
)

type faultCounts struct {
	Functions [faultFunctions]struct {
		Name  [32]byte
		Calls uint64
	}
	Rules [faultRules]struct{ Seen, Hits uint64 }
}

// NewFaultModule makes a module without rules in dir, a folder of its own, that
// passes calls on to a copy of the library real.
func NewFaultModule(ctx context.Context, dir, real string) (*FaultModule, error) {
	library, err := buildFault(ctx)
	if err != nil {
		return nil, fmt.Errorf("building the fault module: %w", err)
	}
	m := &FaultModule{Path: filepath.Join(dir, "fault.so"), dir: dir}
	err = os.WriteFile(m.file("counts"), make([]byte, unsafe.Sizeof(faultCounts{})), 0o600)
	err = errors.Join(err, m.Clear(), copyFile(library, m.Path), copyFile(real, m.file("real.so")))
	if err != nil {
		return nil, fmt.Errorf("making a fault module: %w", err)
	}
	return m, nil
}

func (m *FaultModule) file(name string) string { return filepath.Join(m.dir, name) }

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

// Set adds a fault.
func (m *FaultModule) Set(f Fault) (Rule, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if f.Call == "" || len(f.Call) > 31 || f.Do == "" || f.Times < 0 || f.After < 0 || m.next >= faultRules {
		return 0, fmt.Errorf("fault %+v: names a call and an action, counts from 0, and is one of %d", f, faultRules)
	}
	rule := m.next
	text := m.rules + fmt.Sprintf("%d %s %s %#x %d %d\n", rule, f.Call, f.Do, f.Value, f.Times, f.After)
	if err := m.write(text); err != nil {
		return 0, err
	}
	m.next, m.rules = rule+1, text
	return rule, nil
}

// Clear ends all faults. Their hits stay.
func (m *FaultModule) Clear() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.rules = ""
	return m.write("")
}

// write replaces the rules at once, under the eyes of the module.
func (m *FaultModule) write(rules string) error {
	if err := os.WriteFile(m.file("rules.new"), []byte(rules), 0o600); err != nil {
		return err
	}
	return os.Rename(m.file("rules.new"), m.file("rules"))
}

// Hits tells how many calls a fault struck.
func (m *FaultModule) Hits(r Rule) (int, error) {
	c, err := m.counts()
	return int(c.Rules[r].Hits), err
}

// Calls tells how often each function was called, by all processes, since the
// module was made.
func (m *FaultModule) Calls() (map[string]int, error) {
	c, err := m.counts()
	calls := map[string]int{}
	for _, f := range c.Functions {
		if f.Calls > 0 {
			calls[string(bytes.TrimRight(f.Name[:], "\x00"))] = int(f.Calls)
		}
	}
	return calls, err
}

func (m *FaultModule) counts() (*faultCounts, error) {
	c := new(faultCounts)
	b, err := os.ReadFile(m.file("counts"))
	if err == nil {
		_, err = binary.Decode(b, binary.NativeEndian, c)
	}
	return c, err
}
