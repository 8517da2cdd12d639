package tpm_test

import (
	"bytes"
	"crypto/elliptic"
	"testing"

	"conseal/tpm"
)

// sealedBlob is well formed, and opens nowhere.
func sealedBlob(pcrs ...byte) []byte {
	b := append([]byte("conseal tpm sealed 1\n"), byte(len(pcrs)))
	for _, n := range pcrs {
		b = append(append(b, n), make([]byte, 32)...)
	}
	b = append(b, make([]byte, 32)...)
	return append(b, 0, 3, 'a', 'b', 'c')
}

func TestSealedBlobRefusals(t *testing.T) {
	for name, blob := range map[string][]byte{
		"empty":         nil,
		"unsorted":      sealedBlob(7, 4),
		"PCR twice":     sealedBlob(7, 7),
		"PCR 24":        sealedBlob(24),
		"more":          append(sealedBlob(7), 0),
		"less":          sealedBlob(7)[:60],
		"no private":    append(sealedBlob(7)[:len(sealedBlob(7))-5], 0, 0),
		"other version": bytes.Replace(sealedBlob(7), []byte("1"), []byte("2"), 1),
	} {
		if _, err := tpm.RecodeSealed(blob); tpm.ClassOf(err) != tpm.ClassCorrupt {
			t.Errorf("%s: %v", name, err)
		}
	}
	for _, good := range [][]byte{sealedBlob(4, 7), sealedBlob()} {
		if _, err := tpm.RecodeSealed(good); err != nil {
			t.Errorf("control: %v", err)
		}
	}
}

func FuzzSealedBlob(f *testing.F) {
	f.Add(sealedBlob(7))
	f.Add(sealedBlob(0, 1, 2, 3, 4, 5, 6, 7, 8, 23))
	f.Fuzz(func(t *testing.T, blob []byte) { recodes(t, blob, tpm.RecodeSealed) })
}

func FuzzIdentityBlob(f *testing.F) {
	g := elliptic.P256().Params()
	point := append(g.Gx.FillBytes(make([]byte, 32)), g.Gy.FillBytes(make([]byte, 32))...)
	f.Add(append(append([]byte("conseal tpm identity 1\n"), point...), 0, 1, 'x'))
	f.Fuzz(func(t *testing.T, blob []byte) { recodes(t, blob, tpm.RecodeIdentity) })
}

// recodes wants that what is accepted encodes back the same.
func recodes(t *testing.T, blob []byte, recode func([]byte) ([]byte, error)) {
	again, err := recode(blob)
	if err == nil && !bytes.Equal(again, blob) {
		t.Errorf("%x encodes back as %x", blob, again)
	}
}
