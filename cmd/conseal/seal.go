package main

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"conseal/agent/api"
	"conseal/hsm"
	"conseal/tpm/policy"
)

func sealCommand(e *env) *cobra.Command {
	c := groups(&cobra.Command{
		Use:   "seal",
		Short: "Seal policies: in which measured states a host's TPM opens its shares",
		Long: `Seal policies: in which measured states a host's TPM opens its shares.

On the host, over the admin socket: measure, status, install. At the security
team, on files: explain, key, plan, sign, revoke. Files travel between them in the open: what
the team signs is signed, and what a host measures proves nothing by itself.`,
	})
	c.AddCommand(sealMeasure(e), sealStatus(e), sealInstall(e), sealExplain(e), sealKey(e), sealPlan(e), sealSign(e), sealRevoke(e))
	return c
}

// adminVerb is a verb that asks the admin socket.
func adminVerb(e *env, c *cobra.Command, run func(*cobra.Command, *api.Client, []string) error) *cobra.Command {
	c.RunE = func(c *cobra.Command, a []string) error {
		client, err := e.dial()
		if err != nil {
			return err
		}
		defer client.Close()
		return run(c, client, a)
	}
	e.socketFlag(c, "CONSEAL_ADMIN_SOCKET", api.AdminSocket)
	return c
}

func sealMeasure(e *env) *cobra.Command {
	var output string
	c := adminVerb(e, &cobra.Command{
		Use:   "measure",
		Short: "Write this host's measured state to a file for the security team, and say in words what it is",
		Long: `Write this host's measured state, with the event log of its firmware, for the
security team, and say in words what was measured, as "conseal seal explain" does.
The file goes to --output and the words to standard output; without --output, the
file goes to standard output and the words to standard error.`,
		Args: args(0, 0),
	}, func(c *cobra.Command, client *api.Client, _ []string) error {
		b, err := client.Measure(c.Context())
		if err != nil {
			return err
		}
		m, err := policy.ParseMeasurement(b)
		if err != nil {
			return err
		}
		if err := e.writeDocument(output, b); err != nil {
			return err
		}
		return explain(e.words(c, output), m)
	})
	c.Flags().StringVar(&output, "output", "", "write to this file, else to standard output")
	return c
}

// words is where to say something to people beside a document that goes to output.
func (e *env) words(c *cobra.Command, output string) io.Writer {
	if output != "" {
		return e.out
	}
	return c.ErrOrStderr()
}

func sealInstall(e *env) *cobra.Command {
	return adminVerb(e, &cobra.Command{Use: "install FILE", Short: "Give this host a signed policy, or a signed revocation", Args: args(1, 1)},
		func(c *cobra.Command, client *api.Client, a []string) error {
			b, err := readDocument(a[0], policy.MaxDocument)
			if err != nil {
				return err
			}
			done, err := client.InstallPolicy(c.Context(), b)
			if err == nil {
				_, err = fmt.Fprintln(e.out, done)
			}
			return err
		})
}

func sealStatus(e *env) *cobra.Command {
	return adminVerb(e, &cobra.Command{Use: "status", Short: "Say which policies this host has, which of them open now, and why the others do not", Args: args(0, 0)},
		func(c *cobra.Command, client *api.Client, _ []string) error {
			r, err := client.Policies(c.Context())
			if err != nil {
				return err
			}
			if e.json {
				return json.NewEncoder(e.out).Encode(r)
			}
			opens := "no policy opens this host's TPM now"
			t := tabwriter.NewWriter(e.out, 0, 0, 2, ' ', 0)
			fmt.Fprintf(t, "VERSION\tOPENS NOW\tSIGNED\tCOMMENT\n")
			for _, p := range r.Policies {
				now := "yes"
				switch {
				case p.Opens && p.Pin:
					now, opens = "yes, with the PIN", "this host's TPM opens now, with the PIN"
				case p.Opens:
					opens = "this host's TPM opens now"
				case p.Revoked:
					now = "no, revoked"
				case !p.Opens:
					var registers []string
					for _, ch := range p.Changed {
						registers = append(registers, fmt.Sprintf("PCR %d (%s) is %.4x…, wanted %.4x…", ch.Pcr, ch.Words, ch.Found, ch.Wanted))
					}
					if p.NoPin {
						registers = append(registers, "the host has no PIN, which it wants")
					}
					now = "no: " + strings.Join(registers, ", ")
				}
				fmt.Fprintf(t, "%d\t%s\t%s\t%s\n", p.Version, now, p.Signed, p.Comment)
			}
			if err := t.Flush(); err != nil {
				return err
			}
			fmt.Fprintf(e.out, "\n%s; policies below version %d are revoked; policy key %s\n", opens, r.RevokedBelow, r.Key)
			if r.Broken != "" {
				fmt.Fprintf(e.out, "no policies of this key: %s\n", r.Broken)
			}
			return nil
		})
}

