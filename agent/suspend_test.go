package agent

import (
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"conseal/agent/api/apipb"
	"conseal/agent/peer/peerpb"
	"conseal/protocol"
)

// admin is the admin socket of a host.
func (l *lab) admin(host string) adminAPI { return adminAPI{l.hosts[host].agent} }

func (l *lab) suspend(host string) *apipb.SuspensionResponse {
	l.t.Helper()
	r, err := l.admin(host).Suspend(l.ctx, &apipb.SuspendRequest{Key: "first", Reason: "an alarm"})
	ok(l.t, err)
	return r
}

func (l *lab) resume(host string) {
	l.t.Helper()
	_, err := l.admin(host).Resume(l.ctx, &apipb.ResumeRequest{Key: "first"})
	ok(l.t, err)
}

// untilLive waits until a host counts on those.
func (l *lab) untilLive(host string, live ...string) {
	l.t.Helper()
	l.until(fmt.Sprintf("%s counts on %q", host, live), func() bool {
		return slices.Equal(names(l.key(host).live(l.hosts[host].agent.self)), live)
	})
}

// wantReason asks a host for a signature in vain.
func (l *lab) wantReason(host, reason string, words ...string) {
	l.t.Helper()
	_, err := l.sign(host, []byte("in vain"))
	l.wantRefused(err, reason, words...)
}

func (l *lab) wantRefused(err error, reason string, words ...string) {
	l.t.Helper()
	var refused *apiError
	if !errors.As(err, &refused) || refused.reason != reason {
		l.t.Fatalf("got %v, want %s", err, reason)
	}
	for _, w := range words {
		if !strings.Contains(refused.text, w) {
			l.t.Errorf("%q does not say %q", refused.text, w)
		}
	}
}

func (l *lab) restart(host string) {
	l.t.Helper()
	ok(l.t, l.hosts[host].stop())
	l.start(host)
}

// TestSuspend takes a suspension through all that it must outlast.
func TestSuspend(t *testing.T) {
	l := born(t)
	r := l.suspend("beta")
	if k := r.Keys[0]; r.Warning != "" || k.Condition != "suspended" || !slices.Equal(k.Live, []string{"alpha", "gamma"}) {
		t.Errorf("beta answers %v", r)
	}
	since, _ := l.hosts["beta"].agent.suspended.of("first")
	check := func() {
		t.Helper()
		l.untilSays("beta", "suspended", stamp(since.since)+" on this host: an alarm")
		l.wantReason("beta", "KEY_SUSPENDED", stamp(since.since), "an alarm")
		l.untilLive("alpha", "alpha", "gamma")
		signers, err := l.sign("alpha", []byte("m"))
		ok(t, err)
		if !slices.Equal(signers, []string{"alpha", "gamma"}) {
			t.Errorf("%q signed", signers)
		}
	}
	check()
	l.restart("beta")
	l.untilActive("beta")
	check()
	n := l.epochOf("alpha")
	l.refresh("alpha")
	n = l.untilEpoch(n, "alpha", "beta", "gamma") // with beta's part
	check()
	l.refresh("beta")
	l.untilEpoch(n, "alpha", "beta", "gamma")
	check()
	l.write(2, "alpha", "beta", "gamma")
	l.deliver("alpha", "beta", "gamma")
	check()

	l.untilLive("gamma", "alpha", "gamma")
	gamma := l.suspend("gamma")
	if live := gamma.Keys[0].Live; !slices.Equal(live, []string{"alpha"}) {
		t.Errorf("gamma says that %q could sign", live)
	}
	l.untilLive("alpha", "alpha")
	l.wantReason("alpha", "NO_QUORUM", `"beta" (suspended there since `+stamp(since.since), `"gamma" (suspended there since `)
	l.untilSays("alpha", "waiting", `"beta" (suspended there since `)
	l.resume("beta")
	l.untilLive("alpha", "alpha", "beta")
	for _, host := range []string{"alpha", "beta"} {
		_, err := l.sign(host, []byte("again"))
		ok(t, err)
	}
	l.wantReason("gamma", "KEY_SUSPENDED")
	l.untilSays("beta", "ready")
	l.restart("beta")
	l.untilActive("beta")
	l.untilSays("beta", "ready")
}

