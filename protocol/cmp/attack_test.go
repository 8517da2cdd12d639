package cmp_test

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"maps"
	"math/big"
	mathrand "math/rand/v2"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"

	"conseal/protocol"
	"conseal/protocol/cmp"
	"conseal/protocol/dealing"
	"conseal/protocol/protocoltest"
)

// where is the offset of the module's content in a body; see package guard.
func where(body []byte) int { return 2 + 64 + int(body[65]) }

// kind names a message of a protocol.
type kind struct {
	round uint16
	what  byte // 'b' or 'd'
}

// attack changes host b's message of one kind to host a, which must name b.
type attack struct {
	name   string
	at     kind
	change func(body []byte) []byte
}

func flip(at int) func([]byte) []byte {
	return func(b []byte) []byte {
		b[at] ^= 1
		return b
	}
}

// field changes the bytes that follow a key of the content.
func field(name string, change func(value []byte) []byte) func([]byte) []byte {
	return func(b []byte) []byte {
		value, _ := seek(b[where(b):], append([]byte{0x60 | byte(len(name))}, name...))
		if value == nil {
			panic("the message has no field " + name)
		}
		i := len(b) - len(value)
		return append(b[:i:i], change(b[i:])...)
	}
}

// seek is what follows a key in the maps of the CBOR item at the front of b, and what
// follows the item. A short key's bytes may be in random ones by chance.
func seek(b, key []byte) (value, rest []byte) {
	major, n, b := b[0]>>5, int(b[0]&0x1f), b[1:]
	if n >= 24 {
		size := 1 << (n - 24)
		n = int(new(big.Int).SetBytes(b[:size]).Uint64())
		b = b[size:]
	}
	switch major {
	case 2, 3: // strings
		return nil, b[n:]
	case 4, 6: // an array, a tag
		if major == 6 {
			n = 1
		}
		for ; n > 0 && value == nil; n-- {
			value, b = seek(b, key)
		}
	case 5: // a map
		for ; n > 0 && value == nil; n-- {
			if here, isKey := bytes.CutPrefix(b, key); isKey {
				return here, nil
			}
			_, b = seek(b, nil)
			value, b = seek(b, key)
		}
	}
	return value, b
}

// null puts CBOR's null where a byte string of at least 24 bytes is.
func null(value []byte) []byte {
	switch value[0] {
	case 0x58:
		return append([]byte{0xf6}, value[2+int(value[1]):]...)
	case 0x59:
		return append([]byte{0xf6}, value[3+int(binary.BigEndian.Uint16(value[1:])):]...)
	}
	panic(fmt.Sprintf("no byte string: %x", value[:8]))
}

// inBytes changes the content of a byte string whose head has two bytes.
func inBytes(change func(content []byte) []byte) func([]byte) []byte {
	return func(value []byte) []byte {
		n := int(value[1])
		content := change(bytes.Clone(value[2 : 2+n]))
		head := []byte{0x58, byte(len(content))}
		if len(content) < 24 {
			head = []byte{0x40 | byte(len(content))}
		}
		return slices.Concat(head, content, value[2+n:])
	}
}

// every lists changes that fit any message.
func every(at kind) []attack {
	return []attack{
		{"another module session", at, flip(1)},
		{"an unknown kind", at, func(b []byte) []byte { b[0] = 'x'; return b }},
		{"an echo of another length", at, flip(65)},
		{"cut short", at, func(b []byte) []byte { return b[:len(b)-1] }},
		{"a byte more", at, func(b []byte) []byte { return append(b, 0) }},
		{"empty", at, func([]byte) []byte { return nil }},
		{"no content", at, func(b []byte) []byte { return b[:where(b)] }},
		{"null content", at, func(b []byte) []byte { return append(b[:where(b)], 0xf6) }},
		{"an empty map", at, func(b []byte) []byte { return append(b[:where(b)], 0xa0) }},
		{"a map of indefinite length", at, func(b []byte) []byte { b[where(b)] = 0xbf; return append(b, 0xff) }},
		{"a key in another case", at, func(b []byte) []byte { b[where(b)+2] ^= 0x20; return b }},
		{"a key more", at, func(b []byte) []byte { b[where(b)]++; return append(b, 0x61, 'x', 0xf6) }},
		{"a huge length", at, func(b []byte) []byte {
			at := where(b) + 2 + int(b[where(b)+1]&0x1f) // the first value
			return append(b[:at:at], 0x5b, 0x7f, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff)
		}},
	}
}

