//go:build cgo

package hsm

import (
	"context"
	"crypto/aes"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/miekg/pkcs11"
)

// Probe finds out what a token can and how honest it is about keys, for an operator
// who chooses [Config.Method]. It logs in, as [Open] does, and makes keys in its session
// only; nothing is left. Config's Name and Method do not matter.
func Probe(ctx context.Context, cfg Config) (*Report, error) {
	cfg.Name, cfg.Method = "probe", ""
	h, err := connect(ctx, cfg)
	if err != nil {
		return nil, err
	}
	defer h.Close()
	var r *Report
	err = h.change(ctx, func(s *session) error {
		r = &Report{Token: h.uri.path(), Attributes: []AttributeTest{}, Warnings: []string{}}
		return r.fill(s)
	})
	if err != nil {
		return nil, fmt.Errorf("hsm: probing %s: %w", h.Name(), err)
	}
	return r, nil
}

func (r *Report) fill(s *session) error {
	if err := r.identify(s); err != nil {
		return err
	}
	for _, m := range methods() {
		t := MethodTrial{Name: m.name}
		other := *s
		other.method = &m
		err := other.selfTest(&t)
		switch ClassOf(err) {
		case ClassSession, ClassLogin, ClassToken, ClassAuth:
			return err
		}
		if t.Passed = err == nil; !t.Passed {
			t.Why = err.Error()
		} else if r.Recommended == "" && m.name != onlyByName {
			r.Recommended, r.Why = m.name, "the first in the order of preference that passed its self-test"
			if r.Attributes, err = other.tryAttributes(); err != nil {
				return err
			}
		}
		r.Methods = append(r.Methods, t)
	}
	r.judge()
	return s.sweep()
}

// identify asks who token and library are, and what they offer.
func (r *Report) identify(s *session) error {
	lib, err := s.p.GetInfo()
	if err != nil {
		return failed("C_GetInfo", err)
	}
	token, err := s.p.GetTokenInfo(s.slot)
	if err != nil { // as when logging in
		return &Error{Class: ClassToken, What: fmt.Sprintf("C_GetTokenInfo: %v", err)}
	}
	slot, err := s.p.GetSlotInfo(s.slot)
	if err != nil {
		return failed("C_GetSlotInfo", err)
	}
	clean := func(text string) string { return strings.TrimRight(text, " \x00") }
	r.Library = fmt.Sprintf("%s %s %d.%d", clean(lib.ManufacturerID), clean(lib.LibraryDescription), lib.LibraryVersion.Major, lib.LibraryVersion.Minor)
	r.Label, r.Serial = clean(token.Label), clean(token.SerialNumber)
	r.Manufacturer, r.Model = clean(token.ManufacturerID), clean(token.Model)
	hardware := slot.Flags&pkcs11.CKF_HW_SLOT != 0
	for _, m := range mechanisms() {
		info, err := s.p.GetMechanismInfo(s.slot, []*pkcs11.Mechanism{pkcs11.NewMechanism(m.Number, nil)})
		if m.Offered = err == nil; m.Offered {
			m.MinKey, m.MaxKey, m.Uses = info.MinKeySize, info.MaxKeySize, uses(info.Flags)
			m.Hardware = info.Flags&pkcs11.CKF_HW != 0
		}
		hardware = hardware || m.Hardware
		r.Mechanisms = append(r.Mechanisms, m)
	}
	r.Erasure, r.ErasureWhy = guessErasure([]string{r.Manufacturer, r.Model, r.Library}, hardware)
	return nil
}

