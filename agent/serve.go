package agent

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/sys/unix"
	"golang.org/x/time/rate"

	"conseal/agent/api/apipb"
	"conseal/agent/api/apipb/apipbconnect"
)

// caller is a local process on a socket, as the kernel names it (SO_PEERCRED).
type caller struct {
	UID uint32 `json:"uid"`
	GID uint32 `json:"gid"`
	PID int32  `json:"pid"`
}

type callerKey struct{} // of a connection's context

// apiError is an error for a caller: what failed, why for programs, and what to do.
type apiError struct {
	code   connect.Code
	reason string
	text   string
	next   string
}

func (e *apiError) Error() string { return e.text }

// sockets are the two sockets of the agent.
type sockets struct {
	servers   []*http.Server
	listeners []net.Listener
}

// listen makes both sockets. A socket file that an agent still serves is an
// error; one that nobody serves is what a crash leaves.
func (a *Agent) listen() (*sockets, error) {
	signing := http.NewServeMux()
	signing.Handle(apipbconnect.NewSignerHandler(signerAPI{a, false}, a.handlerOptions()...))
	admin := http.NewServeMux()
	admin.Handle(apipbconnect.NewSignerHandler(signerAPI{a, true}, a.handlerOptions()...))
	admin.Handle(apipbconnect.NewAdminHandler(adminAPI{a}, a.handlerOptions()...))
	admin.Handle(apipbconnect.NewSealHandler(sealAPI{a}, a.handlerOptions()...))
	s := &sockets{}
	for _, socket := range []struct {
		path, group string
		mode        os.FileMode
		handler     http.Handler
	}{
		{a.config.Listen.SignSocket, a.config.Listen.SignSocketGroup, 0o660, signing},
		{a.config.Listen.AdminSocket, "", 0o600, admin},
	} {
		l, err := listenUnix(socket.path, socket.group, socket.mode)
		if err != nil {
			s.close()
			return nil, err
		}
		s.listeners = append(s.listeners, l)
		s.servers = append(s.servers, newServer(socket.handler))
	}
	return s, nil
}

func newServer(h http.Handler) *http.Server {
	protocols := new(http.Protocols)
	protocols.SetHTTP1(true)
	protocols.SetUnencryptedHTTP2(true) // gRPC
	return &http.Server{
		Handler: h, Protocols: protocols,
		ReadHeaderTimeout: 10 * time.Second, IdleTimeout: 5 * time.Minute, MaxHeaderBytes: 64 << 10,
		ConnContext: func(ctx context.Context, c net.Conn) context.Context {
			if who, err := peerCredentials(c); err == nil {
				ctx = context.WithValue(ctx, callerKey{}, who)
			}
			return ctx
		},
	}
}

// peerCredentials asks the kernel who is at the other end of a unix socket.
func peerCredentials(c net.Conn) (caller, error) {
	u, ok := c.(*net.UnixConn)
	if !ok {
		return caller{}, fmt.Errorf("a %T has no credentials", c)
	}
	raw, err := u.SyscallConn()
	if err != nil {
		return caller{}, err
	}
	var cred *unix.Ucred
	var sockErr error
	err = raw.Control(func(fd uintptr) {
		cred, sockErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	})
	if err = errors.Join(err, sockErr); err != nil {
		return caller{}, err
	}
	return caller{cred.Uid, cred.Gid, cred.Pid}, nil
}

