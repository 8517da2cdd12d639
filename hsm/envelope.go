package hsm

import (
	"bytes"
	"encoding/binary"
	"errors"
)

// envelope is 32 bytes wrapped by a key in the token. Its form is
//
//	"CSHM" | version 1 | kind | key id (16) | IV (12) | ciphertext (32) and tag (16)
//
// where a plan stops after the key id. The header up to the IV is part of the
// associated data.
type envelope struct {
	kind byte
	key  keyID
	iv   [ivSize]byte
	ct   [keySize + tagSize]byte
}

const (
	magic   = "CSHM\x01"
	keySize = 32
	ivSize  = 12
	tagSize = 16

	kindShare = 's' // a share's key, under the host's wrapping key
	kindRoot  = 'r' // the root, under a root key
	kindPlan  = 'p' // the id of a root key about to be made

	headerSize   = len(magic) + 1 + len(keyID{})
	envelopeSize = headerSize + ivSize + keySize + tagSize
)

// keyID is a key's CKA_ID. A root key's is its generation (8 bytes, big-endian)
// and 8 random bytes; the wrapping key's is random.
type keyID [16]byte

func (id keyID) generation() uint64 { return binary.BigEndian.Uint64(id[:8]) }

func (e *envelope) header() []byte {
	b := append([]byte(magic), e.kind)
	return append(b, e.key[:]...)
}

func (e *envelope) encode() []byte {
	b := e.header()
	if e.kind == kindPlan {
		return b
	}
	return append(append(b, e.iv[:]...), e.ct[:]...)
}

var errEnvelope = errors.New("not a blob of this version")

func decodeEnvelope(b []byte) (*envelope, error) {
	if len(b) < headerSize || !bytes.HasPrefix(b, []byte(magic)) {
		return nil, errEnvelope
	}
	e := &envelope{kind: b[len(magic)], key: keyID(b[len(magic)+1 : headerSize])}
	body := b[headerSize:]
	switch {
	case e.kind == kindPlan && len(body) == 0:
		return e, nil
	case (e.kind == kindShare || e.kind == kindRoot) && len(b) == envelopeSize:
		e.iv = [ivSize]byte(body[:ivSize])
		e.ct = [keySize + tagSize]byte(body[ivSize:])
		return e, nil
	}
	return nil, errEnvelope
}

// bind is the associated data of an envelope: what it is, under which key's
// label, and what for. Every field has its length in front.
func (e *envelope) bind(label, id string) []byte {
	var b []byte
	for _, f := range [][]byte{[]byte("conseal hsm v1"), e.header(), []byte(label), []byte(id)} {
		b = binary.BigEndian.AppendUint32(b, uint32(len(f)))
		b = append(b, f...)
	}
	return b
}
