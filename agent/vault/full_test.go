package vault_test

import (
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"conseal/agent/vault"
	"conseal/internal/secret"
)

// fullEnv makes this test binary run fillUp in a folder.
const fullEnv = "VAULT_TEST_FULL"

// TestDiskFull runs fillUp in a process of its own, as the limit is the process's.
func TestDiskFull(t *testing.T) {
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), fullEnv+"="+t.TempDir())
	if out, err := cmd.CombinedOutput(); err != nil || !strings.Contains(string(out), childDone) {
		t.Fatalf("%v\n%s", err, out)
	}
}

// fillUp stops all files from growing, which root is subject to as well. A write
// is cut short in the middle, as on a full disk; the error is EFBIG, not ENOSPC.
func fillUp(t testing.TB) {
	signal.Ignore(syscall.SIGXFSZ)
	hw := newHardware()
	v := &testVault{t: t, dir: filepath.Join(os.Getenv(fullEnv), "vault"), hw: hw}
	must(t, vault.Create(t.Context(), v.dir, host, hw))
	v.reopen()
	v.born(payments, n11)
	must(t, v.stage(payments, n12))
	must(t, v.stage(backups, n11))
	before, root := files(t, v.dir), hw.root()
	for _, limit := range []uint64{0, 40, 400} { // nothing; half a header; some, but not a manifest
		var old unix.Rlimit
		must(t, unix.Getrlimit(unix.RLIMIT_FSIZE, &old))
		must(t, unix.Setrlimit(unix.RLIMIT_FSIZE, &unix.Rlimit{Cur: limit, Max: old.Max}))
		errs := map[string]error{
			"see":      v.see(backups, 1),
			"stage":    v.Stage(t.Context(), vault.Held, payments, n13, vault.Output{}, vault.Origin{}, nil, secret.Random(2000)),
			"vote":     v.vote(backups, n11),
			"activate": v.activate(payments, n12),
			"drop":     v.drop(payments, n12),
		}
		if limit < 100 { // a new vault is small
			errs["create"] = vault.Create(t.Context(), filepath.Join(os.Getenv(fullEnv), "new"), host, newHardware())
		} else { // the share fits, and the manifest does not
			errs["small stage"] = v.Stage(t.Context(), vault.Held, payments, n13, vault.Output{}, vault.Origin{}, nil, secret.Random(16))
		}
		must(t, unix.Setrlimit(unix.RLIMIT_FSIZE, &old))
		for what, err := range errs {
			wantError(t, err, unix.EFBIG, "file too large")
			t.Logf("limit %d, %s: %v", limit, what, err)
		}
		v.wantLends(payments, n11, n12)
		v.wantLends(backups, n11)
		if string(hw.root()) != string(root) {
			t.Error("the root changed")
		}
		v.reopen()
		wantSameFiles(t, v.dir, before)
	}
	must(t, v.see(backups, 1))
	must(t, v.vote(backups, n11))
	must(t, v.activate(payments, n12))
	must(t, v.drop(payments, n11))
	must(t, v.stage(payments, n13))
	v.reopen()
	v.wantLends(payments, n12, n13)
	v.Close()
}
