package testenv

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"github.com/google/go-tpm/tpm2"
)

// TPM is a software TPM (swtpm) with an endorsement key, its certificate and a
// platform certificate. It listens on unix sockets in its folder and serves one
// client at a time: to reach it while an agent is connected, let the agent
// connect through a [Tap]. Its methods may be called by several goroutines.
type TPM struct {
	dir string

	mu      sync.Mutex
	process *Process // nil while it is off
}

// maxSocketPath is what sun_path of sockaddr_un holds, less the final zero: unix(7).
const maxSocketPath = 107

// StartTPM starts the TPM whose state is in dir, and manufactures it there first
// if there is none. Each TPM has a folder of its own; those whose folders are
// neighbours have their certificates from one authority, in dir/../tpm-ca, and all
// that a process makes one after the other have them from the same.
//
// A socket's path is short (107 bytes), so make dir with os.MkdirTemp("/tmp", ...)
// and not with testing.T.TempDir. ctx bounds the start, not the TPM's life: end it
// with [TPM.Stop]. It ends with this process in any case.
func StartTPM(ctx context.Context, dir string) (*TPM, error) {
	err := errors.Join(
		Need("swtpm", "swtpm"),
		Need("swtpm_setup", "swtpm-tools"),
		Need("swtpm_localca", "swtpm-tools"),
		Need("certtool", "gnutls-bin"))
	if err != nil {
		return nil, err
	}
	if dir, err = filepath.Abs(dir); err != nil {
		return nil, err
	}
	t := &TPM{dir: dir}
	if n := len(t.control()); n > maxSocketPath {
		return nil, fmt.Errorf("the TPM's socket %s has %d bytes, at most %d are possible: take a folder with a shorter path", t.control(), n, maxSocketPath)
	}
	if err := t.manufacture(ctx); err != nil {
		return nil, fmt.Errorf("manufacturing the TPM in %s: %w", dir, err)
	}
	return t, t.start(ctx)
}

// Address is where its client connects, as in the agent's configuration.
func (t *TPM) Address() string { return "unix:" + t.socket() }

func (t *TPM) socket() string  { return filepath.Join(t.dir, "tpm.sock") }
func (t *TPM) control() string { return t.socket() + ".ctrl" } // the name that tpm2-tools expect
func (t *TPM) state() string   { return filepath.Join(t.dir, "state") }

// Stop ends the TPM in order; its state stays. Stopping it twice does nothing.
func (t *TPM) Stop(ctx context.Context) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.process == nil {
		return nil
	}
	err := t.process.Stop(ctx)
	t.process = nil
	return err
}

// Kill ends the TPM as a power cut would.
func (t *TPM) Kill() {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.process != nil {
		t.process.Kill()
		t.process = nil
	}
}

// Restart is a reboot: the same TPM, its PCRs as at power-on. It also starts one
// that was stopped or killed.
func (t *TPM) Restart(ctx context.Context) error {
	if err := t.Stop(ctx); err != nil {
		return err
	}
	return t.start(ctx)
}

// Extend extends a PCR of the SHA-256 bank by the digest of data, as a measured
// boot does. It needs the TPM for itself: while an agent is connected it fails
// after some seconds, and [Tap.Extend] is what to use.
func (t *TPM) Extend(pcr int, data string) error {
	c, err := dialTPM(t.socket())
	if err != nil {
		return err
	}
	defer c.Close()
	return extend(c, pcr, data)
}

func extend(c sender, pcr int, data string) error {
	digest := sha256.Sum256([]byte(data))
	return extendDigest(c, pcr, digest[:])
}

func extendDigest(c sender, pcr int, digest []byte) error {
	_, err := tpm2.PCRExtend{
		PCRHandle: tpm2.AuthHandle{Handle: tpm2.TPMHandle(pcr), Auth: tpm2.PasswordAuth(nil)},
		Digests:   tpm2.TPMLDigestValues{Digests: []tpm2.TPMTHA{{HashAlg: tpm2.TPMAlgSHA256, Digest: digest}}},
	}.Execute(c)
	if err != nil {
		return fmt.Errorf("extending PCR %d: %w", pcr, err)
	}
	return nil
}

