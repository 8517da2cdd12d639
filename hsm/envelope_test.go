package hsm_test

import (
	"bytes"
	"testing"

	"conseal/hsm"
)

func FuzzDecodeEnvelope(f *testing.F) {
	for _, kind := range "srpx" {
		head := append([]byte("CSHM\x01"), byte(kind))
		f.Add(append(bytes.Clone(head), make([]byte, 16)...))
		f.Add(append(bytes.Clone(head), make([]byte, 76)...))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		again, err := hsm.Reencode(b)
		if err == nil && !bytes.Equal(b, again) {
			t.Fatalf("%x encodes back to %x", b, again)
		}
	})
}
