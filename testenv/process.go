package testenv

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Process is a child that dies with this process, even if this process is
// killed. Its methods may be called by several goroutines.
type Process struct {
	cmd    *exec.Cmd
	stderr *tail         // what it last said, unless the caller took cmd.Stderr
	done   chan struct{} // closed once the child is reaped
	err    error         // what cmd.Wait said; read only after done
}

// StartProcess starts cmd. It sets WaitDelay and, where they are unset, Pdeathsig
// (SIGKILL) and Stderr; the caller must not call methods of cmd afterwards.
//
// The kernel sends the parent-death signal when the *thread* that forked ends,
// so a thread of its own starts the child and waits for it: it lives exactly as
// long as the child does.
func StartProcess(cmd *exec.Cmd) (*Process, error) {
	p := &Process{cmd: cmd, stderr: &tail{}, done: make(chan struct{})}
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	if cmd.SysProcAttr.Pdeathsig == 0 {
		cmd.SysProcAttr.Pdeathsig = syscall.SIGKILL
	}
	if cmd.Stderr == nil {
		cmd.Stderr = p.stderr
	}
	cmd.WaitDelay = time.Second // a grandchild may hold our pipes open
	started := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := cmd.Start()
		started <- err
		if err == nil {
			if p.err = cmd.Wait(); errors.Is(p.err, exec.ErrWaitDelay) { // the child itself ended well
				p.err = nil
			}
			close(p.done)
		}
	}()
	if err := <-started; err != nil {
		return nil, fmt.Errorf("starting %s: %w", p.name(), err)
	}
	return p, nil
}

// Pid is the child's process id.
func (p *Process) Pid() int { return p.cmd.Process.Pid }

// Done is closed when the child has ended and was reaped.
func (p *Process) Done() <-chan struct{} { return p.done }

// Stderr is the end of what the child wrote there, at most 4 KiB; it is empty
// if the caller had set cmd.Stderr.
func (p *Process) Stderr() string { return p.stderr.String() }

// Wait waits for the child's end. The error says how it failed, with the end of
// its standard error.
func (p *Process) Wait() error {
	<-p.done
	if p.err == nil {
		return nil
	}
	return fmt.Errorf("%s: %w: %s", p.name(), p.err, p.Stderr())
}

// Kill ends the child at once (SIGKILL), as a power cut would, and waits for it.
func (p *Process) Kill() {
	_ = p.cmd.Process.Kill() // it may have ended already
	<-p.done
}

// Stop asks the child to end (SIGTERM) and waits for it; when ctx ends first, it
// is killed and that is the error. A child that ended by our signal, or had ended
// well before, is no error.
func (p *Process) Stop(ctx context.Context) error {
	_ = p.cmd.Process.Signal(syscall.SIGTERM) // it may have ended already
	select {
	case <-p.done:
	case <-ctx.Done():
		p.Kill()
		return fmt.Errorf("stopping %s: killed: %w", p.name(), ctx.Err())
	}
	var exit *exec.ExitError
	if errors.As(p.err, &exit) {
		if status, ok := exit.Sys().(syscall.WaitStatus); ok && status.Signal() == syscall.SIGTERM {
			return nil
		}
	}
	return p.Wait()
}

// Freeze stops a process (SIGSTOP) and waits until none of its threads runs: a signal
// takes its time. It returns false if the process ended before.
func Freeze(pid int) (stopped bool, err error) {
	if err := unix.Kill(pid, unix.SIGSTOP); err != nil && !errors.Is(err, unix.ESRCH) {
		return false, fmt.Errorf("stopping process %d: %w", pid, err)
	}
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for ; ; <-tick.C {
		threads, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stat", pid))
		if err != nil || len(threads) == 0 {
			return false, err
		}
		states := map[byte]int{}
		for _, thread := range threads {
			b, _ := os.ReadFile(thread) // nothing if that thread has ended: look again
			if _, state, ok := bytes.Cut(b[bytes.LastIndexByte(b, ')')+1:], []byte(" ")); ok {
				states[state[0]]++
			}
		}
		switch len(threads) {
		case states['T']:
			return true, nil
		case states['Z'] + states['X']: // and not reaped
			return false, nil
		}
	}
}

func (p *Process) name() string { return filepath.Base(p.cmd.Path) }

// tail is a writer that keeps the last 4 KiB.
type tail struct {
	mu  sync.Mutex
	buf []byte
}

const tailSize = 4 << 10

func (t *tail) Write(b []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.buf = append(t.buf, b...)
	if extra := len(t.buf) - tailSize; extra > 0 {
		t.buf = append(t.buf[:0], t.buf[extra:]...)
	}
	return len(b), nil
}

func (t *tail) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return string(bytes.TrimSpace(t.buf))
}
