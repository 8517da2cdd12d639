package main

import (
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"conseal/config"
)

// A second token that the configuration forgot keeps the root of that day: no agent goes
// on to a next one without it.
func TestAForgottenSecondToken(t *testing.T) {
	c := &config.Host{Name: "alpha", State: t.TempDir()}
	c.Protector.HSM.PIN, c.Protector.HSM.SecondPIN = "none", "none" // no helper is started
	open := func() error {
		_, err := openToken(t.Context(), c, slog.New(slog.DiscardHandler))
		return err
	}
	forgotten := func(err error) bool { return strings.Contains(err.Error(), "second_uri is empty") }
	if err := errors.Join(os.MkdirAll(hsmFolder(c), 0o700), os.MkdirAll(secondFolder(c), 0o700)); err != nil {
		t.Fatal(err)
	}
	if err := open(); err == nil || forgotten(err) { // there was none in it yet
		t.Errorf("an empty folder: %v", err)
	}
	if err := os.WriteFile(filepath.Join(secondFolder(c), "hsm-root.7"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := open(); !forgotten(err) {
		t.Errorf("a root in the second: %v", err)
	}
	c.Protector.HSM.SecondURI = "pkcs11:"
	if err := open(); err == nil || forgotten(err) {
		t.Errorf("it is back: %v", err)
	}
}
