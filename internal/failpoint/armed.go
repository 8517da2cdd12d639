//go:build failpoints

// Package failpoint names places where a test can end the process as a power cut
// would. In a build without the tag "failpoints", which is what is shipped, they
// are empty.
package failpoint

import (
	"os"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

var (
	mu   sync.Mutex
	hits = map[string]int{}
)

// Hit ends the process by SIGKILL when FAILPOINT, "NAME" or "NAME:COUNT",
// names the place for this time. It first adds the name to the file
// FAILPOINT_LOG, so that a test knows that the place was reached.
func Hit(name string) {
	wanted, count, _ := strings.Cut(os.Getenv("FAILPOINT"), ":")
	if wanted != name {
		return
	}
	n, err := strconv.Atoi(count)
	if err != nil {
		n = 1
	}
	mu.Lock()
	defer mu.Unlock()
	if hits[name]++; hits[name] != n {
		return
	}
	if f, err := os.OpenFile(os.Getenv("FAILPOINT_LOG"), os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600); err == nil {
		_, _ = f.WriteString(name + "\n")
		_ = f.Sync()
		f.Close()
	}
	_ = unix.Kill(os.Getpid(), unix.SIGKILL)
	select {} // until it arrives
}
