// Package disk replaces files so that a crash leaves the old one or the new one,
// and says whether a file could have been changed by another user.
//
// [WriteFile] replaces a file, [ReadSmall] reads one back, and [Trusted] judges a
// file or folder before what is in it is believed.
package disk

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"

	"golang.org/x/sys/unix"
)

// Trusted checks that a file is ours or root's and has no mode bit in forbidden.
func Trusted(info fs.FileInfo, forbidden fs.FileMode) error {
	if bad := info.Mode().Perm() & forbidden; bad != 0 {
		return fmt.Errorf("its mode is %04o: chmod %04o", info.Mode().Perm(), info.Mode().Perm()&^forbidden)
	}
	st, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		return errors.New("its owner is not known")
	}
	return trustedOwner(st.Uid, uint32(os.Geteuid()))
}

func trustedOwner(owner, us uint32) error {
	if owner != 0 && owner != us {
		return fmt.Errorf("it belongs to user %d: chown it to %d or root", owner, us)
	}
	return nil
}

// WriteFile replaces a file (mode 0600) by data so that after a crash it is the
// old or the new one, whole. When it has returned nil the new one is on the disk.
// Writers in one folder wait for each other.
func WriteFile(path string, data []byte) error {
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	defer dir.Close() // and so unlocks
	if err := unix.Flock(int(dir.Fd()), unix.LOCK_EX); err != nil {
		return fmt.Errorf("locking %s: %w", dir.Name(), err)
	}
	tmp := filepath.Join(dir.Name(), ".new") // one name a folder, so that crashes leave at most one
	err = write(tmp, data)
	if err == nil {
		err = os.Rename(tmp, path)
	}
	if err != nil {
		_ = os.Remove(tmp)
		return err
	}
	return dir.Sync()
}

func write(path string, data []byte) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_TRUNC|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	if err == nil {
		err = f.Sync()
	}
	return errors.Join(err, f.Close())
}

// Sync makes a file or a folder's entries durable.
func Sync(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

// ReadSmall reads a regular file that must have at most max bytes. It follows no
// symbolic link and does not wait on a FIFO.
func ReadSmall(path string, max int) ([]byte, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if info, err := f.Stat(); err != nil || !info.Mode().IsRegular() {
		return nil, errors.Join(err, fmt.Errorf("%s is no regular file", path))
	}
	b, err := io.ReadAll(io.LimitReader(f, int64(max)+1))
	if err == nil && len(b) > max {
		err = fmt.Errorf("%s is longer than %d bytes", path, max)
	}
	return b, err
}
