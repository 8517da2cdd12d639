package testenv

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
)

// NewNSS makes a database of NSS softoken in dir: a second implementation of
// PKCS#11. A process has one, for it is named when the module is initialised:
// [Token.InitArgs]. Hosts with names of their own can share it. It is no HSM: it
// gives out keys that are not extractable.
func NewNSS(ctx context.Context, dir string) (*Token, error) {
	if err := Need("certutil", "libnss3-tools"); err != nil {
		return nil, err
	}
	module, err := softoken()
	if err != nil {
		return nil, err
	}
	t := &Token{Store: dir, Module: module, Label: "NSS Certificate DB", PINFile: filepath.Join(dir, "nss.pin")}
	if err := os.WriteFile(t.PINFile, []byte(rand.Text()[:12]+"\n"), 0o600); err != nil {
		return nil, err
	}
	if out, err := exec.CommandContext(ctx, "certutil", "-N", "-d", "sql:"+dir, "-f", t.PINFile).CombinedOutput(); err != nil {
		return nil, fmt.Errorf("certutil -N: %w: %s", err, out)
	}
	t.InitArgs = fmt.Sprintf("configdir='sql:%s' certPrefix='' keyPrefix='' secmod='secmod.db' flags=", dir)
	t.URI = fmt.Sprintf("pkcs11:token=NSS%%20Certificate%%20DB?module-path=%s&pin-source=file:%s", module, t.PINFile)
	return t, nil
}

// FastNSS is a variable for the environment and its value: NSS then does not stretch
// the PIN, which it does anew for each private key that it reads.
func FastNSS() (name, value string) { return "NSS_MAX_MP_PBE_ITERATION_COUNT", "1" }

// softoken finds the library where distributions put it.
func softoken() (string, error) {
	for _, path := range []string{
		"/usr/lib/x86_64-linux-gnu/libsoftokn3.so", "/usr/lib/x86_64-linux-gnu/nss/libsoftokn3.so",
		"/usr/lib/aarch64-linux-gnu/libsoftokn3.so", "/usr/lib/aarch64-linux-gnu/nss/libsoftokn3.so",
		"/usr/lib64/libsoftokn3.so", "/usr/lib/libsoftokn3.so",
	} {
		if _, err := os.Stat(path); err == nil {
			return path, nil
		}
	}
	return "", errors.New("libsoftokn3.so is needed and was not found; install it: apt-get install libnss3")
}
