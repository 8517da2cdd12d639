package hsm

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
)

// envelope is 32 bytes wrapped by a key in the token. Its form is
//
//	"CSHM" | number of the method | kind | key id (16) | body
//
// where a plan has no body. What the body is, the method says. The method's number
// is there to say what is wrong after the configuration was changed: no blob chooses
// how it is opened. All before the body is part of what the method binds.
type envelope struct {
	method byte
	kind   byte
	key    keyID
	body   []byte
}

const (
	magic   = "CSHM"
	keySize = 32

	kindShare = 's' // a share's key, under the host's wrapping key
	kindRoot  = 'r' // the root, under a root key
	kindPlan  = 'p' // the id of a root key about to be made

	headerSize = len(magic) + 2 + len(keyID{})
	maxBody    = 2048 // of any method: RSA-8192, its signature and what is under it
)

// keyID is a key's CKA_ID. A root key's is its generation (8 bytes, big-endian)
// and 8 random bytes; the wrapping key's is random.
type keyID [16]byte

func (id keyID) generation() uint64 { return binary.BigEndian.Uint64(id[:8]) }

func (e *envelope) header() []byte {
	return append(append([]byte(magic), e.method, e.kind), e.key[:]...)
}

func (e *envelope) encode() []byte { return append(e.header(), e.body...) }

var errEnvelope = errors.New("not a blob of this version")

func decodeEnvelope(b []byte) (*envelope, error) {
	if len(b) < headerSize || len(b) > headerSize+maxBody || !bytes.HasPrefix(b, []byte(magic)) {
		return nil, errEnvelope
	}
	e := &envelope{method: b[len(magic)], kind: b[len(magic)+1], key: keyID(b[len(magic)+2 : headerSize])}
	if methodName(e.method) == "" {
		return nil, errEnvelope
	}
	e.body = bytes.Clone(b[headerSize:])
	switch {
	case e.kind == kindPlan && len(e.body) == 0:
		return e, nil
	case (e.kind == kindShare || e.kind == kindRoot) && len(e.body) > 0:
		return e, nil
	}
	return nil, errEnvelope
}

// made refuses an envelope of another method than the host's.
func (e *envelope) made(method byte) error {
	if e.method == method {
		return nil
	}
	return fmt.Errorf("made by method %s, and this host's is %s: if that was changed, change it back: %w",
		methodName(e.method), methodName(method), ErrNotAuthentic)
}

// bind is what a method binds an envelope to: what it is, under which key's
// label, and what for. Every field has its length in front.
func (e *envelope) bind(label, id string) []byte {
	var b []byte
	for _, f := range [][]byte{[]byte("conseal hsm v1"), e.header(), []byte(label), []byte(id)} {
		b = binary.BigEndian.AppendUint32(b, uint32(len(f)))
		b = append(b, f...)
	}
	return b
}
