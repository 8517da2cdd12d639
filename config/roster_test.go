package config_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"conseal/config"

	"github.com/google/go-cmp/cmp"
	"github.com/pelletier/go-toml/v2"
)

func golden(t testing.TB) string {
	t.Helper()
	b, err := os.ReadFile("testdata/roster.toml")
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func parse(t testing.TB, content string) *config.Roster {
	t.Helper()
	r, err := config.ParseRoster([]byte(content))
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func pin(digit byte) config.Pin { return config.Pin(bytes.Repeat([]byte{digit * 0x11}, 32)) }

func TestLoadRoster(t *testing.T) {
	path := file(t, golden(t), 0o644)
	got, err := config.LoadRoster(path)
	if err != nil {
		t.Fatal(err)
	}
	want := &config.Roster{
		Fleet: "demo", Version: 7,
		Hosts: []config.Member{
			{Name: "alpha", Address: "127.0.0.1:7001", Identity: pin(0xa), Protector: "tpm"},
			{Name: "beta", Address: "beta.example:7443", Identity: pin(0xb), Protector: "hsm"},
			{Name: "gamma", Address: "[2001:db8::1]:7443", Identity: pin(0xc), Protector: "tpm", Role: "recovery"},
		},
		Keys: []config.Key{
			{Name: "release", Scheme: "ed25519", Quorum: 2, Hosts: []string{"alpha", "beta", "gamma"}, State: "active", Purpose: "signs releases",
				Incarnation: 1, Generate: true, Users: []string{"uid:1000", "deploy"}, Askers: []string{"alpha"}, Open: config.OpenHeld, DeleteAfter: config.DefaultDeleteAfter},
			{Name: "old", Scheme: "ecdsa-p256", Quorum: 2, Hosts: []string{"beta", "alpha"}, State: "deleted", Purpose: "signed releases",
				Incarnation: 2, PublicKey: append([]byte{2}, bytes.Repeat([]byte{0xdd}, 32)...), Open: config.OpenHeld, DeleteAfter: config.DefaultDeleteAfter},
			{Name: "treasury", Scheme: "bip340", Quorum: 2, Hosts: []string{"alpha", "beta"}, State: "suspended", Purpose: "spends",
				Incarnation: 1, PublicKey: bytes.Repeat([]byte{0xee}, 32), Open: "15m", DeleteAfter: config.DefaultDeleteAfter},
		},
		Bytes: []byte(golden(t)),
	}
	if diff := cmp.Diff(got, want); diff != "" {
		t.Errorf("got -, want +:\n%s", diff)
	}
}

func TestLoadRosterThatOthersCanWrite(t *testing.T) {
	path := file(t, golden(t), 0o664)
	_, err := config.LoadRoster(path)
	want := []string{"FILE: other users may write it (mode 0664): chmod go-w FILE"}
	if diff := cmp.Diff(refusals(err, path), want); diff != "" {
		t.Errorf("got -, want +:\n%s", diff)
	}
}

func TestLookups(t *testing.T) {
	r := parse(t, golden(t))
	if m, found := r.Host("beta"); !found || m != &r.Hosts[1] {
		t.Errorf("Host: got %v, %v", m, found)
	}
	if m, found := r.HostByPin(pin(0xc)); !found || m != &r.Hosts[2] {
		t.Errorf("HostByPin: got %v, %v", m, found)
	}
	if k, found := r.Key("old"); !found || k != &r.Keys[1] {
		t.Errorf("Key: got %v, %v", k, found)
	}
	if _, found := r.Host("delta"); found {
		t.Error("Host found delta")
	}
	if _, found := r.Key("delta"); found {
		t.Error("Key found delta")
	}
	if _, found := (&config.Roster{Hosts: []config.Member{{Name: "unset"}}}).HostByPin(config.Pin{}); found {
		t.Error("HostByPin found a host without identity")
	}
}

// TestRosterRefused changes one text of the golden roster.
func TestRosterRefused(t *testing.T) {
	tests := []struct{ old, new, want string }{
		{`fleet = "demo"`, ``, `roster: fleet: missing: wants small letters, digits and "-", at most 63, the first no "-"`},
		{`version = 7`, `version = 0`, `roster:3: version: 0: wants 1 or more, one more than the last`},
		{`version = 7`, ``, `roster: version: 0: wants 1 or more, one more than the last`},
		{`version = 7`, `version = -1`, `roster:3: version: -1: wants 0 or more`},
		{`version = 7`, `version = 7.0`, `roster:3: version: 7: wants a whole number, without point or quotes`},
		{`version = 7`, "version = 7\nfleet = 'b'", `roster:4: fleet: set twice, first in line 2`},
		{`version = 7`, "version = 7\nfleets = 'b'", `roster:4: fleets: unknown key: did you mean "fleet"?`},
		{`version = 7`, "version = 7\n[delivery]", `roster:4: delivery: unknown key: known here are fleet, host, key, version`},
		{`open = "15m"`, "open = '15m'\ndelete_after = '8761h'", `roster:54: key "treasury" delete_after: 8761h0m0s: wants 0s to 8760h0m0s`},
		{`open = "15m"`, "open = '15m'\ndelete_after = '-1s'", `roster:54: key "treasury" delete_after: -1s: wants 0s to 8760h0m0s`},
		{`open = "15m"`, "open = '15m'\ndelete_after = 7", `roster:54: key 3 delete_after: 7: wants a duration such as "168h"`},
		{`version = 7`, `version = `, `roster:3: incomplete number`},
		{`name = "beta"`, `name = "Beta"`, `roster:12: host "Beta" name: "Beta": wants small letters, digits and "-", at most 63, the first no "-"
roster:28: key "release" hosts: "beta" is not a host of this roster: did you mean "Beta"?
roster:39: key "old" hosts: "beta" is not a host of this roster: did you mean "Beta"?
roster:49: key "treasury" hosts: "beta" is not a host of this roster: did you mean "Beta"?`},
		{`name = "gamma"`, `name = "alpha"`, `roster:18: host "alpha" name: alpha is in line 6 already: two hosts cannot have one name
roster:28: key "release" hosts: "gamma" is not a host of this roster: add a [[host]]`},
		{`address = "beta.example:7443"`, ``, `roster:11: host "beta" address: "": wants host:port, the port 1 to 65535`},
		{`address = "beta.example:7443"`, `address = "0.0.0.0:7443"`, `roster:13: host "beta" address: "0.0.0.0:7443": wants an address that other hosts can dial`},
		{`address = "beta.example:7443"`, `address = ":7443"`, `roster:13: host "beta" address: ":7443": wants a host name or an IP address before the port`},
		{`address = "beta.example:7443"`, `address = "127.0.0.1:7001"`, `roster:13: host "beta" address: 127.0.0.1:7001 is in line 7 already: two hosts cannot have one address`},
		{`address = "beta.example:7443"`, `address = "[::ffff:7f00:1]:07001"`, `roster:13: host "beta" address: 127.0.0.1:7001 is in line 7 already: two hosts cannot have one address`},
		{`identity = "sha256:bb`, `adress = "sha256:bb`, `roster:11: host "beta" identity: missing: wants the pin that "conseald init" printed on that host
roster:14: host.adress: unknown key: did you mean "address"?`},
		{`identity = "sha256:bb`, `identity = "sha256:BB`, `roster:14: host 2 identity: "sha256:BBbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb": wants an identity pin, "sha256:" and 64 small hexadecimal digits`},
		{strings.Repeat("b", 64), strings.Repeat("0", 64), `roster:14: host 2 identity: "sha256:0000000000000000000000000000000000000000000000000000000000000000": wants an identity pin that is not zero`},
		{strings.Repeat("b", 64), strings.Repeat("a", 64), `roster:14: host "beta" identity: sha256:aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa is in line 8 already: two hosts cannot have one identity: one of them is a copy`},
		{`protector = "hsm"`, `protector = "hms"`, `roster:15: host "beta" protector: "hms": wants "tpm" or "hsm"; did you mean "hsm"?`},
		{`protector = "hsm"`, ``, `roster:11: host "beta" protector: missing: wants "tpm" or "hsm"`},
		{`role = "recovery"`, `role = "recover"`, `roster:22: host "gamma" role: "recover": wants "recovery"; did you mean "recovery"?`},
		{`name = "old"`, `name = "release"`, `roster:36: key "release" name: release is in line 25 already: two keys cannot have one name`},
		{`name = "old"`, ``, `roster:35: key 2 name: missing: wants small letters, digits and "-", at most 63, the first no "-"`},
		{`scheme = "ed25519"`, `scheme = "ed22519"`, `roster:26: key "release" scheme: "ed22519": wants "ed25519" or "ecdsa-p256" or "ecdsa-secp256k1" or "bip340"; did you mean "ed25519"?`},
		{`scheme = "ed25519"`, ``, `roster:24: key "release" scheme: missing: wants "ed25519" or "ecdsa-p256" or "ecdsa-secp256k1" or "bip340"`},
		{"quorum = 2\nhosts = [\"alpha\", \"beta\", \"gamma\"]", "quorum = 1\nhosts = [\"alpha\", \"beta\", \"gamma\"]", `roster:27: key "release" quorum: 1: wants 2 or more, so that no host signs alone`},
		{"quorum = 2\nhosts = [\"alpha\", \"beta\", \"gamma\"]", "quorum = 4\nhosts = [\"alpha\", \"beta\", \"gamma\"]", `roster:27: key "release" quorum: 4 of 3 hosts: wants 3 or fewer`},
		{"quorum = 2\nhosts = [\"alpha\", \"beta\", \"gamma\"]", "quorum = 3\nhosts = [\"alpha\", \"beta\", \"gamma\"]", `roster:27: key "release" quorum: 3, but only 2 of the hosts sign: the others have role "recovery"`},
		{"quorum = 2\nhosts = [\"alpha\", \"beta\", \"gamma\"]", "hosts = [\"alpha\", \"beta\", \"gamma\"]", `roster:24: key "release" quorum: missing: wants how many hosts it takes to sign, 2 or more`},
		{`hosts = ["alpha", "beta", "gamma"]`, `hosts = []`, `roster:28: key "release" hosts: empty: wants the names of the hosts that hold the key, 2 or more`},
		{`hosts = ["alpha", "beta", "gamma"]`, ``, `roster:24: key "release" hosts: empty: wants the names of the hosts that hold the key, 2 or more`},
		{`hosts = ["alpha", "beta", "gamma"]`, `hosts = "alpha"`, `roster:28: key 1 hosts: "alpha": wants a list of text: ["one", "two"]`},
		{`hosts = ["alpha", "beta", "gamma"]`, `hosts = ["alpha", "alpha", "beta"]`, `roster:28: key "release" hosts: "alpha" is there twice`},
		{`hosts = ["alpha", "beta", "gamma"]`, `hosts = ["alpha", "beta", "gama"]`, `roster:28: key "release" hosts: "gama" is not a host of this roster: did you mean "gamma"?`},
		{`askers = ["alpha"]`, `askers = ["delta-quadrant"]`, `roster:33: key "release" askers: "delta-quadrant" is not a host of this roster: add a [[host]]`},
		{`state = "active"`, `state = "actvie"`, `roster:29: key "release" state: "actvie": wants "active" or "suspended" or "deleted"; did you mean "active"?`},
		{`state = "active"`, ``, `roster:24: key "release" state: missing: wants "active" or "suspended" or "deleted"`},
		{`state = "active"`, `state = "deleted"`, `roster:24: key "release" public_key: missing: a deleted key repeats its public key, so that the right one is erased
roster:31: key "release" generate: the key is deleted: remove the mark`},
		{`purpose = "signs releases"`, `purpose = " "`, `roster:30: key "release" purpose: missing: wants a few words on what the key signs`},
		{`purpose = "signs releases"`, `purpose = "` + strings.Repeat("x", 257) + `"`, `roster:30: key "release" purpose: longer than 256 bytes`},
		{`purpose = "signs releases"`, `purpose = "signs\nreleases"`, `roster:30: key 1 purpose: "signs\nreleases": wants text on one line, in quotes`},
		{`incarnation = 2`, `incarnation = 0`, `roster:42: key "old" incarnation: 0: wants 1 to 1000`},
		{`incarnation = 2`, `incarnation = 9000000000000000000`, `roster:42: key "old" incarnation: 9000000000000000000: wants 1 to 1000`},
		{`public_key = "eeee`, "generate = true\npublic_key = \"eeee", `roster:52: key "treasury" generate: the key has a public_key, so it exists: remove the mark`},
		{`public_key = "eeee`, `public_key = "xeee`, `roster:52: key 3 public_key: "xeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeee": wants a public key in hexadecimal digits`},
		{`public_key = "eeee`, `public_key = "ee`, `roster:52: key "treasury" public_key: eeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeee: wants 32 bytes`},
		{`public_key = "02dd`, `public_key = "04dd`, `roster:43: key "old" public_key: 04dddddddddddddddddddddddddddddddddddddddddddddddddddddddddddddddd: wants 33 bytes, the first 02 or 03`},
		{"generate = true", `public_key = "` + strings.Repeat("e", 64) + `"`, `roster:52: key "treasury" public_key: eeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeee is in line 31 already: two keys cannot be one`},
		{"generate = true", "generate = true\nprehashed = true", `roster:32: key "release" prehashed: scheme ed25519 signs whole messages only`},
		{"generate = true", "generate = true\nprehashed_presignatures = true", `roster:32: key "release" prehashed_presignatures: means nothing without ` + "`prehashed = true`"},
		{`public_key = "eeee`, "prehashed = true\npublic_key = \"eeee", `roster:52: key "treasury" prehashed: scheme bip340 signs whole messages only`},
		{`open = "15m"`, `open = ""`, `roster:53: key 3 open: "": wants "held", "each" or a duration of "1s" to "24h"`},
		{`open = "15m"`, `open = "hold"`, `roster:53: key 3 open: "hold": wants "held", "each" or a duration of "1s" to "24h"`},
		{`open = "15m"`, `open = "Held"`, `roster:53: key 3 open: "Held": wants "held", "each" or a duration of "1s" to "24h"`},
		{`open = "15m"`, `open = "15"`, `roster:53: key 3 open: "15": wants "held", "each" or a duration of "1s" to "24h"`},
		{`open = "15m"`, `open = "999ms"`, `roster:53: key 3 open: "999ms": wants "held", "each" or a duration of "1s" to "24h"`},
		{`open = "15m"`, `open = "24h0m1s"`, `roster:53: key 3 open: "24h0m1s": wants "held", "each" or a duration of "1s" to "24h"`},
		{`open = "15m"`, `open = "-15m"`, `roster:53: key 3 open: "-15m": wants "held", "each" or a duration of "1s" to "24h"`},
		{`open = "15m"`, `open = 15`, `roster:53: key 3 open: 15: wants "held", "each" or a duration of "1s" to "24h"`},
		{`open = "15m"`, `open = "15 m"`, `roster:53: key 3 open: "15 m": wants "held", "each" or a duration of "1s" to "24h"`},
		{"scheme = \"ed25519\"", "scheme = \"ecdsa-p256\"\nprehashed = true\nprehashed_presignatures = true\nopen = \"each\"",
			`roster:28: key "release" prehashed_presignatures: means nothing with ` + "`open = \"each\"`" + `: only keys that are held have presignatures`},
		{`"deploy"`, `"1000"`, `roster:32: key "release" users: "1000": wants "uid:NUMBER" or the name of a user`},
		{`"deploy"`, `"uid:01000"`, `roster:32: key "release" users: "uid:01000": wants "uid:NUMBER" or the name of a user`},
		{`"deploy"`, `"uid:4294967295"`, `roster:32: key "release" users: "uid:4294967295": wants "uid:NUMBER" or the name of a user`},
		{`"deploy"`, `""`, `roster:32: key "release" users: "": wants "uid:NUMBER" or the name of a user`},
		{`"deploy"`, `"uid:1000"`, `roster:32: key "release" users: "uid:1000" is there twice`},
		{"[[key]]\nname = \"old\"", "[[keys]]\nname = \"old\"", `roster:35: keys: unknown key: did you mean "key"?`},
	}
	for _, test := range tests {
		t.Run(test.want, func(t *testing.T) {
			content := strings.Replace(golden(t), test.old, test.new, 1)
			if content == golden(t) {
				t.Fatalf("the roster has no %q to change", test.old)
			}
			r, err := config.ParseRoster([]byte(content))
			if diff := cmp.Diff(refusals(err, ""), strings.Split(test.want, "\n")); diff != "" {
				t.Errorf("got -, want +:\n%s", diff)
			}
			if r != nil {
				t.Error("a refused roster was returned")
			}
		})
	}
}

func TestEmptyRosterRefused(t *testing.T) {
	tests := []struct{ toml, want string }{
		{"", `roster: fleet: missing: wants small letters, digits and "-", at most 63, the first no "-"
roster: version: 0: wants 1 or more, one more than the last
roster: host: 0 hosts: wants two [[host]] at least, since two must sign together`},
		{"fleet = 'a'\nversion = 1\nhost = 3\nkey = [1]", `roster:3: host: wants one [[host]] for each
roster:4: key: wants one [[key]] for each
roster: key 1 name: missing: wants small letters, digits and "-", at most 63, the first no "-"`},
		{"fleet = 'a'\nversion = 1\n[host]\nname = 'a'", `roster:3: host: wants one [[host]] for each`},
		{"fleet = 'a'\nversion = 1\n[[host]]", `roster: host: 1 hosts: wants two [[host]] at least, since two must sign together`},
	}
	for _, test := range tests {
		_, err := config.ParseRoster([]byte(test.toml))
		for want := range strings.SplitSeq(test.want, "\n") {
			if !strings.Contains(fmt.Sprint(err), want) {
				t.Errorf("%q: got %v, want %q among it", test.toml, err, want)
			}
		}
	}
	if _, err := config.ParseRoster(nil); err == nil {
		t.Error("nil was accepted")
	}
}

func TestEverythingWrongWithARosterAtOnce(t *testing.T) {
	_, err := config.ParseRoster([]byte(`
version = "one"
[[host]]
name = "alpha"
adress = "127.0.0.1:1"
identity = "md5:00"
[[host]]
name = "alpha"
address = "127.0.0.1:1"
protector = "paper"
[[key]]
name = "release"
quorum = 1
hosts = ["alpha", "beta"]
state = "deleted"
`))
	want := []string{
		`roster: fleet: missing: wants small letters, digits and "-", at most 63, the first no "-"`,
		`roster:2: version: "one": wants a whole number, without point or quotes`,
		`roster:3: host "alpha" address: "": wants host:port, the port 1 to 65535`,
		`roster:3: host "alpha" protector: missing: wants "tpm" or "hsm"`,
		`roster:5: host.adress: unknown key: did you mean "address"?`,
		`roster:6: host 1 identity: "md5:00": wants an identity pin, "sha256:" and 64 small hexadecimal digits`,
		`roster:7: host "alpha" identity: missing: wants the pin that "conseald init" printed on that host`,
		`roster:8: host "alpha" name: alpha is in line 4 already: two hosts cannot have one name`,
		`roster:10: host "alpha" protector: "paper": wants "tpm" or "hsm"`,
		`roster:11: key "release" scheme: missing: wants "ed25519" or "ecdsa-p256" or "ecdsa-secp256k1" or "bip340"`,
		`roster:11: key "release" purpose: missing: wants a few words on what the key signs`,
		`roster:11: key "release" public_key: missing: a deleted key repeats its public key, so that the right one is erased`,
		`roster:13: key "release" quorum: 1: wants 2 or more, so that no host signs alone`,
		`roster:14: key "release" hosts: "beta" is not a host of this roster: add a [[host]]`,
	}
	if diff := cmp.Diff(refusals(err, ""), want); diff != "" {
		t.Errorf("got -, want +:\n%s", diff)
	}
}

func TestHostileRosters(t *testing.T) {
	var names, hosts strings.Builder
	for i := range 15_000 {
		fmt.Fprintf(&hosts, "[[host]]\nname='h%d'\n", i)
	}
	for i := range 40_000 {
		fmt.Fprintf(&names, "'g%d',", i)
	}
	content := "fleet='a'\nversion=1\n[[key]]\nname='k'\nhosts=[" + names.String() + "]\nusers=[" + names.String() + "]\n" + hosts.String()
	if _, err := config.ParseRoster([]byte(content)); err == nil || !strings.Contains(err.Error(), " more") {
		t.Errorf("got %v, want a list of problems that is cut", err)
	}
}

// encoding builds what the documentation of the digests says is hashed.
type encoding struct{ bytes.Buffer }

func (e *encoding) text(items ...string) *encoding {
	for _, s := range items {
		e.Write(binary.BigEndian.AppendUint32(nil, uint32(len(s))))
		e.WriteString(s)
	}
	return e
}

func (e *encoding) number(n uint64) *encoding {
	return e.text(string(binary.BigEndian.AppendUint64(nil, n)))
}

func (e *encoding) sum() [32]byte { return sha256.Sum256(e.Bytes()) }

func TestDigestsAreWhatIsDocumented(t *testing.T) {
	r := parse(t, `
fleet = "demo"
version = 7
key = [{name = "release", incarnation = 3, scheme = "ed25519", quorum = 2, hosts = ["beta", "alpha"], state = "active", purpose = "p", generate = true, users = ["uid:2", "uid:1"]}]
[[host]]
name = "gamma"
address = "c:3"
identity = "`+pin(0xc).String()+`"
protector = "tpm"
role = "recovery"
[[host]]
name = "beta"
address = "b:2"
identity = "`+pin(0xb).String()+`"
protector = "hsm"
[[host]]
name = "alpha"
address = "a:1"
identity = "`+pin(0xa).String()+`"
protector = "tpm"
`)
	a, b, c := pin(0xa), pin(0xb), pin(0xc)
	var whole, entry encoding
	whole.text("conseal roster v1", "demo").number(7).number(3)
	whole.text("alpha", "a:1", string(a[:]), "tpm", "").text("beta", "b:2", string(b[:]), "hsm", "").text("gamma", "c:3", string(c[:]), "tpm", "recovery")
	whole.number(1).text("release").number(3).text("ed25519").number(2).number(2).text("alpha", "beta")
	whole.text("active", "p").number(1).text("").number(2).text("uid:1", "uid:2").number(0).number(0).number(0).text("held")
	if got, want := r.Digest(), whole.sum(); got != want {
		t.Errorf("Digest: got %x, want %x", got, want)
	}
	r.Keys[0].Refresh = config.Delay(time.Hour)
	whole.text("refresh =").number(uint64(time.Hour))
	if got, want := r.Digest(), whole.sum(); got != want {
		t.Errorf("Digest with a refresh: got %x, want %x", got, want)
	}
	if r.Keys[0].DeleteAfter != config.DefaultDeleteAfter {
		t.Errorf("a deletion waits %v unless the roster says otherwise", r.Keys[0].DeleteAfter)
	}
	r.Keys[0].DeleteAfter = 0 // as "0s"
	whole.text("delete_after =").number(0)
	if got, want := r.Digest(), whole.sum(); got != want {
		t.Errorf("Digest with a deletion at once: got %x, want %x", got, want)
	}
	entry.text("conseal roster entry v1", "release").number(3).text("ed25519").number(2).number(2)
	entry.text("alpha", string(a[:])).text("beta", string(b[:]))
	got, err := r.EntryDigest("release")
	if want := entry.sum(); err != nil || got != want {
		t.Errorf("EntryDigest: got %x, %v, want %x", got, err, want)
	}
}

// The digests of the golden roster never change: hosts of two versions of this
// program must agree on them.
const (
	goldenDigest = "f5f14dc5d238c096e8322e107b0fe7e082e42d96a01a66c8857e7a3e51b4be77"
	goldenEntry  = "ffdae92f4db2fcecb786f0180cb780c518a10b447df7dff4d398242909ec6806" // of "release"
)

func TestDigestGolden(t *testing.T) {
	r := parse(t, golden(t))
	if got := r.Digest(); hex.EncodeToString(got[:]) != goldenDigest {
		t.Errorf("Digest: got %x, want %s", got, goldenDigest)
	}
	if got := entryDigest(t, r, "release"); hex.EncodeToString(got[:]) != goldenEntry {
		t.Errorf("EntryDigest: got %x, want %s", got, goldenEntry)
	}
	if _, err := r.EntryDigest("nope"); err == nil || err.Error() != `key "nope" is not in the roster` {
		t.Errorf("EntryDigest of no key: got %v", err)
	}
	r.Hosts = r.Hosts[:1]
	if _, err := r.EntryDigest("release"); err == nil || err.Error() != `key "release": host "beta" is not in the roster` {
		t.Errorf("EntryDigest without its hosts: got %v", err)
	}
}

func entryDigest(t *testing.T, r *config.Roster, key string) [32]byte {
	t.Helper()
	d, err := r.EntryDigest(key)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func TestDigestIgnoresSpelling(t *testing.T) {
	want := parse(t, golden(t)).Digest()
	blocks := strings.Split(golden(t), "\n\n")
	for name, content := range map[string]string{
		"comments":        strings.ReplaceAll(golden(t), "\n", " # so\n"),
		"CRLF":            strings.ReplaceAll(golden(t), "\n", "\r\n"),
		"white space":     strings.ReplaceAll(golden(t), " = ", "\t=   "),
		"order of blocks": strings.Join([]string{blocks[0], blocks[6], blocks[3], blocks[5], blocks[1], blocks[4], blocks[2]}, "\n"),
		"order of lists":  strings.NewReplacer(`"alpha", "beta"`, `"beta", "alpha"`, `"uid:1000", "deploy"`, `"deploy", "uid:1000"`).Replace(golden(t)),
		"defaults":        strings.Replace(golden(t), `state = "active"`, "state = 'active'\nincarnation = 1\nopen = 'held'\npublic_key = ''", 1),
		"upper case hex":  strings.Replace(golden(t), strings.Repeat("d", 64), strings.Repeat("D", 64), 1),
	} {
		if content == golden(t) {
			t.Errorf("%s: nothing changed", name)
		}
		if got := parse(t, content).Digest(); got != want {
			t.Errorf("%s: got %x, want %x", name, got, want)
		}
	}
}

// TestDigestCovers changes one thing of the golden roster at a time: the digest
// of the whole must change with each, that of the entry "release" with some.
func TestDigestCovers(t *testing.T) {
	tests := []struct {
		old, new string
		entry    bool
	}{
		{`"demo"`, `"other"`, false},
		{`version = 7`, `version = 8`, false},
		{`127.0.0.1:7001`, `127.0.0.1:7002`, false},
		{`protector = "hsm"`, `protector = "tpm"`, false},
		{`role = "recovery"`, ``, false},
		{strings.Repeat("b", 64), strings.Repeat("d", 64), true},
		{`name = "release"`, `name = "release2"`, true},
		{`scheme = "ed25519"`, `scheme = "bip340"`, true},
		{`hosts = ["alpha", "beta", "gamma"]`, `hosts = ["alpha", "beta"]`, true},
		{`state = "active"`, `state = "suspended"`, false},
		{`state = "active"`, "state = 'active'\nincarnation = 2", true},
		{`"signs releases"`, `"signs"`, false},
		{`generate = true`, ``, false},
		{`generate = true`, `public_key = "` + strings.Repeat("1", 64) + `"`, false},
		{`"deploy"`, `"deployer"`, false},
		{`askers = ["alpha"]`, `askers = ["beta"]`, false},
		{`askers = ["alpha"]`, ``, false},
		{`state = "active"`, "state = 'active'\nopen = 'each'", false},
		{`state = "active"`, "state = 'active'\nopen = '15m'", false},
		{`incarnation = 2`, `incarnation = 3`, false}, // of another key
		{`public_key = "ee`, `public_key = "ff`, false},
	}
	r := parse(t, golden(t))
	whole, entry := r.Digest(), entryDigest(t, r, "release")
	for _, test := range tests {
		changed := parse(t, strings.Replace(golden(t), test.old, test.new, 1))
		if changed.Digest() == whole {
			t.Errorf("%s -> %s: the digest stays", test.old, test.new)
		}
		if got := entryDigest(t, changed, changed.Keys[0].Name) != entry; got != test.entry {
			t.Errorf("%s -> %s: the entry's digest changes: got %v, want %v", test.old, test.new, got, test.entry)
		}
	}
	quorum := parse(t, strings.Replace(golden(t), `role = "recovery"`, ``, 1))
	quorum.Keys[0].Quorum = 3
	if entryDigest(t, quorum, "release") == entry {
		t.Error("another quorum: the entry's digest stays")
	}
}

func TestOpening(t *testing.T) {
	for _, test := range []struct {
		open config.Opening
		keep time.Duration
		held bool
	}{{"", 0, true}, {"held", 0, true}, {"each", 0, false}, {"1s", time.Second, false}, {"24h", 24 * time.Hour, false}, {"1h30m", 90 * time.Minute, false}} {
		if keep, held := test.open.Keep(); keep != test.keep || held != test.held {
			t.Errorf("%q: got %v, %v, want %v, %v", test.open, keep, held, test.keep, test.held)
		}
		var read config.Opening
		if err := read.UnmarshalText([]byte(test.open)); (err == nil) != (test.open != "") || read != test.open {
			t.Errorf("%q: read as %q, %v", test.open, read, err)
		}
	}
}

func TestPin(t *testing.T) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		t.Fatal(err)
	}
	p, err := config.PinOf(key.Public())
	if want := config.Pin(sha256.Sum256(der)); err != nil || p != want {
		t.Errorf("got %v, %v, want %v", p, err, want)
	}
	if again, err := config.ParsePin(p.String()); err != nil || again != p {
		t.Errorf("ParsePin(%v): got %v, %v", p, again, err)
	}
	if _, err := config.PinOf("no key"); err == nil {
		t.Error("PinOf accepted text")
	}
	for _, s := range []string{"", "sha256:", strings.Repeat("a", 64), "sha512:" + strings.Repeat("a", 64), "sha256:" + strings.Repeat("a", 63),
		"sha256:" + strings.Repeat("a", 66), "sha256:" + strings.Repeat("A", 64), "sha256:" + strings.Repeat("0", 64), p.String() + "\n", p.Grouped()} {
		if got, err := config.ParsePin(s); err == nil || got != (config.Pin{}) {
			t.Errorf("ParsePin(%q): got %v, %v", s, got, err)
		}
	}
	p = config.Pin{0x01, 0x23, 0x45}
	if got, want := p.Grouped(), "0123 4500"+strings.Repeat(" 0000", 14); got != want {
		t.Errorf("Grouped: got %q, want %q", got, want)
	}
}

func FuzzParseRoster(f *testing.F) {
	f.Add(golden(f))
	f.Add("fleet = 'a'\nversion = 1\nhost = [{name = 'a', address = 'a:1'}, {name = 'b'}]\nkey = [{}]")
	f.Fuzz(func(t *testing.T, content string) {
		r, err := config.ParseRoster([]byte(content))
		if (r == nil) == (err == nil) {
			t.Fatalf("got %v and %v", r, err)
		}
		if err != nil {
			return
		}
		b, err := toml.Marshal(r)
		if err != nil {
			t.Fatal(err)
		}
		again, err := config.ParseRoster(b)
		if err != nil {
			t.Fatalf("what was written is refused: %v\n%s", err, b)
		}
		if again.Digest() != r.Digest() {
			t.Errorf("the digest changes: got %+v, want %+v", again, r)
		}
		for _, k := range r.Keys {
			if got, want := entryDigest(t, again, k.Name), entryDigest(t, r, k.Name); got != want {
				t.Errorf("key %q: the digest changes: got %x, want %x", k.Name, got, want)
			}
		}
	})
}
