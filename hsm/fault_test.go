//go:build cgo

package hsm_test

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/sha256"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/miekg/pkcs11"

	"conseal/agent/vault"
	"conseal/agent/vault/vaulttest"
	"conseal/hsm"
	"conseal/internal/secret"
	"conseal/testenv"
)

var soak = flag.Bool("soak", false, "all faults at all calls, and 300 kills")

// faulty is a host whose token is reached through a fault module.
type faulty struct {
	*testenv.FaultModule
	t   *testing.T
	cfg hsm.Config
	h   *hsm.HSM
}

// newFaulty makes a host that is not provisioned.
func newFaulty(t *testing.T) *faulty {
	t.Helper()
	tok := newToken(t)
	m, err := testenv.NewFaultModule(t.Context(), t.TempDir(), tok.Module)
	if err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp(tokenDir, "state-") // SetRoot syncs files: many times slower on a disk
	if err != nil {
		t.Fatal(err)
	}
	uri := strings.Replace(tok.URI, tok.Module, m.Path, 1)
	return &faulty{FaultModule: m, t: t, cfg: hsm.Config{URI: uri, Name: "web1", StateDir: dir}}
}

func (f *faulty) set(call string, do testenv.Action, value uint, times, after int) testenv.Rule {
	f.t.Helper()
	r, err := f.Set(testenv.Fault{Call: call, Do: do, Value: value, Times: times, After: after})
	if err != nil {
		f.t.Fatal(err)
	}
	return r
}

// end ends all faults and sees that this one struck: a fault that was not injected
// shows nothing.
func (f *faulty) end(r testenv.Rule, what string) {
	f.t.Helper()
	n, err := f.Hits(r)
	if err != nil || n == 0 {
		f.t.Errorf("%s: the fault never struck: %v", what, err)
	}
	if err := f.Clear(); err != nil {
		f.t.Fatal(err)
	}
}

func (f *faulty) calls() map[string]int {
	f.t.Helper()
	calls, err := f.Calls()
	if err != nil {
		f.t.Fatal(err)
	}
	return calls
}

// during counts the calls of each function in run.
func (f *faulty) during(run func()) map[string]int {
	f.t.Helper()
	before := f.calls()
	run()
	after := f.calls()
	for name, n := range before {
		if after[name] -= n; after[name] == 0 {
			delete(after, name)
		}
	}
	return after
}

// classes has one value of each class.
var classes = map[hsm.Class]uint{
	hsm.ClassSession: pkcs11.CKR_SESSION_HANDLE_INVALID, hsm.ClassLogin: pkcs11.CKR_USER_NOT_LOGGED_IN,
	hsm.ClassHandle: pkcs11.CKR_KEY_HANDLE_INVALID, hsm.ClassToken: pkcs11.CKR_DEVICE_REMOVED,
	hsm.ClassAuth: pkcs11.CKR_PIN_EXPIRED, hsm.ClassBusy: pkcs11.CKR_DEVICE_MEMORY,
	hsm.ClassPolicy: pkcs11.CKR_KEY_FUNCTION_NOT_PERMITTED, hsm.ClassData: pkcs11.CKR_ENCRYPTED_DATA_INVALID,
	hsm.ClassAmbiguous: pkcs11.CKR_FUNCTION_FAILED,
}

// repaired are the classes of which one failure is not even felt.
var repaired = []hsm.Class{hsm.ClassSession, hsm.ClassLogin, hsm.ClassHandle, hsm.ClassToken, hsm.ClassBusy}

// sweep is a host under faults, and what it must never lose.
type sweep struct {
	*faulty
	key    *secret.Bytes
	blob   []byte
	signer crypto.Signer
	others *hsm.HSM        // keeps the login; nil: each operation may have to log in
	roots  []*secret.Bytes // that it may have; one, unless a SetRoot failed
	spare  string          // another host that was provisioned in the token
}

