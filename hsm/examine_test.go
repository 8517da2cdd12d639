//go:build cgo

package hsm_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
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

// objects counts all objects that a logged-in session sees.
func objects(t *testing.T, h *hsm.HSM) (n int) {
	t.Helper()
	raw(t, h, func(p *pkcs11.Ctx, sh pkcs11.SessionHandle, _ uint) error {
		if err := p.FindObjectsInit(sh, nil); err != nil {
			return err
		}
		all, _, err := p.FindObjects(sh, 1000)
		n = len(all)
		return errors.Join(err, p.FindObjectsFinal(sh))
	})
	return n
}

func TestProbe(t *testing.T) {
	t.Cleanup(hsm.SmallRSA())
	soft, softCfg := newHost(t)
	nss, nssCfg := newNSSHost(t, "aes-kw-enc")
	for _, c := range []struct {
		name        string
		h           *hsm.HSM
		cfg         hsm.Config
		passed      []string
		dishonoured []string
		noHSM       bool
	}{
		{"SoftHSM", soft, softCfg, []string{"aes-gcm", "aes-kw", "hmac-sha256-prf", "rsa-oaep-sha1"}, nil, false},
		{"NSS", nss, nssCfg, []string{"aes-kw-enc", "aes-kw", "rsa-oaep-sha256", "hmac-sha256-prf", "rsa-oaep-sha1"}, []string{"EXTRACTABLE", "COPYABLE"}, true},
	} {
		before := objects(t, c.h)
		r, err := hsm.Probe(t.Context(), c.cfg)
		if err != nil {
			t.Fatalf("%s: %v", c.name, err)
		}
		if after := objects(t, c.h); after != before || before == 0 {
			t.Errorf("%s: %d objects before, %d after", c.name, before, after)
		}
		var passed, dishonoured []string
		for _, m := range r.Methods {
			if m.Passed {
				passed = append(passed, m.Name)
			}
			if m.Passed == (m.Why != "") || m.Passed && (m.Seal <= 0 || m.Open <= 0 || m.NewKey <= 0) {
				t.Errorf("%s: %+v", c.name, m)
			}
		}
		for _, a := range r.Attributes {
			if !a.Honoured {
				dishonoured = append(dishonoured, a.Name)
			}
		}
		if !slices.Equal(passed, c.passed) || r.Recommended != c.passed[0] || len(r.Methods) != len(hsm.Methods()) {
			t.Errorf("%s: passed %v, recommended %s", c.name, passed, r.Recommended)
		}
		if !slices.Equal(dishonoured, c.dishonoured) || len(r.Attributes) != 7 {
			t.Errorf("%s: attributes %+v", c.name, r.Attributes)
		}
		if got := strings.Contains(strings.Join(r.Warnings, "\n"), "not an HSM"); got != c.noHSM || r.Erasure != hsm.ErasureHostFile {
			t.Errorf("%s: erasure %s, warnings %q", c.name, r.Erasure, r.Warnings)
		}
	}
}

// TestProbeSweeps finds what a probe left that was killed on a token that keeps
// objects of a session.
func TestProbeSweeps(t *testing.T) {
	t.Cleanup(hsm.SmallRSA())
	h, cfg := newHost(t)
	before := objects(t, h)
	raw(t, h, func(p *pkcs11.Ctx, sh pkcs11.SessionHandle, _ uint) error {
		_, err := p.GenerateKey(sh, []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_AES_KEY_GEN, nil)}, []*pkcs11.Attribute{
			pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_SECRET_KEY), pkcs11.NewAttribute(pkcs11.CKA_VALUE_LEN, 32),
			pkcs11.NewAttribute(pkcs11.CKA_TOKEN, true), pkcs11.NewAttribute(pkcs11.CKA_LABEL, "conseal/probe")})
		return err
	})
	if got := objects(t, h); got != before+1 {
		t.Fatalf("%d objects, want %d", got, before+1)
	}
	if _, err := hsm.Probe(t.Context(), cfg); err != nil {
		t.Fatal(err)
	}
	if got := objects(t, h); got != before {
		t.Errorf("%d objects after the probe, want %d", got, before)
	}
}

