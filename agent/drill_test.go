package agent

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"conseal/agent/api/apipb"
	"conseal/agent/vault"
)

// drill asks a host, and checks that it says something of key "first".
func (l *lab) drill(host string) *apipb.DrilledKey {
	l.t.Helper()
	r, err := adminAPI{l.hosts[host].agent}.Drill(l.ctx, &apipb.DrillRequest{})
	ok(l.t, err)
	if len(r.Keys) != 1 || r.Keys[0].Name != "first" {
		l.t.Fatalf("%s drills %v", host, r.Keys)
	}
	return r.Keys[0]
}

// losses is what a drill says, short.
func losses(k *apipb.DrilledKey) string {
	out := []string{fmt.Sprintf("%d live, %d shares, spare %d and %d", k.Live, k.Shares, k.SpareLive, k.SpareShares)}
	for _, h := range k.Hosts {
		out = append(out, h.Name+": "+h.Text)
	}
	return strings.Join(out, "\n")
}

// untilDrill waits until a host says this of the key.
func (l *lab) untilDrill(host string, want ...string) *apipb.DrilledKey {
	l.t.Helper()
	var k *apipb.DrilledKey
	defer func() {
		if l.t.Failed() && k != nil {
			l.t.Logf("it says:\n%s", losses(k))
		}
	}()
	l.until("the drill says "+strings.Join(want, "\n"), func() bool {
		k = l.drill(host)
		return losses(k) == strings.Join(want, "\n")
	})
	if k.Problem != "" {
		l.t.Errorf("a problem: %s", k.Problem)
	}
	return k
}

// TestDrill says what comes of each loss, and then the losses come.
func TestDrill(t *testing.T) {
	l := born(t)
	n := l.epochOf("alpha")
	for name := range l.hosts {
		l.untilDrill(name, "3 live, 3 shares, spare 1 and 1",
			"alpha: signs, and may lose no more", "beta: signs, and may lose no more", "gamma: signs, and may lose no more")
	}

	ok(t, l.hosts["gamma"].stop())
	k := l.untilDrill("alpha", "2 live, 3 shares, spare 0 and 1",
		"alpha: cannot sign until gamma is back, but is not lost", "beta: cannot sign until gamma is back, but is not lost", "gamma: signs, and may lose no more")
	if !strings.Contains(k.Hosts[2].State, "not connected") {
		t.Errorf("gamma: %s", k.Hosts[2].State)
	}

	ok(t, l.hosts["beta"].stop()) // what the drill said comes true
	l.untilDrill("alpha", "1 live, 3 shares, spare -1 and 1",
		"alpha: cannot sign until 2 of beta, gamma are back, but is not lost", "beta: cannot sign until gamma is back, but is not lost", "gamma: cannot sign until beta is back, but is not lost")
	if _, err := l.sign("alpha", []byte("alone")); err == nil {
		t.Error("alpha signed alone")
	}

	// Gamma comes back with new hardware and an empty vault: it says that it has no share.
	gamma := l.hosts["gamma"]
	gamma.protector = &hardware{keys: map[string][]byte{}}
	ok(t, os.RemoveAll(VaultFolder(gamma.config)))
	ok(t, vault.Create(l.ctx, VaultFolder(gamma.config), "gamma", gamma.protector))
	l.start("beta", "gamma")
	k = l.untilDrill("alpha", "2 live, 2 shares, spare 0 and 0",
		"alpha: LOST: 1 of the 2 shares that it takes would be left", "beta: LOST: 1 of the 2 shares that it takes would be left", "gamma: signs, and may lose no more")
	if !strings.Contains(k.Hosts[2].State, "no share") {
		t.Errorf("gamma: %s", k.Hosts[2].State)
	}
	if now := l.epochOf("alpha"); now != n {
		t.Errorf("the drills changed the epoch from %s to %s", n, now)
	}
}

// TestDrillTwoOfTwo: no host of such a key may be lost.
func TestDrillTwoOfTwo(t *testing.T) {
	l := born(t)
	n := l.epochOf("alpha")
	l.write(2, "alpha", "beta")
	l.deliver("alpha", "beta", "gamma")
	l.untilEpoch(n, "alpha", "beta")
	l.untilDrill("alpha", "2 live, 2 shares, spare 0 and 0",
		"alpha: LOST: 1 of the 2 shares that it takes would be left", "beta: LOST: 1 of the 2 shares that it takes would be left")
	l.until("gamma leaves it to the others", func() bool {
		r, err := adminAPI{l.hosts["gamma"].agent}.Drill(l.ctx, &apipb.DrillRequest{})
		ok(t, err)
		return len(r.Keys) == 0 && slices.Equal(r.Elsewhere, []string{"first"})
	})
}

// TestDrillRecoveryHost: a host of role "recovery" has a share and is not there to sign.
func TestDrillRecoveryHost(t *testing.T) {
	l := born(t)
	next := *l.roster
	next.Version, next.Hosts = next.Version+1, slices.Clone(next.Hosts)
	for i := range next.Hosts {
		if next.Hosts[i].Name == "gamma" {
			next.Hosts[i].Role = "recovery"
		}
	}
	l.roster = &next
	l.deliver("alpha")
	l.untilDrill("alpha", "2 live, 3 shares, spare 0 and 1",
		"alpha: cannot sign until gamma is back, but is not lost", "beta: cannot sign until gamma is back, but is not lost", "gamma: signs, and may lose no more")
}

// TestDrillReadsTheFile: a host whose share is opened in memory and damaged on the disk
// does not count it.
func TestDrillReadsTheFile(t *testing.T) {
	l := born(t)
	l.untilDrill("alpha", "3 live, 3 shares, spare 1 and 1",
		"alpha: signs, and may lose no more", "beta: signs, and may lose no more", "gamma: signs, and may lose no more")
	files, err := filepath.Glob(filepath.Join(VaultFolder(l.hosts["alpha"].config), "shares", "*"))
	ok(t, err)
	if len(files) != 1 {
		t.Fatalf("shares: %q", files)
	}
	ok(t, os.Truncate(files[0], 100))
	k := l.untilDrill("alpha", "2 live, 2 shares, spare 0 and 0",
		"alpha: signs, and may lose no more", "beta: LOST: 1 of the 2 shares that it takes would be left", "gamma: LOST: 1 of the 2 shares that it takes would be left")
	if !strings.Contains(k.Hosts[0].State, "damaged") {
		t.Errorf("alpha: %s", k.Hosts[0].State)
	}
}

// TestDrillCannotTell: a host whose vault does not open says so, and not that all is well.
func TestDrillCannotTell(t *testing.T) {
	l := born(t)
	ok(t, l.hosts["gamma"].stop())
	gamma := l.hosts["gamma"]
	gamma.protector = &hardware{keys: map[string][]byte{}} // another machine's
	l.start("gamma")
	l.until("gamma cannot tell", func() bool { return strings.Contains(l.drill("gamma").Problem, "vault is not open") })
	l.until("alpha is told so", func() bool { return strings.Contains(l.drill("alpha").Hosts[2].State, "cannot open its vault") })
	l.untilDrill("alpha", "2 live, 3 shares, spare 0 and 1",
		"alpha: cannot sign until gamma is back, but is not lost", "beta: cannot sign until gamma is back, but is not lost", "gamma: signs, and may lose no more")
}