func newSweep(t *testing.T) *sweep {
	t.Helper()
	s := &sweep{faulty: newFaulty(t)}
	s.h = provision(t, s.cfg)
	var err error
	if s.key, s.blob, err = s.h.Seal(t.Context(), "k"); err != nil {
		t.Fatal(err)
	}
	if s.signer, err = s.h.Identity(t.Context()); err != nil {
		t.Fatal(err)
	}
	s.roots = []*secret.Bytes{setRoot(t, s.h)}
	return s
}

func (s *sweep) seal(ctx context.Context) error {
	key, blob, err := s.h.Seal(ctx, "k")
	if err == nil {
		s.key, s.blob = key, blob // the next open shows that they belong together
	}
	return err
}

func (s *sweep) open(ctx context.Context) error {
	key, err := s.h.Open(ctx, "k", s.blob)
	if err == nil && !key.Equal(s.key) {
		s.t.Error("another key than was sealed")
	}
	return err
}

// openDamaged turns the answer round: it must fail.
func (s *sweep) openDamaged(ctx context.Context) error {
	damaged := bytes.Clone(s.blob)
	damaged[len(damaged)-1] ^= 1
	_, err := s.h.Open(ctx, "k", damaged)
	if err == nil {
		s.t.Error("a damaged blob was opened")
	}
	if errors.Is(err, hsm.ErrNotAuthentic) {
		return nil
	}
	return err
}

func (s *sweep) root(ctx context.Context) error {
	root, err := s.h.Root(ctx)
	if err != nil {
		return err
	}
	if !slices.ContainsFunc(s.roots, root.Equal) {
		s.t.Error("another root than was set")
	}
	s.roots = []*secret.Bytes{root}
	return nil
}

func (s *sweep) setRoot(ctx context.Context) error {
	next := secret.Random(32)
	err := s.h.SetRoot(ctx, next)
	if err == nil {
		s.roots = nil
	}
	s.roots = append(s.roots, next)
	return err
}

func (s *sweep) sign(context.Context) error {
	digest := sha256.Sum256([]byte("x"))
	signature, err := s.signer.Sign(nil, digest[:], crypto.SHA256)
	if err == nil && !ecdsa.VerifyASN1(s.signer.Public().(*ecdsa.PublicKey), digest[:], signature) {
		s.t.Error("a signature that does not verify")
	}
	return err
}

// login opens the token anew, with the login that comes with the first session.
func (s *sweep) login(ctx context.Context) error {
	if s.h != nil {
		s.h.Close()
		s.h = nil
	}
	h, err := hsm.Open(ctx, s.cfg)
	if err != nil {
		return err
	}
	signer, err := h.Identity(ctx)
	if err != nil {
		h.Close()
		return err
	}
	s.t.Cleanup(h.Close)
	s.h, s.signer = h, signer
	return nil
}

// provision makes the objects of another host.
func (s *sweep) provision(ctx context.Context) error {
	s.spare = "spare"
	cfg := s.spareConfig()
	_, err := hsm.Provision(ctx, cfg)
	return err
}

// spareConfig is the other host's, with a state folder of its own.
func (s *sweep) spareConfig() hsm.Config {
	s.t.Helper()
	cfg := s.cfg
	cfg.Name = s.spare
	cfg.StateDir += "-" + s.spare
	if err := os.MkdirAll(cfg.StateDir, 0o700); err != nil {
		s.t.Fatal(err)
	}
	return cfg
}

