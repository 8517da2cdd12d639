package cmp

import (
	"slices"

	"github.com/luxfi/threshold/pkg/math/curve"
	"github.com/luxfi/threshold/pkg/party"

	"conseal/protocol/guard"
)

// Sizes in bytes of what the module sends. The intervals of CGGMP's proofs are, in
// bits, l = 256, l' = 1280 and epsilon = 512, and a modulus has 2048; each number
// travels at the full length of its interval.
const (
	digestSize  = 64
	ridSize     = 32
	modulusSize = 256
	cipherSize  = 2 * modulusSize

	intLEps        = 97  // (l + epsilon) / 8 + 1
	intLPrimeEps   = 225 // (l' + epsilon) / 8 + 1
	intLEpsN       = 353 // with a modulus more
	intFacSigma    = 544
	intFacV        = 609
	proofResponses = 80
)

func number() guard.Shape     { return guard.Bytes(modulusSize) }
func ciphertext() guard.Shape { return guard.Bytes(cipherSize) }

// keygenRounds are those of key generation and, with refresh, of a refresh, whose
// polynomials have no constant.
func keygenRounds(g curve.Curve, quorum int, refresh bool) []guard.Round {
	coefficients := quorum
	if refresh {
		coefficients--
	}
	return []guard.Round{
		{Number: 2, Broadcast: guard.Same(guard.Fields("Commitment", guard.Bytes(digestSize)))},
		{Number: 3, Broadcast: guard.Same(guard.Fields("RID C VSSPolynomial SchnorrCommitments ElGamalPublic N S T Decommitment",
			guard.Bytes(ridSize), guard.Bytes(ridSize), guard.Polynomial(g, coefficients, refresh), guard.Fields("C", guard.Point(g)),
			guard.Point(g), guard.Modulus(modulusSize), number(), number(), guard.Bytes(ridSize)))},
		{
			Number: 4,
			Broadcast: guard.Same(guard.Fields("Mod Prm",
				guard.Fields("W Responses", guard.BigInt(modulusSize), guard.Array(proofResponses,
					guard.Fields("A B X Z", guard.Bool(), guard.Bool(), guard.BigInt(modulusSize), guard.BigInt(modulusSize)))),
				guard.Fields("As Zs", guard.Array(proofResponses, guard.BigInt(modulusSize)), guard.Array(proofResponses, guard.BigInt(modulusSize))))),
			Direct: guard.Fields("Share Fac", ciphertext(), guard.Fields("Comm Sigma Z1 Z2 W1 W2 V",
				guard.Fields("P Q A B T", number(), number(), number(), number(), number()), guard.Int(intFacSigma),
				guard.Int(intLPrimeEps), guard.Int(intLPrimeEps), guard.Int(intLEpsN), guard.Int(intLEpsN), guard.Int(intFacV))),
		},
		{Number: 5, Broadcast: guard.Same(guard.Fields("SchnorrResponse", guard.Fields("Z", guard.Scalar(g))))},
	}
}

func affG(g curve.Curve) guard.Shape {
	return guard.Fields("A Bx By E S F T Z1 Z2 Z3 Z4 W Wy", ciphertext(), guard.Point(g), ciphertext(), number(), number(), number(), number(),
		guard.Int(intLEps), guard.Int(intLPrimeEps), guard.Int(intLEpsN), guard.Int(intLEpsN), number(), number())
}

func affP() guard.Shape {
	return guard.Fields("A Bx By E S F T Z1 Z2 Z3 Z4 W Wx Wy", ciphertext(), ciphertext(), ciphertext(), number(), number(), number(), number(),
		guard.Int(intLEps), guard.Int(intLPrimeEps), guard.Int(intLEpsN), guard.Int(intLEpsN), number(), number(), number())
}

func logStar(g curve.Curve) guard.Shape {
	return guard.Fields("S A Y D Z1 Z2 Z3", number(), ciphertext(), guard.Point(g), number(), guard.Int(intLEps), number(), guard.Int(intLEpsN))
}

