package testenv

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"conseal/agent/api"
)

// Fleet is a fleet of real agents, each a process with hardware, files and
// sockets of its own, on loopback addresses of its own.
type Fleet struct {
	// Team signs the seal policies of hosts with a TPM; none unless Key is set before
	// [Fleet.Init].
	Team Team

	Dir    string
	Hosts  []*Host
	Bin    Binaries
	Keys   string // the roster's [[key]] tables
	Level  string // of the agents' logs
	Env    []string
	Limits string // a [limits] table of each host's configuration

	network *Network // nil unless it was asked for
	free    func() error
}

// Host is one host of a [Fleet].
type Host struct {
	Name      string
	Protector string // "tpm" or "hsm"
	Dir       string
	Address   string
	Identity  string // pin, once initialised
	TPM       *TPM   // of a host with a TPM
	Tap       *Tap   // through which the agent reaches the TPM
	Token     *Token // of a host with an HSM
	Env       []string

	fleet   *Fleet
	listen  string // where the agent listens, if there is a proxy at Address
	process *Process
	log     *os.File
	client  *api.Client
}

// Team is a security team: its key, a file of ssh-keygen or the URI of a key in a
// token, the file of its public half, and the file of its passphrase or PIN.
type Team struct {
	Key, Public, Secret string
	Env                 []string // what `conseal seal sign` needs beside
}

// Binaries are the built programs.
type Binaries struct{ Agent, Client string }

var (
	buildMu sync.Mutex
	built   = map[string]Binaries{}
)

// Build builds conseald and conseal once for this process, with build tags and
// flags for go build. They are in a folder that [Clean] removes.
func Build(ctx context.Context, flags ...string) (Binaries, error) {
	buildMu.Lock()
	defer buildMu.Unlock()
	key := strings.Join(flags, " ")
	if b, ok := built[key]; ok {
		return b, nil
	}
	dir, err := os.MkdirTemp("", "conseal-bin-")
	if err != nil {
		return Binaries{}, err
	}
	args := append(append([]string{"build"}, flags...), "-o", dir, "conseal/cmd/conseald", "conseal/cmd/conseal")
	if out, err := exec.CommandContext(ctx, "go", args...).CombinedOutput(); err != nil {
		os.RemoveAll(dir)
		return Binaries{}, fmt.Errorf("go %s: %w\n%s", strings.Join(args, " "), err, out)
	}
	built[key] = Binaries{filepath.Join(dir, "conseald"), filepath.Join(dir, "conseal")}
	return built[key], nil
}

// Clean removes what [Build] and [NewFaultModule] built.
func Clean() {
	buildMu.Lock()
	defer buildMu.Unlock()
	if builtFault != "" {
		os.RemoveAll(filepath.Dir(builtFault))
		builtFault = ""
	}
	for key, b := range built {
		os.RemoveAll(filepath.Dir(b.Agent))
		delete(built, key)
	}
}

// NewFleet makes hosts named alpha, beta, gamma, ... with the given protectors
// ("tpm" or "hsm"), their hardware, their configuration and, by conseald init,
// their identities. [Fleet.WriteRoster] comes next, then [Fleet.Start].
func NewFleet(ctx context.Context, bin Binaries, protectors ...string) (*Fleet, error) {
	dir, err := os.MkdirTemp("/tmp", "conseal-") // short: sockets have at most 107 bytes
	if err != nil {
		return nil, err
	}
	network, free, err := Loopback()
	if err != nil {
		return nil, errors.Join(err, os.RemoveAll(dir))
	}
	f := &Fleet{Dir: dir, Bin: bin, Level: "debug", free: free}
	greek := []string{"alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa", "lambda", "mu", "nu", "xi", "omicron"}
	for i, protector := range protectors {
		h := &Host{Name: greek[i], Protector: protector, Dir: filepath.Join(dir, greek[i]), fleet: f, Address: fmt.Sprintf("%s.%d:7443", network, i+1)}
		f.Hosts = append(f.Hosts, h)
		if err := h.prepare(ctx); err != nil {
			return nil, errors.Join(err, f.Close())
		}
	}
	return f, nil
}

