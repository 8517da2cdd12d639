//go:build cgo

package hsm

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"unsafe"

	"github.com/miekg/pkcs11"

	"conseal/internal/disk"
)

// module is a vendor's library in this process. It is never unloaded, and never
// finalised but to be initialised again, and then only if we initialised it:
// others in the process may use it, and libraries leave threads behind.
type module struct {
	path string
	p    *pkcs11.Ctx
	args []byte         // for C_Initialize, with a NUL at the end
	pin  runtime.Pinner // of args, for the library may keep them
	ours bool           // C_Initialize was our call

	// mu is held for reading during every call, and for writing while objects are
	// made or destroyed and while the library is finalised and initialised:
	// C_Finalize with calls under way crashes libraries.
	mu    sync.RWMutex
	epoch uint64 // counts initialisations; handles of another epoch are void
}

// modules are the libraries in this process by real path. C_Initialize works on
// the whole process, so this cannot be anybody's field.
var modules struct {
	mu     sync.Mutex
	byPath map[string]*module
}

// loadModule loads and initialises a library, once in a process.
func loadModule(path string, allowed []string, initArgs string) (*module, error) {
	path, err := realModule(path, allowed)
	if err != nil {
		return nil, err
	}
	modules.mu.Lock()
	defer modules.mu.Unlock()
	args := append([]byte(initArgs), 0)
	if m := modules.byPath[path]; m != nil {
		if !bytes.Equal(m.args, args) {
			return nil, fmt.Errorf("hsm: module %s runs in this process with other init args: it is initialised once", path)
		}
		return m, nil
	}
	p := pkcs11.New(path)
	if p == nil {
		return nil, fmt.Errorf("hsm: module %s cannot be loaded: look with ldd for a library that it lacks, and whether it is a PKCS#11 module for this machine", path)
	}
	m := &module{path: path, p: p, args: args}
	m.pin.Pin(&m.args[0])
	err = m.initialize()
	m.ours = err == nil
	if err != nil && !errors.Is(err, pkcs11.Error(pkcs11.CKR_CRYPTOKI_ALREADY_INITIALIZED)) {
		m.pin.Unpin()
		return nil, fmt.Errorf("hsm: module %s: %w", path, failed("C_Initialize", err))
	}
	if modules.byPath == nil {
		modules.byPath = make(map[string]*module)
	}
	modules.byPath[path] = m
	return m, nil
}

func (m *module) initialize() error {
	if len(m.args) == 1 {
		return m.p.Initialize()
	}
	return m.p.Initialize(pkcs11.InitializeWithReserved(unsafe.Pointer(&m.args[0])))
}

// restart finalises and initialises the library: some only then see a token
// that came back. If somebody did so since epoch seen, it does nothing.
func (m *module) restart(seen uint64) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.epoch != seen {
		return nil
	}
	if !m.ours {
		return errors.New("the module was initialised by another part of this process: restart the process")
	}
	m.epoch++
	if err := m.p.Finalize(); err != nil && !errors.Is(err, pkcs11.Error(pkcs11.CKR_CRYPTOKI_NOT_INITIALIZED)) {
		return failed("C_Finalize", err)
	}
	return failed("C_Initialize", m.initialize())
}

// realModule resolves a library's path and checks that it is allowed and that
// nobody but its owner and root could have changed it: who chooses the library
// sees the PIN.
func realModule(path string, allowed []string) (string, error) {
	if !filepath.IsAbs(path) {
		return "", fmt.Errorf("hsm: module %q: the path must be absolute", path)
	}
	resolved, err := trustedPath(path)
	if errors.Is(err, fs.ErrNotExist) {
		err = fmt.Errorf("%w: install the vendor's PKCS#11 library or set module-path", err)
	}
	if err != nil {
		return "", fmt.Errorf("hsm: module: %w", err)
	}
	same := func(other string) bool {
		real, err := filepath.EvalSymlinks(other)
		return err == nil && filepath.IsAbs(other) && real == resolved
	}
	if len(allowed) > 0 && !slices.ContainsFunc(allowed, same) {
		return "", fmt.Errorf("hsm: module %s (%s) is not in the list of allowed modules", path, resolved)
	}
	info, err := os.Stat(resolved)
	if err == nil && !info.Mode().IsRegular() {
		err = errors.New("not a regular file")
	}
	if err != nil {
		return "", fmt.Errorf("hsm: module %s: %w", resolved, err)
	}
	return resolved, nil
}

// maxLinks is how many symbolic links the kernel follows (path_resolution(7)).
const maxLinks = 40

// trustedPath resolves a path as the kernel does, and checks the file and every folder and
// link on the way: who can change one of them chooses what the path leads to.
func trustedPath(path string) (resolved string, err error) {
	resolved = "/"
	for rest, links := path, 0; ; {
		info, err := os.Lstat(resolved)
		if err != nil {
			return "", err
		}
		forbidden := fs.FileMode(0o022)
		link := info.Mode()&fs.ModeSymlink != 0
		if link || info.IsDir() && info.Mode()&fs.ModeSticky != 0 { // a link has no mode; in a sticky folder only owners rename
			forbidden = 0
		}
		if err := disk.Trusted(info, forbidden); err != nil {
			return "", fmt.Errorf("%s: %w", resolved, err)
		}
		if link {
			target, err := os.Readlink(resolved)
			if links++; err != nil || links > maxLinks {
				return "", errors.Join(err, fmt.Errorf("%s: too many symbolic links", path))
			}
			rest = target + "/" + rest
			if resolved = filepath.Dir(resolved); filepath.IsAbs(target) {
				resolved = "/"
			}
		}
		name, more, _ := strings.Cut(strings.TrimLeft(rest, "/"), "/")
		if name == "" {
			return resolved, nil
		}
		resolved, rest = filepath.Join(resolved, name), more
	}
}
