//go:build cgo

package hsm_test

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/miekg/pkcs11"
	"golang.org/x/sys/unix"

	"conseal/agent/vault"
	"conseal/hsm"
	"conseal/internal/secret"
	"conseal/testenv"
)

var _ vault.Protector = (*hsm.HSM)(nil)

// tokenDir is the one token store of this process: SoftHSM reads where it is when
// it is initialised.
var tokenDir string

func TestMain(m *testing.M) {
	if mode := os.Getenv("HSM_TEST_CHILD"); mode != "" {
		os.Exit(child(mode))
	}
	os.Exit(runWithTokens(m))
}

func runWithTokens(m *testing.M) int {
	unix.Umask(0o022) // folders that a group can change are not trusted
	base := "/dev/shm"
	if _, err := os.Stat(base); err != nil {
		base = ""
	}
	dir, err := os.MkdirTemp(base, "conseal-hsm-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	defer testenv.Clean()
	tokenDir = dir
	err = os.Setenv("SOFTHSM2_CONF", filepath.Join(dir, "softhsm2.conf"))
	if err := errors.Join(err, os.Setenv(testenv.FastNSS())); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return m.Run()
}

func newToken(t *testing.T) *testenv.Token {
	t.Helper()
	tok, err := testenv.NewToken(t.Context(), tokenDir, os.Getenv("HSM_TEST_CONF"))
	if err != nil {
		t.Fatal(err)
	}
	return tok
}

// nss makes the one NSS database of this process.
var nss = sync.OnceValues(func() (*testenv.Token, error) {
	dir := filepath.Join(tokenDir, "nss")
	if err := os.Mkdir(dir, 0o700); err != nil {
		return nil, err
	}
	return testenv.NewNSS(context.Background(), dir)
})

func newNSS(t *testing.T) *testenv.Token {
	t.Helper()
	tok, err := nss()
	if err != nil {
		t.Fatal(err)
	}
	return tok
}

func config(t *testing.T, tok *testenv.Token, name string) hsm.Config {
	t.Helper()
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	return hsm.Config{URI: tok.URI, InitArgs: tok.InitArgs, Name: name, StateDir: dir}
}

func open(t *testing.T, cfg hsm.Config) *hsm.HSM {
	t.Helper()
	h, err := hsm.Open(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(h.Close)
	return h
}

// newHost provisions a host on a token of its own.
func newHost(t *testing.T) (*hsm.HSM, hsm.Config) {
	t.Helper()
	cfg := config(t, newToken(t), "web1")
	return provision(t, cfg), cfg
}

func provision(t *testing.T, cfg hsm.Config) *hsm.HSM {
	t.Helper()
	if _, err := hsm.Provision(t.Context(), cfg); err != nil {
		t.Fatal(err)
	}
	return open(t, cfg)
}

func TestProvisionIsIdempotent(t *testing.T) {
	cfg := config(t, newToken(t), "web1")
	if _, err := hsm.Open(t.Context(), cfg); hsm.ClassOf(err) != hsm.ClassToken || !strings.Contains(err.Error(), "never provisioned") {
		t.Errorf("opening an empty token: %v", err)
	}
	for _, want := range []string{"made", "already there"} {
		p, err := hsm.Provision(t.Context(), cfg)
		if err != nil {
			t.Fatal(err)
		}
		if len(p.Steps) != 3 {
			t.Errorf("%d steps: %v", len(p.Steps), p)
		}
		for _, s := range p.Steps {
			if s.Done != want {
				t.Errorf("%s: %s, want %s", s.Object, s.Done, want)
			}
		}
	}
	h := open(t, cfg)
	if h.Kind() != "hsm" || !strings.HasPrefix(h.Name(), "hsm pkcs11:token=test-") || strings.Contains(h.Name(), "pin") {
		t.Errorf("kind %q, name %q", h.Kind(), h.Name())
	}
}

func TestALostKeyIsNotMadeAgain(t *testing.T) {
	for _, what := range []string{"wrap", "identity"} {
		h, cfg := newHost(t)
		destroy(t, h, "conseal/web1/"+what)
		if _, err := hsm.Provision(t.Context(), cfg); !errors.Is(err, hsm.ErrLost) {
			t.Errorf("provisioning without %s: %v", what, err)
		}
		if n := count(t, h, "conseal/web1/"+what); n != 0 {
			t.Errorf("%d objects %s were made", n, what)
		}
		if what == "wrap" {
			if _, _, err := h.Seal(t.Context(), "k"); !errors.Is(err, hsm.ErrLost) {
				t.Errorf("sealing: %v", err)
			}
			if _, err := hsm.Open(t.Context(), cfg); !errors.Is(err, hsm.ErrLost) {
				t.Errorf("opening: %v", err)
			}
		} else if _, err := h.Identity(t.Context()); !errors.Is(err, hsm.ErrLost) {
			t.Errorf("identity: %v", err)
		}
	}
}

// TestAHalfMadeKeyIsMadeAgain leaves what a crash inside the token's key generation
// leaves: no sentinel, and half a key pair.
func TestAHalfMadeKeyIsMadeAgain(t *testing.T) {
	h, cfg := newHost(t)
	destroy(t, h, "conseal/web1/sentinel")
	raw(t, h, func(p *pkcs11.Ctx, sh pkcs11.SessionHandle, _ uint) error {
		all, err := find(p, sh, "conseal/web1/identity")
		if err != nil {
			return err
		}
		return p.DestroyObject(sh, all[0])
	})
	p, err := hsm.Provision(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	if got := fmt.Sprint(p.Steps[0].Done, ", ", p.Steps[1].Done, ", ", p.Steps[2].Done); got != "made, already there, made" {
		t.Errorf("steps: %s", got)
	}
	if n := count(t, h, "conseal/web1/identity"); n > 3 {
		t.Errorf("%d halves of the identity", n)
	}
	if _, err := open(t, cfg).Identity(t.Context()); err != nil {
		t.Error(err)
	}
}

func find(p *pkcs11.Ctx, sh pkcs11.SessionHandle, label string) ([]pkcs11.ObjectHandle, error) {
	if err := p.FindObjectsInit(sh, []*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_LABEL, label)}); err != nil {
		return nil, err
	}
	all, _, err := p.FindObjects(sh, 100)
	return all, errors.Join(err, p.FindObjectsFinal(sh))
}

func raw(t *testing.T, h *hsm.HSM, fn func(p *pkcs11.Ctx, sh pkcs11.SessionHandle, slot uint) error) {
	t.Helper()
	if err := h.Session(t.Context(), fn); err != nil {
		t.Fatal(err)
	}
}

func count(t *testing.T, h *hsm.HSM, label string) (n int) {
	t.Helper()
	raw(t, h, func(p *pkcs11.Ctx, sh pkcs11.SessionHandle, _ uint) error {
		all, err := find(p, sh, label)
		n = len(all)
		return err
	})
	return n
}

func destroy(t *testing.T, h *hsm.HSM, label string) {
	t.Helper()
	raw(t, h, func(p *pkcs11.Ctx, sh pkcs11.SessionHandle, _ uint) error {
		all, err := find(p, sh, label)
		for _, o := range all {
			err = errors.Join(err, p.DestroyObject(sh, o))
		}
		return err
	})
}

func TestSealAndOpen(t *testing.T) {
	ctx := t.Context()
	h, cfg := newHost(t)
	key, blob, err := h.Seal(ctx, "payments/1")
	if err != nil {
		t.Fatal(err)
	}
	again, err := open(t, cfg).Open(ctx, "payments/1", blob)
	if err != nil || !again.Equal(key) || key.Len() != 32 {
		t.Fatalf("opening what was sealed: %v", err)
	}
	if b, err := hsm.Reencode(blob); err != nil || string(b) != string(blob) {
		t.Errorf("the blob encodes back differently: %v", err)
	}
	key2, blob2, err := h.Seal(ctx, "payments/1")
	if err != nil || key2.Equal(key) || string(blob2) == string(blob) {
		t.Fatalf("sealing twice: %v", err)
	}
	refused := func(what string, h *hsm.HSM, id string, blob []byte) {
		t.Helper()
		if _, err := h.Open(ctx, id, blob); !errors.Is(err, hsm.ErrNotAuthentic) {
			t.Errorf("%s: got %v", what, err)
		}
	}
	other, _ := newHost(t)
	refused("other token", other, "payments/1", blob)
	refused("other id", h, "payments/2", blob)
	refused("longer", h, "payments/1", append(blob[:len(blob):len(blob)], 0))
	for n := range blob {
		refused(fmt.Sprint("cut to ", n), h, "payments/1", blob[:n])
		for bit := range 8 {
			changed := append([]byte(nil), blob...)
			changed[n] ^= 1 << bit
			refused(fmt.Sprintf("byte %d bit %d", n, bit), h, "payments/1", changed)
		}
	}
	for _, id := range []string{"", strings.Repeat("x", 1025)} {
		if _, _, err := h.Seal(ctx, id); err == nil {
			t.Errorf("sealed for an id of %d bytes", len(id))
		}
	}
}

func TestTwoHostsOnOneToken(t *testing.T) {
	ctx := t.Context()
	tok := newToken(t)
	a, b := provision(t, config(t, tok, "web1")), provision(t, config(t, tok, "web2"))
	_, blob, err := a.Seal(ctx, "k")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := b.Open(ctx, "k", blob); !errors.Is(err, hsm.ErrNotAuthentic) {
		t.Errorf("another host opened the blob: %v", err)
	}
	ra, rb := secret.Random(32), secret.Random(32)
	if err := errors.Join(a.SetRoot(ctx, ra), b.SetRoot(ctx, rb)); err != nil {
		t.Fatal(err)
	}
	wantRoot(t, a, ra)
	wantRoot(t, b, rb)
	// A third host by mistake takes the first one's name.
	c := open(t, config(t, tok, "web1"))
	if _, err := c.Root(ctx); !errors.Is(err, hsm.ErrStale) {
		t.Errorf("root of a host with another's name: %v", err)
	}
	if err := c.SetRoot(ctx, secret.Random(32)); !errors.Is(err, hsm.ErrStale) {
		t.Errorf("setting the root of a host with another's name: %v", err)
	}
	wantRoot(t, a, ra)
}

// TestKeysCannotLeave tries with the PIN in hand what PKCS#11 offers.
func TestKeysCannotLeave(t *testing.T) {
	h, _ := newHost(t)
	if err := h.SetRoot(t.Context(), secret.Random(32)); err != nil {
		t.Fatal(err)
	}
	for _, label := range []string{"wrap", "root", "identity"} {
		raw(t, h, func(p *pkcs11.Ctx, sh pkcs11.SessionHandle, _ uint) error {
			all, err := find(p, sh, "conseal/web1/"+label)
			if err != nil || len(all) == 0 {
				return fmt.Errorf("%s: %d objects, %w", label, len(all), err)
			}
			for _, o := range all {
				tryToTake(t, p, sh, o, label)
			}
			return nil
		})
	}
	raw(t, h, canTakeWhatIsFree)
}

func tryToTake(t *testing.T, p *pkcs11.Ctx, sh pkcs11.SessionHandle, o pkcs11.ObjectHandle, label string) {
	class, err := p.GetAttributeValue(sh, o, []*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_CLASS, nil)})
	if err != nil {
		t.Fatal(err)
	}
	if class[0].Value[0] == pkcs11.CKO_PUBLIC_KEY {
		return
	}
	if v, err := p.GetAttributeValue(sh, o, []*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_VALUE, nil)}); err == nil {
		t.Errorf("%s: the value is readable: %d bytes", label, len(v[0].Value))
	}
	for _, a := range []*pkcs11.Attribute{
		pkcs11.NewAttribute(pkcs11.CKA_EXTRACTABLE, true), pkcs11.NewAttribute(pkcs11.CKA_SENSITIVE, false),
		pkcs11.NewAttribute(pkcs11.CKA_WRAP, true), pkcs11.NewAttribute(pkcs11.CKA_DERIVE, true), pkcs11.NewAttribute(pkcs11.CKA_DECRYPT, true),
		pkcs11.NewAttribute(pkcs11.CKA_LABEL, "x"),
	} {
		if err := p.SetAttributeValue(sh, o, []*pkcs11.Attribute{a}); err == nil {
			t.Errorf("%s: attribute %#x was changed", label, a.Type)
		}
		if _, err := p.CopyObject(sh, o, []*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_TOKEN, false), a}); err == nil {
			t.Errorf("%s: copied with attribute %#x", label, a.Type)
		}
	}
	if err := wrapOut(p, sh, o); err == nil {
		t.Errorf("%s: wrapped out", label)
	}
}