// TestSuspendAll is of keys to come too, and of no state of the roster.
func TestSuspendAll(t *testing.T) {
	l := born(t)
	_, err := l.admin("alpha").Suspend(l.ctx, &apipb.SuspendRequest{All: true})
	ok(t, err)
	next := *l.roster
	next.Version++
	second := next.Keys[0]
	second.Name = "second"
	next.Keys = append(slices.Clone(next.Keys), second)
	l.roster = &next
	l.deliver("alpha", "beta", "gamma")
	other := func() *key { return l.hosts["alpha"].agent.key("second") }
	l.until("the second key is born", func() bool { return other().active.Load() != nil })
	message := []byte("m")
	try := func() error {
		_, err := l.hosts["alpha"].agent.sign(l.ctx, &request{k: other(), act: other().active.Load(), message: message, digest: sha256.Sum256(message)})
		return err
	}
	l.wantRefused(try(), "KEY_SUSPENDED")
	l.restart("alpha")
	l.untilActive("alpha")
	l.until("the second key is active", func() bool { return other().active.Load() != nil })
	l.wantRefused(try(), "KEY_SUSPENDED")
	l.wantReason("alpha", "KEY_SUSPENDED")
	_, err = l.admin("alpha").Resume(l.ctx, &apipb.ResumeRequest{Key: "first"})
	l.wantRefused(err, "ALL_SUSPENDED")
	_, err = l.admin("alpha").Resume(l.ctx, &apipb.ResumeRequest{All: true})
	ok(t, err)
	l.until("a second host is there", func() bool { return len(other().live("alpha")) > 1 })
	ok(t, try())
}

// TestSuspendByRoster at run time, both ways.
func TestSuspendByRoster(t *testing.T) {
	l := born(t)
	state := func(state string) {
		next := *l.roster
		next.Version++
		next.Keys = slices.Clone(next.Keys)
		next.Keys[0].State = state
		l.roster = &next
	}
	r := l.betray("gamma")
	r.claim("alpha")
	b := r.signing("beta", []byte("m"), "beta", "gamma")
	r.open("beta", b, []byte("m"))
	r.hears("a commitment", "beta", stepOf(b.ID(), 1))
	made := counted{new(atomic.Int64)}
	ok(t, l.key("beta").active.Load().stock.add(&presigned{presignature: made, id: protocol.SessionID{1}, owner: "beta", signers: []protocol.HostID{"alpha", "beta"}}))
	state("suspended")
	l.deliver("beta")
	if end := r.hears("the end", "beta", endOf(b.ID())).GetEnd(); end.Reason != reasonSuspended {
		t.Errorf("beta left with %v", end)
	}
	if made.ended.Load() != 1 {
		t.Error("a presignature stays")
	}
	l.untilSays("beta", "suspended", "by the roster")
	l.wantReason("beta", "KEY_SUSPENDED", "by the roster")
	l.wantReason("alpha", "NO_QUORUM", "suspended by its roster") // which has not heard of it
	_, err := l.admin("beta").Resume(l.ctx, &apipb.ResumeRequest{Key: "first"})
	l.wantRefused(err, "NOT_SUSPENDED")
	l.suspend("beta")
	l.untilSays("beta", "suspended", "on this host", "by the roster")
	l.resume("beta")
	l.wantReason("beta", "KEY_SUSPENDED", "by the roster")
	state("active")
	l.deliver("beta", "alpha")
	l.untilLive("alpha", "alpha", "beta", "gamma")
	l.prefer("alpha", "gamma")
	_, err = l.sign("alpha", []byte("m"))
	ok(t, err)
}

