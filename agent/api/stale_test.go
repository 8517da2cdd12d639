package api_test

import (
	"bytes"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// TestGeneratedCodeIsFresh makes the code of the .proto files again and compares.
func TestGeneratedCodeIsFresh(t *testing.T) {
	if _, err := exec.LookPath("protoc"); err != nil {
		t.Fatal("protoc is needed; install it: apt-get install protobuf-compiler")
	}
	dir := t.TempDir()
	if out, err := exec.Command("sh", "../../internal/generate.sh", dir).CombinedOutput(); err != nil {
		t.Fatalf("generate.sh: %v\n%s", err, out)
	}
	compared := 0
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		name, _ := filepath.Rel(dir, path)
		fresh, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		committed, err := os.ReadFile(filepath.Join("../..", name))
		if err != nil || !bytes.Equal(withoutCompiler(fresh), withoutCompiler(committed)) {
			t.Errorf("%s is stale (%v): make generate", name, err)
		}
		compared++
		return nil
	})
	if err != nil || compared < 3 {
		t.Errorf("compared %d files: %v", compared, err)
	}
}

// withoutCompiler leaves the line out that names the version of protoc, which is
// the distribution's.
func withoutCompiler(code []byte) []byte {
	var out []byte
	for line := range bytes.Lines(code) {
		if !strings.Contains(string(line), "protoc ") {
			out = append(out, line...)
		}
	}
	return out
}
