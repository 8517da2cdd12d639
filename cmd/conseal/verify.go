package main

import (
	"crypto/ed25519"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"conseal/agent/api"
)

func verifyCommand(e *env) *cobra.Command {
	var signature, publicKey string
	c := &cobra.Command{
		Use:   "verify (KEY | --public-key FILE) --signature FILE [FILE]",
		Short: "Verify a signature",
		Long: `Verify a signature over a file, or standard input.

The public key is the agent's KEY, or a PEM file, and then no agent is needed.
The signature may be raw, hexadecimal or base64.`,
		Example: `  conseal verify release --signature app.tar.gz.sig app.tar.gz
  conseal verify --public-key release.pem --signature app.tar.gz.sig app.tar.gz`,
		Args: args(0, 2),
		RunE: func(c *cobra.Command, args []string) error {
			if signature == "" {
				return usageError{errors.New("--signature FILE is missing")}
			}
			var public []byte
			var err error
			if publicKey != "" {
				public, err = readPEM(publicKey)
			} else {
				if len(args) == 0 {
					return usageError{errors.New("name a KEY, or give --public-key FILE")}
				}
				public, err = e.publicKey(c, args[0])
				args = args[1:]
			}
			if err != nil {
				return err
			}
			if len(args) > 1 {
				return usageError{fmt.Errorf("usage: %s", c.UseLine())}
			}
			message, err := readInput(e.in, args)
			if err != nil {
				return err
			}
			sig, err := readSignature(signature)
			if err != nil {
				return err
			}
			if err := verify(public, message, sig); err != nil {
				return err
			}
			if e.json {
				_, err = fmt.Fprintln(e.out, `{"valid":true}`)
				return err
			}
			_, err = fmt.Fprintln(e.out, "valid")
			return err
		},
	}
	e.socketFlag(c, "CONSEAL_SIGN_SOCKET", api.SignSocket)
	c.Flags().StringVarP(&signature, "signature", "s", "", "file of the signature")
	c.Flags().StringVar(&publicKey, "public-key", "", "PEM file of the public key, instead of KEY")
	return c
}

func (e *env) publicKey(c *cobra.Command, name string) ([]byte, error) {
	client, err := e.dial()
	if err != nil {
		return nil, err
	}
	defer client.Close()
	k, err := client.GetKey(c.Context(), name)
	if err != nil {
		return nil, err
	}
	if len(k.PublicKey) == 0 {
		return nil, fmt.Errorf("key %q has no public key yet: %s: %s", name, k.Condition, k.Detail)
	}
	return k.PublicKey, nil
}

// verify checks a signature under a public key in SubjectPublicKeyInfo.
func verify(spki, message, signature []byte) error {
	key, err := x509.ParsePKIXPublicKey(spki)
	if err != nil {
		return fmt.Errorf("reading the public key: %w", err)
	}
	ed, ok := key.(ed25519.PublicKey)
	if !ok {
		return fmt.Errorf("this version verifies Ed25519 signatures, the public key is a %T", key)
	}
	if !ed25519.Verify(ed, message, signature) {
		return invalidError{errors.New("the signature is NOT valid for this message and key")}
	}
	return nil
}

func readPEM(file string) ([]byte, error) {
	b, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	block, _ := pem.Decode(b)
	if block == nil || block.Type != "PUBLIC KEY" {
		return nil, fmt.Errorf("%s holds no PEM block \"PUBLIC KEY\"; `conseal key show KEY --pem` prints one", file)
	}
	return block.Bytes, nil
}

// readSignature reads 64 raw bytes, or their hexadecimal or base64 form.
func readSignature(file string) ([]byte, error) {
	b, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	if len(b) == ed25519.SignatureSize {
		return b, nil
	}
	text := strings.TrimSpace(string(b))
	if raw, err := hex.DecodeString(text); err == nil && len(raw) == ed25519.SignatureSize {
		return raw, nil
	}
	if raw, err := base64.StdEncoding.DecodeString(text); err == nil && len(raw) == ed25519.SignatureSize {
		return raw, nil
	}
	return nil, fmt.Errorf("%s is no signature: it is neither 64 bytes nor their hexadecimal or base64 form", file)
}
