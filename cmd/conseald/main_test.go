package main_test

import (
	"bytes"
	"os"
	"slices"
	"testing"

	"conseal/config"
	"conseal/hsm"
	"conseal/testenv"
)

// TestNoFailpointsInWhatIsShipped looks for the variables that arm failpoints,
// in the program as it is shipped and, as a control, in the one for tests.
func TestNoFailpointsInWhatIsShipped(t *testing.T) {
	defer testenv.Clean()
	for _, test := range []struct {
		flags []string
		want  bool
	}{
		{nil, false},
		{[]string{"-tags", "failpoints"}, true},
	} {
		bin, err := testenv.Build(t.Context(), test.flags...)
		if err != nil {
			t.Fatal(err)
		}
		code, err := os.ReadFile(bin.Agent)
		if err != nil {
			t.Fatal(err)
		}
		if got := bytes.Contains(code, []byte("FAILPOINT_LOG")); got != test.want {
			t.Errorf("built with %q: failpoints are there: %v, want %v", test.flags, got, test.want)
		}
	}
}

// TestConfigKnowsEachErasure compares two lists that cannot be one.
func TestConfigKnowsEachErasure(t *testing.T) {
	for _, erasure := range append(hsm.Erasures(), "none") {
		c := config.Default()
		c.Protector.HSM.Erasure = string(erasure)
		known := !slices.ContainsFunc(c.Check(), func(p config.Problem) bool { return p.Key == "protector.hsm.erasure" })
		if known != (erasure != "none") {
			t.Errorf("erasure %s: known to config: %t", erasure, known)
		}
	}
}

// TestConfigKnowsEachMethod compares two lists that cannot be one.
func TestConfigKnowsEachMethod(t *testing.T) {
	for _, method := range append(hsm.Methods(), "aes-none") {
		c := config.Default()
		c.Protector.HSM.Method = method
		known := !slices.ContainsFunc(c.Check(), func(p config.Problem) bool { return p.Key == "protector.hsm.method" })
		if known != (method != "aes-none") {
			t.Errorf("method %s: known to config: %t", method, known)
		}
	}
}
