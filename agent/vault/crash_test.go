package vault_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"pgregory.net/rapid"

	"conseal/agent/vault"
)

// childEnv makes this test binary do the operations in a folder, and be killed by
// a failpoint on the way.
const childEnv = "VAULT_TEST_CHILD"

func TestMain(m *testing.M) {
	switch {
	case os.Getenv(fullEnv) != "":
		fillUp(&childT{})
	case os.Getenv(childEnv) != "":
		child(&childT{})
	default:
		os.Exit(m.Run())
	}
	fmt.Println(childDone)
}

// childDone is a child's last word: without it, it did not do all that it should.
const childDone = "child: all done"

// childT is the testing.TB of a process that is no test. A failure ends it.
type childT struct{ testing.TB }

func (*childT) Helper()                          {}
func (*childT) Context() context.Context         { return context.Background() }
func (c *childT) Errorf(format string, a ...any) { c.Fatal(fmt.Sprintf(format, a...)) }
func (c *childT) Error(a ...any)                 { c.Fatal(a...) }
func (c *childT) Fatalf(format string, a ...any) { c.Fatal(fmt.Sprintf(format, a...)) }
func (*childT) Logf(format string, a ...any)     { fmt.Printf(format+"\n", a...) }
func (*childT) Fatal(a ...any) {
	fmt.Println(a...)
	debug.PrintStack()
	os.Exit(1)
}

// child does ops.json and writes a line for each that is done to the journal.
func child(t testing.TB) {
	dir := os.Getenv(childEnv)
	b, err := os.ReadFile(filepath.Join(dir, "ops.json"))
	must(t, err)
	var ops []op
	must(t, json.Unmarshal(b, &ops))
	journal, err := os.OpenFile(filepath.Join(dir, "journal"), os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600)
	must(t, err)
	hw, err := hardwareIn(filepath.Join(dir, "hardware.json"))
	must(t, err)
	v := &testVault{t: t, dir: filepath.Join(dir, "vault"), hw: hw}
	for _, o := range ops {
		_, err := fmt.Fprintln(journal, v.doAny(o) == nil)
		must(t, err)
	}
}

// doAny does also what opens and creates.
func (v *testVault) doAny(o op) error {
	if o.Kind == "create" {
		return vault.Create(v.t.Context(), v.dir, host, v.hw)
	}
	if o.Kind == "open" || v.Vault == nil {
		v.reopen()
	}
	if o.Kind == "open" {
		return nil
	}
	return o.do(v.t, v.Vault)
}

// crasher is a test binary with failpoints.
type crasher struct{ binary string }

func buildCrasher(t *testing.T) crasher {
	t.Helper()
	c := crasher{filepath.Join(t.TempDir(), "vault.test")}
	out, err := exec.Command("go", "test", "-c", "-tags", "failpoints", "-o", c.binary, ".").CombinedOutput()
	if err != nil {
		t.Fatalf("building it with failpoints: %v\n%s", err, out)
	}
	return c
}

// crash does ops in a child. It returns how many were done, and whether the
// failpoint, "NAME:COUNT", ended it.
func (c crasher) crash(t fataler, dir string, ops []op, failpoint string) (done []bool, killed bool) {
	t.Helper()
	b, err := json.Marshal(ops)
	if err == nil {
		err = os.WriteFile(filepath.Join(dir, "ops.json"), b, 0o600)
	}
	log, journal := filepath.Join(dir, "hits"), filepath.Join(dir, "journal")
	_, _ = os.Remove(log), os.Remove(journal)
	cmd := exec.Command(c.binary)
	cmd.Env = append(os.Environ(), childEnv+"="+dir, "FAILPOINT="+failpoint, "FAILPOINT_LOG="+log)
	out, runErr := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v", err)
	}
	name, _, _ := strings.Cut(failpoint, ":")
	hit, _ := os.ReadFile(log)
	var exit *exec.ExitError
	switch {
	case runErr == nil && len(hit) == 0 && strings.Contains(string(out), childDone):
	case errors.As(runErr, &exit) && exit.Sys().(syscall.WaitStatus).Signal() == syscall.SIGKILL && strings.TrimSpace(string(hit)) == name:
		killed = true
	default:
		t.Fatalf("%s: %v, hits %q\n%s", failpoint, runErr, hit, out)
	}
	lines, _ := os.ReadFile(journal)
	for line := range strings.Lines(string(lines)) {
		done = append(done, strings.TrimSpace(line) == "true")
	}
	if !killed && len(done) != len(ops) {
		t.Fatalf("%s: %d of %d operations were done\n%s", failpoint, len(done), len(ops), out)
	}
	return done, killed
}

