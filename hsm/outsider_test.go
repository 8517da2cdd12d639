//go:build cgo

package hsm_test

import (
	"encoding/hex"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/miekg/pkcs11"

	"conseal/hsm"
	"conseal/testenv"
)

// outsider is pkcs11-tool in the hands of somebody who has the PIN.
type outsider struct {
	login []string
	dir   string
}

func newOutsider(t *testing.T, cfg hsm.Config) outsider {
	t.Helper()
	if err := testenv.Need("pkcs11-tool", "opensc"); err != nil {
		t.Fatal(err)
	}
	uri, err := hsm.ParseURI(cfg.URI)
	if err != nil {
		t.Fatal(err)
	}
	pin, err := os.ReadFile(strings.TrimPrefix(uri.PINSource, "file:"))
	if err != nil {
		t.Fatal(err)
	}
	return outsider{[]string{"--module", uri.ModulePath, "--token-label", uri.Token, "--login", "--pin", strings.TrimSpace(string(pin))}, t.TempDir()}
}

// run gives what the tool printed, and whether it did what it was asked.
func (o outsider) run(t *testing.T, args ...string) (string, bool) {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), "pkcs11-tool", append(o.login, args...)...).CombinedOutput()
	return string(out), err == nil && !strings.Contains(string(out), "CKR_")
}

// take tries to get at a key, and reports what worked. pkcs11-tool cannot copy
// objects: TestKeysCannotLeave does that.
func (o outsider) take(t *testing.T, kind, id, wrapper string) (worked []string) {
	t.Helper()
	wrapped := filepath.Join(o.dir, id)
	for _, a := range []struct {
		what, refusal string
		args          []string
	}{
		{"read", "CKR_ATTRIBUTE_SENSITIVE", []string{"--read-object", "--type", kind, "--id", id}},
		{"wrapped out", "CKR_KEY_UNEXTRACTABLE", []string{"--wrap", "--mechanism", "AES-KEY-WRAP", "--id", wrapper, "--application-id", id, "--output-file", wrapped}},
		{"changed", "CKR_ACTION_PROHIBITED", []string{"--set-id", id + "00", "--type", kind, "--id", id}},
	} {
		if kind == "privkey" && a.what != "changed" {
			continue // the tool reads and wraps secret keys only
		}
		out, done := o.run(t, a.args...)
		switch {
		case done:
			worked = append(worked, a.what)
		case !strings.Contains(out, a.refusal) && !strings.Contains(out, "0x1b"):
			t.Errorf("%s of %s %s: failed without %s:\n%s", a.what, kind, id, a.refusal, out)
		}
	}
	return worked
}

// TestAnOutsiderWithThePIN tries each method's keys with pkcs11-tool, and a key that
// is not guarded, for which all of it works.
func TestAnOutsiderWithThePIN(t *testing.T) {
	t.Cleanup(hsm.SmallRSA())
	for _, method := range []string{"aes-gcm", "aes-kw", "hmac-sha256-prf", "rsa-oaep-sha1"} {
		h, cfg := newHostWith(t, method)
		setRoot(t, h)
		o := newOutsider(t, cfg)
		for _, args := range [][]string{{"--label", "wrapper", "--id", "01", "--usage-wrap"}, {"--label", "free", "--id", "02", "--extractable"}} {
			if out, done := o.run(t, append([]string{"--keygen", "--key-type", "AES:32"}, args...)...); !done && !strings.Contains(out, "Key generated") {
				t.Fatalf("%v: %s", args, out)
			}
		}
		if got := fmt.Sprint(o.take(t, "secrkey", "02", "01")); got != "[read wrapped out changed]" {
			t.Fatalf("of a free key, only %s", got)
		}
		kind := "secrkey"
		if strings.HasPrefix(method, "rsa") {
			kind = "privkey"
		}
		for _, what := range []string{"wrap", "root"} {
			id := idOf(t, h, "conseal/web1/"+what)
			if worked := o.take(t, kind, id, "01"); len(worked) != 0 {
				t.Errorf("%s: the outsider's tool did it to the %s key: %v", method, what, worked)
			}
		}
		if worked := o.take(t, "privkey", idOf(t, h, "conseal/web1/identity"), "01"); len(worked) != 0 {
			t.Errorf("%s: the outsider's tool did it to the identity: %v", method, worked)
		}
		for _, what := range []string{"wrap", "root", "identity"} {
			raw(t, h, func(p *pkcs11.Ctx, sh pkcs11.SessionHandle, _ uint) error {
				all, err := find(p, sh, "conseal/web1/"+what)
				if err != nil || len(all) == 0 {
					return fmt.Errorf("%s: %d objects, %w", what, len(all), err)
				}
				for _, k := range all {
					tryToTake(t, p, sh, k, method+" "+what)
				}
				return nil
			})
		}
	}
}

func idOf(t *testing.T, h *hsm.HSM, label string) (id string) {
	t.Helper()
	raw(t, h, func(p *pkcs11.Ctx, sh pkcs11.SessionHandle, _ uint) error {
		all, err := find(p, sh, label)
		if err != nil || len(all) == 0 {
			return fmt.Errorf("%d objects, %w", len(all), err)
		}
		a, err := p.GetAttributeValue(sh, all[0], []*pkcs11.Attribute{pkcs11.NewAttribute(pkcs11.CKA_ID, nil)})
		if err == nil {
			id = hex.EncodeToString(a[0].Value)
		}
		return err
	})
	return id
}
