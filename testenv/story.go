package testenv

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"conseal/agent/api"
	"conseal/agent/api/apipb"
)

// Stories returns testscript parameters for the stories in dir: scripts that run
// the real programs, walkthroughs for people and tests at once. What happens is
// told to live as it happens, which may be [io.Discard].
//
// Beside testscript's own, a story has these commands:
//
//	say TEXT               tell the reader something
//	token                  make a SoftHSM token: $TOKEN is its label, $MODULE its module, $PIN and $PINFILE its PIN, $SPY pkcs11-spy
//	team KEY PUBLIC SECRET let the fleet that comes next have seal policies, signed with KEY, a file of ssh-keygen or a pkcs11: URI; the others
//	                       are files: its public half, and its passphrase or PIN
//	fleet KIND...          make hosts alpha, beta, gamma, ... with a tpm or an hsm each, and initialise them
//	key NAME SCHEME T [OPEN]  declare a key of all hosts with quorum T; the roster is written with the next `up`
//	up [HOST...]           start agents, all unless named
//	down [HOST...]         stop agents in order, all unless named
//	crash HOST...          end agents as a power cut would
//	measure HOST N TEXT    have a host measure something into PCR N, as a changed boot would
//	boot HOST LOG [PCR=X]...  reboot a host that is down with the event log of a real machine (testenv/eventlogs), with another version of what X names in PCR
//	reboot HOST...         restart the TPMs of hosts that are down: their PCRs are as at first
//	image HOST NAME        keep a copy of a stopped host's disk, that is of its state folder
//	putback HOST NAME      put such a copy in the place of the host's disk
//	ready KEY              wait until all running agents have the key ready
//	roster KEY FIELD=VALUE...  change a key's entry (hosts=a,b,c, quorum=3, ...), pin its public key if it has one, and have all agents that run load the roster
//	epoch KEY HOST...      wait until these hosts have a new epoch of the key, the same
//	left KEY HOST...       wait until these hosts have erased their shares of the key
//	erased KEY HOST...     wait until these hosts have the receipts of all hosts that erased the key
//	replace HOST...        put a new board in the place of a host: hardware, disk and identity are new
//	on HOST                let conseal talk to this host's sockets from now on
//	run PROGRAM ARG...     run a program and show what it prints; `! run` wants it to fail
//	end                    the last line: a story counts as told only when it got here
//
// ended tells how many stories were told to their end.
func Stories(ctx context.Context, bin Binaries, dir string, live io.Writer) (p testscript.Params, ended func() int) {
	s := &storyteller{ctx: ctx, bin: bin, live: live}
	p = testscript.Params{
		Dir: dir,
		Setup: func(e *testscript.Env) error {
			e.Setenv("PATH", filepath.Dir(bin.Client)+string(os.PathListSeparator)+e.Getenv("PATH"))
			e.Setenv("XDG_CACHE_HOME", filepath.Join(e.WorkDir, ".cache")) // testscript's HOME is none
			e.Values[fleetKey{}] = &story{}
			e.Defer(func() {
				if f := e.Values[fleetKey{}].(*story).fleet; f != nil {
					f.Close()
				}
			})
			return nil
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"say": s.say, "token": s.token, "team": s.team, "fleet": s.fleet, "measure": s.measure, "boot": s.boot, "fault": s.fault, "reboot": s.reboot,
			"image": s.image, "putback": s.putback, "key": s.key, "roster": s.roster, "epoch": s.epoch, "left": s.left, "erased": s.erased, "replace": s.replace, "up": s.up, "down": s.down,
			"crash": s.crash, "ready": s.ready, "on": s.on, "run": s.run, "end": s.end,
		},
	}
	return p, func() int { return int(s.ended.Load()) }
}

// stepTimeout bounds one step of a story, so that a hang ends as an error; storyLimits give
// machines time that are slow, or make several ECDSA keys at once.
const stepTimeout = 6 * time.Minute

const storyLimits = "[limits]\nsign_deadline = \"2m\"\nkeygen_deadline = \"5m\"\n"

type fleetKey struct{}

// story is one script's state.
type story struct {
	fleet   *Fleet
	team    Team
	version int
	written string // the keys that the roster has
	faults  *FaultModule
	epoch   [2]uint64 // that `epoch` saw last
}

type storyteller struct {
	ctx   context.Context
	bin   Binaries
	live  io.Writer
	ended atomic.Int32
}

