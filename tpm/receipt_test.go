package tpm_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"strings"
	"testing"

	"github.com/google/go-tpm/tpm2"

	"conseal/testenv"
	"conseal/tpm"
	"conseal/tpm/attest"
	"conseal/tpm/policy"
)

func receipt(t *testing.T, h *host, statement string) *attest.Receipt {
	t.Helper()
	r, err := h.Receipt(t.Context(), []byte(statement))
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// verifier is who has attested a host before, and knows nothing else of it.
type verifier struct {
	ak      *ecdsa.PublicKey
	counter attest.Counter
}

func newVerifier(t *testing.T, h *host) *verifier {
	t.Helper()
	sent, pending := challenge(t, claim(t, h))
	got, err := pending.Verify(prove(t, h, h.made.Identity, sent), h.cfg.PCRs)
	if err != nil {
		t.Fatal(err)
	}
	pin := h.cfg.PINSource != ""
	digest, err := got.PCRs.AuthPolicy(pin)
	if h.cfg.Authority != nil {
		digest, err = h.cfg.Authority.AuthPolicy()
	}
	if err != nil {
		t.Fatal(err)
	}
	return &verifier{got.AK, attest.Counter{Index: tpm.DefaultNVReceipts, Policy: digest, PIN: pin}}
}

func (v *verifier) value(t *testing.T, r *attest.Receipt, statement string) uint64 {
	t.Helper()
	n, err := attest.VerifyReceipt(r, v.ak, v.counter, []byte(statement))
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// undefine removes an index as the TPM's owner may, and returns what was there.
func undefine(t *testing.T, h *host, index uint32) *tpm2.TPMSNVPublic {
	t.Helper()
	found, err := tpm2.NVReadPublic{NVIndex: tpm2.TPMHandle(index)}.Execute(h.tap)
	if err != nil {
		t.Fatal(err)
	}
	_, err = tpm2.NVUndefineSpace{AuthHandle: tpm2.TPMRHOwner, NVIndex: tpm2.NamedHandle{Handle: tpm2.TPMHandle(index), Name: found.NVName}}.Execute(h.tap)
	if err != nil {
		t.Fatal(err)
	}
	public, err := found.NVPublic.Contents()
	if err != nil {
		t.Fatal(err)
	}
	return public
}

func TestReceipts(t *testing.T) {
	m := newTeam(t)
	governed := newGovernedHost(t, m, 4, 7)
	m.allow(t, governed, "now")
	for name, h := range map[string]*host{"fixed state": newHost(t), "signed policy": governed} {
		t.Run(name, func(t *testing.T) {
			v := newVerifier(t, h)
			first := receipt(t, h, "share 1 is deleted")
			last := v.value(t, first, "share 1 is deleted")
			next := func(when string) {
				n := v.value(t, receipt(t, h, when), when)
				if n != last+1 {
					t.Errorf("%s: %d after %d", when, n, last)
				}
				last = n
			}
			next("at once")
			next("at once") // the same statement is another event
			h.reboot(t)
			h.TPM = open(t, h.cfg)
			next("after a reboot")
			h.device.Kill()
			h.reboot(t)
			h.TPM = open(t, h.cfg)
			next("after a power cut")
			if n := v.value(t, first, "share 1 is deleted"); n >= last {
				t.Errorf("the first receipt has %d, the last %d", n, last)
			}
			if _, err := h.Receipt(t.Context(), nil); err == nil {
				t.Error("a receipt of nothing")
			}
			wantNoHandles(t, h.tap)
		})
	}
}

func TestReceiptsNeedThePermittedState(t *testing.T) {
	h := newHost(t)
	v := newVerifier(t, h)
	before := v.value(t, receipt(t, h, "a"), "a")
	h.extend(t, 7, "another kernel")
	_, err := h.Receipt(t.Context(), []byte("b"))
	wantChanged(t, err, 7)
	h.reboot(t)
	h.TPM = open(t, h.cfg)
	if n := v.value(t, receipt(t, h, "b"), "b"); n != before+1 {
		t.Errorf("%d after %d: it was counted up in another state", n, before)
	}

	m := newTeam(t)
	g := newGovernedHost(t, m, 7)
	_, err = g.Receipt(t.Context(), []byte("a"))
	wantRefused(t, err, "no seal policy is installed")
	m.allow(t, g, "now")
	receipt(t, g, "a")
	g.extend(t, 7, "another kernel")
	_, err = g.Receipt(t.Context(), []byte("a"))
	wantRefused(t, err, "PCR 7")
	wantNoHandles(t, g.tap)
}

// No password, and no policy session that has not shown the state, counts, reads or
// certifies.
func TestNobodyElseCountsReceipts(t *testing.T) {
	h := newHost(t)
	v := newVerifier(t, h)
	template, err := tpm2.Unmarshal[tpm2.TPMTPublic](claim(t, h).AK)
	if err != nil {
		t.Fatal(err)
	}
	ak, err := tpm2.CreatePrimary{PrimaryHandle: tpm2.TPMRHEndorsement, InPublic: tpm2.New2B(*template)}.Execute(h.tap)
	if err != nil {
		t.Fatal(err)
	}
	certify := func(auth tpm2.AuthHandle, index tpm2.NamedHandle) error {
		_, err := tpm2.NVCertify{
			SignHandle: tpm2.AuthHandle{Handle: ak.ObjectHandle, Name: ak.Name, Auth: tpm2.PasswordAuth(nil)}, AuthHandle: auth, NVIndex: index,
			InScheme: tpm2.TPMTSigScheme{Scheme: tpm2.TPMAlgNull}, Size: 8,
		}.Execute(h.tap)
		return err
	}
	readable, err := tpm2.NVReadPublic{NVIndex: tpm2.TPMHandle(0x01c00002)}.Execute(h.tap) // the EK's certificate
	if err != nil {
		t.Fatal(err)
	}
	anybody := tpm2.AuthHandle{Handle: 0x01c00002, Name: readable.NVName, Auth: tpm2.PasswordAuth(nil)}
	if err := certify(anybody, tpm2.NamedHandle{Handle: 0x01c00002, Name: readable.NVName}); err != nil {
		t.Fatalf("the control: %v", err)
	}
	session, closeSession, err := tpm2.PolicySession(h.tap, tpm2.TPMAlgSHA256, 16)
	if err != nil {
		t.Fatal(err)
	}
	var last uint64
	for _, when := range []string{"never counted", "counted"} {
		public, err := tpm2.NVReadPublic{NVIndex: tpm2.TPMHandle(tpm.DefaultNVReceipts)}.Execute(h.tap)
		if err != nil {
			t.Fatal(err)
		}
		index := tpm2.NamedHandle{Handle: tpm.DefaultNVReceipts, Name: public.NVName}
		for name, auth := range map[string]tpm2.AuthHandle{
			"owner":    {Handle: tpm2.TPMRHOwner, Auth: tpm2.PasswordAuth(nil)},
			"platform": {Handle: tpm2.TPMRHPlatform, Auth: tpm2.PasswordAuth(nil)},
			"index":    {Handle: index.Handle, Name: index.Name, Auth: tpm2.PasswordAuth(nil)},
			"policy":   {Handle: index.Handle, Name: index.Name, Auth: session},
		} {
			if _, err := (tpm2.NVIncrement{AuthHandle: auth, NVIndex: index}).Execute(h.tap); err == nil {
				t.Errorf("%s: %s can count up", when, name)
			}
			if _, err := (tpm2.NVRead{AuthHandle: auth, NVIndex: index, Size: 8}).Execute(h.tap); err == nil {
				t.Errorf("%s: %s can read", when, name)
			}
			if err := certify(auth, index); err == nil {
				t.Errorf("%s: %s can certify", when, name)
			}
		}
		n := v.value(t, receipt(t, h, when), when)
		if last != 0 && n != last+1 {
			t.Errorf("%d after %d", n, last)
		}
		last = n
	}
	if err := closeSession(); err != nil {
		t.Fatal(err)
	}
}

// An owner can take the counter away; nothing that it ever said can be said again.
func TestCounterOfReceiptsMadeAnew(t *testing.T) {
	h := newHost(t)
	v := newVerifier(t, h)
	root := setRoot(t, h.TPM)
	receipt(t, h, "a")
	last := v.value(t, receipt(t, h, "b"), "b")

	public := undefine(t, h, tpm.DefaultNVReceipts) // also what a host is that was provisioned before there were receipts
	_, err := h.Receipt(t.Context(), []byte("c"))
	wantClass(t, err, tpm.ClassLost)
	wantRoot(t, h.TPM, root)
	steps := provision(t, h.cfg).Steps
	if !strings.HasSuffix(steps[2], "of receipts: made") {
		t.Errorf("steps %q", steps)
	}
	if n := v.value(t, receipt(t, h, "c"), "c"); n <= last {
		t.Errorf("made anew it says %d, it said %d", n, last)
	} else {
		last = n
	}

	for name, weaken := range map[string]func(*tpm2.TPMSNVPublic){
		"the owner counts":  func(p *tpm2.TPMSNVPublic) { p.Attributes.OwnerWrite = true },
		"anybody reads":     func(p *tpm2.TPMSNVPublic) { p.Attributes.AuthRead = true },
		"an ordinary index": func(p *tpm2.TPMSNVPublic) { p.Attributes.NT = tpm2.TPMNTOrdinary },
		"another policy":    func(p *tpm2.TPMSNVPublic) { p.AuthPolicy.Buffer = make([]byte, 32) },
	} {
		undefine(t, h, tpm.DefaultNVReceipts)
		weak := *public
		weak.Attributes.Written = false
		weaken(&weak)
		if _, err := (tpm2.NVDefineSpace{AuthHandle: tpm2.TPMRHOwner, PublicInfo: tpm2.New2B(weak)}).Execute(h.tap); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		_, err := h.Receipt(t.Context(), []byte("d"))
		wantClass(t, err, tpm.ClassLost)
		_, err = tpm.Provision(t.Context(), h.cfg)
		wantClass(t, err, tpm.ClassLost)
		if _, err := tpm.Withdraw(t.Context(), h.cfg); err == nil {
			t.Errorf("%s: it was removed as ours", name)
		}
	}

	// A cleared TPM has the same attestation key, and its counters go on above.
	_, err = tpm2.Clear{AuthHandle: tpm2.AuthHandle{Handle: tpm2.TPMRHLockout, Auth: tpm2.PasswordAuth(nil)}}.Execute(h.tap)
	if err != nil {
		t.Fatal(err)
	}
	h.cfg.SRKName, h.cfg.PCRWanted, h.cfg.Identity = nil, nil, nil
	h.cfg = remember(h.cfg, provision(t, h.cfg))
	h.TPM = open(t, h.cfg)
	if n := v.value(t, receipt(t, h, "e"), "e"); n <= last {
		t.Errorf("cleared it says %d, it said %d", n, last)
	}
	wantNoHandles(t, h.tap)
}

// What passes on the bus is altered, or never reaches the TPM.
func TestReceiptsOverABadBus(t *testing.T) {
	h := newHost(t)
	v := newVerifier(t, h)
	last := v.value(t, receipt(t, h, "a"), "a")
	for name, c := range map[string]struct {
		command   tpm2.TPMCC
		intercept func(cmd []byte, next testenv.Exchange) ([]byte, error)
	}{
		"counting forged": {tpm2.TPMCCNVIncrement, func(cmd []byte, _ testenv.Exchange) ([]byte, error) { return forgedSuccess(cmd, 2), nil }},
		"a value altered": {tpm2.TPMCCNVCertify, func(cmd []byte, next testenv.Exchange) ([]byte, error) {
			answer, err := next(cmd)
			if err == nil {
				answer[100] ^= 1
			}
			return answer, err
		}},
		"a statement altered": {tpm2.TPMCCNVCertify, func(cmd []byte, next testenv.Exchange) ([]byte, error) {
			cmd[len(cmd)-10] ^= 1
			return next(cmd)
		}},
	} {
		t.Run(name, func(t *testing.T) {
			hits := 0
			h.tap.Intercept(func(cmd []byte, next testenv.Exchange) ([]byte, error) {
				if code(cmd) != c.command {
					return next(cmd)
				}
				hits++
				return c.intercept(cmd, next)
			})
			_, err := h.Receipt(t.Context(), []byte("b"))
			h.tap.Intercept(nil)
			if hits == 0 || err == nil {
				t.Fatalf("altered %d times: %v", hits, err)
			}
		})
	}
	if n := v.value(t, receipt(t, h, "c"), "c"); n <= last {
		t.Errorf("%d after %d", n, last)
	}
	wantNoHandles(t, h.tap)
}

// forgedSuccess answers a command that has no parameters in its answer, with what
// anybody can compute: the HMAC of sessions that are not salted.
func forgedSuccess(cmd []byte, handles int) []byte {
	rest := cmd[10+4*handles:]
	sessions := rest[4 : 4+binary.BigEndian.Uint32(rest)]
	answer := make([]byte, 14)
	for len(sessions) > 0 {
		n := binary.BigEndian.Uint16(sessions[4:])
		nonce, attributes := sessions[6:6+n], sessions[6+n:7+n]
		sessions = sessions[7+n:]
		sessions = sessions[2+binary.BigEndian.Uint16(sessions):]
		rp := sha256.Sum256(append([]byte{0, 0, 0, 0}, cmd[6:10]...))
		mac := hmac.New(sha256.New, nil)
		for _, b := range [][]byte{rp[:], make([]byte, 16), nonce, attributes} {
			mac.Write(b)
		}
		answer = append(append(append(answer, 0, 16), make([]byte, 16)...), attributes...)
		answer = mac.Sum(append(answer, 0, 32))
	}
	binary.BigEndian.PutUint16(answer, 0x8002)
	binary.BigEndian.PutUint32(answer[2:], uint32(len(answer)))
	return answer
}

// forgery is a receipt whose attestation key its author has.
type forgery struct {
	signer    *ecdsa.PrivateKey
	a         tpm2.TPMSAttest
	info      tpm2.TPMSNVCertifyInfo
	ak        *ecdsa.PublicKey
	counter   attest.Counter
	statement string
	spoil     func(*attest.Receipt)
}

func newForgery(t testing.TB) *forgery {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	digest, err := policy.State{7: make([]byte, 32)}.AuthPolicy(false)
	if err != nil {
		t.Fatal(err)
	}
	f := &forgery{
		signer: key, ak: &key.PublicKey, statement: "deleted", spoil: func(*attest.Receipt) {},
		counter: attest.Counter{Index: tpm.DefaultNVReceipts, Policy: digest},
		a: tpm2.TPMSAttest{
			Magic: tpm2.TPMGeneratedValue, Type: tpm2.TPMSTAttestNV,
			ExtraData: tpm2.TPM2BData{Buffer: attest.ReceiptDigest([]byte("deleted"))},
		},
		info: tpm2.TPMSNVCertifyInfo{NVContents: tpm2.TPM2BData{Buffer: binary.BigEndian.AppendUint64(nil, 41)}},
	}
	f.named(t, f.counter.Public(true))
	return f
}

func (f *forgery) named(t testing.TB, public tpm2.TPMSNVPublic) {
	t.Helper()
	name, err := tpm2.NVName(&public)
	if err != nil {
		t.Fatal(err)
	}
	f.info.IndexName = *name
}

func (f *forgery) verify(t testing.TB) (uint64, error) {
	t.Helper()
	switch f.a.Type {
	case tpm2.TPMSTAttestNV:
		f.a.Attested = tpm2.NewTPMUAttest(tpm2.TPMSTAttestNV, &f.info)
	case tpm2.TPMSTAttestNVDigest:
		f.a.Attested = tpm2.NewTPMUAttest(tpm2.TPMSTAttestNVDigest, &tpm2.TPMSNVDigestCertifyInfo{IndexName: f.info.IndexName, NVDigest: tpm2.TPM2BDigest{Buffer: make([]byte, 32)}})
	case tpm2.TPMSTAttestCertify:
		f.a.Attested = tpm2.NewTPMUAttest(tpm2.TPMSTAttestCertify, &tpm2.TPMSCertifyInfo{Name: f.info.IndexName})
	}
	r := f.sign(t, tpm2.Marshal(f.a))
	f.spoil(r)
	return attest.VerifyReceipt(r, f.ak, f.counter, []byte(f.statement))
}

func (f *forgery) sign(t testing.TB, certified []byte) *attest.Receipt {
	t.Helper()
	r := &attest.Receipt{Certified: certified}
	digest := sha256.Sum256(r.Certified)
	x, y, err := ecdsa.Sign(rand.Reader, f.signer, digest[:])
	if err != nil {
		t.Fatal(err)
	}
	r.Signature = tpm2.Marshal(tpm2.TPMTSignature{SigAlg: tpm2.TPMAlgECDSA, Signature: tpm2.NewTPMUSignature(tpm2.TPMAlgECDSA, &tpm2.TPMSSignatureECC{
		Hash: tpm2.TPMAlgSHA256, SignatureR: tpm2.TPM2BECCParameter{Buffer: x.Bytes()}, SignatureS: tpm2.TPM2BECCParameter{Buffer: y.Bytes()},
	})})
	return r
}

func TestLyingReceipts(t *testing.T) {
	if n, err := newForgery(t).verify(t); err != nil || n != 41 {
		t.Fatalf("the control: %d, %v", n, err)
	}
	attribute := func(change func(*tpm2.TPMANV)) func(*forgery) {
		return func(f *forgery) {
			p := f.counter.Public(true)
			change(&p.Attributes)
			f.named(t, p)
		}
	}
	for name, lie := range map[string]struct {
		tell func(f *forgery)
		want string
	}{
		"another statement":     {func(f *forgery) { f.statement = "kept" }, "another statement"},
		"its bare digest":       {func(f *forgery) { d := sha256.Sum256([]byte("deleted")); f.a.ExtraData.Buffer = d[:] }, "another statement"},
		"no qualifying data":    {func(f *forgery) { f.a.ExtraData.Buffer = nil }, "another statement"},
		"no statement":          {func(f *forgery) { f.statement, f.a.ExtraData.Buffer = "", attest.ReceiptDigest(nil) }, "of nothing"},
		"another index":         {func(f *forgery) { p := f.counter.Public(true); p.NVIndex++; f.named(t, p) }, "something else"},
		"another policy":        {func(f *forgery) { f.counter.Policy = make([]byte, 32) }, "something else"},
		"never counted":         {func(f *forgery) { f.named(t, f.counter.Public(false)) }, "something else"},
		"the owner counts":      {attribute(func(a *tpm2.TPMANV) { a.OwnerWrite = true }), "something else"},
		"its password counts":   {attribute(func(a *tpm2.TPMANV) { a.AuthWrite = true }), "something else"},
		"the platform counts":   {attribute(func(a *tpm2.TPMANV) { a.PPWrite = true }), "something else"},
		"no counter":            {attribute(func(a *tpm2.TPMANV) { a.NT = tpm2.TPMNTOrdinary }), "something else"},
		"no name":               {func(f *forgery) { f.info.IndexName.Buffer = nil }, "something else"},
		"four bytes":            {func(f *forgery) { f.info.NVContents.Buffer = f.info.NVContents.Buffer[4:] }, "of 4 bytes at 0"},
		"nine bytes":            {func(f *forgery) { f.info.NVContents.Buffer = make([]byte, 9) }, "of 9 bytes at 0"},
		"no bytes":              {func(f *forgery) { f.info.NVContents.Buffer = nil }, "of 0 bytes at 0"},
		"an offset":             {func(f *forgery) { f.info.Offset = 1 }, "of 8 bytes at 1"},
		"a digest of it":        {func(f *forgery) { f.a.Type = tpm2.TPMSTAttestNVDigest }, "kind 0x801c"},
		"a certified key":       {func(f *forgery) { f.a.Type = tpm2.TPMSTAttestCertify }, "kind 0x8017"},
		"made by no TPM":        {func(f *forgery) { f.a.Magic = 0 }, "no TPM made it"},
		"another AK":            {func(f *forgery) { f.ak = newForgery(t).ak }, "attestation key"},
		"no AK":                 {func(f *forgery) { f.ak = nil }, "no attestation key"},
		"an empty AK":           {func(f *forgery) { f.ak = &ecdsa.PublicKey{} }, "no attestation key"},
		"no index to compare":   {func(f *forgery) { f.counter.Index = 0; f.named(t, f.counter.Public(true)) }, "no counter"},
		"no counter to compare": {func(f *forgery) { f.counter = attest.Counter{} }, "no counter"},
		"no policy to compare":  {func(f *forgery) { f.counter.Policy = nil; f.named(t, f.counter.Public(true)) }, "no counter"},
		"a bit of it":           {func(f *forgery) { f.spoil = func(r *attest.Receipt) { r.Certified[len(r.Certified)-1] ^= 1 } }, "attestation key"},
		"nothing signed":        {func(f *forgery) { f.spoil = func(r *attest.Receipt) { r.Certified = nil } }, "attestation key"},
		"no signature":          {func(f *forgery) { f.spoil = func(r *attest.Receipt) { r.Signature = nil } }, "malformed"},
		"bytes behind it":       {func(f *forgery) { f.spoil = func(r *attest.Receipt) { *r = *f.sign(t, append(r.Certified, 0)) } }, "bytes behind it"},
		"behind the signature":  {func(f *forgery) { f.spoil = func(r *attest.Receipt) { r.Signature = append(r.Signature, 0) } }, "bytes behind it"},
		"an empty receipt":      {func(f *forgery) { f.spoil = func(r *attest.Receipt) { *r = attest.Receipt{} } }, "malformed"},
	} {
		f := newForgery(t)
		lie.tell(f)
		if _, err := f.verify(t); err == nil || !strings.Contains(err.Error(), lie.want) {
			t.Errorf("%s: got %v, want %q", name, err, lie.want)
		}
	}
	if _, err := attest.VerifyReceipt(nil, newForgery(t).ak, newForgery(t).counter, []byte("deleted")); err == nil {
		t.Error("no receipt was taken")
	}
	for n := range 72 { // of a signature
		f := newForgery(t)
		f.spoil = func(r *attest.Receipt) { r.Signature = r.Signature[:min(n, len(r.Signature)-1)] }
		if _, err := f.verify(t); err == nil {
			t.Errorf("a signature of %d bytes was taken", n)
		}
	}
}

// FuzzReceipt signs what it is given, as no AK would, so that all of it is parsed.
func FuzzReceipt(f *testing.F) {
	good := newForgery(f)
	var certified, signature []byte
	good.spoil = func(r *attest.Receipt) { certified, signature = r.Certified, r.Signature }
	if _, err := good.verify(f); err != nil {
		f.Fatal(err)
	}
	f.Add(certified, signature)
	f.Fuzz(func(t *testing.T, certified, signature []byte) {
		_, err := attest.VerifyReceipt(&attest.Receipt{Certified: certified, Signature: signature}, good.ak, good.counter, []byte("deleted"))
		if err == nil && (!bytes.HasPrefix(certified, []byte("\xffTCG\x80\x14")) || len(signature) > 72) {
			t.Errorf("accepted %x, %x", certified, signature)
		}
		r := good.sign(t, certified)
		if n, err := attest.VerifyReceipt(r, good.ak, good.counter, []byte("deleted")); err == nil && !bytes.HasSuffix(certified, binary.BigEndian.AppendUint64(nil, n)) {
			t.Errorf("the value %d of %x", n, certified)
		}
		r.Signature = append(r.Signature, 0)
		if _, err := attest.VerifyReceipt(r, good.ak, good.counter, []byte("deleted")); err == nil {
			t.Error("bytes behind a signature were taken")
		}
	})
}

// Two hosts of one configuration have counters of one name: the AK tells them apart.
func TestReceiptOfAnotherHost(t *testing.T) {
	h, other := newHost(t), newHost(t)
	v := newVerifier(t, h)
	if _, err := attest.VerifyReceipt(receipt(t, other, "a"), v.ak, v.counter, []byte("a")); err == nil {
		t.Error("another TPM's receipt was taken")
	}
	v.value(t, receipt(t, h, "a"), "a")
}
