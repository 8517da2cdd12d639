package agent_test

import (
	"bytes"
	"cmp"
	"context"
	"crypto/ed25519"
	"crypto/x509"
	"encoding/hex"
	"fmt"
	"math/rand/v2"
	"os"
	"regexp"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"conseal/agent/api"
	"conseal/agent/api/apipb"
	"conseal/testenv"
)

// settleTime bounds how long a fleet may take to settle after the last disturbance: it
// only ends what hangs.
const settleTime = 3 * time.Minute

// TestChaos draws operations on a key and disturbances of its hosts: kills, pauses, power
// cuts, partitions, and in a run either one share that is lost or one host that lies, but
// not both. When they end, the hosts that are honest agree and sign, and when nobody lies
// any more the fleet gets by itself to one epoch of the same key. Each run has a key and a
// seed of its own, which -seed runs again. A run mostly waits, so that several fleets are
// disturbed at a time.
func TestChaos(t *testing.T) {
	first, runs := *seed, *runs
	if first == 0 {
		if first, runs = rand.Uint64(), 30; *soak {
			runs = 500
		}
	}
	const perFleet = 50 // an old fleet's vaults are full of dead keys
	var next atomic.Int64
	var fleets sync.WaitGroup
	told := &lies{by: map[string]int{}}
	counted := runs >= 30
	wanted := func(run int64) bool { // more than was said only until liars have lied about all that matters
		return !t.Failed() && (run < int64(runs) || counted && run < 3*int64(runs) && len(told.missing()) > 0)
	}
	for i := range min(runs, sideBySide) {
		fleets.Go(func() {
			for wanted(next.Load()) {
				t.Run(fmt.Sprintf("fleet%d", i), func(fleet *testing.T) {
					c := newChaos(fleet, told)
					for range perFleet {
						run := next.Add(1) - 1
						if !wanted(run) {
							return
						}
						c.run(first + uint64(run))
					}
				})
			}
		})
	}
	fleets.Wait()
	if counted && !t.Failed() {
		told.check(t)
	}
}

// sideBySide is how many fleets are disturbed at a time.
const sideBySide = 6

// lies counts what liars said, of all fleets.
type lies struct {
	mu sync.Mutex
	by map[string]int // by the frame's kind and what was done to it
}

func (l *lies) add(told map[string]int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for lie, n := range told {
		l.by[lie] += n
	}
}

// missing are the kinds of frames that matter and in which no liar lied.
func (l *lies) missing() []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.DeleteFunc([]string{"open", "step", "status", "end"}, func(kind string) bool {
		for lie := range l.by {
			if strings.HasPrefix(lie, kind+" ") {
				return true
			}
		}
		return false
	})
}

// check fails if liars did not lie about what matters.
func (l *lies) check(t *testing.T) {
	t.Logf("the lies of all runs: %v", l.by)
	for _, kind := range l.missing() {
		t.Errorf("no host told a lie in a frame of kind %q", kind)
	}
}

// newChaos starts a fleet without keys.
func newChaos(t *testing.T, told *lies) *chaos {
	bin, err := testenv.Build(t.Context(), "-tags", "failpoints")
	must(t, err)
	f, err := testenv.NewFleet(t.Context(), bin, "tpm", "tpm", "hsm", "tpm")
	must(t, err)
	t.Cleanup(func() {
		if err := f.Close(); err != nil {
			t.Error(err)
		}
	})
	c := &chaos{T: t, f: f, lies: told, version: 1, entries: map[uint64][]*testenv.Host{}, shares: map[string]int{}, logged: map[string]int64{}}
	c.network, err = f.Network()
	must(t, err)
	f.Limits = "[limits]\nkeygen_deadline = \"5s\"\nerasures_per_hour = 60000\n"
	must(t, f.Init(t.Context()))
	must(t, f.WriteRoster(c.version))
	must(t, f.Start(t.Context()))
	return c
}

// chaos is a fleet that is disturbed.
type chaos struct {
	*testing.T
	f       *testenv.Fleet
	network *testenv.Network
	lies    *lies
	version int                        // of the roster
	entries map[uint64][]*testenv.Host // holders by the roster's version
	shares  map[string]int             // share files of earlier runs, by host
	logged  map[string]int64           // bytes of the logs of earlier runs, by host

	oneRun
}

