package tpm

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/pem"
	"fmt"
	"slices"

	keyfile "github.com/foxboron/go-tpm-keyfiles"
	"github.com/google/go-tpm/tpm2"

	"conseal/internal/secret"
	"conseal/tpm/policy"
)

// sealed is what a blob holds: a sealed data object of the TPM, the state in which it
// opens unless signed policies say that, and the TPM's word that it made the object.
type sealed struct {
	tss2
	state    policy.State // nil: signed policies say
	creation creation
}

// creation is what TPM2_Create says of what it made; TPM2_CertifyCreation wants it back.
type creation struct {
	hash   [sha256.Size]byte
	ticket tpm2.TPMTTKCreation
}

// KeySize is the length of the keys that Seal makes, and of the root.
const KeySize = 32

// Seal makes a fresh 32-byte key and the blob from which only this TPM gets it
// back, only under the same id, and only while a signed policy allows it or, without
// an authority, while the configured PCRs have the values that they have now.
func (t *TPM) Seal(ctx context.Context, id string) (*secret.Bytes, []byte, error) {
	key := secret.Random(KeySize)
	var blob []byte
	err := t.transact(ctx, fmt.Sprintf("sealing a key for %q", id), func(x *tx) error {
		var state policy.State
		if t.authority == nil {
			var err error
			if state, err = x.readPCRs(t.cfg.PCRs); err != nil {
				return err
			}
		}
		if err := x.provePIN(); err != nil {
			return err
		}
		return x.withPIN(func(auth []byte) error {
			return key.Use(func(k []byte) error {
				s, err := x.seal(state, bytes.Join([][]byte{k, idDigest(id)}, nil), auth)
				if err != nil {
					return err
				}
				blob = s.encode()
				return nil
			})
		})
	})
	if err != nil {
		key.Wipe()
		return nil, nil, err
	}
	return key, blob, nil
}

// Open gives back the key of a blob that Seal made under the same id. If the host
// is in another measured state the error is a [PCRError] or a [PolicyError].
func (t *TPM) Open(ctx context.Context, id string, blob []byte) (*secret.Bytes, error) {
	what := fmt.Sprintf("opening the sealed key for %q", id)
	s, err := decodeSealed(blob)
	if err != nil {
		return nil, fmt.Errorf("%s: %s: %w", t.Name(), what, err)
	}
	var key *secret.Bytes
	err = t.transact(ctx, what, func(x *tx) error {
		return x.unseal(s, func(payload []byte) error {
			if len(payload) != KeySize+sha256.Size || subtle.ConstantTimeCompare(payload[KeySize:], idDigest(id)) != 1 {
				return fail(ClassCorrupt, "the blob was sealed for something else: files were mixed up; restore the right one")
			}
			key = secret.Copy(payload[:KeySize])
			return nil
		})
	})
	if err != nil {
		key.Wipe() // the PIN was taken, and that could not be noted
		return nil, err
	}
	return key, nil
}

// idDigest is sealed with a key.
func idDigest(id string) []byte {
	d := sha256.Sum256([]byte("conseal tpm seal v1\x00" + id))
	return d[:]
}

// seal wipes payload, which has at most 128 bytes. auth is the host's PIN, or nil.
func (x *tx) seal(state policy.State, payload, auth []byte) (*sealed, error) {
	defer clear(payload)
	public, err := x.sealedPublic(state, nil)
	if err != nil {
		return nil, err
	}
	rsp, err := run(x, tpm2.Create{
		ParentHandle: x.srk.auth(),
		InSensitive: tpm2.TPM2BSensitiveCreate{Sensitive: &tpm2.TPMSSensitiveCreate{
			UserAuth: tpm2.TPM2BAuth{Buffer: auth},
			Data:     tpm2.NewTPMUSensitiveCreate(&tpm2.TPM2BSensitiveData{Buffer: payload}),
		}},
		InPublic: tpm2.New2B(public),
	}, x.srk.encryptBoth())
	if err != nil {
		return nil, err
	}
	s := &sealed{state: state, creation: creation{ticket: rsp.CreationTicket}}
	s.pin = auth != nil
	s.kind, s.public, s.private = keyfile.OIDSealedKey, rsp.OutPublic.Bytes(), bytes.Clone(rsp.OutPrivate.Buffer)
	if copy(s.creation.hash[:], rsp.CreationHash.Buffer) != len(s.creation.hash) {
		return nil, x.distrust("TPM2_Create", fmt.Errorf("a creation hash of %d bytes", len(rsp.CreationHash.Buffer)))
	}
	if _, err := x.publicOf(s); err != nil {
		return nil, x.distrust("TPM2_Create", fmt.Errorf("it made another object than it was told to: %w", err))
	}
	return s, nil
}

