//go:build !failpoints

package dealing

// cheat changes a value before it is dealt and signed for, in a build with the tag
// "failpoints", which is never shipped. Here it does nothing.
func cheat([]byte) {}