// readDocument reads a file of bounded size; "-" is standard input.
func readDocument(path string, size int64) ([]byte, error) {
	f := os.Stdin
	if path != "-" {
		var err error
		if f, err = os.Open(path); err != nil {
			return nil, err
		}
		defer f.Close()
	}
	return io.ReadAll(io.LimitReader(f, size+1))
}

func readMeasurement(path string) (*policy.Measurement, error) {
	if path == "" {
		return nil, usageError{errors.New("--measurement FILE is wanted: what `conseal seal measure` prints on the host")}
	}
	b, err := readDocument(path, policy.MaxMeasurement)
	if err != nil {
		return nil, err
	}
	m, err := policy.ParseMeasurement(b)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return m, nil
}

// stateFlags say which state a policy is about.
type stateFlags struct {
	measurement, like string
	set               []string
}

func (s *stateFlags) add(c *cobra.Command) {
	c.Flags().StringVar(&s.measurement, "measurement", "", "what `conseal seal measure` printed on the host")
	c.Flags().StringVar(&s.like, "like", "", "take the PCR values from this measurement, of a machine that was updated first")
	c.Flags().StringArrayVar(&s.set, "pcr", nil, "take this value, `N=HEX`; may be repeated")
}

// read returns the host's measurement and its state to be.
func (s *stateFlags) read() (now *policy.Measurement, then policy.Measurement, err error) {
	if now, err = readMeasurement(s.measurement); err != nil {
		return nil, then, err
	}
	then = *now
	then.PCRs = policy.State{}
	for i, v := range now.PCRs {
		then.PCRs[i] = v
	}
	if s.like != "" {
		other, err := readMeasurement(s.like)
		if err != nil {
			return nil, then, err
		}
		for _, i := range now.Selected {
			if then.PCRs[i] = other.PCRs[i]; then.PCRs[i] == nil {
				return nil, then, fmt.Errorf("%s has no PCR %d", s.like, i)
			}
		}
		then.EventLog, then.NoEventLog = other.EventLog, other.NoEventLog
	}
	for _, set := range s.set {
		name, value, _ := strings.Cut(set, "=")
		i, err := strconv.Atoi(name)
		v, hexErr := hex.DecodeString(value)
		if err != nil || hexErr != nil || len(v) != 32 || now.PCRs[i] == nil {
			return nil, then, usageError{fmt.Errorf("--pcr %s: wants N=HEX, a register and the 64 hexadecimal digits of its value", set)}
		}
		then.PCRs[i] = v
	}
	return now, then, nil
}

// keyFlags say where the security team's private key is.
type keyFlags struct{ key, passphrase, pin string }

func (k *keyFlags) add(c *cobra.Command) {
	c.Flags().StringVar(&k.key, "key", "", "the security team's private key: a file, as ssh-keygen makes it, or the pkcs11: URI of a key in a token")
	c.Flags().StringVar(&k.passphrase, "passphrase", "", "where the file's passphrase is: file:/PATH or fd:N; else it is asked for")
	c.Flags().StringVar(&k.pin, "pin", "", "where the token's PIN is: file:/PATH, fd:N or cred:NAME; else it is asked for")
}

