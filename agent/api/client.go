// Package api is the client of an agent's sockets.
//
// [Dial] a socket, then call [Client.Sign], or take a [crypto.Signer] from
// [Client.Key]. Programs in other languages speak gRPC, or JSON over HTTP, to
// the same socket: see conseal.proto.
package api

//go:generate sh ../../internal/generate.sh

import (
	"context"
	"crypto"
	"crypto/ed25519"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"time"

	"connectrpc.com/connect"

	"conseal/agent/api/apipb"
	"conseal/agent/api/apipb/apipbconnect"
)

// Default sockets of an agent.
const (
	SignSocket  = "/run/conseal/sign.sock"
	AdminSocket = "/run/conseal/admin.sock"
)

// Client talks to one socket. It is safe for concurrent use.
type Client struct {
	signer apipbconnect.SignerClient
	admin  apipbconnect.AdminClient
	seal   apipbconnect.SealClient
	http   *http.Client
}

// Dial returns a client of the unix socket at path. It connects at the first call.
func Dial(path string) *Client {
	dialer := net.Dialer{}
	hc := &http.Client{Transport: &http.Transport{
		DialContext:         func(ctx context.Context, _, _ string) (net.Conn, error) { return dialer.DialContext(ctx, "unix", path) },
		MaxIdleConnsPerHost: 64,
		IdleConnTimeout:     time.Minute,
		DisableCompression:  true,
	}}
	const url = "http://conseal"
	options := connect.WithClientOptions(connect.WithAcceptCompression("gzip", nil, nil))
	return &Client{
		signer: apipbconnect.NewSignerClient(hc, url, options),
		admin:  apipbconnect.NewAdminClient(hc, url, options),
		seal:   apipbconnect.NewSealClient(hc, url, options),
		http:   hc,
	}
}

// Close gives the connections back.
func (c *Client) Close() { c.http.CloseIdleConnections() }

// Sign has a quorum of the key's hosts sign a whole message.
func (c *Client) Sign(ctx context.Context, key string, message []byte) (*apipb.SignResponse, error) {
	r, err := c.signer.Sign(ctx, &apipb.SignRequest{Key: key, Message: message})
	return r, Explain(err)
}

// SignDigest has a quorum sign the message of a SHA-256 digest; for ECDSA keys whose
// roster entry allows it.
func (c *Client) SignDigest(ctx context.Context, key string, digest []byte) (*apipb.SignResponse, error) {
	r, err := c.signer.Sign(ctx, &apipb.SignRequest{Key: key, Digest: digest})
	return r, Explain(err)
}

// GetKey describes a key.
func (c *Client) GetKey(ctx context.Context, name string) (*apipb.Key, error) {
	r, err := c.signer.GetKey(ctx, &apipb.GetKeyRequest{Key: name})
	return r, Explain(err)
}

// ListKeys describes the keys that the caller may use; on the admin socket, all
// that the host holds.
func (c *Client) ListKeys(ctx context.Context) ([]*apipb.Key, error) {
	r, err := c.signer.ListKeys(ctx, &apipb.ListKeysRequest{})
	return r.GetKeys(), Explain(err)
}

// Status says how the agent is. It is served on the admin socket.
func (c *Client) Status(ctx context.Context) (*apipb.StatusResponse, error) {
	r, err := c.admin.Status(ctx, &apipb.StatusRequest{})
	return r, Explain(err)
}

// Refresh gives a key new shares, on the admin socket, and waits until the host has them.
func (c *Client) Refresh(ctx context.Context, key string) (*apipb.Key, error) {
	r, err := c.admin.Refresh(ctx, &apipb.RefreshRequest{Key: key})
	return r, Explain(err)
}

// LoadRoster has the agent read its roster's file again, on the admin socket.
func (c *Client) LoadRoster(ctx context.Context) (*apipb.LoadRosterResponse, error) {
	r, err := c.admin.LoadRoster(ctx, &apipb.LoadRosterRequest{})
	return r, Explain(err)
}

// Drill says what the loss of each host would do to each key, on the admin socket.
func (c *Client) Drill(ctx context.Context) (*apipb.DrillResponse, error) {
	r, err := c.admin.Drill(ctx, &apipb.DrillRequest{})
	return r, Explain(err)
}

// Suspend has this host sign nothing more with a key, or with any if all is set. It
// is served on the admin socket, as Resume.
func (c *Client) Suspend(ctx context.Context, key string, all bool, reason string) (*apipb.SuspensionResponse, error) {
	r, err := c.admin.Suspend(ctx, &apipb.SuspendRequest{Key: key, All: all, Reason: reason})
	return r, Explain(err)
}

