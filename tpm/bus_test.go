package tpm_test

import (
	"bytes"
	"context"
	"crypto"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"
	"golang.org/x/sys/unix"

	"conseal/internal/secret"
	"conseal/testenv"
	"conseal/tpm"
	"conseal/tpm/policy"
)

func TestSecretsStayOffTheBus(t *testing.T) {
	h := newHost(t)
	var bus bytes.Buffer
	h.tap.Record(&bus)
	key, blob := seal(t, h.TPM, "k")
	wantOpens(t, h.TPM, "k", blob, key)
	root := setRoot(t, h.TPM)
	wantRoot(t, h.TPM, root)
	h.tap.Record(nil)

	onBus := func(b []byte) bool { return bytes.Contains(bus.Bytes(), b) }
	use(t, key, func(k []byte) {
		if onBus(k) {
			t.Error("the key was on the bus")
		}
		id := sha256.Sum256([]byte("conseal tpm seal v1\x00k"))
		if onBus(id[:]) {
			t.Error("the sealed data was on the bus")
		}
	})
	use(t, root, func(r []byte) {
		if onBus(r) {
			t.Error("the root was on the bus")
		}
	})
	if bus.Len() < 2000 {
		t.Fatalf("only %d bytes were recorded", bus.Len())
	}

	// The control: an unseal without a session is seen.
	control := bytes.Repeat([]byte("positive control"), 2)
	h.tap.Record(&bus)
	plainUnseal(t, dialTap(t, h.tap), control)
	h.tap.Record(nil)
	if !onBus(control) {
		t.Error("the recorder misses what is on the bus")
	}
}

func use(t *testing.T, s *secret.Bytes, fn func([]byte)) {
	t.Helper()
	if err := s.Use(func(b []byte) error { fn(b); return nil }); err != nil {
		t.Fatal(err)
	}
}

// plainUnseal seals data and unseals it as the laboratory would.
func plainUnseal(t *testing.T, d transport.TPM, data []byte) {
	t.Helper()
	parent := primary(t, d, tpm2.ECCSRKTemplate)
	auth := tpm2.AuthHandle{Handle: parent.ObjectHandle, Name: parent.Name, Auth: tpm2.PasswordAuth(nil)}
	made, err := tpm2.Create{
		ParentHandle: auth,
		InSensitive: tpm2.TPM2BSensitiveCreate{Sensitive: &tpm2.TPMSSensitiveCreate{
			Data: tpm2.NewTPMUSensitiveCreate(&tpm2.TPM2BSensitiveData{Buffer: data})}},
		InPublic: tpm2.New2B(tpm2.TPMTPublic{Type: tpm2.TPMAlgKeyedHash, NameAlg: tpm2.TPMAlgSHA256,
			ObjectAttributes: tpm2.TPMAObject{FixedTPM: true, FixedParent: true, UserWithAuth: true, NoDA: true}}),
	}.Execute(d)
	if err != nil {
		t.Fatal(err)
	}
	loaded, err := tpm2.Load{ParentHandle: auth, InPrivate: made.OutPrivate, InPublic: made.OutPublic}.Execute(d)
	if err != nil {
		t.Fatal(err)
	}
	_, err = tpm2.Unseal{ItemHandle: tpm2.AuthHandle{Handle: loaded.ObjectHandle, Name: loaded.Name, Auth: tpm2.PasswordAuth(nil)}}.Execute(d)
	if err != nil {
		t.Fatal(err)
	}
	for _, x := range []tpm2.TPMHandle{loaded.ObjectHandle, parent.ObjectHandle} {
		if _, err := (tpm2.FlushContext{FlushHandle: x}).Execute(d); err != nil {
			t.Fatal(err)
		}
	}
}

// client is a connection to the tap, as another process has it.
type client struct{ io.ReadWriter }

func dialTap(t *testing.T, tap *testenv.Tap) transport.TPM {
	t.Helper()
	c, err := netDial(tap.Address())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return client{c}
}

func (c client) Send(cmd []byte) ([]byte, error) {
	if _, err := c.Write(cmd); err != nil {
		return nil, err
	}
	b := make([]byte, 4096)
	n, err := c.Read(b)
	return b[:n], err
}

