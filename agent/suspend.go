package agent

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"
	"unicode"
	"unicode/utf8"

	"connectrpc.com/connect"

	"conseal/agent/api/apipb"
	"conseal/agent/peer/peerpb"
	"conseal/agent/vault"
	"conseal/protocol"
)

const (
	// enterTime is how long a suspension waits for the hardware before it says that it
	// did without.
	enterTime = 5 * time.Second
	// maxReason bounds the text with a suspension, in bytes.
	maxReason = 200
	// maxSeconds is the end of the year 9999: later times cannot be written down.
	maxSeconds = 253402300799
	// everyKey names all keys in the audit log.
	everyKey = "*"
)

// suspensions is with which keys this host signs nothing. What is here is in force at
// once; the marker and the vault's manifest have it so that it lasts. All three are
// brought to agree, and where they do not, each of them suspends.
type suspensions struct {
	// mu is held for reading while anything that signs is let go, and for writing while
	// what is suspended changes: when that has returned, all that came before has left.
	mu     sync.RWMutex
	all    *suspension
	keys   map[string]*suspension // by name: a name is suspended in every incarnation
	serial uint64                 // rises with each suspension

	writing sync.Mutex // held while the marker is written
	marker  *marker
	late    string // why the marker does not say what is in force; guarded by writing

	entering  sync.Mutex  // held while the manifest is written; before writing
	unentered atomic.Bool // the manifest may not say what is in force
	retry     retry       // of the manifest; owned by reconcile
}

// suspension is one entry.
type suspension struct {
	since  time.Time
	reason string
	note   string // where it was not found, for people
	read   bool   // from the marker, at the start
}

// of finds since when a key is suspended here. It waits for who has mu.
func (s *suspensions) of(name string) (suspension, bool) {
	if s == nil {
		return suspension{}, false
	}
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.find(name)
}

// find is [suspensions.of]; mu is held.
func (s *suspensions) find(name string) (suspension, bool) {
	one, all := s.keys[name], s.all
	switch {
	case all != nil && (one == nil || !one.since.Before(all.since)):
		return *all, true
	case one != nil:
		return *one, true
	}
	return suspension{}, false
}

// whole runs change while nothing that signs is let go.
func (s *suspensions) whole(change func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	change()
}

// stamp is a time as people read it.
func stamp(t time.Time) string { return t.UTC().Format(time.RFC3339) }

func (s suspension) String() string {
	text := "since " + stamp(s.since) + " on this host"
	if s.reason != "" {
		text += ": " + s.reason
	}
	return text
}

// describe is the detail of a key's condition, which would be another without.
func (s suspension) describe(name, detail string) string {
	text := s.String()
	if s.note != "" {
		text += "; " + s.note
	}
	switch name {
	case "ready":
	case "suspended":
		text += "; and " + detail
	default:
		text += "; besides, it is " + name + ": " + detail
	}
	return text
}

// inForce is what marker and manifest are to say, but what leave names.
func (s *suspensions) inForce(leave func(name string) bool) (vault.Suspensions, *mark, map[string]mark) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	manifest, marked := vault.Suspensions{Keys: map[string]time.Time{}}, map[string]mark{}
	var all *mark
	if s.all != nil && !leave(everyKey) {
		manifest.All, all = s.all.since, &mark{s.all.since.Unix(), s.all.reason}
	}
	for name, one := range s.keys {
		if !leave(name) {
			manifest.Keys[name], marked[name] = one.since, mark{one.since.Unix(), one.reason}
		}
	}
	return manifest, all, marked
}

func nobody(string) bool { return false }

// mark has the marker say what is in force, but what leave names; writing is held.
func (s *suspensions) mark(leave func(string) bool) error {
	_, all, keys := s.inForce(leave)
	err := s.marker.write(all, keys)
	if s.late = ""; err != nil {
		s.late = err.Error()
	}
	return err
}

// readMarker takes up what the marker says. If nobody knows what it said, all is
// suspended.
func (a *Agent) readMarker() error {
	s := &a.suspended
	m, err := openMarker(a.config.State)
	if m == nil {
		return err
	}
	if s.marker = m; errors.Is(err, errMarker) {
		a.log.Error("every key is suspended", "error", err)
		s.all = &suspension{since: time.Now().Round(time.Second), note: "all are, as the marker is not readable: " + err.Error(), read: true}
		return nil
	}
	if all := m.now.All; all != nil {
		s.all = &suspension{since: time.Unix(all.Since, 0), reason: all.Reason, read: true}
	}
	for name, one := range m.now.Keys {
		s.keys[name] = &suspension{since: time.Unix(one.Since, 0), reason: one.Reason, read: true}
	}
	return nil
}

