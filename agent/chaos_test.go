package agent_test

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/x509"
	"encoding/hex"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
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
// cuts, partitions and at most one lost share a run. When they end, the fleet gets by
// itself to one epoch of the same key. Each run has a key and a seed of its own, which
// -seed runs alone.
func TestChaos(t *testing.T) {
	first, runs := *seed, 1
	if first == 0 {
		if first, runs = rand.Uint64(), 10; *soak {
			runs = 500
		}
	}
	const perFleet = 50 // an old fleet's vaults are full of dead keys
	for at := 0; at < runs && !t.Failed(); at += perFleet {
		t.Run(fmt.Sprint(at), func(t *testing.T) {
			c := newChaos(t)
			for i := at; i < min(runs, at+perFleet); i++ {
				c.run(first + uint64(i))
			}
		})
	}
}

// newChaos starts a fleet without keys.
func newChaos(t *testing.T) *chaos {
	bin, err := testenv.Build(t.Context())
	must(t, err)
	f, err := testenv.NewFleet(t.Context(), bin, "tpm", "tpm", "hsm", "tpm")
	must(t, err)
	t.Cleanup(func() {
		if err := f.Close(); err != nil {
			t.Error(err)
		}
	})
	c := &chaos{T: t, f: f, version: 1, shares: map[string]int{}}
	c.network, err = f.Network()
	must(t, err)
	f.Limits = "[limits]\nkeygen_deadline = \"30s\"\nsign_deadline = \"10s\"\nerasures_per_hour = 60000\n"
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
	version int            // of the roster
	shares  map[string]int // share files of earlier runs, by host

	// Of the run:
	ops, trouble *rand.Rand // what the security team does, and what befalls the hosts
	key          string
	holders      []*testenv.Host
	quorum       int
	public       []byte // once born
	lost         bool   // the one share that may be
	told         []string
	begun        time.Time
	asking       sync.WaitGroup
}

func (c *chaos) tell(format string, args ...any) {
	c.told = append(c.told, fmt.Sprintf("%6dms ", time.Since(c.begun).Milliseconds())+fmt.Sprintf(format, args...))
}

// fail ends the test with what happened.
func (c *chaos) fail(format string, args ...any) {
	c.Helper()
	for _, h := range c.f.Hosts {
		c.Logf("log of %s:\n%s", h.Name, h.LogTail())
	}
	c.Fatalf("%s\n%s", strings.Join(c.told, "\n"), fmt.Sprintf(format, args...))
}

func (c *chaos) must(err error) {
	c.Helper()
	if err != nil {
		c.fail("%v", err)
	}
}

// run gives the fleet a new key, changes it under disturbances, and wants it whole.
func (c *chaos) run(s uint64) {
	c.begun, c.told, c.public, c.lost = time.Now(), nil, nil, false
	c.ops, c.trouble = rand.New(rand.NewPCG(s, 2)), rand.New(rand.NewPCG(s, 3))
	for _, h := range c.f.Hosts {
		c.shares[h.Name] = shareFiles(c.T, h)
	}
	ctx, cancel := context.WithTimeout(c.Context(), 5*settleTime)
	defer cancel()
	asked, stop := context.WithCancel(ctx) // for what is asked of hosts that may not answer
	c.generate(ctx, asked, s)
	for range 2 + c.ops.IntN(2) {
		c.operate(ctx, asked)
		c.disturb(ctx)
		if c.ops.IntN(2) == 0 {
			c.await(ctx, c.unsettled)
			c.tell("settled")
		}
	}
	c.tell("the disturbances end")
	c.await(ctx, c.loaded)
	stop()
	c.asking.Wait()
	c.await(ctx, c.unsettled)
	c.checkSigns(ctx)
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
	c.roster(asked, nil)
	c.disturb(ctx)
	c.await(ctx, c.loaded)
	c.await(ctx, func(ctx context.Context) string {
		k, err := c.holders[0].Client().GetKey(ctx, c.key)
		if err != nil || len(k.PublicKey) == 0 {
			return fmt.Sprintf("key is not born: %s: %s (%v)", k.GetCondition(), k.GetDetail(), err)
		}
		c.public = k.PublicKey
		return ""
	})
	c.tell("born")
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
	away := slices.DeleteFunc(slices.Clone(c.f.Hosts), func(h *testenv.Host) bool { return slices.Contains(c.holders, h) })
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
	c.tell("roster %d: %d of %q", c.version, c.quorum, c.names())
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
			most = 15 * time.Second // longer than hosts bear silence
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

// unsettled says what is not as it is to be at the end: one epoch, ready on the holders,
// one share on each, none elsewhere.
func (c *chaos) unsettled(ctx context.Context) string {
	if why := c.loaded(ctx); why != "" {
		return why
	}
	var one *apipb.Key
	for _, h := range c.f.Hosts {
		k, err := h.Client().GetKey(ctx, c.key)
		want := c.shares[h.Name]
		if !slices.Contains(c.holders, h) {
			if err == nil || reason(err) != "UNKNOWN_KEY" {
				return fmt.Sprintf("%s has not left: %s: %s (%v)", h.Name, k.GetCondition(), k.GetDetail(), err)
			}
		} else {
			want++
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
		if got := shareFiles(c.T, h); got != want {
			return fmt.Sprintf("%s has %d share files, not %d; next: %s", h.Name, got, want, k.GetNext())
		}
	}
	return ""
}

// checkSigns wants a good signature through every holder.
func (c *chaos) checkSigns(ctx context.Context) {
	for _, h := range c.holders {
		message := []byte("signed through " + h.Name)
		r, err := h.Client().Sign(ctx, c.key, message)
		c.must(err)
		if !bytes.Equal(r.PublicKey, c.public) {
			c.fail("%s signs for another public key", h.Name)
		}
		c.must(verifyScheme("ed25519", r, message))
	}
}
