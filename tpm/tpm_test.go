package tpm_test

import (
	"context"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"

	"conseal/agent/vault"
	"conseal/internal/secret"
	"conseal/testenv"
	"conseal/tpm"
)

var _ vault.Protector = (*tpm.TPM)(nil)

// base has a folder for each test's TPMs; its path is short, as sockets want it.
var base string

func TestMain(m *testing.M) {
	if len(os.Args) == 3 {
		switch os.Args[1] {
		case relayFlag:
			os.Exit(relay(os.Args[2]))
		case killFlag:
			os.Exit(live(os.Args[2]))
		}
	}
	os.Exit(func() int {
		var err error
		if base, err = os.MkdirTemp("/tmp", "conseal-tpm-"); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		defer os.RemoveAll(base)
		return m.Run()
	}())
}

// startTPM starts a new TPM.
func startTPM(t testing.TB) *testenv.TPM {
	t.Helper()
	dir, err := os.MkdirTemp(base, "h")
	if err != nil {
		t.Fatal(err)
	}
	s, err := testenv.StartTPM(t.Context(), dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Kill)
	return s
}

// host is a provisioned TPM behind a tap, and an agent's connection to it.
type host struct {
	*tpm.TPM
	device *testenv.TPM
	tap    *testenv.Tap
	cfg    tpm.Config // with what provisioning returned
	made   tpm.Provisioned
}

func newHost(t testing.TB, pcrs ...int) *host {
	t.Helper()
	if pcrs == nil {
		pcrs = []int{7}
	}
	h := &host{device: startTPM(t)}
	h.tap = startTap(t, h.device)
	h.cfg = tpm.Config{Device: h.tap.Address(), Timeout: 20 * time.Second, PCRs: pcrs}
	h.made = provision(t, h.cfg)
	h.cfg = remember(h.cfg, h.made)
	h.TPM = open(t, h.cfg)
	return h
}

func startTap(t testing.TB, s *testenv.TPM) *testenv.Tap {
	t.Helper()
	tap, err := s.Tap("tap.sock")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { tap.Close() })
	return tap
}

