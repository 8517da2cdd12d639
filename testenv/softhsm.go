package testenv

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Token is a fresh token with a user PIN.
type Token struct {
	Conf     string // SoftHSM's configuration file, for SOFTHSM2_CONF
	Store    string // the folder of the tokens' objects
	Module   string // the PKCS#11 library
	InitArgs string // what C_Initialize gets as pReserved; empty but for NSS
	Label    string
	Serial   string // of SoftHSM
	PINFile  string // mode 0600, holds the user PIN
	URI      string // with token, module-path and pin-source, of SoftHSM with serial
}

// NewToken makes a SoftHSM token in dir; several calls on one dir make several
// tokens of one store. A process sees it if it has [Token.Env] in its environment
// before the module is initialised. A dir on /dev/shm is many times faster: SoftHSM
// rewrites and syncs a file for each attribute of an object. More lines of
// softhsm2.conf, such as "slots.mechanisms = CKM_...", hold for the whole dir.
func NewToken(ctx context.Context, dir string, conf ...string) (*Token, error) {
	if err := Need("softhsm2-util", "softhsm2"); err != nil {
		return nil, err
	}
	module, err := softHSM()
	if err != nil {
		return nil, err
	}
	random := rand.Text()
	t := &Token{
		Conf: filepath.Join(dir, "softhsm2.conf"), Store: filepath.Join(dir, "tokens"),
		Module: module, Label: "test-" + random[:12],
	}
	t.PINFile = filepath.Join(dir, t.Label+".pin")
	pin := random[12:20]
	if err := t.writeFiles(pin, conf); err != nil {
		return nil, fmt.Errorf("preparing a SoftHSM token: %w", err)
	}
	if err := t.init(ctx, pin, rand.Text()[:16]); err != nil {
		return nil, fmt.Errorf("making a SoftHSM token: %w", err)
	}
	t.URI = fmt.Sprintf("pkcs11:token=%s;serial=%s?module-path=%s&pin-source=file:%s", t.Label, t.Serial, t.Module, t.PINFile)
	return t, nil
}

// Env is what a process needs in its environment to see the token.
func (t *Token) Env() []string { return []string{"SOFTHSM2_CONF=" + t.Conf} }

// softHSM finds the library where distributions put it.
func softHSM() (string, error) {
	for _, path := range []string{
		"/usr/lib/softhsm/libsofthsm2.so", "/usr/lib/x86_64-linux-gnu/softhsm/libsofthsm2.so",
		"/usr/lib/aarch64-linux-gnu/softhsm/libsofthsm2.so", "/usr/lib64/pkcs11/libsofthsm2.so",
		"/usr/lib64/softhsm/libsofthsm2.so", "/usr/lib/pkcs11/libsofthsm2.so", "/usr/local/lib/softhsm/libsofthsm2.so",
	} {
		if _, err := os.Stat(path); err == nil {
			return path, nil
		}
	}
	return "", errors.New("libsofthsm2.so is needed and was not found; install it: apt-get install softhsm2")
}

// Spy is OpenSC's module that stands in front of another one and logs each call: it
// wants PKCS11SPY, the other's path, and PKCS11SPY_OUTPUT in the environment.
func Spy() (string, error) {
	for _, pattern := range []string{"/usr/lib*/*/pkcs11-spy.so", "/usr/lib*/pkcs11-spy.so"} {
		if found, err := filepath.Glob(pattern); err == nil && len(found) > 0 {
			return found[0], nil
		}
	}
	return "", errors.New("pkcs11-spy.so is needed and was not found; install it: apt-get install opensc-pkcs11")
}

