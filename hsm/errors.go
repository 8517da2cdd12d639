package hsm

import (
	"errors"
	"fmt"

	"conseal/internal/pin"
)

// Class says what kind of failure an [Error] is, and so what can be done.
type Class string

const (
	ClassSession   Class = "session"   // this session is gone
	ClassLogin     Class = "login"     // the login is gone
	ClassHandle    Class = "handle"    // an object's handle is stale
	ClassToken     Class = "token"     // token or library went away, or its storage
	ClassAuth      Class = "auth"      // the PIN is wrong, locked or not to be tried
	ClassBusy      Class = "busy"      // out of sessions or memory
	ClassPolicy    Class = "policy"    // the token will not do this: a matter of configuration
	ClassData      Class = "data"      // the input is not authentic
	ClassAmbiguous Class = "ambiguous" // the token does not say: data or device
	ClassCrash     Class = "crash"     // the module's process ended during the call
	ClassHang      Class = "hang"      // the module did not answer by the deadline
)

// advice completes an error of a class by what to do.
var advice = map[Class]string{
	ClassSession:   "the session was lost twice: look for another program that resets this token",
	ClassLogin:     "the login was lost twice: look for another program that logs out of this token",
	ClassHandle:    "the object vanished during the call: look for another program that changes this token",
	ClassToken:     "check that the token is plugged in or reachable and that its storage is mounted",
	ClassAuth:      "check the PIN and the state of the token before another try",
	ClassBusy:      "the token is out of sessions or memory: lower max sessions or end other users",
	ClassPolicy:    "the token does not allow this: check its configuration and mechanisms",
	ClassData:      "the data is damaged or was made elsewhere: restore the right file",
	ClassAmbiguous: "the token failed without a reason: see its own log",
	ClassCrash:     "the module is started again at the next use: if this happens again, see its vendor's log or change its version",
	ClassHang:      "the module is started again at the next use: check that the token is reachable; if it is only slow, raise the timeout",
}

// Error is a failure in or of the token.
type Error struct {
	Class Class
	Code  uint   // the CKR_ value; 0 if this package came to the judgement
	What  string // what failed, without any secret
}

func (e *Error) Error() string {
	return fmt.Sprintf("%s (class %s): %s", e.What, e.Class, advice[e.Class])
}

// ClassOf gives the class of a failure, or "" if it is none of the token's.
func ClassOf(err error) Class {
	var e *Error
	switch {
	case errors.As(err, &e):
		return e.Class
	case errors.Is(err, pin.ErrRefused):
		return ClassAuth
	case errors.Is(err, ErrNotAuthentic):
		return ClassData
	}
	return ""
}

// What is exported here and below is known to package helper, which sends it from
// process to process.
var (
	// ErrNotAuthentic says that a blob was changed, belongs to another id, or
	// was made by another token.
	ErrNotAuthentic = errors.New("sealed data is not authentic: it is damaged, or was made for something or somebody else")
	// ErrLost says that the token is there and works, but a key of this host
	// is not in it any more.
	ErrLost = errors.New("key is lost: restore the token from its vendor's backup, or recover the host's shares from its peers")
	// ErrStale says that the state folder is older than the token, or another.
	// Nothing was changed.
	ErrStale = errors.New("state folder is older than the token: mount or restore the newest one; if there is none, recover the host's shares from its peers")
)

// errMissing says that a search found nothing, before it is known why.
var errMissing = errors.New("object not found")

// noRoot says that a provisioned token never had a root.
type noRoot struct{ label string }

func (e *noRoot) Error() string { return fmt.Sprintf("no root was ever set (%s)", e.label) }

// NoRoot marks the error for whoever asks for it by interface.
func (e *noRoot) NoRoot() bool { return true }
