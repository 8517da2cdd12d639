// Package testenv makes the surroundings that tests and the demonstration need:
// software TPMs, tokens and processes that never outlive the one that started
// them.
//
// Start with [StartTPM] for a TPM, [NewToken] for a PKCS#11 token and [StartProcess]
// for any other child. [NewFaultModule] puts faults between a program and its token.
// Whatever needs a tool asks [Need] first: a missing tool is an error that says
// how to install it, never a reason to skip.
package testenv

import (
	"fmt"
	"os/exec"
)

// Need returns an error if tool is not in PATH. The error names the command
// that installs it from debianPackage.
func Need(tool, debianPackage string) error {
	if _, err := exec.LookPath(tool); err != nil {
		return fmt.Errorf("%s is needed and was not found; install it: apt-get install %s", tool, debianPackage)
	}
	return nil
}
