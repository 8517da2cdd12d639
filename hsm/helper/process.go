package helper

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"runtime"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"conseal/hsm"
)

// process is one helper process and the calls that it has to answer.
type process struct {
	cmd    *exec.Cmd
	conn   *net.UnixConn
	reaped chan struct{} // closed once the process is gone for certain
	gone   chan struct{} // closed once all of its calls are answered as well

	writing sync.Mutex // one frame at a time

	mu     sync.Mutex // guards what follows
	calls  map[uint64]*call
	last   uint64 // id that was given
	ending bool   // it was killed, or has ended by itself
	hung   bool   // it was killed because a call had no answer
	served bool   // it answered something after the token was open
	over   bool   // nothing is left of it
	lost   func() // is told when it is over
}

// call waits for one answer.
type call struct {
	id       uint64
	op       op
	answer   chan answer // of 1; nobody may be there to take it
	deadline *time.Timer
	release  func() // once the helper has nothing more to do for it
	left     bool   // nobody is there
}

// answer is how a call ended.
type answer struct {
	*frame
	err   error
	again bool // the helper ended, and not by this call's deadline
}

// errEnding says that a question was not sent.
var errEnding = errors.New("the helper is ending")

// spawn starts a helper. It dies with this process, however this one ends: by the
// kernel's signal, and by the end of its socket.
func spawn(cfg *Config, lock *os.File) (*process, error) {
	ours, theirs, err := socketpair()
	if err != nil {
		return nil, fmt.Errorf("hsm: starting the helper: %w", err)
	}
	defer theirs.Close()
	extra, done, err := descriptors(cfg, lock)
	if err != nil {
		ours.Close()
		return nil, fmt.Errorf("hsm: starting the helper: %w", err)
	}
	defer done()
	// What this process inherited is none of the module's; what Go opens is marked already.
	_ = unix.CloseRange(3, ^uint(0), unix.CLOSE_RANGE_CLOEXEC) // unknown before Linux 5.11
	p := &process{conn: ours, reaped: make(chan struct{}), gone: make(chan struct{}), calls: map[uint64]*call{}}
	p.cmd = &exec.Cmd{
		Path: "/proc/self/exe", // this very program, also if its file was replaced
		Args: []string{"conseald", Command}, Env: environment(cfg.Environment),
		Stdin: theirs, Stderr: os.Stderr, ExtraFiles: extra,
		SysProcAttr: &syscall.SysProcAttr{Setsid: true, Pdeathsig: unix.SIGKILL},
	}
	started := make(chan error)
	go p.run(started)
	if err := <-started; err != nil {
		ours.Close()
		return nil, fmt.Errorf("hsm: starting the helper: %w", err)
	}
	go p.read()
	return p, nil
}

// run starts the process and waits for its end, on a thread of its own that ends
// with it. The kernel sends the parent-death signal when the thread that forked ends,
// and what restrict takes from this thread the child never has.
func (p *process) run(started chan<- error) {
	runtime.LockOSThread() // and never unlock
	err := restrict()
	if err == nil {
		err = p.cmd.Start()
	}
	started <- err
	if err == nil {
		_ = p.cmd.Wait() // the state says how it ended
		close(p.reaped)
	}
}