func elog(g curve.Curve) guard.Shape {
	return guard.Fields("A N B Z U", guard.Point(g), guard.Point(g), guard.Point(g), guard.Scalar(g), guard.Scalar(g))
}

func elGamal(g curve.Curve) guard.Shape {
	return guard.Fields("L M", guard.Point(g), guard.Point(g))
}

// signRounds are those of a signature without a presignature.
func signRounds(g curve.Curve) []guard.Round {
	return []guard.Round{
		{
			Number:    2,
			Broadcast: guard.Same(guard.Fields("K G", ciphertext(), ciphertext())),
			Direct: guard.Fields("ProofEnc", guard.Fields("S A C Z1 Z2 Z3", number(), ciphertext(), number(),
				guard.Int(intLEps), number(), guard.Int(intLEpsN))),
		},
		{
			Number:    3,
			Broadcast: guard.Same(guard.Fields("BigGammaShare", guard.Point(g))),
			Direct: guard.Fields("DeltaD DeltaF DeltaProof ChiD ChiF ChiProof ProofLog",
				ciphertext(), ciphertext(), affG(g), ciphertext(), ciphertext(), affG(g), logStar(g)),
		},
		{
			Number:    4,
			Broadcast: guard.Same(guard.Fields("DeltaShare BigDeltaShare", guard.Scalar(g), guard.Point(g))),
			Direct:    guard.Fields("ProofLog", logStar(g)),
		},
		{Number: 5, Broadcast: guard.Same(guard.Fields("SigmaShare", guard.Scalar(g)))},
	}
}

// presignRounds are those of presigning by signers. Those in which the module would
// look for a culprit are not among them: it blames the innocent, and tells secrets.
func presignRounds(g curve.Curve, signers []party.ID) []guard.Round {
	toOthers := func(from party.ID) guard.Shape {
		others := slices.DeleteFunc(slices.Clone(signers), func(id party.ID) bool { return id == from })
		return guard.Fields("DeltaCiphertext ChiCiphertext", guard.Parties(others, ciphertext()), guard.Parties(others, ciphertext()))
	}
	return []guard.Round{
		{
			Number:    2,
			Broadcast: guard.Same(guard.Fields("K G Z CommitmentID", ciphertext(), ciphertext(), elGamal(g), guard.Bytes(digestSize))),
			Direct: guard.Fields("Proof", guard.Fields("S D Y Z T Z1 W Z2 Z3", number(), ciphertext(), guard.Point(g), guard.Point(g), number(),
				guard.Int(intLEps), guard.Scalar(g), number(), guard.Int(intLEpsN))),
		},
		{
			Number:    3,
			Broadcast: toOthers,
			Direct:    guard.Fields("DeltaF DeltaProof ChiF ChiProof", ciphertext(), affP(), ciphertext(), affG(g)),
		},
		{Number: 4, Broadcast: guard.Same(guard.Fields("DeltaShare ElGamalChi", guard.Scalar(g), elGamal(g)))},
		{
			Number:    5,
			Broadcast: guard.Same(guard.Fields("BigGammaShare", guard.Point(g))),
			Direct:    guard.Fields("ProofLog", logStar(g)),
		},
		{Number: 6, Broadcast: guard.Same(guard.Fields("BigDeltaShare Proof", guard.Point(g), elog(g)))},
		{Number: 7, Broadcast: guard.Same(guard.Fields("S Proof DecommitmentID PresignatureID",
			guard.Point(g), elog(g), guard.Bytes(ridSize), guard.Bytes(ridSize)))},
	}
}

// onlineRounds are those of a signature with a presignature.
func onlineRounds(g curve.Curve) []guard.Round {
	return []guard.Round{{Number: 8, Broadcast: guard.Same(guard.Fields("Sigma", guard.Scalar(g)))}}
}