// screen runs a protocol to its end, and sends a every bad message before the good
// one. a must refuse each and go on: nothing of it reached the module. The dealing in
// front of a refresh is left out.
func screen[S protocol.Session](t *testing.T, sessions map[protocol.HostID]S, attacks []attack) {
	t.Helper()
	var queue []protocol.Message
	post := func(ready protocol.Ready, err error) {
		if err != nil {
			t.Fatal(err)
		}
		queue = append(queue, ready.Send...)
	}
	for _, h := range slices.Sorted(maps.Keys(sessions)) {
		post(sessions[h].Start())
	}
	met := map[string]bool{}
	_, refresh := any(sessions["a"]).(*cmp.Reshare)
	for len(queue) > 0 {
		m := queue[0]
		queue = queue[1:]
		for _, x := range append(every(kind{m.Round, m.Body[0]}), attacks...) {
			if m.To != "a" || m.From != "b" || x.at != (kind{m.Round, m.Body[0]}) || refresh && m.Round <= dealing.Rounds {
				continue
			}
			met[x.name] = true
			bad := m
			bad.Body = x.change(bytes.Clone(m.Body))
			if _, err := sessions["a"].Step(bad); !protocoltest.Blames(err, "b") || strings.Contains(err.Error(), "panicked") {
				t.Errorf("round %d%c: %s: %v", x.at.round, x.at.what, x.name, err)
			}
		}
		post(sessions[m.To].Step(m))
	}
	for _, x := range attacks {
		if !met[x.name] {
			t.Errorf("round %d%c: %s: there was no such message", x.at.round, x.at.what, x.name)
		}
	}
	for h, s := range sessions {
		if _, err := s.Step(protocol.Message{}); err == nil {
			t.Errorf("%s is not done", h)
		}
	}
}

// cheat runs a protocol with one message of b to a that has the right form and the wrong
// content, and with a second attack also with one of a to b. Who gets it must fail, and
// name the other if only the other's message was checked.
func cheat[S protocol.Session](t *testing.T, sessions map[protocol.HostID]S, name bool, attacks ...attack) {
	t.Helper()
	hosts := []protocol.HostID{"a", "b"}
	done := make([]bool, len(attacks))
	var held []protocol.Message // until all are there, so that no host ends before it has sent its own
	net := protocoltest.Network[S]{Sessions: sessions, Alter: func(m protocol.Message) []protocol.Message {
		for i, x := range attacks {
			if m.To == hosts[i] && m.From == hosts[1-i] && (kind{m.Round, m.Body[0]}) == x.at {
				done[i] = true
				m.Body = x.change(m.Body)
				if held = append(held, m); slices.Contains(done, false) {
					return nil
				}
				return held
			}
		}
		return []protocol.Message{m}
	}}
	failed, waiting := net.Run(t)
	for i, x := range attacks {
		victim, liar := hosts[i], hosts[1-i]
		err := failed[victim]
		if len(attacks) == 1 && x.at.what == 'b' && slices.Contains(waiting, victim) && failed[liar] != nil {
			continue // the liar saw first that the other was sent another broadcast
		}
		if !done[i] || err == nil || name && !protocoltest.Blames(err, liar) || strings.Contains(err.Error(), "panicked") {
			t.Errorf("round %d%c: %s (sent: %v): %v", x.at.round, x.at.what, x.name, done[i], err)
		}
	}
}

func bit(at int) func([]byte) []byte {
	return func(b []byte) []byte {
		b[at] ^= 1
		return b
	}
}

func TestSignScreens(t *testing.T) {
	screen(t, p256Keys().sign(t, protocoltest.Hosts(2), [32]byte{1}).Sessions, []attack{
		{"a null integer", kind{2, 'd'}, field("Z3", null)},
		{"a sign that is none", kind{2, 'd'}, field("Z1", inBytes(func(b []byte) []byte { b[0] = 7; return b }))},
		{"a null point", kind{3, 'b'}, field("BigGammaShare", null)},
		{"a point off the curve", kind{3, 'b'}, field("BigGammaShare", inBytes(func(b []byte) []byte { clear(b[1:]); b[0] = 9; return b }))},
		{"an empty point", kind{3, 'b'}, field("BigGammaShare", inBytes(func([]byte) []byte { return nil }))},
		{"a null ciphertext", kind{3, 'd'}, field("DeltaD", null)},
		{"a scalar above the order", kind{4, 'b'}, field("DeltaShare", inBytes(func([]byte) []byte { return bytes.Repeat([]byte{0xff}, 32) }))},
	})
}

