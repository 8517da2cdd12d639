package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"conseal/config"
	"conseal/tpm/policy"
)

func TestEventLogPath(t *testing.T) {
	kernels := config.Default().Protector.TPM.EventLog
	for _, test := range []struct{ device, path, want string }{
		{"device:/dev/tpmrm0", kernels, kernels},
		{"unix:/run/swtpm", kernels, ""}, // of another TPM
		{"unix:/run/swtpm", "/run/log", "/run/log"},
		{"device:/dev/tpmrm0", "", ""},
	} {
		if got := eventLog(&config.TPM{Device: test.device, EventLog: test.path}); got != test.want {
			t.Errorf("%s, %q: got %q, want %q", test.device, test.path, got, test.want)
		}
	}
}

func TestReadEventLog(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	for _, test := range []struct {
		size int
		want string // of the error
	}{{-1, "no such file"}, {0, "is empty"}, {1, ""}, {policy.MaxEventLog, ""}, {policy.MaxEventLog + 1, "more than"}} {
		if test.size >= 0 {
			if err := os.WriteFile(path, make([]byte, test.size), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		b, err := readEventLog(path)
		if test.want == "" && (err != nil || len(b) != test.size) || test.want != "" && (err == nil || !strings.Contains(err.Error(), test.want)) {
			t.Errorf("a log of %d bytes: got %d, %v, want %q", test.size, len(b), err, test.want)
		}
	}
	if _, err := readEventLog(""); err == nil {
		t.Error("no path, and no reason why there is no log")
	}
}
