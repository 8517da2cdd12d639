package main

import (
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"os"

	"github.com/spf13/cobra"

	"conseal/agent/api"
	"conseal/agent/api/apipb"
)

// maxInput bounds what sign and verify read: the agents take less.
const maxInput = 4 << 20

func signCommand(e *env) *cobra.Command {
	var format, output, ecdsa string
	var digest bool
	c := &cobra.Command{
		Use:   "sign KEY [FILE]",
		Short: "Sign a file, or standard input",
		Long: `Sign a whole file, or standard input, with a quorum of the key's hosts.

The signature goes to standard output, or to --output. It has been verified
under the public key before it is printed.

ECDSA signs SHA-256 of the file. With --digest the input is that digest itself, 32
bytes, which the key's entry in the roster must allow.`,
		Example: `  conseal sign release app.tar.gz --output app.tar.gz.sig
  echo hello | conseal sign release --format base64
  conseal sign jwt token.txt --ecdsa fixed --format base64
  sha256sum big.iso | head -c 64 | xxd -r -p | conseal sign release --digest`,
		Args: args(1, 2),
		RunE: func(c *cobra.Command, args []string) error {
			encode, ok := encodings[format]
			if !ok {
				return usageError{fmt.Errorf("--format %q: want raw, hex or base64", format)}
			}
			if ecdsa != "der" && ecdsa != "fixed" && ecdsa != "recoverable" {
				return usageError{fmt.Errorf("--ecdsa %q: want der, fixed or recoverable", ecdsa)}
			}
			message, err := readInput(e.in, args[1:])
			if err != nil {
				return err
			}
			client, err := e.dial()
			if err != nil {
				return err
			}
			defer client.Close()
			sign := client.Sign
			if digest {
				sign = client.SignDigest
			}
			r, err := sign(c.Context(), args[0], message)
			if err != nil {
				return err
			}
			sig := r.Signature
			if ecdsa != "der" {
				if len(r.Fixed) == 0 {
					return usageError{fmt.Errorf("--ecdsa %s: key %q makes no ECDSA signatures", ecdsa, args[0])}
				}
				sig = r.Fixed
			}
			if ecdsa == "recoverable" {
				sig = append(sig, byte(r.RecoveryId))
			}
			out := encode(sig)
			if e.json {
				if out, err = signedJSON(args[0], r); err != nil {
					return err
				}
			}
			if output != "" {
				return os.WriteFile(output, out, 0o644)
			}
			_, err = e.out.Write(out)
			return err
		},
	}
	e.socketFlag(c, "CONSEAL_SIGN_SOCKET", api.SignSocket)
	c.Flags().StringVar(&format, "format", "raw", "raw, hex or base64")
	c.Flags().StringVar(&ecdsa, "ecdsa", "der", "form of ECDSA signatures: der, fixed (r || s, 64 bytes) or recoverable (and the recovery id, 65 bytes)")
	c.Flags().BoolVar(&digest, "digest", false, "the input is the SHA-256 of the message, 32 bytes")
	c.Flags().StringVarP(&output, "output", "o", "", "write the signature to this file")
	return c
}

var encodings = map[string]func([]byte) []byte{
	"raw":    func(b []byte) []byte { return b },
	"hex":    func(b []byte) []byte { return []byte(hex.EncodeToString(b) + "\n") },
	"base64": func(b []byte) []byte { return []byte(base64.StdEncoding.EncodeToString(b) + "\n") },
}

func signedJSON(key string, r *apipb.SignResponse) ([]byte, error) {
	var recovery *uint32 // of ECDSA, where it is 0 as often as 1
	if len(r.Fixed) > 0 {
		recovery = &r.RecoveryId
	}
	b, err := json.Marshal(struct {
		Key       string   `json:"key"`
		Signature []byte   `json:"signature"`
		PublicKey []byte   `json:"public_key"`
		Signers   []string `json:"signers"`
		Session   string   `json:"session"`
		Fixed     []byte   `json:"fixed,omitempty"`
		Recovery  *uint32  `json:"recovery_id,omitempty"`
	}{key, r.Signature, r.PublicKey, r.Signers, r.Session, r.Fixed, recovery})
	return append(b, '\n'), err
}

// readInput reads the one file of args, or standard input if there is none or it
// is "-".
func readInput(in io.Reader, args []string) ([]byte, error) {
	name := "standard input"
	if len(args) == 1 && args[0] != "-" {
		name = args[0]
		f, err := os.Open(name)
		if err != nil {
			return nil, err
		}
		defer f.Close()
		in = f
	}
	b, err := io.ReadAll(io.LimitReader(in, maxInput+1))
	switch {
	case err != nil:
		return nil, fmt.Errorf("reading %s: %w", name, err)
	case len(b) > maxInput:
		return nil, fmt.Errorf("%s is over %d bytes, more than any agent takes: sign a digest file such as sha256sum writes", name, maxInput)
	case len(b) == 0:
		return nil, fmt.Errorf("%s is empty: there is nothing to sign or verify", name)
	}
	return b, nil
}