func (h *Host) prepare(ctx context.Context) error {
	if err := os.MkdirAll(filepath.Join(h.Dir, h.Protector), 0o700); err != nil {
		return err
	}
	var err error
	if h.Protector == "hsm" {
		h.Token, err = NewToken(ctx, filepath.Join(h.Dir, "hsm"))
	} else if h.TPM, err = StartTPM(ctx, filepath.Join(h.Dir, "tpm")); err == nil {
		h.Tap, err = h.TPM.Tap("agent.sock")
	}
	return err
}

// State is the host's state folder.
func (h *Host) State() string { return filepath.Join(h.Dir, "state") }

// ConfigFile is the host's configuration.
func (h *Host) ConfigFile() string { return filepath.Join(h.Dir, "conseal.toml") }

// SignSocket and AdminSocket are the agent's.
func (h *Host) SignSocket() string  { return filepath.Join(h.Dir, "sign.sock") }
func (h *Host) AdminSocket() string { return filepath.Join(h.Dir, "admin.sock") }

// EventLogFile is where the agent looks for the event log of the firmware; it is not
// there unless somebody puts it there.
func (h *Host) EventLogFile() string { return filepath.Join(h.Dir, "event_log") }

// PolicyFile is the seal policy with which the host was initialised, if there is a Team.
func (h *Host) PolicyFile() string { return filepath.Join(h.Dir, "policy.toml") }

// LogFile is where the agent's standard error goes.
func (h *Host) LogFile() string { return filepath.Join(h.Dir, "agent.log") }

// RosterFile is the roster that all hosts read.
func (f *Fleet) RosterFile() string { return filepath.Join(f.Dir, "roster.toml") }

// WriteConfig writes the host's configuration.
func (h *Host) WriteConfig() error {
	protector := fmt.Sprintf("[protector]\nkind = \"tpm\"\n[protector.tpm]\ndevice = %q\n", "")
	if h.fleet.Team.Key != "" {
		protector += fmt.Sprintf("policy_key = %q\nevent_log = %q\n", h.fleet.Team.Public, h.EventLogFile())
	}
	if h.Protector == "hsm" {
		protector = fmt.Sprintf("[protector]\nkind = \"hsm\"\n[protector.hsm]\nuri = %q\nmodules = [%q]\n", h.Token.URI, h.Token.Module)
	} else {
		protector = strings.Replace(protector, `""`, fmt.Sprintf("%q", h.Tap.Address()), 1)
	}
	text := fmt.Sprintf(`name = %q
state = %q
roster = %q
insecure_lab = true
[listen]
address = %q
sign_socket = %q
admin_socket = %q
[log]
level = %q
%s
%s`, h.Name, h.State(), h.fleet.RosterFile(), cmp.Or(h.listen, h.Address), h.SignSocket(), h.AdminSocket(), h.fleet.Level, protector, h.fleet.Limits)
	return os.WriteFile(h.ConfigFile(), []byte(text), 0o600)
}

// Init runs conseald init on the host.
func (h *Host) Init(ctx context.Context) error {
	if err := h.WriteConfig(); err != nil {
		return err
	}
	out, err := h.init(ctx)
	if h.Protector == "tpm" && h.fleet.Team.Key != "" {
		if err == nil {
			return fmt.Errorf("conseald init on %s finished before a policy was signed", h.Name)
		}
		secret := "--passphrase"
		if strings.HasPrefix(h.fleet.Team.Key, "pkcs11:") {
			secret = "--pin"
		}
		cmd := exec.CommandContext(ctx, h.fleet.Bin.Client, "seal", "sign", "--measurement", filepath.Join(h.State(), "measurement.toml"),
			"--key", h.fleet.Team.Key, secret, "file:"+h.fleet.Team.Secret, "--comment", "as installed", "--output", h.PolicyFile())
		cmd.Env = append(os.Environ(), h.fleet.Team.Env...)
		if said, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("signing a seal policy for %s: %w: %s", h.Name, err, said)
		}
		out, err = h.init(ctx, "--policy", h.PolicyFile())
	}
	if err != nil {
		return err
	}
	var said struct{ Identity string }
	if err := json.Unmarshal(out, &said); err != nil {
		return fmt.Errorf("conseald init on %s said %q: %w", h.Name, out, err)
	}
	h.Identity = said.Identity
	return nil
}

