package pin_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"conseal/internal/pin"
	"conseal/internal/secret"
)

func writeFile(t *testing.T, name, content string, mode os.FileMode) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(path, mode); err != nil {
		t.Fatal(err)
	}
	return path
}

func readPIN(source string) (*secret.Bytes, error) {
	s, err := pin.ParseSource(source)
	if err != nil {
		return nil, err
	}
	return s.Read()
}

func wantPIN(t *testing.T, source, want string) {
	t.Helper()
	got, err := readPIN(source)
	if err != nil {
		t.Errorf("%s: %v", source, err)
		return
	}
	defer got.Wipe()
	if !got.Equal(secret.Copy([]byte(want))) {
		t.Errorf("%s: got another PIN than %q", source, want)
	}
}

func wantNoPIN(t *testing.T, source, reason string) {
	t.Helper()
	got, err := readPIN(source)
	got.Wipe()
	if err == nil || !strings.Contains(err.Error(), reason) {
		t.Errorf("%s: got %v, want an error with %q", source, err, reason)
	}
}

func TestPINFile(t *testing.T) {
	wantPIN(t, writeFile(t, "pin", "1234\n", 0o600), "1234")
	wantPIN(t, "file:"+writeFile(t, "pin", "12 34\r\n", 0o400), "12 34")
	wantPIN(t, writeFile(t, "pin", strings.Repeat("p", 256), 0o600), strings.Repeat("p", 256))
	wantNoPIN(t, writeFile(t, "pin", strings.Repeat("p", 257), 0o600), "at most")
	wantNoPIN(t, writeFile(t, "pin", strings.Repeat("p", 4000), 0o600), "at most")
	wantNoPIN(t, writeFile(t, "pin", "1234\n\n", 0o600), "one line")
	wantNoPIN(t, writeFile(t, "pin", "12\x0034", 0o600), "one line")
	wantNoPIN(t, writeFile(t, "pin", "\n", 0o600), "empty")
	wantNoPIN(t, writeFile(t, "pin", "", 0o600), "empty")
	for _, mode := range []os.FileMode{0o640, 0o604, 0o620, 0o601} {
		wantNoPIN(t, writeFile(t, "pin", "1234", mode), "chmod")
	}
	wantNoPIN(t, filepath.Join(t.TempDir(), "none"), "no such file")
	wantNoPIN(t, "/", "not a regular file")
}

func TestPINFileIsNoLinkOrFIFO(t *testing.T) {
	path := writeFile(t, "pin", "1234", 0o600)
	if err := os.Symlink(path, path+".link"); err != nil {
		t.Fatal(err)
	}
	wantNoPIN(t, path+".link", "symbolic link")
	if err := syscall.Mkfifo(path+".fifo", 0o600); err != nil {
		t.Fatal(err)
	}
	wantNoPIN(t, path+".fifo", "not a regular file")
}

func TestPINDescriptor(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if _, err := w.WriteString("1234\n"); err != nil {
		t.Fatal(err)
	}
	w.Close()
	source := fmt.Sprintf("fd:%d", r.Fd())
	wantPIN(t, source, "1234")
	wantNoPIN(t, source, "read only once")
	f, err := os.Open(writeFile(t, "pin", "5678", 0o600))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	wantPIN(t, fmt.Sprintf("fd:%d", f.Fd()), "5678")
	wantPIN(t, fmt.Sprintf("fd:%d", f.Fd()), "5678")
	wantNoPIN(t, "fd:60000", "60000<FILE")
}

func TestAKeptPipeIsReadAgain(t *testing.T) {
	for _, content := range []string{"1234\n", strings.Repeat("p", 256), "", strings.Repeat("p", 5000)} {
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		go func() {
			_, _ = io.WriteString(w, content) // a PIN too long is not read to its end
			w.Close()
		}()
		text := fmt.Sprintf("fd:%d", r.Fd())
		source, err := pin.ParseSource(text)
		if err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(source.Keep(), source.Keep()); err != nil {
			t.Fatal(err)
		}
		for range 2 {
			switch {
			case content == "":
				wantNoPIN(t, text, "empty")
			case len(content) > 256:
				wantNoPIN(t, text, "at most")
			default:
				wantPIN(t, text, strings.TrimSpace(content))
			}
		}
		r.Close()
	}
	for _, text := range []string{"/none", "cred:none"} {
		if s, err := pin.ParseSource(text); err != nil || s.Keep() != nil {
			t.Errorf("%s: there is nothing to keep", text)
		}
	}
	if s, err := pin.ParseSource("fd:60000"); err != nil || s.Keep() == nil {
		t.Error("kept a descriptor that is not open")
	}
}

func TestPINCredential(t *testing.T) {
	path := writeFile(t, "pin", "1234", 0o440)
	t.Setenv("CREDENTIALS_DIRECTORY", "")
	wantNoPIN(t, "cred:pin", "CREDENTIALS_DIRECTORY")
	t.Setenv("CREDENTIALS_DIRECTORY", filepath.Dir(path))
	wantPIN(t, "cred:pin", "1234")
	if err := os.Chmod(path, 0o444); err != nil {
		t.Fatal(err)
	}
	wantNoPIN(t, "cred:pin", "chmod")
}

