package agent

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"slices"
	"time"

	"conseal/agent/epoch"
	"conseal/agent/peer/peerpb"
	"conseal/agent/vault"
	"conseal/protocol"
)

// known is the highest certificate of a key that this host has, whether it holds a
// share of the epoch or not.
type known struct {
	certificate *epoch.Certificate
	id          [32]byte
	output      output
}

// know reads a certificate, and refuses one that is about something else than this key
// or does not hold together. It checks no signature.
func (a *Agent) know(k *key, c *epoch.Certificate) (*known, error) {
	s := &c.Subject
	if s.Fleet != a.roster().Fleet || s.Key != k.id || s.Scheme != k.entry().Scheme {
		return nil, fmt.Errorf("certificate is about key %q, incarnation %d, %s, of fleet %q", s.Key.Name, s.Key.Incarnation, s.Scheme, s.Fleet)
	}
	if epoch.OutputDigest(s.Scheme, c.Public) != s.Output {
		return nil, errors.New("certificate is about another public output than it holds")
	}
	out, err := k.scheme.inspect(c.Public)
	if err != nil {
		return nil, fmt.Errorf("reading the public output of key %q: %w", k.id.Name, err)
	}
	return &known{c, s.ID(), out}, nil
}

func (n *known) number() vault.Number {
	if n == nil {
		return vault.Number{}
	}
	return n.certificate.Subject.Number
}

func (n *known) base() epoch.Base {
	if n == nil {
		return epoch.Base{}
	}
	s := &n.certificate.Subject
	return epoch.Base{Number: s.Number, Certificate: n.id, Quorum: n.output.quorum, Holders: n.output.holders, Entry: s.Entry}
}

// statement returns the statement of a holder, if the roster still pins the identity
// that made it.
func (n *known) statement(k *key, h protocol.HostID) (epoch.Statement, bool) {
	pin, ok := k.declared.Load().pins[h]
	for _, st := range n.certificate.Statements {
		if st.Holder == h {
			return st, ok && sha256.Sum256(st.PublicKey) == pin
		}
	}
	return epoch.Statement{}, false
}

// dealers lists the holders that the roster still has, as they were.
func (n *known) dealers(k *key) (dealers []protocol.HostID) {
	if n == nil {
		return nil
	}
	for _, h := range n.output.holders {
		if _, ok := n.statement(k, h); ok {
			dealers = append(dealers, h)
		}
	}
	return dealers
}

func (a *Agent) readCertificate(k *key, v *vault.Vault) (*epoch.Certificate, error) {
	encoded, err := v.Certificate(k.id)
	if err != nil {
		return nil, err
	}
	return epoch.Decode(encoded)
}

