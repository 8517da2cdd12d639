//go:build cgo

package hsm

import (
	"bytes"
	"errors"
	"fmt"
	"time"

	"github.com/miekg/pkcs11"
)

// probeLabel is the label of all that is made to be thrown away, in the session. A
// token that keeps it nevertheless is swept.
const probeLabel = "conseal/probe"

// selfTest shows with a throw-away key that the session's method works on this token:
// the token says it can, keeps the attributes, gives back what it wrapped, and refuses
// what was changed. It fills in a trial, if there is one. Nothing else uses the module
// meanwhile.
func (s *session) selfTest(t *MethodTrial) error {
	if err := s.advertised(); err != nil {
		return err
	}
	begin := time.Now()
	key, err := s.throwAway()
	if err != nil {
		return err
	}
	if t != nil {
		t.NewKey = time.Since(begin)
	}
	err = s.aside(func(s *session) error { return s.checkKind(key, probeLabel) })
	if err == nil {
		err = s.tryKey(key, t)
	}
	return errors.Join(err, s.sweep())
}

// advertised asks the token whether it can.
func (s *session) advertised() error {
	for mechanism, want := range map[uint]uint{s.method.mechanism: s.method.flags, s.method.key.generate: 0} {
		info, err := s.p.GetMechanismInfo(s.slot, []*pkcs11.Mechanism{pkcs11.NewMechanism(mechanism, nil)})
		if err != nil {
			return fmt.Errorf("mechanism %#x: %w", mechanism, failed("C_GetMechanismInfo", err))
		}
		if info.Flags&want != want {
			return &Error{Class: ClassPolicy, What: fmt.Sprintf("mechanism %#x is not advertised for this: flags %#x of %#x", mechanism, info.Flags&want, want)}
		}
	}
	return nil
}

// throwAway makes a key of the method's kind in the session.
func (s *session) throwAway() (pkcs11.ObjectHandle, error) {
	if err := s.sweep(); err != nil {
		return 0, err
	}
	return s.generate(probeLabel, randomID(), false)
}

// sweep destroys what a self-test left, and sees that it is gone.
func (s *session) sweep() error {
	if err := s.destroyAll(s.findAny(anyClass, probeLabel)); err != nil {
		return err
	}
	left, err := s.findAny(anyClass, probeLabel)
	if err == nil && len(left) > 0 {
		err = &Error{Class: ClassPolicy, What: fmt.Sprintf("%d objects %s are still there after they were destroyed", len(left), probeLabel)}
	}
	return err
}

// timedRounds is how often a trial wraps and unwraps to tell how long that takes.
const timedRounds = 10

func (s *session) tryKey(key pkcs11.ObjectHandle, t *MethodTrial) error {
	bind, plain := []byte("conseal hsm self-test"), random()
	var body, second []byte
	err := s.aside(func(s *session) (err error) {
		if body, err = s.method.wrap(s, key, bind, plain); err == nil {
			second, err = s.method.wrap(s, key, bind, plain)
		}
		return err
	})
	if err != nil {
		return err
	}
	if bytes.Equal(body[:ivSize], second[:ivSize]) { // of AES-GCM, the IV
		return &Error{Class: ClassPolicy, What: "the token wraps the same twice to the same"}
	}
	for _, b := range [][]byte{body, second} {
		if err := s.tryOpen(key, bind, b, plain); err != nil {
			return err
		}
	}
	if err := s.tryTampered(key, bind, body); err != nil || t == nil {
		return err
	}
	return s.aside(func(s *session) error { return t.time(s, key, bind, plain) })
}

func (s *session) tryOpen(key pkcs11.ObjectHandle, bind, body, want []byte) error {
	return s.aside(func(s *session) error {
		got, err := s.method.unwrap(s, key, bind, body)
		defer clear(got)
		if err == nil && !bytes.Equal(got, want) {
			err = &Error{Class: ClassPolicy, What: "the token gives back something else than it wrapped"}
		}
		return err
	})
}

func (s *session) tryTampered(key pkcs11.ObjectHandle, bind, body []byte) error {
	refused := func(what string, bind, body []byte) error {
		err := s.aside(func(s *session) error {
			got, err := s.method.unwrap(s, key, bind, body)
			clear(got)
			return err
		})
		switch c := ClassOf(err); {
		case err == nil:
			return &Error{Class: ClassPolicy, What: "the token does not refuse " + what}
		case c != ClassData && c != ClassAmbiguous:
			return fmt.Errorf("trying %s: %w", what, err) // something else failed: nothing was shown
		}
		return nil
	}
	for _, at := range []int{0, len(body) / 2, len(body) - sealedSize, len(body) - 1} {
		changed := bytes.Clone(body)
		changed[at] ^= 1
		if err := refused(fmt.Sprintf("byte %d of %d changed", at, len(body)), bind, changed); err != nil {
			return err
		}
	}
	large := bytes.Clone(body) // above an RSA modulus
	copy(large, bytes.Repeat([]byte{0xFF}, ivSize))
	return errors.Join(refused("a body that begins with ones", bind, large),
		refused("one byte less", bind, body[:len(body)-1]), refused("another context", []byte("another"), body))
}

func (t *MethodTrial) time(s *session, key pkcs11.ObjectHandle, bind, plain []byte) error {
	bodies := make([][]byte, timedRounds)
	begin := time.Now()
	for i := range bodies {
		var err error
		if bodies[i], err = s.method.wrap(s, key, bind, plain); err != nil {
			return err
		}
	}
	t.Seal = time.Since(begin) / timedRounds
	begin = time.Now()
	for _, b := range bodies {
		got, err := s.method.unwrap(s, key, bind, b)
		clear(got)
		if err != nil {
			return err
		}
	}
	t.Open = time.Since(begin) / timedRounds
	return nil
}

// otherMethod says which method works, after the configured one did not.
func (s *session) otherMethod(err error) error {
	if !unable(err) && ClassOf(err) != ClassData {
		return err
	}
	for _, m := range methods() {
		other := *s
		other.method = &m
		if m.name != s.method.name && m.name != onlyByName && other.selfTest(nil) == nil {
			return fmt.Errorf("method %s failed its self-test: %w; method %s passed it: set protector.hsm.method to that", s.method.name, err, m.name)
		}
	}
	return fmt.Errorf("method %s failed its self-test, and so did all others: %w", s.method.name, err)
}
