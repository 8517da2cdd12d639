package tpm_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/sha256"
	"encoding/binary"
	"encoding/pem"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"

	"conseal/internal/secret"
	"conseal/tpm"
	"conseal/tpm/policy"
)

// blobs are one of each kind, made by a TPM.
func blobs(t testing.TB) (fixed, governed, identity []byte) {
	m := newTeam(t)
	h, g := newHost(t, 4, 7), newGovernedHost(t, m, 7)
	_, fixed = seal(t, h.TPM, "k")
	_, governed = seal(t, g.TPM, "k")
	return fixed, governed, h.made.Identity
}

func TestBlobRefusals(t *testing.T) {
	fixed, governed, identity := blobs(t)
	block := func(i int, b []byte) *pem.Block {
		var found *pem.Block
		for range i + 1 {
			found, b = pem.Decode(b)
		}
		return found
	}
	join := func(list ...*pem.Block) (b []byte) {
		for _, p := range list {
			b = append(b, pem.EncodeToMemory(p)...)
		}
		return b
	}
	second := func(b ...byte) []byte {
		return join(block(0, fixed), &pem.Block{Type: "CONSEAL SEALED KEY 1", Bytes: append(b, block(1, governed).Bytes[1:]...)})
	}
	pcrs := func(list ...byte) (b []byte) {
		b = []byte{byte(len(list))}
		for _, i := range list {
			b = append(append(b, i), make([]byte, 32)...)
		}
		return b
	}
	for name, blob := range map[string][]byte{
		"empty":         nil,
		"text":          []byte("not a blob"),
		"key alone":     join(block(0, fixed)),
		"state alone":   join(block(1, fixed)),
		"twice":         append(bytes.Clone(fixed), fixed...),
		"other order":   join(block(1, fixed), block(0, fixed)),
		"text before":   append([]byte("hello\n"), fixed...),
		"text after":    append(bytes.Clone(fixed), "\n"...),
		"a header":      bytes.Replace(fixed, []byte("KEY-----\n"), []byte("KEY-----\nA: b\n\n"), 1),
		"other version": bytes.ReplaceAll(fixed, []byte("KEY 1"), []byte("KEY 2")),
		"an identity":   identity,
		"too long":      append(bytes.Clone(fixed), bytes.Repeat([]byte("\n"), 20<<10)...),
		"unsorted":      second(pcrs(7, 4)...),
		"PCR twice":     second(pcrs(7, 7)...),
		"PCR 24":        second(pcrs(24)...),
		"cut":           join(block(0, fixed), &pem.Block{Type: "CONSEAL SEALED KEY 1", Bytes: block(1, fixed).Bytes[:70]}),
		"more":          join(block(0, fixed), &pem.Block{Type: "CONSEAL SEALED KEY 1", Bytes: append(bytes.Clone(block(1, fixed).Bytes), 0)}),
		"DER after":     join(&pem.Block{Type: "TSS2 PRIVATE KEY", Bytes: append(bytes.Clone(block(0, fixed).Bytes), 0)}, block(1, fixed)),
	} {
		if _, err := tpm.RecodeSealed(blob); tpm.ClassOf(err) != tpm.ClassCorrupt {
			t.Errorf("%s: %v", name, err)
		}
	}
	for name, blob := range map[string][]byte{
		"empty": nil, "a sealed key": fixed, "more": append(bytes.Clone(identity), '\n'), "half": identity[:len(identity)/2],
	} {
		if _, err := tpm.RecodeIdentity(blob); tpm.ClassOf(err) != tpm.ClassCorrupt {
			t.Errorf("identity, %s: %v", name, err)
		}
	}
	for _, good := range [][]byte{fixed, governed} {
		if _, err := tpm.RecodeSealed(good); err != nil {
			t.Errorf("control: %v", err)
		}
	}
	if _, err := tpm.RecodeIdentity(identity); err != nil {
		t.Errorf("control: %v", err)
	}
}

func FuzzSealedBlob(f *testing.F) {
	fixed, governed, _ := blobs(f)
	f.Add(fixed)
	f.Add(governed)
	f.Fuzz(func(t *testing.T, blob []byte) { recodes(t, blob, tpm.RecodeSealed) })
}

func FuzzIdentityBlob(f *testing.F) {
	_, _, identity := blobs(f)
	f.Add(identity)
	f.Fuzz(func(t *testing.T, blob []byte) { recodes(t, blob, tpm.RecodeIdentity) })
}

// recodes wants that what is accepted encodes back the same.
func recodes(t *testing.T, blob []byte, recode func([]byte) ([]byte, error)) {
	again, err := recode(blob)
	if err == nil && !bytes.Equal(again, blob) {
		t.Errorf("%x encodes back as %x", blob, again)
	}
}

