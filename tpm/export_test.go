package tpm

// RecodeSealed decodes a blob of Seal and encodes it again.
func RecodeSealed(blob []byte) ([]byte, error) {
	s, err := decodeSealed(blob)
	if err != nil {
		return nil, err
	}
	return s.encode(), nil
}

// RecodeIdentity decodes a blob of an identity and encodes it again.
func RecodeIdentity(blob []byte) ([]byte, error) {
	k, err := decodeIdentity(blob)
	if err != nil {
		return nil, err
	}
	return k.encode(), nil
}