// manufacture makes the TPM's state and certificates, unless they are there.
func (t *TPM) manufacture(ctx context.Context) error {
	if _, err := os.Stat(t.state()); err == nil || !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	making := t.state() + ".new" // renamed when complete, so that a crash leaves no half-made TPM
	if err := os.RemoveAll(making); err != nil {
		return err
	}
	if err := os.MkdirAll(making, 0o700); err != nil {
		return err
	}
	setup, err := t.writeSetup()
	if err != nil {
		return err
	}
	// timeout(1) hands SIGTERM on to its whole group, and so to the swtpm that
	// swtpm_setup starts: nothing stays behind, even if this process is killed.
	cmd := exec.Command("timeout", "600", "swtpm_setup", "--tpm2", "--tpmstate", making, "--config", setup,
		"--create-ek-cert", "--create-platform-cert", "--lock-nvram", "--pcr-banks", "sha256",
		"--vmid", filepath.Base(t.dir), "--overwrite")
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGTERM}
	said := &tail{}
	cmd.Stdout, cmd.Stderr = said, said
	p, err := StartProcess(cmd)
	if err != nil {
		return err
	}
	select {
	case <-p.Done():
	case <-ctx.Done():
		return errors.Join(ctx.Err(), p.Stop(context.WithoutCancel(ctx)))
	}
	if err := p.Wait(); err != nil {
		return fmt.Errorf("%w%s", err, said)
	}
	if err := t.keepAuthority(); err != nil {
		return err
	}
	return os.Rename(making, t.state())
}

func (t *TPM) authority() string { return filepath.Join(filepath.Dir(t.dir), "tpm-ca") }

// kept are the files of the first certificate authority of this process: its two keys
// take longer to make than the rest of a TPM.
var (
	keptMu sync.Mutex
	kept   map[string][]byte
)

func (t *TPM) keepAuthority() error {
	keptMu.Lock()
	defer keptMu.Unlock()
	if kept != nil {
		return nil
	}
	files, err := filepath.Glob(filepath.Join(t.authority(), "*"))
	if err != nil {
		return err
	}
	all := map[string][]byte{}
	for _, file := range files {
		if all[filepath.Base(file)], err = os.ReadFile(file); err != nil {
			return err
		}
	}
	kept = all
	return nil
}

// makeAuthority makes the folder of the certificate authority, empty only if it is the
// first.
func (t *TPM) makeAuthority() error {
	keptMu.Lock()
	defer keptMu.Unlock()
	if _, err := os.Stat(t.authority()); err == nil || !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := os.Mkdir(t.authority(), 0o700); err != nil {
		return err
	}
	for name, b := range kept {
		if err := os.WriteFile(filepath.Join(t.authority(), name), b, 0o600); err != nil {
			return err
		}
	}
	return nil
}

// writeSetup writes the configuration of swtpm_setup and of its certificate
// authority, so that any user can make a TPM, and returns the former's path.
func (t *TPM) writeSetup() (string, error) {
	localca, err := exec.LookPath("swtpm_localca")
	if err != nil {
		return "", err
	}
	if err := t.makeAuthority(); err != nil {
		return "", err
	}
	ca := t.authority()
	path := func(name string) string { return filepath.Join(t.dir, name) }
	files := map[string]string{
		"localca.conf": "statedir = " + ca + "\nsigningkey = " + ca + "/signkey.pem\nissuercert = " + ca +
			"/issuercert.pem\ncertserial = " + ca + "/certserial\n",
		"localca.options": "--platform-manufacturer Conseal\n--platform-version 1.0\n--platform-model test\n",
		"setup.conf": "create_certs_tool = " + localca + "\ncreate_certs_tool_config = " + path("localca.conf") +
			"\ncreate_certs_tool_options = " + path("localca.options") + "\nactive_pcr_banks = sha256\n",
	}
	for name, content := range files {
		if err := os.WriteFile(path(name), []byte(content), 0o600); err != nil {
			return "", err
		}
	}
	return path("setup.conf"), nil
}

// start starts swtpm and waits until it takes connections.
func (t *TPM) start(ctx context.Context) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, old := range []string{t.socket(), t.control()} { // what a killed one left
		if err := os.Remove(old); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	p, err := StartProcess(exec.Command("swtpm", "socket", "--tpm2", "--tpmstate", "dir="+t.state(),
		"--server", "type=unixio,path="+t.socket(), "--ctrl", "type=unixio,path="+t.control(),
		"--flags", "not-need-init,startup-clear"))
	if err != nil {
		return err
	}
	if err := awaitSocket(ctx, p, t.socket()); err != nil {
		p.Kill()
		return fmt.Errorf("starting the TPM in %s: %w: %s", t.dir, err, p.Stderr())
	}
	t.process = p
	return nil
}

// awaitSocket waits until p takes connections at path.
func awaitSocket(ctx context.Context, p *Process, path string) error {
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for {
		if c, err := net.Dial("unix", path); err == nil {
			return c.Close()
		}
		select {
		case <-p.Done():
			return errors.New("it ended at once")
		case <-ctx.Done():
			return ctx.Err()
		case <-tick.C:
		}
	}
}
