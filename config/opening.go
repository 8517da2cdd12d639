package config

import (
	"errors"
	"time"
)

// Opening says how long a share stays opened in a host's memory: "held", "each", or a
// duration of 1s to 24h such as "15m". The zero value is "held".
type Opening string

// The openings that are no durations; see [Key.Open].
const (
	OpenHeld Opening = "held"
	OpenEach Opening = "each"
)

const minOpen, maxOpen = time.Second, 24 * time.Hour

// UnmarshalText refuses what is no opening.
func (o *Opening) UnmarshalText(text []byte) error {
	if s := Opening(text); s != OpenHeld && s != OpenEach {
		if d, err := time.ParseDuration(string(s)); err != nil || d < minOpen || d > maxOpen {
			return errors.New(`"held", "each" or a duration of "1s" to "24h"`)
		}
	}
	*o = Opening(text)
	return nil
}

// Keep returns how long a share serves after it was opened, 0 for one use; or that it
// is held.
func (o Opening) Keep() (keep time.Duration, held bool) {
	if o == OpenHeld || o == "" {
		return 0, true
	}
	keep, _ = time.ParseDuration(string(o)) // "each" is none
	return keep, false
}
