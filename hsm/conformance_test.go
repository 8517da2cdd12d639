//go:build cgo

package hsm_test

import (
	"testing"

	"conseal/agent/vault"
	"conseal/agent/vault/vaulttest"
)

func TestConformance(t *testing.T) {
	vaulttest.Run(t, func(t *testing.T) vaulttest.Host {
		h, cfg := newHost(t)
		return vaulttest.Host{
			Protector: h,
			Reopen:    func() vault.Protector { return open(t, cfg) },
			State:     cfg.StateDir,
		}
	})
}