// TestSuspendEndsSessions whose share has not left: those that wait for the hardware, and
// those that wait for another host.
func TestSuspendEndsSessions(t *testing.T) {
	l := labOpen(t, "ed25519", "each")
	for _, h := range l.hosts {
		h.config.Limits.SignDeadline = patience // for slow machines
	}
	l.birth()
	asked, open := make(chan struct{}), make(chan struct{})
	beta := l.hosts["beta"].protector
	beta.mu.Lock()
	beta.onOpen = func(id string) error {
		if strings.HasPrefix(id, "share/own/") {
			asked <- struct{}{}
			<-open
		}
		return nil
	}
	beta.mu.Unlock()
	failed := make(chan error, 1)
	alpha, k := l.hosts["alpha"].agent, l.key("alpha")
	message := []byte("m")
	ask := func(a *Agent, k *key) {
		_, _, err := a.attempt(l.ctx, &request{k: k, act: k.active.Load(), message: message, digest: sha256.Sum256(message)}, []protocol.HostID{"alpha", "beta"}, nil)
		failed <- err
	}
	go ask(alpha, k)
	<-asked
	l.suspend("beta")
	close(open)
	var party *partyError
	if err := <-failed; !errors.As(err, &party) || party.host != "beta" || party.reason != reasonSuspended {
		t.Errorf("the asking host has %v", err)
	}
	l.resume("beta")

	// The asking host is suspended itself, while it waits.
	open = make(chan struct{})
	go ask(alpha, k)
	<-asked
	l.suspend("alpha")
	if err := <-failed; !errors.As(err, &party) || party.host != "alpha" || party.reason != reasonSuspended {
		t.Errorf("the suspended asking host has %v", err)
	}
	close(open)
}

// TestSuspendDiscardsPresignatures on this host, and on others those that need it.
func TestSuspendDiscardsPresignatures(t *testing.T) {
	l := born(t)
	made := []counted{{new(atomic.Int64)}, {new(atomic.Int64)}, {new(atomic.Int64)}}
	for i, host := range []string{"beta", "alpha", "alpha"} {
		ok(t, l.key(host).active.Load().stock.add(&presigned{presignature: made[i], id: protocol.SessionID{byte(i)}, owner: "alpha",
			signers: [][]protocol.HostID{{"alpha", "beta"}, {"alpha", "beta"}, {"alpha", "gamma"}}[i]}))
	}
	l.suspend("beta")
	if made[0].ended.Load() != 1 {
		t.Error("beta keeps its part")
	}
	l.until("alpha discards what needs beta", func() bool { return made[1].ended.Load() == 1 })
	if made[2].ended.Load() != 0 {
		t.Error("alpha discarded what does not need beta")
	}
	if err := l.hosts["beta"].agent.halted(l.key("beta")); err == nil {
		t.Error("beta would make another")
	}
}

// usesOf reads a host's audit log: uses of key "first" between a suspension and its end, and
// others.
func usesOf(t *testing.T, state string) (suspended, free, flips int) {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(state, "audit.log"))
	ok(t, err)
	off := false
	for line := range bytes.Lines(b) {
		var e entry
		ok(t, json.Unmarshal(line, &e))
		switch {
		case e.Event == "suspend":
			off = true
			flips++
		case e.Event == "resume":
			off = false
		case off:
			suspended++
		default:
			free++
		}
	}
	return suspended, free, flips
}

