package main

import (
	"strings"
	"testing"

	"conseal/agent/api/apipb"
)

// TestDrillVerdict: a drill that says nothing, or cannot tell, is no good news.
func TestDrillVerdict(t *testing.T) {
	key := func(name, problem string, losses ...string) *apipb.DrilledKey {
		k := &apipb.DrilledKey{Name: name, Problem: problem}
		for _, loss := range losses {
			k.Hosts = append(k.Hosts, &apipb.DrilledHost{Name: "host-" + loss, Loss: loss})
		}
		return k
	}
	for _, c := range []struct {
		name string
		keys []*apipb.DrilledKey
		want int
		says string
	}{
		{"all is well", []*apipb.DrilledKey{key("a", "", "signs", "waits"), key("b", "", "signs")}, 0, ""},
		{"one would be lost", []*apipb.DrilledKey{key("a", "", "signs"), key("b", "", "signs", "lost")}, exitAtRisk, "b with host-lost"},
		{"one cannot be told of", []*apipb.DrilledKey{key("a", "", "signs"), key("b", "no vault")}, exitNotNow, "cannot tell of b"},
		{"that, and one would be lost", []*apipb.DrilledKey{key("a", "no vault"), key("b", "", "lost")}, exitAtRisk, "b with host-lost"},
		{"none", nil, exitNotNow, "no key"},
	} {
		err := drillVerdict(&apipb.DrillResponse{Keys: c.keys})
		if got := exitCode(err); got != c.want || err != nil && !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: exit code %d, want %d: %v", c.name, got, c.want, err)
		}
	}
}

func TestPrintDrill(t *testing.T) {
	var out strings.Builder
	r := &apipb.DrillResponse{Host: "alpha", RosterVersion: 3, Elsewhere: []string{"other"}, Keys: []*apipb.DrilledKey{
		{Name: "release", EpochRoster: 3, EpochAttempt: 1, Quorum: 2, Live: 2, Shares: 3, SpareLive: 0, SpareShares: 1, Notes: []string{"a note"},
			Hosts: []*apipb.DrilledHost{{Name: "alpha", State: "has its share", Text: "cannot sign until gamma is back, but is not lost"},
				{Name: "gamma", State: "not connected; it had its share", Text: "signs, and may lose no more"}}},
		{Name: "firmware", Problem: "no vault"},
	}}
	if err := printDrill(&out, r); err != nil {
		t.Fatal(err)
	}
	want := `as host alpha sees it, by roster 3 and what the hosts said last on the connections that are up

key release, epoch 3.1: quorum 2 of 2 hosts; 3 have a share, 2 could sign now
  0 may be lost before it cannot sign, 1 shares before it is lost for good
  a note
  HOST   NOW                              IF IT IS LOST, THE KEY
  alpha  has its share                    cannot sign until gamma is back, but is not lost
  gamma  not connected; it had its share  signs, and may lose no more

key firmware: CANNOT TELL: no vault

not told of, as other hosts have them: other
`
	if out.String() != want {
		t.Errorf("got:\n%s\nwant:\n%s", out.String(), want)
	}
}