const (
	onlyMarker   = "only the marker had it, not the manifest: the hardware was away when it was suspended, or a resume did not finish"
	onlyManifest = "only the manifest had it, not the marker: the marker was lost, or is an older one"
)

// adoptSuspensions takes up what the manifest says beside the marker.
func (a *Agent) adoptSuspensions(v *vault.Vault) {
	s, has := &a.suspended, v.Suspensions()
	s.whole(func() {
		s.all = agreed(s.all, has.All)
		for name := range s.keys {
			s.keys[name] = agreed(s.keys[name], has.Keys[name])
		}
		for name, since := range has.Keys {
			if s.keys[name] == nil {
				s.keys[name] = agreed(nil, since)
			}
		}
		s.serial++
		s.unentered.Store(true)
		for name, one := range s.keys {
			a.log.Warn("key is suspended on this host", "key", name, "since", stamp(one.since), "reason", one.reason, "note", one.note)
		}
		if s.all != nil {
			a.log.Warn("every key is suspended on this host", "since", stamp(s.all.since), "reason", s.all.reason, "note", s.all.note)
		}
	})
	for _, k := range a.keys() {
		if _, ok := s.of(k.id.Name); ok {
			a.stopSigning(k)
		}
	}
	s.writing.Lock()
	defer s.writing.Unlock()
	if err := s.mark(nobody); err != nil {
		a.log.Error("the marker does not say which keys are suspended", "error", err)
	}
}

// agreed is a suspension that memory or the manifest has, or both. The earlier time counts.
func agreed(have *suspension, since time.Time) *suspension {
	switch {
	case since.IsZero() && have != nil && have.read && have.note == "":
		have.note = onlyMarker
	case since.IsZero():
	case have == nil:
		have = &suspension{since: since, note: onlyManifest}
	case since.Before(have.since):
		have.since = since
	}
	return have
}

// settleSuspensions brings marker and manifest to what is in force.
func (a *Agent) settleSuspensions(ctx context.Context) {
	s := &a.suspended
	if s.writing.TryLock() {
		if s.late != "" {
			_ = s.mark(nobody) // tried again at the next look
		}
		s.writing.Unlock()
	}
	if !s.unentered.Load() || a.vault.Load() == nil || time.Now().Before(s.retry.after) {
		return
	}
	if err := a.enterSuspensions(ctx); err != nil {
		s.retry.fail(err)
		a.log.Error("the manifest does not say which keys are suspended", "error", err)
		return
	}
	s.retry = retry{}
}

// enterSuspensions has the manifest say what is in force.
func (a *Agent) enterSuspensions(ctx context.Context) error {
	v := a.vault.Load()
	if v == nil {
		return errors.New(a.vaultProblem())
	}
	a.suspended.entering.Lock()
	defer a.suspended.entering.Unlock()
	a.suspended.unentered.Store(false) // before the look at what is in force
	want, _, _ := a.suspended.inForce(nobody)
	err := v.Suspend(ctx, want)
	if err != nil {
		a.suspended.unentered.Store(true)
	}
	return err
}

// unlessHalted runs do, unless this host signs nothing with the key; while do runs that
// does not change. do must not wait for another lock of the agent.
func (a *Agent) unlessHalted(k *key, do func() error) error {
	a.suspended.mu.RLock()
	defer a.suspended.mu.RUnlock()
	if state := k.entry().State; state == "suspended" {
		return a.refuse(reasonSuspended, "the key is suspended by its roster")
	} else if state != "active" {
		return a.refuse(reasonRefused, "the key is %s by its roster", state)
	}
	if s, ok := a.suspended.find(k.id.Name); ok {
		return a.refuse(reasonSuspended, "the key is suspended %s", s)
	}
	return do()
}

// halted says why this host signs nothing with the key; nil if it does.
func (a *Agent) halted(k *key) error {
	return a.unlessHalted(k, func() error { return nil })
}

// haltsHere tells whether a session failed because this host signs nothing with its key.
func (a *Agent) haltsHere(err error) bool {
	var party *partyError
	return errors.As(err, &party) && party.host == a.self && (party.reason == reasonSuspended || party.reason == reasonRefused)
}

