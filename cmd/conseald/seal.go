package main

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"conseal/agent/api/apipb"
	"conseal/config"
	"conseal/internal/disk"
	"conseal/tpm"
	"conseal/tpm/policy"
)

// sealPolicies are the signed policies of this host: a folder of documents.
type sealPolicies struct {
	t    *tpm.TPM // nil until it is open
	host policy.Host
	dir  string
	log  string // where the firmware's event log is; empty for none
}

// openSealPolicies reads the policy key; nil if the host has none.
func openSealPolicies(c *config.Host) (*sealPolicies, error) {
	t := &c.Protector.TPM
	if t.PolicyKey == "" {
		return nil, nil
	}
	b, err := os.ReadFile(t.PolicyKey)
	if err != nil {
		return nil, fmt.Errorf("protector.tpm.policy_key: %w", err)
	}
	key, err := policy.ParsePublicKey(b)
	if err != nil {
		return nil, fmt.Errorf("protector.tpm.policy_key: %s: %w", t.PolicyKey, err)
	}
	return &sealPolicies{host: policy.Host{Name: c.Name, Key: key, Counter: t.NVCounter}, dir: filepath.Join(c.State, "policies"), log: eventLog(t)}, nil
}

// authority is nil for a host without policies.
func (s *sealPolicies) authority() *tpm.Authority {
	if s == nil {
		return nil
	}
	return &tpm.Authority{Host: s.host, Installed: func() ([]*policy.Policy, error) {
		good, broken := s.read()
		if len(good) == 0 {
			return nil, broken
		}
		return good, nil // the others cannot harm; Policies shows them
	}}
}

// read returns the policies of the folder, and what of it is none.
func (s *sealPolicies) read() (good []*policy.Policy, broken error) {
	files, err := filepath.Glob(filepath.Join(s.dir, "*.toml"))
	if err != nil {
		return nil, err
	}
	for _, file := range files {
		b, err := disk.ReadSmall(file, policy.MaxDocument) // with the TPM held: nothing here may wait
		if err == nil {
			var p *policy.Policy
			if p, err = s.parse(b); err == nil {
				good = append(good, p)
				continue
			}
		}
		broken = errors.Join(broken, fmt.Errorf("%s: %w", file, err))
	}
	return good, broken
}

func (s *sealPolicies) parse(b []byte) (*policy.Policy, error) {
	document, err := policy.Parse(b, s.host.Key)
	if err != nil {
		return nil, err
	}
	p, ok := document.(*policy.Policy)
	if !ok {
		return nil, errors.New("a revocation, not a policy")
	}
	return p, s.mine(p.Host, p.Counter)
}

func (s *sealPolicies) mine(host string, counter uint32) error {
	if host != s.host.Name || counter != s.host.Counter {
		return fmt.Errorf("it is for host %q with counter %#x; this is %q with %#x", host, counter, s.host.Name, s.host.Counter)
	}
	return nil
}

// Measure describes the host's measured state in a document.
func (s *sealPolicies) Measure(ctx context.Context) ([]byte, error) {
	m, err := s.t.Measure(ctx)
	if err != nil {
		return nil, err
	}
	if m.EventLog, err = readEventLog(s.log); err != nil {
		m.NoEventLog = err.Error()
	}
	return m.Encode(), nil
}

// eventLog is the path of the event log. The kernel's default is of the kernel's TPM.
func eventLog(t *config.TPM) string {
	if t.EventLog == config.Default().Protector.TPM.EventLog && !strings.HasPrefix(t.Device, "device:") {
		return ""
	}
	return t.EventLog
}

// readEventLog does not look into the log: it is the firmware's, and this process holds
// shares. Who reads the measurement parses it.
func readEventLog(path string) ([]byte, error) {
	if path == "" {
		return nil, errors.New("protector.tpm.event_log names none")
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, policy.MaxEventLog+1))
	switch {
	case err != nil:
		return nil, err
	case len(b) == 0:
		return nil, fmt.Errorf("%s is empty", path)
	case len(b) > policy.MaxEventLog:
		return nil, fmt.Errorf("%s has more than %d bytes", path, policy.MaxEventLog)
	}
	return b, nil
}

