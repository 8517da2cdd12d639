package agent_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/sha256"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"conseal/agent/api"
	"conseal/agent/api/apipb"
	"conseal/protocol/cmp"
	"conseal/protocol/taproot"
	"conseal/testenv"
)

// newECDSAFleet starts three hosts with the key "token" on P-256.
func newECDSAFleet(t *testing.T, limits string, flags ...string) (context.Context, *testenv.Fleet) {
	t.Helper()
	ctx, f := newFleet(t, flags...)
	f.Keys = f.Key("token", "ecdsa-p256", 2)
	f.Limits = "[limits]\nkeygen_deadline = \"5m\"\nsign_deadline = \"2m\"\n" + limits
	must(t, f.WriteRoster(1))
	for _, h := range f.Hosts {
		must(t, h.WriteConfig())
	}
	must(t, f.Start(ctx))
	must(t, f.WaitReady(ctx, "token"))
	return ctx, f
}

// stockOf asks a host for its presignatures of key "token".
func stockOf(ctx context.Context, t *testing.T, h *testenv.Host) (out []*apipb.Presignatures) {
	t.Helper()
	client := api.Dial(h.AdminSocket())
	defer client.Close()
	s, err := client.Status(ctx)
	must(t, err)
	for _, k := range s.Keys {
		if k.Name == "token" {
			out = k.Presignatures
		}
	}
	return out
}

// waitStock waits until a host has at least n presignatures.
func waitStock(ctx context.Context, t *testing.T, h *testenv.Host, n int) {
	t.Helper()
	for {
		stock := stockOf(ctx, t, h)
		if count(stock) >= n {
			return
		}
		select {
		case <-ctx.Done():
			t.Fatalf("%s: stock %v: %v", h.Name, stock, ctx.Err())
		case <-time.After(100 * time.Millisecond):
		}
	}
}

func count(stock []*apipb.Presignatures) (n int) {
	for _, p := range stock {
		n += int(p.Ready)
	}
	return n
}

func signECDSA(ctx context.Context, t *testing.T, h *testenv.Host, message string) *apipb.SignResponse {
	t.Helper()
	r, err := h.Client().Sign(ctx, "token", []byte(message))
	must(t, err)
	key, err := x509.ParsePKIXPublicKey(r.PublicKey)
	must(t, err)
	digest := sha256.Sum256([]byte(message))
	if !ecdsa.VerifyASN1(key.(*ecdsa.PublicKey), digest[:], r.Signature) {
		t.Fatal("crypto/ecdsa refuses the signature")
	}
	return r
}

// TestStock fills the stock, uses it up, one presignature a signature, and sees it
// filled again; a host that restarts takes its part of it away.
func TestStock(t *testing.T) {
	ctx, f := newECDSAFleet(t, "presignatures = 0\n")
	alpha := f.Hosts[0]
	must(t, alpha.Stop(ctx))
	f.Limits = strings.Replace(f.Limits, "presignatures = 0", "presignatures = 1", 1) // alpha's alone: the others' stock takes as long
	must(t, alpha.WriteConfig())
	must(t, alpha.Start(ctx))
	must(t, f.WaitReady(ctx, "token"))
	waitStock(ctx, t, alpha, 2)
	before := count(stockOf(ctx, t, alpha))
	if before != 2 {
		t.Fatalf("%d presignatures, want one with each of two hosts", before)
	}
	used := map[string]bool{}
	for i := range before {
		r := signECDSA(ctx, t, alpha, fmt.Sprint("message ", i))
		used[fmt.Sprint(r.Signers)] = true
		if n := count(stockOf(ctx, t, alpha)); n != before-1-i {
			t.Errorf("%d presignatures after signature %d", n, i+1)
		}
	}
	if len(used) != 2 {
		t.Errorf("signed by %v", used)
	}
	signECDSA(ctx, t, alpha, "with none left")
	waitStock(ctx, t, alpha, 2)
	f.Hosts[1].Kill()
	for count(stockOf(ctx, t, alpha)) != 1 {
		select {
		case <-ctx.Done():
			t.Fatal(ctx.Err())
		case <-time.After(20 * time.Millisecond):
		}
	}
	signECDSA(ctx, t, alpha, "after the loss")
}

// uses watches that no presignature is used for two signatures.
type uses struct {
	mu       sync.Mutex
	r        map[string]string // r of every signature: two of one presignature have the same
	sessions map[string]string // presignature to the session that used it, from the audit logs
}