// mechanisms are those that matter to a host.
func mechanisms() []MechanismInfo {
	return []MechanismInfo{
		{Name: "CKM_AES_KEY_GEN", Number: pkcs11.CKM_AES_KEY_GEN}, {Name: "CKM_AES_GCM", Number: pkcs11.CKM_AES_GCM},
		{Name: "CKM_AES_KEY_WRAP", Number: pkcs11.CKM_AES_KEY_WRAP}, {Name: "CKM_AES_KEY_WRAP_KWP", Number: ckmKWP},
		{Name: "CKM_RSA_PKCS_KEY_PAIR_GEN", Number: pkcs11.CKM_RSA_PKCS_KEY_PAIR_GEN}, {Name: "CKM_RSA_PKCS_OAEP", Number: pkcs11.CKM_RSA_PKCS_OAEP},
		{Name: "CKM_GENERIC_SECRET_KEY_GEN", Number: pkcs11.CKM_GENERIC_SECRET_KEY_GEN}, {Name: "CKM_SHA256_HMAC", Number: pkcs11.CKM_SHA256_HMAC},
		{Name: "CKM_EC_KEY_PAIR_GEN", Number: pkcs11.CKM_EC_KEY_PAIR_GEN}, {Name: "CKM_ECDSA", Number: pkcs11.CKM_ECDSA},
	}
}

func uses(flags uint) (all []string) {
	for _, f := range []struct {
		flag uint
		name string
	}{
		{pkcs11.CKF_ENCRYPT, "encrypt"}, {pkcs11.CKF_DECRYPT, "decrypt"}, {pkcs11.CKF_WRAP, "wrap"}, {pkcs11.CKF_UNWRAP, "unwrap"},
		{pkcs11.CKF_SIGN, "sign"}, {pkcs11.CKF_VERIFY, "verify"}, {pkcs11.CKF_GENERATE, "generate"}, {pkcs11.CKF_GENERATE_KEY_PAIR, "generate pair"},
	} {
		if flags&f.flag != 0 {
			all = append(all, f.name)
		}
	}
	return all
}

// judge says what the operator should know.
func (r *Report) judge() {
	if r.Recommended == "" {
		r.Why = "no method passed its self-test"
	}
	for _, m := range r.Mechanisms {
		if !m.Offered && (m.Number == pkcs11.CKM_EC_KEY_PAIR_GEN || m.Number == pkcs11.CKM_ECDSA) {
			r.Warnings = append(r.Warnings, m.Name+" is missing: the host's identity key needs it")
		}
	}
	for _, a := range r.Attributes {
		if !a.Honoured {
			r.Warnings = append(r.Warnings, fmt.Sprintf("%s is not honoured: %s", a.Name, a.Detail))
		}
		if a.Name == "EXTRACTABLE" && !a.Honoured {
			r.Warnings = append(r.Warnings, "keys can leave this token: it is good for tests, it is not an HSM")
		}
	}
	if r.Erasure == ErasureHostFile {
		r.Warnings = append(r.Warnings, "whoever has an old copy of the token's file has the keys that were destroyed since")
	}
}

// attributeTest is a property that a key must have, and what it must forbid.
type attributeTest struct {
	property
	offences []offence
}

type offence struct {
	what string
	do   func(s *session, key pkcs11.ObjectHandle) error
}

// attributeTests come in an order in which none spoils a later one.
func (s *session) attributeTests() []attributeTest {
	usage := s.method.key.usage
	off := usage[slices.IndexFunc(usage, func(p property) bool { return !p.want })]
	if wrap := slices.IndexFunc(usage, func(p property) bool { return !p.want && p.kind == pkcs11.CKA_WRAP }); wrap >= 0 {
		off = usage[wrap]
	}
	return []attributeTest{
		{property{pkcs11.CKA_SENSITIVE, "SENSITIVE", true}, []offence{{"reading the key", (*session).readSecret}, setting(pkcs11.CKA_SENSITIVE, "SENSITIVE", false)}},
		{property{pkcs11.CKA_EXTRACTABLE, "EXTRACTABLE", false}, []offence{{"C_WrapKey", (*session).wrapOut}, setting(pkcs11.CKA_EXTRACTABLE, "EXTRACTABLE", true)}},
		{property{pkcs11.CKA_ALWAYS_SENSITIVE, "ALWAYS_SENSITIVE", true}, nil},
		{property{pkcs11.CKA_NEVER_EXTRACTABLE, "NEVER_EXTRACTABLE", true}, nil},
		{property{pkcs11.CKA_COPYABLE, "COPYABLE", false}, []offence{{"C_CopyObject", (*session).copyObject}}},
		{property{pkcs11.CKA_MODIFIABLE, "MODIFIABLE", false}, []offence{setting(pkcs11.CKA_LABEL, "LABEL", probeLabel)}},
		{off, []offence{setting(off.kind, off.name, true)}},
	}
}

