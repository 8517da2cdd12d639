package agent

import (
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"conseal/agent/epoch"
	"conseal/agent/peer/peerpb"
	"conseal/agent/vault"
	"conseal/config"
	"conseal/protocol"
)

// declare writes the next roster: of key "first", held by all of hosts, it says that.
func (l *lab) declare(says string, holders ...string) {
	l.t.Helper()
	var text strings.Builder
	fmt.Fprintf(&text, "fleet = \"lab\"\nversion = %d\n", l.roster.Version+1)
	for name, h := range l.hosts {
		pin, err := config.PinOf(h.identity.Public())
		ok(l.t, err)
		fmt.Fprintf(&text, "[[host]]\nname = %q\naddress = %q\nidentity = %q\nprotector = \"tpm\"\n", name, h.config.Listen.Address, pin)
	}
	fmt.Fprintf(&text, "[[key]]\nname = \"first\"\nscheme = \"ed25519\"\nquorum = 2\nhosts = [\"%s\"]\npurpose = \"a test\"\n%s\n", strings.Join(holders, `", "`), says)
	roster, err := config.ParseRoster([]byte(text.String()))
	ok(l.t, err)
	l.roster = roster
}

var three = []string{"alpha", "beta", "gamma"}

// deletes is an entry that deletes a public key after a time.
func deletes(public []byte, after string) string {
	return fmt.Sprintf("state = \"deleted\"\npublic_key = \"%x\"\ndelete_after = %q", public, after)
}

// certifier is a hardware that certifies statements.
type certifier struct {
	*hardware
	refuses error
}

func (c *certifier) Receipt(_ context.Context, statement [32]byte) ([]byte, error) {
	return append([]byte("certified "), statement[:]...), c.refuses
}

func (l *lab) vaultOf(name string) *vault.Vault { return l.hosts[name].agent.vault.Load() }

// staged counts the shares that a host has.
func (l *lab) staged(name string) (n int) {
	for _, r := range l.vaultOf(name).Keys() {
		n += len(r.Staged)
	}
	return n
}

// untilReceipts waits until a host shows those hosts' receipts and misses the others'.
func (l *lab) untilReceipts(at string, of ...string) {
	l.t.Helper()
	l.until(fmt.Sprintf("%s has the receipts of %q", at, of), func() bool {
		d := l.key(at).describe(protocol.HostID(at))
		var got []string
		for _, r := range d.Receipts {
			got = append(got, r.Host)
		}
		return slices.Equal(got, of) && len(d.ReceiptsMissing) == 3-len(of)
	})
}

// TestDeletion deletes a key: first it waits and can be revoked, then it is erased, with
// receipts of all; a host that was off erases when it is back; the name stays dead.
func TestDeletion(t *testing.T) {
	l := born(t)
	public := l.key("alpha").active.Load().output.pin

	l.declare(deletes(public, "168h"), three...)
	l.deliver(three...)
	since := func(name string) time.Time {
		record, _ := l.vaultOf(name).Record(vault.KeyID{Name: "first", Incarnation: 1})
		return record.Deleting
	}
	for _, name := range three {
		l.untilSays(name, "deleted", "this host erases its share at", "revokes it")
		l.untilSays(name, "deleted", since(name).Add(168*time.Hour).UTC().Format(time.RFC3339))
		if _, err := l.sign(name, []byte("while it waits")); err == nil {
			t.Errorf("%s signs with a key whose deletion waits", name)
		}
	}
	ok(t, l.hosts["beta"].stop())
	before := since("alpha")
	ok(t, l.hosts["alpha"].stop())
	l.start("alpha", "beta")
	l.untilSays("alpha", "deleted", "erases its share at")
	if got := since("alpha"); before.IsZero() || !got.Equal(before) {
		t.Errorf("after a restart the deletion waits since %s, not %s", got, before)
	}

	l.declare(fmt.Sprintf("state = \"active\"\npublic_key = \"%x\"", public), three...)
	l.deliver(three...)
	for _, name := range three {
		l.untilSays(name, "ready")
		if !since(name).IsZero() {
			t.Errorf("%s did not note that the deletion was revoked", name)
		}
		_, err := l.sign(name, []byte("after it was revoked"))
		ok(t, err)
	}

	ok(t, l.hosts["gamma"].stop())
	l.declare(deletes(public, "0s"), three...)
	l.deliver("alpha", "beta")
	for _, name := range []string{"alpha", "beta"} {
		l.untilSays(name, "deleted", "this host erased its share at")
		l.untilReceipts(name, "alpha", "beta")
		if l.staged(name) != 0 || l.key(name).active.Load() != nil {
			t.Errorf("%s still has a share", name)
		}
	}
	l.start("gamma") // it reads its own roster
	for _, name := range three {
		l.untilReceipts(name, three...)
	}
	if l.staged("gamma") != 0 {
		t.Error("gamma still has a share")
	}
	d := l.key("alpha").describe("alpha")
	if r := d.Receipts[2]; r.Host != "gamma" || r.Shares != 1 || r.RootsAfter != r.RootsBefore+1 || r.Protector != "tpm" || len(d.PublicKey) == 0 {
		t.Errorf("alpha shows %v", d)
	}

	for _, name := range three { // all of it is still there after a restart
		ok(t, l.hosts[name].stop())
	}
	l.declare("state = \"active\"\nincarnation = 2\ngenerate = true", three...)
	l.start(three...)
	for _, name := range three {
		l.untilSays(name, "deleted", "the roster says that it is active", "never used again")
		a, k, next := l.hosts[name].agent, l.key(name), vault.Number{Roster: l.roster.Version, Attempt: 9}
		if _, _, err := a.mayGenerate(t.Context(), k, next); err == nil || !strings.Contains(err.Error(), "it deleted a key of this name") {
			t.Errorf("%s would generate: %v", name, err)
		}
		if err := a.mayReshare(k, l.vaultOf(name), &resharing{number: next}); err == nil || !strings.Contains(err.Error(), "it deleted a key of this name") {
			t.Errorf("%s would take part in a resharing: %v", name, err)
		}
	}
}

