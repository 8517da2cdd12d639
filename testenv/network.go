package testenv

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
)

// Network stands between the hosts of a fleet: each is reached through a proxy at the
// address that the roster has, which [Network.Cut] can have refuse some of the others.
// It needs no privileges: who dials is the agent that has the other end of the
// connection open, by /proc.
type Network struct {
	fleet     *Fleet
	listeners []net.Listener
	serving   sync.WaitGroup

	mu    sync.Mutex // of what follows
	cut   func(dials, listens string) bool
	pairs map[*pair]struct{}
}

// pair is a stream between two hosts.
type pair struct {
	dials, listens string
	near, far      net.Conn
}

func (p *pair) close() {
	p.near.Close()
	p.far.Close()
}

// Network puts proxies before all hosts; call it before [Fleet.Init]. [Fleet.Close] ends it.
func (f *Fleet) Network() (*Network, error) {
	n := &Network{fleet: f, pairs: map[*pair]struct{}{}}
	f.network = n
	for _, h := range f.Hosts {
		l, err := net.Listen("tcp", h.Address)
		if err != nil {
			return nil, err
		}
		n.listeners = append(n.listeners, l)
		host, _, err := net.SplitHostPort(h.Address)
		if err != nil {
			return nil, err
		}
		h.listen = net.JoinHostPort(host, "7444")
		n.serving.Go(func() { n.accept(l, h.Name, h.listen) })
	}
	return n, nil
}

// Cut ends the streams of the pairs for which cut is true, and refuses new ones, until
// it is called again; nil heals all.
func (n *Network) Cut(cut func(dials, listens string) bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.cut = cut
	for p := range n.pairs {
		if cut != nil && cut(p.dials, p.listens) {
			p.close()
		}
	}
}

// Close cuts everything and ends the proxies.
func (n *Network) Close() error {
	var errs []error
	for _, l := range n.listeners {
		errs = append(errs, l.Close())
	}
	n.Cut(func(string, string) bool { return true })
	n.serving.Wait()
	return errors.Join(errs...)
}

func (n *Network) accept(l net.Listener, name, target string) {
	for {
		near, err := l.Accept()
		if err != nil {
			return // closed
		}
		n.serving.Go(func() { n.serve(near, name, target) })
	}
}

// serve carries one stream until either side hangs up or it is cut.
func (n *Network) serve(near net.Conn, name, target string) {
	defer near.Close()
	far, err := net.Dial("tcp", target)
	if err != nil {
		return // the agent is down
	}
	p := &pair{n.dialler(near), name, near, far}
	defer p.close()
	n.mu.Lock()
	if p.dials == "" || n.cut != nil && n.cut(p.dials, p.listens) {
		n.mu.Unlock()
		return
	}
	n.pairs[p] = struct{}{}
	n.mu.Unlock()
	back := make(chan struct{})
	go func() {
		defer close(back)
		_, _ = io.Copy(near, far) // ends when either side does
		p.close()
	}()
	_, _ = io.Copy(far, near)
	p.close()
	<-back
	n.mu.Lock()
	defer n.mu.Unlock()
	delete(n.pairs, p)
}

// dialler is the host whose agent has the other end of a connection; "" if it is gone.
func (n *Network) dialler(c net.Conn) string {
	table, err := os.ReadFile("/proc/net/tcp") // see proc_net_tcp in the kernel's documentation
	if err != nil {
		return ""
	}
	inode, from := "", c.RemoteAddr().(*net.TCPAddr)
	for line := range strings.Lines(string(table)) {
		f := strings.Fields(line)
		if len(f) > 9 && strings.HasSuffix(f[1], fmt.Sprintf(":%04X", from.Port)) && f[2] == hexAddress(c.LocalAddr().(*net.TCPAddr)) {
			inode = f[9]
		}
	}
	for _, h := range n.fleet.Hosts {
		for _, dir := range agentsOf(h) {
			fds, _ := filepath.Glob(filepath.Join(dir, "fd", "*")) // none if it has ended
			for _, fd := range fds {
				if to, err := os.Readlink(fd); err == nil && to == "socket:["+inode+"]" {
					return h.Name
				}
			}
		}
	}
	return ""
}

// hexAddress is an IPv4 address and port as /proc/net/tcp has them on a little-endian
// machine.
func hexAddress(a *net.TCPAddr) string {
	ip := a.IP.To4()
	return fmt.Sprintf("%02X%02X%02X%02X:%04X", ip[3], ip[2], ip[1], ip[0], a.Port)
}

// agentsOf lists the processes that run on a host's configuration, by their folders.
func agentsOf(h *Host) (dirs []string) {
	all, _ := filepath.Glob("/proc/[0-9]*")
	for _, dir := range all {
		if line, err := os.ReadFile(filepath.Join(dir, "cmdline")); err == nil && strings.Contains(string(line), h.ConfigFile()) {
			dirs = append(dirs, dir)
		}
	}
	return dirs
}
