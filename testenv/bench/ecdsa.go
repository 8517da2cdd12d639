package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"strconv"
	"time"

	"conseal/agent/api"
	"conseal/protocol"
	"conseal/protocol/cmp"
	"conseal/testenv"
)

const (
	onlineSamples = 12
	fullSamples   = 6
)

var errStuck = errors.New("a session got stuck")

// ecdsa measures a key of 2 of 3 hosts.
func ecdsa(ctx context.Context, bin testenv.Binaries, scheme string, curve *cmp.Curve) error {
	name := scheme + "/2of3/"
	start := time.Now()
	shares, err := ecdsaKey(curve)
	if err != nil {
		return err
	}
	print(name+"in-process-keygen", time.Since(start).Seconds(), "s")
	online := make([]time.Duration, onlineSamples)
	for i := range online {
		if online[i], err = ecdsaOnline(shares); err != nil {
			return err
		}
	}
	alone := middle(online)
	print(name+"in-process-online-p50", ms(alone), "ms")
	return ecdsaFleet(ctx, bin, name, scheme, alone)
}

// ecdsaFleet measures the agents: making the key, filling the stock, signing with it,
// and without.
func ecdsaFleet(ctx context.Context, bin testenv.Binaries, name, scheme string, alone time.Duration) (err error) {
	f, err := testenv.NewFleet(ctx, bin, "tpm", "tpm", "hsm")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	f.Level = "warn"
	f.Limits = fmt.Sprintf("[limits]\npresignatures = %d\n", onlineSamples/2)
	if err := f.Init(ctx); err != nil {
		return err
	}
	f.Keys = f.Key("bench", scheme, 2)
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
	print(name+"start-to-ready", time.Since(start).Seconds(), "s")
	if peak, err := peakMemory(f.Hosts[0].Process().Pid()); err != nil {
		return err
	} else {
		print(name+"agent-peak-memory", float64(peak)/1024, "MB")
	}
	// Only alpha's stock counts: the others ask for none, and help.
	for _, h := range f.Hosts[1:] {
		f.Limits = "[limits]\npresignatures = 0\n"
		if err := errors.Join(h.WriteConfig(), h.Stop(ctx), h.Start(ctx)); err != nil {
			return err
		}
	}
	if err := f.WaitReady(ctx, "bench"); err != nil {
		return err
	}
	client := api.Dial(f.Hosts[0].AdminSocket())
	defer client.Close()
	start = time.Now()
	before, err := stock(ctx, client)
	if err != nil {
		return err
	}
	made := before
	for made < onlineSamples {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(20 * time.Millisecond):
		}
		if made, err = stock(ctx, client); err != nil {
			return err
		}
	}
	print(name+"presignatures-idle", float64(made-before)/time.Since(start).Minutes(), "1/min")
	sign := func() (time.Duration, error) {
		start := time.Now()
		_, err := client.Sign(ctx, "bench", message())
		return time.Since(start), err
	}
	with := make([]time.Duration, onlineSamples)
	for i := range with {
		if with[i], err = sign(); err != nil {
			return err
		}
	}
	if left, err := stock(ctx, client); err != nil || left > 0 {
		return fmt.Errorf("%d presignatures are left: %w", left, err)
	}
	print(name+"socket-p50", ms(middle(with)), "ms")
	print(name+"ratio-p50", float64(middle(with))/float64(alone), "x")
	without := make([]time.Duration, fullSamples)
	for i := range without {
		if without[i], err = sign(); err != nil {
			return err
		}
	}
	print(name+"socket-without-presignature-p50", ms(middle(without)), "ms")
	return nil
}

func stock(ctx context.Context, client *api.Client) (n int, err error) {
	s, err := client.Status(ctx)
	for _, k := range s.GetKeys() {
		for _, p := range k.Presignatures {
			n += int(p.Ready)
		}
	}
	return n, err
}

// peakMemory is the most that a process had resident, in KB.
func peakMemory(pid int) (int, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, err
	}
	for line := range bytes.Lines(b) {
		if fields := bytes.Fields(line); len(fields) == 3 && string(fields[0]) == "VmHWM:" {
			return strconv.Atoi(string(fields[1]))
		}
	}
	return 0, errors.New("the kernel does not say how much memory the agent had")
}

// exchangeAll runs sessions in one goroutine until all are done.
func exchangeAll[S protocol.Session](sessions map[protocol.HostID]S) error {
	var queue []protocol.Message
	done := 0
	take := func(r protocol.Ready, err error) error {
		queue = append(queue, r.Send...)
		if r.Done {
			done++
		}
		return err
	}
	for _, s := range sessions {
		if err := take(s.Start()); err != nil {
			return err
		}
	}
	for len(queue) > 0 {
		m := queue[0]
		queue = queue[1:]
		if err := take(sessions[m.To].Step(m)); err != nil {
			return err
		}
	}
	if done != len(sessions) {
		return errStuck
	}
	return nil
}

func sessionID() (id protocol.SessionID) {
	rand.Read(id[:])
	return id
}

func ecdsaKey(curve *cmp.Curve) (map[protocol.HostID]*cmp.Share, error) {
	holders := []protocol.HostID{"a", "b", "c"}
	sessions := map[protocol.HostID]*cmp.Keygen{}
	id := sessionID()
	for _, h := range holders {
		k, err := cmp.NewKeygen(curve, cmp.KeygenConfig{Session: id, Self: h, Holders: holders, Quorum: 2})
		if err != nil {
			return nil, err
		}
		sessions[h] = k
	}
	if err := exchangeAll(sessions); err != nil {
		return nil, err
	}
	shares := map[protocol.HostID]*cmp.Share{}
	for h, k := range sessions {
		var err error
		if shares[h], err = k.Result(); err != nil {
			return nil, err
		}
	}
	return shares, nil
}

// ecdsaOnline is how long two signers in one process take from a presignature to a
// signature.
func ecdsaOnline(shares map[protocol.HostID]*cmp.Share) (time.Duration, error) {
	signers := []protocol.HostID{"a", "b"}
	presigns := map[protocol.HostID]*cmp.Presign{}
	id := sessionID()
	for _, h := range signers {
		p, err := cmp.NewPresign(cmp.SignConfig{Session: id, Share: shares[h], Signers: signers})
		if err != nil {
			return 0, err
		}
		presigns[h] = p
	}
	if err := exchangeAll(presigns); err != nil {
		return 0, err
	}
	pre := map[protocol.HostID]*cmp.Presignature{}
	for h, p := range presigns {
		var err error
		if pre[h], err = p.Result(); err != nil {
			return 0, err
		}
	}
	m := message()
	start := time.Now()
	online := map[protocol.HostID]*cmp.Sign{}
	id = sessionID()
	for _, h := range signers {
		s, err := cmp.NewOnline(id, pre[h], sha256.Sum256(m))
		if err != nil {
			return 0, err
		}
		online[h] = s
	}
	if err := exchangeAll(online); err != nil {
		return 0, err
	}
	_, err := online["a"].Signature()
	return time.Since(start), err
}