// crashed is a folder that a child may have left in the middle of an operation.
type crashed struct {
	*testVault
	m model
}

// judge follows what the child did, and finds the state before or after the
// operation that was cut off. It returns the operations that are left.
func (c *crashed) judge(rt fataler, ops []op, done []bool, killed bool) []op {
	rt.Helper()
	for i, ok := range done {
		next, inOrder := c.m.apply(ops[i])
		if ok != inOrder {
			rt.Fatalf("%s: success %v, want %v", ops[i], ok, inOrder)
		}
		if ok {
			c.m = next
		}
	}
	rest := ops[len(done):]
	hw, err := hardwareIn(filepath.Join(filepath.Dir(c.dir), "hardware.json"))
	if err != nil {
		rt.Fatalf("%v", err)
	}
	c.hw = hw
	if killed && rest[0].Kind == "create" {
		if err := vault.Create(c.t.Context(), c.dir, host, hw); err != nil && !errors.Is(err, vault.ErrExists) {
			rt.Fatalf("creating it again: %v", err)
		}
		rest = rest[1:]
	}
	c.Vault, err = vault.Open(c.t.Context(), c.dir, host, hw)
	if err != nil {
		rt.Fatalf("opening it: %v", err)
	}
	before := c.m.diff(c.Vault)
	if killed && len(rest) > 0 && before != "" {
		next, _ := c.m.apply(rest[0])
		if after := next.diff(c.Vault); after != "" {
			rt.Fatalf("killed in %s: neither before: %s\nnor after: %s", rest[0], before, after)
		}
		c.m, rest, before = next, rest[1:], ""
	}
	if before != "" {
		rt.Fatalf("not what the operations say: %s", before)
	}
	wantTidy(rt, c.dir, c.m)
	return rest
}

// lifeOps is all that a vault does.
func lifeOps() []op {
	k1, k2 := payments, backups
	return []op{
		{Kind: "create"},
		{Kind: "see", Key: k1, Entry: 1},
		{Kind: "stage", Key: k1, Number: n11, Instance: 1},
		{Kind: "stage", Key: k1, Number: n12, Instance: 2},
		{Kind: "stage", Key: k1, Number: n13, Instance: 3},
		{Kind: "drop", Key: k1, Number: n11},
		{Kind: "stage", Key: k1, Number: n11, Instance: 4},
		{Kind: "vote", Key: k1, Number: n12},
		{Kind: "activate", Key: k1, Number: n12},
		{Kind: "drop", Key: k1, Number: n13, Also: n11},
		{Kind: "open"},
		{Kind: "stage", Key: k1, Number: n21, Instance: 5},
		{Kind: "stage", Key: k2, Number: n11, Instance: 6, Class: vault.Own},
		{Kind: "reseal", Key: k1, Class: vault.Own}, // two shares
		{Kind: "reseal", Key: k2, Class: vault.Held},
		{Kind: "vote", Key: k1, Number: n21},
		{Kind: "activate", Key: k1, Number: n21},
		{Kind: "drop", Key: k1, Number: n12},
		{Kind: "await", Key: k2, Entry: 1},
		{Kind: "revoke", Key: k2},
		{Kind: "await", Key: k2, Entry: 2},
		{Kind: "delete", Key: k2, Entry: 3},
		{Kind: "receipt", Key: k2, Entry: 4},
	}
}

