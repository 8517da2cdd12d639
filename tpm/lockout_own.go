package tpm

import (
	"bytes"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base32"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/google/go-tpm/tpm2"

	"conseal/internal/secret"
)

// What --own-lockout sets: a power cut may count as a failed try, and three of them, as
// TPMs have it by default, lock a host out.
const (
	ownTries    = 32
	ownInterval = 10 * time.Minute
	ownRecovery = 10 * time.Minute
)

// ownLockout sets these, and a lockout authorization that is in file. A wrong one blocks
// the hierarchy for the recovery time, so only what we made for this TPM is tried, and
// that once.
func (x *tx) ownLockout(file string) (step string, err error) {
	s, err := x.lockoutState()
	if err != nil {
		return "", err
	}
	auth, err := readLockoutAuth(file, x.srk.name.Buffer)
	made := errors.Is(err, fs.ErrNotExist)
	switch {
	case made && s.lockoutSet:
		return "", fail(ClassAuth, "a lockout authorization is set, and %s does not exist. Nothing was tried: if `conseald init` set it, give the file "+
			"that it wrote then; else somebody else did: ask who owns the TPM", file)
	case made:
		auth, err = makeLockoutAuth(file, x.srk.name.Buffer)
	}
	if err != nil {
		return "", err
	}
	defer auth.Wipe()
	err = auth.Use(func(a []byte) error {
		if s.lockoutSet {
			return x.tryLockoutAuth(file, a)
		}
		if err := x.dictionaryAttackParameters(nil, ownTries, ownInterval, ownRecovery); err != nil {
			return err
		}
		return x.setLockoutAuth(a)
	})
	if s.lockoutSet {
		return "lockout authorization in " + file + ": already there", err
	}
	return "lockout authorization in " + file + ": made; keep a copy away from this host", err
}

// setLockoutAuth sets the first one; the bus does not see it.
func (x *tx) setLockoutAuth(auth []byte) error {
	next := bytes.Clone(auth) // go-tpm takes no promise not to change it
	defer clear(next)
	_, err := run(x, tpm2.HierarchyChangeAuth{
		AuthHandle: tpm2.AuthHandle{Handle: tpm2.TPMRHLockout, Auth: tpm2.PasswordAuth(nil)},
		NewAuth:    tpm2.TPM2BAuth{Buffer: next},
	}, x.srk.encryptIn())
	return err
}

// tryLockoutAuth uses it to set the parameters again. If it is refused the file is
// renamed, or the next run would try it again.
func (x *tx) tryLockoutAuth(file string, auth []byte) error {
	err := x.dictionaryAttackParameters(auth, ownTries, ownInterval, ownRecovery)
	var refused *CommandError
	if !errors.As(err, &refused) || !refused.RC.Is(tpm2.TPMRCAuthFail) {
		return err
	}
	aside := file + ".refused"
	if renameErr := os.Rename(file, aside); renameErr != nil {
		return errors.Join(fmt.Errorf("the TPM refuses the lockout authorization in %s: do not use that file again", file), err, renameErr)
	}
	return fail(ClassAuth, "the TPM refuses the lockout authorization in %s: somebody has set another since. It was tried once, and is blocked for the "+
		"recovery time now; the file is %s now, so that it is not tried again: ask who owns the TPM", file, aside)
}