func sessionKey(p *pkcs11.Ctx, sh pkcs11.SessionHandle) (pkcs11.ObjectHandle, error) {
	return p.GenerateKey(sh, []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_AES_KEY_GEN, nil)}, []*pkcs11.Attribute{
		pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_SECRET_KEY), pkcs11.NewAttribute(pkcs11.CKA_VALUE_LEN, 32),
		pkcs11.NewAttribute(pkcs11.CKA_TOKEN, false), pkcs11.NewAttribute(pkcs11.CKA_WRAP, true),
		pkcs11.NewAttribute(pkcs11.CKA_SENSITIVE, false), pkcs11.NewAttribute(pkcs11.CKA_EXTRACTABLE, true)})
}

func wrapOut(p *pkcs11.Ctx, sh pkcs11.SessionHandle, o pkcs11.ObjectHandle) error {
	wrapper, err := sessionKey(p, sh)
	if err != nil {
		return err
	}
	_, err = p.WrapKey(sh, []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_AES_KEY_WRAP, nil)}, wrapper, o)
	return err
}

// canTakeWhatIsFree shows that what tryToTake does works on a key that allows it.
func canTakeWhatIsFree(p *pkcs11.Ctx, sh pkcs11.SessionHandle, _ uint) error {
	o, err := sessionKey(p, sh)
	if err != nil {
		return err
	}
	_, readErr := p.GetAttributeValue(sh, o, []*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_VALUE, nil)})
	_, copyErr := p.CopyObject(sh, o, []*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_DERIVE, true)})
	setErr := p.SetAttributeValue(sh, o, []*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_LABEL, "x")})
	return errors.Join(readErr, copyErr, setErr, wrapOut(p, sh, o))
}