func (h *Host) init(ctx context.Context, flags ...string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, h.fleet.Bin.Agent, append([]string{"init", "--json", "--config", h.ConfigFile()}, flags...)...)
	cmd.Env = h.environ()
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("conseald init on %s: %w: %s", h.Name, err, stderr.String())
	}
	return out, nil
}

func (h *Host) environ() []string {
	env := append(os.Environ(), h.fleet.Env...)
	if h.Token != nil {
		env = append(env, h.Token.Env()...)
	}
	return append(env, h.Env...)
}

// Init initialises every host.
func (f *Fleet) Init(ctx context.Context) error {
	return f.all(func(h *Host) error { return h.Init(ctx) })
}

// all runs fn on every host at the same time.
func (f *Fleet) all(fn func(*Host) error) error {
	errs := make([]error, len(f.Hosts))
	var wg sync.WaitGroup
	for i, h := range f.Hosts {
		wg.Go(func() { errs[i] = fn(h) })
	}
	wg.Wait()
	return errors.Join(errs...)
}

// Key returns a [[key]] table of the roster, held by every host, that the user
// who runs this may use.
func (f *Fleet) Key(name, scheme string, quorum int) string {
	var hosts []string
	for _, h := range f.Hosts {
		hosts = append(hosts, fmt.Sprintf("%q", h.Name))
	}
	return fmt.Sprintf("[[key]]\nname = %q\nscheme = %q\nquorum = %d\nhosts = [%s]\nstate = \"active\"\npurpose = \"test\"\ngenerate = true\nusers = [\"uid:%d\"]\n",
		name, scheme, quorum, strings.Join(hosts, ", "), os.Getuid())
}

// SetKey changes lines of a key's [[key]] table in f.Keys, such as "quorum" to "3"; an
// empty value removes the line.
func (f *Fleet) SetKey(name string, values map[string]string) error {
	tables := strings.Split(f.Keys, "[[key]]\n")
	for i, table := range tables {
		if !strings.Contains(table, fmt.Sprintf("name = %q\n", name)) {
			continue
		}
		var out strings.Builder
		for line := range strings.Lines(table) {
			field, _, _ := strings.Cut(line, " = ")
			if _, changed := values[field]; !changed {
				out.WriteString(line)
			}
		}
		for _, field := range slices.Sorted(maps.Keys(values)) {
			if values[field] != "" {
				fmt.Fprintf(&out, "%s = %s\n", field, values[field])
			}
		}
		tables[i] = out.String()
		f.Keys = strings.Join(tables, "[[key]]\n")
		return nil
	}
	return fmt.Errorf("no key %q", name)
}

// Replace puts a new board in the place of a host: its hardware and its disk are new, and
// so is its identity.
func (h *Host) Replace(ctx context.Context) error {
	h.Kill()
	var err error
	if h.Tap != nil {
		err = h.Tap.Close()
	}
	if h.TPM != nil {
		h.TPM.Kill()
	}
	err = errors.Join(err, os.RemoveAll(h.State()), os.RemoveAll(filepath.Join(h.Dir, h.Protector)), os.RemoveAll(h.PolicyFile()))
	if err == nil {
		err = h.prepare(ctx)
	}
	if err == nil {
		err = h.Init(ctx)
	}
	return err
}

// WriteRoster writes the roster of all hosts and f.Keys.
func (f *Fleet) WriteRoster(version int) error {
	var b strings.Builder
	fmt.Fprintf(&b, "fleet = \"test\"\nversion = %d\n\n", version)
	for _, h := range f.Hosts {
		fmt.Fprintf(&b, "[[host]]\nname = %q\naddress = %q\nidentity = %q\nprotector = %q\n\n", h.Name, h.Address, h.Identity, h.Protector)
	}
	b.WriteString(f.Keys)
	return os.WriteFile(f.RosterFile(), []byte(b.String()), 0o644)
}