// TestDeletedNameElsewhere uses a deleted name for hosts that never held the key, and for
// such and others.
func TestDeletedNameElsewhere(t *testing.T) {
	l := born(t)
	public := l.key("alpha").active.Load().output.pin
	l.declare(deletes(public, "0s"), three...)
	l.deliver(three...)
	for _, name := range three {
		l.untilReceipts(name, three...)
	}
	ok(t, l.hosts["gamma"].stop())
	ok(t, l.hosts["beta"].stop())
	l.addHost("zeta")
	l.declare(deletes(public, "0s"), "alpha", "beta", "zeta")
	l.start("zeta") // which never held it
	l.untilSays("zeta", "deleted", "held no share")
	l.until("zeta has its receipt", func() bool { return len(l.key("zeta").describe("zeta").Receipts) > 0 })
	ok(t, l.hosts["zeta"].stop())
	l.addHost("delta")
	l.declare(deletes(public, "0s"), three...) // for the next address
	l.addHost("epsilon")
	l.declare("state = \"active\"\nincarnation = 2\ngenerate = true", "delta", "epsilon")
	l.deliver("alpha")
	l.start("delta")
	l.untilSays("delta", "refused", `host "alpha"`, "never used again")
	l.until("delta has kept the receipts", func() bool { return l.vaultOf("delta").HasReceipts("first") })
	ok(t, l.hosts["alpha"].stop())
	ok(t, l.hosts["delta"].stop())
	l.start("delta", "epsilon") // nobody is there who could tell them again
	l.untilSays("delta", "refused", `host "alpha"`, "never used again")
	a, k := l.hosts["delta"].agent, l.key("delta")
	if _, _, err := a.mayGenerate(t.Context(), k, vault.Number{Roster: l.roster.Version, Attempt: 1}); err == nil || !strings.Contains(err.Error(), "never used again") {
		t.Errorf("delta would generate: %v", err)
	}
	l.untilSays("epsilon", "refused", "never used again")
}

// TestDeletionOfAnotherKey repeats a wrong public key.
func TestDeletionOfAnotherKey(t *testing.T) {
	l := born(t)
	wrong := bytes.Repeat([]byte{7}, 32)
	l.declare(deletes(wrong, "0s"), three...)
	if _, err := l.hosts["alpha"].agent.TakeRoster(l.roster); err == nil || !strings.Contains(err.Error(), "pins public key 0707") {
		t.Errorf("alpha takes the roster: %v", err)
	}
	ok(t, l.hosts["alpha"].stop())
	l.start("alpha") // which knows nothing but its vault
	l.untilSays("alpha", "refused", "nothing is erased", "public key 0707", fmt.Sprintf("%x", l.key("beta").active.Load().output.pin))
	if l.staged("alpha") != 1 {
		t.Error("alpha erased another key than the roster means")
	}
}

