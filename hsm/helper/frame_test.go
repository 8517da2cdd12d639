package helper_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"

	"conseal/hsm"
	"conseal/hsm/helper"
	"conseal/internal/pin"
)

func FuzzFrame(f *testing.F) {
	for op := range byte(14) {
		head := append([]byte{0, 0, 0, 0, 0, 0, 0, 9}, op)
		f.Add(append(bytes.Clone(head), make([]byte, 9)...))
		f.Add(append(append(bytes.Clone(head), 0, 0, 0, 1, 0, 0, 0, 10, 2), "tblobblob..ss"...))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		var again bytes.Buffer
		r := bytes.NewReader(b)
		if err := helper.Reencode(r, &again); err != nil {
			return
		}
		if got := b[:len(b)-r.Len()]; !bytes.Equal(got, again.Bytes()) {
			t.Fatalf("%x encodes back to %x", got, again.Bytes())
		}
	})
}

func TestFramesHaveLimits(t *testing.T) {
	const good = "\x00\x00\x00\x00\x00\x00\x00\x01\x03\x00\x00\x00\x01\x00\x00\x00\x00\x00t"
	if err := helper.Reencode(strings.NewReader(good), io.Discard); err != nil {
		t.Fatal(err)
	}
	for what, change := range map[string]struct {
		at int
		to byte
	}{
		"op 0": {8, 0}, "op beyond the last": {8, 13}, "a long text": {9, 1}, "a long blob": {13, 1}, "a long secret": {17, 65},
	} {
		b := []byte(good)
		b[change.at] = change.to
		r := bytes.NewReader(append(b, make([]byte, 1<<25)...))
		if err := helper.Reencode(r, io.Discard); err == nil || r.Len() < 1<<25 {
			t.Errorf("%s: %v, after %d bytes", what, err, len(b)+1<<25-r.Len())
		}
	}
	for n := range len(good) {
		if err := helper.Reencode(strings.NewReader(good[:n]), io.Discard); n > 0 && !errors.Is(err, io.ErrUnexpectedEOF) || err == nil {
			t.Errorf("cut to %d: %v", n, err)
		}
	}
}

type noRoot struct{}

func (noRoot) Error() string { return "none" }
func (noRoot) NoRoot() bool  { return true }

// TestErrorsStayWhatTheyAre sends each kind of error through a frame.
func TestErrorsStayWhatTheyAre(t *testing.T) {
	kinds := []error{hsm.ErrNotAuthentic, hsm.ErrLost, hsm.ErrStale, pin.ErrRefused, context.Canceled, context.DeadlineExceeded}
	for _, c := range []hsm.Class{hsm.ClassSession, hsm.ClassLogin, hsm.ClassHandle, hsm.ClassToken, hsm.ClassAuth, hsm.ClassBusy,
		hsm.ClassPolicy, hsm.ClassData, hsm.ClassAmbiguous, hsm.ClassCrash, hsm.ClassHang} {
		kinds = append(kinds, &hsm.Error{Class: c, Code: 0x80000001, What: "C_Decrypt: " + string(c)})
	}
	kinds = append(kinds, noRoot{}, errors.New("plain"), fmt.Errorf("%w, %w", hsm.ErrLost, kinds[8]))
	for _, want := range kinds {
		wrapped := fmt.Errorf("hsm: opening: %w", want)
		got := helper.Failure(wrapped)
		if got.Error() != wrapped.Error() || hsm.ClassOf(got) != hsm.ClassOf(want) {
			t.Errorf("%v, of class %q, became %v, of class %q", wrapped, hsm.ClassOf(want), got, hsm.ClassOf(got))
		}
		for _, mark := range kinds[:6] {
			if errors.Is(got, mark) != errors.Is(want, mark) {
				t.Errorf("%v is %v: %v", got, mark, errors.Is(got, mark))
			}
		}
		var a, b *hsm.Error
		if errors.As(want, &a) != errors.As(got, &b) || a != nil && a.Code != b.Code {
			t.Errorf("%v became %v", a, b)
		}
		var none interface{ NoRoot() bool }
		if _, is := want.(noRoot); (errors.As(got, &none) && none.NoRoot()) != is {
			t.Errorf("%v: NoRoot is not %v", got, is)
		}
	}
	if got := helper.Failure(errors.New(strings.Repeat("x", 1<<20))); len(got.Error()) != 64<<10 {
		t.Errorf("a long error became one of %d bytes", len(got.Error()))
	}
}
