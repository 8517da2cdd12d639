package agent

import (
	"crypto"
	"fmt"

	"conseal/internal/secret"
	"conseal/protocol"
)

// scheme is what the agent needs of a signature scheme.
type scheme interface {
	// keygen makes the session of a key generation.
	keygen(id protocol.SessionID, self protocol.HostID, holders []protocol.HostID, quorum int) (generation, error)
	// inspect reads the public output of an epoch.
	inspect(public []byte) (output, error)
	// load reads this host's share and checks it against the public output.
	load(self protocol.HostID, public, share []byte) (shareholder, error)
}

// output is what everybody may know of an epoch.
type output struct {
	key     crypto.PublicKey
	pin     []byte // the key as the roster pins it
	quorum  int
	holders []protocol.HostID
}

// generation is a key generation. result is valid once the session is done.
type generation interface {
	protocol.Session
	result() (public []byte, share *secret.Bytes, err error)
}

// shareholder signs with a share that it keeps opened. It is safe for concurrent
// use.
type shareholder interface {
	sign(signing) (signature, error)
	close()
}

// signing is one session of signing. The coordinator may be a signer or not.
type signing struct {
	id          protocol.SessionID
	self        protocol.HostID
	coordinator protocol.HostID
	signers     []protocol.HostID // sorted, as many as the quorum
	message     []byte
}

// signature is a session of signing. result is valid at the coordinator once the
// session is done; it has been verified.
type signature interface {
	protocol.Session
	result() ([]byte, error)
}

// schemeOf returns the scheme of that name, as the roster writes it.
func schemeOf(name string) (scheme, error) {
	switch name {
	case "ed25519":
		return ed25519Scheme{}, nil
	}
	return nil, fmt.Errorf("this version cannot run scheme %q", name)
}
