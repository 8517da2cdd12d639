package vault

import (
	"bytes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"conseal/internal/disk"
	"conseal/internal/failpoint"
	"conseal/internal/secret"
)

// Names below the vault's folder.
const (
	classFile    = "class-held.sealed"
	sharesFolder = "shares"
	certsFolder  = "certs"
)

const (
	shareMagic   = "conseal share"
	shareVersion = 1
)

// shareFile is a share at rest: a header that anybody may read and that is
// authenticated, then AES-256-GCM of the share. The key is HKDF(class key ||
// erasure key, salt, header's digest): fresh for each file, so the nonce is zero.
type shareFile struct {
	header []byte // as encoded
	salt   []byte
	public []byte
	cipher []byte
}

func (v *Vault) sharePath(f fileName) string {
	return filepath.Join(v.dir, sharesFolder, f.String()+".share")
}

// header encodes what a share's file is: moved to another key, epoch, host or
// kind of hardware, it does not open.
func (v *Vault) header(id KeyID, n Number, output Output, public, salt []byte) []byte {
	e := encoder{b: append([]byte(shareMagic), shareVersion)}
	e.text(v.host)
	e.text(v.protector.Kind())
	e.text("held")
	e.text(id.Name)
	e.u64(id.Incarnation)
	e.number(n)
	e.raw(output[:])
	e.bytes(public)
	e.bytes(salt)
	return e.b
}

// aead derives the key of a share's file.
func (v *Vault) aead(header, salt []byte, erasure *[32]byte) (aead cipher.AEAD, err error) {
	digest := sha256.Sum256(header)
	v.erasing.RLock()
	defer v.erasing.RUnlock()
	err = v.class.Use(func(class []byte) error {
		ikm := append(append(make([]byte, 0, len(class)+len(erasure)), class...), erasure[:]...)
		defer clear(ikm)
		key, err := hkdf.Key(sha256.New, ikm, salt, "conseal share v1 "+string(digest[:]), 32)
		if err != nil {
			return err
		}
		defer clear(key)
		aead, err = newGCM(key)
		return err
	})
	return aead, err
}

// writeShare writes a share's file, and reads it back before it believes it.
func (v *Vault) writeShare(id KeyID, n Number, output Output, public []byte, plain *secret.Bytes) (*share, error) {
	s := &share{number: n, output: output, erasure: new([32]byte)}
	rand.Read(s.file[:])
	rand.Read(s.erasure[:])
	salt := make([]byte, saltSize)
	rand.Read(salt)
	header := v.header(id, n, output, public, salt)
	aead, err := v.aead(header, salt, s.erasure)
	if err != nil {
		return nil, err
	}
	var file []byte
	err = plain.Use(func(plain []byte) error {
		file = aead.Seal(bytes.Clone(header), make([]byte, aead.NonceSize()), plain, header)
		return nil
	})
	if err != nil {
		return nil, err
	}
	s.digest = sha256.Sum256(file)
	if err := writeFile(v.sharePath(s.file), file, "vault/share"); err != nil {
		return nil, err
	}
	back, err := v.readShare(id, s)
	if err != nil {
		return nil, fmt.Errorf("reading it back: %w", err)
	}
	defer back.Wipe()
	if !back.Equal(plain) {
		return nil, errors.New("reading it back: it is another share")
	}
	return s, nil
}

// readShareFile reads a share's file and checks that it is the one that the
// manifest means.
func (v *Vault) readShareFile(id KeyID, s *share) (*shareFile, error) {
	b, err := readFile(v.sharePath(s.file), MaxShare+MaxPublic+4096)
	if err != nil {
		return nil, err
	}
	if sha256.Sum256(b) != s.digest {
		return nil, fmt.Errorf("file %s: %w: its content is not what was written; have this host's share recovered by the others", filepath.Base(v.sharePath(s.file)), ErrDamaged)
	}
	d := decoder{b: b}
	d.take(len(shareMagic) + 1)
	for range 4 { // host, kind of hardware, class, name
		d.bytes()
	}
	d.take(8 + 16 + 32) // incarnation, number, output
	f := &shareFile{public: d.bytes(), salt: d.bytes(), cipher: d.b}
	f.header = b[:len(b)-len(d.b)]
	if d.failed || !bytes.Equal(f.header, v.header(id, s.number, s.output, f.public, f.salt)) {
		return nil, fmt.Errorf("file %s: %w: it is about another share", filepath.Base(v.sharePath(s.file)), ErrDamaged)
	}
	return f, nil
}

func (v *Vault) readShare(id KeyID, s *share) (*secret.Bytes, error) {
	f, err := v.readShareFile(id, s)
	if err != nil {
		return nil, err
	}
	aead, err := v.aead(f.header, f.salt, s.erasure)
	if err != nil {
		return nil, err
	}
	plain, err := aead.Open(nil, make([]byte, aead.NonceSize()), f.cipher, f.header)
	if err != nil {
		return nil, fmt.Errorf("file %s: %w: not authentic", filepath.Base(v.sharePath(s.file)), ErrDamaged)
	}
	return secret.Take(plain), nil
}

func (v *Vault) certificatePath(digest [32]byte) string {
	return filepath.Join(v.dir, certsFolder, hex.EncodeToString(digest[:])+".cert")
}

func (v *Vault) writeCertificate(c []byte) ([32]byte, error) {
	digest := sha256.Sum256(c)
	return digest, writeFile(v.certificatePath(digest), c, "vault/certificate")
}

func (v *Vault) readCertificate(digest [32]byte) ([]byte, error) {
	b, err := readFile(v.certificatePath(digest), MaxCertificate)
	if err != nil {
		return nil, err
	}
	if sha256.Sum256(b) != digest {
		return nil, fmt.Errorf("certificate %x: %w", digest[:8], ErrDamaged)
	}
	return b, nil
}

// sweep removes what a crash left: files that no share or certificate of m names.
func (v *Vault) sweep(m *manifest) error {
	known := map[string]bool{}
	for _, r := range m.keys {
		for _, s := range r.shares {
			known[v.sharePath(s.file)] = true
		}
		known[v.certificatePath(r.certificate)] = true
	}
	for _, folder := range []string{"", sharesFolder, certsFolder} {
		files, err := os.ReadDir(filepath.Join(v.dir, folder))
		if err != nil {
			return err
		}
		for _, f := range files {
			path := filepath.Join(v.dir, folder, f.Name())
			switch filepath.Ext(path) {
			case temporary, ".share", ".cert":
			default:
				continue
			}
			if known[path] {
				continue
			}
			if err := os.Remove(path); err != nil {
				return fmt.Errorf("removing what a crash left: %w", err)
			}
		}
	}
	return nil
}

const temporary = ".new"

// writeFile writes a file so that a crash leaves the old one or the new one,
// whole: write, fsync, rename, fsync the folder.
func writeFile(path string, b []byte, point string) error {
	f, err := os.OpenFile(path+temporary, os.O_WRONLY|os.O_CREATE|os.O_TRUNC|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	failpoint.Hit(point + "/written")
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return errors.Join(err, os.Remove(path+temporary))
	}
	if err := os.Rename(path+temporary, path); err != nil {
		return err
	}
	failpoint.Hit(point + "/renamed")
	return disk.Sync(filepath.Dir(path))
}

func readFile(path string, limit int) ([]byte, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, int64(limit)+1))
	if err == nil && len(b) > limit {
		err = fmt.Errorf("file %s: %w: over %d bytes", filepath.Base(path), ErrDamaged, limit)
	}
	return b, err
}