func (s *storyteller) end(ts *testscript.TestScript, neg bool, _ []string) {
	s.step(ts, neg, func(context.Context, *story) error { s.ended.Add(1); return nil })
}

func storyOf(ts *testscript.TestScript) *story { return ts.Value(fleetKey{}).(*story) }

// step runs fn with a deadline; a story's own commands cannot be negated.
func (s *storyteller) step(ts *testscript.TestScript, neg bool, fn func(ctx context.Context, st *story) error) {
	if neg {
		ts.Fatalf("only `run` can be wanted to fail")
	}
	ctx, cancel := context.WithTimeout(s.ctx, stepTimeout)
	defer cancel()
	ts.Check(fn(ctx, storyOf(ts)))
}

func (s *storyteller) tell(format string, args ...any) { fmt.Fprintf(s.live, format+"\n", args...) }

func (s *storyteller) say(ts *testscript.TestScript, neg bool, args []string) {
	s.tell("\n== %s", strings.Join(args, " "))
}

func (s *storyteller) fleet(ts *testscript.TestScript, neg bool, kinds []string) {
	s.step(ts, neg, func(ctx context.Context, st *story) (err error) {
		if st.fleet, err = NewFleet(ctx, s.bin, kinds...); err != nil {
			return err
		}
		st.fleet.Team, st.fleet.Limits = st.team, storyLimits
		if err := st.fleet.Init(ctx); err != nil {
			return err
		}
		for _, h := range st.fleet.Hosts {
			ts.Setenv(strings.ToUpper(h.Name)+"_CONFIG", h.ConfigFile())
			ts.Setenv(strings.ToUpper(h.Name)+"_POLICY", h.PolicyFile())
			ts.Setenv(strings.ToUpper(h.Name)+"_STATE", h.State())
			if h.Token != nil {
				ts.Setenv(strings.ToUpper(h.Name)+"_TOKEN", h.Token.URI)
				ts.Setenv(strings.ToUpper(h.Name)+"_PIN", h.Token.PINFile)
				ts.Setenv(strings.ToUpper(h.Name)+"_SOFTHSM2_CONF", h.Token.Conf)
			}
			ts.Setenv(strings.ToUpper(h.Name)+"_EVENT_LOG", h.EventLogFile())
			s.tell("   %s: %s, identity %.23s...", h.Name, map[string]string{"tpm": "swtpm", "hsm": "SoftHSM"}[h.Protector], h.Identity)
		}
		ts.Setenv("ROSTER", st.fleet.RosterFile())
		return nil
	})
}

func (s *storyteller) team(ts *testscript.TestScript, neg bool, args []string) {
	s.step(ts, neg, func(_ context.Context, st *story) error {
		if len(args) != 3 || st.fleet != nil {
			return errors.New("usage, before fleet: team KEY PUBLIC SECRET")
		}
		st.team = Team{Key: args[0], Public: ts.MkAbs(args[1]), Secret: ts.MkAbs(args[2]), Env: []string{"SOFTHSM2_CONF=" + ts.Getenv("SOFTHSM2_CONF")}}
		if !strings.HasPrefix(args[0], "pkcs11:") {
			st.team.Key = ts.MkAbs(args[0])
		}
		return nil
	})
}

func (s *storyteller) token(ts *testscript.TestScript, neg bool, args []string) {
	s.step(ts, neg, func(ctx context.Context, _ *story) error {
		dir := ts.MkAbs("token")
		if err := os.Mkdir(dir, 0o700); err != nil {
			return err
		}
		t, err := NewToken(ctx, dir)
		if err != nil {
			return err
		}
		pin, err := os.ReadFile(t.PINFile)
		if err != nil {
			return err
		}
		spy, err := Spy()
		if err != nil {
			return err
		}
		for name, value := range map[string]string{"TOKEN": t.Label, "MODULE": t.Module, "SPY": spy,
			"PIN": strings.TrimSpace(string(pin)), "PINFILE": t.PINFile, "SOFTHSM2_CONF": t.Conf} {
			ts.Setenv(name, value)
		}
		s.tell("   a SoftHSM token, %s", t.Label)
		return nil
	})
}

func (s *storyteller) measure(ts *testscript.TestScript, neg bool, args []string) {
	s.step(ts, neg, func(_ context.Context, st *story) error {
		if len(args) != 3 {
			return errors.New("usage, after fleet: measure HOST PCR TEXT")
		}
		hosts, err := s.hosts(st, args[:1])
		if err != nil {
			return err
		}
		pcr, err := strconv.Atoi(args[1])
		if err != nil || hosts[0].Tap == nil {
			return fmt.Errorf("host %s has no PCR %s", args[0], args[1])
		}
		s.tell("   %s measures %q into PCR %d", args[0], args[2], pcr)
		return hosts[0].Tap.Extend(pcr, args[2])
	})
}