func newUses() *uses { return &uses{r: map[string]string{}, sessions: map[string]string{}} }

// signed notes a signature that a caller has.
func (u *uses) signed(t *testing.T, r *apipb.SignResponse, message string) {
	t.Helper()
	u.mu.Lock()
	defer u.mu.Unlock()
	if other, again := u.r[string(r.Fixed[:32])]; again {
		t.Errorf("%q and %q were signed with one nonce", message, other)
	}
	u.r[string(r.Fixed[:32])] = message
}

// audit reads what all hosts wrote before they used a presignature.
func (u *uses) audit(t *testing.T, f *testenv.Fleet) {
	t.Helper()
	for _, h := range f.Hosts {
		b, err := os.ReadFile(filepath.Join(h.State(), "audit.log"))
		must(t, err)
		here := map[string]bool{}
		for line := range bytes.Lines(b) {
			var e struct{ Session, Presignature string }
			if json.Unmarshal(line, &e) != nil || e.Presignature == "" {
				continue // the last line may be torn
			}
			if here[e.Presignature] {
				t.Errorf("%s used presignature %.16s twice", h.Name, e.Presignature)
			}
			here[e.Presignature] = true
			if other, ok := u.sessions[e.Presignature]; ok && other != e.Session {
				t.Errorf("presignature %.16s was used in sessions %s and %s", e.Presignature, other, e.Session)
			}
			u.sessions[e.Presignature] = e.Session
		}
	}
}

// TestNoPresignatureTwice kills, cuts off and restores hosts around the moment at
// which presignatures are used.
func TestNoPresignatureTwice(t *testing.T) {
	kills := 3 // one of each host, and one of them at the failpoint
	if *soak {
		kills = 200
	}
	ctx, f := newECDSAFleet(t, "presignatures = 1\n", "-tags", "failpoints")
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Duration(kills+20)*time.Minute)
	defer cancel()
	u := newUses()
	// all asks every running host at the same moment, and takes what comes.
	var asked atomic.Int64
	all := func(ctx context.Context, wait func()) (good int64) {
		var wg sync.WaitGroup
		var got atomic.Int64
		for _, h := range f.Hosts {
			for range 2 {
				client := api.Dial(h.AdminSocket())
				wg.Go(func() {
					defer client.Close()
					message := fmt.Sprint("message ", asked.Add(1))
					if r, err := client.Sign(ctx, "token", []byte(message)); err == nil {
						got.Add(1)
						u.signed(t, r, message)
					}
				})
			}
		}
		wait()
		wg.Wait()
		return got.Load()
	}
	once := func(i int) {
		victim := f.Hosts[i%len(f.Hosts)]
		hit := filepath.Join(f.Dir, "hit")
		os.Remove(hit)
		atPoint := i%3 == 0
		if atPoint {
			must(t, victim.Stop(ctx))
			victim.Env = []string{"FAILPOINT=sign/presignature-taken", "FAILPOINT_LOG=" + hit}
			must(t, victim.Start(ctx))
			must(t, f.WaitReady(ctx, "token"))
		}
		for _, h := range f.Hosts {
			waitStock(ctx, t, h, 1)
		}
		asking, stop := context.WithTimeout(ctx, 30*time.Second)
		defer stop()
		all(asking, func() {
			if !atPoint {
				<-time.After(time.Duration(rand.IntN(20_000)) * time.Microsecond) // the experiment, not a wait for something
				victim.Kill()
			}
		})
		if _, err := os.Stat(hit); atPoint && err != nil {
			t.Errorf("kill %d: the place was not reached", i)
		}
		victim.Kill()
		victim.Env = nil
		must(t, victim.Start(ctx))
		must(t, f.WaitReady(ctx, "token"))
		u.audit(t, f)
	}
	for i := range kills {
		once(i)
	}

	// One signer is cut off in the middle and comes back.
	for _, h := range f.Hosts {
		waitStock(ctx, t, h, 1)
	}
	must(t, syscall.Kill(f.Hosts[1].Process().Pid(), syscall.SIGSTOP))
	asking, stop := context.WithTimeout(ctx, time.Second)
	all(asking, func() {})
	stop()
	must(t, syscall.Kill(f.Hosts[1].Process().Pid(), syscall.SIGCONT))
	must(t, f.WaitReady(ctx, "token"))
	u.audit(t, f)

	// A state folder from before is put back.
	alpha := f.Hosts[0]
	waitStock(ctx, t, alpha, 1)
	must(t, alpha.Stop(ctx))
	old := filepath.Join(t.TempDir(), "state")
	must(t, os.CopyFS(old, os.DirFS(alpha.State())))
	must(t, alpha.Start(ctx))
	must(t, f.WaitReady(ctx, "token"))
	waitStock(ctx, t, alpha, 1)
	all(ctx, func() {})
	u.audit(t, f)
	must(t, alpha.Stop(ctx))
	must(t, os.RemoveAll(alpha.State()))
	must(t, os.CopyFS(alpha.State(), os.DirFS(old)))
	must(t, os.Chmod(alpha.State(), 0o700))
	must(t, alpha.Start(ctx))
	must(t, f.WaitReady(ctx, "token"))
	if n := all(ctx, func() {}); n != 6 {
		t.Errorf("%d of 6 requests were signed at the end", n)
	}
	u.audit(t, f)
	if len(u.sessions) < kills || len(u.r) < kills {
		t.Errorf("only %d presignatures and %d signatures in %d kills: the experiment shows little", len(u.sessions), len(u.r), kills)
	}
	t.Logf("%d kills, %d signatures, %d presignatures used", kills, len(u.r), len(u.sessions))
}

