package hsm

import (
	"fmt"
	"slices"
	"strings"
)

// DefaultMethod is the method of a [Config] that names none.
const DefaultMethod = "aes-gcm"

// Methods are the names of the ways in which a token can wrap, best first. The
// last is used only if it is asked for by name. docs/hsm.md says what each is.
func Methods() []string {
	return []string{DefaultMethod, "aes-kw-enc", "aes-kw", "aes-kwp", "rsa-oaep-sha256", "hmac-sha256-prf", onlyByName}
}

// onlyByName is never recommended: OAEP with SHA-1 is not known to be weak, but
// policies forbid the hash.
const onlyByName = "rsa-oaep-sha1"

// methodNumber is a method's number in an envelope: its place in Methods, from 1.
// New ones go to the end of the list of numbers, whatever their rank.
func methodNumber(name string) byte { return byte(slices.Index(Methods(), name) + 1) }

// methodName is the name of a number, or "".
func methodName(number byte) string {
	if number < 1 || int(number) > len(Methods()) {
		return ""
	}
	return Methods()[number-1]
}

func validMethod(name string) error {
	if name != "" && methodNumber(name) == 0 {
		return fmt.Errorf("hsm: method %q: must be one of %s", name, strings.Join(Methods(), ", "))
	}
	return nil
}
