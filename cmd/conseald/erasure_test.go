package main

import (
	"os"
	"strings"
	"testing"

	"conseal/config"
	"conseal/hsm"
)

// TestErasure: the configuration counts before the records, of these the least, and one
// that is of no use is said to be.
func TestErasure(t *testing.T) {
	c := config.Default()
	c.State = t.TempDir()
	want := func(kind, why string) {
		t.Helper()
		if gotKind, gotWhy := erasure(c); gotKind != kind || !strings.Contains(gotWhy, why) {
			t.Errorf("got %q: %s, want %q: ...%s", gotKind, gotWhy, kind, why)
		}
	}
	record := func(folder string, e hsm.Erasure) {
		t.Helper()
		if err := recordErasure(folder, hsm.Provisioned{Erasure: e, ErasureWhy: "looks like " + string(e)}); err != nil {
			t.Fatal(err)
		}
	}
	for _, folder := range []string{hsmFolder(c), secondFolder(c)} {
		if err := os.Mkdir(folder, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	want("", "run `conseald init` again")
	record(hsmFolder(c), hsm.ErasureDevice)
	record(secondFolder(c), hsm.ErasureReplicated)
	want("device", "a guess: looks like device")
	c.Protector.HSM.SecondURI = "pkcs11:token=second"
	want("replicated", "a guess: looks like replicated")
	record(hsmFolder(c), hsm.ErasureHostFile)
	want("host-file", "a guess: looks like host-file")
	for _, damaged := range []string{"{", `{"version": 2, "erasure": "device"}`, `{"version": 1, "erasure": "never"}`, ""} {
		if err := os.WriteFile(erasurePath(hsmFolder(c)), []byte(damaged), 0o600); err != nil {
			t.Fatal(err)
		}
		want("", "erasure.json is damaged")
	}
	c.Protector.HSM.Erasure = "device"
	want("device", "protector.hsm.erasure says so")
}
