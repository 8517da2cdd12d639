package peer

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"errors"
	"fmt"
	"math/big"
	"time"

	"conseal/protocol"
)

// wire is the version of what is spoken on a stream. Versions are negotiated by
// ALPN (RFC 7301), newest first: a release speaks its own and the one before, so
// that a fleet is upgraded host by host. This is the first.
const wire = "conseal/1"

// certificate wraps the identity key as TLS wants it. Name and dates are for
// people who look at it; peers compare the key alone. It never expires
// (RFC 5280, 4.1.2.5): the roster says how long an identity holds.
func certificate(self protocol.HostID, identity crypto.Signer) (tls.Certificate, error) {
	pub, ok := identity.Public().(*ecdsa.PublicKey)
	if !ok || pub.Curve != elliptic.P256() {
		return tls.Certificate{}, errors.New("the identity key is not ECDSA on P-256")
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1),
		Subject:      pkix.Name{CommonName: string(self)},
		NotBefore:    time.Unix(0, 0),
		NotAfter:     time.Date(9999, 12, 31, 23, 59, 59, 0, time.UTC),
		KeyUsage:     x509.KeyUsageDigitalSignature,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, pub, identity)
	if err != nil {
		return tls.Certificate{}, err
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: identity}, nil
}

// tlsConfig serves both roles.
func (n *Net) tlsConfig(cert tls.Certificate) *tls.Config {
	return &tls.Config{
		MinVersion:             tls.VersionTLS13,
		Certificates:           []tls.Certificate{cert},
		NextProtos:             []string{wire},
		ClientAuth:             tls.RequireAnyClientCert,
		InsecureSkipVerify:     true, // names and authorities do not count: VerifyConnection compares keys
		SessionTicketsDisabled: true, // every stream proves both keys anew
		VerifyConnection: func(cs tls.ConnectionState) error {
			_, _, err := n.identify(cs)
			return err
		},
		DynamicRecordSizingDisabled: true, // it is for browsers; here whole frames matter
	}
}

// identify says which host of the roster, maybe this one, the other end
// presents, and the pin that says so. TLS calls for it before the other end has proved to hold the key:
// blame and log only what is found after the handshake.
func (n *Net) identify(cs tls.ConnectionState) (name protocol.HostID, pin [32]byte, err error) {
	if cs.NegotiatedProtocol != wire {
		return "", pin, fmt.Errorf("the other end does not speak %s", wire)
	}
	if len(cs.PeerCertificates) != 1 {
		return "", pin, fmt.Errorf("%d certificates instead of one", len(cs.PeerCertificates))
	}
	// A pin is the hash of a public key: looking it up may take any time.
	pin = sha256.Sum256(cs.PeerCertificates[0].RawSubjectPublicKeyInfo)
	n.mu.RLock()
	defer n.mu.RUnlock()
	name, ok := n.hosts[pin]
	if !ok {
		return "", pin, fmt.Errorf("identity %s is not in the roster", pinText(pin))
	}
	return name, pin, nil
}

func pinText(pin [32]byte) string { return "sha256:" + hex.EncodeToString(pin[:]) }