// oneRun is what a [chaos] knows of one run.
type oneRun struct {
	ops, trouble *rand.Rand // what the security team does, and what befalls the hosts
	key          string
	holders      []*testenv.Host
	quorum       int
	public       []byte        // once born
	lost         bool          // the one share that may be
	liar         *testenv.Host // nil in most runs
	lying        bool
	stuck        time.Time // when a host first said that the birth is
	again        bool      // the key has a second incarnation
	// vain: a resharing may have come to nothing, of which shares are left until the next:
	// one that a person asked for, or for an entry of the roster in whose place came an
	// earlier one.
	vain   bool
	seen   map[string]bool // entries of the roster
	told   []string
	begun  time.Time
	asking sync.WaitGroup
}

func (c *chaos) tell(format string, args ...any) {
	c.told = append(c.told, fmt.Sprintf("%6dms ", time.Since(c.begun).Milliseconds())+fmt.Sprintf(format, args...))
}

// fail ends the test with what happened.
func (c *chaos) fail(format string, args ...any) {
	c.Helper()
	for _, h := range c.f.Hosts {
		c.Logf("log of %s:\n%s", h.Name, c.log(h))
	}
	c.Fatalf("%s\n%s", strings.Join(c.told, "\n"), fmt.Sprintf(format, args...))
}

// log is what a host has logged in this run.
func (c *chaos) log(h *testenv.Host) []byte {
	b, err := os.ReadFile(h.LogFile())
	must(c.T, err)
	return b[c.logged[h.Name]:]
}

func (c *chaos) must(err error) {
	c.Helper()
	if err != nil {
		c.fail("%v", err)
	}
}

// run gives the fleet a new key, changes it under disturbances, and wants it whole.
func (c *chaos) run(s uint64) {
	c.oneRun = oneRun{
		ops: rand.New(rand.NewPCG(s, 2)), trouble: rand.New(rand.NewPCG(s, 3)),
		begun: time.Now(), seen: map[string]bool{},
	}
	for _, h := range c.f.Hosts {
		c.shares[h.Name] = shareFiles(c.T, h)
		c.logged[h.Name] += int64(len(c.log(h)))
	}
	ctx, cancel := context.WithTimeout(c.Context(), 5*settleTime)
	defer cancel()
	asked, stop := context.WithCancel(ctx) // for what is asked of hosts that may not answer
	c.generate(ctx, asked, s)
	operations := 2 + c.ops.IntN(2)
	if c.lying {
		operations *= 2
	}
	for range operations {
		c.operate(ctx, asked)
		c.disturb(ctx)
		if c.ops.IntN(2) == 0 {
			c.settle(ctx)
		}
	}
	c.tell("the disturbances end")
	c.await(ctx, c.loaded)
	stop()
	c.asking.Wait()
	if c.lying {
		c.checkSigns(ctx, c.settle(ctx))
		c.repair(ctx)
	}
	c.checkSigns(ctx, c.settle(ctx))
	c.checkBlame()
	c.Logf("seed %d: %d steps, %v", s, len(c.told), time.Since(c.begun).Round(time.Millisecond))
	if *seed != 0 {
		c.Log(strings.Join(c.told, "\n"))
	}
}

// generate declares the run's key on three hosts, in the place of the last run's, and
// waits for its birth: a roster that changes an unborn key is refused.
func (c *chaos) generate(ctx, asked context.Context, s uint64) {
	hosts := slices.Clone(c.f.Hosts)
	c.ops.Shuffle(len(hosts), func(i, j int) { hosts[i], hosts[j] = hosts[j], hosts[i] })
	c.key, c.holders, c.quorum = fmt.Sprintf("key%d", c.version), hosts[:3], 2
	c.f.Keys = c.f.Key(c.key, "ed25519", c.quorum)
	c.tell("seed %d: key %s", s, c.key)
	if s%3 == 0 { // as many in each thirty runs: what liars say is counted
		c.liar, c.lying, c.lost = c.holders[c.ops.IntN(3)], true, true // a quorum of two bears one fault
		c.restart(ctx, c.liar, fmt.Sprintf("LIES=%d", s))
		c.tell("%s lies", c.liar.Name)
	}
	c.roster(asked, nil)
	c.disturb(ctx)
	c.await(ctx, c.loaded)
	c.await(ctx, func(ctx context.Context) string {
		why := c.unborn(ctx)
		if !c.stuck.IsZero() && !c.again && time.Since(c.stuck) > patience {
			c.anew(ctx, asked)
		}
		return why
	})
	c.tell("born")
}

