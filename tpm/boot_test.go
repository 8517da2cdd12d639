package tpm_test

import (
	"bytes"
	"crypto/sha256"
	"slices"
	"strings"
	"testing"

	"conseal/testenv"
	"conseal/tpm/attest"
	"conseal/tpm/attest/boot"
	"conseal/tpm/eventlog"
)

// A host booted as a real machine did is attested with its log, by our verification and
// by that of go-tpm-tools; both refuse the same lies about the quote.
func TestAttestedBoot(t *testing.T) {
	pcrs := []int{0, 4, 7, 8, 9}
	h := newHost(t, pcrs...)
	log, err := testenv.FirmwareLog("rhel8-uefi")
	if err == nil {
		err = h.tap.Boot(log)
	}
	if err != nil {
		t.Fatal(err)
	}
	raw := log.Encode()
	told := claim(t, h)
	attested := func(t *testing.T, lie func(e *attest.Evidence, sent *attest.Challenge)) (l *eventlog.Log, ours, theirs error) {
		sent, pending := challenge(t, told)
		e := prove(t, h, h.made.Identity, sent)
		held, err := h.OpenChallenge(t.Context(), sent)
		if err != nil {
			t.Fatal(err)
		}
		lie(e, sent)
		e.Prove(held)
		_, ours = pending.Verify(e, pcrs)
		l, theirs = boot.Verify(told, sent, e, raw)
		return l, ours, theirs
	}
	l, ours, theirs := attested(t, func(*attest.Evidence, *attest.Challenge) {})
	if ours != nil || theirs != nil {
		t.Fatalf("a genuine host: %v; %v", ours, theirs)
	}
	if on, err := l.SecureBoot(); !on || err != nil {
		t.Errorf("Secure Boot: %v, %v", on, err)
	}
	earlier := prove(t, h, h.made.Identity, func() *attest.Challenge { sent, _ := challenge(t, told); return sent }())
	for name, lie := range map[string]func(e *attest.Evidence, sent *attest.Challenge){
		"another value": func(e *attest.Evidence, _ *attest.Challenge) { e.PCRs[4] = bytes.Repeat([]byte{9}, 32) },
		"a PCR fewer":   func(e *attest.Evidence, _ *attest.Challenge) { delete(e.PCRs, 4) },
		"no PCRs":       func(e *attest.Evidence, _ *attest.Challenge) { e.PCRs = nil },
		"other PCRs":    func(e *attest.Evidence, _ *attest.Challenge) { e.PCRs[5] = e.PCRs[4]; delete(e.PCRs, 4) },
		"a quote of before": func(e *attest.Evidence, _ *attest.Challenge) {
			e.Quote, e.QuoteSignature = earlier.Quote, earlier.QuoteSignature
		},
		"a bit of the quote":  func(e *attest.Evidence, _ *attest.Challenge) { e.Quote[len(e.Quote)-1] ^= 1 },
		"another's signature": func(e *attest.Evidence, _ *attest.Challenge) { e.QuoteSignature = e.CertifySignature },
		"no quote":            func(e *attest.Evidence, _ *attest.Challenge) { e.Quote, e.QuoteSignature = nil, nil },
		"certified for quoted": func(e *attest.Evidence, _ *attest.Challenge) {
			e.Quote, e.QuoteSignature = e.Certify, e.CertifySignature
		},
	} {
		if _, ours, theirs := attested(t, lie); ours == nil || theirs == nil {
			t.Errorf("%s: ours says %v, go-tpm-tools %v", name, ours, theirs)
		}
	}

	sent, _ := challenge(t, told)
	e := prove(t, h, h.made.Identity, sent)
	for name, tell := range map[string]func(l *testenv.EventLog){
		"no event of PCR 4": func(l *testenv.EventLog) {
			l.Events = slices.DeleteFunc(l.Events, func(e testenv.LogEvent) bool { return e.PCR == 4 })
		},
		"another kernel": func(l *testenv.EventLog) {
			d := sha256.Sum256([]byte("another kernel"))
			l.Events[lastOf(l, 9)].SHA256 = d[:]
		},
		"an event of an unknown type more": func(l *testenv.EventLog) {
			e := l.Events[lastOf(l, 9)]
			e.Type = 0x99999999
			l.Events = append(l.Events, e)
		},
	} {
		lying, err := testenv.FirmwareLog("rhel8-uefi")
		if err != nil {
			t.Fatal(err)
		}
		tell(lying)
		if _, err := boot.Verify(told, sent, e, lying.Encode()); err == nil || !strings.Contains(err.Error(), "does not replay") {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := boot.Verify(told, sent, e, nil); err == nil || !strings.Contains(err.Error(), "empty") {
		t.Errorf("no log: %v", err)
	}
	foreign := *told
	foreign.AK = claim(t, newHost(t, 7)).AK
	if _, err := boot.Verify(&foreign, sent, e, raw); err == nil {
		t.Error("a quote of another TPM's key was taken")
	}
	foreign.AK = told.AK[:20]
	if _, err := boot.Verify(&foreign, sent, e, raw); err == nil {
		t.Error("half an attestation key was taken")
	}
}

func lastOf(l *testenv.EventLog, pcr uint32) (last int) {
	for i, e := range l.Events {
		if e.PCR == pcr {
			last = i
		}
	}
	return last
}
