package agent

import (
	"context"

	"connectrpc.com/connect"

	"conseal/agent/api/apipb"
)

// SealControl is the seal policies of a host whose TPM opens by them.
type SealControl interface {
	// Measure describes the host's measured state in a document.
	Measure(context.Context) ([]byte, error)
	// Policies says what is installed and what the TPM makes of it.
	Policies(context.Context) (*apipb.PoliciesResponse, error)
	// Install takes a policy, or does what a revocation says, and says what it did.
	Install(ctx context.Context, document []byte) (done string, err error)
}

// sealAPI serves the Seal service.
type sealAPI struct{ a *Agent }

func (s sealAPI) control() (SealControl, error) {
	if s.a.seal == nil {
		return nil, &apiError{connect.CodeFailedPrecondition, "NO_POLICIES", "this host does not open by signed seal policies",
			"only a host with a TPM does, whose `protector.tpm.policy_key` was set when it was initialised; see docs/seal-policy.md"}
	}
	return s.a.seal, nil
}

// Measure describes the host's measured state.
func (s sealAPI) Measure(ctx context.Context, _ *apipb.MeasureRequest) (*apipb.MeasureResponse, error) {
	control, err := s.control()
	if err != nil {
		return nil, err
	}
	document, err := control.Measure(ctx)
	return &apipb.MeasureResponse{Document: document}, sealError(err)
}

// Policies says what is installed.
func (s sealAPI) Policies(ctx context.Context, _ *apipb.PoliciesRequest) (*apipb.PoliciesResponse, error) {
	control, err := s.control()
	if err != nil {
		return nil, err
	}
	out, err := control.Policies(ctx)
	return out, sealError(err)
}

// Install takes a signed document and has the vault tried again.
func (s sealAPI) Install(ctx context.Context, r *apipb.InstallRequest) (*apipb.InstallResponse, error) {
	control, err := s.control()
	if err != nil {
		return nil, err
	}
	done, err := control.Install(ctx, r.Document)
	if err != nil {
		return nil, &apiError{connect.CodeInvalidArgument, "NOT_INSTALLED", err.Error(), "nothing was changed; `conseal seal status` shows what is installed"}
	}
	s.a.log.Info("seal policy", "done", done)
	s.a.vaultNow.Store(true)
	s.a.nudge()
	return &apipb.InstallResponse{Done: done}, nil
}

func sealError(err error) error {
	if err == nil {
		return nil
	}
	return &apiError{connect.CodeUnavailable, "HARDWARE", err.Error(), "see what the message says; nothing was changed"}
}