// TestPINFromAPipe logs in again after the pipe is used up.
func TestPINFromAPipe(t *testing.T) {
	tok := newToken(t)
	cfg := config(t, tok, "web1")
	provision(t, cfg).Close()
	pin, err := os.ReadFile(tok.PINFile)
	if err != nil {
		t.Fatal(err)
	}
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if _, err := w.Write(pin); err != nil {
		t.Fatal(err)
	}
	w.Close()
	cfg.PINSource = fmt.Sprintf("fd:%d", r.Fd())
	h := open(t, cfg)
	raw(t, h, func(p *pkcs11.Ctx, _ pkcs11.SessionHandle, slot uint) error { return p.CloseAllSessions(slot) })
	if _, _, err := h.Seal(t.Context(), "k"); err != nil {
		t.Errorf("after the login was lost: %v", err)
	}
}

func TestManyAtOnce(t *testing.T) {
	ctx := t.Context()
	h, _ := newHost(t)
	signer, err := h.Identity(ctx)
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for g := range 16 {
		wg.Go(func() {
			for n := range 8 {
				id := fmt.Sprintf("key %d %d", g, n)
				key, blob, err := h.Seal(ctx, id)
				if err != nil {
					t.Error(err)
					return
				}
				if got, err := h.Open(ctx, id, blob); err != nil || !got.Equal(key) {
					t.Errorf("%s: %v", id, err)
				}
				if _, err := h.Open(ctx, "x", blob); !errors.Is(err, hsm.ErrNotAuthentic) {
					t.Errorf("%s under another id: %v", id, err)
				}
				digest := sha256.Sum256([]byte(id))
				if _, err := signer.Sign(rand.Reader, digest[:], crypto.SHA256); err != nil {
					t.Errorf("%s: signing: %v", id, err)
				}
			}
		})
	}
	wg.Wait()
}