// open opens the private key. The caller calls done when it has signed.
func (k *keyFlags) open() (key crypto.Signer, done func(), err error) {
	token := strings.HasPrefix(k.key, "pkcs11:")
	switch {
	case k.key == "":
		return nil, nil, usageError{errors.New("--key is wanted: the file or pkcs11: URI of the security team's private key")}
	case token && k.passphrase != "":
		return nil, nil, usageError{errors.New("--passphrase is for a key in a file: a token's PIN comes from --pin")}
	case !token && k.pin != "":
		return nil, nil, usageError{errors.New("--pin is for a key in a token: a file's passphrase comes from --passphrase")}
	case token:
		return hsm.OpenKey(hsm.KeyConfig{URI: k.key, PINSource: k.pin, AskPIN: func(prompt string) ([]byte, error) { return ask(prompt, "--pin") }})
	}
	b, err := os.ReadFile(k.key)
	if err != nil {
		return nil, nil, err
	}
	passphrase, err := k.readPassphrase()
	if err != nil {
		return nil, nil, err
	}
	key, err = policy.ParsePrivateKey(b, passphrase)
	clear(passphrase)
	if err != nil {
		return nil, nil, fmt.Errorf("%s: %w", k.key, err)
	}
	return key, func() {}, nil
}

// signFlags say who signs what.
type signFlags struct {
	keyFlags
	comment, output string
}

func (s *signFlags) add(c *cobra.Command) {
	s.keyFlags.add(c)
	c.Flags().StringVar(&s.comment, "comment", "", "what this is for, for people")
	c.Flags().StringVar(&s.output, "output", "", "write to this file, else to standard output")
}

// signer opens the private key, which must be the one that the host trusts.
func (s *signFlags) signer(m *policy.Measurement) (key crypto.Signer, done func(), err error) {
	if key, done, err = s.open(); err != nil {
		return nil, nil, err
	}
	_, have, err := publicKey(key)
	if err == nil && have != m.Key {
		err = fmt.Errorf("%s is key %s; host %q trusts %s", s.key, have, m.Host, m.Key)
	}
	if err != nil {
		done()
		return nil, nil, err
	}
	return key, done, nil
}

// publicKey is a policy key's public half and its fingerprint.
func publicKey(key crypto.Signer) (*ecdsa.PublicKey, string, error) {
	public, err := policy.PublicKey(key)
	if err != nil {
		return nil, "", err
	}
	fingerprint, err := policy.Fingerprint(public)
	return public, fingerprint, err
}

func (k *keyFlags) readPassphrase() ([]byte, error) {
	if path, ok := strings.CutPrefix(k.passphrase, "file:"); ok {
		b, err := os.ReadFile(path)
		return bytes.TrimRight(b, "\r\n"), err
	}
	if n, ok := strings.CutPrefix(k.passphrase, "fd:"); ok {
		fd, err := strconv.Atoi(n)
		if err != nil || fd < 3 {
			return nil, usageError{fmt.Errorf("--passphrase %s: wants a descriptor of 3 or above", k.passphrase)}
		}
		f := os.NewFile(uintptr(fd), k.passphrase)
		defer f.Close()
		b, err := io.ReadAll(io.LimitReader(f, 4096))
		return bytes.TrimRight(b, "\r\n"), err
	}
	if k.passphrase != "" {
		return nil, usageError{errors.New("--passphrase wants file:/PATH or fd:N")}
	}
	return ask("Passphrase of "+k.key, "--passphrase")
}

// ask asks the person at the terminal for a secret, which flag could have given.
func ask(prompt, flag string) ([]byte, error) {
	tty, err := os.OpenFile("/dev/tty", os.O_RDWR, 0)
	if err != nil {
		return nil, fmt.Errorf("nobody to ask (%s): use %s: %w", prompt, flag, err)
	}
	defer tty.Close()
	fmt.Fprintf(tty, "%s: ", prompt)
	defer fmt.Fprintln(tty)
	return term.ReadPassword(int(tty.Fd()))
}

func (e *env) writeDocument(path string, b []byte) error {
	if path == "" {
		_, err := e.out.Write(b)
		return err
	}
	real, err := filepath.EvalSymlinks(path)
	if err != nil {
		real = path
	}
	if info, err := os.Lstat(real); err == nil && !info.Mode().IsRegular() {
		return os.WriteFile(real, b, 0o644) // a pipe, say: nothing in it could be lost
	}
	return replaceFile(real, b)
}

