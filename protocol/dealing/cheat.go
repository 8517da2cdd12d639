//go:build failpoints

package dealing

import (
	"math/rand/v2"
	"os"
)

// cheat changes one encoded value in four, while LIES is in the environment: the dealer
// signs for it, so that who gets it can prove it.
func cheat(value []byte) {
	if os.Getenv("LIES") != "" && rand.IntN(4) == 0 {
		value[len(value)/2] ^= 1
	}
}