func (s *storyteller) boot(ts *testscript.TestScript, neg bool, args []string) {
	if len(args) < 2 {
		ts.Fatalf("usage, after fleet: boot HOST LOG [PCR=X]...")
	}
	s.reboot(ts, neg, args[:1])
	s.step(ts, neg, func(_ context.Context, st *story) error {
		log, err := FirmwareLog(args[1])
		if err != nil {
			return err
		}
		for _, arg := range args[2:] {
			pcr, text, _ := strings.Cut(arg, "=")
			n, err := strconv.ParseUint(pcr, 10, 32)
			if err == nil {
				err = log.Replace(uint32(n), text)
			}
			if err != nil {
				return err
			}
		}
		h := st.fleet.Host(args[0])
		s.tell("   its firmware measures what that of %s has%s", args[1], strings.Join(append([]string{""}, args[2:]...), ", other "))
		return errors.Join(h.Tap.Boot(log), os.WriteFile(h.EventLogFile(), log.Encode(), 0o600))
	})
}

func (s *storyteller) reboot(ts *testscript.TestScript, neg bool, names []string) {
	s.step(ts, neg, func(ctx context.Context, st *story) error {
		hosts, err := s.hosts(st, names)
		if err != nil || len(names) == 0 {
			return errors.Join(errors.New("usage, after fleet: reboot HOST [HOST...]"), err)
		}
		for _, h := range hosts {
			if h.TPM == nil || h.Running() {
				return fmt.Errorf("host %s runs, or has no TPM", h.Name)
			}
			if err := h.TPM.Restart(ctx); err != nil {
				return err
			}
			h.Tap.Connect(h.TPM)
			s.tell("   %s starts again", h.Name)
		}
		return nil
	})
}

// fault puts a module that injects faults before a stopped host's token, adds a fault to
// it, or ends all of them: "fault HOST", "fault HOST CALL WHAT VALUE TIMES", "fault HOST end".
func (s *storyteller) fault(ts *testscript.TestScript, neg bool, args []string) {
	s.step(ts, neg, func(ctx context.Context, st *story) error {
		if len(args) == 0 || st.fleet == nil {
			return errors.New("usage, after fleet: fault HOST [end | CALL WHAT VALUE TIMES]")
		}
		hosts, err := s.hosts(st, args[:1])
		if err != nil {
			return err
		}
		h := hosts[0]
		switch {
		case len(args) == 1 && h.Token != nil && !h.Running():
			dir := filepath.Join(h.Dir, "fault")
			if err := os.Mkdir(dir, 0o700); err != nil {
				return err
			}
			if st.faults, err = NewFaultModule(ctx, dir, h.Token.Module); err != nil {
				return err
			}
			h.Token.URI = strings.Replace(h.Token.URI, h.Token.Module, st.faults.Path, 1)
			h.Token.Module = st.faults.Path
			s.tell("   %s has a PKCS#11 module that can be made to fail", h.Name)
			return h.WriteConfig()
		case len(args) == 2 && args[1] == "end" && st.faults != nil:
			s.tell("   the module of %s works again", h.Name)
			return st.faults.Clear()
		case len(args) == 5 && st.faults != nil:
			var f Fault
			f.Call, f.Do = args[1], Action(args[2])
			value, err := strconv.ParseUint(args[3], 0, 32)
			times, err2 := strconv.Atoi(args[4])
			if err := errors.Join(err, err2); err != nil {
				return err
			}
			f.Value, f.Times = uint(value), times
			s.tell("   the module of %s: %s %s", h.Name, f.Call, f.Do)
			_, err = st.faults.Set(f)
			return err
		}
		return fmt.Errorf("host %s runs, has no token or no module that fails, or what is wanted is unclear", h.Name)
	})
}

func (s *storyteller) image(ts *testscript.TestScript, neg bool, args []string) {
	s.disk(ts, neg, args, "kept", func(disk, image string) error { return os.CopyFS(image, os.DirFS(disk)) })
}

func (s *storyteller) putback(ts *testscript.TestScript, neg bool, args []string) {
	s.disk(ts, neg, args, "put back", func(disk, image string) error {
		err := os.RemoveAll(disk)
		if err == nil {
			err = os.CopyFS(disk, os.DirFS(image))
		}
		return errors.Join(err, os.Chmod(disk, 0o700))
	})
}