// Resume lifts the suspension of a key on this host, or every one if all is set.
func (c *Client) Resume(ctx context.Context, key string, all bool) (*apipb.SuspensionResponse, error) {
	r, err := c.admin.Resume(ctx, &apipb.ResumeRequest{Key: key, All: all})
	return r, Explain(err)
}

// Measure describes the host's measured state in a document for its security team. It
// is served on the admin socket, as what follows.
func (c *Client) Measure(ctx context.Context) ([]byte, error) {
	r, err := c.seal.Measure(ctx, &apipb.MeasureRequest{})
	return r.GetDocument(), Explain(err)
}

// Policies says which seal policies the host has, and which of them open its TPM now.
func (c *Client) Policies(ctx context.Context) (*apipb.PoliciesResponse, error) {
	r, err := c.seal.Policies(ctx, &apipb.PoliciesRequest{})
	return r, Explain(err)
}

// InstallPolicy gives the host a signed seal policy, or a signed revocation, and
// returns what it did in words.
func (c *Client) InstallPolicy(ctx context.Context, document []byte) (string, error) {
	r, err := c.seal.Install(ctx, &apipb.InstallRequest{Document: document})
	return r.GetDone(), Explain(err)
}

// Error is what an agent answered instead of a result.
type Error struct {
	Code   connect.Code
	Reason string // stable, for programs; docs/architecture.md lists them. Empty if it is not the agent's.
	Text   string
	Next   string // what to do
}

func (e *Error) Error() string {
	if e.Next == "" {
		return e.Text
	}
	return e.Text + "\n  to do: " + e.Next
}

// Explain turns an error of the generated clients into an [*Error].
func Explain(err error) error {
	var ce *connect.Error
	if !errors.As(err, &ce) {
		return err
	}
	out := &Error{Code: ce.Code(), Text: ce.Message()}
	for _, d := range ce.Details() {
		if v, err := d.Value(); err == nil {
			if info, ok := v.(*apipb.ErrorInfo); ok {
				out.Reason, out.Next = info.Reason, info.Next
			}
		}
	}
	var op *net.OpError
	if out.Reason == "" && errors.As(err, &op) && op.Op == "dial" {
		out.Reason, out.Next = "NO_AGENT", "start the agent, or name its socket with --socket"
	}
	return out
}

// Signer is a key of an agent as a [crypto.Signer].
type Signer struct {
	client *Client
	name   string
	scheme string
	public crypto.PublicKey
}

// Key returns a key as a [crypto.Signer].
func (c *Client) Key(ctx context.Context, name string) (*Signer, error) {
	k, err := c.GetKey(ctx, name)
	if err != nil {
		return nil, err
	}
	if len(k.PublicKey) == 0 {
		return nil, fmt.Errorf("key %q has no public key yet: %s: %s", name, k.Condition, k.Detail)
	}
	public, err := x509.ParsePKIXPublicKey(k.PublicKey)
	if err != nil {
		return nil, fmt.Errorf("public key of %q: %w", name, err)
	}
	return &Signer{client: c, name: name, scheme: k.Scheme, public: public}, nil
}

// Public returns the key's public key: an [ed25519.PublicKey] or, for ecdsa-p256, an
// [*ecdsa.PublicKey].
func (s *Signer) Public() crypto.PublicKey { return s.public }

// Sign signs a whole message with an Ed25519 key: opts.HashFunc() must be zero, as for
// [ed25519.PrivateKey.Sign]. With ECDSA it signs a SHA-256 digest, which the key's
// roster entry must allow; [Signer.SignMessage] needs no such leave. rand is not used.
func (s *Signer) Sign(_ io.Reader, message []byte, opts crypto.SignerOpts) ([]byte, error) {
	sign := s.client.Sign
	switch _, ed := s.public.(ed25519.PublicKey); {
	case ed && opts.HashFunc() == 0:
	case !ed && opts.HashFunc() == crypto.SHA256:
		sign = s.client.SignDigest
	default:
		return nil, fmt.Errorf("key %q (%s) signs whole messages, or with ECDSA SHA-256 digests", s.name, s.scheme)
	}
	r, err := sign(context.Background(), s.name, message)
	if err != nil {
		return nil, err
	}
	return r.Signature, nil
}

// SignMessage signs a whole message, which every host hashes itself
// ([crypto.MessageSigner]).
func (s *Signer) SignMessage(_ io.Reader, message []byte, _ crypto.SignerOpts) ([]byte, error) {
	r, err := s.client.Sign(context.Background(), s.name, message)
	if err != nil {
		return nil, err
	}
	return r.Signature, nil
}
