package hsm

import (
	"errors"
	"fmt"

	"conseal/internal/pin"
	"conseal/internal/secret"
)

// KeyConfig says which key of a token a tool signs with, and how to get at it.
type KeyConfig struct {
	// URI names one private key and its module (RFC 7512): token or serial,
	// object or id, and module-path. See [ParseURI].
	URI string
	// PINSource says where the PIN comes from, as in [Config]; it wins over the
	// URI's pin-source.
	PINSource string
	// AskPIN asks a person for the PIN if there is no source, and says how. What
	// it returns is wiped.
	AskPIN func(prompt string) ([]byte, error)
}

// validate checks the configuration and gives its URI.
func (c KeyConfig) validate() (*URI, error) {
	u, err := ParseURI(c.URI)
	if err == nil {
		err = u.checkToken()
	}
	switch {
	case err != nil:
		return nil, err
	case u.Object == "" && u.ID == nil:
		return nil, errors.New("hsm: the URI names no key: add object= or id=")
	case u.Type != "" && u.Type != "private":
		return nil, fmt.Errorf("hsm: the URI says type=%s, and a private key signs: remove it", u.Type)
	}
	return u, nil
}

// readPIN gets the PIN. low is that the token has seen a wrong one since the last
// right one: then only a person decides on another try, for the next wrong PIN may
// come from the same place as the last one. It is the token that remembers: a tool
// has no state folder, and may run on another machine each time.
func (c KeyConfig) readPIN(u *URI, low bool) (*secret.Bytes, error) {
	if c.PINSource != "" || u.PINSource != "" || c.AskPIN == nil {
		p, err := Config{PINSource: c.PINSource}.pinSource(u)
		if err == nil && low {
			err = fmt.Errorf("%w the last time, so none is taken from %s: enter it by hand once, then it is", pin.ErrRefused, p)
		}
		if err != nil {
			return nil, err
		}
		return p.Read()
	}
	prompt := "PIN for " + u.path()
	if low {
		prompt += " (the last one was wrong)"
	}
	b, err := c.AskPIN(prompt)
	if err == nil && len(b) == 0 {
		err = errors.New("no PIN was entered, and none was sent")
	}
	if err != nil {
		clear(b)
		return nil, err
	}
	return secret.Take(b), nil
}