// settle sees that all is there and works once the fault is over.
func (s *sweep) settle(what string) {
	s.t.Helper()
	if err := hsm.ClearLatch(s.cfg.StateDir); err != nil {
		s.t.Fatal(err)
	}
	ctx := s.t.Context()
	s.waitForToken()
	works := func(name string, run func(context.Context) error) {
		s.t.Helper()
		if err := run(ctx); err != nil {
			s.t.Fatalf("after %s: %s: %v", what, name, err)
		}
	}
	if s.spare != "" {
		cfg := s.spareConfig()
		if err := hsm.ClearLatch(cfg.StateDir); err != nil {
			s.t.Fatal(err)
		}
		works("provisioning again", func(ctx context.Context) error { _, err := hsm.Provision(ctx, cfg); return err })
		works("what was provisioned", func(ctx context.Context) error {
			h, err := hsm.Open(ctx, cfg)
			if err == nil {
				_, err = h.Identity(ctx)
				h.Close()
			}
			return err
		})
		for _, object := range []string{"wrap", "identity", "sentinel"} {
			destroy(s.t, s.h, fmt.Sprintf("conseal/%s/%s", s.spare, object))
		}
		s.spare = ""
	}
	works("open", s.open)
	works("root", s.root)
	works("root again", s.root) // which is the same from now on
	works("sign", s.sign)
	if s.others != nil {
		works("others", func(ctx context.Context) error { _, err := s.others.Open(ctx, "k", s.blob); return err })
	}
	if rootKeys(s.t, s.h) > 1 { // of SetRoots that failed: the next one destroys them
		works("set root", s.setRoot)
		works("root", s.root)
	}
	if n := rootKeys(s.t, s.h); n != 1 {
		s.t.Errorf("after %s: %d root keys", what, n)
	}
}

// waitForToken waits until a token that was given up is looked for again.
func (s *sweep) waitForToken() {
	s.t.Helper()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(20 * time.Second); ; <-tick.C {
		var err error
		if s.h == nil {
			err = s.login(s.t.Context())
		} else {
			err = s.open(s.t.Context())
		}
		if err == nil {
			return
		}
		if hsm.ClassOf(err) != hsm.ClassToken || time.Now().After(deadline) {
			s.t.Fatalf("the token does not come back: %v", err)
		}
	}
}

// operations are all that asks the token for something.
var operations = map[string]func(*sweep, context.Context) error{
	"seal": (*sweep).seal, "open": (*sweep).open, "open damaged": (*sweep).openDamaged,
	"root": (*sweep).root, "set root": (*sweep).setRoot, "sign": (*sweep).sign,
	"login": (*sweep).login, "provision": (*sweep).provision,
}

// eachOperation gives each operation a host of its own and the calls that it makes.
// Operations in rarely have so many calls that they are left to -soak.
func eachOperation(t *testing.T, rarely []string, test func(s *sweep, run func() error, calls map[string]int)) {
	for name, operation := range operations {
		if slices.Contains(rarely, name) && !*soak {
			continue
		}
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newSweep(t)
			if name != "login" {
				s.others = open(t, s.cfg)
			}
			run := func() error { return operation(s, t.Context()) }
			calls := s.during(func() {
				if err := run(); err != nil {
					t.Fatal(err)
				}
			})
			s.settle("no fault")
			t.Logf("calls %v", calls)
			test(s, run, calls)
		})
	}
}

// drawn draws a quarter of the cases that are too many for each run; -soak has all.
func drawn() bool { return *soak || rand.IntN(4) == 0 }

// TestFaultAtEachCall lets each call of each operation fail once by each class of
// failure: before it does anything and, where a token may say so of what it did, after.
// Of functions that are called many times in an operation, a part is drawn.
func TestFaultAtEachCall(t *testing.T) {
	done := []hsm.Class{hsm.ClassSession, hsm.ClassBusy, hsm.ClassAmbiguous}
	eachOperation(t, []string{"provision", "login"}, func(s *sweep, run func() error, calls map[string]int) {
		for call, n := range calls {
			for class, value := range classes {
				for after := range n {
					for _, do := range []testenv.Action{testenv.ReturnValue, testenv.ReturnAfter} {
						if do == testenv.ReturnAfter && !slices.Contains(done, class) || n > 4 && !drawn() {
							continue
						}
						what := fmt.Sprintf("%s %s of %s at call %d", do, class, call, after+1)
						r := s.set(call, do, value, 1, after)
						err := run()
						s.end(r, what)
						if err != nil {
							s.wantClass(what, call, class, err)
							if slices.Contains(repaired, class) && call != "C_Login" {
								s.t.Errorf("%s is not repaired", what)
							}
						}
						s.settle(what)
						if call == "C_CloseSession" && s.others == nil { // one may be left open, and keep the login from the next case
							raw(s.t, s.h, func(p *pkcs11.Ctx, _ pkcs11.SessionHandle, slot uint) error { return p.CloseAllSessions(slot) })
						}
					}
				}
			}
		}
	})
}