func (t *Token) writeFiles(pin string, more []string) error {
	if err := os.Mkdir(t.Store, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	conf := "directories.tokendir = " + t.Store + "\nobjectstore.backend = file\nobjectstore.umask = 0077\nlog.level = ERROR\nslots.removable = false\n" + strings.Join(more, "\n") + "\n"
	if err := os.WriteFile(t.Conf, []byte(conf), 0o600); err != nil {
		return err
	}
	return os.WriteFile(t.PINFile, []byte(pin+"\n"), 0o600)
}

// init makes the token and learns its serial number. The PINs are in the argument
// list, where others on this machine can read them: they protect nothing but tests.
func (t *Token) init(ctx context.Context, pin, soPIN string) error {
	if _, err := t.util(ctx, "--init-token", "--free", "--label", t.Label, "--pin", pin, "--so-pin", soPIN); err != nil {
		return err
	}
	slots, err := t.util(ctx, "--show-slots")
	if err != nil {
		return err
	}
	var serial string
	for line := range strings.Lines(slots) { // the serial number comes before the label
		name, value, _ := strings.Cut(strings.TrimSpace(line), ":")
		switch value = strings.TrimSpace(value); {
		case name == "Serial number":
			serial = value
		case name == "Label" && value == t.Label:
			t.Serial = serial
			return nil
		}
	}
	return fmt.Errorf("softhsm2-util does not show token %s:\n%s", t.Label, slots)
}

func (t *Token) util(ctx context.Context, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, "softhsm2-util", args...)
	cmd.Env = append(os.Environ(), t.Env()...)
	out, err := cmd.CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("softhsm2-util %s: %w: %s", args[0], err, out)
	}
	return string(out), nil
}

// Copy makes a second token with the keys and the PIN that this one has now: what a
// vendor's means of copying do to another HSM of theirs. Nobody may use this one meanwhile.
func (t *Token) Copy() (*Token, error) {
	from, err := t.folder()
	if err != nil {
		return nil, err
	}
	var random [8]byte
	rand.Read(random[:])
	serial := hex.EncodeToString(random[:]) // the slot's number is made of it
	to := filepath.Join(t.Store, serial)
	if err := os.CopyFS(to, os.DirFS(from)); err != nil {
		return nil, fmt.Errorf("copying a SoftHSM token: %w", err)
	}
	file := filepath.Join(to, "token.object")
	object, err := os.ReadFile(file)
	if err == nil {
		err = os.WriteFile(file, bytes.Replace(object, []byte(t.Serial), []byte(serial), 1), 0o600)
	}
	c := *t
	c.Serial, c.URI = serial, strings.Replace(t.URI, t.Serial, serial, 1)
	return &c, err
}

// Freeze is [Freeze] of a process that uses tokens of this store, at a moment at which it
// may be killed: at each login SoftHSM empties the token's own file and fills it after
// that, and a kill in between is the end of the token, as of no HSM.
func (t *Token) Freeze(pid int) (stopped bool, err error) {
	for ; ; time.Sleep(time.Millisecond) { // it needs a moment to get on
		if stopped, err = Freeze(pid); !stopped || err != nil {
			return false, err
		}
		files, err := filepath.Glob(filepath.Join(t.Store, "*", "token.object"))
		if err != nil {
			return false, err
		}
		empty := func(file string) bool { info, err := os.Stat(file); return err != nil || info.Size() == 0 }
		if !slices.ContainsFunc(files, empty) {
			return true, nil
		}
		_ = unix.Kill(pid, unix.SIGCONT) // it may have ended
	}
}

// Take takes the token away, as if it were not plugged in, until back is called.
func (t *Token) Take() (back func() error, err error) {
	from, err := t.folder()
	if err != nil {
		return nil, err
	}
	away := filepath.Join(filepath.Dir(t.Store), "away-"+t.Serial)
	return func() error { return os.Rename(away, from) }, os.Rename(from, away)
}

// folder is where SoftHSM keeps the token.
func (t *Token) folder() (string, error) {
	files, err := filepath.Glob(filepath.Join(t.Store, "*", "token.object"))
	for _, file := range files {
		b, err := os.ReadFile(file)
		if err != nil {
			return "", err
		}
		if bytes.Contains(b, []byte(t.Serial)) {
			return filepath.Dir(file), nil
		}
	}
	return "", errors.Join(err, fmt.Errorf("no folder of SoftHSM holds token %s", t.Serial))
}
