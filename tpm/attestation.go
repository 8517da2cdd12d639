package tpm

import (
	"bytes"
	"context"
	"errors"
	"fmt"

	"github.com/google/go-tpm/tpm2"

	"conseal/tpm/attest"
)

// ekCertificate is the NV index of the RSA 2048 EK's certificate: TCG EK Credential
// Profile for TPM Family 2.0, section 2.2.1.4.
const ekCertificate = 0x01c00002

// akTemplate is a restricted P-256 signing key. As an endorsement primary it is the same
// whenever it is made, and what it signs shows the TPM's reset counts as they are.
func akTemplate() tpm2.TPMTPublic {
	return tpm2.TPMTPublic{
		Type:    tpm2.TPMAlgECC,
		NameAlg: tpm2.TPMAlgSHA256,
		ObjectAttributes: tpm2.TPMAObject{
			FixedTPM: true, FixedParent: true, SensitiveDataOrigin: true, UserWithAuth: true, NoDA: true, Restricted: true, SignEncrypt: true,
		},
		Parameters: tpm2.NewTPMUPublicParms(tpm2.TPMAlgECC, &tpm2.TPMSECCParms{
			CurveID: tpm2.TPMECCNistP256,
			Scheme: tpm2.TPMTECCScheme{
				Scheme:  tpm2.TPMAlgECDSA,
				Details: tpm2.NewTPMUAsymScheme(tpm2.TPMAlgECDSA, &tpm2.TPMSSigSchemeECDSA{HashAlg: tpm2.TPMAlgSHA256}),
			},
		}),
		Unique: tpm2.NewTPMUPublicID(tpm2.TPMAlgECC, &tpm2.TPMSECCPoint{X: tpm2.TPM2BECCParameter{Buffer: []byte("conseal ak 1")}}),
	}
}

// Claim says what this TPM is, for [attest.NewChallenge]. identity is the blob that
// [Provision] made.
func (t *TPM) Claim(ctx context.Context, identity []byte) (*attest.Claim, error) {
	k, err := decodeIdentity(identity)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", t.Name(), err)
	}
	var c *attest.Claim
	err = t.transact(ctx, "claiming", func(x *tx) (err error) {
		c = &attest.Claim{Identity: k.blob.public}
		if c.EKCertificate, err = x.readEKCertificate(); err != nil {
			return err
		}
		if err := x.withEndorsement(tpm2.RSAEKTemplate, func(_ tpm2.NamedHandle, p *tpm2.TPMTPublic) error {
			c.EK = tpm2.Marshal(*p)
			return nil
		}); err != nil {
			return err
		}
		return x.withEndorsement(akTemplate(), func(_ tpm2.NamedHandle, p *tpm2.TPMTPublic) error {
			c.AK = tpm2.Marshal(*p)
			return nil
		})
	})
	return c, err
}