// unborn says why the key is not born.
func (c *chaos) unborn(ctx context.Context) string {
	stuck, why := false, ""
	for _, h := range c.honest(c.holders) {
		k, err := h.Client().GetKey(ctx, c.key)
		if err == nil && len(k.PublicKey) > 0 {
			c.public = k.PublicKey
			return ""
		}
		why = fmt.Sprintf("key is not born: %s: %s (%v)", k.GetCondition(), k.GetDetail(), err)
		stuck = stuck || strings.Contains(why, "raise its `incarnation`")
	}
	if !stuck {
		c.stuck = time.Time{}
	} else if c.stuck.IsZero() {
		c.stuck = time.Now()
	}
	return why
}

// patience is for how long a birth has to be stuck before the security team acts.
const patience = 3 * time.Second

// anew does what hosts say that are stuck: it makes the key anew, without the host that lies.
func (c *chaos) anew(ctx, asked context.Context) {
	if !c.lying {
		c.fail("the birth is stuck, and nobody lied")
	}
	c.tell("the birth is stuck")
	c.again = true
	c.holders = append(c.honest(c.holders), c.away()...)
	c.roster(asked, map[string]string{"incarnation": "2"})
	c.await(ctx, c.loaded)
}

// settle waits until nothing is left to do, as far as the hosts that are honest can do it,
// and returns those that sign then.
func (c *chaos) settle(ctx context.Context) (signers []*testenv.Host) {
	if !c.lying {
		c.await(ctx, c.unsettled)
		if c.vain && c.leftovers(ctx) != "" {
			_, err := c.holders[0].Client().Refresh(ctx, c.key)
			c.must(err)
		}
		c.await(ctx, func(ctx context.Context) string { return cmp.Or(c.unsettled(ctx), c.leftovers(ctx)) })
		c.tell("settled")
		return c.holders
	}
	c.await(ctx, func(ctx context.Context) (why string) { signers, why = c.split(ctx); return why })
	c.tell("the honest hosts agree")
	return signers
}

// restart gives a host another environment.
func (c *chaos) restart(ctx context.Context, h *testenv.Host, env ...string) {
	h.Kill()
	h.Env = env
	c.must(h.Start(ctx))
}

// lieLogged is how an agent logs a lie.
var lieLogged = regexp.MustCompile(`msg=lie .*kind=(\w+) is="?([^"\n]+?)"? about=`)

// repair has the liar be honest again.
func (c *chaos) repair(ctx context.Context) {
	told := map[string]int{}
	for _, m := range lieLogged.FindAllSubmatch(c.log(c.liar), -1) {
		told[string(m[1])+" "+string(m[2])]++
	}
	c.tell("%s is honest, after these lies: %v", c.liar.Name, told)
	c.lies.add(told)
	c.restart(ctx, c.liar)
	c.lying = false
}

// operate is one act of the security team: refresh, recovery or another set of hosts.
func (c *chaos) operate(ctx, asked context.Context) {
	public, err := x509.ParsePKIXPublicKey(c.public)
	c.must(err)
	pinned := map[string]string{"public_key": fmt.Sprintf("%q", hex.EncodeToString(public.(ed25519.PublicKey))), "generate": ""}
	switch draw := c.ops.IntN(8); {
	case draw < 3:
		h := c.holders[c.ops.IntN(len(c.holders))]
		c.tell("refresh on %s", h.Name)
		c.vain = true
		c.ask(h, func(client *api.Client) { _, _ = client.Refresh(asked, c.key) })
	case draw < 4 && !c.lost:
		c.lost = true
		h := c.holders[c.ops.IntN(len(c.holders))]
		c.tell("new board for %s", h.Name)
		c.must(h.Replace(ctx))
		c.shares[h.Name] = 0
		c.roster(asked, pinned)
		c.must(h.Start(ctx))
	default:
		c.reshape()
		c.roster(asked, pinned)
	}
}

