package peer

import (
	"fmt"
	"net"
	"testing"
	"testing/synctest"
	"time"
)

// caller is a connection from an address.
type caller struct {
	net.Conn
	from   string
	closed bool
}

func (c *caller) RemoteAddr() net.Addr { return address(c.from) }
func (c *caller) Close() error         { c.closed = true; return nil }

type address string

func (a address) Network() string { return "tcp" }
func (a address) String() string  { return string(a) }

func TestDoor(t *testing.T) {
	var d door
	var last *visitor
	enter := func(format string, args ...any) (*caller, bool) {
		c := &caller{from: fmt.Sprintf(format, args...)}
		v := d.enter(c)
		if v != nil {
			last = v
		}
		return c, v != nil
	}
	for i := range maxFromSource { // one IPv6 network is one source
		if _, ok := enter("[2001:db8::%x]:%d", i+1, i+1); !ok {
			t.Fatalf("visitor %d of a source was refused", i+1)
		}
	}
	if _, ok := enter("[2001:db8::ffff]:1"); ok {
		t.Error("a source has more than its share")
	}
	var first *caller
	for source := range maxVisitors/maxFromSource - 1 {
		for i := range maxFromSource {
			c, ok := enter("192.0.2.%d:%d", source, i+1)
			if !ok {
				t.Fatalf("visitor %d of source %d was refused", i+1, source)
			}
			if first == nil {
				first = c
			}
		}
	}
	if _, ok := enter("[::ffff:192.0.2.0]:1"); ok {
		t.Error("a mapped address is another source")
	}
	for i := range maxFromSource - 1 { // others shrink to make room
		if _, ok := enter("198.51.100.1:%d", i+1); ok != (i < 6) || len(d.waiting) != maxVisitors {
			t.Errorf("visitor %d of a new source: let in: %v, inside: %d", i+1, ok, len(d.waiting))
		}
	}
	if !first.closed {
		t.Error("the oldest of a source with most was not closed")
	}
	d.leave(last)
	d.leave(last)
	if len(d.waiting) != maxVisitors-1 {
		t.Errorf("%d inside, want %d", len(d.waiting), maxVisitors-1)
	}
}

func TestHush(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var h hush
		allowed := 0
		for i := range 10_000 {
			if h.allow(sourceOf(address(fmt.Sprintf("10.0.%d.%d:1", i%100, i%7)))) {
				allowed++
			}
		}
		if allowed != hushLength {
			t.Errorf("%d sources were logged, want %d", allowed, hushLength)
		}
		time.Sleep(hushFor)
		if !h.allow(sourceOf(address("10.0.0.0:1"))) || h.allow(sourceOf(address("10.0.0.0:2"))) {
			t.Error("a minute later a source is logged once")
		}
	})
}