func TestErasureIsGuessed(t *testing.T) {
	for _, c := range []struct {
		names    []string
		hardware bool
		want     hsm.Erasure
	}{
		{[]string{"SoftHSM project", "SoftHSM v2"}, false, hsm.ErasureHostFile},
		{[]string{"STMicro", "", "tpm2-software.github.io TPM2.0 Cryptoki 1.9"}, true, hsm.ErasureHostFile},
		{[]string{"Cavium Networks", "NITROX-HSM", "Amazon CloudHSM"}, true, hsm.ErasureReplicated},
		{[]string{"Yubico", "YubiHSM"}, true, hsm.ErasureDevice},
		{[]string{"Nobody"}, false, hsm.ErasureHostFile},
	} {
		if got, why := hsm.GuessErasure(c.names, c.hardware); got != c.want || why == "" {
			t.Errorf("%q, hardware %t: %s, %q", c.names, c.hardware, got, why)
		}
	}
}

// TestMethodsThatFailAreRefused forces methods that a token advertises or not, and
// cannot do.
func TestMethodsThatFailAreRefused(t *testing.T) {
	t.Cleanup(hsm.SmallRSA())
	soft, nssToken := newToken(t), newNSS(t)
	for _, c := range []struct {
		tok                  *testenv.Token
		method, why, instead string
	}{
		{soft, "aes-kw-enc", "not advertised", "aes-gcm"},
		{soft, "aes-kwp", "MECHANISM_INVALID", "aes-gcm"},
		{soft, "rsa-oaep-sha256", "ARGUMENTS_BAD", "aes-gcm"},
		{nssToken, "", "BUFFER_TOO_SMALL", "aes-kw-enc"},
		{nssToken, "aes-kwp", "BUFFER_TOO_SMALL", "aes-kw-enc"},
	} {
		cfg := config(t, c.tok, fmt.Sprint("refused", hosts.Add(1)))
		cfg.Method = c.method
		_, err := hsm.Provision(t.Context(), cfg)
		if err == nil || !strings.Contains(err.Error(), c.why) || !strings.Contains(err.Error(), "method "+c.instead+" passed") {
			t.Errorf("%s: %v, want %q and %q", c.method, err, c.why, c.instead)
		}
		if _, err := hsm.Open(t.Context(), cfg); err == nil {
			t.Errorf("%s: opened", c.method)
		}
		cfg.Method = c.instead
		provision(t, cfg)
	}
	cfg := config(t, soft, "web1")
	cfg.Method = "aes-cbc"
	if _, err := hsm.Provision(t.Context(), cfg); err == nil || !strings.Contains(err.Error(), "must be one of aes-gcm") {
		t.Errorf("an unknown method: %v", err)
	}
}

