package agent

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	mathrand "math/rand/v2"
	"slices"
	"strings"
	"time"

	"connectrpc.com/connect"

	"conseal/agent/api/apipb"
	"conseal/agent/peer/peerpb"
	"conseal/agent/vault"
	"conseal/internal/failpoint"
	"conseal/protocol"
)

// failedFor is how long a host that failed in a session is asked last.
const failedFor = 30 * time.Second

// changeTime is how long a request waits, in all, for hosts to take up the epoch that
// others have, or longer: for a tenth of its deadline.
const changeTime = 3 * time.Second

// request is one request for a signature, at the host that was asked.
type request struct {
	k       *key
	act     *active
	message []byte // empty if the caller brought its digest
	digest  [32]byte
	caller  caller
}

// Operations of sessions that sign.
const (
	opSign       = "sign"        // a message, which each signer hashes itself
	opSignDigest = "sign-digest" // what the caller says is a message's digest
	// The same with a presignature; the session's nonce is the presignature's id.
	opOnline       = "sign-online"
	opOnlineDigest = "sign-digest-online"
)

func signs(operation string) bool {
	return operation == opSign || operation == opSignDigest || online(operation)
}
func online(operation string) bool { return operation == opOnline || operation == opOnlineDigest }
func onDigest(operation string) bool {
	return operation == opSignDigest || operation == opOnlineDigest
}

func (r *request) operation(with *presigned) string {
	switch digest := len(r.message) == 0; {
	case digest && with != nil:
		return opOnlineDigest
	case digest:
		return opSignDigest
	case with != nil:
		return opOnline
	}
	return opSign
}

// attemptTime is how long one attempt at a signature may take.
func (a *Agent) attemptTime(k *key) time.Duration {
	return a.config.Limits.SignDeadline / time.Duration(k.scheme.traits().attempts)
}

// sign has a message signed by a quorum, trying one quorum after another until
// the deadline. The caller's right to ask was checked.
func (a *Agent) sign(ctx context.Context, r *request) (*apipb.SignResponse, error) {
	ctx, cancel := context.WithTimeout(ctx, a.config.Limits.SignDeadline)
	defer cancel()
	changing, stop := context.WithTimeout(ctx, max(changeTime, a.config.Limits.SignDeadline/10))
	defer stop()
	var failures []error
	excluded := map[protocol.HostID]bool{}
	for {
		if err := a.refuseHalted(r.k); err != nil {
			return nil, err
		}
		news := r.k.newsNow()
		if act := r.k.active.Load(); act != nil {
			r.act = act
		}
		var signers []protocol.HostID
		with := a.takePresigned(r, excluded)
		if with != nil {
			signers = with.signers
		} else if signers = a.pick(r.k, r.act, excluded); signers == nil {
			if a.changing(r.k, excluded) && wait(changing, news) {
				continue
			}
			return nil, a.noQuorum(r.k, failures)
		}
		session, sig, err := a.attempt(ctx, r, signers, with)
		if err == nil {
			return &apipb.SignResponse{
				Signature: sig.signature, Fixed: sig.fixed, RecoveryId: sig.recovery,
				PublicKey: r.act.output.spki, Signers: names(signers), Session: session.String(),
			}, nil
		}
		if with != nil && lacksPresignature(err) && ctx.Err() == nil {
			continue // there are fewer now
		}
		if a.haltsHere(err) && ctx.Err() == nil {
			continue // which says so
		}
		if isBehind(err) && ctx.Err() == nil && (r.act != r.k.active.Load() || wait(changing, news)) {
			continue // with the epoch that was taken up meanwhile
		}
		failures = append(failures, err)
		a.log.Warn("signing session failed", "key", r.k.id.Name, "session", session.String(), "signers", signers, "error", err)
		if ctx.Err() != nil || errors.Is(err, errLedger) {
			return nil, a.signFailed(ctx, r.k, failures)
		}
		if !r.k.blame(err, a.self, excluded) {
			return nil, a.signFailed(ctx, r.k, failures)
		}
	}
}

// takePresigned takes a presignature out of the stock, if there is one with live
// signers and the request may use it.
func (a *Agent) takePresigned(r *request, excluded map[protocol.HostID]bool) *presigned {
	if len(r.message) == 0 && !r.k.entry().PrehashedPresignatures {
		return nil
	}
	live := r.k.live(a.self)
	return r.act.stock.any(a.self, func(h protocol.HostID) bool { return slices.Contains(live, h) && !excluded[h] })
}

