package vault

import (
	"bytes"
	"context"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
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

// Class says which key of the hardware's a share rests under.
type Class int

const (
	// Held shares rest under the class key, which an open vault has in memory: the
	// hardware is asked for it once.
	Held Class = iota
	// Own shares rest each under a key of its own that is never kept: the hardware is
	// asked for it at each opening.
	Own
)

// String is the class as a share's file has it.
func (c Class) String() string {
	if c == Own {
		return "own"
	}
	return "held"
}

const shareMagic = "conseal share"

// Versions of a share's file. A program that knows only the first takes the second
// for damaged and leaves it where it is.
const (
	heldVersion = 1
	ownVersion  = 2 // the header ends with the blob of the share's own key
)

// maxShareFile leaves 4 KiB for names, digests and the blob of an own key.
const maxShareFile = MaxShare + MaxPublic + 4096

// shareFile is a share at rest: a header that anybody may read and that is
// authenticated, then AES-256-GCM of the share. The key is HKDF(class key or own key
// || erasure key, salt, header's digest): fresh for each file, so the nonce is zero.
type shareFile struct {
	class  Class
	header []byte // as encoded
	public []byte
	salt   []byte
	blob   []byte // from which the hardware gets the own key back; nil if held
	cipher []byte
}

func (v *Vault) sharePath(f fileName) string {
	return filepath.Join(v.dir, sharesFolder, f.String()+".share")
}

// ownID binds a share's own key to its purpose, host, key and epoch. The name is last:
// it alone may be anything.
func (v *Vault) ownID(id KeyID, n Number) string {
	return fmt.Sprintf("share/own/%s/%d/%s/%s", v.host, id.Incarnation, n, id.Name)
}

// encodeHeader encodes what a share's file is: moved to another key, epoch, host or
// kind of hardware, it does not open.
func (v *Vault) encodeHeader(f *shareFile, id KeyID, n Number, output Output) []byte {
	version := byte(heldVersion)
	if f.class == Own {
		version = ownVersion
	}
	e := encoder{b: append([]byte(shareMagic), version)}
	e.text(v.host)
	e.text(v.protector.Kind())
	e.text(f.class.String())
	e.text(id.Name)
	e.u64(id.Incarnation)
	e.number(n)
	e.raw(output[:])
	e.bytes(f.public)
	e.bytes(f.salt)
	if f.class == Own {
		e.bytes(f.blob)
	}
	return e.b
}

// aead derives the key of a share's file from that which the hardware seals.
func (v *Vault) aead(sealed *secret.Bytes, f *shareFile, erasure *[32]byte) (aead cipher.AEAD, err error) {
	digest := sha256.Sum256(f.header)
	v.erasing.RLock()
	defer v.erasing.RUnlock()
	err = sealed.Use(func(sealed []byte) error {
		ikm := append(append(make([]byte, 0, len(sealed)+len(erasure)), sealed...), erasure[:]...)
		defer clear(ikm)
		key, err := hkdf.Key(sha256.New, ikm, f.salt, "conseal share v1 "+string(digest[:]), 32)
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
func (v *Vault) writeShare(ctx context.Context, class Class, id KeyID, n Number, output Output, public []byte, plain *secret.Bytes) (*share, error) {
	s := &share{number: n, output: output, erasure: new([32]byte)}
	rand.Read(s.file[:])
	rand.Read(s.erasure[:])
	f := &shareFile{class: class, public: public, salt: make([]byte, saltSize)}
	rand.Read(f.salt)
	sealed := v.class
	if class == Own {
		var err error
		if sealed, f.blob, err = v.protector.Seal(ctx, v.ownID(id, n)); err != nil {
			return nil, fmt.Errorf("sealing a key for it: %w", err)
		}
		defer sealed.Wipe()
	}
	f.header = v.encodeHeader(f, id, n, output)
	aead, err := v.aead(sealed, f, s.erasure)
	if err != nil {
		return nil, err
	}
	var file []byte
	err = plain.Use(func(plain []byte) error {
		file = aead.Seal(bytes.Clone(f.header), make([]byte, aead.NonceSize()), plain, f.header)
		return nil
	})
	if err != nil {
		return nil, err
	}
	s.digest = sha256.Sum256(file)
	if err := writeFile(v.sharePath(s.file), file, "vault/share"); err != nil {
		return nil, err
	}
	back, err := v.readShare(ctx, id, s)
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
	b, err := readFile(v.sharePath(s.file), maxShareFile)
	if err != nil {
		return nil, err
	}
	if sha256.Sum256(b) != s.digest {
		return nil, fmt.Errorf("file %s: %w: its content is not what was written", filepath.Base(v.sharePath(s.file)), ErrDamaged)
	}
	d := decoder{b: b}
	d.take(len(shareMagic))
	version := d.take(1)
	f := &shareFile{}
	if !d.failed && version[0] == ownVersion {
		f.class = Own
	}
	for range 4 { // host, kind of hardware, class, name
		d.bytes()
	}
	d.take(8 + 16 + 32) // incarnation, number, output
	f.public, f.salt = d.bytes(), d.bytes()
	if f.class == Own {
		f.blob = d.bytes()
	}
	f.header, f.cipher = b[:len(b)-len(d.b)], d.b
	if d.failed || !bytes.Equal(f.header, v.encodeHeader(f, id, s.number, s.output)) {
		return nil, fmt.Errorf("file %s: %w: it is about another share, or of a version that this program does not know", filepath.Base(v.sharePath(s.file)), ErrDamaged)
	}
	return f, nil
}

func (v *Vault) readShare(ctx context.Context, id KeyID, s *share) (*secret.Bytes, error) {
	f, err := v.readShareFile(id, s)
	if err != nil {
		return nil, err
	}
	return v.decrypt(ctx, id, s, f)
}

// decrypt asks the hardware, if the share has a key of its own.
func (v *Vault) decrypt(ctx context.Context, id KeyID, s *share, f *shareFile) (*secret.Bytes, error) {
	sealed := v.class
	if f.class == Own {
		var err error
		if sealed, err = v.protector.Open(ctx, v.ownID(id, s.number), f.blob); err != nil {
			return nil, err
		}
		defer sealed.Wipe()
	}
	aead, err := v.aead(sealed, f, s.erasure)
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
		for _, digest := range r.receipts {
			known[v.receiptPath(digest)] = true
		}
	}
	for _, folder := range []string{"", sharesFolder, certsFolder} {
		files, err := os.ReadDir(filepath.Join(v.dir, folder))
		if err != nil {
			return err
		}
		for _, f := range files {
			path := filepath.Join(v.dir, folder, f.Name())
			switch filepath.Ext(path) {
			case temporary, ".share", ".cert", receiptSuffix:
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
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if info, err := f.Stat(); err != nil || !info.Mode().IsRegular() { // a FIFO would be waited for
		return nil, errors.Join(err, fmt.Errorf("file %s: %w: not a regular file", filepath.Base(path), ErrDamaged))
	}
	b, err := io.ReadAll(io.LimitReader(f, int64(limit)+1))
	if err == nil && len(b) > limit {
		err = fmt.Errorf("file %s: %w: over %d bytes", filepath.Base(path), ErrDamaged, limit)
	}
	return b, err
}