// reshape draws other holders and another quorum. One host more than the quorum stays,
// always: else a lost share is a lost key.
func (c *chaos) reshape() {
	away := c.away()
	c.holders = slices.Clone(c.holders)
	i := c.ops.IntN(len(c.holders))
	switch draw := c.ops.IntN(3); {
	case len(away) > 0 && draw == 0:
		c.holders[i] = away[0]
	case len(away) > 0:
		c.holders, c.quorum = append(c.holders, away[0]), 2+c.ops.IntN(2)
	case draw == 0:
		c.quorum = 5 - c.quorum
	default:
		c.holders, c.quorum = slices.Delete(c.holders, i, i+1), 2
	}
}

// away are the hosts that may come to hold the key, but not one that was left out of its
// second incarnation: it may hold the first.
func (c *chaos) away() []*testenv.Host {
	return slices.DeleteFunc(slices.Clone(c.f.Hosts), func(h *testenv.Host) bool {
		return slices.Contains(c.holders, h) || c.again && h == c.liar
	})
}

func (c *chaos) names() (names []string) {
	for _, h := range c.holders {
		names = append(names, h.Name)
	}
	return names
}

// roster writes a new roster and has the hosts load it, as far as they answer.
func (c *chaos) roster(asked context.Context, values map[string]string) {
	lines := map[string]string{"hosts": `["` + strings.Join(c.names(), `", "`) + `"]`, "quorum": fmt.Sprint(c.quorum)}
	for field, value := range values {
		lines[field] = value
	}
	c.must(c.f.SetKey(c.key, lines))
	c.version++
	c.entries[uint64(c.version)] = slices.Clone(c.holders)
	c.tell("roster %d: %d of %q", c.version, c.quorum, c.names())
	entry := fmt.Sprint(c.quorum, slices.Sorted(slices.Values(c.names())))
	c.vain = c.vain || c.seen[entry]
	c.seen[entry] = true
	c.must(c.f.WriteRoster(c.version))
	for _, h := range c.f.Hosts {
		switch {
		case c.ops.IntN(5) == 0:
			c.tell("%s does not get the roster yet", h.Name)
		case h.Running():
			c.ask(h, func(client *api.Client) { _, _ = client.LoadRoster(asked) })
		}
	}
}

// ask asks a host something that may not come back.
func (c *chaos) ask(h *testenv.Host, what func(*api.Client)) {
	client := h.Client()
	c.asking.Go(func() { what(client) })
}

// event is a moment of a disturbance.
type event struct {
	at time.Duration
	do func()
}

// disturb lets up to three disturbances run, which may overlap, to their ends.
func (c *chaos) disturb(ctx context.Context) {
	var events []event
	hosts := slices.Clone(c.f.Hosts)
	c.trouble.Shuffle(len(hosts), func(i, j int) { hosts[i], hosts[j] = hosts[j], hosts[i] })
	parted := false
	for _, h := range hosts[:c.trouble.IntN(4)] {
		begin := time.Duration(c.trouble.ExpFloat64() * float64(100*time.Millisecond)) // an epoch takes about as long
		most := time.Second
		if c.trouble.IntN(30) == 0 {
			most = 9 * time.Second // longer than hosts bear silence
		}
		end := begin + time.Duration(c.trouble.Int64N(int64(most)))
		kind := c.trouble.IntN(4)
		if kind == 3 && parted { // one at a time
			kind = 0
		}
		parted = parted || kind == 3
		start, stop := c.disturbance(ctx, h, kind)
		events = append(events, event{begin, start}, event{end, stop})
	}
	slices.SortStableFunc(events, func(a, b event) int { return int(a.at - b.at) })
	from := time.Now()
	for _, e := range events {
		<-time.After(time.Until(from.Add(e.at))) // the experiment, not a wait for something
		e.do()
	}
}