// changing tells whether too few hosts have this host's epoch because some are about to
// take up another: those that are connected and say that they have one.
func (a *Agent) changing(k *key, excluded map[protocol.HostID]bool) bool {
	act := k.active.Load()
	if act == nil {
		return false
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	there := 0
	for _, h := range act.output.holders {
		_, suspended := k.suspended[h]
		if h == a.self || !suspended && !excluded[h] && k.views[h].Active {
			there++
		}
	}
	return there >= act.output.quorum
}

// newsNow is closed when this host or another takes up an epoch from now on.
func (k *key) newsNow() <-chan struct{} {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.news
}

// wait is false if ctx ends first.
func wait(ctx context.Context, news <-chan struct{}) bool {
	select {
	case <-news:
		return true
	case <-ctx.Done():
		return false
	}
}

// isBehind tells whether an attempt failed because a host has taken up a later epoch.
func isBehind(err error) bool {
	var party *partyError
	return errors.Is(err, errOver) || errors.As(err, &party) && party.reason == reasonBehind
}

// lacksPresignature tells whether an attempt failed only because a host does not have
// the presignature.
func lacksPresignature(err error) bool {
	var party *partyError
	return errors.As(err, &party) && party.reason == reasonNoPresignature
}

// blame leaves the hosts that a failed session was due to out of this request's
// next attempts, and remembers them for a while. It tells whether there was one:
// without, another attempt would fail in the same way.
func (k *key) blame(err error, self protocol.HostID, excluded map[protocol.HostID]bool) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	found := false
	for _, h := range culprits(err) {
		if h != self {
			excluded[h], found = true, true
			k.failed[h] = time.Now()
		}
	}
	return found
}

// culprits collects the hosts that an error names.
func culprits(err error) (hosts []protocol.HostID) {
	var party *partyError
	var fault *protocol.Fault
	switch joined := err.(type) { //nolint:errorlint // walks the tree itself
	case interface{ Unwrap() []error }:
		for _, e := range joined.Unwrap() {
			hosts = append(hosts, culprits(e)...)
		}
		return hosts
	}
	if errors.As(err, &fault) {
		return []protocol.HostID{fault.Host}
	}
	if errors.As(err, &party) {
		return []protocol.HostID{party.host}
	}
	return nil
}

// pick chooses a quorum among the live hosts: this one, then such as did not
// fail lately, in random order so that the work spreads. It is sorted; nil if
// too few are live.
func (a *Agent) pick(k *key, act *active, excluded map[protocol.HostID]bool) []protocol.HostID {
	live := slices.DeleteFunc(k.live(a.self), func(h protocol.HostID) bool { return excluded[h] })
	quorum := act.output.quorum
	if len(live) < quorum {
		return nil
	}
	mathrand.Shuffle(len(live), func(i, j int) { live[i], live[j] = live[j], live[i] })
	k.prefer(live, a.self)
	signers := live[:quorum]
	slices.Sort(signers)
	return signers
}

// prefer sorts hosts: first this one, then such as did not fail lately; else they stay
// in order.
func (k *key) prefer(hosts []protocol.HostID, self protocol.HostID) {
	k.mu.Lock()
	defer k.mu.Unlock()
	rank := func(h protocol.HostID) int {
		switch {
		case h == self:
			return 0
		case time.Since(k.failed[h]) > failedFor:
			return 1
		}
		return 2
	}
	slices.SortStableFunc(hosts, func(x, y protocol.HostID) int { return rank(x) - rank(y) })
}

