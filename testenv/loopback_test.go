package testenv_test

import (
	"testing"

	"conseal/testenv"
)

// TestLoopback draws so many networks that without a look at who has which some would be
// the same.
func TestLoopback(t *testing.T) {
	drawn := map[string]bool{}
	for range 700 {
		network, free, err := testenv.Loopback()
		if err != nil {
			t.Fatal(err)
		}
		defer free()
		if drawn[network] {
			t.Fatalf("%s was drawn twice", network)
		}
		drawn[network] = true
	}
}