func TestALostSessionIsRepaired(t *testing.T) {
	ctx := t.Context()
	h, cfg := newHost(t)
	other, _ := newHost(t)
	key, blob, err := h.Seal(ctx, "k")
	if err != nil {
		t.Fatal(err)
	}
	works := func(what string) {
		t.Helper()
		if got, err := h.Open(ctx, "k", blob); err != nil || !got.Equal(key) {
			t.Errorf("after %s: %v", what, err)
		}
		if _, err := h.Root(ctx); err == nil || errors.Is(err, hsm.ErrStale) || errors.Is(err, hsm.ErrLost) {
			t.Errorf("root after %s: %v", what, err)
		}
	}
	raw(t, h, func(p *pkcs11.Ctx, _ pkcs11.SessionHandle, slot uint) error { return p.CloseAllSessions(slot) })
	works("CloseAllSessions")
	raw(t, h, func(p *pkcs11.Ctx, sh pkcs11.SessionHandle, _ uint) error { return p.Logout(sh) })
	works("Logout")
	if _, err := hsm.Open(ctx, config(t, newToken(t), "web1")); err == nil { // restarts the module to see the token
		t.Error("opened an empty token")
	}
	works("the module was started again")
	if _, _, err := other.Seal(ctx, "k"); err != nil {
		t.Errorf("another token after the module was started again: %v", err)
	}
	if _, err := os.Stat(filepath.Join(cfg.StateDir, "hsm-pin.latch")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a latch stayed: %v", err)
	}
}