// TestAllSchemesAtOnce asks all hosts at the same moment, with all schemes mixed. The
// agents are built with the race detector.
func TestAllSchemesAtOnce(t *testing.T) {
	lasts := 20 * time.Second
	if *soak {
		lasts = 2 * time.Minute
	}
	ctx, f := newFleet(t, "-race", "-gcflags=github.com/cronokirby/saferith=-race=false", "-gcflags=math/big=-race=false") // as in the Makefile
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), lasts+20*time.Minute)
	defer cancel()
	schemes := []string{"ed25519", "ecdsa-p256", "ecdsa-secp256k1", "bip340"}
	f.Keys = ""
	for _, s := range schemes {
		f.Keys += f.Key(s, s, 2)
	}
	f.Limits = "[limits]\nkeygen_deadline = \"10m\"\nsign_deadline = \"5m\"\npresignatures = 2\n"
	must(t, f.WriteRoster(1))
	for _, h := range f.Hosts {
		must(t, h.WriteConfig())
	}
	must(t, f.Start(ctx))
	for _, s := range schemes {
		must(t, f.WaitReady(ctx, s))
	}
	u := newUses()
	end := time.Now().Add(lasts)
	var counts [4]atomic.Int64
	var wg sync.WaitGroup
	for _, h := range f.Hosts {
		for n, scheme := range schemes {
			wg.Go(func() {
				client := api.Dial(h.SignSocket())
				defer client.Close()
				for i := 0; i == 0 || time.Now().Before(end); i++ {
					message := fmt.Sprintf("%s %s %d", h.Name, scheme, i)
					r, err := client.Sign(ctx, scheme, []byte(message))
					if err != nil {
						t.Errorf("%s: %v", message, err)
						return
					}
					if err := verifyScheme(scheme, r, []byte(message)); err != nil {
						t.Errorf("%s: %v", message, err)
					}
					if len(r.Fixed) > 0 {
						u.signed(t, r, message)
					}
					counts[n].Add(1)
				}
			})
		}
	}
	wg.Wait()
	u.audit(t, f)
	for n, scheme := range schemes {
		t.Logf("%s: %d signatures", scheme, counts[n].Load())
	}
	for _, h := range f.Hosts {
		log, err := os.ReadFile(h.LogFile())
		must(t, err)
		if bytes.Contains(log, []byte("DATA RACE")) {
			t.Errorf("%s: %s", h.Name, log)
		}
	}
}

func verifyScheme(scheme string, r *apipb.SignResponse, message []byte) error {
	good := false
	if scheme == "ed25519" {
		key, err := x509.ParsePKIXPublicKey(r.PublicKey)
		if err != nil {
			return err
		}
		good = ed25519.Verify(key.(ed25519.PublicKey), message, r.Signature)
	} else {
		curve, point, err := cmp.ParseSPKI(r.PublicKey)
		if err != nil {
			return err
		}
		if scheme == "bip340" {
			good = taproot.Verify([32]byte(point[1:]), message, [64]byte(r.Signature))
		} else {
			sig, err := cmp.ParseSignature(r.Signature)
			if err != nil {
				return err
			}
			good = curve.Verify(point, sha256.Sum256(message), sig)
		}
	}
	if !good {
		return errors.New("the signature does not verify")
	}
	return nil
}
