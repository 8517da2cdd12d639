package helper

import "io"

// Pending counts the questions that the helper has to answer.
func (h *HSM) Pending() int {
	h.mu.Lock()
	p := h.process
	h.mu.Unlock()
	if p == nil {
		return 0
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.calls)
}

// Failure is what becomes of an error on its way through a frame.
func Failure(err error) error { return failure(1, err).cause() }

// Reencode reads a frame and writes it, and makes the error of an error's frame.
func Reencode(r io.Reader, w io.Writer) error {
	f, err := readFrame(r)
	if err != nil {
		return err
	}
	defer f.secret.Wipe()
	if f.op == opFailed {
		_ = f.cause().Error()
	}
	return f.write(w)
}

// Send writes a frame as an agent that is not ours might.
func Send(w io.Writer, id uint64, o byte, text string, blob []byte) error {
	return (&frame{id: id, op: op(o), text: text, blob: blob}).write(w)
}
