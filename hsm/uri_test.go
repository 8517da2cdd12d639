package hsm_test

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"conseal/hsm"
)

func TestParseURI(t *testing.T) {
	slot := uint(7)
	for uri, want := range map[string]*hsm.URI{
		"pkcs11:": {},
		"pkcs11:token=a%20b;serial=0123?module-path=/x.so": {Token: "a b", Serial: "0123", ModulePath: "/x.so"},
		"pkcs11:slot-id=7;model=m&m;manufacturer=(c)":      {SlotID: &slot, Model: "m&m", Manufacturer: "(c)"},
		"pkcs11:id=%00%ff;object=k;type=secret-key":        {ID: []byte{0, 0xff}, Object: "k", Type: "secret-key"},
		"pkcs11:?pin-source=fd:3&module-name=p11":          {PINSource: "fd:3", ModuleName: "p11"},
		"pkcs11:token=%C3%A4?pin-source=file:/a/b%20c":     {Token: "ä", PINSource: "file:/a/b c"},
	} {
		got, err := hsm.ParseURI(uri)
		if err != nil {
			t.Errorf("%s: %v", uri, err)
			continue
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%s: %s", uri, diff)
		}
		again, err := hsm.ParseURI(got.String())
		if err != nil || !cmp.Equal(got, again) {
			t.Errorf("%s formats to %s: %v, %v", uri, got, again, err)
		}
	}
}

func TestParseURIRefuses(t *testing.T) {
	for uri, reason := range map[string]string{
		"":                                        "must start",
		"PKCS11:token=a":                          "must start",
		"http://a":                                "must start",
		"pkcs11:" + strings.Repeat("a", 5000):     "at most",
		"pkcs11:token=a;token=a":                  "twice",
		"pkcs11:token=a;":                         "no value",
		"pkcs11:;token=a":                         "no value",
		"pkcs11:token":                            "no value",
		"pkcs11:token=":                           "no value",
		"pkcs11:token=a?":                         "no value",
		"pkcs11:bogus=1":                          "unknown",
		"pkcs11:x-vendor=1":                       "unknown",
		"pkcs11:library-version=1":                "unknown",
		"pkcs11:module-path=%2Fx.so":              "unknown",
		"pkcs11:?token=a":                         "unknown",
		"pkcs11:?slot-id=1":                       "unknown",
		"pkcs11:?id=1":                            "unknown",
		"pkcs11:?pin-value=1234":                  "does not belong",
		"pkcs11:?pin-value":                       "does not belong",
		"pkcs11:pin-value=1234":                   "does not belong",
		"pkcs11:?pin-source=|/bin/cat%20pin":      "PIN source",
		"pkcs11:?pin-source=pin.txt":              "PIN source",
		"pkcs11:?pin-source=file://host/pin":      "PIN source",
		"pkcs11:?module-path=x.so":                "absolute",
		"pkcs11:?module-name=a/b":                 "slash",
		"pkcs11:token=a%00b":                      "control",
		"pkcs11:token=a%0A":                       "control",
		"pkcs11:token=%ff":                        "UTF-8",
		"pkcs11:token=a%2":                        "percent",
		"pkcs11:token=a%zz":                       "percent",
		"pkcs11:token=a%":                         "percent",
		"pkcs11:token=a b":                        "must be percent-encoded",
		"pkcs11:token=a/b":                        "must be percent-encoded",
		"pkcs11:token=a#b":                        "must be percent-encoded",
		"pkcs11:token=ä":                          "must be percent-encoded",
		"pkcs11:slot-id=-1":                       "decimal",
		"pkcs11:slot-id=01":                       "decimal",
		"pkcs11:slot-id=18446744073709551616":     "decimal",
		"pkcs11:type=secret":                      "is not public",
		"pkcs11:serial=01234567890123456":         "longer",
		"pkcs11:token=" + strings.Repeat("a", 33): "longer",
	} {
		_, err := hsm.ParseURI(uri)
		if err == nil || !strings.Contains(err.Error(), reason) {
			t.Errorf("%q: got %v, want an error with %q", uri, err, reason)
		}
		if err != nil && strings.Contains(err.Error(), "1234") && strings.Contains(uri, "pin-value") {
			t.Errorf("the error repeats the PIN: %v", err)
		}
	}
}

func FuzzParseURI(f *testing.F) {
	for _, s := range []string{
		"pkcs11:", "pkcs11:token=a%20b;serial=0123?module-path=/x.so&pin-source=cred:pin",
		"pkcs11:id=%00%ff;slot-id=7;type=data;object=%C3%A4", "pkcs11:model=m&m;manufacturer=a:b?module-name=n",
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		u, err := hsm.ParseURI(s)
		if err != nil {
			return
		}
		again, err := hsm.ParseURI(u.String())
		if err != nil || !cmp.Equal(u, again) {
			t.Fatalf("%q formats to %q: %v, %v", s, u, again, err)
		}
	})
}