// Policies says what is installed and what the TPM makes of it.
func (s *sealPolicies) Policies(ctx context.Context) (*apipb.PoliciesResponse, error) {
	counter, verdicts, err := s.t.Verdicts(ctx)
	if err != nil {
		return nil, err
	}
	key, err := policy.Fingerprint(s.host.Key)
	if err != nil {
		return nil, err
	}
	out := &apipb.PoliciesResponse{Key: key, RevokedBelow: counter}
	if _, broken := s.read(); broken != nil {
		out.Broken = broken.Error()
	}
	for _, v := range verdicts {
		p := &apipb.Policy{
			Version: v.Policy.Version, Comment: v.Policy.Comment, Signed: v.Policy.Signed.UTC().Format(time.RFC3339),
			Opens: v.Opens(), Revoked: v.Revoked, Pin: v.Policy.PIN, NoPin: v.NoPIN,
		}
		for _, c := range v.Changed {
			p.Changed = append(p.Changed, &apipb.PCRChange{Pcr: uint32(c.PCR), Words: policy.PCRWords(c.PCR), Found: c.Found, Wanted: c.Wanted})
		}
		out.Policies = append(out.Policies, p)
	}
	return out, nil
}

// Install keeps a policy, or does what a revocation says.
func (s *sealPolicies) Install(ctx context.Context, document []byte) (string, error) {
	signed, err := policy.Parse(document, s.host.Key)
	if err != nil {
		return "", err
	}
	switch d := signed.(type) {
	case *policy.Revocation:
		if err := s.mine(d.Host, d.Counter); err != nil {
			return "", err
		}
		counter, err := s.t.Revoke(ctx, d)
		return fmt.Sprintf("all seal policies below version %d are revoked", counter), err
	case *policy.Policy:
		if err := s.mine(d.Host, d.Counter); err != nil {
			return "", err
		}
		if counter, _, err := s.t.Verdicts(ctx); err != nil {
			return "", err
		} else if d.Version < counter {
			return "", fmt.Errorf("seal policy %d (%s) is revoked, as all below %d", d.Version, d.Comment, counter)
		}
		return fmt.Sprintf("seal policy %d (%s) is installed", d.Version, d.Comment), s.keep(d, document)
	}
	return "", fmt.Errorf("a %T", signed)
}

func (s *sealPolicies) keep(p *policy.Policy, document []byte) error {
	if err := os.MkdirAll(s.dir, 0o700); err != nil {
		return err
	}
	return disk.WriteFile(filepath.Join(s.dir, fmt.Sprintf("%d-%.4x.toml", p.Version, sha256.Sum256(document))), document)
}

// unsigned says how to go on when no policy opens the TPM of a host that is being
// initialised.
func (s *sealPolicies) unsigned(ctx context.Context, c *config.Host, refused error) error {
	m, err := s.Measure(ctx)
	file := filepath.Join(c.State, "measurement.toml")
	if err == nil {
		err = disk.WriteFile(file, m)
	}
	if err != nil {
		return errors.Join(refused, err)
	}
	return fmt.Errorf("%w\nThe TPM is ready, and the host's state is in %s. Have the security team sign a policy for it\n"+
		"(conseal seal sign --measurement measurement.toml --key KEY), and run: conseald init --policy FILE", refused, file)
}

// installFiles takes the policies that init is given.
func (s *sealPolicies) installFiles(ctx context.Context, files []string) (steps []string, err error) {
	for _, file := range files {
		if s == nil {
			return nil, errors.New("--policy: this host has no protector.tpm.policy_key")
		}
		b, err := os.ReadFile(file)
		if err != nil {
			return nil, err
		}
		done, err := s.Install(ctx, b)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", file, err)
		}
		steps = append(steps, strings.TrimSuffix(done, "."))
	}
	return steps, nil
}
