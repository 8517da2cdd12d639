package hsm

import (
	"strings"
	"time"
)

// Report is what [Probe] found out about a token.
type Report struct {
	Token        string          `json:"token"` // as the URI names it
	Library      string          `json:"library"`
	Label        string          `json:"label"`
	Manufacturer string          `json:"manufacturer"`
	Model        string          `json:"model"`
	Serial       string          `json:"serial"`
	Mechanisms   []MechanismInfo `json:"mechanisms"`
	// Attributes were tried on a throw-away key of the recommended method.
	Attributes  []AttributeTest `json:"attributes"`
	Methods     []MethodTrial   `json:"methods"`     // in the order of [Methods]
	Recommended string          `json:"recommended"` // a method, or "" if none passed
	Why         string          `json:"why"`
	Erasure     Erasure         `json:"erasure"`
	ErasureWhy  string          `json:"erasure_why"`
	Warnings    []string        `json:"warnings"` // for people
}

// MechanismInfo is what the token says of one mechanism that could matter.
type MechanismInfo struct {
	Name     string   `json:"name"`
	Number   uint     `json:"number"` // CKM_
	Offered  bool     `json:"offered"`
	MinKey   uint     `json:"min_key"` // in bits or bytes, as the token likes
	MaxKey   uint     `json:"max_key"`
	Hardware bool     `json:"hardware"` // the token says that a device does it
	Uses     []string `json:"uses"`
}

// AttributeTest tells whether the token keeps to an attribute of a key.
type AttributeTest struct {
	Name     string `json:"name"`
	Honoured bool   `json:"honoured"`
	Detail   string `json:"detail"`
}

// MethodTrial is the self-test of one method.
type MethodTrial struct {
	Name   string        `json:"name"`
	Passed bool          `json:"passed"`
	Why    string        `json:"why"`        // it did not pass
	Seal   time.Duration `json:"seal_ns"`    // wrapping 32 bytes, the mean of a few
	Open   time.Duration `json:"open_ns"`    // and unwrapping
	NewKey time.Duration `json:"new_key_ns"` // making a key, once, in the session
}

// Erasure says how final it is that a token destroys a key.
type Erasure string

const (
	ErasureDevice     Erasure = "device"     // the key was in one device only
	ErasureHostFile   Erasure = "host-file"  // the token is a file of this host, of which there may be copies
	ErasureReplicated Erasure = "replicated" // a service keeps copies
)

// Erasures are all of them, the least final first.
func Erasures() []Erasure { return []Erasure{ErasureHostFile, ErasureReplicated, ErasureDevice} }

// makers are tokens that are known by what they call themselves, in small letters.
func makers() []struct {
	word    string
	erasure Erasure
} {
	return []struct {
		word    string
		erasure Erasure
	}{
		{"softhsm", ErasureHostFile}, {"nss", ErasureHostFile}, {"mozilla", ErasureHostFile},
		{"tpm2", ErasureHostFile}, {"opencryptoki", ErasureHostFile},
		{"cloudhsm", ErasureReplicated}, {"amazon", ErasureReplicated}, {"google", ErasureReplicated},
	}
}

// guessErasure guesses from what token and library call themselves, and from
// whether they say that they are hardware.
func guessErasure(names []string, hardware bool) (Erasure, string) {
	for _, m := range makers() {
		for _, n := range names {
			if strings.Contains(strings.ToLower(n), m.word) {
				return m.erasure, "it calls itself " + strings.TrimSpace(n)
			}
		}
	}
	if hardware {
		return ErasureDevice, "it says that it is hardware; backups and clones that its vendor offers are not seen from here"
	}
	return ErasureHostFile, "it does not say that it is hardware"
}
