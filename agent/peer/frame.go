package peer

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	"conseal/agent/peer/peerpb"
)

// A frame travels as its length, a varint, and its protobuf encoding: what
// package protodelim of google.golang.org/protobuf writes. It is read here so
// that it can be looked at before memory is spent on decoding it.

// maxFields bounds the fields of a frame's body. An empty field takes two bytes
// on the wire and some hundred in memory.
const maxFields = 1024

// malformed is what no peer may send.
type malformed string

func (e malformed) Error() string { return string(e) }

// frameReader reads frames of at most limit bytes.
type frameReader struct {
	in    *bufio.Reader
	limit int
}

// next returns a frame with a body. The error is malformed or the reader's; it
// is io.EOF only between frames.
func (r frameReader) next() (*peerpb.Frame, error) {
	size, err := r.size()
	if err != nil {
		return nil, err
	}
	b, err := r.in.Peek(size) // without a copy: Unmarshal makes one
	switch {
	case err == nil:
		defer func() { _, _ = r.in.Discard(size) }()
	case errors.Is(err, bufio.ErrBufferFull):
		b = make([]byte, size)
		_, err = io.ReadFull(r.in, b)
	}
	if err == io.EOF {
		err = io.ErrUnexpectedEOF
	}
	if err != nil {
		return nil, err
	}
	return decode(b)
}

func (r frameReader) size() (int, error) {
	var prefix [binary.MaxVarintLen64]byte
	for i := range prefix {
		b, err := r.in.ReadByte()
		if err == io.EOF && i > 0 {
			err = io.ErrUnexpectedEOF
		}
		if err != nil {
			return 0, err
		}
		prefix[i] = b
		if b >= 0x80 {
			continue
		}
		size, n := binary.Uvarint(prefix[:i+1])
		if n <= 0 {
			break
		}
		if size > uint64(r.limit) {
			return 0, malformed(fmt.Sprintf("frame of %d bytes is over the limit of %d", size, r.limit))
		}
		return int(size), nil
	}
	return 0, malformed("frame without a valid length")
}

func decode(b []byte) (*peerpb.Frame, error) {
	if err := checkShape(b); err != nil {
		return nil, err
	}
	f := &peerpb.Frame{}
	if err := (proto.UnmarshalOptions{DiscardUnknown: true}).Unmarshal(b, f); err != nil {
		return nil, malformed("frame is not valid protobuf")
	}
	if f.Body == nil {
		return nil, malformed("frame of an unknown kind")
	}
	return f, nil
}

// checkShape lets pass one body of not too many fields.
func checkShape(b []byte) error {
	_, kind, n := protowire.ConsumeTag(b)
	if n < 0 || kind != protowire.BytesType {
		return malformed("frame without a body")
	}
	body, m := protowire.ConsumeBytes(b[n:])
	if m < 0 || n+m != len(b) {
		return malformed("frame without exactly one body")
	}
	for fields := 0; len(body) > 0; fields++ {
		_, _, size := protowire.ConsumeField(body)
		if size < 0 {
			return malformed("frame is not valid protobuf")
		}
		if fields == maxFields {
			return malformed(fmt.Sprintf("frame of more than %d fields", maxFields))
		}
		body = body[size:]
	}
	return nil
}

// appendFrame appends a frame of at most limit bytes with its length. On an error
// nothing is appended.
func appendFrame(b []byte, f *peerpb.Frame, limit int) ([]byte, error) {
	if f.GetBody() == nil {
		return b, errors.New("frame without a body")
	}
	size := proto.Size(f)
	if size > limit {
		return b, fmt.Errorf("frame of %d bytes is over the limit of %d", size, limit)
	}
	out, err := proto.MarshalOptions{UseCachedSize: true}.MarshalAppend(binary.AppendUvarint(b, uint64(size)), f)
	if err != nil {
		return b, fmt.Errorf("encoding frame: %w", err)
	}
	return out, nil
}