// TestFaultThatStays lets each call fail again and again: then the operation fails.
func TestFaultThatStays(t *testing.T) {
	eachOperation(t, nil, func(s *sweep, run func() error, calls map[string]int) {
		for call := range calls {
			if call == "C_CloseSession" {
				continue // whatever it says, the session is not used again
			}
			for class, value := range classes {
				if len(calls) > 12 && !drawn() { // login and provision, which take long
					continue
				}
				what := fmt.Sprintf("%s of every %s", class, call)
				r := s.set(call, testenv.ReturnValue, value, 0, 0)
				err := run()
				s.end(r, what)
				switch {
				case err != nil:
					s.wantClass(what, call, class, err)
				case call == "C_CreateObject" && (class == hsm.ClassPolicy || class == hsm.ClassAmbiguous): // then the sentinel is a key
				default:
					s.t.Errorf("%s: no error", what)
				}
				s.settle(what)
			}
		}
	})
}

// wantClass sees that the error of a call is of its class, and says where it was.
func (s *sweep) wantClass(what, call string, class hsm.Class, err error) {
	s.t.Helper()
	said := string(class)
	switch call {
	case "C_Login": // else the PIN was sent and not accepted, whatever the token says
		if class != hsm.ClassSession {
			class, said = hsm.ClassAuth, "PIN"
		}
	case "C_GetTokenInfo": // a token that cannot say what it is is away
		class, said = hsm.ClassToken, string(hsm.ClassToken)
	}
	switch {
	case hsm.ClassOf(err) != class || errors.Is(err, hsm.ErrLost) || errors.Is(err, hsm.ErrStale) || errors.Is(err, hsm.ErrNotAuthentic):
		s.t.Errorf("%s is of class %q: %v", what, hsm.ClassOf(err), err)
	case !strings.Contains(err.Error(), call) || !strings.Contains(err.Error(), said):
		s.t.Errorf("%s: call or class is missing in: %v", what, err)
	}
}

// TestEachValueHasItsClass: what is not known is ambiguous.
func TestEachValueHasItsClass(t *testing.T) {
	s := newSweep(t)
	for class, values := range map[hsm.Class][]uint{
		hsm.ClassSession: {pkcs11.CKR_SESSION_HANDLE_INVALID, pkcs11.CKR_SESSION_CLOSED, pkcs11.CKR_OPERATION_ACTIVE, pkcs11.CKR_OPERATION_NOT_INITIALIZED},
		hsm.ClassLogin:   {pkcs11.CKR_USER_NOT_LOGGED_IN},
		hsm.ClassHandle:  {pkcs11.CKR_OBJECT_HANDLE_INVALID, pkcs11.CKR_KEY_HANDLE_INVALID},
		hsm.ClassToken: {pkcs11.CKR_TOKEN_NOT_PRESENT, pkcs11.CKR_TOKEN_NOT_RECOGNIZED, pkcs11.CKR_DEVICE_REMOVED, pkcs11.CKR_DEVICE_ERROR,
			pkcs11.CKR_SLOT_ID_INVALID, pkcs11.CKR_CRYPTOKI_NOT_INITIALIZED},
		hsm.ClassAuth: {pkcs11.CKR_PIN_INCORRECT, pkcs11.CKR_PIN_EXPIRED, pkcs11.CKR_PIN_LOCKED},
		hsm.ClassBusy: {pkcs11.CKR_SESSION_COUNT, pkcs11.CKR_HOST_MEMORY, pkcs11.CKR_DEVICE_MEMORY, 0x201},
		hsm.ClassPolicy: {pkcs11.CKR_MECHANISM_INVALID, pkcs11.CKR_MECHANISM_PARAM_INVALID, pkcs11.CKR_KEY_TYPE_INCONSISTENT,
			pkcs11.CKR_FUNCTION_NOT_SUPPORTED, pkcs11.CKR_ARGUMENTS_BAD, pkcs11.CKR_BUFFER_TOO_SMALL, 0x1B},
		hsm.ClassData:      {pkcs11.CKR_ENCRYPTED_DATA_INVALID, pkcs11.CKR_ENCRYPTED_DATA_LEN_RANGE, 0x1C},
		hsm.ClassAmbiguous: {pkcs11.CKR_GENERAL_ERROR, pkcs11.CKR_FUNCTION_FAILED, 0x1FF, pkcs11.CKR_VENDOR_DEFINED, pkcs11.CKR_VENDOR_DEFINED | 7},
	} {
		for _, value := range values {
			what := fmt.Sprintf("%#x", value)
			r := s.set("C_Decrypt", testenv.ReturnValue, value, 0, 0)
			err := s.open(t.Context())
			s.end(r, what)
			if err == nil {
				t.Errorf("%s: no error", what)
			} else {
				s.wantClass(what, "C_Decrypt", class, err)
			}
			s.settle(what)
		}
	}
}