// disturbance returns how one of a kind begins and ends.
func (c *chaos) disturbance(ctx context.Context, h *testenv.Host, kind int) (begin, end func()) {
	again := func() { c.tell("%s starts", h.Name); c.must(h.Start(ctx)) }
	switch {
	case kind == 1:
		return func() { c.tell("%s is paused", h.Name); c.must(syscall.Kill(h.Process().Pid(), syscall.SIGSTOP)) },
			func() { c.tell("%s goes on", h.Name); c.must(syscall.Kill(h.Process().Pid(), syscall.SIGCONT)) }
	case kind == 2 && h.TPM != nil:
		return func() { c.tell("power cut at %s", h.Name); h.TPM.Kill(); h.Kill() },
			func() { c.must(h.TPM.Restart(ctx)); h.Tap.Connect(h.TPM); again() }
	case kind == 3:
		island := map[string]bool{h.Name: true}
		if other := c.f.Hosts[c.trouble.IntN(len(c.f.Hosts))]; c.trouble.IntN(2) == 0 {
			island[other.Name] = true
		}
		return func() {
			c.tell("partition: %v", island)
			c.network.Cut(func(a, b string) bool { return island[a] != island[b] })
		}, func() { c.tell("partition ends"); c.network.Cut(nil) }
	}
	return func() { c.tell("%s is killed", h.Name); h.Kill() }, again
}

