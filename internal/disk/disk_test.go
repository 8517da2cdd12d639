package disk_test

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"conseal/internal/disk"
)

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// wantOnly checks that dir has the file name, with content, and nothing else.
func wantOnly(t *testing.T, dir, name, content string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	must(t, err)
	if len(entries) != 1 || entries[0].Name() != name {
		t.Errorf("the folder holds %v, want %s alone", entries, name)
	}
	got, err := disk.ReadSmall(filepath.Join(dir, name), 1<<20)
	if err != nil || string(got) != content {
		t.Errorf("%s: got %q, %v", name, got, err)
	}
}

func TestWriteFileReplaces(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "f")
	must(t, os.WriteFile(filepath.Join(dir, ".new"), []byte("a longer text that a crash left"), 0o600))
	for _, content := range []string{"first", "second", ""} {
		must(t, disk.WriteFile(path, []byte(content)))
		wantOnly(t, dir, "f", content)
	}
	info, err := os.Stat(path)
	must(t, err)
	if info.Mode().Perm() != 0o600 {
		t.Errorf("mode %04o", info.Mode().Perm())
	}
}

func TestWriteFileThatFailsLeavesTheOldOne(t *testing.T) {
	dir := t.TempDir()
	must(t, os.Mkdir(filepath.Join(dir, "f"), 0o700))
	must(t, os.WriteFile(filepath.Join(dir, "f", "old"), nil, 0o600))
	if disk.WriteFile(filepath.Join(dir, "f"), []byte("new")) == nil {
		t.Error("a file took a full folder's place")
	}
	entries, err := os.ReadDir(dir)
	must(t, err)
	if len(entries) != 1 {
		t.Errorf("the folder holds %v", entries)
	}
	if disk.WriteFile(filepath.Join(dir, "none", "f"), nil) == nil {
		t.Error("wrote into a folder that is not there")
	}
}

func TestWriteFileFollowsNoLink(t *testing.T) {
	dir, outside := t.TempDir(), filepath.Join(t.TempDir(), "outside")
	must(t, os.WriteFile(outside, []byte("old"), 0o600))
	must(t, os.Symlink(outside, filepath.Join(dir, ".new")))
	if disk.WriteFile(filepath.Join(dir, "f"), []byte("new")) == nil {
		t.Error("wrote through a symbolic link")
	}
	wantOnly(t, filepath.Dir(outside), "outside", "old")
}

// TestWritersOfOneFolder: none of them meets another's temporary file.
func TestWritersOfOneFolder(t *testing.T) {
	dir := t.TempDir()
	var wg sync.WaitGroup
	for n := range 8 {
		wg.Go(func() {
			path, data := filepath.Join(dir, fmt.Sprint(n)), bytes.Repeat([]byte{byte(n)}, 10_000*(n+1))
			for range 20 {
				err := disk.WriteFile(path, data)
				got, readErr := disk.ReadSmall(path, len(data))
				if err != nil || readErr != nil || !bytes.Equal(got, data) {
					t.Errorf("writer %d: %v, %v, got %d bytes", n, err, readErr, len(got))
					return
				}
			}
		})
	}
	wg.Wait()
}

func TestReadSmall(t *testing.T) {
	path := filepath.Join(t.TempDir(), "f")
	must(t, os.WriteFile(path, []byte("1234"), 0o600))
	if b, err := disk.ReadSmall(path, 4); err != nil || string(b) != "1234" {
		t.Errorf("got %q, %v", b, err)
	}
	if _, err := disk.ReadSmall(path, 3); err == nil || !strings.Contains(err.Error(), "longer than 3") {
		t.Errorf("a longer file: %v", err)
	}
	must(t, os.Symlink(path, path+".link"))
	if _, err := disk.ReadSmall(path+".link", 4); err == nil {
		t.Error("followed a symbolic link")
	}
	must(t, unix.Mkfifo(path+".fifo", 0o600))
	writer, err := os.OpenFile(path+".fifo", os.O_RDWR, 0) // with one, a read waits for what it writes
	must(t, err)
	defer writer.Close()
	if _, err := disk.ReadSmall(path+".fifo", 4); err == nil || !strings.Contains(err.Error(), "no regular file") {
		t.Errorf("a FIFO: %v", err)
	}
}

func TestTrusted(t *testing.T) {
	path := filepath.Join(t.TempDir(), "f")
	must(t, os.WriteFile(path, nil, 0o600))
	must(t, os.Chmod(path, 0o640))
	info, err := os.Stat(path)
	must(t, err)
	if err := disk.Trusted(info, 0o022); err != nil {
		t.Errorf("0640 is trusted not to be written: %v", err)
	}
	if err := disk.Trusted(info, 0o077); err == nil || !strings.Contains(err.Error(), "chmod 0600") {
		t.Errorf("0640 where nobody may read: %v", err)
	}
	if err := errors.Join(disk.TrustedOwner(0, 1000), disk.TrustedOwner(1000, 1000), disk.TrustedOwner(0, 0)); err != nil {
		t.Error(err)
	}
	if disk.TrustedOwner(1001, 1000) == nil || disk.TrustedOwner(1000, 0) == nil {
		t.Error("a file of another user is trusted")
	}
}
