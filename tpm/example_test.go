package tpm_test

import (
	"context"
	"fmt"

	"conseal/tpm"
)

// A host is provisioned once; what that returns is kept and given to Open.
func Example() {
	ctx := context.Background()
	cfg := tpm.Config{Device: "device:/dev/tpmrm0", PCRs: []int{7}}
	made, err := tpm.Provision(ctx, cfg)
	if err != nil {
		fmt.Println(err) // says which TPM, what failed and what to do
		return
	}
	cfg.SRKName, cfg.PCRWanted = made.SRKName, made.PCRWanted

	t, err := tpm.Open(ctx, cfg)
	if err != nil {
		fmt.Println(err)
		return
	}
	defer t.Close(ctx)
	key, blob, err := t.Seal(ctx, "payments/1")
	if err != nil {
		fmt.Println(err)
		return
	}
	key.Wipe()
	key, err = t.Open(ctx, "payments/1", blob) // in the same measured state only
	if err != nil {
		fmt.Println(err)
		return
	}
	defer key.Wipe()
}
