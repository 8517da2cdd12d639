//go:build cgo

package hsm_test

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"io/fs"
	"math/big"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"conseal/hsm"
	"conseal/internal/pin"
	"conseal/testenv"
)

// team is a token with keys of a team, made as the documents say.
type team struct {
	*testenv.Token
	pin string
}

func newTeam(t *testing.T) team {
	t.Helper()
	if err := testenv.Need("pkcs11-tool", "opensc"); err != nil {
		t.Fatal(err)
	}
	tok := newToken(t)
	if err := hsm.Restart(tok.Module); err != nil {
		t.Fatal(err)
	}
	pin, err := os.ReadFile(tok.PINFile)
	if err != nil {
		t.Fatal(err)
	}
	return team{tok, strings.TrimSpace(string(pin))}
}

func (k team) tool(t *testing.T, args ...string) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "pkcs11-tool", append([]string{"--module", k.Module, "--token-label", k.Label, "--login", "--pin", k.pin}, args...)...)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("pkcs11-tool %v: %v\n%s", args, err, out)
	}
}

func (k team) key(t *testing.T, label, id, kind string, more ...string) {
	t.Helper()
	k.tool(t, append([]string{"--keypairgen", "--key-type", kind, "--label", label, "--id", id, "--usage-sign"}, more...)...)
}

// named is the URI of a key: its path goes on with object.
func (k team) named(object string) hsm.KeyConfig {
	return hsm.KeyConfig{URI: "pkcs11:token=" + k.Label + ";" + object + "?module-path=" + k.Module + "&pin-source=file:" + k.PINFile}
}