func TestAlteredAnswersAreRefused(t *testing.T) {
	h := newHost(t)
	key, blob := seal(t, h.TPM, "k")
	root := setRoot(t, h.TPM)
	for _, cc := range []tpm2.TPMCC{tpm2.TPMCCUnseal, tpm2.TPMCCNVRead, tpm2.TPMCCPCRRead, tpm2.TPMCCCreate, tpm2.TPMCCSign} {
		t.Run(fmt.Sprintf("%#x", uint32(cc)), func(t *testing.T) {
			hits := 0
			h.tap.Intercept(func(cmd []byte, next testenv.Exchange) ([]byte, error) {
				answer, err := next(cmd)
				if code(cmd) == cc && err == nil {
					hits++
					answer[40] ^= 1 // inside what is encrypted, a digest or a signature
				}
				return answer, err
			})
			_, err := attempt(t, h, cc, blob)
			h.tap.Intercept(nil)
			if hits == 0 || err == nil {
				t.Fatalf("altered %d times: %v", hits, err)
			}
		})
	}
	wantOpens(t, h.TPM, "k", blob, key)
	wantRoot(t, h.TPM, root)
	wantNoHandles(t, h.tap)
}

// attempt does what uses the command.
func attempt(t *testing.T, h *host, cc tpm2.TPMCC, blob []byte) (any, error) {
	switch cc {
	case tpm2.TPMCCUnseal:
		return h.Open(t.Context(), "k", blob)
	case tpm2.TPMCCNVRead:
		return h.Root(t.Context())
	case tpm2.TPMCCSign:
		return h.Identity(t.Context(), h.made.Identity)
	}
	_, b, err := h.Seal(t.Context(), "k")
	return b, err
}

// An interposer that answers with the genuine TPM's public key, and runs another
// TPM behind: the salt that it cannot decrypt gives it away.
func TestFakeTPMWithGenuinePublicKey(t *testing.T) {
	h := newHost(t)
	_, blob := seal(t, h.TPM, "k")
	setRoot(t, h.TPM)
	fakeDevice := startTPM(t)
	fakeTap := startTap(t, fakeDevice)
	provision(t, tpm.Config{Device: fakeTap.Address(), PCRs: []int{7}})
	fakeTap.Intercept(func(cmd []byte, next testenv.Exchange) ([]byte, error) {
		switch code(cmd) {
		case tpm2.TPMCCReadPublic, tpm2.TPMCCNVReadPublic:
			return h.tap.Send(cmd)
		}
		return next(cmd)
	})
	cfg := h.cfg
	cfg.Device = fakeTap.Address()
	d, err := tpm.Open(t.Context(), cfg)
	if err != nil {
		t.Fatalf("the fake should get this far: %v", err)
	}
	if _, _, err := d.Seal(t.Context(), "k"); err == nil {
		t.Error("sealed with a fake TPM")
	}
	if _, err := d.Open(t.Context(), "k", blob); err == nil {
		t.Error("opened with a fake TPM")
	}
	if _, err := d.Root(t.Context()); err == nil {
		t.Error("read a root from a fake TPM")
	}
	if err := d.SetRoot(t.Context(), secret.Random(32)); err == nil {
		t.Error("wrote a root to a fake TPM")
	}
}

func TestConcurrentUse(t *testing.T) {
	h := newHost(t)
	key, blob := seal(t, h.TPM, "k")
	setRoot(t, h.TPM)
	signer, err := h.Identity(t.Context(), h.made.Identity)
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for g := range 16 {
		wg.Go(func() {
			for i := range 12 {
				if err := oneOf(t.Context(), h, (g+i)%5, signer, key, blob); err != nil {
					t.Errorf("goroutine %d: %v", g, err)
				}
			}
		})
	}
	wg.Wait()
	wantNoHandles(t, h.tap) // after some 200 operations
}

func oneOf(ctx context.Context, h *host, n int, signer crypto.Signer, key *secret.Bytes, blob []byte) error {
	switch n {
	case 0:
		return sign(signer)
	case 1:
		k, _, err := h.Seal(ctx, "another")
		k.Wipe()
		return err
	case 2:
		k, err := h.Open(ctx, "k", blob)
		if err == nil && !k.Equal(key) {
			err = errors.New("another key")
		}
		return err
	case 3:
		return h.SetRoot(ctx, secret.Random(tpm.KeySize))
	}
	_, err := h.Root(ctx)
	return err
}

