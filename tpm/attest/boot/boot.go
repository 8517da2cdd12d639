// Package boot verifies what an attested host has booted: its quote a second time, by
// the code of go-tpm-tools, and the event log that it sends with it. [Verify] comes
// after [conseal/tpm/attest.Pending.Verify], which is what makes the attestation key
// one of a TPM.
package boot

import (
	"crypto"
	"fmt"

	pb "github.com/google/go-tpm-tools/proto/attest"
	tpmpb "github.com/google/go-tpm-tools/proto/tpm"
	"github.com/google/go-tpm-tools/server"
	legacy "github.com/google/go-tpm/legacy/tpm2"

	"conseal/tpm/attest"
	"conseal/tpm/eventlog"
)

// Verify checks a quote over the nonce of its challenge, that the PCRs are the quoted
// ones, and that the event log explains each of them.
//
// The log is not given to go-tpm-tools, which passes a quote without a log, passes a PCR
// for which a log has no events, and panics at types of events that it does not know.
func Verify(c *attest.Claim, sent *attest.Challenge, e *attest.Evidence, log []byte) (*eventlog.Log, error) {
	ak, err := key(c.AK)
	if err != nil {
		return nil, fmt.Errorf("attestation key: %w", err)
	}
	pcrs := map[uint32][]byte{}
	for i, v := range e.PCRs {
		pcrs[uint32(i)] = v
	}
	quote := &tpmpb.Quote{Quote: e.Quote, RawSig: e.QuoteSignature, Pcrs: &tpmpb.PCRs{Hash: tpmpb.HashAlgo_SHA256, Pcrs: pcrs}}
	_, err = server.VerifyAttestation(
		&pb.Attestation{AkPub: c.AK, Quotes: []*tpmpb.Quote{quote}},
		server.VerifyOpts{Nonce: sent.Nonce, TrustedAKs: []crypto.PublicKey{ak}, HashAlgo: legacy.AlgSHA256})
	if err != nil {
		return nil, err
	}
	return eventlog.Check(log, e.PCRs)
}

func key(public []byte) (crypto.PublicKey, error) {
	area, err := legacy.DecodePublic(public)
	if err != nil {
		return nil, err
	}
	return area.Key()
}
