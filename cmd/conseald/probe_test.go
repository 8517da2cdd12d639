package main_test

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

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