func openKey(t *testing.T, cfg hsm.KeyConfig) crypto.Signer {
	t.Helper()
	key, done, err := hsm.OpenKey(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(done)
	return key
}

// refuseKey wants OpenKey to fail for a reason.
func refuseKey(t *testing.T, cfg hsm.KeyConfig, reason string) {
	t.Helper()
	_, done, err := hsm.OpenKey(cfg)
	if err == nil {
		done()
	}
	if err == nil || !strings.Contains(err.Error(), reason) {
		t.Errorf("%s: got %v, want an error with %q", cfg.URI, err, reason)
	}
}

func signs(t *testing.T, key crypto.Signer) {
	t.Helper()
	digest := sha256.Sum256([]byte("a policy"))
	der, err := key.Sign(nil, digest[:], crypto.SHA256)
	if err != nil || !ecdsa.VerifyASN1(key.Public().(*ecdsa.PublicKey), digest[:], der) {
		t.Errorf("signing: %x, %v", der, err)
	}
}

// objects are the names of the objects' files in the token's store.
func (k team) objects(t *testing.T) (names []string) {
	t.Helper()
	err := filepath.WalkDir(k.Store, func(path string, _ fs.DirEntry, err error) error {
		if strings.HasSuffix(path, ".object") {
			names = append(names, path)
		}
		return err
	})
	if err != nil || len(names) == 0 {
		t.Fatalf("objects: %v, %v", names, err)
	}
	return names
}

func TestOpenKey(t *testing.T) {
	k := newTeam(t)
	k.key(t, "policy", "01", "EC:prime256v1")
	k.key(t, "other", "02", "EC:prime256v1")
	before := k.objects(t)
	key := openKey(t, k.named("object=policy"))
	signs(t, key)
	for _, object := range []string{"id=%01", "object=policy;id=%01;type=private", "object=policy;serial=" + k.Serial} {
		same := openKey(t, k.named(object))
		if !same.Public().(*ecdsa.PublicKey).Equal(key.Public()) {
			t.Errorf("%s is another key", object)
		}
	}
	other := openKey(t, k.named("object=other"))
	if other.Public().(*ecdsa.PublicKey).Equal(key.Public()) {
		t.Error("two keys are one")
	}
	if after := k.objects(t); strings.Join(after, "\n") != strings.Join(before, "\n") {
		t.Errorf("objects before: %v, after: %v", before, after)
	}
	if err := hsm.MakeObject(key); err == nil || !strings.Contains(err.Error(), "READ_ONLY") {
		t.Errorf("making an object: %v", err)
	}
	digest := make([]byte, 33)
	for _, bad := range []struct {
		digest []byte
		opts   crypto.SignerOpts
	}{{digest[:31], crypto.SHA256}, {nil, crypto.SHA256}, {digest, crypto.SHA256}, {digest[:32], crypto.SHA384}, {digest[:32], nil}} {
		if _, err := key.Sign(nil, bad.digest, bad.opts); err == nil {
			t.Errorf("signed %d bytes with %v", len(bad.digest), bad.opts)
		}
	}
	signs(t, key) // a wrong question does not end the key
	closed, done, err := hsm.OpenKey(k.named("object=policy"))
	if err != nil {
		t.Fatal(err)
	}
	done()
	done()
	if _, err := closed.Sign(nil, digest[:32], crypto.SHA256); err == nil {
		t.Error("signed after it was closed")
	}
}

func TestOpenKeyRefuses(t *testing.T) {
	k := newTeam(t)
	k.key(t, "policy", "01", "EC:prime256v1")
	k.key(t, "twice", "02", "EC:prime256v1")
	k.key(t, "twice", "03", "EC:prime256v1")
	k.key(t, "p384", "04", "EC:secp384r1")
	k.key(t, "rsa", "05", "RSA:2048")
	writable := filepath.Join(t.TempDir(), "module.so")
	b, err := os.ReadFile(k.Module)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(os.WriteFile(writable, b, 0o755), os.Chmod(writable, 0o775)); err != nil {
		t.Fatal(err)
	}
	token := "pkcs11:token=" + k.Label
	for reason, uri := range map[string]string{
		"names no key":               token + "?module-path=" + k.Module,
		"names no token":             "pkcs11:object=policy?module-path=" + k.Module,
		"says type=public":           token + ";object=policy;type=public?module-path=" + k.Module,
		"lacks module-path":          token + ";object=policy",
		"pin-value is refused":       token + ";object=policy?pin-value=1234&module-path=" + k.Module,
		"chmod 0755":                 token + ";object=policy?module-path=" + writable,
		"PIN source must":            token + ";object=policy?module-path=" + k.Module,
		"no token matches":           "pkcs11:token=nobody;object=policy?module-path=" + k.Module,
		"no such private key":        k.named("object=nobody").URI,
		"2 private keys match":       k.named("object=twice").URI,
		"id=%02, id=%03":             k.named("object=twice").URI,
		"not ECDSA on P-256":         k.named("object=p384").URI,
		"not ECDSA on P-256, which ": k.named("object=rsa").URI,
	} {
		refuseKey(t, hsm.KeyConfig{URI: uri}, reason)
	}
	signs(t, openKey(t, k.named("object=twice;id=%03")))
}

// TestThePublicKeyIsTheOneThatVerifies takes the public key away, gives the key the
// public half of another one, and then a certificate.
func TestThePublicKeyIsTheOneThatVerifies(t *testing.T) {
	k := newTeam(t)
	k.key(t, "policy", "01", "EC:prime256v1")
	k.key(t, "other", "02", "EC:prime256v1")
	public := openKey(t, k.named("object=policy")).Public()
	write := func(kind, label string, der []byte) {
		k.tool(t, "--write-object", writeFile(t, kind, string(der), 0o600), "--type", kind, "--id", "01", "--label", label)
	}
	k.tool(t, "--delete-object", "--type", "pubkey", "--id", "01")
	refuseKey(t, k.named("object=policy"), "no public key or certificate with its id=%01")

	other := openKey(t, k.named("object=other")).Public()
	spki, err := x509.MarshalPKIXPublicKey(other)
	if err != nil {
		t.Fatal(err)
	}
	write("pubkey", "policy", spki)
	refuseKey(t, k.named("object=policy"), "verifies what it signs")

	for _, of := range []crypto.PublicKey{other, public} { // an authority certifies one and then the other
		template := &x509.Certificate{SerialNumber: big.NewInt(1)}
		der, err := x509.CreateCertificate(rand.Reader, template, template, of, openKey(t, k.named("object=other")))
		if err != nil {
			t.Fatal(err)
		}
		write("cert", "policy", der)
		if of == other {
			refuseKey(t, k.named("object=policy"), "verifies what it signs")
		}
	}
	key := openKey(t, k.named("object=policy"))
	if !key.Public().(*ecdsa.PublicKey).Equal(public) {
		t.Error("another key")
	}
	signs(t, key)
}

// TestAKeysPINIsSentOnce counts C_Login where the module is entered.
func TestAKeysPINIsSentOnce(t *testing.T) {
	k := newTeam(t)
	k.key(t, "policy", "01", "EC:prime256v1")
	good := k.named("object=policy")
	s := newSpy(t, good.URI)
	s.cfg.PINSource = writeFile(t, "pin", "wrong pin", 0o600)
	for _, reason := range []string{"the device refused the PIN (pkcs11: 0xA0: CKR_PIN_INCORRECT): it was sent once", "enter it by hand once"} {
		if err := s.run(t, "key"); err == nil || !strings.Contains(err.Error(), reason) || strings.Contains(err.Error(), "wrong pin") {
			t.Errorf("got %v, want an error with %q", err, reason)
		}
		if got := s.logins(t); got != 1 {
			t.Fatalf("the PIN was sent %d times", got)
		}
	}
	s.cfg.PINSource = "" // the right one, and still nobody entered it
	if err := s.run(t, "key"); err == nil || s.logins(t) != 1 {
		t.Errorf("after a wrong PIN: %v, sent %d times", err, s.logins(t))
	}

	asked := hsm.KeyConfig{URI: strings.Split(good.URI, "&")[0]}
	asked.AskPIN = func(string) ([]byte, error) { return nil, nil }
	refuseKey(t, asked, "no PIN was entered")
	asked.AskPIN = func(prompt string) ([]byte, error) {
		if !strings.Contains(prompt, k.Label) || !strings.Contains(prompt, "the last one was wrong") {
			t.Errorf("prompt: %s", prompt)
		}
		return []byte(k.pin), nil
	}
	signs(t, openKey(t, asked))
	if err := s.run(t, "key"); err != nil || s.logins(t) != 2 {
		t.Errorf("after the right PIN: %v, sent %d times", err, s.logins(t))
	}
}

func TestNoPINOfAKeyForATokenAboutToLock(t *testing.T) {
	if err := testenv.Need("gcc", "gcc"); err != nil {
		t.Fatal(err)
	}
	k := newTeam(t)
	k.key(t, "policy", "01", "EC:prime256v1")
	headers, err := exec.CommandContext(t.Context(), "go", "list", "-m", "-f", "{{.Dir}}", "github.com/miekg/pkcs11").Output()
	if err != nil {
		t.Fatal(err)
	}
	module := filepath.Join(t.TempDir(), "finaltry.so")
	out, err := exec.CommandContext(t.Context(), "gcc", "-shared", "-fPIC", "-I"+strings.TrimSpace(string(headers)), "-o", module, "testdata/finaltry.c").CombinedOutput()
	if err != nil {
		t.Fatalf("gcc: %v\n%s", err, out)
	}
	t.Setenv("FINALTRY_MODULE", k.Module)
	cfg := k.named("object=policy")
	cfg.URI = strings.Replace(cfg.URI, k.Module, module, 1)
	refuseKey(t, cfg, "one more wrong PIN locks the token")
	signs(t, openKey(t, k.named("object=policy")))
}

// TestAKeyThatAsksForEachSignature has a key with CKA_ALWAYS_AUTHENTICATE. Somebody
// changes the PIN while it is open: that costs one try and ends the key.
func TestAKeyThatAsksForEachSignature(t *testing.T) {
	k := newTeam(t)
	k.key(t, "policy", "01", "EC:prime256v1", "--always-auth")
	s := newSpy(t, k.named("object=policy").URI)
	if err := s.run(t, "key"); err != nil {
		t.Fatal(err)
	}
	if got := s.logins(t); got != 3 { // the user's, for the proof, for a signature
		t.Errorf("C_Login was called %d times", got)
	}
	key := openKey(t, k.named("object=policy"))
	signs(t, key)
	if err := hsm.SetPIN(key, k.pin, k.pin+"0"); err != nil {
		t.Fatal(err)
	}
	digest := sha256.Sum256([]byte("a policy"))
	if _, err := key.Sign(nil, digest[:], crypto.SHA256); !errors.Is(err, pin.ErrRefused) {
		t.Errorf("with a PIN that was changed: %v", err)
	}
	if err := hsm.SetPIN(key, k.pin+"0", k.pin); err != nil {
		t.Fatal(err)
	}
	if _, err := key.Sign(nil, digest[:], crypto.SHA256); !errors.Is(err, pin.ErrRefused) {
		t.Errorf("the PIN was sent again: %v", err)
	}
	signs(t, openKey(t, k.named("object=policy"))) // it would have been right
}
