package tpm

import (
	"context"
	"encoding/pem"
	"net"
	"time"

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

// SetTimeout is of the commands from now on. Nobody uses t meanwhile.
func (t *TPM) SetTimeout(d time.Duration) {
	t.cfg.Timeout = d
	if t.conn != nil {
		t.conn.timeout = d
	}
}

// SendOver sends one command over a connection, as a transaction does.
func SendOver(ctx context.Context, c net.Conn, timeout time.Duration, cmd []byte) (answer []byte, err error) {
	return (&TPM{conn: &conn{s: c, timeout: timeout}}).newTx(ctx).Send(cmd)
}