// Start starts the host's agent and waits until its sockets answer.
func (h *Host) Start(ctx context.Context) error {
	if h.process != nil {
		return fmt.Errorf("the agent of %s runs already", h.Name)
	}
	var err error
	if h.log, err = os.OpenFile(h.LogFile(), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600); err != nil {
		return err
	}
	cmd := exec.Command(h.fleet.Bin.Agent, "--config", h.ConfigFile())
	cmd.Env, cmd.Stderr = h.environ(), h.log
	if h.process, err = StartProcess(cmd); err != nil {
		h.log.Close()
		return err
	}
	h.client = api.Dial(h.AdminSocket())
	for {
		if _, err = h.client.Status(ctx); err == nil {
			return nil
		}
		select {
		case <-h.process.Done():
			err := fmt.Errorf("the agent of %s ended: %s", h.Name, h.LogTail())
			h.forget()
			return err
		case <-ctx.Done():
			err := fmt.Errorf("the agent of %s does not answer: %w: %s", h.Name, err, h.LogTail())
			h.Kill()
			return err
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// Start starts every agent.
func (f *Fleet) Start(ctx context.Context) error {
	return f.all(func(h *Host) error { return h.Start(ctx) })
}

// Running tells whether the agent runs.
func (h *Host) Running() bool {
	if h.process == nil {
		return false
	}
	select {
	case <-h.process.Done():
		return false
	default:
		return true
	}
}

// Process is the agent's process; nil if none was started.
func (h *Host) Process() *Process { return h.process }

// Client is a client of the admin socket; valid while the agent runs.
func (h *Host) Client() *api.Client { return h.client }

// Stop stops the agent in order.
func (h *Host) Stop(ctx context.Context) error {
	if h.process == nil {
		return nil
	}
	err := h.process.Stop(ctx)
	h.forget()
	return err
}

// Kill ends the agent as a power cut would.
func (h *Host) Kill() {
	if h.process != nil {
		h.process.Kill()
		h.forget()
	}
}

func (h *Host) forget() {
	h.client.Close()
	h.log.Close()
	h.process = nil
}

// Stop stops every agent in order.
func (f *Fleet) Stop(ctx context.Context) error {
	return f.all(func(h *Host) error { return h.Stop(ctx) })
}

// Host returns a host by its name; nil if there is none.
func (f *Fleet) Host(name string) *Host {
	for _, h := range f.Hosts {
		if h.Name == name {
			return h
		}
	}
	return nil
}

// WaitReady waits until every running agent has the key ready.
func (f *Fleet) WaitReady(ctx context.Context, key string) error {
	return f.all(func(h *Host) error {
		if !h.Running() {
			return nil
		}
		for {
			k, err := h.client.GetKey(ctx, key)
			if err == nil && k.Condition == "ready" && len(k.Live) == f.running() {
				return nil
			}
			select {
			case <-ctx.Done():
				return fmt.Errorf("key %q on %s is %s: %s (%v)\n%s", key, h.Name, k.GetCondition(), k.GetDetail(), err, h.LogTail())
			case <-time.After(20 * time.Millisecond):
			}
		}
	})
}

func (f *Fleet) running() (n int) {
	for _, h := range f.Hosts {
		if h.Running() {
			n++
		}
	}
	return n
}

// LogTail is the end of the agent's log.
func (h *Host) LogTail() string {
	b, err := os.ReadFile(h.LogFile())
	if err != nil {
		return err.Error()
	}
	if len(b) > 4096 {
		b = b[len(b)-4096:]
	}
	return string(b)
}

// Close ends everything and removes the fleet's folder.
func (f *Fleet) Close() error {
	err := f.all(func(h *Host) error {
		h.Kill()
		var err error
		if h.Tap != nil {
			err = h.Tap.Close()
		}
		if h.TPM != nil {
			h.TPM.Kill()
		}
		return err
	})
	if f.network != nil {
		err = errors.Join(err, f.network.Close())
	}
	return errors.Join(err, f.free(), os.RemoveAll(f.Dir))
}
