package tpm

import (
	"bytes"
	"errors"
	"fmt"

	"github.com/google/go-tpm/tpm2"
)

// srk is the storage root key, the parent of all our objects. Its name is the
// digest of its public part, and only the TPM that made it has the private one.
type srk struct {
	handle tpm2.TPMHandle
	name   tpm2.TPM2BName
	public tpm2.TPMTPublic
}

// srkTemplate is the P-256 storage key that TSS2 key files imply (template H-2):
// its unique field is *empty*. go-tpm's ECCSRKTemplate has zeros there, which
// makes another key.
func srkTemplate() tpm2.TPMTPublic {
	t := tpm2.ECCSRKTemplate
	t.Unique = tpm2.NewTPMUPublicID(tpm2.TPMAlgECC, &tpm2.TPMSECCPoint{})
	return t
}

// auth uses the SRK as a parent: it has no password.
func (s *srk) auth() tpm2.AuthHandle {
	return tpm2.AuthHandle{Handle: s.handle, Name: s.name, Auth: tpm2.PasswordAuth(nil)}
}

// salted is a session for one command that only this SRK's TPM can answer. opts
// say what it does. It is always a session of its own, next to the one that
// authorizes: on a policy session go-tpm may decrypt wrongly without an error.
func (s *srk) salted(opts ...tpm2.AuthOption) tpm2.Session {
	return tpm2.HMAC(tpm2.TPMAlgSHA256, 16, append(opts, s.salt())...)
}

func (s *srk) salt() tpm2.AuthOption { return tpm2.Salted(s.handle, s.public) }

// Salted sessions: one that only proves who answers, and those that also encrypt
// the first parameter of the command, of its answer, or of both.
func (s *srk) witness() tpm2.Session     { return s.salted(tpm2.Audit()) }
func (s *srk) encryptIn() tpm2.Session   { return s.salted(tpm2.AESEncryption(128, tpm2.EncryptIn)) }
func (s *srk) encryptOut() tpm2.Session  { return s.salted(tpm2.AESEncryption(128, tpm2.EncryptOut)) }
func (s *srk) encryptBoth() tpm2.Session { return s.salted(tpm2.AESEncryption(128, tpm2.EncryptInOut)) }

// verifySRK finds the SRK with the pinned name, once a connection.
func (x *tx) verifySRK() error {
	if x.srk != nil {
		return nil
	}
	for _, h := range x.srkHandles() {
		found, err := x.readSRK(h)
		if err != nil {
			return err
		}
		if found != nil && bytes.Equal(found.name.Buffer, x.cfg.SRKName) {
			x.srk = found
			return nil
		}
	}
	return x.missingSRK()
}

func (x *tx) srkHandles() []tpm2.TPMHandle {
	return []tpm2.TPMHandle{StandardSRKHandle, tpm2.TPMHandle(x.cfg.SRKHandle)}
}

// missingSRK says why the SRK is at none of its handles.
func (x *tx) missingSRK() error {
	return x.withPrimary(func(*srk) error {
		return fail(ClassEvicted, "the storage root key is at none of the handles %#x: somebody evicted it; nothing is lost, provision again to put it back", x.srkHandles())
	})
}

// readSRK reads what is at a persistent handle; nil if nothing is. The name is
// computed, not believed.
func (x *tx) readSRK(h tpm2.TPMHandle) (*srk, error) {
	rsp, err := run(x, tpm2.ReadPublic{ObjectHandle: h})
	var refused *CommandError
	if errors.As(err, &refused) && refused.RC.Is(tpm2.TPMRCHandle) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	return x.newSRK(h, rsp.OutPublic)
}

func (x *tx) newSRK(h tpm2.TPMHandle, public tpm2.TPM2BPublic) (*srk, error) {
	p, err := public.Contents()
	if err != nil {
		return nil, x.distrust("public area", err)
	}
	name, err := tpm2.ObjectName(p)
	if err != nil {
		return nil, x.distrust("public area", err)
	}
	return &srk{h, *name, *p}, nil
}

// withPrimary lends fn the SRK as the TPM derives it now, which must have the
// pinned name if there is one.
func (x *tx) withPrimary(fn func(*srk) error) error {
	rsp, err := run(x, tpm2.CreatePrimary{PrimaryHandle: tpm2.TPMRHOwner, InPublic: tpm2.New2B(srkTemplate())})
	if err != nil {
		return fmt.Errorf("making the storage root key: %w", err)
	}
	defer x.flush(rsp.ObjectHandle)
	made, err := x.newSRK(rsp.ObjectHandle, rsp.OutPublic)
	if err != nil {
		return err
	}
	if len(x.cfg.SRKName) > 0 && !bytes.Equal(made.name.Buffer, x.cfg.SRKName) {
		return fail(ClassLost, "this is another TPM than the one that was provisioned: its storage root key is %.6x…, not %.6x…; "+
			"the TPM was cleared or the board replaced, and what it guarded is lost: enrol the host anew and reshare its keys",
			made.name.Buffer[2:], x.cfg.SRKName[2:])
	}
	return fn(made)
}
