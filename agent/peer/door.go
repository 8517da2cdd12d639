package peer

import (
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"
)

// door limits the connections whose other end has not yet shown who it is. Each
// costs memory and a signature of the identity key, which in hardware is slow.
type door struct {
	mu      sync.Mutex
	waiting []*visitor // oldest first
}

type visitor struct {
	source netip.Prefix
	conn   net.Conn
}

const (
	maxVisitors   = 32
	maxFromSource = 8
)

// enter lets a connection in, or returns nil if there is no room. When the door
// is full, the source that fills it most yields to one that has clearly less, so
// that one source cannot keep the others out.
func (d *door) enter(conn net.Conn) *visitor {
	v := &visitor{sourceOf(conn.RemoteAddr()), conn}
	d.mu.Lock()
	defer d.mu.Unlock()
	count := map[netip.Prefix]int{}
	for _, w := range d.waiting {
		count[w.source]++
	}
	if count[v.source] >= maxFromSource {
		return nil
	}
	if len(d.waiting) >= maxVisitors {
		worst := d.waiting[0] // the oldest of the source that has most
		for _, w := range d.waiting {
			if count[w.source] > count[worst.source] {
				worst = w
			}
		}
		if count[worst.source] <= count[v.source]+1 {
			return nil
		}
		_ = worst.conn.Close() // its goroutine finds out and leaves
		d.remove(worst)
	}
	d.waiting = append(d.waiting, v)
	return v
}

// leave makes room. Leaving twice does nothing.
func (d *door) leave(v *visitor) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.remove(v)
}

// remove takes v from those who wait; mu is held.
func (d *door) remove(v *visitor) {
	d.waiting = slices.DeleteFunc(d.waiting, func(w *visitor) bool { return w == v })
}

// sourceOf is what one stranger surely commands: an IPv4 address or an IPv6
// network of 64 bits. Addresses that are neither are one source.
func sourceOf(a net.Addr) netip.Prefix {
	ap, err := netip.ParseAddrPort(a.String())
	if err != nil {
		return netip.Prefix{}
	}
	ip := ap.Addr().Unmap()
	bits := 32
	if ip.Is6() {
		bits = 64
	}
	source, err := ip.Prefix(bits)
	if err != nil {
		return netip.Prefix{}
	}
	return source
}

// hush says which strangers may be logged: each source once a minute, and no
// more than some number of sources, so that nobody fills the disk.
type hush struct {
	mu     sync.Mutex
	logged map[netip.Prefix]time.Time
}

const (
	hushFor    = time.Minute
	hushLength = 64
)

func (h *hush) allow(source netip.Prefix) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	now := time.Now()
	if last, ok := h.logged[source]; ok && now.Sub(last) < hushFor {
		return false
	}
	for s, last := range h.logged {
		if now.Sub(last) >= hushFor {
			delete(h.logged, s)
		}
	}
	if len(h.logged) >= hushLength {
		return false
	}
	if h.logged == nil {
		h.logged = map[netip.Prefix]time.Time{}
	}
	h.logged[source] = now
	return true
}
