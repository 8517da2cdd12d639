package policy_test

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"testing"

	"golang.org/x/crypto/ssh"

	"conseal/tpm/policy"
)

func encrypted(t *testing.T, key crypto.PrivateKey) []byte {
	t.Helper()
	block, err := ssh.MarshalPrivateKeyWithPassphrase(key, "", []byte("phrase"))
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(block)
}

func TestKeys(t *testing.T) {
	key := newKey(t)
	spki, err := x509.MarshalPKIXPublicKey(&key.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	line, err := ssh.NewPublicKey(&key.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	asPEM := pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: spki})
	asLine := ssh.MarshalAuthorizedKey(line)
	for _, b := range [][]byte{asPEM, asLine} {
		got, err := policy.ParsePublicKey(b)
		if err != nil || !got.Equal(&key.PublicKey) {
			t.Errorf("%s: %v", b, err)
		}
	}
	private := encrypted(t, key)
	if got, err := policy.ParsePrivateKey(private, []byte("phrase")); err != nil || !key.PublicKey.Equal(got.Public()) {
		t.Errorf("the private key: %v", err)
	}
	if _, err := policy.ParsePrivateKey(private, []byte("another")); err == nil {
		t.Error("opened with another passphrase")
	}

	_, ed, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	large, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	for _, other := range []crypto.Signer{ed, large} {
		if _, err := policy.ParsePrivateKey(encrypted(t, other), []byte("phrase")); err == nil {
			t.Errorf("a %T was taken", other)
		}
		public, err := ssh.NewPublicKey(other.Public())
		if err != nil {
			t.Fatal(err)
		}
		if _, err := policy.ParsePublicKey(ssh.MarshalAuthorizedKey(public)); err == nil {
			t.Errorf("the public key of a %T was taken", other)
		}
	}
	open, err := ssh.MarshalPrivateKey(key, "")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := policy.ParsePrivateKey(pem.EncodeToMemory(open), nil); !errors.Is(err, policy.ErrNotEncrypted) {
		t.Errorf("a key without a passphrase: %v", err)
	}
	for name, bad := range map[string][]byte{
		"nothing": nil, "two lines": append(asLine, asLine...), "two blocks": append(asPEM, asPEM...), "the private key": private, "cut": asPEM[:40],
	} {
		if _, err := policy.ParsePublicKey(bad); err == nil {
			t.Errorf("%s was taken for a public key", name)
		}
	}
}