// listenUnix listens on a socket that is never open to more than mode says, not
// even while it is made.
func listenUnix(path, group string, mode os.FileMode) (net.Listener, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, fmt.Errorf("making the folder of socket %s: %w", path, err)
	}
	if c, err := net.Dial("unix", path); err == nil {
		c.Close()
		return nil, fmt.Errorf("socket %s is served already: another agent runs with this configuration; stop it first", path)
	}
	if info, err := os.Lstat(path); err == nil {
		if info.Mode().Type() != os.ModeSocket {
			return nil, fmt.Errorf("%s is in the way of the socket and is no socket itself", path)
		}
		if err := os.Remove(path); err != nil {
			return nil, fmt.Errorf("removing a socket that nobody serves: %w", err)
		}
	}
	// bind(2) under a name that nobody looks for, in a folder of our own
	dir, err := os.MkdirTemp(filepath.Dir(path), ".conseal-")
	if err != nil {
		return nil, fmt.Errorf("making socket %s: %w", path, err)
	}
	defer os.RemoveAll(dir)
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(dir, "s"), Net: "unix"})
	if err != nil {
		return nil, fmt.Errorf("making socket %s: %w", path, err)
	}
	l.SetUnlinkOnClose(false)
	if err := ownSocket(filepath.Join(dir, "s"), path, group, mode); err != nil {
		l.Close()
		return nil, err
	}
	return l, nil
}

func ownSocket(made, path, group string, mode os.FileMode) error {
	if group != "" {
		g, err := user.LookupGroup(group)
		if err != nil {
			return fmt.Errorf("socket %s: %w", path, err)
		}
		gid, err := strconv.Atoi(g.Gid)
		if err != nil {
			return fmt.Errorf("socket %s: group %q has id %q", path, group, g.Gid)
		}
		if err := os.Chown(made, -1, gid); err != nil {
			return fmt.Errorf("giving socket %s to group %q: %w", path, group, err)
		}
	}
	if err := os.Chmod(made, mode); err != nil {
		return fmt.Errorf("setting the mode of socket %s: %w", path, err)
	}
	if err := os.Rename(made, path); err != nil {
		return fmt.Errorf("making socket %s: %w", path, err)
	}
	return nil
}

// serve serves until ctx ends; requests under way get a second to end.
func (s *sockets) serve(ctx context.Context) error {
	failed := make(chan error, len(s.servers))
	var wg sync.WaitGroup
	for i, server := range s.servers {
		wg.Go(func() { failed <- server.Serve(s.listeners[i]) })
	}
	var err error
	select {
	case <-ctx.Done():
	case err = <-failed:
	}
	grace, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
	defer cancel()
	for _, server := range s.servers {
		_ = server.Shutdown(grace)
		server.Close()
	}
	wg.Wait()
	return err
}

func (s *sockets) close() {
	for _, l := range s.listeners {
		l.Close()
	}
}

// handlerOptions bound what a caller may send and give errors their details.
func (a *Agent) handlerOptions() []connect.HandlerOption {
	const limit = maxFrame * 4 / 3 // JSON carries bytes as base64; Sign looks at the configured limit
	return []connect.HandlerOption{
		connect.WithReadMaxBytes(limit),
		connect.WithInterceptors(connect.UnaryInterceptorFunc(func(next connect.UnaryFunc) connect.UnaryFunc {
			return func(ctx context.Context, r connect.AnyRequest) (connect.AnyResponse, error) {
				response, err := next(ctx, r)
				return response, wireError(err)
			}
		})),
	}
}

func wireError(err error) error {
	var e *apiError
	if !errors.As(err, &e) {
		return err
	}
	out := connect.NewError(e.code, e)
	if detail, err := connect.NewErrorDetail(&apipb.ErrorInfo{Reason: e.reason, Next: e.next}); err == nil {
		out.AddDetail(detail)
	}
	return out
}

// signerAPI serves the Signer service.
type signerAPI struct {
	a     *Agent
	admin bool // on admin.sock: sees every key
}