// tools runs tpm2-tools and openssl on a host's TPM, as root on that host would.
type tools struct {
	t   *testing.T
	h   *host
	dir string
}

func newTools(t *testing.T, h *host) *tools {
	return &tools{t, h, t.TempDir()}
}

// try runs one command and returns what it printed.
func (x *tools) try(name string, args ...string) (string, error) {
	x.t.Helper()
	defer x.start("tpm2_flushcontext", "-t") // there is no resource manager to do it
	return x.start(name, args...)
}

func (x *tools) start(name string, args ...string) (string, error) {
	x.t.Helper()
	if _, err := exec.LookPath(name); err != nil {
		x.t.Fatalf("%v: apt-get install tpm2-tools openssl", err)
	}
	cmd := exec.CommandContext(x.t.Context(), name, args...)
	cmd.Dir = x.dir
	cmd.Env = append(os.Environ(), "TPM2TOOLS_TCTI=cmd:"+os.Args[0]+" "+relayFlag+" "+strings.TrimPrefix(x.h.tap.Address(), "unix:"))
	out, err := cmd.CombinedOutput()
	return string(out), err
}

func (x *tools) run(name string, args ...string) string {
	x.t.Helper()
	out, err := x.try(name, args...)
	if err != nil {
		x.t.Fatalf("%s %q: %v\n%s", name, args, err, out)
	}
	return out
}

func (x *tools) write(name string, b []byte) {
	x.t.Helper()
	if err := os.WriteFile(filepath.Join(x.dir, name), b, 0o600); err != nil {
		x.t.Fatal(err)
	}
}

func (x *tools) read(name string) []byte {
	x.t.Helper()
	b, err := os.ReadFile(filepath.Join(x.dir, name))
	if err != nil {
		x.t.Fatal(err)
	}
	return b
}

// relayFlag has the test binary carry commands between standard streams and a socket,
// as the TCTI "cmd" of tpm2-tools wants.
const relayFlag = "-relay-to-tpm"

func relay(socket string) int {
	c, err := net.Dial("unix", socket)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	go func() {
		_, _ = io.Copy(c, os.Stdin)
		_ = c.(*net.UnixConn).CloseWrite()
	}()
	_, _ = io.Copy(os.Stdout, c)
	return 0
}

// Sealed keys and the identity are TSS2 PRIVATE KEY files that others read.
func TestOthersReadOurFiles(t *testing.T) {
	h := newHost(t, 7)
	key, blob := seal(t, h.TPM, "k")
	x := newTools(t, h)
	x.write("sealed.pem", blob)
	x.write("identity.pem", h.made.Identity)
	for file, oid := range map[string]string{"sealed.pem": "2.23.133.10.1.5", "identity.pem": "2.23.133.10.1.3"} {
		if out := x.run("openssl", "asn1parse", "-in", file); !strings.Contains(out, oid) {
			t.Errorf("%s: openssl finds no %s:\n%s", file, oid, out)
		}
	}
	x.run("tpm2_load", "-r", "sealed.pem", "-c", "sealed.ctx")
	x.run("tpm2_load", "-r", "identity.pem", "-c", "identity.ctx")
	x.session()
	x.run("tpm2_policypcr", "-S", "s.ctx", "-l", "sha256:7")
	x.wantUnseals(key)

	x.write("message", []byte("signed by another tool"))
	x.run("tpm2_sign", "-c", "identity.ctx", "-g", "sha256", "-s", "ecdsa", "-f", "plain", "-o", "signature", "message")
	identity, err := h.Identity(t.Context(), h.made.Identity)
	if err != nil {
		t.Fatal(err)
	}
	digest := sha256.Sum256([]byte("signed by another tool"))
	if !ecdsa.VerifyASN1(identity.Public().(*ecdsa.PublicKey), digest[:], x.read("signature")) {
		t.Error("tpm2_sign signs with another key")
	}
}

// session starts a policy session in s.ctx, anew.
func (x *tools) session() {
	x.t.Helper()
	x.run("tpm2_flushcontext", "-l")
	x.run("tpm2_startauthsession", "--policy-session", "-S", "s.ctx")
}

func (x *tools) wantUnseals(key *secret.Bytes) {
	x.t.Helper()
	out := x.run("tpm2_unseal", "-c", "sealed.ctx", "-p", "session:s.ctx")
	use(x.t, key, func(k []byte) {
		if !strings.HasPrefix(out, string(k)) {
			x.t.Errorf("tpm2_unseal gives %d bytes, and not the key", len(out))
		}
	})
}

