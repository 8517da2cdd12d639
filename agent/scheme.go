package agent

import (
	"fmt"

	"conseal/internal/secret"
	"conseal/protocol"
	"conseal/protocol/cmp"
	"conseal/protocol/dealing"
)

// scheme is what the agent needs of a signature scheme.
type scheme interface {
	// keygen makes the session of a key generation.
	keygen(dealing.KeygenConfig) (generation, error)
	// reshare makes the session that replaces the shares of a key. share is a dealer's, and
	// nil at others.
	reshare(in reshareConfig, share shareholder) (generation, error)
	// verifyComplaint returns nil if c proves that its dealer cheated in the session of in.
	verifyComplaint(in reshareConfig, c *dealing.Complaint) error
	// traits says what the agent needs to know to run the scheme's sessions.
	traits() traits
	// inspect reads the public output of an epoch.
	inspect(public []byte) (output, error)
	// load reads this host's share and checks it against the public output.
	load(self protocol.HostID, public, share []byte) (shareholder, error)
}

// traits tell schemes apart.
type traits struct {
	// mesh: signers send to each other, not only to the coordinator, so none may
	// begin before all have joined.
	mesh bool
	// attempts is how many attempts at a signature fit into a request's deadline,
	// so that a host that hangs leaves time for another quorum.
	attempts int
	// digest: what is signed is SHA-256 of the message, so a caller may bring it.
	digest bool
}

// output is what everybody may know of an epoch.
type output struct {
	spki    []byte // the public key, DER SubjectPublicKeyInfo
	pin     []byte // the key as the roster pins it
	quorum  int
	holders []protocol.HostID
}

// generation is a session that ends in an epoch: a key generation or a resharing.
// result is valid once the session is done.
type generation struct {
	session protocol.Session
	result  func() (public []byte, share *secret.Bytes, err error)
}

// held is a share as its scheme's package has it.
type held interface {
	Public() []byte
	Secret() (*secret.Bytes, error)
	Wipe()
}

// sharing is a session of a scheme's package that ends in a share.
type sharing[S held] interface {
	protocol.Session
	Result() (S, error)
}

// generated makes a generation of such a session, if there is one.
func generated[S held](session sharing[S], err error) (generation, error) {
	return generation{session, func() (public []byte, share *secret.Bytes, err error) {
		s, err := session.Result()
		if err != nil {
			return nil, nil, err
		}
		defer s.Wipe()
		share, err = s.Secret()
		return s.Public(), share, err
	}}, err
}

// reshareConfig is a resharing at one host.
type reshareConfig struct {
	dealing.Plan
	old []byte // public output of the base
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
	message     []byte            // empty if only its digest is known
	digest      [32]byte          // SHA-256 of the message
}

// signature is a session of signing. result is valid at the coordinator once the
// session is done; it has been verified.
type signature interface {
	protocol.Session
	result() (signed, error)
}

// signed is a signature in the forms that a scheme has.
type signed struct {
	signature []byte // as openssl takes it
	fixed     []byte // ECDSA: r and s, 64 bytes
	recovery  uint32 // ECDSA: which public key r and s allow
}

// schemeOf returns the scheme of that name, as the roster writes it.
func schemeOf(name string) (scheme, error) {
	switch name {
	case "ed25519":
		return ed25519Scheme{}, nil
	case "ecdsa-p256":
		return ecdsaScheme{cmp.P256}, nil
	case "ecdsa-secp256k1":
		return ecdsaScheme{cmp.Secp256k1}, nil
	case "bip340":
		return bip340Scheme{}, nil
	}
	return nil, fmt.Errorf("this version cannot run scheme %q", name)
}