func (s *storyteller) disk(ts *testscript.TestScript, neg bool, args []string, done string, copied func(disk, image string) error) {
	s.step(ts, neg, func(_ context.Context, st *story) error {
		if len(args) != 2 {
			return errors.New("usage, after fleet: image HOST NAME, putback HOST NAME")
		}
		hosts, err := s.hosts(st, args[:1])
		if err != nil {
			return err
		}
		if hosts[0].Running() {
			return fmt.Errorf("host %s runs", args[0])
		}
		s.tell("   the disk of %s %q is %s", args[0], args[1], done)
		return copied(hosts[0].State(), filepath.Join(st.fleet.Dir, args[0]+"-"+args[1]))
	})
}

func (s *storyteller) key(ts *testscript.TestScript, neg bool, args []string) {
	s.step(ts, neg, func(_ context.Context, st *story) error {
		var quorum int
		if len(args) < 3 || len(args) > 4 || st.fleet == nil {
			return errors.New("usage, after fleet: key NAME SCHEME QUORUM [OPEN]")
		}
		if _, err := fmt.Sscan(args[2], &quorum); err != nil {
			return err
		}
		st.fleet.Keys += st.fleet.Key(args[0], args[1], quorum)
		if len(args) == 4 {
			st.fleet.Keys += fmt.Sprintf("open = %q\n", args[3])
		}
		return nil
	})
}

// roster changes a key's entry, as the security team does with an editor, and has every
// agent that runs load the roster: "roster KEY FIELD=VALUE...". hosts is a list with
// commas. A key that exists is pinned by its public key.
func (s *storyteller) roster(ts *testscript.TestScript, neg bool, args []string) {
	s.step(ts, neg, func(ctx context.Context, st *story) error {
		if len(args) < 2 || st.fleet == nil {
			return errors.New("usage, after key: roster KEY FIELD=VALUE [FIELD=VALUE...]")
		}
		values := map[string]string{}
		for _, arg := range args[1:] {
			field, value, _ := strings.Cut(arg, "=")
			switch _, err := strconv.Atoi(value); {
			case field == "hosts":
				value = `["` + strings.ReplaceAll(value, ",", `", "`) + `"]`
			case err != nil && value != "":
				value = strconv.Quote(value)
			}
			values[field] = value
			s.tell("   in the roster: key %s: %s = %s", args[0], field, value)
		}
		for _, h := range st.fleet.Hosts {
			if !h.Running() {
				continue
			}
			k, err := h.Client().GetKey(ctx, args[0])
			if err != nil || len(k.PublicKey) == 0 {
				continue
			}
			pin, err := rosterKey(k)
			if err != nil {
				return err
			}
			values["public_key"], values["generate"] = strconv.Quote(pin), ""
		}
		if err := st.fleet.SetKey(args[0], values); err != nil {
			return err
		}
		st.version++
		st.written = st.fleet.Keys
		if err := st.fleet.WriteRoster(st.version); err != nil {
			return err
		}
		for _, h := range st.fleet.Hosts {
			if h.Running() {
				if _, err := h.Client().LoadRoster(ctx); err != nil {
					return err
				}
				s.tell("   %s: conseal roster load", h.Name)
			}
		}
		return nil
	})
}

// rosterKey is a public key as the roster pins it; Ed25519 only.
func rosterKey(k *apipb.Key) (string, error) {
	public, err := x509.ParsePKIXPublicKey(k.PublicKey)
	if err != nil {
		return "", err
	}
	ed, ok := public.(ed25519.PublicKey)
	if !ok {
		return "", fmt.Errorf("key %s: this story pins Ed25519 keys only", k.Name)
	}
	return hex.EncodeToString(ed), nil
}

