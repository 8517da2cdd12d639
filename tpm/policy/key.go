package policy

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"

	"golang.org/x/crypto/ssh"
)

// ParsePublicKey reads the public key of a security team: PEM of a
// SubjectPublicKeyInfo, or the line that ssh-keygen writes to a .pub file.
func ParsePublicKey(b []byte) (*ecdsa.PublicKey, error) {
	var key any
	block, rest := pem.Decode(b)
	switch {
	case block != nil && (block.Type != "PUBLIC KEY" || len(bytes.TrimSpace(rest)) > 0):
		return nil, fmt.Errorf("wants one PUBLIC KEY, has %s", block.Type)
	case block != nil:
		var err error
		if key, err = x509.ParsePKIXPublicKey(block.Bytes); err != nil {
			return nil, err
		}
	default:
		line, _, _, rest, err := ssh.ParseAuthorizedKey(b)
		if err != nil || len(bytes.TrimSpace(rest)) > 0 {
			return nil, errors.New("neither PEM nor one line of ssh-keygen")
		}
		if c, ok := line.(ssh.CryptoPublicKey); ok {
			key = c.CryptoPublicKey()
		}
	}
	return onP256(key)
}

func onP256(key any) (*ecdsa.PublicKey, error) {
	public, ok := key.(*ecdsa.PublicKey)
	if !ok || public.Curve != elliptic.P256() {
		return nil, errors.New("not ECDSA on P-256, which every TPM has: make one with `ssh-keygen -t ecdsa -b 256`")
	}
	return public, nil
}

// PublicKey is a signer's, if it may be a policy key.
func PublicKey(s crypto.Signer) (*ecdsa.PublicKey, error) { return onP256(s.Public()) }

// ErrNotEncrypted is returned for a private key that anybody can read who has its file.
var ErrNotEncrypted = errors.New("the private key has no passphrase: set one with `ssh-keygen -p -f FILE`")

// ParsePrivateKey reads the private key of a security team as ssh-keygen makes it, with
// a passphrase.
func ParsePrivateKey(b, passphrase []byte) (crypto.Signer, error) {
	_, err := ssh.ParseRawPrivateKey(b)
	var encrypted *ssh.PassphraseMissingError
	switch {
	case err == nil:
		return nil, ErrNotEncrypted
	case !errors.As(err, &encrypted):
		return nil, fmt.Errorf("not a private key of ssh-keygen: %w", err)
	}
	key, err := ssh.ParseRawPrivateKeyWithPassphrase(b, passphrase)
	if errors.Is(err, x509.IncorrectPasswordError) {
		return nil, errors.New("the passphrase is not that of the key")
	}
	if err != nil {
		return nil, err
	}
	signer, ok := key.(crypto.Signer)
	if !ok {
		return nil, fmt.Errorf("a %T cannot sign", key)
	}
	_, err = PublicKey(signer)
	return signer, err
}