// refuseHalted is halted for a caller.
func (a *Agent) refuseHalted(k *key) error {
	if a.halted(k) == nil {
		return nil
	}
	if state := k.entry().State; state != "active" {
		return &apiError{connect.CodeFailedPrecondition, "KEY_" + strings.ToUpper(state), fmt.Sprintf("key %q is %s by the roster", k.id.Name, state),
			"ask the security team"}
	}
	s, ok := a.suspended.of(k.id.Name)
	if !ok {
		return nil // resumed meanwhile
	}
	return &apiError{connect.CodeFailedPrecondition, "KEY_SUSPENDED", fmt.Sprintf("key %q is suspended %s", k.id.Name, s),
		"ask on another host of the key, or have this host's administrator lift it with `conseal resume`"}
}

// enter enters a use of a key in the audit log, unless the key is halted.
func (a *Agent) enter(k *key, e entry) (logged func(context.Context) error, err error) {
	err = a.unlessHalted(k, func() error {
		logged = a.ledger.Append(e)
		return nil
	})
	return logged, err
}

// gate sends what a session says that signs or presigns, unless the key is halted.
func (a *Agent) gate(k *key) sender {
	return func(to protocol.HostID, f *peerpb.Frame) error {
		if f.GetStep() == nil {
			return a.net.Send(to, f)
		}
		return a.unlessHalted(k, func() error { return a.net.Send(to, f) })
	}
}

// begins enters a session that signs or presigns, so that it ends when the key is halted.
// It comes before the first look whether the key is.
func (k *key) begins(ctx context.Context) (context.Context, func()) {
	ctx, cancel := context.WithCancelCause(ctx)
	k.mu.Lock()
	defer k.mu.Unlock()
	k.signing[ctx] = cancel
	return ctx, func() {
		k.mu.Lock()
		defer k.mu.Unlock()
		delete(k.signing, ctx)
		cancel(nil)
	}
}

// stopSigning ends what is under way with a key that is halted, and discards its
// presignatures.
func (a *Agent) stopSigning(k *key) {
	cause := a.halted(k)
	if cause == nil {
		return // resumed meanwhile
	}
	k.mu.Lock()
	for _, cancel := range k.signing {
		cancel(cause)
	}
	k.mu.Unlock()
	if act := k.active.Load(); act != nil {
		act.stock.empty()
	}
}

// heardSuspended notes since when another host signs nothing with the key; 0: it does.
// Its presignatures are gone there.
func (k *key) heardSuspended(from protocol.HostID, since uint64) {
	k.mu.Lock()
	defer k.mu.Unlock()
	_, before := k.suspended[from]
	switch {
	case since == 0 && before:
		delete(k.suspended, from)
		k.tellNews()
	case since != 0:
		k.suspended[from] = time.Unix(int64(since), 0)
		if act := k.active.Load(); act != nil && !before {
			act.stock.drop(from)
		}
	}
}

// splitSuspended says which of hosts are suspended and since when, and returns the rest.
func (k *key) splitSuspended(hosts []protocol.HostID) (text string, rest []protocol.HostID) {
	k.mu.Lock()
	defer k.mu.Unlock()
	var suspended []string
	for _, h := range hosts {
		if since, ok := k.suspended[h]; ok {
			suspended = append(suspended, fmt.Sprintf("%q (suspended there since %s)", h, stamp(since)))
		} else {
			rest = append(rest, h)
		}
	}
	return strings.Join(suspended, ", "), rest
}

// about lists the keys that a request to suspend or resume is about.
func (a *Agent) about(name string, all bool) (out []*key) {
	for _, k := range a.keys() {
		if a.mine(k) && (all || k.id.Name == name) {
			out = append(out, k)
		}
	}
	return out
}

// checkAbout refuses a request that names no key, or two things.
func checkAbout(name string, all bool) error {
	if all == (name != "") || name == everyKey {
		return &apiError{connect.CodeInvalidArgument, "BAD_REQUEST", fmt.Sprintf("key %q and all = %t: one of both is wanted", name, all), "name one key, or all"}
	}
	return nil
}

