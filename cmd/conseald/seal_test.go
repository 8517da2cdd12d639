package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

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

// What a stranger puts into the folder of policies is named, and holds nobody up.
func TestStrangeFilesForPolicies(t *testing.T) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	s := &sealPolicies{host: policy.Host{Name: "alpha", Key: &key.PublicKey, Counter: 0x01800601}, dir: t.TempDir()}
	path := func(name string) string { return filepath.Join(s.dir, name) }
	p := &policy.Policy{Host: "alpha", Counter: 0x01800601, Version: 1, State: policy.State{4: make([]byte, 32)}}
	document, err := p.Sign(key)
	if err := errors.Join(err, s.keep(p, document), unix.Mkfifo(path("fifo.toml"), 0o600), os.Symlink("/dev/zero", path("zero.toml")), os.Mkdir(path("dir.toml"), 0o700)); err != nil {
		t.Fatal(err)
	}
	good, broken := s.read()
	if len(good) != 1 || broken == nil {
		t.Fatalf("%d good ones, %v", len(good), broken)
	}
	for _, name := range []string{"fifo.toml", "zero.toml", "dir.toml"} {
		if !strings.Contains(broken.Error(), name) {
			t.Errorf("%s is not named in: %v", name, broken)
		}
	}
}
