//go:build !failpoints

// Package failpoint names places where a test can end the process as a power cut
// would. In a build without the tag "failpoints", which is what is shipped, they
// are empty.
package failpoint

// Hit does nothing.
func Hit(string) {}
