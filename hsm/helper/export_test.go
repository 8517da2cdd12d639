package helper

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"io"
	"os"
	"time"

	"conseal/internal/secret"
)

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

// Expire lets the deadlines of all calls that are under way pass.
func (h *HSM) Expire() {
	h.mu.Lock()
	p := h.process
	h.mu.Unlock()
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, c := range p.calls {
		c.deadline.Reset(0)
	}
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

// Lie is a helper that opens a token that is not there and lies from then on.
func Lie(conn *os.File, kind string) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return
	}
	public, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		return
	}
	for {
		q, err := readFrame(conn)
		if err != nil {
			return
		}
		a := &frame{id: q.id, op: opDone}
		switch {
		case q.op == opStart:
			a.text = "a token"
		case kind == "deaf" && q.op == opSeal:
			a.blob, a.secret = []byte("blob"), secret.Random(32)
			_ = a.write(conn)
			time.Sleep(time.Hour)
		case kind == "short":
			if a.blob = bytes.Repeat([]byte("x"), 40); q.op.secret() {
				a.secret = secret.Random(31)
			}
		case kind == "secrets":
			a.secret = secret.Random(64)
		case kind == "secrets-in-errors":
			a.op, a.text, a.blob, a.secret = opFailed, "bad", []byte{0, 0}, secret.Random(64)
		case kind == "other-key" && q.op == opIdentity:
			a.blob = public
		case kind == "other-key":
			a.blob, _ = ecdsa.SignASN1(rand.Reader, key, bytes.Repeat([]byte{1}, 32))
		case kind == "other-id":
			a.id++
		case kind == "question":
			a.op = opRoot
		case kind == "bad-error":
			a.op, a.text, a.blob = opFailed, "bad", []byte("123")
		case kind == "noise":
			_, _ = conn.Write(bytes.Repeat([]byte{0xff}, 100))
			continue
		}
		if a.write(conn) != nil {
			return
		}
		a.secret.Wipe()
	}
}
