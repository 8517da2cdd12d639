package main_test

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"conseal/hsm"
	"conseal/testenv"
)

// TestHSMProbe runs the real program on SoftHSM and NSS.
func TestHSMProbe(t *testing.T) {
	bin, err := testenv.Build(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer testenv.Clean()
	soft, err := testenv.NewToken(t.Context(), t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	nss, err := testenv.NewNSS(t.Context(), dir)
	if err != nil {
		t.Fatal(err)
	}
	cache := t.TempDir()
	probe := func(args ...string) (out, errs string, code int) {
		cmd := exec.CommandContext(t.Context(), bin.Agent, append([]string{"hsm", "probe"}, args...)...)
		cmd.Env = append(append(os.Environ(), "XDG_CACHE_HOME="+cache), soft.Env()...)
		var stderr strings.Builder
		cmd.Stderr = &stderr
		b, err := cmd.Output()
		if err != nil && cmd.ProcessState == nil {
			t.Fatal(err)
		}
		return string(b), stderr.String(), cmd.ProcessState.ExitCode()
	}

	out, errs, code := probe(soft.URI)
	for _, want := range []string{"SoftHSM v2", "CKM_AES_GCM", "\naes-gcm          yes", "\naes-kwp          NO", "ARGUMENTS_BAD", "erasure = host-file", "\nEXTRACTABLE        yes", `method = "aes-gcm"`} {
		if !strings.Contains(out, want) {
			t.Errorf("SoftHSM: no %q in:\n%s%s", want, out, errs)
		}
	}
	if code != 0 || strings.Contains(out, "not an HSM") {
		t.Errorf("SoftHSM: exit code %d:\n%s", code, out)
	}

	out, errs, _ = probe(nss.URI, "--init-args", nss.InitArgs, "--json")
	var r hsm.Report
	if err := json.Unmarshal([]byte(out), &r); err != nil || r.Recommended != "aes-kw-enc" || !strings.Contains(strings.Join(r.Warnings, "\n"), "not an HSM") {
		t.Errorf("NSS: %v: %s%s", err, out, errs)
	}

	wrong := filepath.Join(t.TempDir(), "pin")
	if err := os.WriteFile(wrong, []byte("0000"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"CKR_PIN_INCORRECT", "was sent before"} { // the second time it is not sent
		if _, errs, code := probe(soft.URI, "--pin", "file:"+wrong); code != 1 || !strings.Contains(errs, want) {
			t.Errorf("a wrong PIN: exit code %d, %s, want %s", code, errs, want)
		}
	}
	if _, errs, code := probe(soft.URI); code != 0 {
		t.Errorf("the right PIN after a wrong one: %s", errs)
	}
	for _, bad := range [][]string{{"token=a"}, {}, {soft.URI, "--pin", "1234"}, {"pkcs11:token=a?module-path=/none.so&pin-source=fd:3"}} {
		if _, errs, code := probe(bad...); code == 0 || errs == "" || strings.Contains(errs, "panic") {
			t.Errorf("%q: exit code %d, %s", bad, code, errs)
		}
	}
}

// TestAProbeLeavesNoCore looks at a probe that has the PIN and whose library hangs with it.
func TestAProbeLeavesNoCore(t *testing.T) {
	bin, err := testenv.Build(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer testenv.Clean()
	tok, err := testenv.NewToken(t.Context(), t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	m, err := testenv.NewFaultModule(t.Context(), t.TempDir(), tok.Module)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := m.Set(testenv.Fault{Call: "C_Login", Do: testenv.Hang}); err != nil {
		t.Fatal(err)
	}
	var old unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_CORE, &old); err != nil || old.Max == 0 {
		t.Fatalf("core files are forbidden here, so this shows nothing: %v", err)
	}
	cmd := exec.CommandContext(t.Context(), bin.Agent, "hsm", "probe", strings.Replace(tok.URI, tok.Module, m.Path, 1))
	cmd.Env = append(append(os.Environ(), "XDG_CACHE_HOME="+t.TempDir()), tok.Env()...)
	p, err := testenv.StartProcess(cmd)
	if err != nil {
		t.Fatal(err)
	}
	defer p.Kill()
	for calls := 0; calls == 0; {
		all, err := m.Calls()
		calls = all["C_Login"]
		select {
		case <-p.Done():
			t.Fatalf("it ended: %v: %s", err, p.Stderr())
		default:
		}
	}
	var core unix.Rlimit
	if err := unix.Prlimit(cmd.Process.Pid, unix.RLIMIT_CORE, nil, &core); err != nil || core.Max != 0 {
		t.Errorf("it may write core files: %v, %v", core, err)
	}
}