// TestATokenThatLies says that it did what it did not.
func TestATokenThatLies(t *testing.T) {
	for _, call := range []string{"C_DestroyObject", "C_GenerateKey"} {
		s := newSweep(t)
		r := s.set(call, testenv.ReturnValue, pkcs11.CKR_OK, 0, 0)
		err := s.setRoot(t.Context())
		if err == nil {
			t.Errorf("%s did nothing, and the root was set", call)
		}
		if call == "C_DestroyObject" { // an older root can be had: none is given out
			if _, err := s.h.Root(t.Context()); hsm.ClassOf(err) != hsm.ClassPolicy || !strings.Contains(err.Error(), "still in the token") {
				t.Errorf("root with an older one alive: %v", err)
			}
		}
		s.end(r, call)
		s.settle(call)
		if n := rootKeys(t, s.h); n != 1 {
			t.Errorf("%s: %d root keys", call, n)
		}
	}
}

// TestSessionsLostAtEachCall closes all sessions of the process, and so logs it out, at
// each call of each operation.
func TestSessionsLostAtEachCall(t *testing.T) {
	eachOperation(t, []string{"provision", "login", "set root", "open damaged"}, func(s *sweep, run func() error, calls map[string]int) {
		for call, n := range calls {
			for after := range n {
				what := fmt.Sprintf("sessions lost in %s at call %d", call, after+1)
				r := s.set(call, testenv.LoseSessions, 0, 1, after)
				err := run()
				s.end(r, what)
				if err != nil {
					s.t.Errorf("%s: %v", what, err)
				}
				s.settle(what)
			}
		}
	})
}

// TestProvisionUnderFaults has cases of the sweeps that are too long for each run: of a
// failure, one sentinel comes; and a self-test whose key goes with the sessions is repaired.
func TestProvisionUnderFaults(t *testing.T) {
	for name, faults := range map[string][]testenv.Fault{
		"made and not destroyed": {
			{Call: "C_CreateObject", Do: testenv.ReturnAfter, Value: pkcs11.CKR_FUNCTION_FAILED, Times: 1},
			{Call: "C_DestroyObject", Do: testenv.ReturnValue, Value: pkcs11.CKR_FUNCTION_FAILED, Times: 1, After: 1},
		},
		"no session closes":         {{Call: "C_CloseSession", Do: testenv.ReturnAfter, Value: pkcs11.CKR_FUNCTION_FAILED}},
		"sessions lost when opened": {{Call: "C_OpenSession", Do: testenv.LoseSessions, Times: 1, After: 5}},
		"sessions lost when closed": {{Call: "C_CloseSession", Do: testenv.LoseSessions, Times: 1, After: 5}},
	} {
		t.Run(name, func(t *testing.T) {
			f := newFaulty(t)
			for _, fault := range faults {
				r := f.set(fault.Call, fault.Do, fault.Value, fault.Times, fault.After)
				defer func() {
					if n, err := f.Hits(r); n == 0 || err != nil {
						t.Errorf("%s: the fault never struck: %v", fault.Call, err)
					}
				}()
			}
			h := provision(t, f.cfg)
			if n := count(t, h, "conseal/web1/sentinel"); n != 1 {
				t.Errorf("%d sentinels", n)
			}
			if _, err := hsm.Provision(t.Context(), f.cfg); err != nil {
				t.Errorf("again: %v", err)
			}
		})
	}
}

