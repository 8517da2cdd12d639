package main

import (
	"context"
	stdecdsa "crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"errors"
	"fmt"
	"sync"
	"time"

	"conseal/agent/api"
	"conseal/protocol"
	"conseal/protocol/dealing"
	"conseal/protocol/frost"
	"conseal/testenv"
)

// renewals measures new shares for ed25519 keys: how long all hosts of one process
// compute at growing numbers of hosts, and what travels between them.
func renewals() error {
	for _, of := range []struct{ quorum, hosts int }{{2, 3}, {3, 5}, {4, 7}, {8, 15}} {
		g, err := newGroup(of.quorum, of.hosts)
		if err != nil {
			return err
		}
		name := fmt.Sprintf("ed25519/%dof%d/refresh-", of.quorum, of.hosts)
		var times []time.Duration
		var bytes, messages int
		for range 9 {
			start := time.Now()
			if bytes, messages, err = g.refresh(); err != nil {
				return err
			}
			times = append(times, time.Since(start))
		}
		print(name+"in-process", ms(middle(times)), "ms")
		print(name+"bytes", float64(bytes), "bytes")
		print(name+"messages", float64(messages), "messages")
	}
	return nil
}

// refresh gives all holders new shares, with the first of them as dealers. It counts
// what the holders send to each other, without what the transport adds.
func (g *group) refresh() (bytes, messages int, err error) {
	keys := map[protocol.HostID]*stdecdsa.PrivateKey{}
	for _, h := range g.holders {
		if keys[h], err = stdecdsa.GenerateKey(elliptic.P256(), rand.Reader); err != nil {
			return 0, 0, err
		}
	}
	id, dealers := sessionID(), g.holders[:g.quorum]
	sessions := map[protocol.HostID]protocol.Session{}
	for i, h := range g.holders {
		cfg := frost.ReshareConfig{Old: g.shares[h].Group, Plan: dealing.Plan{
			Session: id, Self: h, Dealers: dealers, Holders: g.holders, Quorum: g.quorum,
			Sign: func(digest [32]byte) ([]byte, error) { return stdecdsa.SignASN1(rand.Reader, keys[h], digest[:]) },
			Verify: func(host protocol.HostID, digest [32]byte, signature []byte) error {
				if !stdecdsa.VerifyASN1(&keys[host].PublicKey, digest[:], signature) {
					return errors.New("wrong signature")
				}
				return nil
			},
		}}
		if i < g.quorum {
			cfg.Share = g.shares[h]
		}
		r, err := frost.NewReshare(cfg)
		if err != nil {
			return 0, 0, err
		}
		defer r.Close()
		sessions[h] = counting{r, &bytes, &messages}
	}
	if err := exchange(sessions); err != nil {
		return 0, 0, err
	}
	for _, s := range sessions {
		share, err := s.(counting).Reshare.Result()
		if err != nil {
			return 0, 0, err
		}
		share.Wipe()
	}
	return bytes, messages, nil
}

// counting counts what a session sends.
type counting struct {
	*frost.Reshare
	bytes, messages *int
}

func (c counting) count(r protocol.Ready, err error) (protocol.Ready, error) {
	for _, m := range r.Send {
		*c.bytes += len(m.Body)
		*c.messages++
	}
	return r, err
}

func (c counting) Start() (protocol.Ready, error)                  { return c.count(c.Reshare.Start()) }
func (c counting) Step(m protocol.Message) (protocol.Ready, error) { return c.count(c.Reshare.Step(m)) }

// renewed measures refreshes of a fleet's key and what they do to a caller who signs all
// the while: the latency of its requests during them, against that of before.
func renewed(ctx context.Context, f *testenv.Fleet, name string, before latency) error {
	client := api.Dial(f.Hosts[0].SignSocket())
	defer client.Close()
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	var signing sync.WaitGroup
	var during []time.Duration
	var failed error
	signing.Go(func() {
		for ctx.Err() == nil {
			start := time.Now()
			if _, err := client.Sign(ctx, "bench", message()); err != nil {
				if ctx.Err() == nil {
					failed = err
				}
				return
			}
			during = append(during, time.Since(start))
		}
	})
	var times []time.Duration
	for range 9 {
		start := time.Now()
		if _, err := f.Hosts[0].Client().Refresh(ctx, "bench"); err != nil {
			return err
		}
		times = append(times, time.Since(start))
	}
	stop()
	signing.Wait()
	if failed != nil || len(during) == 0 {
		return fmt.Errorf("%d signatures during refreshes: %w", len(during), failed)
	}
	print(name+"refresh", ms(middle(times)), "ms")
	print(name+"socket-p50-in-refreshes", ms(percentile(during, 50)), "ms")
	print(name+"socket-p99-in-refreshes", ms(percentile(during, 99)), "ms")
	print(name+"refresh-ratio-p50", float64(percentile(during, 50))/float64(before.p50), "x")
	print(name+"refresh-ratio-p99", float64(percentile(during, 99))/float64(before.p99), "x")
	return nil
}