// TestNothingIsSignedWhileSuspended: gamma asks beta for one share after the other, alpha
// and beta have callers, and beta is suspended and resumed all the while. On the wire
// to gamma no step of a session stands behind the word that beta is suspended, and
// in beta's audit log no use.
func TestNothingIsSignedWhileSuspended(t *testing.T) {
	const flips = 25
	l := born(t)
	r := l.betray("gamma")
	r.claim("alpha")
	message := []byte("what gamma may ask for")
	decoy := r.signing("beta", message, "beta", "gamma")
	r.open("beta", decoy, message)
	points := r.hears("a commitment", "beta", stepOf(decoy.ID(), 1)).GetStep().Body
	var off, resuming, over atomic.Bool
	var shares, late atomic.Int64
	ask := func() {
		b := r.signing("beta", message, "beta", "gamma")
		_ = r.net.Send("beta", &peerpb.Frame{Body: &peerpb.Frame_Open{Open: &peerpb.Open{Binding: wireBinding(b), Message: message}}})
	}
	ended := map[string]bool{}
	next := func(session []byte) {
		if !ended[string(session)] && !over.Load() {
			ended[string(session)] = true
			ask()
		}
	}
	r.react(func(from protocol.HostID, f *peerpb.Frame) {
		if from != "beta" {
			return
		}
		switch step := f.GetStep(); {
		case f.GetEnd() != nil:
			next(f.GetEnd().Session)
		case f.GetKey() != nil:
			off.Store(f.GetKey().Suspended != 0)
		case step.GetRound() > 0 && off.Load() && !resuming.Load():
			late.Add(1)
		case step.GetRound() == 1:
			list := &peerpb.Step{Session: step.Session, Round: 2, Body: slices.Concat(step.Body, points)}
			_ = r.net.Send("beta", &peerpb.Frame{Body: &peerpb.Frame_Step{Step: list}})
		case step.GetRound() == 3:
			shares.Add(1)
			next(step.Session)
		}
	})
	var callers sync.WaitGroup
	for i := range 4 {
		ask()
		callers.Go(func() {
			for !over.Load() {
				_, _ = l.sign([]string{"alpha", "beta"}[i%2], message)
			}
		})
	}
	for range flips {
		before := shares.Load()
		l.until("beta signs", func() bool { return shares.Load() > before })
		l.suspend("beta")
		l.until("gamma has heard it", off.Load)
		l.wantReason("beta", "KEY_SUSPENDED")
		r.settled("beta") // what gamma asked before has been answered
		resuming.Store(true)
		l.resume("beta")
		l.until("gamma has heard it", func() bool { return !off.Load() })
		resuming.Store(false)
	}
	l.suspend("beta")
	over.Store(true)
	callers.Wait()
	if n := late.Load(); n > 0 {
		t.Errorf("%d steps left beta while it was suspended", n)
	}
	suspended, free, n := usesOf(t, l.hosts["beta"].config.State)
	if suspended > 0 || free < flips || n != flips+1 {
		t.Errorf("the audit log has %d uses while suspended, %d others, %d suspensions", suspended, free, n)
	}
}

// TestSuspendWithoutHardware: it holds at once, by the marker; the manifest has it as soon
// as the hardware takes it. To resume takes the hardware.
func TestSuspendWithoutHardware(t *testing.T) {
	l := born(t)
	beta := l.hosts["beta"]
	away := func(err error) {
		beta.protector.mu.Lock()
		defer beta.protector.mu.Unlock()
		beta.protector.away = err
	}
	inManifest := func() bool { return !beta.agent.vault.Load().Suspensions().Keys["first"].IsZero() }
	away(errors.New("the token is away"))
	if r := l.suspend("beta"); !strings.Contains(r.Warning, "the token is away") {
		t.Errorf("the warning is %q", r.Warning)
	}
	l.wantReason("beta", "KEY_SUSPENDED")
	if inManifest() {
		t.Fatal("the manifest has it: the test shows nothing")
	}
	l.restart("beta")
	l.untilActive("beta")
	l.untilSays("beta", "suspended", "an alarm", onlyMarker)
	l.wantReason("beta", "KEY_SUSPENDED")
	away(nil)
	l.until("the manifest has it", inManifest)
	away(errors.New("the token is away"))
	_, err := l.admin("beta").Resume(l.ctx, &apipb.ResumeRequest{Key: "first"})
	l.wantRefused(err, "HARDWARE", "the token is away")
	l.wantReason("beta", "KEY_SUSPENDED")
	away(nil)
	l.restart("beta")
	l.untilActive("beta")
	l.untilSays("beta", "suspended", "an alarm")

	// The marker is lost, or put back as it was before.
	ok(t, beta.stop())
	ok(t, os.Remove(filepath.Join(beta.config.State, "suspended")))
	l.start("beta")
	l.untilActive("beta")
	l.untilSays("beta", "suspended", onlyManifest)
	l.wantReason("beta", "KEY_SUSPENDED")
	l.restart("beta") // the marker has it again
	l.untilActive("beta")
	l.untilSays("beta", "suspended", "on this host")
	if s, _ := beta.agent.suspended.of("first"); s.note != "" {
		t.Errorf("they do not agree yet: %s", s.note)
	}
	l.resume("beta")
	if inManifest() {
		t.Error("the manifest has it still")
	}

	// Neither marker nor hardware: it holds as long as the agent, and says so.
	away(errors.New("the token is away"))
	ok(t, beta.agent.suspended.marker.f.Close())
	_, err = l.admin("beta").Suspend(l.ctx, &apipb.SuspendRequest{Key: "first"})
	l.wantRefused(err, "NOT_LASTING", "the token is away", "suspended: ")
	l.wantReason("beta", "KEY_SUSPENDED")
	away(nil)
	l.until("the manifest has it", inManifest)
}