// await waits until check has nothing to say.
func (c *chaos) await(ctx context.Context, check func(context.Context) string) {
	c.Helper()
	ctx, cancel := context.WithTimeout(ctx, settleTime)
	defer cancel()
	for last := ""; ; {
		why := check(ctx)
		if why == "" {
			return
		}
		if ctx.Err() == nil {
			last = why
		}
		select {
		case <-ctx.Done():
			c.fail("not settled: %s", last)
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// loaded says which host does not take up the last roster.
func (c *chaos) loaded(ctx context.Context) string {
	for _, h := range c.f.Hosts {
		if !h.Running() {
			c.fail("%s does not run", h.Name)
		}
		if r, err := h.Client().LoadRoster(ctx); err != nil || r.Version != uint64(c.version) {
			return fmt.Sprintf("%s has not loaded roster %d: %v", h.Name, c.version, err)
		}
	}
	return ""
}

// unsettled says what is not as it is to be at the end: one epoch, ready on the holders.
// It leaves what is to be erased to leftovers.
func (c *chaos) unsettled(ctx context.Context) string {
	if why := c.loaded(ctx); why != "" {
		return why
	}
	var one *apipb.Key
	for _, h := range c.f.Hosts {
		if !slices.Contains(c.holders, h) {
			continue
		}
		k, err := h.Client().GetKey(ctx, c.key)
		if err != nil || k.Condition != "ready" || k.Next != "" || len(k.Live) != len(c.holders) {
			return fmt.Sprintf("%s is %s: %s; live %q; next: %s (%v)", h.Name, k.GetCondition(), k.GetDetail(), k.GetLive(), k.GetNext(), err)
		}
		if !bytes.Equal(k.PublicKey, c.public) {
			c.fail("%s has another public key: %x, not %x", h.Name, k.PublicKey, c.public)
		}
		if one == nil {
			one = k
		}
		if !bytes.Equal(k.Certificate, one.Certificate) {
			return fmt.Sprintf("%s is at epoch %d.%d, others at %d.%d", h.Name, k.EpochRoster, k.EpochAttempt, one.EpochRoster, one.EpochAttempt)
		}
	}
	return ""
}

// leftovers says which host has not one share, if it is a holder, and else none and
// nothing to do with the key.
func (c *chaos) leftovers(ctx context.Context) string {
	for _, h := range c.f.Hosts {
		want := c.shares[h.Name]
		if slices.Contains(c.holders, h) {
			want++
		} else if k, err := h.Client().GetKey(ctx, c.key); err == nil || reason(err) != "UNKNOWN_KEY" {
			return fmt.Sprintf("%s has not left: %s: %s (%v)", h.Name, k.GetCondition(), k.GetDetail(), err)
		}
		if got := shareFiles(c.T, h); got != want && !(c.again && h == c.liar) { // which may keep the first incarnation's
			return fmt.Sprintf("%s has %d share files, not %d", h.Name, got, want)
		}
	}
	return ""
}

// honest are those of hosts that say the truth.
func (c *chaos) honest(hosts []*testenv.Host) []*testenv.Host {
	return slices.DeleteFunc(slices.Clone(hosts), func(h *testenv.Host) bool { return c.lying && h == c.liar })
}

// split says what honest hosts do not agree on while another lies: those that hold the
// highest epoch that any of them signs with all have it, and each other's word. It returns those of them that
// are to hold the key.
func (c *chaos) split(ctx context.Context) (signers []*testenv.Host, why string) {
	if why := c.loaded(ctx); why != "" {
		return nil, why
	}
	highest := &apipb.Key{}
	keys := map[*testenv.Host]*apipb.Key{}
	for _, h := range c.honest(c.f.Hosts) {
		k, err := h.Client().GetKey(ctx, c.key)
		if err != nil && reason(err) != "UNKNOWN_KEY" {
			return nil, err.Error()
		}
		keys[h] = k
		if k.GetEpochRoster() > highest.EpochRoster || k.GetEpochRoster() == highest.EpochRoster && k.GetEpochAttempt() > highest.EpochAttempt {
			highest = k
		}
	}
	if len(highest.Certificate) == 0 {
		return nil, "no honest host signs"
	}
	if !bytes.Equal(highest.PublicKey, c.public) {
		c.fail("another public key: %x, not %x", highest.PublicKey, c.public)
	}
	holders := c.honest(c.entries[highest.EpochRoster])
	for _, h := range holders {
		if k := keys[h]; !bytes.Equal(k.GetCertificate(), highest.Certificate) {
			return nil, fmt.Sprintf("%s is at epoch %d.%d (%s: %s), another host at %d.%d", h.Name,
				k.GetEpochRoster(), k.GetEpochAttempt(), k.GetCondition(), k.GetDetail(), highest.EpochRoster, highest.EpochAttempt)
		}
		for _, other := range holders {
			if !slices.Contains(keys[h].Live, other.Name) {
				return nil, fmt.Sprintf("%s does not count on %s: %s", h.Name, other.Name, keys[h].Detail)
			}
		}
		if slices.Contains(c.holders, h) {
			signers = append(signers, h)
		}
	}
	return signers, ""
}

// checkSigns wants good signatures through each of hosts. Of the attempts at each, at most
// the first fails, and it is due to the liar.
func (c *chaos) checkSigns(ctx context.Context, hosts []*testenv.Host) {
	for i := range 3 * len(hosts) {
		h := hosts[i%len(hosts)]
		message, before := fmt.Appendf(nil, "message %d, through %s", i, h.Name), len(c.log(h))
		r, err := h.Client().Sign(ctx, c.key, message)
		c.must(err)
		if !bytes.Equal(r.PublicKey, c.public) {
			c.fail("%s signs for another public key", h.Name)
		}
		c.must(verifyScheme("ed25519", r, message))
		for n, failed := range attemptFailed.FindAllSubmatch(c.log(h)[before:], -1) {
			if n > 0 || !c.lying || string(failed[1]) != c.liar.Name {
				c.fail("attempt %d of a signature through %s: %s", n+1, h.Name, failed[0])
			}
		}
	}
}

// attemptFailed is how an agent logs an attempt at a signature that failed, and which host
// it blames.
var attemptFailed = regexp.MustCompile(`msg="signing session failed".* error=(?:"host \\"(\w+)\\")?.*`)

// checkBlame wants no proof that an honest host cheated.
func (c *chaos) checkBlame() {
	for _, h := range c.f.Hosts {
		for _, m := range proven.FindAllSubmatch(c.log(h), -1) {
			if c.liar == nil || string(m[1]) != c.liar.Name {
				c.fail("%s: %s", h.Name, m[0])
			}
			c.lies.add(map[string]int{"dealing proven": 1})
		}
	}
}

// proven is how an agent logs that a dealer cheated.
var proven = regexp.MustCompile(`.*this is proven.* dealer=(\w+)`)