// TestStorageAwayIsNoLoss moves the folder of SoftHSM's tokens away and back.
func TestStorageAwayIsNoLoss(t *testing.T) {
	ctx := t.Context()
	h, cfg := newHost(t)
	key, blob, err := h.Seal(ctx, "k")
	if err != nil {
		t.Fatal(err)
	}
	root := secret.Random(32)
	if err := h.SetRoot(ctx, root); err != nil {
		t.Fatal(err)
	}
	store := filepath.Join(tokenDir, "tokens")
	if err := errors.Join(os.Rename(store, store+".away"), os.Mkdir(store, 0o700)); err != nil {
		t.Fatal(err)
	}
	_, openErr := h.Open(ctx, "k", blob)
	_, rootErr := h.Root(ctx)
	setErr := h.SetRoot(ctx, secret.Random(32))
	_, newErr := hsm.Open(ctx, cfg)
	_, provErr := hsm.Provision(ctx, cfg)
	if err := errors.Join(os.Remove(store), os.Rename(store+".away", store)); err != nil {
		t.Fatal(err)
	}
	for what, err := range map[string]error{"open": openErr, "root": rootErr, "set root": setErr, "new": newErr, "provision": provErr} {
		if hsm.ClassOf(err) != hsm.ClassToken || errors.Is(err, hsm.ErrLost) {
			t.Errorf("%s while the storage is away: %v", what, err)
		}
	}
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(10 * time.Second); ; <-tick.C { // a lost token is left alone for a moment
		got, err := h.Open(ctx, "k", blob)
		if err == nil && got.Equal(key) {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("after the storage came back: %v", err)
		}
	}
	wantRoot(t, h, root)
}

func TestWaitingForASessionHonoursTheContext(t *testing.T) {
	cfg := config(t, newToken(t), "web1")
	cfg.MaxSessions = 1
	h := provision(t, cfg)
	raw(t, h, func(*pkcs11.Ctx, pkcs11.SessionHandle, uint) error {
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
		defer cancel()
		if _, _, err := h.Seal(ctx, "k"); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("with the only session taken: %v", err)
		}
		return nil
	})
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, _, err := h.Seal(ctx, "k"); !errors.Is(err, context.Canceled) {
		t.Errorf("with a cancelled context: %v", err)
	}
	h.Close()
	h.Close()
	if _, _, err := h.Seal(t.Context(), "k"); err == nil {
		t.Error("sealed after Close")
	}
}

