// Package hsm guards a host's shares by a PKCS#11 token.
//
// [Provision] makes this host's objects in the token, once. [Open] logs in and
// gives an [HSM], whose methods Seal, Open, Root and SetRoot protect shares at
// rest and whose Identity is the host's key for mutual TLS:
//
//	h, err := hsm.Open(ctx, hsm.Config{
//		URI:       "pkcs11:token=conseal;serial=1234?module-path=/usr/lib/softhsm/libsofthsm2.so",
//		Name:      "web1",
//		PINSource: "file:/etc/conseal/hsm.pin",
//		StateDir:  "/var/lib/conseal/hsm",
//	})
//
// [Probe] tells an operator beforehand what a token can, and which Method to choose.
// [OpenKey] is for a tool instead: it gives a signer with a key that is in a token already.
//
// The vendor's library runs inside the process: a crash of it is a crash of the
// process, and a call under way cannot be interrupted. A context is honoured
// between calls and while waiting for a session. Package helper does the same in a
// process of its own.
//
// PKCS#11 is spoken through cgo. Without it the package still parses URIs and
// clears PIN latches, and Open, Provision, Probe and OpenKey say what is missing.
package hsm

import (
	"errors"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"strings"

	"conseal/internal/disk"
	"conseal/internal/pin"
)

// Config says which token holds a host's keys and how to get into it.
type Config struct {
	// URI names one token and its module (RFC 7512): token or serial, and
	// module-path. See [ParseURI].
	URI string
	// Name is the host's name: 1 to 63 of A-Z a-z 0-9 . _ -. It is part of
	// every object's label, so that hosts can have one token in common.
	Name string
	// Method says how the token wraps, one of [Methods]; empty means [DefaultMethod].
	// No file or blob chooses it. A host keeps the one that it was provisioned with.
	Method string
	// InitArgs is what C_Initialize gets as pReserved, for libraries that want a text
	// there; empty for all others. NSS softoken wants
	// "configdir='sql:/DIR' certPrefix='' keyPrefix='' secmod='secmod.db' flags=".
	InitArgs string
	// Modules, if not empty, are the only modules that may be loaded, by
	// absolute path.
	Modules []string
	// PINSource says where the PIN comes from and wins over the URI's
	// pin-source: "file:/path" or "/path" (mode 0600, owned by us or root, no
	// symbolic link), "fd:N" (an open file descriptor, N >= 3; a pipe can be
	// read once), or "cred:NAME" (a systemd credential).
	PINSource string
	// StateDir is an absolute path of an existing folder (0700), for this host
	// and process alone: it holds the wrapped root and the PIN latch.
	StateDir string
	// MaxSessions bounds the operations under way at one time; 0 means 8. The
	// token may allow fewer.
	MaxSessions int
	// Second says that this token is the second of two, whose identity and wrapping
	// keys are copies of the first's: [Provision] makes neither. The root keys of the
	// two are their own, and so is StateDir.
	Second bool
	// Identity and Wrap name keys that somebody else made in the token, which
	// [Provision] then checks and does not make: a label, or "id=%01%AB", the
	// percent-encoded CKA_ID. Empty for the host's own.
	Identity, Wrap string
}

// given is what names a key that somebody else made; empty if nobody did.
func (c Config) given(what string) string {
	return map[string]string{"identity": c.Identity, "wrap": c.Wrap}[what]
}

// givenID reads the name of a key that is an id.
func givenID(name string) (id []byte, ok bool) {
	text, ok := strings.CutPrefix(name, "id=")
	decoded, err := url.PathUnescape(text)
	return []byte(decoded), ok && err == nil
}

func validGiven(name string) error {
	id, isID := givenID(name)
	switch {
	case strings.HasPrefix(name, "id=") && (!isID || len(id) == 0):
		return fmt.Errorf("hsm: key %q: wants a label, or id= and the percent-encoded id, id=%%01%%AB", name)
	case strings.HasPrefix(name, "conseal/"):
		return fmt.Errorf("hsm: key %q: labels with conseal/ are those of keys that hosts made for themselves", name)
	}
	return nil
}

// rootName is the end of the label of this token's root keys.
func (c Config) rootName() string { return rootNames()[c.place()] }

// otherRootName is that of the other one of two tokens.
func (c Config) otherRootName() string { return rootNames()[1-c.place()] }

func (c Config) place() int {
	if c.Second {
		return 1
	}
	return 0
}

// rootNames differ, so that a token that was copied, or replicates, is noticed: no key
// is taken for another token's, and none is destroyed in its place.
func rootNames() [2]string { return [2]string{"root", "root-second"} }

