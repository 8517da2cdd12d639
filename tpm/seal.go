package tpm

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/binary"
	"fmt"
	"slices"

	"github.com/google/go-tpm/tpm2"

	"conseal/internal/secret"
	"conseal/tpm/policy"
)

// sealed is what a blob holds: a sealed data object of the TPM, and the state in
// which it opens unless signed policies say that. The public part is not stored but
// built from these, so that no blob can carry attributes or a policy that we did not
// choose.
type sealed struct {
	state   policy.State      // nil: signed policies say
	unique  [sha256.Size]byte // binds the private part to the public one
	private []byte            // encrypted and authenticated by the TPM under the SRK
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
		return key.Use(func(k []byte) error {
			s, err := x.seal(state, bytes.Join([][]byte{k, idDigest(id)}, nil))
			if err != nil {
				return err
			}
			blob = s.encode()
			return nil
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
	return key, err
}

// idDigest is sealed with a key.
func idDigest(id string) []byte {
	d := sha256.Sum256([]byte("conseal tpm seal v1\x00" + id))
	return d[:]
}

// seal wipes payload, which has at most 128 bytes.
func (x *tx) seal(state policy.State, payload []byte) (*sealed, error) {
	defer clear(payload)
	public, err := sealedPublic(x.ruleFor(state), nil)
	if err != nil {
		return nil, err
	}
	rsp, err := run(x, tpm2.Create{
		ParentHandle: x.srk.auth(),
		InSensitive: tpm2.TPM2BSensitiveCreate{Sensitive: &tpm2.TPMSSensitiveCreate{
			Data: tpm2.NewTPMUSensitiveCreate(&tpm2.TPM2BSensitiveData{Buffer: payload}),
		}},
		InPublic: tpm2.New2B(public),
	}, x.srk.encryptBoth())
	if err != nil {
		return nil, err
	}
	s := &sealed{state: state, private: bytes.Clone(rsp.OutPrivate.Buffer)}
	made, err := rsp.OutPublic.Contents()
	if err != nil {
		return nil, x.distrust("TPM2_Create", err)
	}
	unique, err := made.Unique.KeyedHash()
	if err != nil || copy(s.unique[:], unique.Buffer) != len(s.unique) {
		return nil, x.distrust("TPM2_Create", fmt.Errorf("unusable unique field: %w", err))
	}
	again, err := sealedPublic(x.ruleFor(state), s.unique[:])
	if err != nil || !bytes.Equal(tpm2.Marshal(*made), tpm2.Marshal(again)) {
		return nil, x.distrust("TPM2_Create", fmt.Errorf("it made another object than it was told to: %w", err))
	}
	return s, nil
}

// unseal lends fn the payload.
func (x *tx) unseal(s *sealed, fn func(payload []byte) error) error {
	if (s.state == nil) != (x.authority != nil) {
		return fail(ClassCorrupt, "the blob was sealed with a policy key and this host is configured without, or the other way round")
	}
	r := x.ruleFor(s.state)
	public, err := sealedPublic(r, s.unique[:])
	if err != nil {
		return err
	}
	return x.withLoaded(public, s.private, func(object tpm2.AuthHandle) error {
		return x.under(r, func(session tpm2.Session) error {
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
	return fixed(state)
}

// sealedPublic is the public part of a sealed data object that opens under a rule
// only. UserWithAuth is clear: without it the policy is the only way in.
func sealedPublic(r rule, unique []byte) (tpm2.TPMTPublic, error) {
	digest, err := r.authPolicy()
	return tpm2.TPMTPublic{
		Type:    tpm2.TPMAlgKeyedHash,
		NameAlg: tpm2.TPMAlgSHA256,
		ObjectAttributes: tpm2.TPMAObject{
			FixedTPM:        true,
			FixedParent:     true,
			AdminWithPolicy: true,
			NoDA:            true,
		},
		AuthPolicy: tpm2.TPM2BDigest{Buffer: digest},
		Parameters: tpm2.NewTPMUPublicParms(tpm2.TPMAlgKeyedHash, &tpm2.TPMSKeyedHashParms{
			Scheme: tpm2.TPMTKeyedHashScheme{Scheme: tpm2.TPMAlgNull},
		}),
		Unique: tpm2.NewTPMUPublicID(tpm2.TPMAlgKeyedHash, &tpm2.TPM2BDigest{Buffer: unique}),
	}, err
}

// The blob: magic, number of PCRs (1 byte; 0 if signed policies say), for each its
// index (1) and value (32), unique (32), length of the private part (2, big endian),
// private part.
const (
	sealedMagic = "conseal tpm sealed 1\n"
	maxPrivate  = 1024 // a sealed data object's has about 200 bytes
)

func (s *sealed) encode() []byte {
	b := append([]byte(sealedMagic), byte(len(s.state)))
	for _, i := range s.state.Indices() {
		b = append(append(b, byte(i)), s.state[i]...)
	}
	b = append(b, s.unique[:]...)
	b = binary.BigEndian.AppendUint16(b, uint16(len(s.private)))
	return append(b, s.private...)
}

func decodeSealed(blob []byte) (*sealed, error) {
	r := &reader{rest: blob}
	var s sealed
	if string(r.take(len(sealedMagic))) != sealedMagic {
		return nil, fail(ClassCorrupt, "not a blob that this version sealed; %s", advice[ClassCorrupt])
	}
	var indices []int
	for range r.byte() {
		if s.state == nil {
			s.state = policy.State{}
		}
		i := int(r.byte())
		indices = append(indices, i)
		s.state[i] = bytes.Clone(r.take(sha256.Size))
	}
	copy(s.unique[:], r.take(len(s.unique)))
	s.private = r.private()
	if !r.done() || !slices.IsSorted(indices) || s.state != nil && checkPCRs(indices) != nil {
		return nil, fail(ClassCorrupt, "the sealed blob is malformed; %s", advice[ClassCorrupt])
	}
	return &s, nil
}

// reader takes an encoding apart. Once something was missing it gives zeros, and
// done is false.
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

// private is a TPM2B_PRIVATE.
func (r *reader) private() []byte {
	n := int(binary.BigEndian.Uint16(r.take(2)))
	if n == 0 || n > maxPrivate {
		r.short = true
		return nil
	}
	return bytes.Clone(r.take(n))
}

// done tells whether everything was there, and nothing more.
func (r *reader) done() bool { return !r.short && len(r.rest) == 0 }