func TestConfigRefuses(t *testing.T) {
	tok := newToken(t)
	copied := filepath.Join(t.TempDir(), "module.so")
	b, err := os.ReadFile(tok.Module)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(os.WriteFile(copied, b, 0o755), os.Chmod(copied, 0o775)); err != nil {
		t.Fatal(err)
	}
	text := writeFile(t, "text.so", "no library", 0o644)
	query := "&pin-source=file:" + tok.PINFile
	for reason, change := range map[string]func(*hsm.Config){
		"must be 1 to 63":         func(c *hsm.Config) { c.Name = "a/b" },
		"names no token":          func(c *hsm.Config) { c.URI = "pkcs11:slot-id=1?module-path=" + tok.Module + query },
		"not an object":           func(c *hsm.Config) { c.URI = "pkcs11:token=a;object=k?module-path=" + tok.Module + query },
		"lacks module-path":       func(c *hsm.Config) { c.URI = "pkcs11:token=a" },
		"no PIN source":           func(c *hsm.Config) { c.URI = "pkcs11:token=a?module-path=" + tok.Module },
		"is not the name":         func(c *hsm.Config) { c.URI += "&module-name=other" },
		"PIN source must":         func(c *hsm.Config) { c.PINSource = "1234" },
		"state folder":            func(c *hsm.Config) { c.StateDir = "state" },
		"make it with":            func(c *hsm.Config) { c.StateDir += "/none" },
		"chmod":                   func(c *hsm.Config) { c.URI = "pkcs11:token=a?module-path=" + copied + query },
		"cannot be loaded":        func(c *hsm.Config) { c.URI = "pkcs11:token=a?module-path=" + text + query },
		"no such file":            func(c *hsm.Config) { c.URI = "pkcs11:token=a?module-path=/none.so" + query },
		"list of allowed modules": func(c *hsm.Config) { c.Modules = []string{"/none.so", text} },
		"no token matches":        func(c *hsm.Config) { c.URI = "pkcs11:token=nobody?module-path=" + tok.Module + query },
		"must not be negative":    func(c *hsm.Config) { c.MaxSessions = -1 },
	} {
		cfg := config(t, tok, "web1")
		change(&cfg)
		if _, err := hsm.Open(t.Context(), cfg); err == nil || !strings.Contains(err.Error(), reason) {
			t.Errorf("got %v, want an error with %q", err, reason)
		}
	}
	cfg := config(t, tok, "web1")
	cfg.Modules = []string{tok.Module}
	cfg.URI += "&module-name=softhsm2"
	if _, err := hsm.Provision(t.Context(), cfg); err != nil {
		t.Errorf("with the module in the list: %v", err)
	}
}

func TestTwoTokensThatMatch(t *testing.T) {
	tok := newToken(t)
	cmd := exec.CommandContext(t.Context(), "softhsm2-util", "--init-token", "--free", "--label", tok.Label, "--pin", "1234", "--so-pin", "12345678")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	cfg := config(t, tok, "web1")
	if _, err := hsm.Provision(t.Context(), cfg); err != nil {
		t.Fatalf("with the serial number: %v", err)
	}
	cfg.URI = fmt.Sprintf("pkcs11:token=%s?module-path=%s&pin-source=file:%s", tok.Label, tok.Module, tok.PINFile)
	if _, err := hsm.Open(t.Context(), cfg); err == nil || !strings.Contains(err.Error(), "add serial=") {
		t.Errorf("without: %v", err)
	}
}

func TestIdentitySignsDigestsOnly(t *testing.T) {
	h, cfg := newHost(t)
	signer, err := h.Identity(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	again, err := open(t, cfg).Identity(t.Context())
	if err != nil || !again.Public().(*ecdsa.PublicKey).Equal(signer.Public()) {
		t.Fatalf("the identity changed: %v", err)
	}
	digest := sha256.Sum256([]byte("x"))
	sig, err := signer.Sign(nil, digest[:], crypto.SHA256)
	if err != nil || !ecdsa.VerifyASN1(signer.Public().(*ecdsa.PublicKey), digest[:], sig) {
		t.Errorf("signing a digest: %v", err)
	}
	for _, bad := range []struct {
		digest []byte
		opts   crypto.SignerOpts
	}{{digest[:31], crypto.SHA256}, {nil, crypto.SHA256}, {digest[:], crypto.SHA384}, {digest[:], crypto.Hash(0)}, {digest[:], nil}, {make([]byte, 33), crypto.SHA256}} {
		if _, err := signer.Sign(nil, bad.digest, bad.opts); err == nil {
			t.Errorf("signed %d bytes with %v", len(bad.digest), bad.opts)
		}
	}
	point, err := signer.Public().(*ecdsa.PublicKey).Bytes()
	if err != nil {
		t.Fatal(err)
	}
	raw(t, h, func(p *pkcs11.Ctx, sh pkcs11.SessionHandle, _ uint) error {
		all, err := find(p, sh, "conseal/web1/identity")
		for _, k := range all {
			params := pkcs11.NewECDH1DeriveParams(pkcs11.CKD_NULL, nil, point)
			if p.DecryptInit(sh, []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_RSA_PKCS, nil)}, k) == nil {
				t.Error("the identity key decrypts")
			}
			if _, err := p.DeriveKey(sh, []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_ECDH1_DERIVE, params)}, k, secretTemplate()); err == nil {
				t.Error("the identity key derives")
			} else {
				t.Log(err)
			}
		}
		return err
	})
}