func TestPresignScreens(t *testing.T) {
	presigning := secp256k1Keys().presign(t, protocoltest.Hosts(3))
	screen(t, presigning.Sessions, []attack{
		{"a null map", kind{3, 'b'}, field("DeltaCiphertext", func(b []byte) []byte { return append([]byte{0xf6}, b[1:]...) })},
		{"a party that is none", kind{3, 'b'}, field("ChiCiphertext", func(b []byte) []byte { b[2] ^= 0x40; return b })},
		{"a party twice", kind{3, 'b'}, field("ChiCiphertext", func(b []byte) []byte {
			copy(b[1+8+512:], b[1:6])
			return b
		})},
		{"a null scalar", kind{7, 'b'}, field("Z", null)},
	})
	online := map[protocol.HostID]*cmp.Sign{}
	id := protocoltest.SessionID()
	for h, p := range presigning.Sessions {
		pre, err := p.Result()
		if err != nil {
			t.Fatal(err)
		}
		if online[h], err = cmp.NewOnline(id, pre, [32]byte{1}); err != nil {
			t.Fatal(err)
		}
	}
	screen(t, online, []attack{{"a null scalar", kind{8, 'b'}, field("Sigma", null)}})
}

func TestKeygenScreens(t *testing.T) {
	polynomial := func(change func([]byte) []byte) func([]byte) []byte { return field("VSSPolynomial", inBytes(change)) }
	fewer, more := []byte("s\x81"), []byte("s\x82")
	attacks := []attack{
		{"a forged number of coefficients", kind{5, 'b'}, polynomial(func(b []byte) []byte { copy(b, "\xff\xff\xff\xff"); return b })},
		{"a coefficient too few", kind{5, 'b'}, polynomial(func(b []byte) []byte {
			return append([]byte{0, 0, 0, 0}, bytes.Replace(b[4:len(b)-35], fewer, []byte("s\x80"), 1)...)
		})},
		{"a coefficient too many", kind{5, 'b'}, polynomial(func(b []byte) []byte {
			return append(append([]byte{0, 0, 0, 2}, bytes.Replace(b[4:], fewer, more, 1)...), b[len(b)-35:]...)
		})},
		{"a constant where none belongs", kind{5, 'b'}, polynomial(func(b []byte) []byte {
			return bytes.Replace(b, []byte("IsConstant\xf5"), []byte("IsConstant\xf4"), 1)
		})},
		{"an empty exponent", kind{5, 'b'}, polynomial(func([]byte) []byte { return nil })},
		{"a null modulus", kind{5, 'b'}, field("N", null)},
		{"an even modulus", kind{5, 'b'}, field("N", func(b []byte) []byte { b[3+255] &^= 1; return b })},
		{"a null share", kind{6, 'd'}, field("Share", null)},
		{"a bignum with zeros in front", kind{6, 'b'}, field("W", func(b []byte) []byte {
			b[3+b[1]&1] = 0 // its length has two bytes, or one if it begins with zeros
			return b
		})},
		{"a negative bignum", kind{6, 'b'}, field("W", func(b []byte) []byte { b[0] = 0xc3; return b })},
	}
	// Of a forged number the module alone would allocate the four billion coefficients.
	sessions := refreshing(t, twoKeys()).Sessions
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	screen(t, sessions, attacks)
	runtime.ReadMemStats(&after)
	if grown := after.Sys - before.Sys; grown > 256<<20 {
		t.Errorf("the process grew by %d MB", grown>>20)
	}
}

// TestCheatsAreSeen has host b send what has the right form only.
func TestCheatsAreSeen(t *testing.T) {
	p256 := p256Keys()
	digest := sha256.Sum256([]byte("a message"))
	for _, x := range []struct {
		attack
		named bool
	}{
		{attack{"a changed proof", kind{2, 'd'}, field("Z2", bit(40))}, true},
		{attack{"a changed ciphertext", kind{3, 'd'}, field("ChiD", bit(40))}, true},
		{attack{"another echo", kind{3, 'b'}, bit(70)}, false},
		{attack{"another share of delta", kind{4, 'b'}, field("DeltaShare", inBytes(bit(20)))}, false},
		{attack{"another share of the signature", kind{5, 'b'}, field("SigmaShare", inBytes(bit(20)))}, false},
	} {
		cheat(t, p256.sign(t, protocoltest.Hosts(2), digest).Sessions, x.named, x.attack)
	}
	// In presigning, the module would go on to tell secrets to find a culprit.
	cheat(t, p256.presign(t, protocoltest.Hosts(2)).Sessions, false, attack{"another share of delta", kind{4, 'b'}, field("DeltaShare", inBytes(bit(20)))})
	cheat(t, p256.presign(t, protocoltest.Hosts(2)).Sessions, true, attack{"another ciphertext", kind{3, 'b'}, field("DeltaCiphertext", bit(50))})
	two := twoKeys()
	cheat(t, refreshing(t, two).Sessions, true, attack{"another commitment", kind{4, 'b'}, field("Commitment", bit(9))})
	cheat(t, refreshing(t, two).Sessions, true, attack{"another share", kind{6, 'd'}, field("Share", bit(99))},
		attack{"a changed proof", kind{6, 'b'}, field("W", bit(99))})
	cheat(t, refreshing(t, two).Sessions, true, attack{"a changed response", kind{7, 'b'}, field("Z", inBytes(bit(20)))})
}

