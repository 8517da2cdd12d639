package tpm

import (
	"bytes"
	"encoding/asn1"
	"encoding/pem"

	keyfile "github.com/foxboron/go-tpm-keyfiles"
	"github.com/google/go-tpm/tpm2"
)

// What rests outside the TPM is a TSS2 PRIVATE KEY (draft-bottomley-tpm2-keys), PEM, with
// the owner's P-256 storage key of template H-2 as its parent: OpenSSL, tpm2-tools and
// others read it too. The optional fields for policies are left out: tpm2-tools cannot
// read a file that has them. What only we need follows as a PEM block of our own.

// tss2 is what such a file has of an object.
type tss2 struct {
	kind    asn1.ObjectIdentifier // keyfile.OIDSealedKey or OIDLoadableKey
	pin     bool                  // it has an authorization value
	public  []byte                // TPMT_PUBLIC
	private []byte                // TPM2B_PRIVATE's buffer: encrypted and authenticated by the TPM under the SRK
}

// maxBlob bounds a file, and maxPrivate what of it the TPM encrypted.
const (
	maxBlob    = 16 << 10
	maxPrivate = 1024
)

// encode writes the file, with one more block if extra has a type.
func (k *tss2) encode(extra pem.Block) []byte {
	b := pem.EncodeToMemory(&pem.Block{Type: tss2Type, Bytes: keyfile.Marshal(&keyfile.TPMKey{
		Keytype:   k.kind,
		EmptyAuth: !k.pin,
		Parent:    tpm2.TPMRHOwner,
		Pubkey:    tpm2.BytesAs2B[tpm2.TPMTPublic](k.public),
		Privkey:   tpm2.TPM2BPrivate{Buffer: k.private},
	})})
	if extra.Type == "" {
		return b
	}
	return append(b, pem.EncodeToMemory(&extra)...)
}

const tss2Type = "TSS2 PRIVATE KEY"

// decodeTSS2 takes a file apart into the key and, if extraType is not empty, the
// content of the block that must follow. ok means that encode gives the same bytes
// again; the caller makes sure that public is what it should be.
func decodeTSS2(b []byte, kind asn1.ObjectIdentifier, extraType string) (k *tss2, extra []byte, ok bool) {
	if len(b) > maxBlob {
		return nil, nil, false
	}
	block, rest := pem.Decode(b)
	if block == nil || block.Type != tss2Type {
		return nil, nil, false
	}
	parsed, err := keyfile.Parse(block.Bytes)
	if err != nil || !parsed.Keytype.Equal(kind) || len(parsed.Privkey.Buffer) == 0 || len(parsed.Privkey.Buffer) > maxPrivate {
		return nil, nil, false
	}
	k = &tss2{kind, !parsed.EmptyAuth, parsed.Pubkey.Bytes(), parsed.Privkey.Buffer}
	var second pem.Block
	if extraType != "" {
		block, rest := pem.Decode(rest)
		if block == nil || block.Type != extraType || len(rest) > 0 {
			return nil, nil, false
		}
		second = pem.Block{Type: extraType, Bytes: block.Bytes}
	}
	return k, second.Bytes, bytes.Equal(k.encode(second), b)
}
