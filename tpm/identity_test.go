package tpm_test

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"io"
	"math/big"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"

	"conseal/testenv"
)

func sign(s crypto.Signer) error {
	digest := sha256.Sum256([]byte("a message"))
	signature, err := s.Sign(nil, digest[:], crypto.SHA256)
	if err != nil {
		return err
	}
	if !ecdsa.VerifyASN1(s.Public().(*ecdsa.PublicKey), digest[:], signature) {
		return errors.New("the signature does not verify")
	}
	return nil
}

func netDial(address string) (net.Conn, error) {
	return net.Dial("unix", strings.TrimPrefix(address, "unix:"))
}

func readCommand(r io.Reader) ([]byte, error) {
	head := make([]byte, 10)
	if _, err := io.ReadFull(r, head); err != nil {
		return nil, err
	}
	cmd := make([]byte, binary.BigEndian.Uint32(head[2:]))
	copy(cmd, head)
	_, err := io.ReadFull(r, cmd[10:])
	return cmd, err
}

func TestIdentity(t *testing.T) {
	h := newHost(t)
	s, err := h.Identity(t.Context(), h.made.Identity)
	if err != nil {
		t.Fatal(err)
	}
	if err := sign(s); err != nil {
		t.Fatal(err)
	}
	long := make([]byte, 64)
	for name, c := range map[string]struct {
		digest []byte
		opts   crypto.SignerOpts
	}{
		"short digest": {long[:31], crypto.SHA256},
		"long digest":  {long[:48], crypto.SHA256},
		"SHA-384":      {long[:48], crypto.SHA384},
		"SHA-512/256":  {long[:32], crypto.SHA512_256},
		"no hash":      {long[:32], crypto.Hash(0)},
		"no options":   {long[:32], nil},
		"empty":        {nil, crypto.SHA256},
	} {
		if _, err := s.Sign(nil, c.digest, c.opts); err == nil {
			t.Errorf("%s was signed", name)
		}
	}

	h.reboot(t)
	h.TPM = open(t, h.cfg)
	again, err := h.Identity(t.Context(), h.made.Identity)
	if err != nil {
		t.Fatal(err)
	}
	if !s.Public().(*ecdsa.PublicKey).Equal(again.Public()) {
		t.Error("another key after the reboot")
	}
	stranger := newHost(t)
	if _, err := stranger.Identity(t.Context(), h.made.Identity); err == nil {
		t.Error("another TPM has this identity")
	}
}

// What the TPM itself says of the key that is loaded for a signature.
func TestIdentityCannotLeaveTheTPM(t *testing.T) {
	h := newHost(t)
	s, err := h.Identity(t.Context(), h.made.Identity)
	if err != nil {
		t.Fatal(err)
	}
	var seen *tpm2.TPMTPublic
	var duplicate error
	h.tap.Intercept(func(cmd []byte, next testenv.Exchange) ([]byte, error) {
		if code(cmd) != tpm2.TPMCCSign {
			return next(cmd)
		}
		key := tpm2.TPMHandle(binary.BigEndian.Uint32(cmd[10:]))
		rsp, err := tpm2.ReadPublic{ObjectHandle: key}.Execute(h.tap)
		if err != nil {
			return nil, err
		}
		if seen, err = rsp.OutPublic.Contents(); err != nil {
			return nil, err
		}
		_, duplicate = tpm2.Duplicate{
			ObjectHandle:    tpm2.AuthHandle{Handle: key, Name: rsp.Name, Auth: tpm2.PasswordAuth(nil)},
			NewParentHandle: tpm2.TPMRHNull,
			Symmetric:       tpm2.TPMTSymDef{Algorithm: tpm2.TPMAlgNull},
		}.Execute(h.tap)
		return next(cmd)
	})
	if err := sign(s); err != nil {
		t.Fatal(err)
	}
	if seen == nil {
		t.Fatal("no signature came by")
	}
	want := tpm2.TPMAObject{FixedTPM: true, FixedParent: true, SensitiveDataOrigin: true, UserWithAuth: true, NoDA: true, SignEncrypt: true}
	if seen.ObjectAttributes != want {
		t.Errorf("attributes %+v", seen.ObjectAttributes)
	}
	if duplicate == nil {
		t.Error("the key can be duplicated")
	}
}

func TestIdentityInTLS(t *testing.T) {
	h := newHost(t)
	s, err := h.Identity(t.Context(), h.made.Identity)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, s.Public(), s)
	if err != nil {
		t.Fatal(err)
	}
	cfg := &tls.Config{
		Certificates:       []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: s}},
		MinVersion:         tls.VersionTLS13,
		ClientAuth:         tls.RequireAnyClientCert,
		InsecureSkipVerify: true, // the handshake proves the key; names are not the point
	}
	a, b := net.Pipe()
	server := tls.Server(a, cfg)
	failed := make(chan error, 1)
	go func() { failed <- server.HandshakeContext(t.Context()) }()
	client := tls.Client(b, cfg)
	if err := client.HandshakeContext(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := <-failed; err != nil {
		t.Fatal(err)
	}
	for _, state := range []tls.ConnectionState{client.ConnectionState(), server.ConnectionState()} {
		if !s.Public().(*ecdsa.PublicKey).Equal(state.PeerCertificates[0].PublicKey) {
			t.Error("the peer has another key")
		}
	}
}
