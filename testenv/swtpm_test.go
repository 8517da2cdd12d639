package testenv_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"

	"conseal/testenv"
)

func tpmDir(t *testing.T) string {
	t.Helper()
	base, err := os.MkdirTemp("/tmp", "conseal-env-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(base) })
	dir := filepath.Join(base, "h")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	return dir
}

func startTPM(t *testing.T) *testenv.TPM {
	t.Helper()
	s, err := testenv.StartTPM(t.Context(), tpmDir(t))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Kill)
	return s
}

func pcr7(t *testing.T, tap *testenv.Tap) string {
	t.Helper()
	rsp, err := tpm2.PCRRead{PCRSelectionIn: tpm2.TPMLPCRSelection{PCRSelections: []tpm2.TPMSPCRSelection{
		{Hash: tpm2.TPMAlgSHA256, PCRSelect: tpm2.PCClientCompatible.PCRs(7)}}}}.Execute(tap)
	if err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf("%x", rsp.PCRValues.Digests[0].Buffer)
}

func TestTPMLife(t *testing.T) {
	s := startTPM(t)
	if err := s.Extend(7, "alone"); err != nil {
		t.Fatal(err)
	}
	tap, err := s.Tap("tap.sock")
	if err != nil {
		t.Fatal(err)
	}
	defer tap.Close()
	zero := strings.Repeat("0", 64)
	one := pcr7(t, tap)
	if one == zero {
		t.Error("the PCR was not extended")
	}
	if err := tap.Extend(7, "between commands"); err != nil {
		t.Fatal(err)
	}
	if two := pcr7(t, tap); two == one {
		t.Error("the tap did not extend")
	}
	for _, stop := range []func(){func() {}, s.Kill, func() { _ = s.Stop(t.Context()) }} {
		stop()
		if err := s.Restart(t.Context()); err != nil {
			t.Fatal(err)
		}
		tap.Connect(s)
		if got := pcr7(t, tap); got != zero {
			t.Errorf("PCR 7 is %s after a reboot", got)
		}
	}
	cert, err := tpm2.NVReadPublic{NVIndex: tpm2.TPMHandle(0x01c00002)}.Execute(tap)
	if err != nil || len(cert.NVName.Buffer) == 0 {
		t.Errorf("no EK certificate: %v", err)
	}
}

func TestTPMPathTooLong(t *testing.T) {
	_, err := testenv.StartTPM(t.Context(), "/tmp/"+strings.Repeat("long/", 20))
	if err == nil || !strings.Contains(err.Error(), "shorter path") {
		t.Errorf("no advice: %v", err)
	}
}

func TestNeedSaysHowToInstall(t *testing.T) {
	if err := testenv.Need("sh", "dash"); err != nil {
		t.Error(err)
	}
	err := testenv.Need("no-such-tool", "its-package")
	if err == nil || !strings.Contains(err.Error(), "apt-get install its-package") {
		t.Errorf("no advice: %v", err)
	}
}

func TestGivenUpManufactureLeavesNothing(t *testing.T) {
	dir := tpmDir(t)
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		awaitProcesses(t, dir, func(n int) bool { return n > 1 })
		cancel()
	}()
	if _, err := testenv.StartTPM(ctx, dir); !errors.Is(err, context.Canceled) {
		t.Fatalf("not given up: %v", err)
	}
	awaitProcesses(t, dir, func(n int) bool { return n == 0 })
	s, err := testenv.StartTPM(t.Context(), dir) // and it can be made then
	if err != nil {
		t.Fatal(err)
	}
	s.Kill()
}

// childDir tells a copy of this test binary to be the child of the next test.
const childDir = "CONSEAL_TESTENV_CHILD_DIR"

func TestNothingOutlivesUs(t *testing.T) {
	if dir := os.Getenv(childDir); dir != "" {
		s, err := testenv.StartTPM(t.Context(), dir)
		if err != nil {
			t.Fatal(err)
		}
		fmt.Println("started", s.Address())
		<-t.Context().Done() // killed before
	}
	for name, running := range map[string]bool{"while making": false, "while running": true} {
		t.Run(name, func(t *testing.T) {
			dir := tpmDir(t)
			cmd := exec.Command(os.Args[0], "-test.run=^TestNothingOutlivesUs$")
			cmd.Env = append(os.Environ(), childDir+"="+dir)
			child, err := testenv.StartProcess(cmd)
			if err != nil {
				t.Fatal(err)
			}
			defer child.Kill()
			awaitProcesses(t, dir, func(n int) bool {
				_, err := os.Stat(filepath.Join(dir, "tpm.sock"))
				return n > 0 && err == nil || !running && n >= 3 // timeout, swtpm_setup, swtpm
			})
			child.Kill()
			awaitProcesses(t, dir, func(n int) bool { return n == 0 })
		})
	}
}

// awaitProcesses waits until the number of processes with dir in their command
// line is as wanted.
func awaitProcesses(t *testing.T, dir string, wanted func(n int) bool) {
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	limit := time.After(2 * time.Minute) // making a TPM's keys takes as long as it takes to find primes
	for {
		n := 0
		lines, _ := filepath.Glob("/proc/[0-9]*/cmdline")
		for _, l := range lines {
			if b, err := os.ReadFile(l); err == nil && strings.Contains(string(b), dir) {
				n++
			}
		}
		if wanted(n) {
			return
		}
		select {
		case <-tick.C:
		case <-limit:
			t.Errorf("%d processes still have to do with %s", n, dir)
			return
		}
	}
}

func TestStopAndKill(t *testing.T) {
	sleep, err := testenv.StartProcess(exec.Command("sleep", "1000"))
	if err != nil {
		t.Fatal(err)
	}
	if err := sleep.Stop(t.Context()); err != nil {
		t.Errorf("stopping: %v", err)
	}
	stubborn, err := testenv.StartProcess(exec.Command("sh", "-c", "trap '' TERM; echo ready; while :; do sleep 0.01; done"))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	_ = stubborn.Stop(ctx) // it may not have set its trap yet
	<-stubborn.Done()
	failing, err := testenv.StartProcess(exec.Command("sh", "-c", "echo what went wrong >&2; exit 3"))
	if err != nil {
		t.Fatal(err)
	}
	if err := failing.Wait(); err == nil || !strings.Contains(err.Error(), "what went wrong") {
		t.Errorf("the error does not say what it said: %v", err)
	}
	if _, err := testenv.StartProcess(exec.Command("/no/such/program")); err == nil {
		t.Error("started nothing")
	}
}

// TestGrandchildThatStays holds the child's standard error open after the child's good end.
func TestGrandchildThatStays(t *testing.T) {
	p, err := testenv.StartProcess(exec.Command("sh", "-c", "sleep 3 >/dev/null & exit 0"))
	if err != nil {
		t.Fatal(err)
	}
	if err := p.Wait(); err != nil {
		t.Error(err)
	}
}
