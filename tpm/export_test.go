package tpm

import (
	"context"
	"encoding/pem"

	"conseal/tpm/attest"
)

// RecodeSealed decodes a blob of Seal and encodes it again.
func RecodeSealed(blob []byte) ([]byte, error) {
	s, err := decodeSealed(blob)
	if err != nil {
		return nil, err
	}
	return s.encode(), nil
}

// RecodeIdentity decodes a blob of an identity and encodes it again.
func RecodeIdentity(blob []byte) ([]byte, error) {
	k, err := decodeIdentity(blob)
	if err != nil {
		return nil, err
	}
	return k.blob.encode(pem.Block{}), nil
}

// OpenChallenge gives what a challenge holds, which a host does not tell.
func (t *TPM) OpenChallenge(ctx context.Context, c *attest.Challenge) (held []byte, err error) {
	err = t.transact(ctx, "opening a challenge", func(x *tx) error {
		held, err = x.activate(c)
		return err
	})
	return held, err
}
