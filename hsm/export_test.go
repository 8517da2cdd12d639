package hsm

import "conseal/internal/secret"

// ReadPIN reads a PIN as Open does.
func ReadPIN(source string) (*secret.Bytes, error) {
	p, err := parsePINSource(source)
	if err != nil {
		return nil, err
	}
	return p.read()
}

var TrustedOwner = trustedOwner

// SendPIN does with the latch what a login does, and calls send if a PIN may be sent.
func SendPIN(dir string, pin *secret.Bytes, send func() bool) error {
	l := latch{dir}
	if err := l.arm(pin); err != nil {
		return err
	}
	if send() {
		return ClearLatch(dir)
	}
	return nil
}

// Reencode decodes and encodes a blob.
func Reencode(b []byte) ([]byte, error) {
	e, err := decodeEnvelope(b)
	if err != nil {
		return nil, err
	}
	return e.encode(), nil
}