func provision(t testing.TB, cfg tpm.Config) tpm.Provisioned {
	t.Helper()
	p, err := tpm.Provision(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// remember is what an agent does with what provisioning returned.
func remember(cfg tpm.Config, p tpm.Provisioned) tpm.Config {
	cfg.SRKName, cfg.PCRWanted, cfg.Identity = p.SRKName, p.PCRWanted, p.Identity
	return cfg
}

func open(t testing.TB, cfg tpm.Config) *tpm.TPM {
	t.Helper()
	d, err := tpm.Open(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close(context.Background()) }) // the TPM may be gone by then
	return d
}

func (h *host) reboot(t testing.TB) {
	t.Helper()
	h.tap.Connect(h.device)
	if err := h.device.Restart(t.Context()); err != nil {
		t.Fatal(err)
	}
}

func (h *host) extend(t testing.TB, pcr int, data string) {
	t.Helper()
	if err := h.tap.Extend(pcr, data); err != nil {
		t.Fatal(err)
	}
}

func seal(t testing.TB, d *tpm.TPM, id string) (*secret.Bytes, []byte) {
	t.Helper()
	key, blob, err := d.Seal(t.Context(), id)
	if err != nil {
		t.Fatal(err)
	}
	if key.Len() != tpm.KeySize {
		t.Fatalf("a key of %d bytes", key.Len())
	}
	return key, blob
}

func wantOpens(t testing.TB, d *tpm.TPM, id string, blob []byte, want *secret.Bytes) {
	t.Helper()
	got, err := d.Open(t.Context(), id, blob)
	if err != nil {
		t.Fatal(err)
	}
	defer got.Wipe()
	if !got.Equal(want) {
		t.Fatal("it opened to another key")
	}
}

func wantRoot(t testing.TB, d *tpm.TPM, want *secret.Bytes) {
	t.Helper()
	got, err := d.Root(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer got.Wipe()
	if !got.Equal(want) {
		t.Fatal("it is another root")
	}
}

func setRoot(t testing.TB, d *tpm.TPM) *secret.Bytes {
	t.Helper()
	root := secret.Random(tpm.KeySize)
	if err := d.SetRoot(t.Context(), root); err != nil {
		t.Fatal(err)
	}
	return root
}

func wantClass(t *testing.T, err error, want tpm.Class) {
	t.Helper()
	if err == nil {
		t.Fatal("no error")
	}
	if got := tpm.ClassOf(err); got != want {
		t.Fatalf("class %d, want %d: %v", got, want, err)
	}
}

func wantChanged(t *testing.T, err error, pcrs ...int) {
	t.Helper()
	var e *tpm.PCRError
	if !errors.As(err, &e) {
		t.Fatalf("no PCRError: %v", err)
	}
	var got []int
	for _, c := range e.Changed {
		got = append(got, c.PCR)
		if len(c.Found) != 32 || len(c.Wanted) != 32 {
			t.Errorf("values of PCR %d are not whole", c.PCR)
		}
	}
	if fmt.Sprint(got) != fmt.Sprint(pcrs) {
		t.Errorf("it names PCRs %v, want %v: %v", got, pcrs, err)
	}
	if want := fmt.Sprintf("PCR %d is", pcrs[0]); !strings.Contains(err.Error(), want) {
		t.Errorf("the text does not have %q: %v", want, err)
	}
}

func handles(t *testing.T, d transport.TPM, kind tpm2.TPMHT) []tpm2.TPMHandle {
	t.Helper()
	rsp, err := tpm2.GetCapability{Capability: tpm2.TPMCapHandles, Property: uint32(kind) << 24, PropertyCount: 64}.Execute(d)
	if err != nil {
		t.Fatal(err)
	}
	list, err := rsp.CapabilityData.Data.Handles()
	if err != nil {
		t.Fatal(err)
	}
	return list.Handle
}

func wantNoHandles(t *testing.T, d transport.TPM) {
	t.Helper()
	for _, kind := range []tpm2.TPMHT{tpm2.TPMHTTransient, tpm2.TPMHTHMACSession, tpm2.TPMHTPolicySession} {
		if left := handles(t, d, kind); len(left) > 0 {
			t.Errorf("left in the TPM: %#x", left)
		}
	}
}

func TestConfigRefusals(t *testing.T) {
	good := tpm.Config{Device: "unix:/nowhere", PCRs: []int{7}}
	for name, spoil := range map[string]func(*tpm.Config){
		"no PCRs":         func(c *tpm.Config) { c.PCRs = nil },
		"PCR twice":       func(c *tpm.Config) { c.PCRs = []int{7, 3, 7} },
		"PCR 24":          func(c *tpm.Config) { c.PCRs = []int{24} },
		"PCR 16":          func(c *tpm.Config) { c.PCRs = []int{7, 16} },
		"PCR 23":          func(c *tpm.Config) { c.PCRs = []int{23} },
		"PCR -1":          func(c *tpm.Config) { c.PCRs = []int{-1} },
		"no address":      func(c *tpm.Config) { c.Device = "" },
		"unknown address": func(c *tpm.Config) { c.Device = "usb:1" },
		"raw device":      func(c *tpm.Config) { c.Device = "device:/dev/tpm0" },
		"NV handle":       func(c *tpm.Config) { c.NVRoot = 0x81000001 },
		"receipts":        func(c *tpm.Config) { c.NVReceipts = 0x81000002 },
		"index twice":     func(c *tpm.Config) { c.NVReceipts = tpm.DefaultNVRoot },
		"SRK handle":      func(c *tpm.Config) { c.SRKHandle = 0x01800600 },
		"time-out":        func(c *tpm.Config) { c.Timeout = -1 },
		"other PCRs":      func(c *tpm.Config) { c.PCRWanted = map[int][]byte{8: make([]byte, 32)} },
		"short PCR value": func(c *tpm.Config) { c.PCRWanted = map[int][]byte{7: nil} },
	} {
		t.Run(name, func(t *testing.T) {
			cfg := good
			spoil(&cfg)
			if _, err := tpm.Provision(t.Context(), cfg); err == nil || tpm.ClassOf(err) == tpm.ClassAbsent {
				t.Errorf("not refused: %v", err)
			}
		})
	}
	_, err := tpm.Provision(t.Context(), good)
	wantClass(t, err, tpm.ClassAbsent)
	if _, err := tpm.Open(t.Context(), good); err == nil || !strings.Contains(err.Error(), "provision") {
		t.Errorf("opened without a pin: %v", err)
	}
}

func TestSeal(t *testing.T) {
	h := newHost(t)
	key, blob := seal(t, h.TPM, "payments/1")
	other, _ := seal(t, h.TPM, "payments/1")
	if key.Equal(other) {
		t.Fatal("two seals, one key")
	}
	wantOpens(t, h.TPM, "payments/1", blob, key)
	h.reboot(t)
	if _, err := h.Open(t.Context(), "payments/1", blob); err != nil { // the connection of before may be gone
		wantClass(t, err, tpm.ClassReset)
	}
	wantOpens(t, h.TPM, "payments/1", blob, key)

	for _, id := range []string{"payments/2", "", "payments/1\x00"} {
		_, err := h.Open(t.Context(), id, blob)
		wantClass(t, err, tpm.ClassCorrupt)
	}
	stranger := newHost(t)
	_, err := stranger.Open(t.Context(), "payments/1", blob)
	wantClass(t, err, tpm.ClassCorrupt)
}

func TestDamagedBlobs(t *testing.T) {
	h := newHost(t)
	key, blob := seal(t, h.TPM, "k")
	for i := range blob {
		spoiled := append([]byte(nil), blob...)
		spoiled[i] ^= 1 << (i % 8)
		if _, err := h.Open(t.Context(), "k", spoiled); err == nil {
			t.Errorf("opens with byte %d of %d changed", i, len(blob))
		}
		if _, err := h.Open(t.Context(), "k", blob[:i]); err == nil {
			t.Errorf("opens when cut to %d of %d bytes", i, len(blob))
		}
	}
	_, err := h.Open(t.Context(), "k", append(blob, 0))
	wantClass(t, err, tpm.ClassCorrupt)
	wantOpens(t, h.TPM, "k", blob, key)
	wantNoHandles(t, h.tap)

	identity := h.made.Identity
	for i := 0; i < len(identity); i += 3 {
		spoiled := append([]byte(nil), identity...)
		spoiled[i] ^= 0x10
		if _, err := h.Identity(t.Context(), spoiled); err == nil {
			t.Errorf("identity loads with byte %d of %d changed", i, len(identity))
		}
		if _, err := h.Identity(t.Context(), identity[:i]); err == nil {
			t.Errorf("identity loads when cut to %d of %d bytes", i, len(identity))
		}
	}
	wantNoHandles(t, h.tap)
}

func TestChangedPCRsAreNamed(t *testing.T) {
	// More than one TPM2_PCR_Read gives.
	h := newHost(t, 11, 7, 0, 1, 2, 3, 4, 5, 6, 9, 14, 22)
	key, blob := seal(t, h.TPM, "k")
	root := setRoot(t, h.TPM)
	wantOpens(t, h.TPM, "k", blob, key)
	wantRoot(t, h.TPM, root)
	h.extend(t, 8, "not ours")
	wantOpens(t, h.TPM, "k", blob, key)

	h.extend(t, 14, "another kernel")
	h.extend(t, 7, "another key in db")
	_, err := h.Open(t.Context(), "k", blob)
	wantChanged(t, err, 7, 14)
	wantClass(t, err, tpm.ClassPolicy)
	_, err = h.Root(t.Context())
	wantChanged(t, err, 7, 14)
	wantChanged(t, h.SetRoot(t.Context(), secret.Random(32)), 7, 14)
	wantNoHandles(t, h.tap)

	newKey, newBlob := seal(t, h.TPM, "k") // in the new state
	wantOpens(t, h.TPM, "k", newBlob, newKey)
	h.reboot(t)
	h.TPM = open(t, h.cfg)
	wantOpens(t, h.TPM, "k", blob, key)
	wantRoot(t, h.TPM, root)
	_, err = h.Open(t.Context(), "k", newBlob)
	wantChanged(t, err, 7, 14)
}

func TestPCRChangesBetweenPolicyAndUse(t *testing.T) {
	h := newHost(t)
	_, blob := seal(t, h.TPM, "k")
	h.tap.Intercept(func(cmd []byte, next testenv.Exchange) ([]byte, error) {
		if code(cmd) == tpm2.TPMCCUnseal {
			if err := h.tap.Extend(7, "just now"); err != nil {
				return nil, err
			}
		}
		return next(cmd)
	})
	_, err := h.Open(t.Context(), "k", blob)
	wantChanged(t, err, 7)
}

func TestProvisionAgain(t *testing.T) {
	h := newHost(t)
	root := setRoot(t, h.TPM)
	again := provision(t, h.cfg)
	for _, s := range again.Steps {
		if !strings.HasSuffix(s, "already there") {
			t.Errorf("second run: %s", s)
		}
	}
	if string(again.SRKName) != string(h.made.SRKName) || string(again.Identity) != string(h.made.Identity) {
		t.Error("the second run returned something else")
	}
	forgetful := h.cfg // as after a crash before anything was kept
	forgetful.SRKName, forgetful.PCRWanted, forgetful.Identity = nil, nil, nil
	p := provision(t, forgetful)
	if len(p.Steps) != 4 || !strings.HasSuffix(p.Steps[2], "already there") || !strings.HasSuffix(p.Steps[3], "made") {
		t.Errorf("forgetful run: %q", p.Steps)
	}
	wantRoot(t, open(t, remember(h.cfg, p)), root)

	h.extend(t, 7, "another state")
	if _, err := tpm.Provision(t.Context(), forgetful); err == nil || !strings.Contains(err.Error(), "in use") {
		t.Errorf("another state's index taken over: %v", err)
	}
	if p := provision(t, h.cfg); len(p.Steps) != 4 { // knows what it wants
		t.Errorf("steps %q", p.Steps)
	}
}

func TestTwoAgentsOnOneTPM(t *testing.T) {
	h := newHost(t)
	second := h.cfg
	second.NVRoot, second.NVReceipts = 0x01800700, 0x01800702
	second.PCRWanted, second.Identity = nil, nil
	d := open(t, remember(second, provision(t, second)))
	first, other := setRoot(t, h.TPM), setRoot(t, d)
	wantRoot(t, h.TPM, first)
	wantRoot(t, d, other)
}

func TestStandardHandleTaken(t *testing.T) {
	device := startTPM(t)
	tap := startTap(t, device)
	theirs := primary(t, tap, tpm2.RSASRKTemplate)
	persist(t, tap, theirs, tpm.StandardSRKHandle)
	cfg := tpm.Config{Device: tap.Address(), PCRs: []int{7}}
	p := provision(t, cfg)
	d := open(t, remember(cfg, p))
	key, blob := seal(t, d, "k")
	wantOpens(t, d, "k", blob, key)
	rsp, err := tpm2.ReadPublic{ObjectHandle: tpm2.TPMHandle(tpm.StandardSRKHandle)}.Execute(tap)
	if err != nil || string(rsp.Name.Buffer) != string(theirs.Name.Buffer) {
		t.Fatalf("somebody's key at the standard handle was touched: %v", err)
	}

	cfg.SRKHandle = 0x81000777
	persist(t, tap, primary(t, tap, tpm2.RSASRKTemplate), 0x81000777)
	if _, err := tpm.Provision(t.Context(), cfg); err == nil || !strings.Contains(err.Error(), "left alone") {
		t.Errorf("with both handles taken: %v", err)
	}
}

func TestSRKEvictedAndClearedAndReplaced(t *testing.T) {
	h := newHost(t)
	key, blob := seal(t, h.TPM, "k")
	rsp, err := tpm2.ReadPublic{ObjectHandle: tpm2.TPMHandle(tpm.StandardSRKHandle)}.Execute(h.tap)
	if err != nil {
		t.Fatal(err)
	}
	_, err = tpm2.EvictControl{
		Auth:             tpm2.TPMRHOwner,
		ObjectHandle:     tpm2.NamedHandle{Handle: tpm.StandardSRKHandle, Name: rsp.Name},
		PersistentHandle: tpm.StandardSRKHandle,
	}.Execute(h.tap)
	if err != nil {
		t.Fatal(err)
	}
	_, err = h.Open(t.Context(), "k", blob)
	wantClass(t, err, tpm.ClassReset)
	_, err = h.Open(t.Context(), "k", blob)
	wantClass(t, err, tpm.ClassEvicted)
	provision(t, h.cfg)
	wantOpens(t, h.TPM, "k", blob, key)

	// The board is replaced under the open connection.
	h.tap.Connect(startTPM(t))
	if _, err = h.Open(t.Context(), "k", blob); tpm.ClassOf(err) == tpm.ClassReset {
		_, err = h.Open(t.Context(), "k", blob) // the first finds the connection cut
	}
	wantClass(t, err, tpm.ClassLost)
	_, err = tpm.Open(t.Context(), h.cfg)
	wantClass(t, err, tpm.ClassLost)
	_, err = tpm.Provision(t.Context(), h.cfg)
	wantClass(t, err, tpm.ClassLost)

	h.tap.Connect(h.device)
	_, err = tpm2.Clear{AuthHandle: tpm2.AuthHandle{Handle: tpm2.TPMRHLockout, Auth: tpm2.PasswordAuth(nil)}}.Execute(h.tap)
	if err != nil {
		t.Fatal(err)
	}
	_, err = tpm.Open(t.Context(), h.cfg)
	wantClass(t, err, tpm.ClassLost)
}

// primary makes somebody else's primary key.
func primary(t *testing.T, d transport.TPM, template tpm2.TPMTPublic) *tpm2.CreatePrimaryResponse {
	t.Helper()
	rsp, err := tpm2.CreatePrimary{PrimaryHandle: tpm2.TPMRHOwner, InPublic: tpm2.New2B(template)}.Execute(d)
	if err != nil {
		t.Fatal(err)
	}
	return rsp
}

func persist(t *testing.T, d transport.TPM, key *tpm2.CreatePrimaryResponse, h tpm2.TPMHandle) {
	t.Helper()
	_, err := tpm2.EvictControl{
		Auth:             tpm2.TPMRHOwner,
		ObjectHandle:     tpm2.NamedHandle{Handle: key.ObjectHandle, Name: key.Name},
		PersistentHandle: h,
	}.Execute(d)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := (tpm2.FlushContext{FlushHandle: key.ObjectHandle}).Execute(d); err != nil {
		t.Fatal(err)
	}
}

func TestCloseAndAfter(t *testing.T) {
	h := newHost(t)
	if h.Name() != "tpm "+h.tap.Address() || h.Kind() != "tpm" {
		t.Errorf("it is %q, a %q", h.Name(), h.Kind())
	}
	for range 2 {
		if err := h.Close(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := h.Root(t.Context()); !errors.Is(err, tpm.ErrClosed) {
		t.Errorf("after Close: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := open(t, h.cfg).Root(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("with an ended context: %v", err)
	}
}

// A policy over a bank that is not allocated would hold in any state.
func TestBankNotAllocated(t *testing.T) {
	h := newHost(t)
	allocate := "8002 00000033 0000012b 4000000c" + // TPM2_PCR_Allocate by the platform
		"00000009 40000009 0000 00 0000" + // an empty password
		"00000002 0004 03 ffffff 000b 03 000000" // SHA-1: all, SHA-256: none
	cmd, err := hex.DecodeString(strings.ReplaceAll(allocate, " ", ""))
	if err != nil {
		t.Fatal(err)
	}
	binary.BigEndian.PutUint32(cmd[2:], uint32(len(cmd)))
	answer, err := h.tap.Send(cmd)
	if err != nil || code(answer) != 0 {
		t.Fatalf("allocating banks: %x, %v", answer, err)
	}
	h.reboot(t)
	for name, try := range map[string]func() error{
		"provision": func() error { _, err := tpm.Provision(t.Context(), h.cfg); return err },
		"open":      func() error { _, err := tpm.Open(t.Context(), h.cfg); return err },
	} {
		if err := try(); err == nil || !strings.Contains(err.Error(), "tpm2_pcrallocate") {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, _, err := h.Seal(t.Context(), "k"); err == nil { // on the connection of before, then on a new one
		t.Error("sealed to a bank that is not there")
	}
	if _, _, err := h.Seal(t.Context(), "k"); err == nil || tpm.ClassOf(err) == tpm.ClassReset {
		t.Errorf("sealing to a bank that is not there: %v", err)
	}
}