func TestPINSourceForm(t *testing.T) {
	for _, source := range []string{"", "1234", "pin", "file:", "file:pin", "file://h/pin", "fd:", "fd:0", "fd:2", "fd:03", "fd:-1", "fd:99999",
		"cred:", "cred:.", "cred:..", "cred:../pin", "cred:a/b", "env:PIN", "|cat /pin"} {
		wantNoPIN(t, source, "PIN source must be")
	}
}

// latchIn is a latch as a device has it.
func latchIn(dir string) pin.Latch { return pin.Latch{Dir: dir, Name: "test-pin.latch"} }

// sendPIN does with the latch what a login does, and calls send if the PIN may be sent.
func sendPIN(dir, value string, send func() bool) error {
	l := latchIn(dir)
	if err := l.Arm(secret.Copy([]byte(value))); err != nil {
		return err
	}
	if send() {
		return l.Accepted()
	}
	return nil
}

func TestLatchSendsAPINOnce(t *testing.T) {
	dir := t.TempDir()
	sent := 0
	refuse := func() bool { sent++; return false }
	for range 3 {
		for _, value := range []string{"1111", "2222"} {
			err := sendPIN(dir, value, refuse)
			if err != nil && !errors.Is(err, pin.ErrRefused) {
				t.Fatal(err)
			}
		}
	}
	if sent != 2 {
		t.Errorf("two wrong PINs were sent %d times", sent)
	}
	if err := sendPIN(dir, "3333", func() bool { return true }); err != nil {
		t.Errorf("the right PIN: %v", err)
	}
	if _, err := os.Stat(filepath.Join(dir, "test-pin.latch")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the latch is there after success: %v", err)
	}
}

func TestLatchIsOnDiskBeforeThePINIsSent(t *testing.T) {
	const value = "no hex" // the file is full of that
	dir := t.TempDir()
	err := sendPIN(dir, value, func() bool {
		b, err := os.ReadFile(filepath.Join(dir, "test-pin.latch"))
		if err != nil || bytes.Contains(b, []byte(value)) {
			t.Errorf("latch while the PIN is sent: %q, %v", b, err)
		}
		err = sendPIN(dir, value, func() bool { t.Error("sent again by another process"); return false })
		if !errors.Is(err, pin.ErrRefused) {
			t.Errorf("another process: %v", err)
		}
		return true
	})
	if err != nil {
		t.Fatal(err)
	}
}

func TestLatchThatCannotBeReadOrWritten(t *testing.T) {
	never := func() bool { t.Error("sent"); return true }
	for _, content := range []string{"", "x", "conseal pin latch v1\n", "conseal pin latch v2\nsalt " + strings.Repeat("0", 32) + "\npin " + strings.Repeat("0", 64) + "\n"} {
		dir := t.TempDir()
		if err := os.WriteFile(filepath.Join(dir, "test-pin.latch"), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := sendPIN(dir, "1", never); err == nil {
			t.Errorf("latch %q: sent", content)
		}
		if err := latchIn(dir).Clear(); err != nil {
			t.Fatal(err)
		}
		if err := sendPIN(dir, "1", func() bool { return true }); err != nil {
			t.Errorf("after Clear: %v", err)
		}
	}
	if err := sendPIN(filepath.Join(t.TempDir(), "none"), "1", never); err == nil {
		t.Error("sent without a latch")
	}
}

func TestLatchStopsGuessing(t *testing.T) {
	dir := t.TempDir()
	sent := 0
	for i := range 20 {
		_ = sendPIN(dir, fmt.Sprint(i), func() bool { sent++; return false })
	}
	if sent != 8 {
		t.Errorf("%d different PINs were sent, want 8", sent)
	}
}

func TestDisarmTakesBackOnlyTheLast(t *testing.T) {
	dir := t.TempDir()
	refuse := func() bool { return false }
	if err := sendPIN(dir, "1111", refuse); err != nil {
		t.Fatal(err)
	}
	for range 10 { // more than a latch holds
		if err := latchIn(dir).Arm(secret.Copy([]byte("2222"))); err != nil {
			t.Fatalf("a PIN that was never judged: %v", err)
		}
		if err := latchIn(dir).Disarm(); err != nil {
			t.Fatal(err)
		}
	}
	if err := sendPIN(dir, "1111", refuse); !errors.Is(err, pin.ErrRefused) {
		t.Errorf("the refused PIN: %v", err)
	}
}

func TestLatchesOfOneFolderAreApart(t *testing.T) {
	dir := t.TempDir()
	a, b := pin.Latch{Dir: dir, Name: "a"}, pin.Latch{Dir: dir, Name: "b"}
	value := secret.Copy([]byte("1234"))
	if err := errors.Join(a.Arm(value), b.Arm(value), b.Accepted()); err != nil {
		t.Fatal(err)
	}
	if err := a.Arm(value); !errors.Is(err, pin.ErrRefused) {
		t.Errorf("what a's device refused, after b's accepted it: %v", err)
	}
}
