package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/cenkalti/backoff/v5"

	"conseal/agent/api"
	"conseal/agent/api/apipb"
)

var errNotReady = errors.New("not ready")

// waitReady asks for a key until it is ready, or for as long as wait says.
func waitReady(ctx context.Context, client *api.Client, name string, wait time.Duration) (*apipb.Key, error) {
	if wait <= 0 {
		return client.GetKey(ctx, name)
	}
	policy := backoff.NewExponentialBackOff()
	policy.InitialInterval, policy.MaxInterval = 20*time.Millisecond, time.Second
	var last *apipb.Key
	_, err := backoff.Retry(ctx, func() (*apipb.Key, error) {
		k, err := client.GetKey(ctx, name)
		var refused *api.Error
		switch {
		case errors.As(err, &refused) && refused.Reason != "NO_AGENT":
			return nil, backoff.Permanent(err)
		case err != nil:
			return nil, err
		}
		if last = k; k.Condition != "ready" {
			return nil, errNotReady
		}
		return k, nil
	}, backoff.WithBackOff(policy), backoff.WithMaxElapsedTime(wait))
	if errors.Is(err, errNotReady) {
		return nil, fmt.Errorf("key %q is not ready after %s: %s: %s", name, wait, last.Condition, last.Detail)
	}
	return last, err
}