// TestTheMethodIsPinned changes a host's configured method, and the methods that its
// files name. aes-gcm and aes-kw-enc, and the two of OAEP, have keys of one kind.
func TestTheMethodIsPinned(t *testing.T) {
	t.Cleanup(hsm.SmallRSA())
	for _, c := range []struct {
		newHost  func(*testing.T, string) (*hsm.HSM, hsm.Config)
		is, then string
		opens    bool // the wrapping key is of the right kind
	}{
		{newHostWith, "aes-gcm", "aes-kw", false},
		{newHostWith, "aes-kw", "aes-gcm", false},
		{newHostWith, "aes-gcm", "hmac-sha256-prf", false},
		{newNSSHost, "rsa-oaep-sha256", "rsa-oaep-sha1", true},
	} {
		h, cfg := c.newHost(t, c.is)
		root := setRoot(t, h)
		key, blob, err := h.Seal(t.Context(), "k")
		if err != nil {
			t.Fatal(err)
		}
		cfg.Method = c.then
		changed, err := hsm.Open(t.Context(), cfg)
		if (err == nil) != c.opens {
			t.Fatalf("%s opened as %s: %v", c.is, c.then, err)
		}
		if c.opens {
			_, rootErr := changed.Root(t.Context())
			_, openErr := changed.Open(t.Context(), "k", blob)
			for _, err := range []error{rootErr, openErr, changed.SetRoot(t.Context(), secret.Random(32))} {
				if !errors.Is(err, hsm.ErrNotAuthentic) || !strings.Contains(err.Error(), c.is+", and this host's is "+c.then) {
					t.Errorf("%s as %s: %v", c.is, c.then, err)
				}
			}
			changed.Close()
		} else if hsm.ClassOf(err) != hsm.ClassPolicy && !errors.Is(err, hsm.ErrLost) {
			t.Errorf("%s opened as %s: %v", c.is, c.then, err)
		}
		for number := range byte(9) { // what a file says of its method opens nothing
			file := rootFiles(t, cfg)[0]
			was, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			if number == was[4] {
				continue
			}
			forged, forgedFile := bytes.Clone(blob), bytes.Clone(was)
			forged[4], forgedFile[4] = number, number
			if _, err := h.Open(t.Context(), "k", forged); !errors.Is(err, hsm.ErrNotAuthentic) {
				t.Errorf("%s: a blob of method %d: %v", c.is, number, err)
			}
			if err := os.WriteFile(file, forgedFile, 0o600); err != nil {
				t.Fatal(err)
			}
			if _, err := h.Root(t.Context()); !errors.Is(err, hsm.ErrNotAuthentic) {
				t.Errorf("%s: a root of method %d: %v", c.is, number, err)
			}
			if err := os.WriteFile(file, was, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		wantRoot(t, h, root)
		if got, err := h.Open(t.Context(), "k", blob); err != nil || !got.Equal(key) {
			t.Errorf("%s: %v", c.is, err)
		}
	}
}

// TestNoRootKeyOfAnotherMethodStays empties the folder and changes the method: the
// old root's key still counts.
func TestNoRootKeyOfAnotherMethodStays(t *testing.T) {
	t.Cleanup(hsm.SmallRSA())
	h, cfg := newHostWith(t, "aes-kw")
	setRoot(t, h)
	destroy(t, h, "conseal/web1/wrap")
	destroy(t, h, "conseal/web1/sentinel")
	if err := os.Remove(rootFiles(t, cfg)[0]); err != nil {
		t.Fatal(err)
	}
	cfg.Method = "rsa-oaep-sha1"
	again := provision(t, cfg)
	if err := again.SetRoot(t.Context(), secret.Random(32)); !errors.Is(err, hsm.ErrStale) {
		t.Errorf("with a root key of another method in the token: %v", err)
	}
}

// TestAFormatThatStays opens a blob of aes-gcm as docs/hsm.md describes it, without
// this package's code.
func TestAFormatThatStays(t *testing.T) {
	h, _ := newHost(t)
	key, blob, err := h.Seal(t.Context(), "k")
	if err != nil {
		t.Fatal(err)
	}
	header, iv, ct := blob[:22], blob[22:34], blob[34:]
	if len(blob) != 82 || string(header[:6]) != "CSHM\x01s" {
		t.Fatalf("blob %x", blob)
	}
	var aad []byte
	for _, f := range []string{"conseal hsm v1", string(header), "conseal/web1/wrap", "k"} {
		aad = append(binary.BigEndian.AppendUint32(aad, uint32(len(f))), f...)
	}
	raw(t, h, func(p *pkcs11.Ctx, sh pkcs11.SessionHandle, _ uint) error {
		all, err := find(p, sh, "conseal/web1/wrap")
		if err != nil {
			return err
		}
		params := pkcs11.NewGCMParams(iv, aad, 128)
		defer params.Free()
		if err := p.DecryptInit(sh, []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_AES_GCM, params)}, all[0]); err != nil {
			return err
		}
		plain, err := p.Decrypt(sh, ct)
		if got := secret.Take(plain); err == nil && !got.Equal(key) {
			t.Error("another key")
		}
		return err
	})
}

