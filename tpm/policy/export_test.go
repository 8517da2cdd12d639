package policy

// Signatures lets tests compare statements whole.
type Signatures = signatures
