package config

import (
	"crypto"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"fmt"
	"strings"
)

// Pin is the SHA-256 of a host's identity key in the form of a certificate's
// SubjectPublicKeyInfo (RFC 5280, section 4.1.2.7), DER. It names the key and not
// a certificate, and so outlives certificates. Pins are public: compare by ==.
type Pin [sha256.Size]byte

const pinPrefix = "sha256:"

// PinOf returns the pin of a public key of a kind that crypto/x509 knows.
func PinOf(pub crypto.PublicKey) (Pin, error) {
	der, err := x509.MarshalPKIXPublicKey(pub)
	if err != nil {
		return Pin{}, fmt.Errorf("pinning an identity key: %w", err)
	}
	return sha256.Sum256(der), nil
}

// ParsePin reads what [Pin.String] writes, and only that. The zero pin, which
// no key has, is refused.
func ParsePin(s string) (Pin, error) {
	digits, ok := strings.CutPrefix(s, pinPrefix)
	b, err := hex.DecodeString(digits)
	if !ok || err != nil || len(b) != len(Pin{}) || strings.ToLower(digits) != digits {
		return Pin{}, fmt.Errorf(`an identity pin, "sha256:" and 64 small hexadecimal digits`)
	}
	if Pin(b) == (Pin{}) {
		return Pin{}, fmt.Errorf("an identity pin that is not zero")
	}
	return Pin(b), nil
}

// String is "sha256:" and 64 hexadecimal digits.
func (p Pin) String() string { return pinPrefix + hex.EncodeToString(p[:]) }

// Grouped is the digits in groups of four, for two people who compare aloud.
func (p Pin) Grouped() string {
	digits := hex.EncodeToString(p[:])
	groups := make([]string, 0, len(digits)/4)
	for i := 0; i < len(digits); i += 4 {
		groups = append(groups, digits[i:i+4])
	}
	return strings.Join(groups, " ")
}

// MarshalText is [Pin.String].
func (p Pin) MarshalText() ([]byte, error) { return []byte(p.String()), nil }

// UnmarshalText is [ParsePin].
func (p *Pin) UnmarshalText(text []byte) error {
	pin, err := ParsePin(string(text))
	if err == nil {
		*p = pin
	}
	return err
}