// epoch waits until the hosts named have the same epoch of a key, above that of the last
// time, and want no other: "epoch KEY HOST...".
func (s *storyteller) epoch(ts *testscript.TestScript, neg bool, args []string) {
	s.step(ts, neg, func(ctx context.Context, st *story) error {
		if len(args) < 2 {
			return errors.New("usage, after up: epoch KEY HOST [HOST...]")
		}
		hosts, err := s.hosts(st, args[1:])
		if err != nil {
			return err
		}
		for tick := time.Tick(20 * time.Millisecond); ; {
			at, same := [2]uint64{}, true
			for i, h := range hosts {
				k, err := h.Client().GetKey(ctx, args[0])
				if err != nil {
					return err
				}
				n := [2]uint64{k.EpochRoster, k.EpochAttempt}
				same = same && k.Condition == "ready" && k.Next == "" && slices.Compare(n[:], st.epoch[:]) > 0 && (i == 0 || n == at)
				at = n
			}
			if same {
				st.epoch = at
				s.tell("   key %s is at epoch %d.%d on %s", args[0], at[0], at[1], strings.Join(args[1:], ", "))
				return nil
			}
			select {
			case <-tick:
			case <-ctx.Done():
				return fmt.Errorf("key %s gets to no common epoch above %d.%d: %s", args[0], st.epoch[0], st.epoch[1], hosts[0].LogTail())
			}
		}
	})
}

func (s *storyteller) left(ts *testscript.TestScript, neg bool, args []string) {
	s.step(ts, neg, func(ctx context.Context, st *story) error {
		if len(args) < 2 {
			return errors.New("usage, after up: left KEY HOST [HOST...]")
		}
		hosts, err := s.hosts(st, args[1:])
		if err != nil {
			return err
		}
		for _, h := range hosts {
			for tick := time.Tick(20 * time.Millisecond); ; {
				_, err := h.Client().GetKey(ctx, args[0])
				var gone *api.Error
				if errors.As(err, &gone) && gone.Reason == "UNKNOWN_KEY" {
					break
				}
				select {
				case <-tick:
				case <-ctx.Done():
					return fmt.Errorf("host %s does not leave key %s: %w: %s", h.Name, args[0], err, h.LogTail())
				}
			}
			s.tell("   %s holds nothing of key %s any more", h.Name, args[0])
		}
		return nil
	})
}

func (s *storyteller) erased(ts *testscript.TestScript, neg bool, args []string) {
	s.step(ts, neg, func(ctx context.Context, st *story) error {
		if len(args) < 2 {
			return errors.New("usage, after up: erased KEY HOST [HOST...]")
		}
		hosts, err := s.hosts(st, args[1:])
		if err != nil {
			return err
		}
		for _, h := range hosts {
			for tick := time.Tick(20 * time.Millisecond); ; {
				k, err := h.Client().GetKey(ctx, args[0])
				if err == nil && len(k.Receipts) == len(hosts) {
					break
				}
				select {
				case <-tick:
				case <-ctx.Done():
					return fmt.Errorf("host %s lacks receipts of key %s: %w: %s", h.Name, args[0], err, h.LogTail())
				}
			}
		}
		s.tell("   %s have erased key %s, and have each other's receipts", strings.Join(args[1:], ", "), args[0])
		return nil
	})
}

func (s *storyteller) replace(ts *testscript.TestScript, neg bool, names []string) {
	s.step(ts, neg, func(ctx context.Context, st *story) error {
		hosts, err := s.hosts(st, names)
		if err != nil || len(names) == 0 {
			return errors.Join(errors.New("usage, after fleet: replace HOST [HOST...]"), err)
		}
		for _, h := range hosts {
			if err := h.Replace(ctx); err != nil {
				return err
			}
			s.tell("   %s has new hardware and a new disk, identity %.23s...", h.Name, h.Identity)
		}
		return nil
	})
}

func (s *storyteller) hosts(st *story, names []string) (hosts []*Host, err error) {
	if st.fleet == nil {
		return nil, errors.New("there is no fleet yet")
	}
	if len(names) == 0 {
		return st.fleet.Hosts, nil
	}
	for _, name := range names {
		h := st.fleet.Host(name)
		if h == nil {
			return nil, fmt.Errorf("no host %q", name)
		}
		hosts = append(hosts, h)
	}
	return hosts, nil
}

func (s *storyteller) up(ts *testscript.TestScript, neg bool, names []string) {
	s.step(ts, neg, func(ctx context.Context, st *story) error {
		hosts, err := s.hosts(st, names)
		if err != nil {
			return err
		}
		if st.written != st.fleet.Keys || st.version == 0 {
			st.version++
			st.written = st.fleet.Keys
			if err := st.fleet.WriteRoster(st.version); err != nil {
				return err
			}
		}
		for _, h := range hosts {
			err := h.Start(ctx)
			if err == nil {
				err = s.settled(ctx, h)
			}
			if err != nil {
				return err
			}
			s.tell("   %s runs", h.Name)
		}
		return nil
	})
}