// TestNobodyPlantsARoot encrypts a root that is known under the root key's public
// half, as whoever can write the state folder could.
func TestNobodyPlantsARoot(t *testing.T) {
	h, cfg := newHostWith(t, "rsa-oaep-sha1")
	root := setRoot(t, h)
	if n := count(t, h, "conseal/web1/root"); n != 1 {
		t.Errorf("%d objects for the root: the public half stayed, or an older key", n)
	}
	file := rootFiles(t, cfg)[0]
	was, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	attacker, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	own, err := h.Identity(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	planted := secret.Random(32)
	put := func(b []byte, err error) {
		t.Helper()
		if err := errors.Join(err, os.WriteFile(file, b, 0o600)); err != nil {
			t.Fatal(err)
		}
	}
	put(h.ForgeRoot(t.Context(), was, planted, attacker))
	if _, err := h.Root(t.Context()); !errors.Is(err, hsm.ErrNotAuthentic) {
		t.Errorf("a root that was planted: %v", err)
	}
	put(h.ForgeRoot(t.Context(), was, planted, own)) // the forgery is good but for who signed
	wantRoot(t, h, planted)
	put(was, nil)
	wantRoot(t, h, root)
}

// TestRootsOfEachMethod crashes in SetRoot and puts back old folders.
func TestRootsOfEachMethod(t *testing.T) {
	t.Cleanup(hsm.SmallRSA())
	for _, method := range []string{"aes-kw", "hmac-sha256-prf", "rsa-oaep-sha1"} {
		h, cfg := newHostWith(t, method)
		old := setRoot(t, h)
		before := filepath.Join(t.TempDir(), "before")
		if err := os.CopyFS(before, os.DirFS(cfg.StateDir)); err != nil {
			t.Fatal(err)
		}
		for n := range hsm.RootSteps + 1 {
			next := secret.Random(32)
			if err := h.CrashInSetRoot(t.Context(), next, n); err != nil {
				t.Fatal(err)
			}
			if n >= 3 {
				old = next
			}
			wantRoot(t, open(t, cfg), old)
		}
		setRoot(t, h)
		wantClean(t, h, cfg)
		if n := count(t, h, "conseal/web1/root"); n != 1 {
			t.Errorf("%s: %d objects for the root", method, n)
		}
		for _, f := range rootFiles(t, cfg) {
			if err := os.Remove(f); err != nil {
				t.Fatal(err)
			}
		}
		if err := os.CopyFS(cfg.StateDir, os.DirFS(before)); err != nil {
			t.Fatal(err)
		}
		if _, err := h.Root(t.Context()); !errors.Is(err, hsm.ErrStale) {
			t.Errorf("%s: an old folder: %v", method, err)
		}
	}
}

// TestTheSelfTestFindsOut gives it methods that are wrong in one way each.
func TestTheSelfTestFindsOut(t *testing.T) {
	h, _ := newHost(t)
	good := func(wrap, unwrap hsm.Wrap) (hsm.Wrap, hsm.Wrap) { return wrap, unwrap }
	if err := h.SelfTest(t.Context(), good); err != nil {
		t.Fatalf("aes-gcm: %v", err)
	}
	var memory [][2][]byte // what was wrapped to what
	for want, spoil := range map[string]func(wrap, unwrap hsm.Wrap) (hsm.Wrap, hsm.Wrap){
		"something else": func(wrap, unwrap hsm.Wrap) (hsm.Wrap, hsm.Wrap) {
			return wrap, func(bind, in []byte) ([]byte, error) {
				out, err := unwrap(bind, in)
				if err == nil {
					out[31] ^= 1
				}
				return out, err
			}
		},
		"another context": func(wrap, unwrap hsm.Wrap) (hsm.Wrap, hsm.Wrap) {
			return func(_, in []byte) ([]byte, error) { return wrap([]byte("same"), in) },
				func(_, in []byte) ([]byte, error) { return unwrap([]byte("same"), in) }
		},
		"twice to the same": func(wrap, unwrap hsm.Wrap) (hsm.Wrap, hsm.Wrap) {
			return func(bind, in []byte) ([]byte, error) {
				for _, m := range memory {
					if bytes.Equal(m[0], in) {
						return m[1], nil
					}
				}
				out, err := wrap(bind, in)
				memory = append(memory, [2][]byte{bytes.Clone(in), out})
				return out, err
			}, unwrap
		},
		"does not refuse byte 60 of 61": func(wrap, unwrap hsm.Wrap) (hsm.Wrap, hsm.Wrap) {
			return func(bind, in []byte) ([]byte, error) {
				out, err := wrap(bind, in)
				return append(out, 0), err // of 61 the last is not looked at
			}, func(bind, in []byte) ([]byte, error) { return unwrap(bind, in[:len(in)-1]) }
		},
		"one byte less": func(wrap, unwrap hsm.Wrap) (hsm.Wrap, hsm.Wrap) {
			return wrap, func(bind, in []byte) ([]byte, error) {
				if len(in) == 59 {
					return make([]byte, 32), nil
				}
				return unwrap(bind, in)
			}
		},
		"closed": func(wrap, unwrap hsm.Wrap) (hsm.Wrap, hsm.Wrap) { // a device that fails shows nothing
			return wrap, func(bind, in []byte) ([]byte, error) {
				out, err := unwrap(bind, in)
				if err != nil {
					err = errors.New("closed")
				}
				return out, err
			}
		},
	} {
		if err := h.SelfTest(t.Context(), spoil); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", want, err)
		}
	}
}