// replaceFile writes a file whole or leaves what was there.
func replaceFile(path string, b []byte) error {
	made := filepath.Join(filepath.Dir(path), ".new-"+rand.Text())
	f, err := os.OpenFile(made, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
	if err != nil {
		return err
	}
	defer os.Remove(made) // gone already once it is renamed
	_, err = f.Write(b)
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return fmt.Errorf("%s is as it was: %w", path, err)
	}
	return os.Rename(made, path)
}

func sealKey(e *env) *cobra.Command {
	var with keyFlags
	c := &cobra.Command{
		Use:   "key",
		Short: "Print the public half of the security team's key, for policy_key of the hosts",
		Long: `Print the public half of the security team's key as PEM, for protector.tpm.policy_key
of the hosts, and its fingerprint on standard error.`,
		Example: `  conseal seal key --key "pkcs11:token=team;object=policy?module-path=/usr/lib/softhsm/libsofthsm2.so" > team.pem`,
		Args:    args(0, 0),
		RunE: func(c *cobra.Command, _ []string) error {
			key, done, err := with.open()
			if err != nil {
				return err
			}
			defer done()
			public, fingerprint, err := publicKey(key)
			if err != nil {
				return err
			}
			spki, err := x509.MarshalPKIXPublicKey(public)
			if err != nil {
				return err
			}
			fmt.Fprintln(c.ErrOrStderr(), "policy key", fingerprint)
			return pem.Encode(e.out, &pem.Block{Type: "PUBLIC KEY", Bytes: spki})
		},
	}
	with.add(c)
	return c
}

func sealSign(e *env) *cobra.Command {
	var state stateFlags
	var with signFlags
	var version uint64
	var withoutPIN bool
	c := &cobra.Command{
		Use:   "sign",
		Short: "Sign a policy for a host's measured state",
		Long: `Sign a policy for the state in --measurement, over the PCRs that the host selects,
or for a state that it will be in (--like, --pcr). By the event logs in the
measurements it says which events differ, and what they do not account for. It
says which PCRs are signed, under which version, and whether the PIN is wanted: all
that is from the measurement, which whoever carried it can have changed. The
policies that the host has stay valid until they are revoked, so that an update can
be allowed before it is made. It wants the host's PIN, if the host has one, unless
--without-pin is given.`,
		Args: args(0, 0),
		RunE: func(c *cobra.Command, _ []string) error {
			now, then, err := state.read()
			if err != nil {
				return err
			}
			if err := explainChange(e.words(c, with.output), now, &then); err != nil {
				return err
			}
			key, done, err := with.signer(now)
			if err != nil {
				return err
			}
			defer done()
			p := then.Policy(with.comment, time.Now())
			if version != 0 {
				p.Version = version
			}
			p.PIN = p.PIN && !withoutPIN
			if p.Version < now.Revoked {
				return fmt.Errorf("version %d is revoked already: all below %d are", p.Version, now.Revoked)
			}
			if p.Version-now.Revoked > policy.MaxSteps {
				return fmt.Errorf("version %d is more than %d above %d, below which all are revoked: it could not be revoked. The measurement says so, "+
					"and is wrong: compare it with the host, or give --version", p.Version, policy.MaxSteps, now.Revoked)
			}
			if _, err := io.WriteString(e.words(c, with.output), terms(p)); err != nil {
				return err
			}
			b, err := p.Sign(key)
			if err != nil {
				return err
			}
			return e.writeDocument(with.output, b)
		},
	}
	state.add(c)
	with.add(c)
	c.Flags().BoolVar(&withoutPIN, "without-pin", false, "let a host that has a PIN open in this state without it")
	c.Flags().Uint64Var(&version, "version", 0, "its version, if not the next")
	return c
}