// checkKnown refuses a certificate that is for another public key than the roster pins,
// or than the key has.
func (a *Agent) checkKnown(k *key, n *known) error {
	if pinned := k.entry().PublicKey; len(pinned) > 0 && !bytes.Equal(pinned, n.output.pin) {
		return fmt.Errorf("the roster pins public key %s, the certificate is for %x", pinned, n.output.pin)
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.known != nil && !bytes.Equal(k.known.output.spki, n.output.spki) {
		return errors.New("the certificate is for another public key than the epoch before it")
	}
	return nil
}

// checkCertificate refuses a certificate that a host showed, unless it is about this key
// as the roster declares it, or about a share that this host holds and has voted for by
// an earlier roster. That it has voted for another since changes nothing: the others may
// have erased what was before.
func (a *Agent) checkCertificate(k *key, v *vault.Vault, n *known) error {
	if err := a.checkKnown(k, n); err != nil {
		return err
	}
	s := &n.certificate.Subject
	pins := k.pins(n.output.holders)
	record, _ := v.Record(k.id)
	switch mine := slices.Contains(record.Staged, vault.Staged{Number: s.Number, Output: s.Output}); {
	case s.Entry != k.digest() && !mine:
		return errors.New("certificate is for other hosts, identities or another quorum than the roster declares for this key: give this host the roster that the others have")
	case s.Entry != k.digest(): // the statements of hosts that the roster has no more cannot be checked
		for _, st := range n.certificate.Statements {
			if sha256.Sum256(st.PublicKey) != pins[st.Holder] {
				delete(pins, st.Holder)
			}
		}
		if _, signed := pins[a.self]; !signed {
			return errors.New("certificate without a statement of this host")
		}
		return n.certificate.VerifySome(pins)
	case n.output.quorum != k.entry().Quorum || !slices.Equal(n.output.holders, k.holders()):
		return fmt.Errorf("key %q: its certificate is for quorum %d of %q, the roster says %d of %q", k.id.Name, n.output.quorum, n.output.holders, k.entry().Quorum, k.holders())
	}
	return n.certificate.Verify(pins)
}

// adopt takes a certificate that a peer sent or that was put together here.
func (a *Agent) adopt(ctx context.Context, k *key, v *vault.Vault, c *epoch.Certificate) error {
	n, err := a.know(k, c)
	if err != nil {
		return err
	}
	record, _ := v.Record(k.id)
	k.mu.Lock()
	unread := k.known == nil // the certificate of the active epoch may be damaged
	k.mu.Unlock()
	if older := record.Active.Compare(n.number()); older > 0 || older == 0 && !unread {
		return nil
	}
	if err := a.checkCertificate(k, v, n); err != nil {
		return err
	}
	if !record.Holds(n.number()) { // of an epoch that this host is no holder of, or lost its share of
		k.learn(n)
		k.supersede(n.number(), a.config.Limits.SignDeadline)
		if slices.Contains(n.output.holders, a.self) {
			return fmt.Errorf("epoch %s of key %q: this host is a holder, and %w", n.number(), k.id.Name, vault.ErrNoShare)
		}
		return nil
	}
	encoded, err := c.Encode()
	if err != nil {
		return err
	}
	if err := v.Activate(ctx, k.id, c.Subject.Number, encoded); err != nil {
		return fmt.Errorf("activating epoch %s of key %q: %w", c.Subject.Number, k.id.Name, err)
	}
	if c.Subject.Parent != [32]byte{} {
		k.learn(n)
	}
	return nil
}

// want asks hosts for the certificate that they say they have: all of them, as one may
// lie and another may not.
func (a *Agent) want(k *key, hosts []protocol.HostID) {
	k.mu.Lock()
	soon := time.Since(k.wanted) < reconcileEvery/4
	if len(hosts) > 0 && !soon {
		k.wanted = time.Now()
	}
	k.mu.Unlock()
	if !soon {
		a.ask(k, hosts)
	}
}

// ask asks hosts for their certificate and what they have of a key.
func (a *Agent) ask(k *key, hosts []protocol.HostID) {
	for _, h := range hosts {
		f := &peerpb.CertificateRequest{Key: k.id.Name, Incarnation: k.id.Incarnation}
		_ = a.net.Send(h, &peerpb.Frame{Body: &peerpb.Frame_Want{Want: f}}) // asked again if it is lost
	}
}

// offer sends a certificate that a peer asked for, and says how the key stands here: what
// it was told may have been lost.
func (a *Agent) offer(to protocol.HostID, want *peerpb.CertificateRequest) {
	if k := a.key(want.Key); k != nil && k.id.Incarnation == want.Incarnation {
		a.offerKnown(k, to)
		a.tell(to, k)
	}
}

// offerKnown sends the highest certificate of a key. It is no secret among the hosts.
func (a *Agent) offerKnown(k *key, to protocol.HostID) {
	k.mu.Lock()
	n := k.known
	k.mu.Unlock()
	if n == nil {
		return
	}
	if encoded, err := n.certificate.Encode(); err == nil {
		_ = a.net.Send(to, &peerpb.Frame{Body: &peerpb.Frame_Certificate{Certificate: &peerpb.CertificateOffer{Certificate: encoded}}})
	}
}

// offered takes up a certificate that a peer sent.
func (a *Agent) offered(from protocol.HostID, offer *peerpb.CertificateOffer) error {
	c, err := epoch.Decode(offer.Certificate)
	if err != nil {
		return err
	}
	k, v := a.key(c.Subject.Key.Name), a.vault.Load()
	if k == nil || v == nil || !a.sessions.admit(from) {
		return nil
	}
	a.tasks.Go(func() {
		defer a.sessions.release(from)
		if err := a.adopt(a.ctx, k, v, c); err != nil {
			a.complain("certificate not taken up", "peer", from, "key", k.id.Name, "error", err)
		}
		a.nudge()
	})
	return nil
}