// TestSuspendAndAnOlderFolder: the folder from before the suspension does not lift it.
func TestSuspendAndAnOlderFolder(t *testing.T) {
	l := born(t)
	beta := l.hosts["beta"]
	older := filepath.Join(t.TempDir(), "older")
	ok(t, beta.stop())
	for _, socket := range []string{"a", "s"} {
		ok(t, os.Remove(filepath.Join(beta.config.State, socket)))
	}
	ok(t, os.CopyFS(older, os.DirFS(beta.config.State)))
	l.start("beta")
	l.untilActive("beta")
	l.suspend("beta")
	ok(t, beta.stop())
	ok(t, os.RemoveAll(beta.config.State))
	ok(t, os.CopyFS(beta.config.State, os.DirFS(older)))
	l.start("beta")
	l.untilSays("beta", "sealed", "older copy")
	if l.key("beta").active.Load() != nil {
		t.Error("beta has its share")
	}
}

// TestResumeAgainstSuspend: memory, marker and audit log agree, wherever in a resume somebody
// suspends.
func TestResumeAgainstSuspend(t *testing.T) {
	l := born(t)
	for range 40 {
		l.suspend("beta")
		var both sync.WaitGroup
		both.Go(func() { _, _ = l.admin("beta").Resume(l.ctx, &apipb.ResumeRequest{Key: "first"}) })
		l.suspend("beta")
		both.Wait()
		s := &l.hosts["beta"].agent.suspended
		_, inForce := s.of("first")
		s.writing.Lock()
		_, marked := s.marker.now.Keys["first"]
		s.writing.Unlock()
		last := ""
		for _, line := range ledgerLines(t, l.hosts["beta"].config.State) {
			var e entry
			ok(t, json.Unmarshal([]byte(line), &e))
			last = e.Event
		}
		if inForce != marked || inForce != (last == "suspend") {
			t.Fatalf("in force: %t, in the marker: %t, in the audit log: %s", inForce, marked, last)
		}
	}
}

func TestSuspendBadInput(t *testing.T) {
	l := born(t)
	for _, of := range []struct {
		r      *apipb.SuspendRequest
		reason string
	}{
		{&apipb.SuspendRequest{}, "BAD_REQUEST"},
		{&apipb.SuspendRequest{Key: "first", All: true}, "BAD_REQUEST"},
		{&apipb.SuspendRequest{Key: "*"}, "BAD_REQUEST"},
		{&apipb.SuspendRequest{Key: "nope"}, "UNKNOWN_KEY"},
		{&apipb.SuspendRequest{Key: "first", Reason: strings.Repeat("x", 201)}, "BAD_REASON"},
		{&apipb.SuspendRequest{Key: "first", Reason: "two\nlines"}, "BAD_REASON"},
		{&apipb.SuspendRequest{Key: "first", Reason: "\xff"}, "BAD_REASON"},
	} {
		_, err := l.admin("alpha").Suspend(l.ctx, of.r)
		l.wantRefused(err, of.reason)
	}
	for _, of := range []struct {
		r      *apipb.ResumeRequest
		reason string
	}{
		{&apipb.ResumeRequest{}, "BAD_REQUEST"},
		{&apipb.ResumeRequest{Key: "*"}, "BAD_REQUEST"},
		{&apipb.ResumeRequest{Key: "nope"}, "UNKNOWN_KEY"},
		{&apipb.ResumeRequest{Key: "first"}, "NOT_SUSPENDED"},
		{&apipb.ResumeRequest{All: true}, "NOT_SUSPENDED"},
	} {
		_, err := l.admin("alpha").Resume(l.ctx, of.r)
		l.wantRefused(err, of.reason)
	}
	if l.hosts["alpha"].agent.halted(l.key("alpha")) != nil {
		t.Error("something was suspended")
	}
	r := l.betray("gamma")
	r.says(func(s *peerpb.KeyStatus) { s.Suspended = 1 << 62 }, "alpha")
	l.untilLogged("alpha", "bad frame", "a suspension since second")
}