// authorize satisfies a signed policy with tpm2-tools, as far as the TPM lets it.
func (x *tools) authorize(m *team, p *policy.Policy) (out string, err error) {
	x.t.Helper()
	host := m.authority("alpha").Host
	approval, err := p.Approval(&host)
	if err != nil {
		x.t.Fatal(err)
	}
	x.write("team.pem", m.pem(x.t))
	x.write("approved", approval.Policy)
	x.write("ref", approval.Ref)
	x.write("digest", approval.Digest)
	x.write("signature", tpm2.Marshal(approval.Signature))
	x.write("version", binary.BigEndian.AppendUint64(nil, p.Version))
	x.session()
	x.run("tpm2_policypcr", "-S", "s.ctx", "-l", "sha256:4")
	if out, err := x.try("tpm2_policynv", "-S", "s.ctx", "-C", "0x01800601", "-i", "version", "0x01800601", "ule"); err != nil {
		return out, err
	}
	x.run("tpm2_loadexternal", "-C", "o", "-G", "ecc:null", "-u", "team.pem", "-c", "team.ctx", "-n", "team.name", "-a", "sign|userwithauth")
	if out, err := x.try("tpm2_verifysignature", "-c", "team.ctx", "-d", "digest", "-s", "signature", "-t", "ticket"); err != nil {
		return out, err
	}
	return x.try("tpm2_policyauthorize", "-S", "s.ctx", "-i", "approved", "-q", "ref", "-n", "team.name", "-t", "ticket")
}

// Root on the running host, with tpm2-tools and everything that is on the disk, opens
// what the agent could open, and nothing else.
func TestRootWithTools(t *testing.T) {
	m := newTeam(t)
	h := newGovernedHost(t, m, 4)
	good := m.allow(t, h, "good")
	setRoot(t, h.TPM)
	key, blob := seal(t, h.TPM, "k")
	x := newTools(t, h)
	x.write("sealed.pem", blob)
	x.write("root", make([]byte, 32))
	x.run("tpm2_load", "-r", "sealed.pem", "-c", "sealed.ctx")
	never := func(when string) {
		t.Helper()
		for _, args := range [][]string{
			{"tpm2_unseal", "-c", "sealed.ctx"},
			{"tpm2_nvread", "-C", "o", "0x01800600"},
			{"tpm2_nvread", "0x01800600"},
			{"tpm2_nvwrite", "-C", "o", "-i", "root", "0x01800600"},
			{"tpm2_nvwrite", "-i", "root", "0x01800600"},
			{"tpm2_nvincrement", "-C", "o", "0x01800601"},
			{"tpm2_nvincrement", "0x01800601"},
			{"tpm2_changeauth", "-c", "sealed.ctx", "-C", "0x81000001", "-r", "new.priv", "new"},
			{"tpm2_changeauth", "-c", "0x01800600", "new"},
			{"tpm2_certify", "-c", "sealed.ctx", "-C", "sealed.ctx", "-o", "attest", "-s", "signature"},
			{"tpm2_duplicate", "-C", "null", "-c", "sealed.ctx", "-G", "null", "-r", "dup.priv", "-s", "dup.seed"},
		} {
			switch out, err := x.try(args[0], args[1:]...); {
			case err == nil:
				t.Errorf("%s: %q worked:\n%s", when, args, out)
			case !strings.Contains(out, "Received TPM Error"):
				t.Errorf("%s: %q: it is not the TPM that refuses:\n%s", when, args, out)
			}
		}
		x.session()
		x.run("tpm2_policypcr", "-S", "s.ctx", "-l", "sha256:4")
		if out, err := x.try("tpm2_unseal", "-c", "sealed.ctx", "-p", "session:s.ctx"); err == nil {
			t.Errorf("%s: opened by the PCRs alone:\n%s", when, out)
		}
	}
	never("in a permitted state")
	if out, err := x.authorize(m, good); err != nil {
		t.Fatalf("the control: %v\n%s", err, out)
	}
	x.wantUnseals(key)

	h.extend(t, 4, "a root kit")
	never("in another state")
	if out, err := x.authorize(m, good); err == nil {
		t.Errorf("an old policy is accepted in another state:\n%s", out)
	}
	now := h.measured(t).Policy("a root kit", time.Now())
	if out, err := x.authorize(newTeam(t), m.sign(t, now)); err == nil {
		t.Errorf("a policy of another key is accepted:\n%s", out)
	}
	if _, err := h.Revoke(t.Context(), m.revocation(t, "alpha", now.Version+1)); err != nil {
		t.Fatal(err)
	}
	if out, err := x.authorize(m, m.sign(t, now)); err == nil {
		t.Errorf("a revoked policy is accepted:\n%s", out)
	}
}