// restrict takes from this thread, and so from its child, what a PKCS#11 library
// does not need. Root keeps two capabilities: files of other users, for tokens that
// are files, and locked memory.
func restrict() error {
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("no_new_privs: %w", err)
	}
	if err := unix.Prctl(unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0); err != nil {
		return fmt.Errorf("clearing ambient capabilities: %w", err)
	}
	const keep = 1<<unix.CAP_DAC_OVERRIDE | 1<<unix.CAP_IPC_LOCK
	for c := range uintptr(64) {
		if keep&(1<<c) != 0 {
			continue
		}
		if unix.Prctl(unix.PR_CAPBSET_DROP, c, 0, 0, 0) != nil {
			break // the kernel knows no more, or we may not
		}
	}
	// Under no_new_privs the child gets no more than this thread has, also where the bounding
	// set could not be changed, for want of CAP_SETPCAP.
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var has [2]unix.CapUserData
	if err := unix.Capget(&header, &has[0]); err != nil {
		return fmt.Errorf("reading capabilities: %w", err)
	}
	kept := [2]unix.CapUserData{{Effective: has[0].Effective & keep, Permitted: has[0].Permitted & keep}}
	if kept == has {
		return nil
	}
	if err := unix.Capset(&header, &kept[0]); err != nil {
		return fmt.Errorf("dropping capabilities: %w", err)
	}
	return nil
}

func socketpair() (ours *net.UnixConn, theirs *os.File, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, err
	}
	mine := os.NewFile(uintptr(fds[0]), "agent")
	defer mine.Close()
	theirs = os.NewFile(uintptr(fds[1]), "helper")
	conn, err := net.FileConn(mine)
	if err != nil {
		theirs.Close()
		return nil, nil, err
	}
	return conn.(*net.UnixConn), theirs, nil
}

// descriptors are those from 3 on that the helper gets: a PIN's under the number
// that the configuration says, and the lock under a free one.
func descriptors(cfg *Config, lock *os.File) (files []*os.File, done func(), err error) {
	source, err := cfg.pinSource()
	if err != nil {
		return nil, nil, err
	}
	n, ok := source.FD()
	if !ok {
		return []*os.File{lock}, func() {}, nil
	}
	dup, err := unix.FcntlInt(uintptr(n), unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		return nil, nil, fmt.Errorf("the PIN's descriptor %d: %w: start the program with %d<FILE", n, err, n)
	}
	pin := os.NewFile(uintptr(dup), "pin")
	files = make([]*os.File, max(n-3, 1)+1) // nil: closed in the child
	files[0] = lock
	if n == 3 {
		files[1] = lock
	}
	files[n-3] = pin
	return files, func() { pin.Close() }, nil
}

// environment is all that a helper gets of it.
func environment(names []string) []string {
	env := []string{"GOTRACEBACK=none"} // a panic shows no stack
	for _, name := range append([]string{"CREDENTIALS_DIRECTORY"}, names...) {
		if value, ok := os.LookupEnv(name); ok {
			env = append(env, name+"="+value)
		}
	}
	// The C library overwrites what is freed: the binding does not.
	return append(env, "GLIBC_TUNABLES=glibc.malloc.perturb=165:glibc.malloc.tcache_count=0")
}

// send asks a question. If the answer is not there by the deadline, the helper ends.
// Unless there is an error, release is called once.
func (p *process) send(f *frame, deadline time.Duration, release func()) (*call, error) {
	if err := f.check(); err != nil {
		return nil, fmt.Errorf("hsm: %s: %w", f.op, err)
	}
	c := &call{op: f.op, answer: make(chan answer, 1), release: release}
	p.mu.Lock()
	if p.ending {
		p.mu.Unlock()
		return nil, errEnding
	}
	p.last++
	c.id = p.last
	p.calls[c.id] = c
	c.deadline = time.AfterFunc(deadline, func() { p.late(c, deadline) })
	p.mu.Unlock()
	q := *f
	q.id = c.id
	if p.write(&q) != nil {
		p.end() // and the call is answered by that
	}
	return c, nil
}

func (p *process) write(f *frame) error {
	p.writing.Lock()
	defer p.writing.Unlock()
	return f.write(p.conn)
}

// late ends the helper because of a call that it did not answer.
func (p *process) late(c *call, deadline time.Duration) {
	p.mu.Lock()
	if p.calls[c.id] != c {
		p.mu.Unlock()
		return
	}
	delete(p.calls, c.id)
	p.hung = p.hung || !p.ending
	p.mu.Unlock()
	p.end()
	c.give(answer{err: &hsm.Error{Class: hsm.ClassHang, What: fmt.Sprintf(
		"hsm: %s: the PKCS#11 module gave no answer in %v and was ended (process %d)", c.op, deadline, p.pid())}})
}