// attempt runs one session, with fresh nonces or with a presignature that was taken
// out of the stock. The presignature is gone afterwards, whatever happens.
func (a *Agent) attempt(ctx context.Context, r *request, signers []protocol.HostID, with *presigned) (protocol.SessionID, signed, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, a.attemptTime(r.k), errors.New("the attempt took too long"))
	defer cancel()
	defer a.calm.enter()()
	var nonce [32]byte
	rand.Read(nonce[:])
	if with != nil {
		defer with.discard()
		nonce = with.id
		failpoint.Hit("sign/presignature-taken")
	}
	b := a.signBinding(r.operation(with), r.k, r.act, signers, r.digest, nonce)
	id := b.ID()
	box, err := a.sessions.open(id, a.self, signers)
	if err != nil {
		return id, signed{}, err
	}
	defer a.sessions.close(box)
	ctx, ended := r.k.begins(ctx)
	defer ended()
	logged, err := a.enter(r.k, entry{
		Event: "ask", Key: r.k.id.Name, Epoch: r.act.certificate.Subject.Number.String(), Session: id.String(),
		Asker: string(a.self), Signers: names(signers), Caller: &r.caller, SHA256: hex.EncodeToString(r.digest[:]), Size: len(r.message),
		Presignature: with.name(),
	})
	if err != nil {
		return id, signed{}, err
	}
	open := &peerpb.Frame{Body: &peerpb.Frame_Open{Open: &peerpb.Open{Binding: wireBinding(&b), Message: r.message}}}
	for _, h := range box.parties {
		if err := a.net.Send(h, open); err != nil {
			err = &partyError{host: h, text: err.Error()}
			hangUp(box, a.net.Send, err)
			return id, signed{}, err
		}
	}
	share, done, err := r.act.borrow(ctx, with) // while the others do the same
	if err != nil {
		hangUp(box, a.net.Send, err)
		return id, signed{}, err
	}
	defer done()
	if err := a.letGo(ctx, r.k, box); err != nil {
		hangUp(box, a.net.Send, err)
		return id, signed{}, err
	}
	session, err := begin(signing{id: id, self: a.self, coordinator: a.self, signers: signers, message: r.message, digest: r.digest}, share, with)
	if err != nil {
		hangUp(box, a.net.Send, err)
		return id, signed{}, err
	}
	defer session.Close()
	if err := drive(ctx, a.self, session, box, a.afterEntry(ctx, r.k, logged), nil); err != nil {
		return id, signed{}, err
	}
	var sig signed
	err = a.unlessHalted(r.k, func() (err error) {
		sig, err = session.result()
		return err
	})
	return id, sig, errors.Join(err, logged(ctx))
}

// borrow returns the share for a session of signing; none if there is a presignature.
func (act *active) borrow(ctx context.Context, with *presigned) (share shareholder, done func(), err error) {
	if with != nil {
		return nil, func() {}, nil
	}
	return act.share.borrow(ctx)
}

// begin makes the session of a signature, from a share or a presignature.
func begin(in signing, share shareholder, with *presigned) (signature, error) {
	if with != nil {
		return with.sign(in.id, in.digest)
	}
	return share.sign(in)
}

// letGo waits until every signer has joined, and lets them begin, where signers send
// to each other: a message to a host that has not joined yet would be lost.
func (a *Agent) letGo(ctx context.Context, k *key, box *inbox) error {
	if !k.scheme.traits().mesh {
		return nil
	}
	if _, err := gather(ctx, box, box.parties); err != nil {
		return err
	}
	for _, h := range box.parties {
		if err := a.net.Send(h, readyFrame(box.id)); err != nil {
			return &partyError{host: h, text: err.Error()}
		}
	}
	return nil
}

// waitGo tells the coordinator that this host has joined, and waits until all have.
// It returns what others sent meanwhile.
func (a *Agent) waitGo(ctx context.Context, k *key, coordinator protocol.HostID, box *inbox) ([]event, error) {
	if !k.scheme.traits().mesh {
		return nil, nil
	}
	if err := a.net.Send(coordinator, readyFrame(box.id)); err != nil {
		return nil, &partyError{host: coordinator, text: err.Error()}
	}
	return gather(ctx, box, []protocol.HostID{coordinator})
}

// afterEntry returns a sender that lets only commitments out (round 1) before
// the entry in the audit log is on disk.
func (a *Agent) afterEntry(ctx context.Context, k *key, logged func(context.Context) error) sender {
	send := a.gate(k)
	return func(to protocol.HostID, f *peerpb.Frame) error {
		if step := f.GetStep(); step != nil && step.Round > 1 {
			if err := logged(ctx); err != nil {
				return err
			}
		}
		return send(to, f)
	}
}

func (a *Agent) signBinding(operation string, k *key, act *active, signers []protocol.HostID, request, nonce [32]byte) protocol.Binding {
	b := k.binding(operation, act.certificate.Subject.Number, signers, nonce)
	b.Certificate, b.Quorum, b.Request, b.Entry = act.id, uint64(act.output.quorum), request, act.certificate.Subject.Entry
	return b
}

