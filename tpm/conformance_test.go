package tpm_test

import (
	"testing"

	"conseal/agent/vault"
	"conseal/agent/vault/vaulttest"
)

func TestConformance(t *testing.T) {
	vaulttest.Run(t, func(t *testing.T) vaulttest.Host {
		h := newHost(t)
		return vaulttest.Host{
			Protector: h.TPM,
			Reopen:    func() vault.Protector { return open(t, h.cfg) },
		}
	})
}