// terms says what somebody is about to sign, beside the values of the PCRs.
func terms(p *policy.Policy) string {
	pin, measured := "opens WITHOUT a PIN", false
	if p.PIN {
		pin = "wants the host's PIN"
	}
	for _, v := range p.State {
		measured = measured || len(bytes.Trim(v, "\x00")) > 0 && len(bytes.Trim(v, "\xff")) > 0
	}
	said := fmt.Sprintf("policy %d for host %q: over PCRs %v, %s\n", p.Version, p.Host, p.State.Indices(), pin)
	if !measured {
		said += "!! NOTHING WAS MEASURED into any of these PCRs: it opens whatever else was booted\n"
	}
	return said
}

func sealRevoke(e *env) *cobra.Command {
	var with signFlags
	var measurement string
	var below uint64
	c := &cobra.Command{
		Use:   "revoke",
		Short: "Sign the end of a host's policies below a version",
		Long: `Sign the end of all policies of a host below a version, for good. It takes effect
on the host with "conseal seal install": from then on, no such policy opens the
host's TPM. An agent that has its shares open keeps them until it stops.`,
		Args: args(0, 0),
		RunE: func(*cobra.Command, []string) error {
			m, err := readMeasurement(measurement)
			if err != nil {
				return err
			}
			if below <= m.Revoked || below > m.Next {
				return usageError{fmt.Errorf("--below %d: wants %d to %d for host %q", below, m.Revoked+1, m.Next, m.Host)}
			}
			key, done, err := with.signer(m)
			if err != nil {
				return err
			}
			defer done()
			b, err := (&policy.Revocation{Host: m.Host, Counter: m.Counter, Below: below, Comment: with.comment, Signed: time.Now()}).Sign(key)
			if err != nil {
				return err
			}
			return e.writeDocument(with.output, b)
		},
	}
	with.add(c)
	c.Flags().StringVar(&measurement, "measurement", "", "what `conseal seal measure` printed on the host")
	c.Flags().Uint64Var(&below, "below", 0, "the first version that stays valid")
	return c
}

func sealPlan(e *env) *cobra.Command {
	var state stateFlags
	var keyFile string
	c := &cobra.Command{
		Use:   "plan POLICY...",
		Short: "Say what a change of the host's state would do to the policies it has",
		Long: `Say which PCRs a change would change (--like, --pcr), by which events if the
measurements have event logs, and which of the policies would open the host's TPM
before and after it. Fails if none would afterwards.`,
		Args: args(0, 1000),
		RunE: func(_ *cobra.Command, files []string) error {
			now, then, err := state.read()
			if err != nil {
				return err
			}
			b, err := os.ReadFile(keyFile)
			if err != nil {
				return fmt.Errorf("--policy-key: %w", err)
			}
			key, err := policy.ParsePublicKey(b)
			if err != nil {
				return fmt.Errorf("%s: %w", keyFile, err)
			}
			for _, i := range now.Selected {
				if !bytes.Equal(now.PCRs[i], then.PCRs[i]) {
					fmt.Fprintf(e.out, "PCR %d (%s) would change from %.4x… to %.4x…\n", i, policy.PCRWords(i), now.PCRs[i], then.PCRs[i])
				}
			}
			if err := explainChange(e.out, now, &then); err != nil {
				return err
			}
			opens := false
			for _, file := range files {
				b, err := readDocument(file, policy.MaxDocument)
				if err != nil {
					return err
				}
				document, err := policy.Parse(b, key)
				p, ok := document.(*policy.Policy)
				if err == nil && (!ok || p.Host != now.Host) {
					err = fmt.Errorf("no policy of host %q", now.Host)
				}
				if err != nil {
					return fmt.Errorf("%s: %w", file, err)
				}
				after := p.Version >= now.Revoked && p.State.Fits(then.PCRs)
				opens = opens || after
				fmt.Fprintf(e.out, "policy %d (%s): opens now: %s, opens then: %s\n", p.Version, p.Comment, yes(p.Version >= now.Revoked && p.State.Fits(now.PCRs)), yes(after))
			}
			if !opens {
				return fmt.Errorf("after this change no policy would open the TPM of host %q: sign one first, with the same flags", now.Host)
			}
			return nil
		},
	}
	state.add(c)
	c.Flags().StringVar(&keyFile, "policy-key", "", "the security team's public key")
	return c
}

func yes(b bool) string {
	if b {
		return "yes"
	}
	return "no"
}
