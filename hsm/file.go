package hsm

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

// trusted checks that a file is ours or root's and has no mode bit in forbidden.
func trusted(info fs.FileInfo, forbidden fs.FileMode) error {
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

// writeDurable replaces dir/name by data so that after a crash it is the old
// or the new one, whole. When it has returned nil the new one is on the disk.
// One writer a folder at a time.
func writeDurable(dir, name string, data []byte) error {
	tmp := filepath.Join(dir, ".hsm.tmp") // one name, so that crashes leave at most one
	f, err := os.OpenFile(tmp, os.O_WRONLY|os.O_CREATE|os.O_TRUNC|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	if err == nil {
		err = f.Sync()
	}
	if e := f.Close(); err == nil {
		err = e
	}
	if err == nil {
		err = os.Rename(tmp, filepath.Join(dir, name))
	}
	if err != nil {
		return err
	}
	return syncPath(dir)
}

// syncPath makes a file or a folder's entries durable.
func syncPath(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

// readSmall reads a file that must have at most max bytes.
func readSmall(path string, max int) ([]byte, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, int64(max)+1))
	if err == nil && len(b) > max {
		err = fmt.Errorf("%s is longer than %d bytes", path, max)
	}
	return b, err
}