func TestHangingTPM(t *testing.T) {
	h := newHost(t)
	key, blob := seal(t, h.TPM, "k")
	root := setRoot(t, h.TPM)
	resume := make(chan struct{})
	hang := func(cmd []byte, next testenv.Exchange) ([]byte, error) {
		select {
		case <-resume:
			return next(cmd)
		case <-h.tap.Done(): // the test has failed
			return nil, net.ErrClosed
		}
	}

	h.tap.Intercept(hang)
	h.SetTimeout(100 * time.Millisecond)
	_, err := h.Open(t.Context(), "k", blob)
	wantClass(t, err, tpm.ClassReset)
	if err = h.SetRoot(t.Context(), secret.Random(32)); err == nil {
		t.Error("a hanging TPM took a root")
	}

	h.SetTimeout(time.Minute) // the caller's deadline ends it
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if _, err = h.Root(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("past its deadline: %v", err)
	}

	close(resume)
	h.tap.Intercept(nil)
	wantOpens(t, h.TPM, "k", blob, key)
	wantRoot(t, h.TPM, root)
}

func TestWaitingForTheTurnHonoursContext(t *testing.T) {
	h := newHost(t)
	_, blob := seal(t, h.TPM, "k")
	resume, reached := make(chan struct{}), make(chan struct{}, 99)
	h.tap.Intercept(func(cmd []byte, next testenv.Exchange) ([]byte, error) {
		reached <- struct{}{}
		<-resume
		return next(cmd)
	})
	done := make(chan error, 1)
	go func() {
		_, err := h.Open(t.Context(), "k", blob)
		done <- err
	}()
	<-reached
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if _, err := h.Root(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("in the queue: %v", err)
	}
	close(resume)
	if err := <-done; err != nil {
		t.Error(err)
	}
}

func TestBusyTPMIsAskedAgain(t *testing.T) {
	h := newHost(t)
	refusals := 0
	h.tap.Intercept(func(cmd []byte, next testenv.Exchange) ([]byte, error) {
		codes := []tpm2.TPMRC{tpm2.TPMRCRetry, tpm2.TPMRCYielded, tpm2.TPMRCTesting, tpm2.TPMRCNVRate}
		if refusals < 3*len(codes) {
			refusals++
			rc := codes[refusals%len(codes)]
			return []byte{0x80, 0x01, 0, 0, 0, 10, 0, 0, byte(rc >> 8), byte(rc)}, nil
		}
		return next(cmd)
	})
	wantRoot(t, h.TPM, setRoot(t, h.TPM))
	if refusals == 0 {
		t.Error("nothing was refused")
	}
}

// A TPM that never starts is asked for as long as a command may take. What it says last
// counts, however late that comes.
func TestTPMThatNeverStarts(t *testing.T) {
	retry := []byte{0x80, 0x01, 0, 0, 0, 10, 0, 0, 0x09, 0x22}
	for takes := range 200 {
		synctest.Test(t, func(t *testing.T) {
			here, there := net.Pipe()
			var serving sync.WaitGroup
			defer serving.Wait()
			defer here.Close()
			serving.Go(func() {
				for {
					if _, err := readCommand(there); err != nil {
						return
					}
					time.Sleep(time.Duration(takes) * time.Millisecond)
					if _, err := there.Write(retry); err != nil {
						return
					}
				}
			})
			started := time.Now() // the bubble's clock
			answer, err := tpm.SendOver(t.Context(), here, time.Second, retry)
			if err != nil {
				t.Fatalf("a TPM that takes %d ms to say no: %v", takes, err)
			}
			if c := (&tpm.CommandError{RC: tpm2.TPMRC(code(answer))}).Class(); c != tpm.ClassTransient {
				t.Errorf("class %d", c)
			}
			if took := time.Since(started); took < 800*time.Millisecond || took > 1300*time.Millisecond {
				t.Errorf("asked for %v", took)
			}
		})
	}
}

func TestSlowTPM(t *testing.T) {
	h := newHost(t)
	h.tap.Delay(50 * time.Millisecond)
	key, blob := seal(t, h.TPM, "k")
	wantOpens(t, h.TPM, "k", blob, key)
	wantRoot(t, h.TPM, setRoot(t, h.TPM))
}

// What a killed agent left in a TPM without a resource manager does not stop the
// next one.
func TestLeftHandlesAreFreed(t *testing.T) {
	h := newHost(t)
	for range 3 {
		primary(t, h.tap, tpm2.ECCSRKTemplate)
		if _, _, err := tpm2.PolicySession(h.tap, tpm2.TPMAlgSHA256, 16); err != nil {
			t.Fatal(err)
		}
	}
	key, blob := seal(t, open(t, h.cfg), "k")
	wantOpens(t, h.TPM, "k", blob, key)
	wantNoHandles(t, h.tap)
}