// publicOf is the public part that the object of a blob must have, built from what we
// know: no blob can carry attributes or a policy that we did not choose.
func (x *tx) publicOf(s *sealed) (*tpm2.TPMTPublic, error) {
	if (s.state == nil) != (x.authority != nil) {
		return nil, fail(ClassCorrupt, "the blob was sealed with a policy key and this host is configured without, or the other way round")
	}
	public, err := x.sealedPublic(s.state, s.public[max(0, len(s.public)-sha256.Size):])
	if err != nil {
		return nil, err
	}
	if !bytes.Equal(tpm2.Marshal(public), s.public) || s.pin != (x.pin != nil) {
		return nil, fail(ClassCorrupt, "the blob opens under another policy than this host has: it is another host's, or the configuration (the host's name, its policy key, the index of its counter, whether it has a PIN) changed: put it back")
	}
	return &public, nil
}

// unseal lends fn the payload.
func (x *tx) unseal(s *sealed, fn func(payload []byte) error) error {
	public, err := x.publicOf(s)
	if err != nil {
		return err
	}
	return x.withLoaded(*public, s.private, func(object tpm2.AuthHandle) error {
		return x.under(x.ruleFor(s.state), func(session tpm2.Session) error {
			object.Auth = session
			rsp, err := run(x, tpm2.Unseal{ItemHandle: object}, x.srk.encryptOut())
			if err != nil {
				return err
			}
			defer clear(rsp.OutData.Buffer)
			return fn(rsp.OutData.Buffer)
		})
	})
}

// withLoaded lends fn an object under the SRK. Its name is computed from public,
// so that a session with an HMAC cannot be led to another object.
func (x *tx) withLoaded(public tpm2.TPMTPublic, private []byte, fn func(tpm2.AuthHandle) error) error {
	name, err := tpm2.ObjectName(&public)
	if err != nil {
		return err
	}
	rsp, err := run(x, tpm2.Load{
		ParentHandle: x.srk.auth(),
		InPrivate:    tpm2.TPM2BPrivate{Buffer: private},
		InPublic:     tpm2.New2B(public),
	})
	if err != nil {
		return err
	}
	defer x.flush(rsp.ObjectHandle)
	return fn(tpm2.AuthHandle{Handle: rsp.ObjectHandle, Name: *name, Auth: tpm2.PasswordAuth(nil)})
}

// ruleFor is the rule of a blob of ours.
func (x *tx) ruleFor(state policy.State) rule {
	if state == nil {
		return x.authority
	}
	return fixed{state, x.pin != nil}
}

// sealedPublic is the public part of an object that opens in a state, or by signed
// policies, only.
func (x *tx) sealedPublic(state policy.State, unique []byte) (tpm2.TPMTPublic, error) {
	digest, err := x.ruleFor(state).authPolicy()
	return policy.SealedPublic(digest, unique, x.pin != nil), err
}

// The second block of a blob: number of PCRs (1 byte; 0 if signed policies say), for each
// its index (1) and value (32); the creation's hash (32) and ticket (TPMT_TK_CREATION);
// SHA-256 of all that and the object, against damage and not against attackers: what the
// TPM does not look at when it opens would be missed later.
const sealedType = "CONSEAL SEALED KEY 1"

func (s *sealed) encode() []byte {
	b := []byte{byte(len(s.state))}
	for _, i := range s.state.Indices() {
		b = append(append(b, byte(i)), s.state[i]...)
	}
	b = append(b, s.creation.hash[:]...)
	b = append(b, tpm2.Marshal(s.creation.ticket)...)
	sum := sha256.Sum256(bytes.Join([][]byte{b, s.public, s.private}, nil))
	b = append(b, sum[:]...)
	return s.tss2.encode(pem.Block{Type: sealedType, Bytes: b})
}

func decodeSealed(blob []byte) (*sealed, error) {
	k, extra, ok := decodeTSS2(blob, keyfile.OIDSealedKey, sealedType)
	if !ok {
		return nil, fail(ClassCorrupt, "not a blob that this version sealed, or it was changed; %s", advice[ClassCorrupt])
	}
	s := &sealed{tss2: *k}
	r := &reader{rest: extra}
	var indices []int
	for range r.byte() {
		if s.state == nil {
			s.state = policy.State{}
		}
		i := int(r.byte())
		indices = append(indices, i)
		s.state[i] = bytes.Clone(r.take(sha256.Size))
	}
	copy(s.creation.hash[:], r.take(len(s.creation.hash)))
	ticket, err := tpm2.Unmarshal[tpm2.TPMTTKCreation](r.rest) // leaves the sum, which encode makes again
	if err != nil || r.short || !slices.IsSorted(indices) || s.state != nil && checkPCRs(indices) != nil {
		return nil, fail(ClassCorrupt, "the sealed blob is malformed; %s", advice[ClassCorrupt])
	}
	s.creation.ticket = *ticket
	if !bytes.Equal(s.encode(), blob) {
		return nil, fail(ClassCorrupt, "the sealed blob is malformed; %s", advice[ClassCorrupt])
	}
	return s, nil
}

// reader takes an encoding apart. Once something was missing it gives zeros.
type reader struct {
	rest  []byte
	short bool
}

func (r *reader) take(n int) []byte {
	if n > len(r.rest) {
		r.short, r.rest = true, nil
		return make([]byte, n)
	}
	b := r.rest[:n]
	r.rest = r.rest[n:]
	return b
}

func (r *reader) byte() byte { return r.take(1)[0] }