// joinSign lends this host's share to a signature that another host asks for, if
// this host's own roster and limits allow it.
func (a *Agent) joinSign(ctx context.Context, from protocol.HostID, k *key, b *protocol.Binding, message []byte, box *inbox) error {
	act := k.active.Load()
	var with *presigned
	if act != nil && online(b.Operation) {
		// First of all it leaves the stock: it is gone if anything here refuses.
		if with = act.stock.take(b.Nonce, from); with != nil {
			defer with.discard()
			failpoint.Hit("sign/presignature-taken")
		}
	}
	if err := a.maySign(from, k, act, b, message); err != nil {
		return err
	}
	if online(b.Operation) && (with == nil || !slices.Equal(with.signers, b.Parties)) {
		return &partyError{host: a.self, reason: reasonNoPresignature, text: "it does not have this presignature"}
	}
	defer a.calm.enter()()
	ctx, cancel := context.WithTimeoutCause(ctx, a.attemptTime(k), errors.New("the asking host took too long"))
	defer cancel()
	ctx, ended := k.begins(ctx)
	defer ended()
	logged, err := a.enter(k, entry{
		Event: "sign", Key: k.id.Name, Epoch: act.certificate.Subject.Number.String(), Session: box.id.String(),
		Asker: string(from), Signers: names(b.Parties), SHA256: hex.EncodeToString(b.Request[:]), Size: len(message),
		Presignature: with.name(),
	})
	if err != nil {
		return err
	}
	share, done, err := act.borrow(ctx, with)
	if err != nil {
		return err
	}
	defer done()
	session, err := begin(signing{id: box.id, self: a.self, coordinator: from, signers: b.Parties, message: message, digest: b.Request}, share, with)
	if err != nil {
		return err
	}
	defer session.Close()
	early, err := a.waitGo(ctx, k, from, box)
	if err != nil {
		return err
	}
	return drive(ctx, a.self, session, box, a.afterEntry(ctx, k, logged), early)
}

// maySign is where a host decides by itself whether its share is used.
func (a *Agent) maySign(from protocol.HostID, k *key, act *active, b *protocol.Binding, message []byte) error {
	if err := a.mayTakePart(from, k, act, b); err != nil {
		return err
	}
	refuse := a.refuse
	switch {
	case onDigest(b.Operation) && (len(message) > 0 || !k.entry().Prehashed || !k.scheme.traits().digest):
		return refuse(reasonRefused, "its roster does not let this key sign digests")
	case b.Operation == opOnlineDigest && !k.entry().PrehashedPresignatures:
		return refuse(reasonRefused, "its roster does not let this key sign digests with presignatures")
	case onDigest(b.Operation):
	case len(message) == 0 || len(message) > a.config.Limits.Message:
		return refuse(reasonRefused, "a message of %d bytes is outside its limits of 1 to %d", len(message), a.config.Limits.Message)
	case sha256.Sum256(message) != b.Request:
		return refuse(reasonDiffers, "the message is another than the session is about")
	}
	return nil
}

func (a *Agent) refuse(reason, format string, args ...any) error {
	return &partyError{host: a.self, reason: reason, text: fmt.Sprintf(format, args...)}
}

// mayTakePart checks what holds for presigning as for signing.
func (a *Agent) mayTakePart(from protocol.HostID, k *key, act *active, b *protocol.Binding) error {
	if err := a.halted(k); err != nil {
		return err
	}
	refuse := a.refuse
	switch {
	case act == nil:
		return refuse(reasonNotReady, "it has no share of the key ready")
	case act.number().Compare(vault.Number{Roster: b.Epoch[0], Attempt: b.Epoch[1]}) > 0:
		a.offerKnown(k, from)
		return refuse(reasonBehind, "host %q is behind: the key is at epoch %s here, and at %d.%d there", from, act.number(), b.Epoch[0], b.Epoch[1])
	case act.number().Compare(vault.Number{Roster: b.Epoch[0], Attempt: b.Epoch[1]}) < 0:
		return refuse(reasonNotReady, "it is behind: the key is at epoch %s here, and at %d.%d there", act.number(), b.Epoch[0], b.Epoch[1])
	case !k.asks(from):
		return refuse(reasonRefused, "its roster does not let host %q ask for this key", from)
	}
	if err := protocol.CheckParties(a.self, b.Parties); err != nil {
		return refuse(reasonDiffers, "%v", err)
	}
	if k.scheme.traits().mesh && !slices.Contains(b.Parties, from) {
		return refuse(reasonDiffers, "host %q asks and is no signer, which this scheme does not allow", from)
	}
	if len(b.Parties) != act.output.quorum {
		return refuse(reasonDiffers, "%d signers for a quorum of %d", len(b.Parties), act.output.quorum)
	}
	for _, h := range b.Parties {
		if !slices.Contains(act.output.holders, h) {
			return refuse(reasonDiffers, "host %q holds no share", h)
		}
	}
	mine := a.signBinding(b.Operation, k, act, b.Parties, b.Request, b.Nonce)
	if text := mine.Differs(b); text != "" {
		return refuse(reasonDiffers, "we differ on %s", text)
	}
	return nil
}

func (k *key) holds(h protocol.HostID) bool { return slices.Contains(k.holders(), h) }