// leave gives an answer up. The helper is told before leave returns: a SetRoot that it
// has not begun then is not done, so that a root that is read later stays. The call's
// deadline stays too.
func (p *process) leave(c *call) {
	p.mu.Lock()
	c.left = true
	_, pending := p.calls[c.id]
	p.mu.Unlock()
	if pending {
		_ = p.write(&frame{id: c.id, op: opCancel}) // a helper that ended needs none
		return
	}
	(<-c.answer).wipe() // it came at the same moment
}

// give ends a call. Nobody else has it.
func (c *call) give(a answer) {
	c.deadline.Stop()
	c.answer <- a
	c.release()
}

func (a answer) wipe() {
	if a.frame != nil {
		a.secret.Wipe()
	}
}

// end kills the helper. Killing it again does nothing.
func (p *process) end() {
	p.mu.Lock()
	p.ending = true
	p.mu.Unlock()
	_ = p.cmd.Process.Kill() // it may have ended already
	p.conn.Close()
}

// read takes answers until the helper ends. Then it waits until nothing of it is
// left, tells of it, and answers the calls that were under way.
func (p *process) read() {
	for {
		f, err := readFrame(p.conn)
		if err != nil || p.deliver(f) != nil {
			break
		}
	}
	p.end()
	<-p.reaped
	p.mu.Lock()
	calls, lost := p.calls, p.lost
	p.calls, p.over = nil, true
	p.mu.Unlock()
	if lost != nil {
		lost()
	}
	for _, c := range calls {
		c.give(answer{err: p.ended(c.op.String() + ": "), again: true})
	}
	close(p.gone)
}

// tell has lost called when the process is over, before its calls are answered, or
// returns false if it is.
func (p *process) tell(lost func()) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.lost = lost
	return !p.over
}

func (p *process) deliver(f *frame) error {
	p.mu.Lock()
	c := p.calls[f.id]
	if c == nil || f.op != opDone && f.op != opFailed || f.secret != nil && (f.op == opFailed || !c.op.secret()) {
		p.mu.Unlock()
		f.secret.Wipe()
		return errFrame
	}
	delete(p.calls, f.id)
	p.served = p.served || c.op != opStart
	left := c.left
	p.mu.Unlock()
	a := answer{frame: f}
	if f.op == opFailed {
		a.err = f.cause()
	}
	if left {
		a.wipe()
	}
	c.give(a)
	return nil
}

// ended says how a process that is over ended.
func (p *process) ended(during string) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.hung {
		return &hsm.Error{Class: hsm.ClassHang, What: fmt.Sprintf(
			"hsm: %sthe PKCS#11 module was ended, for it did not answer another call (process %d)", during, p.pid())}
	}
	return &hsm.Error{Class: hsm.ClassCrash, What: fmt.Sprintf(
		"hsm: %sthe PKCS#11 module's process %d crashed (%s)", during, p.pid(), p.cmd.ProcessState)}
}

func (p *process) pid() int { return p.cmd.Process.Pid }

// stop lets the helper finish what it does, kills it if it takes longer, and returns when
// it is gone.
func (p *process) stop(patience time.Duration) {
	p.mu.Lock()
	p.ending = true // nothing new
	p.mu.Unlock()
	_ = p.conn.CloseWrite() // if it fails, it has ended
	timer := time.NewTimer(patience)
	defer timer.Stop()
	select {
	case <-p.gone:
	case <-timer.C:
		p.end()
		<-p.gone
	}
}

// useful tells whether the process did anything but open the token.
func (p *process) useful() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.served
}

// alive tells whether the process takes calls.
func (p *process) alive() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return !p.ending
}