// Sign answers a caller with a signature of a quorum.
func (s signerAPI) Sign(ctx context.Context, r *apipb.SignRequest) (*apipb.SignResponse, error) {
	a := s.a
	k, who, err := a.authorise(ctx, r.Key)
	if err != nil {
		return nil, err
	}
	if err := a.refuseHalted(k); err != nil {
		return nil, err
	}
	act := k.active.Load()
	switch {
	case len(r.Digest) > 0 && !(k.entry().Prehashed && k.scheme.traits().digest):
		return nil, &apiError{connect.CodePermissionDenied, "NO_DIGESTS", fmt.Sprintf("key %q signs whole messages", r.Key),
			"send the message; the security team may set `prehashed = true` for ECDSA keys in the roster"}
	case len(r.Digest) > 0 && (len(r.Digest) != sha256.Size || len(r.Message) > 0):
		return nil, &apiError{connect.CodeInvalidArgument, "BAD_DIGEST", fmt.Sprintf("a digest of %d bytes and a message of %d", len(r.Digest), len(r.Message)),
			"send either a message or its SHA-256, 32 bytes"}
	case len(r.Digest) == 0 && len(r.Message) == 0:
		return nil, &apiError{connect.CodeInvalidArgument, "EMPTY_MESSAGE", "the message is empty", "send the whole message that is to be signed"}
	case len(r.Message) > a.config.Limits.Message:
		return nil, &apiError{connect.CodeInvalidArgument, "MESSAGE_TOO_LARGE",
			fmt.Sprintf("the message has %d bytes, the limit is %d", len(r.Message), a.config.Limits.Message),
			"raise `limits.message` on all hosts of the key, or sign a digest file such as sha256sum writes"}
	case act == nil:
		d := k.describe(a.self)
		return nil, &apiError{connect.CodeUnavailable, "KEY_NOT_READY", fmt.Sprintf("key %q is not ready on this host: %s: %s", r.Key, d.Condition, d.Detail),
			"wait until `conseal keys` shows it ready, or mend what it says"}
	case !a.callers.limiter(who.UID).Allow():
		return nil, &apiError{connect.CodeResourceExhausted, "RATE_LIMIT", fmt.Sprintf("uid %d asks too often", who.UID),
			"ask more slowly, or raise `limits.caller_rate`"}
	}
	ask := &request{k: k, act: act, message: r.Message, digest: sha256.Sum256(r.Message), caller: who}
	if len(r.Digest) > 0 {
		ask.digest = [32]byte(r.Digest)
	}
	return a.sign(ctx, ask)
}

// GetKey describes one key.
func (s signerAPI) GetKey(ctx context.Context, r *apipb.GetKeyRequest) (*apipb.Key, error) {
	if k := s.a.key(r.Key); s.admin && k != nil {
		return k.describe(s.a.self), nil
	}
	k, _, err := s.a.authorise(ctx, r.Key)
	if err != nil {
		return nil, err
	}
	return k.describe(s.a.self), nil
}

// ListKeys describes the keys that the caller may use, or all.
func (s signerAPI) ListKeys(ctx context.Context, _ *apipb.ListKeysRequest) (*apipb.ListKeysResponse, error) {
	out := &apipb.ListKeysResponse{}
	for _, k := range s.a.keys() {
		if _, _, err := s.a.authorise(ctx, k.id.Name); s.admin || err == nil {
			out.Keys = append(out.Keys, k.describe(s.a.self))
		}
	}
	return out, nil
}

// authorise finds a key that the caller may use. The roster's entry lists who
// may; an empty list is nobody.
func (a *Agent) authorise(ctx context.Context, name string) (*key, caller, error) {
	who, ok := ctx.Value(callerKey{}).(caller)
	if !ok {
		return nil, caller{}, &apiError{connect.CodeUnauthenticated, "NO_CREDENTIALS", "the kernel does not say who is calling", "connect to the unix socket directly"}
	}
	k := a.key(name)
	if k == nil {
		return nil, who, &apiError{connect.CodeNotFound, "UNKNOWN_KEY", fmt.Sprintf("the roster gives this host no key %q", name),
			"`conseal keys` lists the keys of this host"}
	}
	if !mayUse(k.entry().Users, who.UID) {
		return nil, who, &apiError{connect.CodePermissionDenied, "NOT_ALLOWED", fmt.Sprintf("uid %d may not use key %q", who.UID, name),
			fmt.Sprintf("the security team adds the user to `users` of key %q in the roster", name)}
	}
	return k, who, nil
}

// mayUse tells whether a list of the roster ("uid:1000" or a login name) has uid.
func mayUse(users []string, uid uint32) bool {
	id := strconv.FormatUint(uint64(uid), 10)
	if slices.Contains(users, "uid:"+id) {
		return true
	}
	for _, name := range users {
		if u, err := user.Lookup(name); err == nil && u.Uid == id {
			return true
		}
	}
	return false
}