// settled waits until an agent has looked at each of its keys: before, it cannot say what
// is wrong with one.
func (s *storyteller) settled(ctx context.Context, h *Host) error {
	return s.awaitKeys(ctx, h, func(k *apipb.Key) bool { return !strings.HasSuffix(k.Detail, "has not looked at it yet") })
}

// noticed waits until the agents that run have heard that others do not: before, they can
// count on them for a signature.
func (s *storyteller) noticed(ctx context.Context, st *story) error {
	var gone []string
	for _, h := range st.fleet.Hosts {
		if !h.Running() {
			gone = append(gone, h.Name)
		}
	}
	for _, h := range st.fleet.Hosts {
		if !h.Running() {
			continue
		}
		err := s.awaitKeys(ctx, h, func(k *apipb.Key) bool {
			return !slices.ContainsFunc(k.Live, func(name string) bool { return slices.Contains(gone, name) })
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// awaitKeys waits until all keys of an agent are as they should be.
func (s *storyteller) awaitKeys(ctx context.Context, h *Host, good func(*apipb.Key) bool) error {
	for tick := time.Tick(20 * time.Millisecond); ; {
		status, err := h.Client().Status(ctx)
		if err == nil && !slices.ContainsFunc(status.Keys, func(k *apipb.Key) bool { return !good(k) }) {
			return nil
		}
		select {
		case <-tick:
		case <-ctx.Done():
			return fmt.Errorf("host %s does not say how its keys are: %v: %s", h.Name, err, h.LogTail())
		}
	}
}

func (s *storyteller) down(ts *testscript.TestScript, neg bool, names []string) {
	s.step(ts, neg, func(ctx context.Context, st *story) error {
		hosts, err := s.hosts(st, names)
		for _, h := range hosts {
			err = errors.Join(err, h.Stop(ctx))
			s.tell("   %s stopped", h.Name)
		}
		if err == nil {
			err = s.noticed(ctx, st)
		}
		return err
	})
}

func (s *storyteller) crash(ts *testscript.TestScript, neg bool, names []string) {
	s.step(ts, neg, func(ctx context.Context, st *story) error {
		hosts, err := s.hosts(st, names)
		for _, h := range hosts {
			h.Kill()
			s.tell("   %s killed", h.Name)
		}
		if err == nil {
			err = s.noticed(ctx, st)
		}
		return err
	})
}

func (s *storyteller) ready(ts *testscript.TestScript, neg bool, args []string) {
	s.step(ts, neg, func(ctx context.Context, st *story) error {
		if len(args) != 1 || st.fleet == nil {
			return errors.New("usage, after up: ready KEY")
		}
		if err := st.fleet.WaitReady(ctx, args[0]); err != nil {
			return err
		}
		s.tell("   key %s is ready on all hosts that run", args[0])
		return nil
	})
}

func (s *storyteller) on(ts *testscript.TestScript, neg bool, args []string) {
	s.step(ts, neg, func(_ context.Context, st *story) error {
		hosts, err := s.hosts(st, args)
		if err != nil || len(args) != 1 {
			return errors.Join(errors.New("usage, after fleet: on HOST"), err)
		}
		ts.Setenv("CONSEAL_SIGN_SOCKET", hosts[0].SignSocket())
		ts.Setenv("CONSEAL_ADMIN_SOCKET", hosts[0].AdminSocket())
		return nil
	})
}

func (s *storyteller) run(ts *testscript.TestScript, neg bool, args []string) {
	if len(args) == 0 {
		ts.Fatalf("usage: run PROGRAM ARG...")
	}
	s.tell("   $ %s", strings.Join(args, " "))
	err := ts.Exec(args[0], args[1:]...)
	for _, stream := range []string{"stdout", "stderr"} {
		text := ts.ReadFile(stream)
		for line := range strings.Lines(text) {
			s.tell("     %s", strings.TrimRight(printable(line), "\n"))
		}
	}
	var exit *exec.ExitError
	switch {
	case err != nil && !errors.As(err, &exit):
		ts.Fatalf("%v", err)
	case err == nil && neg:
		ts.Fatalf("%s should have failed", args[0])
	case err != nil && !neg:
		ts.Fatalf("%s: %v", args[0], err)
	}
}

// printable replaces what would upset a terminal.
func printable(s string) string {
	return string(bytes.Map(func(r rune) rune {
		if r < ' ' && r != '\n' && r != '\t' || r == 0x7f || r == '\uFFFD' {
			return '.'
		}
		return r
	}, []byte(s)))
}