func secretTemplate() []*pkcs11.Attribute {
	return []*pkcs11.Attribute{
		pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_SECRET_KEY), pkcs11.NewAttribute(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_GENERIC_SECRET),
		pkcs11.NewAttribute(pkcs11.CKA_VALUE_LEN, 32), pkcs11.NewAttribute(pkcs11.CKA_TOKEN, false),
		pkcs11.NewAttribute(pkcs11.CKA_SENSITIVE, false), pkcs11.NewAttribute(pkcs11.CKA_EXTRACTABLE, true)}
}

// TestPointAsDERAndBare has a point of which 0x04 and the first byte of x are the head of
// an OCTET STRING as long as the rest.
func TestPointAsDERAndBare(t *testing.T) {
	var public *ecdsa.PublicKey
	var bare []byte
	for len(bare) == 0 || bare[1] != 63 {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		public = &key.PublicKey
		if bare, err = public.Bytes(); err != nil {
			t.Fatal(err)
		}
	}
	der, err := asn1.Marshal(bare)
	if err != nil {
		t.Fatal(err)
	}
	for _, b := range [][]byte{bare, der} {
		if got, err := hsm.ParsePoint(b); err != nil || !got.Equal(public) {
			t.Errorf("point of %d bytes: %v", len(b), err)
		}
	}
	for _, b := range [][]byte{nil, {0}, bare[:64], der[:66], append(der, 0), make([]byte, 65)} {
		if _, err := hsm.ParsePoint(b); err == nil {
			t.Errorf("took %x", b)
		}
	}
}

func certificate(t *testing.T, h *hsm.HSM) tls.Certificate {
	t.Helper()
	signer, err := h.Identity(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "web1"}, DNSNames: []string{"web1"},
		NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour), KeyUsage: x509.KeyUsageDigitalSignature}
	der, err := x509.CreateCertificate(rand.Reader, template, template, signer.Public(), signer)
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: signer, Leaf: leaf}
}

func TestIdentityInMutualTLS(t *testing.T) {
	a, _ := newHost(t)
	b, _ := newHost(t)
	ca, cb := certificate(t, a), certificate(t, b)
	pool := func(c tls.Certificate) *x509.CertPool {
		p := x509.NewCertPool()
		p.AddCert(c.Leaf)
		return p
	}
	left, right := net.Pipe()
	server := tls.Server(left, &tls.Config{Certificates: []tls.Certificate{ca}, ClientCAs: pool(cb), ClientAuth: tls.RequireAndVerifyClientCert, MinVersion: tls.VersionTLS13})
	client := tls.Client(right, &tls.Config{Certificates: []tls.Certificate{cb}, RootCAs: pool(ca), ServerName: "web1", MinVersion: tls.VersionTLS13})
	defer left.Close()
	defer right.Close()
	go func() { _, _ = server.Write([]byte("hello")) }()
	got := make([]byte, 5)
	if _, err := io.ReadFull(client, got); err != nil || string(got) != "hello" {
		t.Fatalf("over TLS: %q, %v", got, err)
	}
	peer := server.ConnectionState().PeerCertificates
	if len(peer) != 1 || !peer[0].Equal(cb.Leaf) {
		t.Error("the server saw another certificate")
	}
}

func writeFile(t *testing.T, name, content string, mode os.FileMode) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(path, mode); err != nil {
		t.Fatal(err)
	}
	return path
}
