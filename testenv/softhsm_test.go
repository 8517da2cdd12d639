package testenv_test

import (
	"os"
	"os/exec"
	"strings"
	"testing"

	"conseal/testenv"
)

func TestNewToken(t *testing.T) {
	dir := t.TempDir()
	a, err := testenv.NewToken(t.Context(), dir)
	if err != nil {
		t.Fatal(err)
	}
	b, err := testenv.NewToken(t.Context(), dir)
	if err != nil {
		t.Fatal(err)
	}
	if a.Serial == b.Serial || a.Label == b.Label || a.Conf != b.Conf {
		t.Fatalf("two tokens of one store: %+v and %+v", a, b)
	}
	info, err := os.Stat(b.PINFile)
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Fatalf("PIN file: %v, %v", info, err)
	}
	if err := testenv.Need("pkcs11-tool", "opensc"); err != nil {
		t.Fatal(err)
	}
	pin, err := os.ReadFile(b.PINFile)
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), "pkcs11-tool", "--module", b.Module, "--token-label", b.Label,
		"--login", "--pin", strings.TrimSpace(string(pin)), "--list-objects")
	cmd.Env = append(os.Environ(), b.Env()...)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("logging in: %v\n%s", err, out)
	}
}