// maxSessions is the default of [Config.MaxSessions].
const maxSessions = 8

// validate checks the configuration and gives its URI.
func (c Config) validate() (*URI, error) {
	u, err := ParseURI(c.URI)
	if err == nil {
		err = u.checkToken()
	}
	switch {
	case err != nil:
		return nil, err
	case u.Object != "" || u.Type != "" || u.ID != nil:
		return nil, errors.New("hsm: the URI must name a token, not an object: remove object=, type= and id=")
	case c.PINSource == "" && u.PINSource == "":
		return nil, errors.New("hsm: no PIN source: set it to file:/path, fd:N or cred:NAME")
	case c.MaxSessions < 0:
		return nil, fmt.Errorf("hsm: max sessions is %d: must not be negative", c.MaxSessions)
	}
	if err := errors.Join(validName(c.Name), validMethod(c.Method), validGiven(c.Identity), validGiven(c.Wrap)); err != nil {
		return nil, err
	}
	if strings.ContainsRune(c.InitArgs, 0) {
		return nil, errors.New("hsm: the init args hold a NUL")
	}
	return u, validStateDir(c.StateDir)
}

// checkToken checks that the URI names a token and its module.
func (u *URI) checkToken() error {
	switch {
	case u.Token == "" && u.Serial == "":
		return errors.New("hsm: the URI names no token: add token= or serial= (a slot-id alone changes)")
	case u.ModulePath == "":
		return errors.New("hsm: the URI lacks module-path=, the absolute path of the vendor's PKCS#11 library")
	case u.ModuleName != "" && bareModule(u.ModuleName) != bareModule(filepath.Base(u.ModulePath)):
		return fmt.Errorf("hsm: module-name=%s is not the name of module-path=%s: remove one", u.ModuleName, u.ModulePath)
	}
	return nil
}

// bareModule is a module's name as RFC 7512 section 2.3 wants it: without prefix
// and ending.
func bareModule(file string) string {
	return strings.ToLower(strings.TrimPrefix(strings.TrimSuffix(file, ".so"), "lib"))
}

// pinSource is the source that counts.
func (c Config) pinSource(u *URI) (pin.Source, error) {
	if c.PINSource != "" {
		return pin.ParseSource(c.PINSource)
	}
	return pin.ParseSource(u.PINSource)
}

// latch remembers the PINs that the token did not accept.
func latch(stateDir string) pin.Latch { return pin.Latch{Dir: stateDir, Name: "hsm-pin.latch"} }

// ClearLatch forgets which PINs the token refused. An operator calls for it
// when the PIN is right and the token, not the PIN, was at fault.
func ClearLatch(stateDir string) error {
	if err := latch(stateDir).Clear(); err != nil {
		return fmt.Errorf("hsm: %w", err)
	}
	return nil
}

func validName(name string) error {
	const allowed = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-"
	other := func(r rune) bool { return !strings.ContainsRune(allowed, r) }
	if name == "" || len(name) > 63 || strings.ContainsFunc(name, other) {
		return fmt.Errorf("hsm: host name %q: must be 1 to 63 of A-Z a-z 0-9 . _ -", name)
	}
	return nil
}

func validStateDir(dir string) error {
	if !filepath.IsAbs(dir) {
		return fmt.Errorf("hsm: state folder %q: must be an absolute path", dir)
	}
	info, err := os.Stat(dir)
	if err != nil {
		return fmt.Errorf("hsm: state folder: %w: make it with install -d -m 0700", err)
	}
	if !info.IsDir() {
		return fmt.Errorf("hsm: state folder %s is not a folder", dir)
	}
	if err := disk.Trusted(info, 0o022); err != nil {
		return fmt.Errorf("hsm: state folder %s: %w", dir, err)
	}
	return nil
}

// Provisioned tells an operator what [Provision] found and made, or [Withdraw] destroyed.
type Provisioned struct {
	Token string // the token, as the URI names it
	Steps []Step // in the order in which they were done
	// Erasure is what [Provision] makes of the token, a guess, and ErasureWhy the reason.
	Erasure    Erasure
	ErasureWhy string
}

// Step is one object that a host needs in its token.
type Step struct {
	Object string // what it is, and its label
	Done   string // "made", "already there", ...
}

func (p Provisioned) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "token %s\n", p.Token)
	for _, s := range p.Steps {
		fmt.Fprintf(&b, "%s: %s\n", s.Object, s.Done)
	}
	return b.String()
}
