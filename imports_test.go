package conseal_test

import (
	"encoding/json"
	"errors"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// allowed says which packages of this module each may import. "..." at the end
// stands for the package and what is below it. What is not listed may import
// nothing of ours. docs/architecture.md explains the table.
var allowed = map[string][]string{
	"internal/secret":              {},
	"internal/failpoint":           {},
	"internal/disk":                {},
	"internal/pin":                 {"internal/disk", "internal/secret"},
	"tpm":                          {"internal/pin", "internal/secret", "tpm/attest", "tpm/policy"},
	"tpm/attest":                   {"tpm/policy"},
	"tpm/attest/boot":              {"tpm/attest", "tpm/eventlog"},
	"tpm/eventlog":                 {"tpm/policy"},
	"tpm/policy":                   {},
	"hsm":                          {"internal/disk", "internal/pin", "internal/secret"},
	"hsm/helper":                   {"hsm", "internal/disk", "internal/pin", "internal/secret"},
	"protocol":                     {"internal/secret"},
	"protocol/mailbox":             {"protocol"},
	"protocol/dealing":             {"internal/secret", "protocol", "protocol/mailbox"},
	"protocol/frost":               {"internal/secret", "protocol", "protocol/dealing", "protocol/mailbox"},
	"protocol/protocoltest":        {"protocol", "protocol/dealing"},
	"protocol/guard":               {"protocol", "protocol/dealing"},
	"protocol/cmp":                 {"internal/secret", "protocol", "protocol/dealing", "protocol/guard", "protocol/mailbox"},
	"protocol/taproot":             {"internal/secret", "protocol", "protocol/dealing", "protocol/guard"},
	"config":                       {},
	"agent/api":                    {"agent/api/..."},
	"agent/api/apipb":              {},
	"agent/api/apipb/apipbconnect": {"agent/api/apipb"},
	"agent/peer/peerpb":            {},
	"agent/peer":                   {"agent/peer/...", "protocol", "config"},
	"agent/vault":                  {"internal/disk", "internal/secret", "internal/failpoint"},
	"agent/vault/vaulttest":        {"agent/vault", "internal/secret"},
	"agent/epoch":                  {"agent/vault", "protocol"},
	"agent":                        {"internal/...", "protocol/...", "config", "agent/..."},
	"cmd/conseald":                 {"agent", "agent/api/apipb", "agent/vault", "config", "hsm/...", "internal/disk", "tpm", "tpm/policy"},
	"cmd/conseal":                  {"agent/api/...", "config", "hsm", "protocol/...", "tpm/eventlog", "tpm/policy"},
	"testenv":                      {"internal/...", "protocol/...", "config", "agent/...", "tpm", "hsm"},
	"testenv/bench":                {"testenv", "protocol/...", "agent/api", "agent/vault", "hsm/...", "internal/secret", "tpm/..."},
	"testenv/story":                {"testenv"},
}

// onlyIn says which packages alone may import what is dangerous or heavy: a
// package, or with "/..." a folder of them. Of the threshold module only cmp, frost
// and pkg are fit for use: lss reshares wrongly, doerner has GHSA-7f6p-phw2-8253,
// pool deadlocks.
var onlyIn = map[string][]string{
	"github.com/miekg/pkcs11":       {"hsm"},
	"github.com/google/go-tpm/tpm2": {"tpm", "tpm/attest", "tpm/policy", "testenv"},
	"C":                             {},
	// A codec; its own sealing leaks handles and leaves sealed data open to an empty password.
	"github.com/foxboron/go-tpm-keyfiles": {"tpm"},

	// They parse what firmware and boot loaders write: kept out of the agent.
	"github.com/google/go-eventlog/...":  {"tpm/eventlog"},
	"github.com/google/go-tpm-tools/...": {"tpm/attest/boot"},

	"github.com/luxfi/threshold/...":                   {"protocol/guard", "protocol/cmp", "protocol/taproot"},
	"github.com/luxfi/threshold/pkg/pool":              {},
	"github.com/luxfi/threshold/protocols/lss/...":     {},
	"github.com/luxfi/threshold/protocols/doerner/...": {},
}

const module = "conseal"

type listed struct {
	ImportPath string
	Imports    []string
}

// readSources opens every source file, so that go test knows what the answer of go
// list depends on, and keeps no result for a tree that has changed.
func readSources(t *testing.T) {
	t.Helper()
	files := 0
	err := filepath.WalkDir(".", func(path string, _ fs.DirEntry, err error) error {
		if err == nil && strings.HasSuffix(path, ".go") {
			files++
			_, err = os.ReadFile(path)
		}
		return err
	})
	if err != nil || files == 0 {
		t.Fatalf("reading the sources: %d files, %v", files, err)
	}
}

func list(t *testing.T) (packages []listed) {
	t.Helper()
	readSources(t)
	out, err := exec.Command("go", "list", "-json=ImportPath,Imports", "./...").Output()
	if err != nil {
		t.Fatalf("go list: %v", err)
	}
	decoder := json.NewDecoder(strings.NewReader(string(out)))
	for {
		var p listed
		err := decoder.Decode(&p)
		if errors.Is(err, io.EOF) {
			return packages
		}
		if err != nil {
			t.Fatal(err)
		}
		packages = append(packages, p)
	}
}

func matches(pattern, name string) bool {
	if dir, ok := strings.CutSuffix(pattern, "/..."); ok {
		return name == dir || strings.HasPrefix(name, dir+"/")
	}
	return pattern == name
}

func TestImportTable(t *testing.T) {
	seen := map[string]bool{}
	for _, p := range list(t) {
		name := strings.TrimPrefix(strings.TrimPrefix(p.ImportPath, module), "/")
		if name == "" {
			continue
		}
		may, known := allowed[name]
		if !known {
			t.Errorf("package %s is not in the table: decide what it may import", name)
		}
		seen[name] = true
		for _, imp := range p.Imports {
			for outside, where := range onlyIn {
				if matches(outside, imp) && !slices.Contains(where, name) {
					t.Errorf("%s imports %s, which only %q may", name, imp, where)
				}
			}
			ours, ok := strings.CutPrefix(imp, module+"/")
			if ok && !slices.ContainsFunc(may, func(pattern string) bool { return matches(pattern, ours) }) {
				t.Errorf("%s imports %s, which the table does not allow", name, ours)
			}
		}
	}
	for name := range allowed {
		if !seen[name] {
			t.Errorf("package %s is in the table and does not exist", path.Join(module, name))
		}
	}
}