// tryAttributes makes a throw-away key and tries what its attributes forbid.
func (s *session) tryAttributes() (all []AttributeTest, err error) {
	key, err := s.throwAway()
	if err != nil {
		return nil, err
	}
	for _, t := range s.attributeTests() {
		a := AttributeTest{Name: t.name, Honoured: true, Detail: fmt.Sprintf("reads %t", t.want)}
		if err := s.aside(func(s *session) error { return s.checkProperty(key, probeLabel, t.property) }); err != nil {
			a.Honoured, a.Detail = false, fmt.Sprintf("does not read %t", t.want)
		}
		for _, offence := range t.offences {
			answer := "refused"
			if s.aside(func(s *session) error { return offence.do(s, key) }) == nil {
				a.Honoured, answer = false, "allowed"
			}
			a.Detail += ", " + offence.what + " " + answer
		}
		all = append(all, a)
	}
	return all, s.sweep()
}

func setting(kind uint, name string, value any) offence {
	return offence{fmt.Sprintf("setting %s", name), func(s *session, key pkcs11.ObjectHandle) error {
		return s.p.SetAttributeValue(s.h, key, []*pkcs11.Attribute{attr(kind, value)})
	}}
}

func (s *session) readSecret(key pkcs11.ObjectHandle) error {
	kind := uint(pkcs11.CKA_VALUE)
	if s.method.key.class == pkcs11.CKO_PRIVATE_KEY {
		kind = pkcs11.CKA_PRIVATE_EXPONENT
	}
	b, err := s.value(key, kind)
	if err == nil && len(b) == 0 {
		err = errors.New("the token gave nothing")
	}
	return err
}

func (s *session) copyObject(key pkcs11.ObjectHandle) error {
	_, err := s.p.CopyObject(s.h, key, []*pkcs11.Attribute{attr(pkcs11.CKA_TOKEN, false)})
	return err
}

// wrapOut takes a key away under another one, by each mechanism that could.
func (s *session) wrapOut(key pkcs11.ObjectHandle) error {
	wrapper, err := s.p.GenerateKey(s.h, []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_AES_KEY_GEN, nil)}, []*pkcs11.Attribute{
		attr(pkcs11.CKA_CLASS, pkcs11.CKO_SECRET_KEY), attr(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_AES), attr(pkcs11.CKA_VALUE_LEN, keySize),
		attr(pkcs11.CKA_TOKEN, false), attr(pkcs11.CKA_LABEL, probeLabel), attr(pkcs11.CKA_WRAP, true)})
	if err != nil {
		return err
	}
	for _, m := range []*pkcs11.Mechanism{
		pkcs11.NewMechanism(pkcs11.CKM_AES_KEY_WRAP, nil), pkcs11.NewMechanism(ckmKWP, nil),
		pkcs11.NewMechanism(pkcs11.CKM_AES_KEY_WRAP_PAD, nil), pkcs11.NewMechanism(pkcs11.CKM_AES_CBC_PAD, make([]byte, aes.BlockSize)),
	} {
		if err = s.aside(func(s *session) error { _, err := s.p.WrapKey(s.h, []*pkcs11.Mechanism{m}, wrapper, key); return err }); err == nil {
			return nil
		}
	}
	return err
}
