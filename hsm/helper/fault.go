package helper

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"

	"conseal/hsm"
	"conseal/internal/pin"
)

// fault is an error that came from the helper. It has the text that it had there,
// and is what it was: [hsm.ClassOf] and errors.Is say the same on both sides.
type fault struct {
	text   string
	token  *hsm.Error // nil unless there was one
	is     []error    // of marks
	noRoot bool
}

// marks are the errors that keep their identity on the way. Their order is the
// protocol's.
func marks() []error {
	return []error{hsm.ErrNotAuthentic, hsm.ErrLost, hsm.ErrStale, pin.ErrRefused, context.Canceled, context.DeadlineExceeded}
}

// noRootMark stands for an error with a method NoRoot.
const noRootMark = 1 << 15

func (f *fault) Error() string { return f.text }

// NoRoot tells that the token never had a root.
func (f *fault) NoRoot() bool { return f.noRoot }

func (f *fault) Unwrap() []error {
	if f.token == nil {
		return f.is
	}
	return append([]error{f.token}, f.is...)
}

// failure is the frame that carries an error: its text, and
//
//	marks (2) | class of the token's error, if there was one, and its code (8)
func failure(id uint64, err error) *frame {
	var set uint16
	for i, mark := range marks() {
		if errors.Is(err, mark) {
			set |= 1 << i
		}
	}
	var none interface{ NoRoot() bool }
	if errors.As(err, &none) && none.NoRoot() {
		set |= noRootMark
	}
	f := &frame{id: id, op: opFailed, text: err.Error(), blob: binary.BigEndian.AppendUint16(nil, set)}
	f.text = f.text[:min(len(f.text), maxText)]
	var token *hsm.Error
	if errors.As(err, &token) {
		f.blob = binary.BigEndian.AppendUint64(append(f.blob, token.Class...), uint64(token.Code))
	}
	return f
}

// cause is the error of a frame that [failure] made.
func (f *frame) cause() error {
	n := len(f.blob)
	if n != 2 && n < 2+8 || f.secret != nil || f.text == "" {
		return fmt.Errorf("the helper's error: %w", errFrame)
	}
	out := &fault{text: f.text}
	set := binary.BigEndian.Uint16(f.blob)
	for i, mark := range marks() {
		if set&(1<<i) != 0 {
			out.is = append(out.is, mark)
		}
	}
	out.noRoot = set&noRootMark != 0
	if n > 2 {
		out.token = &hsm.Error{Class: hsm.Class(f.blob[2 : n-8]), Code: uint(binary.BigEndian.Uint64(f.blob[n-8:])), What: f.text}
	}
	return out
}