// TestMessagesOutOfPlace sends to one session what is not its turn. None of it ends
// the session but what its sender is at fault for.
func TestMessagesOutOfPlace(t *testing.T) {
	key := p256Keys()
	first := func() (*cmp.Sign, []protocol.Message, []protocol.Message) {
		net := key.sign(t, protocoltest.Hosts(2), [32]byte{1})
		mine, err := net.Sessions["a"].Start()
		if err != nil {
			t.Fatal(err)
		}
		theirs, err := net.Sessions["b"].Start()
		if err != nil {
			t.Fatal(err)
		}
		return net.Sessions["a"], mine.Send, theirs.Send
	}
	a, mine, theirs := first()
	defer a.Close()
	direct := slices.IndexFunc(theirs, func(m protocol.Message) bool { return m.Body[0] == 'd' })
	broadcast := 1 - direct
	with := func(change func(*protocol.Message)) protocol.Message {
		m := theirs[broadcast]
		m.Body = bytes.Clone(m.Body)
		change(&m)
		return m
	}
	_, _, older := first()
	for name, m := range map[string]protocol.Message{
		"of another session":     with(func(m *protocol.Message) { m.Session[0] ^= 1 }),
		"for another host":       with(func(m *protocol.Message) { m.To = "b" }),
		"from a stranger":        with(func(m *protocol.Message) { m.From = "z" }),
		"from a party not here":  with(func(m *protocol.Message) { m.From = "c" }),
		"from itself":            mine[0],
		"a stranger's abort":     with(func(m *protocol.Message) { m.From, m.Round, m.Body = "z", 0, []byte("aborted") }),
		"a party's abort":        with(func(m *protocol.Message) { m.Round, m.Body = 0, []byte("aborted") }),
		"of a round to come":     with(func(m *protocol.Message) { m.Round = 5 }),
		"of a round that is not": with(func(m *protocol.Message) { m.Round = 65535 }),
		"as the next round's":    with(func(m *protocol.Message) { m.Round = 3 }),
		"of an older session":    with(func(m *protocol.Message) { m.Body = older[broadcast].Body }),
		"its kind swapped":       with(func(m *protocol.Message) { m.Body[0] = 'd' }),
		"another round's body":   with(func(m *protocol.Message) { m.Body = append(m.Body[:66:66], "\xa1\x65Sigma\x40"...) }),
	} {
		if _, err := a.Step(m); !protocoltest.Blames(err, m.From) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := a.Step(theirs[broadcast]); err != nil {
		t.Errorf("the right message after all these: %v", err)
	}
	if _, err := a.Step(theirs[broadcast]); !protocoltest.Blames(err, "b") || !strings.Contains(err.Error(), "second message") {
		t.Errorf("the same again: %v", err)
	}
	ready, err := a.Step(theirs[direct])
	if err != nil || len(ready.Send) == 0 {
		t.Errorf("the rest of the round: %v, %d messages", err, len(ready.Send))
	}
	if _, err := a.Step(theirs[direct]); !protocoltest.Blames(err, "b") || !strings.Contains(err.Error(), "over") {
		t.Errorf("a round that is over: %v", err)
	}
	a.Close()
	if _, err := a.Step(theirs[direct]); err == nil {
		t.Error("a closed session takes messages")
	}
}

// TestRandomChanges flips bytes anywhere in messages of a signature. None ends in
// a signature that differs, none panics; a change that a sees in b's message names b.
func TestRandomChanges(t *testing.T) {
	key := p256Keys()
	times := 2
	if *soak {
		times = 50
	}
	for range times {
		var seen []string
		target := mathrand.IntN(7)
		sent := 0
		var mu sync.Mutex
		net := key.sign(t, protocoltest.Hosts(2), [32]byte{1})
		net.Alter = func(m protocol.Message) []protocol.Message {
			mu.Lock()
			defer mu.Unlock()
			if m.From == "b" {
				if sent++; sent == target+1 {
					m.Body[mathrand.IntN(len(m.Body))] ^= byte(1 + mathrand.IntN(255))
					seen = append(seen, fmt.Sprint(m.Round))
				}
			}
			return []protocol.Message{m}
		}
		failed, waiting := net.Run(t)
		if failed["a"] == nil && !slices.Contains(waiting, "a") {
			t.Errorf("a change of a message of round %v: no error", seen)
		}
	}
}
