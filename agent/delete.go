package agent

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"conseal/agent/api/apipb"
	"conseal/agent/epoch"
	"conseal/agent/peer/peerpb"
	"conseal/agent/vault"
	"conseal/protocol"
)

// maxTold bounds the receipts in one status, in bytes; this host's own comes first.
const maxTold = 1 << 20

// receipt is a host's receipt of a key's deletion, which was verified when it came.
type receipt struct {
	*epoch.Receipt
	encoded []byte
	kept    bool // in the vault; owned by reconcile
}

// deletion does what the roster, the vault's tombstone and others' receipts say of a key
// that is to be deleted, or was. name is "" if nothing does.
func (a *Agent) deletion(ctx context.Context, k *key, v *vault.Vault) (name, detail string) {
	if err := a.keepReceipts(ctx, k, v); err != nil {
		a.log.Error("keeping receipts of a deletion", "key", k.id.Name, "error", err)
	}
	if t, ok := v.Deleted(k.id.Name); ok {
		return a.deleted(ctx, k, v, t)
	}
	record, _ := v.Record(k.id)
	switch by := k.deletedBy(); {
	case k.entry().State == "deleted":
		return a.awaitDeletion(ctx, k, v)
	case !record.Deleting.IsZero():
		if err := v.AwaitDeletion(ctx, k.id, time.Time{}); err != nil {
			return "deleted", fmt.Sprintf("the roster revokes the deletion, which could not be noted: %v", err)
		}
		a.log.Warn("the deletion was revoked by the roster", "key", k.id.Name, "roster", a.roster().Version)
	case len(by) > 0 && record.Active == (vault.Number{}) && len(k.entry().PublicKey) == 0 && !k.exists():
		return "refused", fmt.Sprintf("%s deleted a key of this name, and a name is never used again: give the key another name in the roster", by)
	}
	return "", ""
}

// awaitDeletion erases a key when its time has come.
func (a *Agent) awaitDeletion(ctx context.Context, k *key, v *vault.Vault) (name, detail string) {
	k.callOff()
	if err := a.checkDeletion(k, v); err != nil {
		return "refused", fmt.Sprintf("the roster deletes this key, and nothing is erased: %v", err)
	}
	record, _ := v.Record(k.id)
	if record.Deleting.IsZero() {
		if err := v.AwaitDeletion(ctx, k.id, time.Now()); err != nil {
			return "deleted", fmt.Sprintf("by the roster; its time could not be noted, and counts from when it is: %v", err)
		}
		record, _ = v.Record(k.id)
		a.log.Warn("the roster deletes a key", "key", k.id.Name, "roster", a.roster().Version, "after", k.entry().DeleteAfter)
	}
	if due := record.Deleting.Add(time.Duration(k.entry().DeleteAfter)); time.Now().Before(due) {
		return "deleted", fmt.Sprintf("this host erases its share at %s; a newer roster with another state revokes it", due.UTC().Format(time.RFC3339))
	}
	k.endActive()
	if err := v.Delete(ctx, k.id, sha256.Sum256(k.entry().PublicKey)); err != nil {
		return "deleted", fmt.Sprintf("its time has come, and this host's share is not erased yet: %v", err)
	}
	t, _ := v.Deleted(k.id.Name)
	a.log.Warn("the key is deleted: this host has erased all that it held of it", "key", k.id.Name, "shares", t.Shares, "roots", t.RootsAfter)
	return a.deleted(ctx, k, v, t)
}

// endActive ends the epoch that the key signs with, under sessions too.
func (k *key) endActive() {
	if act := k.active.Swap(nil); act != nil {
		act.close()
	}
}

