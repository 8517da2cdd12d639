package tpm_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-tpm/tpm2"

	"conseal/internal/pin"
	"conseal/internal/secret"
	"conseal/testenv"
	"conseal/tpm"
	"conseal/tpm/attest"
)

const rightPIN = "correct horse battery 7"

// newPINHost is a host with a PIN; file is where it is.
func newPINHost(t *testing.T, m *team) (h *host, file string) {
	t.Helper()
	dir := t.TempDir()
	file = filepath.Join(dir, "pin")
	setPIN(t, file, rightPIN)
	h = &host{device: startTPM(t)}
	h.tap = startTap(t, h.device)
	h.cfg = tpm.Config{Device: h.tap.Address(), PCRs: []int{4}, PINSource: "file:" + file, StateDir: dir}
	if m != nil {
		h.cfg.Authority = m.authority("alpha")
	}
	h.made = provision(t, h.cfg)
	h.cfg = remember(h.cfg, h.made)
	h.TPM = open(t, h.cfg)
	return h, file
}

func setPIN(t *testing.T, file, value string) {
	t.Helper()
	if err := os.WriteFile(file, []byte(value+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
}

// failedTries is what the TPM counts.
func failedTries(t *testing.T, h *host) uint32 {
	t.Helper()
	rsp, err := tpm2.GetCapability{Capability: tpm2.TPMCapTPMProperties, Property: uint32(tpm2.TPMPTLockoutCounter), PropertyCount: 1}.Execute(h.tap)
	if err != nil {
		t.Fatal(err)
	}
	list, err := rsp.CapabilityData.Data.TPMProperties()
	if err != nil || len(list.TPMProperty) != 1 {
		t.Fatalf("%v, %v", list, err)
	}
	return list.TPMProperty[0].Value
}

func wantPINRefused(t *testing.T, err error) {
	t.Helper()
	wantClass(t, err, tpm.ClassAuth)
	if !errors.Is(err, pin.ErrRefused) {
		t.Errorf("not ErrRefused: %v", err)
	}
}

// With and without signed policies: the PIN opens, a wrong one does not, is sent once
// and by no later process either.
func TestPIN(t *testing.T) {
	for name, m := range map[string]*team{"fixed": nil, "governed": newTeam(t)} {
		t.Run(name, func(t *testing.T) {
			h, file := newPINHost(t, m)
			if m != nil {
				if p := m.allow(t, h, "now"); !p.PIN {
					t.Fatal("the policy of a host with a PIN does not want it")
				}
			}
			root := setRoot(t, h.TPM)
			key, blob := seal(t, h.TPM, "k")
			wantOpens(t, h.TPM, "k", blob, key)
			wantRoot(t, h.TPM, root)

			setPIN(t, file, "another PIN")
			_, err := h.Root(t.Context())
			wantPINRefused(t, err)
			for range 3 {
				_, err := h.Open(t.Context(), "k", blob)
				wantPINRefused(t, err)
				wantPINRefused(t, h.SetRoot(t.Context(), secret.Random(tpm.KeySize)))
			}
			if err := h.Close(t.Context()); err != nil {
				t.Fatal(err)
			}
			d := open(t, h.cfg)
			_, err = d.Root(t.Context())
			wantPINRefused(t, err)
			if got := failedTries(t, h); got != 1 {
				t.Errorf("a wrong PIN was sent %d times", got)
			}

			setPIN(t, file, rightPIN)
			wantRoot(t, d, root)
			wantOpens(t, d, "k", blob, key)
			next := setRoot(t, d)
			wantRoot(t, d, next)
			h.extend(t, 4, "a kernel")
			_, err = d.Root(t.Context())
			wantClass(t, err, tpm.ClassPolicy)
			wantNoHandles(t, h.tap)
		})
	}
}

// A PIN that could be the last try is not sent, and a locked TPM is told nothing.
func TestPINNeverLocks(t *testing.T) {
	h, file := newPINHost(t, nil)
	root := setRoot(t, h.TPM)
	var max uint32 = 3 // swtpm's
	for i := range max - 1 {
		setPIN(t, file, "wrong PIN "+string(rune('a'+i)))
		_, err := h.Root(t.Context())
		wantPINRefused(t, err)
	}
	for range 2 {
		for _, value := range []string{"another wrong PIN", rightPIN} {
			setPIN(t, file, value)
			_, err := open(t, h.cfg).Root(t.Context())
			wantClass(t, err, tpm.ClassLockout)
			if !strings.Contains(err.Error(), "not sent") {
				t.Error(err)
			}
		}
	}
	if got := failedTries(t, h); got != max-1 {
		t.Errorf("%d failed tries, of %d that lock", got, max)
	}
	newTools(t, h).run("tpm2_dictionarylockout", "-c")
	wantRoot(t, open(t, h.cfg), root)
	if got := failedTries(t, h); got != 0 {
		t.Errorf("%d failed tries after the right PIN", got)
	}
}

// Crashes of the agent use up no tries, and do not make the right PIN refused.
func TestCrashesAndPIN(t *testing.T) {
	h, _ := newPINHost(t, nil)
	root := setRoot(t, h.TPM)
	for range 10 {
		d, err := tpm.Open(t.Context(), h.cfg)
		if err != nil {
			t.Fatal(err)
		}
		cut := false
		h.tap.Intercept(func(cmd []byte, next testenv.Exchange) ([]byte, error) {
			if code(cmd) == tpm2.TPMCCNVRead {
				cut = true
				return nil, errors.New("cut")
			}
			return next(cmd)
		})
		_, err = d.Root(t.Context())
		h.tap.Intercept(nil)
		if err == nil || !cut {
			t.Fatalf("not cut: %v", err)
		}
		// It is left as it is, as by a crash.
	}
	wantRoot(t, open(t, h.cfg), root)
	if got := failedTries(t, h); got != 0 {
		t.Errorf("%d failed tries", got)
	}
}

// A policy without PIN is for emergencies; one with PIN does not open a host without.
func TestPoliciesAndPIN(t *testing.T) {
	m := newTeam(t)
	h, file := newPINHost(t, m)
	m.allow(t, h, "daily")
	root := setRoot(t, h.TPM)
	setPIN(t, file, "forgotten PIN")
	_, err := open(t, h.cfg).Root(t.Context())
	wantPINRefused(t, err)
	emergency := h.measured(t).Policy("the PIN is forgotten", h.measured(t).Taken)
	emergency.PIN = false
	m.installed = append(m.installed, m.sign(t, emergency))
	wantRoot(t, open(t, h.cfg), root)
	if got := failedTries(t, h); got != 1 {
		t.Errorf("%d failed tries", got)
	}
	tampered := *m.installed[0] // made to look as if it did not want the PIN
	tampered.PIN = false
	m.installed = m.installed[:0]
	m.installed = append(m.installed, &tampered)
	if _, err := open(t, h.cfg).Root(t.Context()); err == nil {
		t.Error("a policy opens without the PIN that it was signed for")
	}

	n := newTeam(t)
	bare := newGovernedHost(t, n, 4)
	p := bare.measured(t).Policy("wants a PIN", bare.measured(t).Taken)
	p.PIN = true
	n.installed = append(n.installed, n.sign(t, p))
	wantRefused(t, bare.SetRoot(t.Context(), secret.Random(tpm.KeySize)), "wants a PIN")
}

// A policy that waives the PIN does so until it is revoked, also beside later ones.
func TestWaiverOfPIN(t *testing.T) {
	m := newTeam(t)
	h, file := newPINHost(t, m)
	m.allow(t, h, "daily")
	root := setRoot(t, h.TPM)
	waiver := h.measured(t).Policy("the PIN is forgotten", h.measured(t).Taken)
	waiver.PIN = false
	m.installed = append(m.installed, m.sign(t, waiver))
	later := m.allow(t, h, "daily again")
	setPIN(t, file, "forgotten PIN")
	wantRoot(t, open(t, h.cfg), root)
	if _, err := h.Revoke(t.Context(), m.revocation(t, "alpha", later.Version)); err != nil {
		t.Fatal(err)
	}
	_, err := open(t, h.cfg).Root(t.Context())
	wantPINRefused(t, err)
}

// Whether a host has a PIN cannot be changed behind its back.
func TestPINConfigurationChanged(t *testing.T) {
	with, _ := newPINHost(t, nil)
	setRoot(t, with.TPM)
	_, sealedWith := seal(t, with.TPM, "k")
	without := newHost(t, 4)
	_, sealedWithout := seal(t, without.TPM, "k")
	cfg := with.cfg
	cfg.PINSource = ""
	if _, err := tpm.Open(t.Context(), cfg); tpm.ClassOf(err) != tpm.ClassLost || !strings.Contains(err.Error(), "PIN") {
		t.Errorf("opened without the PIN: %v", err)
	}
	_, err := with.Open(t.Context(), "k", sealedWithout)
	wantClass(t, err, tpm.ClassCorrupt)
	_, err = without.Open(t.Context(), "k", sealedWith)
	wantClass(t, err, tpm.ClassCorrupt)
	cfg = without.cfg
	cfg.PINSource, cfg.StateDir = with.cfg.PINSource, with.cfg.StateDir
	if _, err := tpm.Open(t.Context(), cfg); tpm.ClassOf(err) != tpm.ClassLost {
		t.Errorf("opened with a PIN that it was not made with: %v", err)
	}
}

func TestBadPINs(t *testing.T) {
	h, file := newPINHost(t, nil)
	setRoot(t, h.TPM)
	for value, want := range map[string]string{"": "empty", "12345": "guessed", strings.Repeat("x", 33): "takes 32"} {
		setPIN(t, file, value)
		if _, err := open(t, h.cfg).Root(t.Context()); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, want %q", value, err, want)
		}
	}
	if err := os.Chmod(file, 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := open(t, h.cfg).Root(t.Context()); err == nil || !strings.Contains(err.Error(), "chmod") {
		t.Errorf("a PIN that others read: %v", err)
	}
	if got := failedTries(t, h); got != 0 {
		t.Errorf("%d were sent", got)
	}
	for _, cfg := range []tpm.Config{
		{Device: "unix:/x", PCRs: []int{4}, PINSource: "123456", StateDir: "/s"},
		{Device: "unix:/x", PCRs: []int{4}, PINSource: "file:/pin"},
	} {
		if _, err := tpm.Provision(t.Context(), cfg); err == nil || strings.Contains(err.Error(), "123456") {
			t.Errorf("%+v: %v", cfg, err)
		}
	}
}

// The PIN is not on the bus, and what is there cannot be used to try PINs out: a policy
// session that proves a PIN is salted.
func TestPINStaysOffTheBus(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "pin")
	setPIN(t, file, rightPIN)
	h := &host{device: startTPM(t)}
	h.tap = startTap(t, h.device)
	var bus bytes.Buffer
	h.tap.Record(&bus)
	salted, bare := 0, 0
	h.tap.Intercept(func(cmd []byte, next testenv.Exchange) ([]byte, error) {
		const policySession = 1
		if code(cmd) == tpm2.TPMCCStartAuthSession {
			nonce := 20 + int(binary.BigEndian.Uint16(cmd[18:])) // behind it, salt and kind
			kind := cmd[nonce+2+int(binary.BigEndian.Uint16(cmd[nonce:]))]
			if key := tpm2.TPMHandle(binary.BigEndian.Uint32(cmd[10:])); kind == policySession && key == tpm2.TPMRHNull {
				bare++
			} else if kind == policySession {
				salted++
			}
		}
		return next(cmd)
	})
	h.cfg = tpm.Config{Device: h.tap.Address(), PCRs: []int{4}, PINSource: "file:" + file, StateDir: dir}
	h.made = provision(t, h.cfg)
	h.cfg = remember(h.cfg, h.made)
	h.TPM = open(t, h.cfg)
	root := setRoot(t, h.TPM)
	key, blob := seal(t, h.TPM, "k")
	wantOpens(t, h.TPM, "k", blob, key)
	wantRoot(t, h.TPM, root)
	h.tap.Record(nil)
	if bytes.Contains(bus.Bytes(), []byte(rightPIN)) {
		t.Error("the PIN was on the bus")
	}
	if bare > 0 || salted < 3 {
		t.Errorf("%d policy sessions without salt, %d with", bare, salted)
	}

	// The control: without a PIN they are bare, and a password is seen.
	salted, bare = 0, 0
	other := newHost(t, 4)
	other.tap.Close()
	h.tap.Connect(other.device)
	other.cfg.Device = h.tap.Address()
	h.tap.Record(&bus)
	setRoot(t, open(t, other.cfg))
	if bare == 0 {
		t.Error("the interceptor sees no policy session")
	}
	_, _ = tpm2.NVRead{ // refused
		AuthHandle: tpm2.AuthHandle{Handle: tpm2.TPMRHOwner, Auth: tpm2.PasswordAuth([]byte(rightPIN))},
		NVIndex:    tpm2.NamedHandle{Handle: tpm.DefaultNVRoot}, Size: 32,
	}.Execute(dialTap(t, h.tap))
	h.tap.Record(nil)
	if !bytes.Contains(bus.Bytes(), []byte(rightPIN)) {
		t.Error("the recorder misses what is on the bus")
	}
}

// The TPM certifies receipts of a host with a PIN, with the PIN only.
func TestPINReceipts(t *testing.T) {
	h, file := newPINHost(t, nil)
	v := newVerifier(t, h)
	first := v.value(t, receipt(t, h, "one"), "one")
	if next := v.value(t, receipt(t, h, "two"), "two"); next <= first {
		t.Errorf("%d after %d", next, first)
	}
	setPIN(t, file, "another PIN")
	_, err := open(t, h.cfg).Receipt(t.Context(), []byte("three"))
	wantPINRefused(t, err)
	bare := v.counter
	bare.PIN = false
	setPIN(t, file, rightPIN)
	if _, err := attest.VerifyReceipt(receipt(t, h, "four"), v.ak, bare, []byte("four")); err == nil {
		t.Error("a verifier takes it for one of a host without a PIN")
	}
}

// The owner makes an index anew with a PIN of their own. The right one is refused then, once,
// and it is said why that can be.
func TestIndexMadeAnewWithAnotherPIN(t *testing.T) {
	for name, test := range map[string]struct {
		index uint32
		use   func(h *host) error
		says  string
	}{
		"root":                  {tpm.DefaultNVRoot, func(h *host) error { _, err := h.Root(t.Context()); return err }, "the TPM took it before"},
		"receipts":              {tpm.DefaultNVReceipts, func(h *host) error { _, err := h.Receipt(t.Context(), []byte("x")); return err }, "the TPM took it before"},
		"root, after a restart": {tpm.DefaultNVRoot, func(h *host) error { _, err := open(t, h.cfg).Root(t.Context()); return err }, "unless the TPM's owner made anew"},
	} {
		t.Run(name, func(t *testing.T) {
			h, _ := newPINHost(t, nil)
			setRoot(t, h.TPM)
			public := undefine(t, h, test.index)
			public.Attributes.Written = false
			_, err := tpm2.NVDefineSpace{AuthHandle: tpm2.TPMRHOwner, Auth: tpm2.TPM2BAuth{Buffer: []byte("the owner's")}, PublicInfo: tpm2.New2B(*public)}.Execute(h.tap)
			if err != nil {
				t.Fatal(err)
			}
			err = test.use(h)
			wantPINRefused(t, err)
			if !strings.Contains(err.Error(), test.says) {
				t.Errorf("it does not say %q: %v", test.says, err)
			}
			wantPINRefused(t, test.use(h))
			if got := failedTries(t, h); got != 1 {
				t.Errorf("the PIN was sent %d times", got)
			}
			// docs/threats.md: who has the disk now can tell a right guess from a wrong one.
			latch := pin.Latch{Dir: h.cfg.StateDir, Name: "tpm-pin.latch"}
			if err := latch.Check(secret.Copy([]byte(rightPIN))); !errors.Is(err, pin.ErrRefused) {
				t.Errorf("the latch does not know the PIN: %v", err)
			}
			if err := latch.Check(secret.Copy([]byte("a guess"))); err != nil {
				t.Error(err)
			}
		})
	}
}

// A PIN that was taken, where that cannot be noted: no secret comes beside the error.
func TestPINTakenAndNotNoted(t *testing.T) {
	h, _ := newPINHost(t, nil)
	setRoot(t, h.TPM)
	_, blob := seal(t, h.TPM, "k")
	cfg := h.cfg
	cfg.StateDir = filepath.Join(t.TempDir(), "gone")
	if root, err := open(t, cfg).Root(t.Context()); root != nil || err == nil {
		t.Errorf("a root: %v, %v", root != nil, err)
	}
	if key, err := open(t, cfg).Open(t.Context(), "k", blob); key != nil || err == nil {
		t.Errorf("a key: %v, %v", key != nil, err)
	}
}

// A wrong PIN whose refusal does not come back is not known to be wrong: it is sent again,
// and never so that the next failure would lock.
func TestRefusalOfPINLost(t *testing.T) {
	h, file := newPINHost(t, nil)
	setRoot(t, h.TPM)
	setPIN(t, file, "another PIN")
	h.tap.Intercept(func(cmd []byte, next testenv.Exchange) ([]byte, error) {
		answer, err := next(cmd)
		if code(cmd) == tpm2.TPMCCNVRead {
			return nil, net.ErrClosed
		}
		return answer, err
	})
	d := open(t, h.cfg)
	for range 5 {
		if _, err := d.Root(t.Context()); err == nil {
			t.Fatal("a wrong PIN opens")
		}
	}
	h.tap.Intercept(nil)
	if tries := failedTries(t, h); tries != 2 { // of three, as swtpm has it
		t.Errorf("%d failed tries", tries)
	}
	if _, err := d.Root(t.Context()); tpm.ClassOf(err) != tpm.ClassLockout {
		t.Errorf("the last try: %v", err)
	}
}

// Nothing is sealed under a PIN that is not the root's: a slip in the file would be noticed
// when it is put right, and what was sealed meanwhile be lost.
func TestNothingIsSealedUnderAWrongPIN(t *testing.T) {
	for name, m := range map[string]*team{"fixed": nil, "governed": newTeam(t), "waived": newTeam(t)} {
		t.Run(name, func(t *testing.T) {
			h, file := newPINHost(t, m)
			if m != nil {
				m.allow(t, h, "daily")
			}
			root := setRoot(t, h.TPM)
			key, blob := seal(t, h.TPM, "k")
			if name == "waived" {
				waiver := h.measured(t).Policy("the PIN is forgotten", h.measured(t).Taken)
				waiver.PIN = false
				m.installed = append(m.installed, m.sign(t, waiver))
			}
			setPIN(t, file, "a slip in the file")
			for _, d := range []*tpm.TPM{h.TPM, open(t, h.cfg)} {
				_, _, err := d.Seal(t.Context(), "l")
				wantClass(t, err, tpm.ClassAuth)
			}
			if got := failedTries(t, h); got > 1 {
				t.Errorf("%d failed tries", got)
			}
			setPIN(t, file, rightPIN)
			wantRoot(t, h.TPM, root)
			wantOpens(t, h.TPM, "k", blob, key)
			if name != "waived" {
				key, blob = seal(t, h.TPM, "l")
				wantOpens(t, h.TPM, "l", blob, key)
			}
		})
	}
}