// asks tells whether a host may ask the others to sign.
func (k *key) asks(h protocol.HostID) bool {
	if len(k.entry().Askers) == 0 {
		return k.holds(h)
	}
	return slices.Contains(k.entry().Askers, string(h))
}

// noQuorum says who is missing, and what the attempts failed of, if there were any.
func (a *Agent) noQuorum(k *key, failures []error) error {
	live := k.live(a.self)
	quorum := k.entry().Quorum
	if act := k.active.Load(); act != nil {
		quorum = act.output.quorum
	}
	text := fmt.Sprintf("key %q: %d of %d hosts are there: %s", k.id.Name, len(live), quorum, a.missing(k, live))
	if len(failures) > 0 {
		text += "; attempts failed: " + joinErrors(failures)
	}
	return &apiError{connect.CodeUnavailable, "NO_QUORUM", text,
		"start the agents that are missing or mend the network between them, or `conseal resume` on hosts that are suspended, and ask again; `conseal status` shows who is connected"}
}

func (a *Agent) signFailed(ctx context.Context, k *key, failures []error) error {
	last := failures[len(failures)-1]
	switch {
	case errors.Is(last, errLedger):
		return &apiError{connect.CodeUnavailable, "AUDIT_LOG", last.Error(), "nothing was signed; make room on the disk of the state folder, and ask again"}
	case errors.Is(ctx.Err(), context.DeadlineExceeded):
		return &apiError{connect.CodeDeadlineExceeded, "DEADLINE", fmt.Sprintf("key %q: no signature in time: %s", k.id.Name, joinErrors(failures)),
			"ask again; if it stays so, `conseal status` and the agents' logs say which host is slow"}
	case ctx.Err() != nil:
		return &apiError{connect.CodeCanceled, "CANCELED", fmt.Sprintf("key %q: the caller left", k.id.Name), "ask again"}
	case errors.Is(last, errSealed):
		return &apiError{connect.CodeUnavailable, "KEY_NOT_READY", fmt.Sprintf("key %q is not ready on this host: %v", k.id.Name, last),
			"mend what it says, or ask on another host of the key; the hardware is asked again at each use"}
	}
	return &apiError{connect.CodeInternal, "SIGNING_FAILED", fmt.Sprintf("key %q: %s", k.id.Name, joinErrors(failures)), "see the agents' logs"}
}

func joinErrors(errs []error) string {
	var text []string
	for _, err := range errs {
		text = append(text, strings.ReplaceAll(err.Error(), "\n", "; "))
	}
	return strings.Join(text, "; then ")
}

// missing lists the holders that are not live, with the reason.
func (a *Agent) missing(k *key, live []protocol.HostID) string {
	var missing []protocol.HostID
	holders := k.holders()
	if act := k.active.Load(); act != nil {
		holders = act.output.holders
	}
	for _, h := range holders {
		if !slices.Contains(live, h) {
			missing = append(missing, h)
		}
	}
	if len(missing) == 0 {
		return "none is missing"
	}
	suspended, rest := k.splitSuspended(missing)
	return "missing " + strings.Join(slices.DeleteFunc([]string{suspended, a.whyMissing(rest)}, func(s string) bool { return s == "" }), ", ") + a.epochs(k, missing)
}

// epochs says which hosts are at another epoch than this one.
func (a *Agent) epochs(k *key, hosts []protocol.HostID) string {
	act := k.active.Load()
	if act == nil {
		return ""
	}
	var text []string
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, h := range hosts {
		switch v := k.views[h]; {
		case !v.Active:
		case v.Number.Compare(act.number()) < 0:
			text = append(text, fmt.Sprintf("%q is behind, at epoch %s of %s", h, v.Number, act.number()))
		case v.Number.Compare(act.number()) > 0:
			text = append(text, fmt.Sprintf("this host is behind %q, at epoch %s of %s", h, act.number(), v.Number))
		}
	}
	if len(text) == 0 {
		return ""
	}
	return "; " + strings.Join(text, ", ")
}

// whyMissing says of each host why it cannot be counted on.
func (a *Agent) whyMissing(hosts []protocol.HostID) string {
	states := map[protocol.HostID]string{}
	for _, s := range a.net.States() {
		switch {
		case s.Connected:
			states[s.Host] = "connected, but its share is not ready"
		case s.Err != "":
			states[s.Host] = s.Err
		default:
			states[s.Host] = "not connected"
		}
	}
	var text []string
	for _, h := range hosts {
		if h != a.self {
			text = append(text, fmt.Sprintf("%q (%s)", h, states[h]))
		}
	}
	return strings.Join(text, ", ")
}