// Prove answers a challenge with a quote of the configured PCRs.
func (t *TPM) Prove(ctx context.Context, identity []byte, c *attest.Challenge) (*attest.Evidence, error) {
	k, err := decodeIdentity(identity)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", t.Name(), err)
	}
	e := &attest.Evidence{}
	err = t.transact(ctx, "answering a challenge", func(x *tx) error {
		held, err := x.activate(c)
		if err != nil {
			return err
		}
		defer clear(held)
		if e.PCRs, err = x.readPCRs(x.cfg.PCRs); err != nil {
			return err
		}
		err = x.withEndorsement(akTemplate(), func(ak tpm2.NamedHandle, _ *tpm2.TPMTPublic) error {
			signer := tpm2.AuthHandle{Handle: ak.Handle, Name: ak.Name, Auth: tpm2.PasswordAuth(nil)}
			quote, err := run(x, tpm2.Quote{
				SignHandle: signer, QualifyingData: tpm2.TPM2BData{Buffer: c.Nonce}, InScheme: tpm2.TPMTSigScheme{Scheme: tpm2.TPMAlgNull}, PCRSelect: selection(x.cfg.PCRs),
			})
			if err != nil {
				return err
			}
			e.Quote, e.QuoteSignature = quote.Quoted.Bytes(), tpm2.Marshal(quote.Signature)
			return x.withLoaded(k.area, k.blob.private, func(object tpm2.AuthHandle) error {
				certified, err := run(x, tpm2.Certify{
					ObjectHandle: object, SignHandle: signer, QualifyingData: tpm2.TPM2BData{Buffer: c.Nonce}, InScheme: tpm2.TPMTSigScheme{Scheme: tpm2.TPMAlgNull},
				})
				if err != nil {
					return err
				}
				e.Certify, e.CertifySignature = certified.CertifyInfo.Bytes(), tpm2.Marshal(certified.Signature)
				return nil
			})
		})
		if err == nil {
			e.Prove(held)
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	return e, nil
}

// CertifySealed has the AK say, for a verifier's nonce, that this TPM made what a blob
// of Seal holds, and so under which policy alone that opens ([attest.Sealing]). It opens
// nothing, and needs no permitted state.
func (t *TPM) CertifySealed(ctx context.Context, blob, nonce []byte) (*attest.Sealing, error) {
	s, err := decodeSealed(blob)
	if err != nil {
		return nil, fmt.Errorf("%s: certifying a sealed key: %w", t.Name(), err)
	}
	var out *attest.Sealing
	err = t.transact(ctx, "certifying a sealed key", func(x *tx) error {
		public, err := x.publicOf(s)
		if err != nil {
			return err
		}
		return x.withEndorsement(akTemplate(), func(ak tpm2.NamedHandle, _ *tpm2.TPMTPublic) error {
			return x.withLoaded(*public, s.private, func(object tpm2.AuthHandle) error {
				rsp, err := run(x, tpm2.CertifyCreation{
					SignHandle:     tpm2.AuthHandle{Handle: ak.Handle, Name: ak.Name, Auth: tpm2.PasswordAuth(nil)},
					ObjectHandle:   tpm2.NamedHandle{Handle: object.Handle, Name: object.Name},
					QualifyingData: tpm2.TPM2BData{Buffer: nonce},
					CreationHash:   tpm2.TPM2BDigest{Buffer: s.creation.hash[:]},
					InScheme:       tpm2.TPMTSigScheme{Scheme: tpm2.TPMAlgNull},
					CreationTicket: s.creation.ticket,
				})
				if err != nil {
					return err
				}
				out = &attest.Sealing{Public: s.public, Attest: rsp.CertifyInfo.Bytes(), Signature: tpm2.Marshal(rsp.Signature)}
				return nil
			})
		})
	})
	return out, err
}

// activate opens a challenge (TPM2_ActivateCredential).
func (x *tx) activate(c *attest.Challenge) (held []byte, err error) {
	err = x.withEndorsement(akTemplate(), func(ak tpm2.NamedHandle, _ *tpm2.TPMTPublic) error {
		return x.withEndorsement(tpm2.RSAEKTemplate, func(ek tpm2.NamedHandle, _ *tpm2.TPMTPublic) error {
			s, _, err := tpm2.PolicySession(x, tpm2.TPMAlgSHA256, 16)
			if err != nil {
				return x.explain("TPM2_StartAuthSession", err)
			}
			defer x.flush(s.Handle())
			_, err = run(x, tpm2.PolicySecret{
				AuthHandle:    tpm2.AuthHandle{Handle: tpm2.TPMRHEndorsement, Auth: tpm2.PasswordAuth(nil)},
				PolicySession: s.Handle(), NonceTPM: s.NonceTPM(),
			})
			if err != nil {
				return err
			}
			rsp, err := run(x, tpm2.ActivateCredential{
				ActivateHandle: tpm2.AuthHandle{Handle: ak.Handle, Name: ak.Name, Auth: tpm2.PasswordAuth(nil)},
				KeyHandle:      tpm2.AuthHandle{Handle: ek.Handle, Name: ek.Name, Auth: s},
				CredentialBlob: tpm2.TPM2BIDObject{Buffer: c.Credential},
				Secret:         tpm2.TPM2BEncryptedSecret{Buffer: c.Secret},
			}, x.srk.encryptOut())
			if err != nil {
				return err
			}
			held = bytes.Clone(rsp.CertInfo.Buffer)
			return nil
		})
	})
	return held, err
}

// withEndorsement lends fn a primary key of the endorsement hierarchy.
func (x *tx) withEndorsement(template tpm2.TPMTPublic, fn func(tpm2.NamedHandle, *tpm2.TPMTPublic) error) error {
	rsp, err := run(x, tpm2.CreatePrimary{PrimaryHandle: tpm2.TPMRHEndorsement, InPublic: tpm2.New2B(template)})
	if err != nil {
		return fmt.Errorf("making a key of the endorsement hierarchy: %w", err)
	}
	defer x.flush(rsp.ObjectHandle)
	p, err := rsp.OutPublic.Contents()
	if err != nil {
		return x.distrust("TPM2_CreatePrimary", err)
	}
	name, err := tpm2.ObjectName(p)
	if err != nil {
		return x.distrust("TPM2_CreatePrimary", err)
	}
	return fn(tpm2.NamedHandle{Handle: rsp.ObjectHandle, Name: *name}, p)
}

func (x *tx) readEKCertificate() ([]byte, error) {
	found, err := x.readIndex(ekCertificate)
	if err != nil {
		return nil, err
	}
	if found == nil {
		return nil, errors.New("the TPM has no certificate of an RSA endorsement key in NV memory: get it from the maker's site")
	}
	name, err := tpm2.NVName(found)
	if err != nil {
		return nil, err
	}
	const part = 512 // every TPM gives as much at once
	var der []byte
	for len(der) < int(found.DataSize) {
		rsp, err := run(x, tpm2.NVRead{
			AuthHandle: tpm2.AuthHandle{Handle: ekCertificate, Name: *name, Auth: tpm2.PasswordAuth(nil)},
			NVIndex:    tpm2.NamedHandle{Handle: ekCertificate, Name: *name},
			Size:       uint16(min(part, int(found.DataSize)-len(der))),
			Offset:     uint16(len(der)),
		})
		if err != nil {
			return nil, err
		}
		if len(rsp.Data.Buffer) == 0 {
			return nil, x.distrust("TPM2_NV_Read", errors.New("no bytes"))
		}
		der = append(der, rsp.Data.Buffer...)
	}
	return der, nil
}