// dictionaryAttackParameters is TPM2_DictionaryAttackParameters (TPM 2.0 part 3, section
// 25.3), which go-tpm lacks: its sessions can be used from outside, its commands cannot.
func (x *tx) dictionaryAttackParameters(auth []byte, tries uint32, interval, recovery time.Duration) error {
	const name, cc = "TPM2_DictionaryAttackParameters", tpm2.TPMCCDictionaryAttackParameters
	session := x.srk.salted(tpm2.Auth(auth))
	if err := session.Init(x); err != nil {
		return x.explain("TPM2_StartAuthSession", err)
	}
	handle := binary.BigEndian.AppendUint32(nil, uint32(tpm2.TPMRHLockout))
	var parameters []byte
	for _, p := range []uint32{tries, uint32(interval / time.Second), uint32(recovery / time.Second)} {
		parameters = binary.BigEndian.AppendUint32(parameters, p)
	}
	names := []tpm2.TPM2BName{{Buffer: handle}} // a permanent handle's name is itself
	authorization, err := session.Authorize(cc, parameters, nil, names, 0)
	if err != nil {
		return x.distrust(name, err)
	}
	area := tpm2.Marshal(*authorization)
	cmd := tpm2.Marshal(tpm2.TPMCmdHeader{
		Tag: tpm2.TPMSTSessions, Length: uint32(headerSize + len(handle) + 4 + len(area) + len(parameters)), CommandCode: cc,
	})
	cmd = binary.BigEndian.AppendUint32(append(cmd, handle...), uint32(len(area)))
	answer, err := x.Send(append(append(cmd, area...), parameters...))
	if err != nil {
		return x.explain(name, err)
	}
	if rc := tpm2.TPMRC(binary.BigEndian.Uint32(answer[6:])); rc != tpm2.TPMRCSuccess {
		x.flush(session.Handle())
		return x.explain(name, rc)
	}
	none := make([]byte, 4) // the size of the answer's parameters
	response, err := tpm2.Unmarshal[tpm2.TPMSAuthResponse](bytes.TrimPrefix(answer[headerSize:], none))
	if err == nil {
		err = session.Validate(tpm2.TPMRCSuccess, cc, nil, names, 0, response)
	}
	if err != nil {
		return x.distrust(name, err)
	}
	return nil
}

// The file: 26 letters and digits of 130 random bits, and 6 that show that they were made
// here for this TPM. It is the authorization as it is: the TPM takes 32 bytes, of which
// none is zero (go-tpm would cut it there), and tpm2-tools reads it (file:PATH).
const (
	lockoutRandom = 26
	lockoutAuth   = 32
)

func lockoutCheck(random, srkName []byte) []byte {
	d := sha256.Sum256(bytes.Join([][]byte{[]byte("conseal tpm lockout 1\x00"), srkName, random}, nil))
	return []byte(base32.StdEncoding.EncodeToString(d[:])[:lockoutAuth-lockoutRandom])
}

// readLockoutAuth refuses what makeLockoutAuth did not write for this TPM.
func readLockoutAuth(file string, srkName []byte) (*secret.Bytes, error) {
	info, err := os.Lstat(file)
	switch {
	case err != nil:
		return nil, err
	case !info.Mode().IsRegular() || info.Mode().Perm()&0o077 != 0:
		return nil, fmt.Errorf("%s is no file, or others may use it: wants a file of mode 0600; nothing was tried", file)
	}
	b, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	defer clear(b)
	if len(b) != lockoutAuth || !bytes.Equal(b[lockoutRandom:], lockoutCheck(b[:lockoutRandom], srkName)) {
		return nil, fail(ClassAuth, "%s has no lockout authorization that `conseald init` made for this TPM. Nothing was tried. "+
			"Give another file; if this one is of a run that was cut short, remove it", file)
	}
	return secret.Copy(b), nil
}

// makeLockoutAuth writes a new one, whole and on disk before it is used.
func makeLockoutAuth(file string, srkName []byte) (*secret.Bytes, error) {
	random := []byte(rand.Text())
	b := append(random, lockoutCheck(random, srkName)...)
	defer clear(b)
	f, err := os.OpenFile(file, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, err
	}
	_, err = f.Write(b)
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return nil, errors.Join(err, os.Remove(file))
	}
	d, err := os.Open(filepath.Dir(file))
	if err != nil {
		return nil, err
	}
	if err := errors.Join(d.Sync(), d.Close()); err != nil {
		return nil, err
	}
	return secret.Copy(b), nil
}
