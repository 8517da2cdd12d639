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
)

// sealed is what a blob holds: a sealed data object of the TPM and the state in
// which it opens. The public part is not stored but built from these, so that no
// blob can carry attributes or a policy that we did not choose.
type sealed struct {
	state   pcrSet
	unique  [sha256.Size]byte // binds the private part to the public one
	private []byte            // encrypted and authenticated by the TPM under the SRK
}

// KeySize is the length of the keys that Seal makes, and of the root.
const KeySize = 32

// Seal makes a fresh 32-byte key and the blob from which only this TPM gets it
// back, only while the configured PCRs have the values that they have now, and
// only under the same id.
func (t *TPM) Seal(ctx context.Context, id string) (*secret.Bytes, []byte, error) {
	key := secret.Random(KeySize)
	var blob []byte
	err := t.transact(ctx, fmt.Sprintf("sealing a key for %q", id), func(x *tx) error {
		state, err := x.readPCRs(t.cfg.PCRs)
		if err != nil {
			return err
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
// is in another measured state the error is a [PCRError].
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
func (x *tx) seal(state pcrSet, payload []byte) (*sealed, error) {
	defer clear(payload)
	public, err := sealedPublic(state, nil)
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
	again, err := sealedPublic(state, s.unique[:])
	if err != nil || !bytes.Equal(tpm2.Marshal(*made), tpm2.Marshal(again)) {
		return nil, x.distrust("TPM2_Create", fmt.Errorf("it made another object than it was told to: %w", err))
	}
	return s, nil
}

// unseal lends fn the payload.
func (x *tx) unseal(s *sealed, fn func(payload []byte) error) error {
	public, err := sealedPublic(s.state, s.unique[:])
	if err != nil {
		return err
	}
	return x.withLoaded(public, s.private, func(object tpm2.AuthHandle) error {
		return x.inState(s.state, func(policy tpm2.Session) error {
			object.Auth = policy
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

// sealedPublic is the public part of a sealed data object that opens in state
// only. UserWithAuth is clear: without it the policy is the only way in.
func sealedPublic(state pcrSet, unique []byte) (tpm2.TPMTPublic, error) {
	policy, err := state.policy()
	return tpm2.TPMTPublic{
		Type:    tpm2.TPMAlgKeyedHash,
		NameAlg: tpm2.TPMAlgSHA256,
		ObjectAttributes: tpm2.TPMAObject{
			FixedTPM:        true,
			FixedParent:     true,
			AdminWithPolicy: true,
			NoDA:            true,
		},
		AuthPolicy: tpm2.TPM2BDigest{Buffer: policy},
		Parameters: tpm2.NewTPMUPublicParms(tpm2.TPMAlgKeyedHash, &tpm2.TPMSKeyedHashParms{
			Scheme: tpm2.TPMTKeyedHashScheme{Scheme: tpm2.TPMAlgNull},
		}),
		Unique: tpm2.NewTPMUPublicID(tpm2.TPMAlgKeyedHash, &tpm2.TPM2BDigest{Buffer: unique}),
	}, err
}

// The blob: magic, number of PCRs (1 byte), for each its index (1) and value (32),
// unique (32), length of the private part (2, big endian), private part.
const (
	sealedMagic = "conseal tpm sealed 1\n"
	maxPrivate  = 1024 // a sealed data object's has about 200 bytes
)

func (s *sealed) encode() []byte {
	b := append([]byte(sealedMagic), byte(len(s.state)))
	for _, p := range s.state {
		b = append(append(b, byte(p.index)), p.value[:]...)
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
	for range r.byte() {
		p := pcr{index: int(r.byte())}
		copy(p.value[:], r.take(len(p.value)))
		s.state = append(s.state, p)
	}
	copy(s.unique[:], r.take(len(s.unique)))
	s.private = r.private()
	indices := s.state.indices()
	if !r.done() || !slices.IsSorted(indices) || checkPCRs(indices) != nil {
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