// TestHardwareCertifiesDeletion wants the proof under the signature, and a receipt only
// when the hardware gave it.
func TestHardwareCertifiesDeletion(t *testing.T) {
	l := born(t)
	a, k := l.hosts["alpha"].agent, l.key("alpha")
	ok(t, l.hosts["alpha"].stop())
	c := &certifier{l.hosts["alpha"].protector, os.ErrDeadlineExceeded}
	a.protector = c
	v, err := vault.Open(t.Context(), VaultFolder(a.config), "alpha", c)
	ok(t, err)
	defer v.Close()
	ok(t, v.Delete(t.Context(), k.id, sha256.Sum256(k.known.output.pin)))
	tomb, _ := v.Deleted("first")
	a.ledger, err = openLedger(a.config.State)
	ok(t, err)
	defer a.ledger.Close()
	if _, detail := a.deleted(t.Context(), k, v, tomb); !strings.Contains(detail, "the hardware does not certify it") || v.HasReceipts("first") {
		t.Errorf("without a proof: %s", detail)
	}
	c.refuses, k.receiptRetry = nil, retry{}
	if _, detail := a.deleted(t.Context(), k, v, tomb); strings.Contains(detail, "receipt") {
		t.Errorf("with a proof: %s", detail)
	}
	r := k.receipts["alpha"]
	if want := r.Digest(); r == nil || !bytes.Equal(r.Proof, append([]byte("certified "), want[:]...)) {
		t.Fatalf("receipt %v", r)
	}
	pin := k.declared.Load().pins["alpha"]
	ok(t, r.Verify(pin))
	r.Proof = []byte("of something else")
	if r.Verify(pin) == nil {
		t.Error("a receipt with another proof verifies")
	}
}

// TestForgedReceipts has a host that lies about deletions.
func TestForgedReceipts(t *testing.T) {
	l := born(t)
	r := l.betray("gamma")
	k := l.key("alpha")
	entry := k.digest()
	good := epoch.Deletion{
		Fleet: "lab", Key: k.id, Public: sha256.Sum256(k.active.Load().output.pin), Host: "gamma", Time: time.Unix(1700000000, 0), Protector: "tpm",
		Shares: 1, RootsBefore: 5, RootsAfter: 6,
	}
	sign := func(by string, change func(*epoch.Deletion), after func(*epoch.Receipt)) []byte {
		d := good
		change(&d)
		receipt, err := d.Sign(l.hosts[by].identity, []byte("proof"))
		ok(t, err)
		after(receipt)
		b, err := receipt.Encode()
		ok(t, err)
		return b
	}
	same, none := func(*epoch.Receipt) {}, func(*epoch.Deletion) {}
	tell := func(receipts ...[]byte) {
		r.send("alpha", &peerpb.Frame{Body: &peerpb.Frame_Key{Key: &peerpb.KeyStatus{Key: "first", Incarnation: 1, Entry: entry[:], Unknown: true, Receipts: receipts}}})
	}
	for name, test := range map[string]struct {
		receipt []byte
		why     string
	}{
		"garbage":            {[]byte("garbage"), "decoding a receipt"},
		"too long":           {append(sign("gamma", none, same), 0), "1 bytes too many"},
		"another's name":     {sign("gamma", func(d *epoch.Deletion) { d.Host = "beta" }, same), "another identity than the roster pins"},
		"a stranger":         {sign("gamma", func(d *epoch.Deletion) { d.Host = "omega" }, same), "the roster has no such host"},
		"another key":        {sign("gamma", func(d *epoch.Deletion) { d.Key.Name = "second" }, same), "it is about key"},
		"another fleet":      {sign("gamma", func(d *epoch.Deletion) { d.Fleet = "other" }, same), "of fleet"},
		"another public key": {sign("gamma", func(d *epoch.Deletion) { d.Public[0]++ }, same), "another public key"},
		"changed time":       {sign("gamma", none, func(r *epoch.Receipt) { r.Time = r.Time.Add(time.Hour) }), "wrong signature"},
		"changed proof":      {sign("gamma", none, func(r *epoch.Receipt) { r.Proof = []byte("other") }), "wrong signature"},
		"no signature":       {sign("gamma", none, func(r *epoch.Receipt) { r.Signature = nil }), "wrong signature"},
	} {
		t.Run(name, func(t *testing.T) {
			tell(test.receipt)
			l.untilLogged("alpha", "bad frame", test.why)
			if k.deletedBy() != "" {
				t.Error("alpha believes it")
			}
		})
	}
	// A good one is taken, and deletes nothing here: the roster does not.
	tell(sign("gamma", none, same))
	l.until("alpha has gamma's receipt", func() bool { return k.deletedBy() == `host "gamma"` })
	tell(sign("gamma", func(d *epoch.Deletion) { d.Shares = 9 }, same)) // its first word counts
	r.settled("alpha")
	if d := k.describe("alpha"); len(d.Receipts) != 1 || d.Receipts[0].Shares != 1 || l.staged("alpha") != 1 {
		t.Errorf("alpha shows %v and has %d shares", d.Receipts, l.staged("alpha"))
	}
	_, err := l.sign("alpha", []byte("all the same"))
	ok(t, err)
}
