// Command bench measures signatures over the socket of a running fleet against
// the same code in one process, in one run on one machine. It prints one figure a
// line: bench NAME VALUE UNIT.
package main

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"conseal/agent/api"
	"conseal/hsm/helper"
	"conseal/protocol"
	"conseal/protocol/cmp"
	"conseal/protocol/frost"
	"conseal/testenv"
)

func main() {
	if helper.Called() {
		os.Exit(helper.Main())
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, unix.SIGTERM)
	err := run(ctx, strings.Join(os.Args[1:], " "))
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

// run measures all, or only the operations of the "hardware".
func run(ctx context.Context, only string) error {
	switch only {
	case "":
	case "hardware":
		return errors.Join(tpmOperations(ctx), hsmOperations(ctx))
	default:
		return fmt.Errorf("%q is not measured by itself: only \"hardware\" is", only)
	}
	bin, err := testenv.Build(ctx)
	if err != nil {
		return err
	}
	defer testenv.Clean()
	for _, shape := range []struct {
		quorum     int
		protectors []string
	}{
		{2, []string{"tpm", "tpm", "hsm"}},
		{3, []string{"tpm", "tpm", "hsm", "tpm", "hsm"}},
	} {
		if err := ed25519(ctx, bin, shape.quorum, shape.protectors); err != nil {
			return err
		}
	}
	if err := errors.Join(renewals(), tpmOperations(ctx), hsmOperations(ctx)); err != nil {
		return err
	}
	for scheme, curve := range map[string]*cmp.Curve{"ecdsa-p256": cmp.P256, "ecdsa-secp256k1": cmp.Secp256k1} {
		if err := ecdsa(ctx, bin, scheme, curve); err != nil {
			return err
		}
	}
	return nil
}

func middle(times []time.Duration) time.Duration {
	return percentile(times, 50)
}

func percentile(times []time.Duration, of int) time.Duration {
	return slices.Sorted(slices.Values(times))[len(times)*of/100]
}

func print(name string, value float64, unit string) {
	fmt.Printf("bench %s %.3g %s\n", name, value, unit)
}

func ms(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }

// Requests measured one after the other, and how long each rate is measured.
const (
	samples  = 1000
	interval = 5 * time.Second
)

func ed25519(ctx context.Context, bin testenv.Binaries, quorum int, protectors []string) error {
	name := fmt.Sprintf("ed25519/%dof%d/", quorum, len(protectors))
	g, err := newGroup(quorum, len(protectors))
	if err != nil {
		return err
	}
	alone, err := percentiles(func() error { return g.sign() })
	if err != nil {
		return err
	}
	print(name+"in-process-p50", ms(alone.p50), "ms")
	aloneRate, err := rate(runtime.GOMAXPROCS(0), func() error { return g.sign() })
	if err != nil {
		return err
	}
	print(name+"in-process-rate", aloneRate, "signatures/s")
	return overSocket(ctx, bin, name, quorum, protectors, alone, aloneRate)
}

// overSocket measures a fleet as it runs in production, fsyncs and all.
func overSocket(ctx context.Context, bin testenv.Binaries, name string, quorum int, protectors []string, alone latency, aloneRate float64) (err error) {
	f, err := testenv.NewFleet(ctx, bin, protectors...)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	f.Level = "warn"
	f.Limits = "[limits]\ncaller_rate = 1000000\npeer_rate = 1000000\n"
	if err := f.Init(ctx); err != nil {
		return err
	}
	f.Keys = f.Key("bench", "ed25519", quorum)
	if err := f.WriteRoster(1); err != nil {
		return err
	}
	start := time.Now()
	if err := f.Start(ctx); err != nil {
		return err
	}
	if err := f.WaitReady(ctx, "bench"); err != nil {
		return err
	}
	print(name+"start-to-ready", ms(time.Since(start)), "ms")
	client := api.Dial(f.Hosts[0].SignSocket())
	defer client.Close()
	sign := func() error {
		_, err := client.Sign(ctx, "bench", message())
		return err
	}
	socket, err := percentiles(sign)
	if err != nil {
		return err
	}
	print(name+"socket-p50", ms(socket.p50), "ms")
	print(name+"socket-p99", ms(socket.p99), "ms")
	print(name+"ratio-p50", float64(socket.p50)/float64(alone.p50), "x")
	for _, callers := range []int{1, 8, 32} {
		r, err := rate(callers, sign)
		if err != nil {
			return err
		}
		print(fmt.Sprintf("%srate-%d", name, callers), r, "signatures/s")
		print(fmt.Sprintf("%sshare-%d", name, callers), 100*r/aloneRate, "%")
	}
	return renewed(ctx, f, name, socket)
}

func message() []byte {
	m := make([]byte, 256)
	rand.Read(m)
	return m
}

type latency struct{ p50, p99 time.Duration }

func percentiles(f func() error) (latency, error) {
	for range 50 { // warm up
		if err := f(); err != nil {
			return latency{}, err
		}
	}
	times := make([]time.Duration, samples)
	for i := range times {
		start := time.Now()
		if err := f(); err != nil {
			return latency{}, err
		}
		times[i] = time.Since(start)
	}
	slices.Sort(times)
	return latency{times[samples/2], times[samples*99/100]}, nil
}

// rate counts how often f ends in a second with so many callers at once.
func rate(callers int, f func() error) (float64, error) {
	var count atomic.Int64
	var wg sync.WaitGroup
	failed := make(chan error, callers)
	start := time.Now()
	for range callers {
		wg.Go(func() {
			for time.Since(start) < interval {
				if err := f(); err != nil {
					failed <- err
					return
				}
				count.Add(1)
			}
		})
	}
	wg.Wait()
	select {
	case err := <-failed:
		return 0, err
	default:
		return float64(count.Load()) / time.Since(start).Seconds(), nil
	}
}

// group is a key whose holders are all in this process.
type group struct {
	holders []protocol.HostID
	shares  map[protocol.HostID]*frost.Share
	quorum  int
}

func newGroup(quorum, n int) (*group, error) {
	g := &group{quorum: quorum, shares: map[protocol.HostID]*frost.Share{}}
	for i := range n {
		g.holders = append(g.holders, protocol.HostID(fmt.Sprintf("host%02d", i)))
	}
	sessions := map[protocol.HostID]protocol.Session{}
	for _, h := range g.holders {
		k, err := frost.NewKeygen(frost.KeygenConfig{Self: h, Holders: g.holders, Quorum: quorum})
		if err != nil {
			return nil, err
		}
		sessions[h] = k
	}
	if err := exchange(sessions); err != nil {
		return nil, err
	}
	for h, s := range sessions {
		share, err := s.(*frost.Keygen).Result()
		if err != nil {
			return nil, err
		}
		g.shares[h] = share
		s.Close()
	}
	return g, nil
}

// sign makes one signature with the first holders, the first as coordinator.
func (g *group) sign() error {
	signers, m := g.holders[:g.quorum], message()
	sessions := map[protocol.HostID]protocol.Session{}
	for _, h := range signers {
		s, err := frost.NewSign(frost.SignConfig{
			Self: h, Coordinator: signers[0], Signers: signers, Group: g.shares[h].Group, Share: g.shares[h], Message: m,
		})
		if err != nil {
			return err
		}
		defer s.Close()
		sessions[h] = s
	}
	if err := exchange(sessions); err != nil {
		return err
	}
	_, err := sessions[signers[0]].(*frost.Sign).Signature() // verified by the coordinator
	return err
}

// exchange carries messages between sessions until none is left.
func exchange(sessions map[protocol.HostID]protocol.Session) error {
	var queue []protocol.Message
	for _, s := range sessions {
		ready, err := s.Start()
		if err != nil {
			return err
		}
		queue = append(queue, ready.Send...)
	}
	for len(queue) > 0 {
		m := queue[0]
		queue = queue[1:]
		ready, err := sessions[m.To].Step(m)
		if err != nil {
			return err
		}
		queue = append(queue, ready.Send...)
	}
	return nil
}