// TestMarker: what was written is read, whatever happens to one slot; and nothing is said
// where nobody knows.
func TestMarker(t *testing.T) {
	dir := t.TempDir()
	open := func() (*marker, error) { return openMarker(dir) }
	m, err := open()
	ok(t, err)
	path := filepath.Join(dir, "suspended")
	room := func() (int64, int64) {
		var st unix.Stat_t
		ok(t, unix.Stat(path, &st))
		return st.Size, st.Blocks
	}
	size, blocks := room()
	if blocks*512 < size {
		t.Errorf("%d blocks for %d bytes: it has no room of its own", blocks, size)
	}
	want := map[string]mark{}
	for i := range 5 {
		want[fmt.Sprint("key", i)] = mark{Since: int64(i), Reason: strings.Repeat("r", maxReason)}
		ok(t, m.write(nil, want))
		m.close()
		m, err = open()
		ok(t, err)
		if len(m.now.Keys) != i+1 || m.now.All != nil {
			t.Fatalf("read %v", m.now)
		}
	}
	if s, b := room(); s != size || b != blocks {
		t.Errorf("it took room: %d bytes, %d blocks", s, b)
	}
	ok(t, m.write(&mark{Since: 7}, nil))
	newest := int64(m.now.Sequence&1) * markerSlot
	spoil := func(at int64) {
		_, err := m.f.WriteAt([]byte{0xff}, at+int64(markerHeader)+2)
		ok(t, err)
	}
	spoil(newest) // as a write that was cut off
	m.close()
	if m, err = open(); err != nil || m.now.All != nil || len(m.now.Keys) != 5 {
		t.Errorf("with one slot: %v, %v", m.now, err)
	}
	spoil(newest ^ markerSlot)
	m.close()
	m, err = open()
	if !errors.Is(err, errMarker) || m == nil {
		t.Errorf("without a slot: %v", err)
	}
	ok(t, m.write(nil, want)) // it mends it
	ok(t, os.Truncate(path, 100))
	m.close()
	if m, err = open(); !errors.Is(err, errMarker) {
		t.Errorf("cut off: %v", err)
	}
	many := map[string]mark{}
	for i := range 20_000 {
		many[fmt.Sprintf("a-key-with-a-name-%d", i)] = mark{Since: 1 << 31}
	}
	if err := m.write(nil, many); err == nil || !strings.Contains(err.Error(), "--all") {
		t.Errorf("too many keys: %v", err)
	}
	m.close()
	ok(t, os.Remove(path))
	ok(t, os.Symlink("/dev/null", path))
	if m, err := open(); m != nil || err == nil {
		t.Error("it follows a link")
	}
	ok(t, os.Remove(path))
	ok(t, unix.Mkfifo(path, 0o600))
	if m, err := open(); m != nil || err == nil {
		t.Error("it opens a FIFO")
	}
}

// TestUnreadableMarkerSuspendsAll, until somebody resumes.
func TestUnreadableMarkerSuspendsAll(t *testing.T) {
	l := born(t)
	ok(t, l.hosts["alpha"].stop())
	ok(t, os.WriteFile(filepath.Join(l.hosts["alpha"].config.State, "suspended"), nil, 0o600))
	l.start("alpha")
	l.untilActive("alpha")
	l.untilSays("alpha", "suspended", "not readable")
	l.wantReason("alpha", "KEY_SUSPENDED")
	_, err := l.admin("alpha").Resume(l.ctx, &apipb.ResumeRequest{All: true})
	ok(t, err)
	l.restart("alpha")
	l.untilActive("alpha")
	if l.hosts["alpha"].agent.halted(l.key("alpha")) != nil {
		t.Error("alpha is suspended again")
	}
}

func FuzzDecodeMarks(f *testing.F) {
	good, err := (&marks{Sequence: 3, All: &mark{Since: 1}, Keys: map[string]mark{"first": {2, "why"}}}).encode()
	ok(f, err)
	f.Add(good)
	f.Add([]byte(markerMagic))
	f.Fuzz(func(t *testing.T, b []byte) {
		s, err := decodeMarks(b)
		if err != nil {
			return
		}
		again, err := s.encode()
		ok(t, err)
		if _, err := decodeMarks(again); err != nil {
			t.Error(err)
		}
	})
}