// Suspend has this host sign nothing more with a key, or with any. It holds when it
// returns, whatever the disk and the hardware say.
func (s adminAPI) Suspend(ctx context.Context, r *apipb.SuspendRequest) (*apipb.SuspensionResponse, error) {
	a := s.a
	if err := checkAbout(r.Key, r.All); err != nil {
		return nil, err
	}
	if len(r.Reason) > maxReason || !utf8.ValidString(r.Reason) || strings.ContainsFunc(r.Reason, func(c rune) bool { return !unicode.IsPrint(c) }) {
		return nil, &apiError{connect.CodeInvalidArgument, "BAD_REASON", fmt.Sprintf("a reason of %d bytes, or not printable", len(r.Reason)),
			fmt.Sprintf("give at most %d bytes on one line; nothing was suspended", maxReason)}
	}
	keys := a.about(r.Key, r.All)
	if len(keys) == 0 && !r.All {
		return nil, unknownKey(r.Key)
	}
	name := r.Key
	if r.All {
		name = everyKey
	}
	logged := a.suspendNow(ctx, name, r.Reason)
	for _, k := range keys {
		a.stopSigning(k)
		a.say(k, "ready", "")
		a.announce(k)
	}
	a.log.Warn("suspended", "key", name, "reason", r.Reason)
	warning, err := a.lasting(ctx, logged)
	a.nudge()
	return a.suspensionOf(keys, warning), err
}

func unknownKey(name string) error {
	return &apiError{connect.CodeNotFound, "UNKNOWN_KEY", fmt.Sprintf("the roster gives this host no key %q", name), "`conseal keys` lists the keys of this host"}
}

// suspendNow is the moment from which nothing is signed. A suspension that is there
// already keeps its time and reason.
func (a *Agent) suspendNow(ctx context.Context, name, reason string) (logged func(context.Context) error) {
	s, fresh := &a.suspended, &suspension{since: time.Now().Truncate(time.Second), reason: reason}
	s.whole(func() {
		s.serial++
		s.unentered.Store(true)
		switch {
		case name == everyKey && s.all == nil:
			s.all = fresh
		case name != everyKey && s.keys[name] == nil:
			s.keys[name] = fresh
		}
		logged = a.ledger.Append(entry{Event: "suspend", Key: name, Asker: string(a.self), Caller: callerOf(ctx), Reason: reason})
	})
	return logged
}

func callerOf(ctx context.Context) *caller {
	if who, ok := ctx.Value(callerKey{}).(caller); ok {
		return &who
	}
	return nil
}

// lasting has a suspension outlast the agent. The warning is what failed; the error, that
// it does not last.
func (a *Agent) lasting(ctx context.Context, logged func(context.Context) error) (warning string, err error) {
	s := &a.suspended
	s.writing.Lock()
	marked := s.mark(nobody)
	s.writing.Unlock()
	entered := make(chan error, 1)
	a.tasks.Go(func() { entered <- a.enterSuspensions(a.ctx) })
	var inManifest error
	select {
	case inManifest = <-entered:
	case <-time.After(enterTime):
		inManifest = errors.New("the hardware has not answered yet")
	case <-ctx.Done():
		inManifest = context.Cause(ctx)
	}
	var problems []string
	if marked != nil {
		problems = append(problems, marked.Error())
	}
	if inManifest != nil {
		problems = append(problems, fmt.Sprintf("the vault's manifest does not have it yet: %v; the agent tries again", inManifest))
	}
	if marked != nil && inManifest != nil {
		return "", &apiError{connect.CodeUnavailable, "NOT_LASTING", "it is suspended until the agent ends, no longer: " + strings.Join(problems, "; "),
			"mend what it says, and suspend again; to be sure now, stop the agent and keep it stopped"}
	}
	if err := logged(ctx); err != nil {
		problems = append(problems, err.Error())
	}
	return strings.Join(problems, "; "), nil
}

func (a *Agent) suspensionOf(keys []*key, warning string) *apipb.SuspensionResponse {
	out := &apipb.SuspensionResponse{Warning: warning}
	for _, k := range keys {
		out.Keys = append(out.Keys, k.describe(a.self))
	}
	return out
}

