//go:build cgo

package hsm_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/miekg/pkcs11"

	"conseal/hsm"
	"conseal/internal/secret"
	"conseal/testenv"
)

// TestACloneInTheMiddle is a copied machine with the same name, token and state folder,
// that changes the root while this one does: the token has one root that was given out
// then, and the loser of the race must not destroy its key.
func TestACloneInTheMiddle(t *testing.T) {
	h, cfg := newHost(t)
	setRoot(t, h)
	clone := cfg
	clone.StateDir = t.TempDir()
	if err := errors.Join(os.Chmod(clone.StateDir, 0o700), os.CopyFS(clone.StateDir, os.DirFS(cfg.StateDir))); err != nil {
		t.Fatal(err)
	}
	other := open(t, clone)
	root := secret.Random(32)
	ours, theirs := h.StepsOfSetRoot(root), other.StepsOfSetRoot(secret.Random(32))
	last := hsm.RootSteps - 1
	for _, step := range slices.Concat(ours[:1], theirs[:last], ours[1:]) { // both plan the same generation
		if err := step(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	err := theirs[last](t.Context())
	if !errors.Is(err, hsm.ErrLost) {
		t.Errorf("the clone's change: %v", err)
	}
	if _, err := other.Root(t.Context()); !errors.Is(err, hsm.ErrStale) {
		t.Errorf("the clone's root: %v", err)
	}
	wantRoot(t, h, root)
}

// TestARootThatWasGivenStays: the token fails twice at the newer root of a SetRoot that
// was interrupted, so that the older one is given out, and the vault goes on with that.
// What the token would say later must not take it away.
func TestARootThatWasGivenStays(t *testing.T) {
	f := newFaulty(t)
	f.h = provision(t, f.cfg)
	old := setRoot(t, f.h)
	if err := f.h.CrashInSetRoot(t.Context(), secret.Random(32), hsm.RootSteps-1); err != nil {
		t.Fatal(err)
	}
	// Each try of the root fails, and the three of the key's self-test in between do not.
	first := f.set("C_DecryptInit", testenv.ReturnValue, pkcs11.CKR_GENERAL_ERROR, 1, 0)
	second := f.set("C_DecryptInit", testenv.ReturnValue, pkcs11.CKR_GENERAL_ERROR, 1, 3)
	wantRoot(t, f.h, old)
	if n, err := f.Hits(second); n != 1 || err != nil {
		t.Errorf("the second fault struck %d times, %v", n, err)
	}
	f.end(first, "not authentic")
	for range 2 {
		wantRoot(t, f.h, old)
	}
	wantRoot(t, open(t, f.cfg), old)
	last := setRoot(t, f.h)
	wantRoot(t, open(t, f.cfg), last)
	if n := rootKeys(t, f.h); n != 1 {
		t.Errorf("%d root keys", n)
	}
}

// TestAnotherTokenInItsPlace is a token of the same label that was wiped, or a sentinel
// that somebody destroyed: provisioning would make keys under old names there, and hide
// the loss; withdrawing would say that all is gone while it is in the real one.
func TestAnotherTokenInItsPlace(t *testing.T) {
	h, cfg := newHost(t)
	setRoot(t, h)
	blank := cfg
	blank.URI = newToken(t).URI
	for what, do := range map[string]func(context.Context, hsm.Config) (hsm.Provisioned, error){"provisioning": hsm.Provision, "withdrawing": hsm.Withdraw} {
		if p, err := do(t.Context(), blank); hsm.ClassOf(err) != hsm.ClassToken || len(p.Steps) != 0 || !strings.Contains(err.Error(), "empty that folder") {
			t.Errorf("%s in another token: %v, %v", what, p, err)
		}
	}
	destroy(t, h, "conseal/web1/sentinel")
	for what, do := range map[string]func(context.Context, hsm.Config) (hsm.Provisioned, error){"provisioning": hsm.Provision, "withdrawing": hsm.Withdraw} {
		before := objects(t, h)
		if _, err := do(t.Context(), cfg); hsm.ClassOf(err) != hsm.ClassToken || before == 0 || objects(t, h) != before {
			t.Errorf("%s without the sentinel: %v", what, err)
		}
	}
	if err := errors.Join(os.RemoveAll(cfg.StateDir), os.Mkdir(cfg.StateDir, 0o700)); err != nil {
		t.Fatal(err)
	}
	for range 2 { // as the error says
		if _, err := hsm.Withdraw(t.Context(), cfg); err != nil {
			t.Error(err)
		}
	}
	if n := objects(t, h); n != 0 {
		t.Errorf("%d objects are left", n)
	}
}

// TestWithdrawTakesCopiesToo: a second token was copied with the first's root key, which
// opens that one's roots.
func TestWithdrawTakesCopiesToo(t *testing.T) {
	h, cfg := newHost(t)
	setRoot(t, h)
	cfg.Second, cfg.StateDir = true, t.TempDir()
	if err := os.Chmod(cfg.StateDir, 0o700); err != nil {
		t.Fatal(err)
	}
	if _, err := hsm.Withdraw(t.Context(), cfg); err != nil {
		t.Fatal(err)
	}
	if n := objects(t, h); n != 0 {
		t.Errorf("%d objects are left", n)
	}
}

// TestWhoCanChooseTheModule: a library, a folder or a link on the way to it that another
// user could change, under modes and owners that look harmless.
func TestWhoCanChooseTheModule(t *testing.T) {
	tok := newToken(t)
	library, err := os.ReadFile(tok.Module)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	make := func(name string, mode os.FileMode) string {
		path := filepath.Join(dir, name)
		err := os.MkdirAll(filepath.Dir(path), 0o755)
		if err := errors.Join(err, os.WriteFile(path, library, 0o700), os.Chmod(path, mode)); err != nil {
			t.Fatal(err)
		}
		return path
	}
	link := func(target, name string) string {
		path := filepath.Join(dir, name)
		err := os.MkdirAll(filepath.Dir(path), 0o755)
		if err := errors.Join(err, os.Symlink(target, path)); err != nil {
			t.Fatal(err)
		}
		return path
	}
	good := make("good/module.so", 0o755)
	open := link("../good", "open/folder") + "/module.so"
	refused := map[string]string{
		"a sticky file that all write to":    make("sticky.so", 0o777|os.ModeSticky),
		"a link in a folder open to all":     open,
		"a way over a link in such a folder": link(open, "link.so"),
		"a link to itself":                   link("loop.so", "loop.so"),
	}
	if err := os.Chmod(filepath.Join(dir, "open"), 0o777); err != nil {
		t.Fatal(err)
	}
	if os.Geteuid() == 0 { // nobody else can give files away
		others := map[string]string{
			"another's sticky file":             make("others.so", 0o755|os.ModeSticky),
			"a file in another's sticky folder": make("others/module.so", 0o755),
			"another's link":                    link(good, "others-link.so"),
		}
		for what, path := range others {
			refused[what] = path
			if strings.HasSuffix(path, "/module.so") {
				path = filepath.Dir(path)
			}
			err := os.Lchown(path, 65534, 65534)
			if !strings.HasSuffix(path, "link.so") {
				err = errors.Join(err, os.Chmod(path, 0o755|os.ModeSticky)) // chown took it
			}
			if err != nil {
				t.Fatal(err)
			}
		}
	}
	find := func(path string) error {
		_, err := hsm.Open(t.Context(), hsm.Config{URI: "pkcs11:token=nobody?module-path=" + path, Name: "web1", StateDir: config(t, tok, "web1").StateDir, PINSource: "/none"})
		return err
	}
	for what, path := range refused {
		if err := find(path); err == nil || !strings.Contains(err.Error(), "hsm: module: ") {
			t.Errorf("%s: %v", what, err)
		}
	}
	for _, path := range []string{tok.Module, link(good, "fine.so"), link("fine.so", "fine-too.so"), filepath.Join(dir, "good/../good/module.so")} {
		if err := find(path); hsm.ClassOf(err) != hsm.ClassToken { // it was loaded, and has no such token
			t.Errorf("%s: %v", path, err)
		}
	}
}

// TestATokenThatDiesOverAPIN judges the PIN and then says that it was gone meanwhile: what
// it judged is not sent again, for there may be few tries.
func TestATokenThatDiesOverAPIN(t *testing.T) {
	for _, value := range []uint{pkcs11.CKR_DEVICE_REMOVED, pkcs11.CKR_SESSION_CLOSED, pkcs11.CKR_DEVICE_ERROR} {
		s, logins := newLogin(t)
		s.cfg.PINSource = writeFile(t, "pin", "wrong", 0o600)
		dies := s.set("C_Login", testenv.ReturnAfter, value, 0, 0)
		for range 4 {
			if err := s.opened(); err == nil || !strings.Contains(err.Error(), "refused the PIN") {
				t.Errorf("%#x: %v", value, err)
			}
		}
		s.end(dies, "dies")
		if n := logins(); n != 1 {
			t.Errorf("%#x: the PIN was sent %d times", value, n)
		}
	}
	s, logins := newLogin(t) // of a token that was gone before, nothing is held against the PIN
	gone := s.set("C_Login", testenv.ReturnValue, pkcs11.CKR_TOKEN_NOT_PRESENT, 1, 0)
	open(t, s.cfg)
	s.end(gone, "gone")
	if n := logins(); n != 2 {
		t.Errorf("C_Login was called %d times", n)
	}
}
