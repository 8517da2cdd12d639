package helper

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"conseal/internal/secret"
)

// frame is one message between agent and helper:
//
//	id (8) | op (1) | length of text (4) | of blob (4) | of secret (1) | text | blob | secret
//
// Numbers are big-endian. Each side reads a secret from the socket straight into a
// [secret.Bytes], and writes it from there.
type frame struct {
	id     uint64 // of the question, and of its answer
	op     op
	text   string
	blob   []byte
	secret *secret.Bytes // nil: none
}

// op says what a frame asks or answers.
type op byte

const (
	opStart     op = iota + 1 // text: hsm.Config as JSON; answer: the token's name
	opProvision               // text: hsm.Config as JSON; answer: hsm.Provisioned as JSON
	opWithdraw                // the same
	opSeal                    // text: id; answer: blob and key
	opOpen                    // text: id, blob; answer: key
	opRoot                    // answer: root
	opSetRoot                 // secret: the next root
	opIdentity                // answer: public key, PKIX
	opSign                    // blob: digest; answer: signature
	opCancel                  // of the question with this id, which is answered all the same
	opDone                    // an answer
	opFailed                  // an answer: see fault
	opEnd
)

func (o op) String() string {
	return [opEnd]string{opStart: "opening the token", opProvision: "provisioning", opWithdraw: "withdrawing", opSeal: "sealing", opOpen: "opening a key",
		opRoot: "reading the root", opSetRoot: "setting the root", opIdentity: "reading the identity", opSign: "signing"}[o]
}

// secret tells whether the answer to a question has a secret, which its asker wipes.
func (o op) secret() bool { return o == opSeal || o == opOpen || o == opRoot }

const (
	frameHead = 8 + 1 + 4 + 4 + 1
	maxText   = 64 << 10
	maxBlob   = 64 << 10
	maxSecret = 64
)

var errFrame = errors.New("not a message of this protocol")

// check says whether the frame can be sent.
func (f *frame) check() error {
	n := 0
	if f.secret != nil {
		n = f.secret.Len()
	}
	if len(f.text) > maxText || len(f.blob) > maxBlob || n > maxSecret || f.secret != nil && n == 0 {
		return fmt.Errorf("%w: a text of %d bytes, a blob of %d and a secret of %d: at most %d, %d and 1 to %d fit",
			errFrame, len(f.text), len(f.blob), n, maxText, maxBlob, maxSecret)
	}
	return nil
}

func (f *frame) write(w io.Writer) error {
	if err := f.check(); err != nil {
		return err
	}
	if f.secret == nil {
		_, err := w.Write(f.head(0))
		return err
	}
	return f.secret.Use(func(b []byte) error {
		if _, err := w.Write(f.head(len(b))); err != nil {
			return err
		}
		_, err := w.Write(b)
		return err
	})
}

// head is the frame but for its secret.
func (f *frame) head(secret int) []byte {
	b := make([]byte, 0, frameHead+len(f.text)+len(f.blob))
	b = binary.BigEndian.AppendUint64(b, f.id)
	b = append(b, byte(f.op))
	b = binary.BigEndian.AppendUint32(b, uint32(len(f.text)))
	b = binary.BigEndian.AppendUint32(b, uint32(len(f.blob)))
	b = append(b, byte(secret))
	return append(append(b, f.text...), f.blob...)
}

// readFrame reads no byte more than the frame, for what follows may be a secret.
func readFrame(r io.Reader) (*frame, error) {
	var head [frameHead]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return nil, err
	}
	f := &frame{id: binary.BigEndian.Uint64(head[:]), op: op(head[8])}
	text, blob := binary.BigEndian.Uint32(head[9:]), binary.BigEndian.Uint32(head[13:])
	if f.op == 0 || f.op >= opEnd || text > maxText || blob > maxBlob || head[17] > maxSecret {
		return nil, errFrame
	}
	body := make([]byte, text+blob)
	if _, err := io.ReadFull(r, body); err != nil {
		return nil, whole(err)
	}
	f.text, f.blob = string(body[:text]), body[text:]
	if head[17] > 0 {
		var err error
		if f.secret, err = secret.Read(r, int(head[17])); err != nil {
			return nil, whole(err)
		}
	}
	return f, nil
}

// whole makes an end inside a frame an error of its own.
func whole(err error) error {
	if err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return err
}