// Resume lifts what Suspend did: first in the manifest, for which the hardware is
// needed, then in the marker, then in force. Whatever fails on the way, the key stays
// suspended, and all three are brought to say so.
func (s adminAPI) Resume(ctx context.Context, r *apipb.ResumeRequest) (*apipb.SuspensionResponse, error) {
	a := s.a
	if err := checkAbout(r.Key, r.All); err != nil {
		return nil, err
	}
	name, leave := r.Key, func(name string) bool { return name == r.Key }
	if r.All {
		name, leave = everyKey, func(string) bool { return true }
	}
	if err := a.resume(ctx, name, leave); err != nil {
		a.suspended.unentered.Store(true)
		a.nudge()
		return nil, err
	}
	a.log.Warn("resumed", "key", name)
	keys := a.about(r.Key, r.All)
	for _, k := range keys {
		if k.active.Load() != nil {
			condition, detail := a.ready(k)
			a.say(k, condition, detail)
		}
		a.announce(k)
	}
	return a.suspensionOf(keys, ""), nil
}

func (a *Agent) resume(ctx context.Context, name string, leave func(string) bool) error {
	s := &a.suspended
	s.entering.Lock()
	defer s.entering.Unlock()
	serial, err := a.mayResume(name)
	if err != nil {
		return err
	}
	v := a.vault.Load()
	if v == nil {
		return &apiError{connect.CodeUnavailable, "HARDWARE", "nothing was resumed: " + a.vaultProblem(), "the hardware keeps that it is suspended, and has to open first"}
	}
	want, _, _ := s.inForce(leave)
	if err := v.Suspend(ctx, want); err != nil {
		return &apiError{connect.CodeUnavailable, "HARDWARE", "nothing was resumed: " + err.Error(), "mend what it says, and resume again"}
	}
	if err := a.resumeNow(ctx, name, leave, serial); err != nil {
		return &apiError{connect.CodeUnavailable, "NOT_RESUMED", "nothing was resumed: " + err.Error(), "mend what it says, and resume again"}
	}
	return nil
}

// mayResume refuses to lift what is not there. serial tells whether something is
// suspended from then on.
func (a *Agent) mayResume(name string) (serial uint64, err error) {
	s := &a.suspended
	s.mu.RLock()
	defer s.mu.RUnlock()
	switch {
	case name == everyKey && s.all == nil && len(s.keys) == 0:
		return 0, &apiError{connect.CodeFailedPrecondition, "NOT_SUSPENDED", "nothing is suspended on this host", "what the roster suspends, a newer roster resumes"}
	case name != everyKey && s.all != nil:
		return 0, &apiError{connect.CodeFailedPrecondition, "ALL_SUSPENDED", fmt.Sprintf("every key is suspended %s", s.all),
			"`conseal resume --all` lifts every suspension on this host; suspend again then what is to stay so"}
	case name != everyKey && s.keys[name] == nil && !slices.ContainsFunc(a.keys(), func(k *key) bool { return k.id.Name == name }):
		return 0, unknownKey(name)
	case name != everyKey && s.keys[name] == nil:
		return 0, &apiError{connect.CodeFailedPrecondition, "NOT_SUSPENDED", fmt.Sprintf("key %q is not suspended on this host", name),
			"what the roster suspends, a newer roster resumes"}
	}
	return s.serial, nil
}

// resumeNow lifts what the manifest does not have any more. Its line in the audit log is
// on disk before marker and memory let go.
func (a *Agent) resumeNow(ctx context.Context, name string, leave func(string) bool, serial uint64) error {
	s := &a.suspended
	s.writing.Lock()
	defer s.writing.Unlock()
	line := entry{Event: "resume", Key: name, Asker: string(a.self), Caller: callerOf(ctx)}
	logged, err := s.ifSame(serial, func() func(context.Context) error { return a.ledger.Append(line) })
	if err == nil {
		err = logged(ctx)
	}
	if err != nil {
		return err
	}
	if err = s.mark(leave); err == nil {
		_, err = s.ifSame(serial, func() func(context.Context) error {
			s.lift(leave)
			return nil
		})
	}
	if err != nil {
		line.Event, line.Reason = "suspend", "it was not resumed"
		return errors.Join(err, s.mark(nobody), a.ledger.Append(line)(ctx))
	}
	return nil
}

// ifSame runs do unless something was suspended since serial.
func (s *suspensions) ifSame(serial uint64, do func() func(context.Context) error) (logged func(context.Context) error, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.serial != serial {
		return nil, errors.New("a key was suspended meanwhile")
	}
	return do(), nil
}

// lift takes what leave names out of force; mu is held.
func (s *suspensions) lift(leave func(string) bool) {
	if leave(everyKey) {
		s.all = nil
	}
	maps.DeleteFunc(s.keys, func(name string, _ *suspension) bool { return leave(name) })
}
