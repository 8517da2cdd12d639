package peer

import (
	"bufio"
	"io"

	"conseal/agent/peer/peerpb"
)

// ReadFrames reads what a stream carries after the handshake, until the error.
func ReadFrames(r io.Reader, limit int) ([]*peerpb.Frame, error) {
	frames := frameReader{bufio.NewReaderSize(r, 256), limit}
	var all []*peerpb.Frame
	for {
		f, err := frames.next()
		if err != nil {
			return all, err
		}
		all = append(all, f)
	}
}

// AppendFrame encodes a frame as a stream carries it.
var AppendFrame = appendFrame

// IsMalformed tells what no peer may send from what a connection suffers.
func IsMalformed(err error) bool {
	_, ok := err.(malformed)
	return ok
}
