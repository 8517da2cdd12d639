//go:build cgo

package hsm_test

import (
	"cmp"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"sync/atomic"
	"testing"

	"conseal/agent/vault"
	"conseal/agent/vault/vaulttest"
	"conseal/hsm"
	"conseal/testenv"
)

// hosts numbers the hosts that share a token.
var hosts atomic.Int32

// newNSSHost provisions a host on the one NSS database.
func newNSSHost(t *testing.T, method string) (*hsm.HSM, hsm.Config) {
	t.Helper()
	cfg := config(t, newNSS(t), fmt.Sprint("web", hosts.Add(1)))
	cfg.Method = method
	return provision(t, cfg), cfg
}

func newHostWith(t *testing.T, method string) (*hsm.HSM, hsm.Config) {
	t.Helper()
	cfg := config(t, newToken(t), "web1")
	cfg.Method = method
	return provision(t, cfg), cfg
}

// recommended is what a probe says of a token.
func recommended(t *testing.T, tok *testenv.Token) string {
	t.Helper()
	defer hsm.SmallRSA()()
	r, err := hsm.Probe(t.Context(), config(t, tok, ""))
	if err != nil {
		t.Fatal(err)
	}
	return r.Recommended
}

func conformance(t *testing.T, method string, newHost func(*testing.T, string) (*hsm.HSM, hsm.Config)) {
	t.Cleanup(hsm.SmallRSA())
	vaulttest.Run(t, func(t *testing.T) vaulttest.Host {
		h, cfg := newHost(t, method)
		return vaulttest.Host{
			Protector: h,
			Reopen:    func() vault.Protector { return open(t, cfg) },
			State:     cfg.StateDir,
		}
	})
}

// TestConformance runs the suite with the method that SoftHSM chooses: the best that
// its configuration leaves it.
func TestConformance(t *testing.T) {
	want := cmp.Or(os.Getenv("HSM_TEST_CHOICE"), "aes-gcm")
	if got := recommended(t, newToken(t)); got != want {
		t.Fatalf("SoftHSM chooses %q, not %q", got, want)
	}
	conformance(t, want, newHostWith)
}

// TestConformanceOfWhatIsLeft takes mechanisms away from SoftHSM.
func TestConformanceOfWhatIsLeft(t *testing.T) {
	const always = "slots.mechanisms = CKM_AES_KEY_GEN,CKM_GENERIC_SECRET_KEY_GEN,CKM_RSA_PKCS_KEY_PAIR_GEN,CKM_RSA_PKCS_OAEP,CKM_EC_KEY_PAIR_GEN,CKM_ECDSA,CKM_SHA256_HMAC"
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	for want, more := range map[string]string{"aes-kw": ",CKM_AES_KEY_WRAP", "hmac-sha256-prf": ""} {
		cmd := exec.CommandContext(t.Context(), exe, "-test.run", "^TestConformance$", "-test.v", "-test.count=1")
		cmd.Env = append(os.Environ(), "HSM_TEST_CHOICE="+want, "HSM_TEST_CONF="+always+more)
		out, err := cmd.CombinedOutput()
		if err != nil || !strings.Contains(string(out), "--- PASS: TestConformance/ErasedShare") {
			t.Errorf("with %s: %v\n%s", want, err, out)
		}
	}
}

func TestConformanceByName(t *testing.T) {
	for _, method := range []string{"aes-kw", "hmac-sha256-prf", "rsa-oaep-sha1"} {
		t.Run(method, func(t *testing.T) { conformance(t, method, newHostWith) })
	}
}

func TestConformanceNSS(t *testing.T) {
	choice := recommended(t, newNSS(t))
	if choice != "aes-kw-enc" {
		t.Errorf("NSS chooses %s", choice)
	}
	for _, method := range []string{choice, "aes-kw", "rsa-oaep-sha256", "hmac-sha256-prf"} {
		t.Run(method, func(t *testing.T) { conformance(t, method, newNSSHost) })
	}
}
