package agent_test

import (
	"errors"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"conseal/testenv"
)

// TestAgentOutlivesItsModule ends the PKCS#11 module's process of a host again and again
// while keys are born there, and stops it once. At the end it kills the agent, and the
// module's process must go too.
func TestAgentOutlivesItsModule(t *testing.T) {
	ctx, f := newFleet(t)
	must(t, f.Start(ctx))
	must(t, f.WaitReady(ctx, "first"))
	gamma := f.Host("gamma")
	agent := gamma.Process().Pid()
	module := func() int {
		for {
			pids, err := testenv.Helpers(agent)
			must(t, err)
			if len(pids) > 0 {
				return pids[0]
			}
			select {
			case <-ctx.Done():
				t.Fatal("the module's process was not started again")
			case <-time.After(10 * time.Millisecond):
			}
		}
	}
	for i, signal := range []unix.Signal{unix.SIGKILL, unix.SIGSEGV, unix.SIGSTOP} {
		must(t, f.Stop(ctx))
		f.Keys += f.Key("more"+string(rune('0'+i)), "ed25519", 2)
		must(t, f.WriteRoster(2+i))
		must(t, f.Start(ctx))
		agent = gamma.Process().Pid()
		must(t, unix.Kill(module(), signal)) // the birth takes a new root
		must(t, f.WaitReady(ctx, "more"+string(rune('0'+i))))
		checkKey(ctx, t, f, "more"+string(rune('0'+i)))
		_, err := gamma.Client().Refresh(ctx, "more"+string(rune('0'+i))) // takes another, if the birth was over by then
		must(t, err)
		if !gamma.Running() || gamma.Process().Pid() != agent {
			t.Errorf("%v: the agent ended with its module", signal)
		}
	}
	log, err := os.ReadFile(gamma.LogFile())
	must(t, err)
	if n := strings.Count(string(log), "PKCS#11 module's process ended"); n != 3 {
		t.Errorf("the log says %d times that the module ended", n)
	}
	pid := module()
	fd, err := unix.PidfdOpen(pid, 0)
	must(t, err)
	defer unix.Close(fd)
	gamma.Kill()
	n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 60_000)
	for errors.Is(err, unix.EINTR) { // by a signal of the Go runtime
		n, err = unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 60_000)
	}
	if n != 1 || err != nil {
		t.Errorf("the module's process outlived the agent: %v", err)
	}
}
