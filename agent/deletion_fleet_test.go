package agent_test

import (
	"context"
	"crypto/ecdsa"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-tpm/tpm2"

	"conseal/agent/epoch"
	"conseal/testenv"
	"conseal/tpm"
	"conseal/tpm/attest"
	"conseal/tpm/policy"
)

// TestDeletedKeyStaysDead deletes a key on two TPMs and an HSM, while one host is off, and
// then puts the state folders of all hosts back as they were before, each on its own
// hardware, with the roster of then. Before the deletion the same folders sign.
func TestDeletedKeyStaysDead(t *testing.T) {
	ctx, f := newFleet(t)
	must(t, f.Start(ctx))
	must(t, f.WaitReady(ctx, "first"))
	key, err := f.Hosts[0].Client().GetKey(ctx, "first")
	must(t, err)
	must(t, f.Stop(ctx))
	old := func(h *testenv.Host) string { return filepath.Join(f.Dir, "old-"+h.Name) }
	for _, h := range f.Hosts {
		copyFolder(t, h.State(), old(h))
		copyFolder(t, old(h), h.State())
	}
	must(t, f.Start(ctx))
	must(t, f.WaitReady(ctx, "first"))
	checkKey(ctx, t, f, "first")

	must(t, f.Host("beta").Stop(ctx))
	before := f.Keys
	deleted := strings.Replace(before, `state = "active"`, `state = "deleted"`, 1)
	deleted = strings.Replace(deleted, "generate = true\n", fmt.Sprintf("public_key = \"%x\"\ndelete_after = \"0s\"\n", key.PublicKey[len(key.PublicKey)-32:]), 1)
	f.Keys = deleted
	must(t, f.WriteRoster(2))
	for _, name := range []string{"alpha", "gamma"} {
		_, err := f.Host(name).Client().LoadRoster(ctx)
		must(t, err)
	}
	waitFor(ctx, t, "gamma has alpha's receipt and lacks beta's", func() bool {
		k, err := f.Host("gamma").Client().GetKey(ctx, "first")
		must(t, err)
		return len(k.Receipts) == 2 && len(k.ReceiptsMissing) == 1 && k.ReceiptsMissing[0] == "beta" && k.Condition == "deleted"
	})
	must(t, f.Host("beta").Start(ctx))
	for _, h := range f.Hosts {
		waitFor(ctx, t, h.Name+" has all receipts", func() bool {
			k, err := h.Client().GetKey(ctx, "first")
			must(t, err)
			return len(k.Receipts) == 3 && len(k.ReceiptsMissing) == 0
		})
		if _, err := h.Client().Sign(ctx, "first", []byte("m")); reason(err) != "KEY_DELETED" {
			t.Errorf("signing on %s: %v", h.Name, err)
		}
		if got := shareFiles(t, h); got != 0 {
			t.Errorf("%s still has %d share files", h.Name, got)
		}
	}
	k, err := f.Host("gamma").Client().GetKey(ctx, "first")
	must(t, err)
	must(t, f.Stop(ctx))
	for _, r := range k.Receipts {
		decoded, err := epoch.DecodeReceipt(r.Encoded)
		must(t, err)
		h := f.Host(r.Host)
		if h.Protector == "hsm" {
			if len(r.Proof) != 0 || r.Shares != 1 {
				t.Errorf("%s: %v", r.Host, r)
			}
			continue
		}
		statement := decoded.Digest()
		if err := verifyProof(ctx, t, h, r.Proof, statement[:]); err != nil {
			t.Errorf("the proof of %s: %v", r.Host, err)
		}
		statement[0]++
		if verifyProof(ctx, t, h, r.Proof, statement[:]) == nil {
			t.Errorf("the proof of %s is one of anything", r.Host)
		}
	}

	f.Keys = before
	must(t, f.WriteRoster(1))
	for _, h := range f.Hosts {
		copyFolder(t, h.State(), filepath.Join(f.Dir, "now-"+h.Name))
		copyFolder(t, old(h), h.State())
	}
	for _, h := range f.Hosts { // a host may refuse to start
		if err := h.Start(ctx); err != nil {
			t.Logf("%s does not start with its old folder: %v", h.Name, err)
		}
	}
	for _, h := range f.Hosts {
		if !h.Running() {
			continue
		}
		if _, err := h.Client().Sign(ctx, "first", []byte("m")); reason(err) != "KEY_NOT_READY" {
			t.Errorf("%s with the state folder of before: %v", h.Name, err)
		}
		s, err := h.Client().Status(ctx)
		must(t, err)
		if s.ProtectorError == "" || s.Keys[0].Condition != "sealed" {
			t.Errorf("%s opened the state folder of before: key is %s", h.Name, s.Keys[0].Condition)
		}
	}

	must(t, f.Stop(ctx))
	f.Keys = strings.Replace(before, "generate = true", "generate = true\nincarnation = 2", 1)
	must(t, f.WriteRoster(3))
	for _, h := range f.Hosts {
		copyFolder(t, filepath.Join(f.Dir, "now-"+h.Name), h.State())
	}
	must(t, f.Start(ctx))
	for _, h := range f.Hosts {
		waitCondition(ctx, t, h, "first", "deleted", "never used again")
		k, err := h.Client().GetKey(ctx, "first")
		must(t, err)
		if len(k.Receipts) != 3 {
			t.Errorf("%s has %d receipts after it all", h.Name, len(k.Receipts))
		}
	}
}

// verifyProof checks what a stopped host's TPM certified, as who attested it would.
func verifyProof(ctx context.Context, t *testing.T, h *testenv.Host, proof, statement []byte) error {
	t.Helper()
	var kept struct {
		PCRWanted map[int][]byte `json:"pcr_wanted"`
		Identity  string         `json:"identity"`
	}
	b, err := os.ReadFile(filepath.Join(h.State(), "tpm.json"))
	must(t, err)
	must(t, json.Unmarshal(b, &kept))
	p := openTPM(ctx, t, h, h.State())
	defer p.Close(ctx)
	claim, err := p.Claim(ctx, []byte(kept.Identity))
	must(t, err)
	public, err := tpm2.Unmarshal[tpm2.TPMTPublic](claim.AK)
	must(t, err)
	ak, err := tpm2.Pub(*public)
	must(t, err)
	rule, err := policy.State(kept.PCRWanted).AuthPolicy(false)
	must(t, err)
	r, err := attest.DecodeReceipt(proof)
	must(t, err)
	_, err = attest.VerifyReceipt(r, ak.(*ecdsa.PublicKey), attest.Counter{Index: tpm.DefaultNVReceipts, Policy: rule}, statement)
	return err
}
