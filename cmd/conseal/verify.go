package main

import (
	"crypto/ed25519"
	"crypto/sha256"
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
	"conseal/protocol/cmp"
	"conseal/protocol/taproot"
)

func verifyCommand(e *env) *cobra.Command {
	var signature, publicKey, scheme string
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
				if scheme != "" {
					return usageError{errors.New("--scheme goes with --public-key")}
				}
				if len(args) == 0 {
					return usageError{errors.New("name a KEY, or give --public-key FILE")}
				}
				public, scheme, err = e.publicKey(c, args[0])
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
			if err := verify(public, scheme, message, sig); err != nil {
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
	c.Flags().StringVar(&scheme, "scheme", "", "bip340, where the public key is on secp256k1 and it is not ECDSA")
	c.Flags().StringVar(&publicKey, "public-key", "", "PEM file of the public key, instead of KEY")
	return c
}

func (e *env) publicKey(c *cobra.Command, name string) (spki []byte, scheme string, err error) {
	client, err := e.dial()
	if err != nil {
		return nil, "", err
	}
	defer client.Close()
	k, err := client.GetKey(c.Context(), name)
	if err != nil {
		return nil, "", err
	}
	if len(k.PublicKey) == 0 {
		return nil, "", fmt.Errorf("key %q has no public key yet: %s: %s", name, k.Condition, k.Detail)
	}
	return k.PublicKey, k.Scheme, nil
}

// verify checks a signature under a public key in SubjectPublicKeyInfo. The scheme
// tells BIP-340 from ECDSA on secp256k1.
func verify(spki []byte, scheme string, message, signature []byte) error {
	valid := false
	if curve, point, err := cmp.ParseSPKI(spki); err == nil {
		switch {
		case scheme == "bip340" && curve == cmp.Secp256k1 && len(signature) == 64:
			valid = taproot.Verify([32]byte(point[1:]), message, [64]byte(signature))
		case scheme != "bip340":
			sig, err := cmp.ParseSignature(signature)
			if err != nil {
				return invalidError{err}
			}
			valid = curve.Verify(point, sha256.Sum256(message), sig)
		}
	} else {
		key, err := x509.ParsePKIXPublicKey(spki)
		if err != nil {
			return fmt.Errorf("reading the public key: %w", err)
		}
		ed, ok := key.(ed25519.PublicKey)
		if !ok {
			return fmt.Errorf("a public key of kind %T is of none of the schemes", key)
		}
		valid = ed25519.Verify(ed, message, signature)
	}
	if !valid {
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

// readSignature reads 64 raw bytes or DER, or their hexadecimal or base64 form.
func readSignature(file string) ([]byte, error) {
	b, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	fits := func(b []byte) bool { // DER of two numbers of 256 bits has 8 to 72 bytes and begins with a SEQUENCE
		return len(b) == 64 || len(b) >= 8 && len(b) <= 72 && b[0] == 0x30 && int(b[1]) == len(b)-2
	}
	if fits(b) {
		return b, nil
	}
	text := strings.TrimSpace(string(b))
	if raw, err := hex.DecodeString(text); err == nil && fits(raw) {
		return raw, nil
	}
	if raw, err := base64.StdEncoding.DecodeString(text); err == nil && fits(raw) {
		return raw, nil
	}
	return nil, fmt.Errorf("%s is no signature: it is neither 64 bytes nor DER, nor their hexadecimal or base64 form", file)
}
