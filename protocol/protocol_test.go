package protocol_test

import (
	"encoding/hex"
	"errors"
	"fmt"
	"reflect"
	"slices"
	"strings"
	"testing"

	"conseal/protocol"
)

func binding() protocol.Binding {
	return protocol.Binding{
		Operation: "sign", Scheme: "ed25519", Key: "release", Incarnation: 1, Epoch: [2]uint64{3, 4},
		Entry: [32]byte{5}, Certificate: [32]byte{6}, Quorum: 2, Parties: []protocol.HostID{"alpha", "beta"},
		Request: [32]byte{7}, Nonce: [32]byte{8},
	}
}

// TestIDIsFixed holds the hashing to what hosts of this version compute. The value
// was computed by another program, from the doc of Binding.ID.
func TestIDIsFixed(t *testing.T) {
	b := binding()
	id := b.ID()
	const want = "d909638ab40923134ae19842c11c83c870b8b68a38d2c4b387194ea567e3e607"
	if got := hex.EncodeToString(id[:]); got != want {
		t.Errorf("got %s, want %s; a change of the hash needs another protocol.Version", got, want)
	}
}

// TestEveryFieldCounts changes one field at a time, also fields that are added
// later: the id changes, and Differs names that field and no other.
func TestEveryFieldCounts(t *testing.T) {
	names := map[string]string{"Entry": "roster entry"}
	base := binding()
	seen := map[protocol.SessionID]string{base.ID(): "unchanged"}
	for i := range reflect.TypeFor[protocol.Binding]().NumField() {
		field := reflect.TypeFor[protocol.Binding]().Field(i).Name
		changed := binding()
		change(t, reflect.ValueOf(&changed).Elem().Field(i))
		if other, ok := seen[changed.ID()]; ok {
			t.Errorf("%s: same id as %s", field, other)
		}
		seen[changed.ID()] = field
		name := strings.ToLower(field)
		if n, ok := names[field]; ok {
			name = n
		}
		text := base.Differs(&changed)
		if !strings.HasPrefix(text, name+": here ") || strings.Contains(text, ";") {
			t.Errorf("%s: Differs says %q", field, text)
		}
	}
}

func change(t *testing.T, v reflect.Value) {
	t.Helper()
	switch v.Kind() {
	case reflect.String:
		v.SetString(v.String() + "x")
	case reflect.Uint64:
		v.SetUint(v.Uint() + 1)
	case reflect.Uint8:
		v.SetUint(v.Uint() ^ 0x80)
	case reflect.Array, reflect.Slice:
		change(t, v.Index(v.Len()-1)) // the last element: a hash of a prefix would not see it
	default:
		t.Fatalf("a field of kind %s: say here how to change it", v.Kind())
	}
}

// TestIDsAreUnambiguous moves bytes over the borders between fields and parties.
func TestIDsAreUnambiguous(t *testing.T) {
	seen := map[protocol.SessionID]int{}
	for i, edit := range []func(*protocol.Binding){
		func(*protocol.Binding) {},
		func(b *protocol.Binding) { b.Operation, b.Scheme = "signe", "d25519" },
		func(b *protocol.Binding) { b.Scheme, b.Key = "ed25519r", "elease" },
		func(b *protocol.Binding) { b.Scheme, b.Key = "", "ed25519release" },
		func(b *protocol.Binding) { b.Epoch = [2]uint64{4, 3} },
		func(b *protocol.Binding) { b.Epoch, b.Incarnation = [2]uint64{1, 4}, 3 },
		func(b *protocol.Binding) { b.Entry, b.Certificate = b.Certificate, b.Entry },
		func(b *protocol.Binding) { b.Parties = []protocol.HostID{"alphab", "eta"} },
		func(b *protocol.Binding) { b.Parties = []protocol.HostID{"alphabeta"} },
		func(b *protocol.Binding) { b.Parties = []protocol.HostID{"alpha\x00\x00\x00\x04beta"} },
		func(b *protocol.Binding) { b.Parties = []protocol.HostID{"beta", "alpha"} },
		func(b *protocol.Binding) { b.Parties = nil },
		func(b *protocol.Binding) { b.Parties = []protocol.HostID{""} },
	} {
		b := binding()
		edit(&b)
		if j, ok := seen[b.ID()]; ok {
			t.Errorf("bindings %d and %d have one id", i, j)
		}
		seen[b.ID()] = i
	}
}

func TestDiffersIsEmptyOnlyForEqualIDs(t *testing.T) {
	a, b := binding(), binding()
	if text := a.Differs(&b); text != "" || a.ID() != b.ID() {
		t.Errorf("equal bindings: %q", text)
	}
	b.Quorum, b.Request = 3, [32]byte{9}
	if text := a.Differs(&b); text != "quorum: here 2, there 3; request: here 070000000000, there 090000000000" {
		t.Errorf("got %q", text)
	}
}

func TestCheckParties(t *testing.T) {
	for _, test := range []struct {
		parties string // separated by blanks; "-" is an empty name
		want    string // of the error; "" for none
	}{
		{"a b c", ""},
		{"b", ""},
		{"", "no parties"},
		{"- b", "has no name"},
		{"b a", "not sorted"},
		{"a b b", "not sorted and distinct"},
		{"a c", "not among the parties"},
	} {
		var parties []protocol.HostID
		for name := range strings.FieldsSeq(test.parties) {
			parties = append(parties, protocol.HostID(strings.Trim(name, "-")))
		}
		before := slices.Clone(parties)
		err := protocol.CheckParties("b", parties)
		if (err == nil) != (test.want == "") || err != nil && !strings.Contains(err.Error(), test.want) {
			t.Errorf("%q: got %v, want %q", test.parties, err, test.want)
		}
		if !slices.Equal(before, parties) {
			t.Errorf("%q: the list was changed", test.parties)
		}
	}
}

func TestFaultIsFoundInWrappedErrors(t *testing.T) {
	err := fmt.Errorf("session: %w", errors.Join(errors.New("other"), protocol.Faultf("beta", "%d bytes", 3)))
	var f *protocol.Fault
	if !errors.As(err, &f) || f.Host != "beta" || f.Error() != `host "beta": 3 bytes` {
		t.Errorf("got %v", f)
	}
}