// limits bounds how often each of a few sources does something.
type limits[K comparable] struct {
	rate  rate.Limit
	burst int
	mu    sync.Mutex
	of    map[K]*rate.Limiter
}

func newLimits[K comparable](limit rate.Limit, burst int) *limits[K] {
	return &limits[K]{rate: limit, burst: burst, of: map[K]*rate.Limiter{}}
}

func (l *limits[K]) limiter(source K) *rate.Limiter {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.of[source] == nil {
		l.of[source] = rate.NewLimiter(l.rate, l.burst)
	}
	return l.of[source]
}

// adminAPI serves the Admin service.
type adminAPI struct{ a *Agent }

// Status says how this agent is.
func (s adminAPI) Status(context.Context, *apipb.StatusRequest) (*apipb.StatusResponse, error) {
	a := s.a
	out := &apipb.StatusResponse{
		Fleet: a.roster().Fleet, Host: string(a.self), Version: a.version, RosterVersion: a.roster().Version, RosterDigest: a.rosterDigest(),
		Protector: a.protector.Name(), Erasure: a.erasure, ErasureWhy: a.erasureWhy, Started: a.started.UTC().Format(time.RFC3339),
	}
	if v := a.vault.Load(); v != nil {
		out.Roots = v.Stats().Roots
	} else {
		out.ProtectorError = a.vaultProblem()
	}
	a.peersMu.Lock()
	defer a.peersMu.Unlock()
	for _, p := range a.net.States() {
		out.Peers = append(out.Peers, &apipb.Peer{
			Name: string(p.Host), Address: p.Address, Connected: p.Connected, Since: p.Since.UTC().Format(time.RFC3339),
			Error: p.Err, RosterVersion: a.peers[p.Host],
		})
	}
	for _, k := range a.keys() {
		d := k.describe(a.self)
		d.Presignatures = a.presignatures(k)
		out.Keys = append(out.Keys, d)
	}
	return out, nil
}

// Refresh gives a key new shares.
func (s adminAPI) Refresh(ctx context.Context, r *apipb.RefreshRequest) (*apipb.Key, error) {
	a := s.a
	ctx, cancel := context.WithTimeout(ctx, 2*a.config.Limits.KeygenDeadline)
	defer cancel()
	k := a.key(r.Key)
	if k == nil {
		return nil, &apiError{connect.CodeNotFound, "UNKNOWN_KEY", fmt.Sprintf("the roster gives this host no key %q", r.Key), "`conseal status` lists the keys of this host"}
	}
	before := k.active.Load()
	if before == nil || k.entry().State == "deleted" {
		d := k.describe(a.self)
		return nil, &apiError{connect.CodeUnavailable, "KEY_NOT_READY", fmt.Sprintf("key %q is not ready on this host: %s: %s", r.Key, d.Condition, d.Detail), "ask on a host that has its share"}
	}
	k.refresh(before)
	a.nudge()
	for {
		news := k.newsNow()
		if act := k.active.Load(); act != nil && act != before {
			return k.describe(a.self), nil
		}
		if !wait(ctx, news) {
			k.mu.Lock()
			next := k.next
			k.mu.Unlock()
			return nil, &apiError{connect.CodeDeadlineExceeded, "DEADLINE", fmt.Sprintf("key %q has no new shares yet: %s; the hosts go on trying, and the present ones sign", r.Key, next),
				"mend what it says; `conseal status --watch` shows when it is done"}
		}
	}
}

// LoadRoster takes up the roster's file.
func (s adminAPI) LoadRoster(context.Context, *apipb.LoadRosterRequest) (*apipb.LoadRosterResponse, error) {
	changed, err := s.a.LoadRoster()
	if err != nil {
		return nil, &apiError{connect.CodeFailedPrecondition, "ROSTER", err.Error(), "correct the file, or leave it: the present roster stays in force"}
	}
	return &apipb.LoadRosterResponse{Version: s.a.roster().Version, Changed: changed}, nil
}
