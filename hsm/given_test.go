//go:build cgo

package hsm_test

import (
	"crypto"
	"crypto/sha256"
	"errors"
	"strings"
	"testing"

	"conseal/hsm"
	"conseal/internal/secret"
)

// make makes a key with pkcs11-tool.
func (o outsider) make(t *testing.T, args ...string) {
	t.Helper()
	if out, ok := o.run(t, args...); !ok {
		t.Fatalf("pkcs11-tool %q: %s", args, out)
	}
}

func (o outsider) makePair(t *testing.T, label, id string, more ...string) {
	o.make(t, append([]string{"--keypairgen", "--key-type", "EC:prime256v1", "--label", label, "--id", id}, more...)...)
}

func (o outsider) makeAES(t *testing.T, label, id, size string, more ...string) {
	out, _ := o.run(t, append([]string{"--keygen", "--key-type", "AES:" + size, "--label", label, "--id", id, "--private"}, more...)...)
	if !strings.Contains(out, "Key generated") { // it warns that the key cannot be read
		t.Fatalf("pkcs11-tool: %s", out)
	}
}

// TestKeysOfSomebodyElse uses keys that another tool made, by label and by id.
func TestKeysOfSomebodyElse(t *testing.T) {
	cfg := config(t, newToken(t), "web1")
	o := newOutsider(t, cfg)
	o.makePair(t, "ceremony identity", "01", "--usage-sign", "--sensitive")
	o.makeAES(t, "ceremony wrap", "02ab", "32", "--usage-decrypt", "--sensitive")
	cfg.Identity, cfg.Wrap = "ceremony identity", "id=%02%ab"
	p, err := hsm.Provision(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	if len(p.Steps) != 3 || p.Steps[0].Done != "already there, as ceremony identity" || p.Steps[1].Done != "already there, as id=%02%ab" || p.Steps[2].Done != "made" {
		t.Errorf("provisioned %+v", p)
	}
	h := open(t, cfg)
	if err := h.SetRoot(t.Context(), secret.Random(32)); err != nil {
		t.Fatal(err)
	}
	key, blob, err := h.Seal(t.Context(), "k")
	if err != nil {
		t.Fatal(err)
	}
	cfg.Identity, cfg.Wrap = "id=%01", "ceremony wrap" // the same keys
	again := open(t, cfg)
	if got, err := again.Open(t.Context(), "k", blob); err != nil || !got.Equal(key) {
		t.Errorf("opening: %v", err)
	}
	digest := sha256.Sum256([]byte("x"))
	signer, err := again.Identity(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := signer.Sign(nil, digest[:], crypto.SHA256); err != nil {
		t.Errorf("signing: %v", err)
	}
	if all, _ := o.run(t, "--list-objects"); strings.Contains(all, "conseal/web1/wrap") || strings.Contains(all, "conseal/web1/identity") || !strings.Contains(all, "conseal/web1/root") {
		t.Errorf("the token has keys of the host's own: %s", all)
	}

	o.make(t, "--delete-object", "--type", "secrkey", "--id", "02ab")
	if _, _, err := again.Seal(t.Context(), "k"); !errors.Is(err, hsm.ErrLost) {
		t.Errorf("sealing without the key: %v", err)
	}
	o.makeAES(t, "ceremony wrap", "03", "32", "--usage-decrypt", "--sensitive")
	if _, _, err := again.Seal(t.Context(), "k"); !errors.Is(err, hsm.ErrLost) || !strings.Contains(err.Error(), "another key has its name") {
		t.Errorf("sealing with another key under that name: %v", err)
	}
	if _, err := open(t, cfg).Open(t.Context(), "k", blob); !errors.Is(err, hsm.ErrNotAuthentic) {
		t.Errorf("opening with another key under that name: %v", err)
	}
}

// TestUnfitKeysOfSomebodyElse are refused, and what is wrong is said. Nothing is made.
func TestUnfitKeysOfSomebodyElse(t *testing.T) {
	tok := newToken(t)
	cfg := config(t, tok, "web1")
	o := newOutsider(t, cfg)
	o.makePair(t, "identity", "01", "--usage-sign", "--sensitive")
	o.makePair(t, "identity-derives", "02", "--usage-sign", "--usage-derive", "--sensitive")
	o.make(t, "--keypairgen", "--key-type", "EC:secp384r1", "--label", "identity-384", "--id", "03", "--usage-sign", "--sensitive")
	o.makePair(t, "identity-bare", "04", "--usage-sign", "--extractable")
	o.makeAES(t, "wrap", "11", "32", "--usage-decrypt", "--sensitive")
	o.makeAES(t, "wrap-16", "13", "16", "--usage-decrypt", "--sensitive")
	o.makeAES(t, "wrap-bare", "14", "32", "--usage-decrypt", "--extractable", "--sensitive")
	o.makeAES(t, "twice", "15", "32", "--usage-decrypt", "--sensitive")
	o.makeAES(t, "twice", "16", "32", "--usage-decrypt", "--sensitive")
	for _, c := range []struct{ identity, wrap, want string }{
		{"none", "wrap", `no key "none" of this kind is in the token`},
		{"identity", "id=%99", `no key "id=%99" of this kind`},
		{"identity", "identity", `no key "identity" of this kind`},
		{"identity-derives", "wrap", "CKA_DERIVE is not false"},
		{"identity-384", "wrap", "is not on P-256"},
		{"identity-bare", "wrap", "key identity-bare: CKA_"},
		{"identity", "wrap-16", "is not of the kind that method aes-gcm needs"},
		{"identity", "wrap-bare", "key wrap-bare: CKA_NEVER_EXTRACTABLE is not true"},
		{"identity", "twice", "2 objects of one kind are called twice"},
		{"identity", "id=", "wants a label, or id="},
		{"identity", "id=%0", "wants a label, or id="},
		{"conseal/web2/identity", "wrap", "labels with conseal/"},
	} {
		cfg.Identity, cfg.Wrap = c.identity, c.wrap
		if _, err := hsm.Provision(t.Context(), cfg); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s, %s: got %v, want %q", c.identity, c.wrap, err, c.want)
		}
	}
	if all, _ := o.run(t, "--list-objects"); strings.Contains(all, "conseal/web1/") || !strings.Contains(all, "wrap-16") {
		t.Errorf("something was made: %s", all)
	}
	cfg.Identity, cfg.Wrap = "identity", "wrap" // the control
	if _, err := hsm.Provision(t.Context(), cfg); err != nil {
		t.Error(err)
	}
}