// checkDeletion refuses to erase another key than the roster means.
func (a *Agent) checkDeletion(k *key, v *vault.Vault) error {
	for _, r := range v.Keys() {
		if r.Key.Name != k.id.Name {
			continue
		}
		public, err := a.heldPublic(k, v, r)
		if err != nil {
			return fmt.Errorf("which public key this host's share of incarnation %d has cannot be told: %w", r.Key.Incarnation, err)
		}
		if public != nil && !bytes.Equal(public, k.entry().PublicKey) {
			return fmt.Errorf("the roster repeats public key %s, and this host has a share of %x: correct the roster's `public_key`", k.entry().PublicKey, public)
		}
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.known != nil && !bytes.Equal(k.known.output.pin, k.entry().PublicKey) {
		return fmt.Errorf("the roster repeats public key %s, and the key has %x: correct the roster's `public_key`", k.entry().PublicKey, k.known.output.pin)
	}
	return nil
}

// heldPublic is the public key of what the vault has of an incarnation, in the scheme's
// own form; nil if that was not born as far as this host can tell.
func (a *Agent) heldPublic(k *key, v *vault.Vault, r vault.Record) ([]byte, error) {
	var n vault.Number
	switch {
	case r.Active != n:
		encoded, err := v.Certificate(r.Key)
		if err == nil {
			var c *epoch.Certificate
			if c, err = epoch.Decode(encoded); err == nil {
				return k.publicOf(c.Public)
			}
		}
		if n = r.Active; !r.Holds(n) {
			return nil, err
		}
	case r.Voted != nil && r.Holds(r.Voted.Number):
		n = r.Voted.Number
	default:
		return nil, nil
	}
	public, err := v.Public(r.Key, n)
	if err != nil {
		return nil, err
	}
	return k.publicOf(public)
}

func (k *key) publicOf(public []byte) ([]byte, error) {
	out, err := k.scheme.inspect(public)
	return out.pin, err
}

// deleted is the condition of a key that this host has erased, for ever. It sees to it
// that there is a receipt.
func (a *Agent) deleted(ctx context.Context, k *key, v *vault.Vault, t vault.Tombstone) (name, detail string) {
	k.endActive()
	k.mu.Lock()
	delete(k.views, a.self)
	delete(k.statements, a.self)
	k.next, k.settled = "", true
	have, unknown := k.receipts[a.self] != nil, k.known == nil
	k.mu.Unlock()
	if record, _ := v.Record(t.Key); unknown && t.Key == k.id && record.Active != (vault.Number{}) {
		a.recall(k, v)
	}
	detail = fmt.Sprintf("this host erased its share at %s, for ever", t.At.UTC().Format(time.RFC3339))
	if t.Shares == 0 {
		detail = fmt.Sprintf("this host held no share when it deleted the key at %s, for ever", t.At.UTC().Format(time.RFC3339))
	}
	if state := k.entry().State; state != "deleted" {
		detail += fmt.Sprintf("; the roster says that it is %s: a name that was deleted is never used again; give the key another name", state)
	}
	if !have {
		if err := a.makeReceipt(ctx, k, v, t); err != nil {
			detail += fmt.Sprintf("; there is no receipt of it yet: %v", err)
		}
	}
	return "deleted", detail
}

// recall has the certificate of a key that is deleted at hand, to show.
func (a *Agent) recall(k *key, v *vault.Vault) {
	c, err := a.readCertificate(k, v)
	if err != nil {
		return
	}
	if n, err := a.know(k, c); err == nil {
		k.learn(n)
		k.mu.Lock()
		k.settled = true
		k.mu.Unlock()
	}
}

// makeReceipt has the hardware certify the deletion, if it can, signs it and tells the
// others. It is tried again, ever more rarely: each try may wear the hardware.
func (a *Agent) makeReceipt(ctx context.Context, k *key, v *vault.Vault, t vault.Tombstone) error {
	if time.Now().Before(k.receiptRetry.after) {
		return errors.New(k.receiptRetry.last)
	}
	if err := a.tryReceipt(ctx, k, v, t); err != nil {
		k.receiptRetry.fail(err)
		return err
	}
	a.announce(k)
	return nil
}

func (a *Agent) tryReceipt(ctx context.Context, k *key, v *vault.Vault, t vault.Tombstone) error {
	d := epoch.Deletion{
		Fleet: a.roster().Fleet, Key: t.Key, Public: t.Public, Host: a.self, Time: t.At, Protector: a.protector.Kind(),
		Shares: t.Shares, RootsBefore: t.RootsBefore, RootsAfter: t.RootsAfter,
	}
	var proof []byte
	if c, ok := a.protector.(vault.Certifier); ok {
		var err error
		if proof, err = c.Receipt(ctx, d.Digest()); err != nil {
			return fmt.Errorf("the hardware does not certify it: %w", err)
		}
	}
	r, err := d.Sign(a.identity, proof)
	if err != nil {
		return err
	}
	encoded, err := r.Encode()
	if err != nil {
		return err
	}
	if err := a.ledger.Append(entry{Event: "delete", Key: k.id.Name})(ctx); err != nil {
		return err
	}
	if err := v.KeepReceipt(ctx, t.Key, encoded); err != nil {
		return err
	}
	k.mu.Lock()
	k.receipts[a.self] = &receipt{r, encoded, true}
	k.mu.Unlock()
	return nil
}

// keepReceipts reads the receipts that the vault has, once, and puts into it those that
// others sent.
func (a *Agent) keepReceipts(ctx context.Context, k *key, v *vault.Vault) error {
	var failed error
	if !k.receiptsRead {
		k.receiptsRead = true
		encoded, err := v.Receipts(k.id.Name)
		failed = err
		for _, b := range encoded {
			r, err := epoch.DecodeReceipt(b)
			if err != nil {
				failed = errors.Join(failed, err)
				continue
			}
			k.mu.Lock()
			k.receipts[r.Host] = &receipt{r, b, true}
			k.mu.Unlock()
		}
	}
	k.mu.Lock()
	all := slices.Collect(maps.Values(k.receipts))
	k.mu.Unlock()
	for _, r := range all {
		if r.kept {
			continue
		}
		if err := v.KeepReceipt(ctx, k.id, r.encoded); err != nil {
			failed = errors.Join(failed, err)
			continue
		}
		r.kept = true
		a.log.Info("receipt of a deletion", "key", k.id.Name, "host", r.Host, "time", r.Time.UTC().Format(time.RFC3339))
	}
	return failed
}

// hearReceipts takes the receipts that a peer sent.
func (a *Agent) hearReceipts(k *key, from protocol.HostID, encoded [][]byte) error {
	if len(encoded) > vault.MaxReceipts {
		return fmt.Errorf("key %q: %d receipts are over the limit", k.id.Name, len(encoded))
	}
	for _, b := range encoded {
		r, err := epoch.DecodeReceipt(b)
		if err != nil {
			return fmt.Errorf("key %q: %w", k.id.Name, err)
		}
		k.mu.Lock()
		have := k.receipts[r.Host]
		if have != nil && r.Host == a.self && bytes.Equal(have.encoded, b) {
			k.shown[from] = true
		}
		k.mu.Unlock()
		if have != nil { // a host's first word counts
			continue
		}
		if err := a.checkReceipt(k, r); err != nil {
			return fmt.Errorf("key %q: %w", k.id.Name, err)
		}
		k.mu.Lock()
		k.receipts[r.Host] = &receipt{r, b, false}
		k.mu.Unlock()
		a.nudge()
	}
	return nil
}

// checkReceipt refuses a receipt that is about another key than this host knows by the
// name, or that no host of the roster signed.
func (a *Agent) checkReceipt(k *key, r *epoch.Receipt) error {
	if r.Fleet != a.roster().Fleet || r.Key.Name != k.id.Name {
		return fmt.Errorf("receipt of host %q: it is about key %q of fleet %q", r.Host, r.Key.Name, r.Fleet)
	}
	public := []byte(k.entry().PublicKey)
	k.mu.Lock()
	if k.known != nil {
		public = k.known.output.pin
	}
	k.mu.Unlock()
	if len(public) > 0 && r.Public != sha256.Sum256(public) {
		return fmt.Errorf("receipt of host %q: it is about another public key", r.Host)
	}
	pin, ok := k.declared.Load().pins[r.Host]
	if !ok {
		return fmt.Errorf("receipt of host %q: the roster has no such host", r.Host)
	}
	return r.Verify(pin)
}

// deletedBy names the hosts of whose receipts this host has, for people; "" if there are
// none.
func (k *key) deletedBy() string {
	k.mu.Lock()
	defer k.mu.Unlock()
	var hosts []string
	for _, h := range slices.Sorted(maps.Keys(k.receipts)) {
		hosts = append(hosts, fmt.Sprintf("host %q", h))
	}
	return strings.Join(hosts, ", ")
}

// buried refuses what would use a name again that this host deleted.
func (a *Agent) buried(k *key, v *vault.Vault) error {
	if t, ok := v.Deleted(k.id.Name); ok {
		return a.refuse(reasonRefused, "it deleted a key of this name at %s, and a name is never used again", t.At.UTC().Format(time.RFC3339))
	}
	return nil
}

// tellReceipts adds receipts to a status; k.mu is held.
func (k *key) tellReceipts(self protocol.HostID, s *peerpb.KeyStatus) {
	size := 0
	add := func(r *receipt) {
		if size += len(r.encoded); size <= maxTold {
			s.Receipts = append(s.Receipts, r.encoded)
		}
	}
	if own := k.receipts[self]; own != nil {
		add(own)
	}
	for _, h := range slices.Sorted(maps.Keys(k.receipts)) {
		if h != self {
			add(k.receipts[h])
		}
	}
}

// announceReceipt tells those who have not shown that they have this host's receipt.
func (a *Agent) announceReceipt(k *key) {
	for _, h := range k.circle() {
		k.mu.Lock()
		told := k.shown[h] || k.receipts[a.self] == nil
		k.mu.Unlock()
		if h != a.self && !told {
			a.tell(h, k)
		}
	}
}

// describeReceipts fills in the API's form; k.mu is held.
func (k *key) describeReceipts(out *apipb.Key) {
	for _, h := range slices.Sorted(maps.Keys(k.receipts)) {
		r := k.receipts[h]
		out.Receipts = append(out.Receipts, &apipb.Receipt{
			Host: string(r.Host), Time: r.Time.UTC().Format(time.RFC3339), Protector: r.Protector, Shares: r.Shares,
			RootsBefore: r.RootsBefore, RootsAfter: r.RootsAfter, Proof: r.Proof, Encoded: r.encoded,
		})
	}
	if out.State != "deleted" {
		return
	}
	hosts := slices.Clone(k.holders())
	if k.known != nil {
		hosts = append(hosts, k.known.output.holders...)
		if len(out.PublicKey) == 0 {
			out.PublicKey = k.known.output.spki
		}
	}
	slices.Sort(hosts)
	for _, h := range slices.Compact(hosts) {
		if k.receipts[h] == nil {
			out.ReceiptsMissing = append(out.ReceiptsMissing, string(h))
		}
	}
}