// TestTokenGone pulls the token out in the middle of each operation.
func TestTokenGone(t *testing.T) {
	eachOperation(t, []string{"provision", "login", "open damaged"}, func(s *sweep, run func() error, calls map[string]int) {
		total := 0
		for _, n := range calls {
			total += n
		}
		for after := range total {
			if after > 0 && rand.IntN(total) >= 4 && !*soak {
				continue
			}
			what := fmt.Sprintf("the token gone at call %d of %d", after+1, total)
			r := s.set("*", testenv.Gone, pkcs11.CKR_DEVICE_REMOVED, 0, after)
			if err := run(); err != nil { // the last calls may be of no importance
				call := ""
				if strings.Contains(err.Error(), "C_Login") {
					call = "C_Login" // which is not the token's matter any more
				}
				s.wantClass(what, call, hsm.ClassToken, err)
			}
			for name, operation := range operations {
				if name == "login" || s.h == nil && name != "provision" {
					continue // it ends the host that the others need, or has ended it
				}
				if err := operation(s, s.t.Context()); err == nil {
					s.t.Errorf("%s: %s works", what, name)
				} else {
					s.wantClass(what, "", hsm.ClassToken, err)
				}
			}
			s.end(r, what)
			s.settle(what)
		}
	})
}

// TestOddGCM meets tokens that do AES-GCM otherwise: each works like any token, or is
// refused when it is provisioned, in words that say why.
func TestOddGCM(t *testing.T) {
	for action, call := range map[testenv.Action]string{
		testenv.ReplaceIV: "C_EncryptInit", testenv.AppendIV: "C_EncryptInit", testenv.ShortSize: "C_Encrypt",
	} {
		t.Run(string(action), func(t *testing.T) {
			f := newFaulty(t)
			r := f.set(call, action, 0, 0, 0)
			_, err := hsm.Provision(t.Context(), f.cfg)
			if n, hitsErr := f.Hits(r); n == 0 || hitsErr != nil {
				t.Fatalf("the token was not odd: %v", hitsErr)
			}
			if err == nil {
				f.conform()
				return
			}
			if hsm.ClassOf(err) != hsm.ClassPolicy || !strings.Contains(err.Error(), "C_Encrypt") || !strings.Contains(err.Error(), "provisioning") {
				t.Errorf("refused without a reason: %v", err)
			}
			if _, err := hsm.Open(t.Context(), f.cfg); err == nil {
				t.Error("it opens although provisioning refused it")
			}
			t.Log(err)
		})
	}
}

// conform runs what every protector must do.
func (f *faulty) conform() {
	vaulttest.Run(f.t, func(t *testing.T) vaulttest.Host {
		cfg := config(t, newToken(t), "web1")
		uri, err := hsm.ParseURI(cfg.URI)
		if err != nil {
			t.Fatal(err)
		}
		uri.ModulePath = f.Path
		cfg.URI = uri.String()
		return vaulttest.Host{
			Protector: provision(t, cfg),
			Reopen:    func() vault.Protector { return open(t, cfg) },
			State:     cfg.StateDir,
		}
	})
}
