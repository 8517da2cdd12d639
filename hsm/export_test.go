package hsm

// Reencode decodes and encodes a blob.
func Reencode(b []byte) ([]byte, error) {
	e, err := decodeEnvelope(b)
	if err != nil {
		return nil, err
	}
	return e.encode(), nil
}

// GuessErasure guesses what destroying a key is worth.
var GuessErasure = guessErasure