// TestCrashAtEachFailpoint kills a process at each time at which each failpoint of
// the package is reached.
func TestCrashAtEachFailpoint(t *testing.T) {
	c, ops := buildCrasher(t), lifeOps()
	want := model{}
	for _, o := range ops {
		next, ok := want.apply(o)
		if !ok {
			t.Fatalf("%s is not in order", o)
		}
		want = next
	}
	names := failpoints(t)
	total := 0
	for _, name := range names {
		hits := 0
		for {
			dir := t.TempDir()
			done, killed := c.crash(t, dir, ops, fmt.Sprintf("%s:%d", name, hits+1))
			if !killed {
				break
			}
			hits++
			v := &crashed{&testVault{t: t, dir: filepath.Join(dir, "vault")}, model{}}
			for _, o := range v.judge(t, ops, done, killed) {
				if err := v.doAny(o); err != nil {
					t.Errorf("%s:%d: going on with %s: %v", name, hits, o, err)
				}
			}
			v.reopen()
			if d := want.diff(v.Vault); d != "" {
				t.Errorf("%s:%d, in the end: %s", name, hits, d)
			}
			wantTidy(t, v.dir, want)
			v.Close()
		}
		if hits == 0 {
			t.Errorf("%s was never reached", name)
		}
		total += hits
	}
	t.Logf("%d failpoints, killed %d times", len(names), total)
}

// TestCrashModel kills processes at random failpoints in random operations, again
// and again in one folder.
func TestCrashModel(t *testing.T) {
	c, names := buildCrasher(t), failpoints(t)
	base := t.TempDir()
	rapid.Check(t, func(rt *rapid.T) {
		dir, err := os.MkdirTemp(base, "r")
		must(t, err)
		defer os.RemoveAll(dir)
		v := &crashed{&testVault{t: t, dir: filepath.Join(dir, "vault")}, model{}}
		ops := []op{{Kind: "create"}}
		for i := range rapid.IntRange(1, 3).Draw(rt, "processes") {
			for j := range rapid.IntRange(1, 10).Draw(rt, "operations") {
				ops = append(ops, drawOp(rt, 100*i+j))
			}
			point := fmt.Sprintf("%s:%d", rapid.SampledFrom(names).Draw(rt, "failpoint"), rapid.IntRange(1, 5).Draw(rt, "time"))
			done, killed := c.crash(rt, dir, ops, point)
			v.judge(rt, ops, done, killed)
			v.Close()
			v.Vault, ops = nil, nil
		}
	})
}

// failpoints are all names of failpoints in the package's source. What it cannot
// follow is an error, so that none is forgotten.
func failpoints(t *testing.T) []string {
	t.Helper()
	var suffixes, prefixes []string
	names := map[string]bool{}
	for _, path := range sources(t) {
		file, err := parser.ParseFile(token.NewFileSet(), path, nil, 0)
		must(t, err)
		ast.Inspect(file, func(n ast.Node) bool {
			call, ok := n.(*ast.CallExpr)
			if !ok {
				return true
			}
			switch callee(call) {
			case "failpoint.Hit":
				if sum, ok := call.Args[0].(*ast.BinaryExpr); ok {
					if x, ok := sum.X.(*ast.Ident); !ok || x.Name != "point" {
						t.Fatalf("%s: a failpoint that is neither a name nor writeFile's", path)
					}
					suffixes = append(suffixes, literal(t, sum.Y))
				} else {
					names[literal(t, call.Args[0])] = true
				}
			case "writeFile":
				prefixes = append(prefixes, literal(t, call.Args[2]))
			}
			return true
		})
	}
	for _, p := range prefixes {
		for _, s := range suffixes {
			names[p+s] = true
		}
	}
	if len(suffixes) == 0 || len(prefixes) < 5 || len(names) <= len(prefixes)*len(suffixes) {
		t.Fatalf("the search found %q, %q, %d names", suffixes, prefixes, len(names))
	}
	return slices.Sorted(maps.Keys(names))
}

func sources(t *testing.T) (out []string) {
	t.Helper()
	all, err := filepath.Glob("*.go")
	must(t, err)
	for _, path := range all {
		if !strings.HasSuffix(path, "_test.go") {
			out = append(out, path)
		}
	}
	return out
}

func callee(call *ast.CallExpr) string {
	switch f := call.Fun.(type) {
	case *ast.Ident:
		return f.Name
	case *ast.SelectorExpr:
		if x, ok := f.X.(*ast.Ident); ok {
			return x.Name + "." + f.Sel.Name
		}
	}
	return ""
}

func literal(t *testing.T, e ast.Expr) string {
	t.Helper()
	l, ok := e.(*ast.BasicLit)
	if !ok || l.Kind != token.STRING {
		t.Fatalf("the name of a failpoint is not written out: %T", e)
	}
	s, err := strconv.Unquote(l.Value)
	must(t, err)
	return s
}