// A pseudo-terminal in front of swtpm stands for the kernel's device.
func TestDevice(t *testing.T) {
	h := newHost(t)
	master, path := openPTY(t)
	go func() { // ends when the test closes the master
		for {
			cmd, err := readCommand(master)
			if err != nil {
				return
			}
			answer, err := h.tap.Send(cmd)
			if err != nil {
				return
			}
			if _, err := master.Write(answer); err != nil {
				return
			}
		}
	}()
	cfg := h.cfg
	cfg.Device = "device:" + path
	left := primary(t, h.tap, tpm2.ECCSRKTemplate) // somebody else's
	d := open(t, cfg)
	key, blob := seal(t, d, "k")
	wantOpens(t, d, "k", blob, key)
	wantRoot(t, d, setRoot(t, d))
	if got := handles(t, h.tap, tpm2.TPMHTTransient); len(got) != 1 || got[0] != left.ObjectHandle {
		t.Errorf("handles behind a resource manager: %#x, want %#x", got, left.ObjectHandle)
	}
	if err := d.Close(t.Context()); err != nil {
		t.Error(err)
	}
	cfg.Device = "device:/dev/conseal-none"
	_, err := tpm.Open(t.Context(), cfg)
	wantClass(t, err, tpm.ClassAbsent)
}

func openPTY(t *testing.T) (master *os.File, path string) {
	t.Helper()
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { master.Close() })
	n, err := unix.IoctlGetInt(int(master.Fd()), unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.IoctlSetPointerInt(int(master.Fd()), unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	mode, err := unix.IoctlGetTermios(int(master.Fd()), unix.TCGETS)
	if err != nil {
		t.Fatal(err)
	}
	mode.Iflag, mode.Oflag, mode.Lflag = 0, 0, 0 // raw
	if err := unix.IoctlSetTermios(int(master.Fd()), unix.TCSETS, mode); err != nil {
		t.Fatal(err)
	}
	return master, fmt.Sprintf("/dev/pts/%d", n)
}

// Whoever sends commands of its own to the TPM of a host in the permitted state, on the
// bus or as root, reads the root, unless the host has a PIN.
func TestOwnCommandsOnTheBus(t *testing.T) {
	without := newHost(t, 4)
	with, _ := newPINHost(t, nil)
	root := setRoot(t, without.TPM)
	setRoot(t, with.TPM)
	got, err := stealRoot(t, without, policy.State{4: make([]byte, 32)}, false)
	if err != nil {
		t.Fatalf("the documentation says that it can be read: %v", err)
	}
	use(t, root, func(b []byte) {
		if !bytes.Equal(b, got) {
			t.Error("another root was read")
		}
	})
	for _, authValue := range []bool{false, true} {
		if _, err := stealRoot(t, with, policy.State{4: make([]byte, 32)}, authValue); err == nil {
			t.Error("the root of a host with a PIN was read without it")
		}
	}
}

func stealRoot(t *testing.T, h *host, state policy.State, authValue bool) ([]byte, error) {
	t.Helper()
	public, err := tpm2.NVReadPublic{NVIndex: tpm2.TPMHandle(tpm.DefaultNVRoot)}.Execute(h.tap)
	if err != nil {
		t.Fatal(err)
	}
	s, done, err := tpm2.PolicySession(h.tap, tpm2.TPMAlgSHA256, 16)
	if err != nil {
		t.Fatal(err)
	}
	defer done()
	if _, err := state.Command(s.Handle()).Execute(h.tap); err != nil {
		t.Fatal(err)
	}
	if authValue {
		if _, err := (tpm2.PolicyAuthValue{PolicySession: s.Handle()}).Execute(h.tap); err != nil {
			t.Fatal(err)
		}
	}
	index := tpm2.NamedHandle{Handle: tpm2.TPMHandle(tpm.DefaultNVRoot), Name: public.NVName}
	rsp, err := tpm2.NVRead{AuthHandle: tpm2.AuthHandle{Handle: index.Handle, Name: index.Name, Auth: s}, NVIndex: index, Size: tpm.KeySize}.Execute(h.tap)
	if err != nil {
		return nil, err
	}
	return rsp.Data.Buffer, nil
}
