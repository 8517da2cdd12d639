package config_test

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"conseal/config"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

var ignoreOrigins = cmpopts.IgnoreUnexported(config.Host{})

// file writes content to a file of that mode and returns its path.
func file(t testing.TB, content string, mode os.FileMode) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "file.toml")
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(path, mode); err != nil {
		t.Fatal(err)
	}
	return path
}

// load loads content with the state in a folder that does not exist.
func load(t testing.TB, content string) (*config.Host, error) {
	t.Helper()
	return config.Load(file(t, content, 0o644))
}

// refusals are the lines of an error of Load or LoadRoster, without paths.
func refusals(err error, path string) []string {
	if err == nil {
		return nil
	}
	text := err.Error()
	if path != "" {
		text = strings.ReplaceAll(text, path, "FILE")
	}
	return strings.Split(text, "\n")
}

func TestLoadDefaults(t *testing.T) {
	t.Setenv("CONSEAL_SIGN_SOCKET", "/of/the/command") // not ours, and no mistake
	got, err := load(t, `name = "alpha"`)
	if err != nil {
		t.Fatal(err)
	}
	want := config.Default()
	want.Name = "alpha"
	if diff := cmp.Diff(got, want, ignoreOrigins); diff != "" {
		t.Errorf("got -, want +:\n%s", diff)
	}
}

func TestLoadEveryKey(t *testing.T) {
	pin := file(t, "1234", 0o600)
	got, err := load(t, full(pin))
	if err != nil {
		t.Fatal(err)
	}
	want := &config.Host{
		Name: "alpha", State: "/nowhere/state", Roster: "/nowhere/roster.toml", InsecureLab: true,
		Listen: config.Listen{Address: "[::1]:1", SignSocket: "/s", SignSocketGroup: "root", AdminSocket: "/a"},
		Protector: config.Protector{
			Kind: "hsm",
			TPM:  config.TPM{Device: "tcp:localhost:2321", PCRs: []int{7}, NVRoot: 0x01800601, PolicyKey: "/etc/policy.pem", NVCounter: 0x01800602, NVReceipts: 0x01800603, PIN: "cred:tpm", EventLog: "/log", SRKHandle: 0x81000002, Timeout: time.Second},
			HSM:  config.HSM{URI: "pkcs11:token=a%20b?module-path=/m", PIN: "file:" + pin, SecondURI: "pkcs11:token=c?module-path=/l", SecondPIN: "cred:c", Modules: []string{"/l", "/m"}, Method: "aes-kw", Erasure: "device", InitArgs: "a='b'", MaxSessions: 2, Timeout: 3 * time.Second, Environment: []string{"A", "_b1"}, Objects: config.Objects{Identity: "i", Wrap: "id=%01"}},
		},
		Limits: config.Limits{Message: 1, SignDeadline: time.Second, KeygenDeadline: time.Hour, SessionsPerPeer: 2, PeerRate: 3, EpochsPerPeer: 8, ErasuresPerHour: 10, CallerRate: 4, Presignatures: 5},
		Log:    config.Log{Level: "debug", Format: "json"},
	}
	if diff := cmp.Diff(got, want, ignoreOrigins); diff != "" {
		t.Errorf("got -, want +:\n%s", diff)
	}
}

func full(pin string) string {
	return fmt.Sprintf(`
name = "alpha"
state = "/nowhere/state"
roster = "/nowhere/roster.toml"
insecure_lab = true
listen = { address = "[::1]:1", sign_socket = "/s", sign_socket_group = "root", admin_socket = "/a" }
protector.kind = "hsm"
[protector.tpm]
device = "tcp:localhost:2321"
pcrs = [7]
nv_root = 0x01800601
policy_key = "/etc/policy.pem"
nv_counter = 0x01800602
nv_receipts = 0x01800603
pin = "cred:tpm"
event_log = "/log"
srk_handle = 0x81000002
timeout = "1s"
[protector.hsm]
uri = "pkcs11:token=a%%20b?module-path=/m"
pin = "file:%s"
second_uri = "pkcs11:token=c?module-path=/l"
second_pin = "cred:c"
modules = ["/l", "/m"]
method = "aes-kw"
erasure = "device"
init_args = "a='b'"
max_sessions = 2
timeout = "3s"
environment = ["A", "_b1"]
objects = { identity = "i", wrap = "id=%%01" }
[limits]
message = 1
sign_deadline = "1s"
keygen_deadline = "1h"
sessions_per_peer = 2
peer_rate = 3
epochs_per_peer = 8
erasures_per_hour = 10
caller_rate = 4
presignatures = 5
[log]
level = "debug"
format = "json"
`, pin)
}

func TestEnvironment(t *testing.T) {
	pin := file(t, "1234", 0o600)
	variables := map[string]string{
		"CONSEAL_NAME": "beta", "CONSEAL_STATE": "/s", "CONSEAL_ROSTER": "/r", "CONSEAL_INSECURE_LAB": "true",
		"CONSEAL_LISTEN_ADDRESS": ":7", "CONSEAL_LISTEN_SIGN_SOCKET": "/sign", "CONSEAL_LISTEN_ADMIN_SOCKET": "/admin",
		"CONSEAL_LISTEN_SIGN_SOCKET_GROUP": "", "CONSEAL_PROTECTOR_KIND": "hsm", "CONSEAL_PROTECTOR_TPM_DEVICE": "unix:/t",
		"CONSEAL_PROTECTOR_TPM_PCRS": "0, 7", "CONSEAL_PROTECTOR_TPM_NV_ROOT": "0x01800700", "CONSEAL_PROTECTOR_TPM_POLICY_KEY": "/k", "CONSEAL_PROTECTOR_TPM_NV_COUNTER": "0x01800701", "CONSEAL_PROTECTOR_TPM_PIN": "fd:7", "CONSEAL_PROTECTOR_TPM_EVENT_LOG": "",
		"CONSEAL_PROTECTOR_TPM_NV_RECEIPTS": "0x01800702",
		"CONSEAL_PROTECTOR_TPM_SRK_HANDLE":  "0x81000005", "CONSEAL_PROTECTOR_TPM_TIMEOUT": "2s",
		"CONSEAL_PROTECTOR_HSM_URI": "pkcs11:serial=1?module-path=/x&pin-source=file:" + pin, "CONSEAL_PROTECTOR_HSM_PIN": "",
		"CONSEAL_PROTECTOR_HSM_SECOND_URI": "pkcs11:serial=2?module-path=/x", "CONSEAL_PROTECTOR_HSM_SECOND_PIN": "fd:8",
		"CONSEAL_PROTECTOR_HSM_MODULES": "/x", "CONSEAL_PROTECTOR_HSM_METHOD": "aes-kwp", "CONSEAL_PROTECTOR_HSM_ERASURE": "replicated", "CONSEAL_PROTECTOR_HSM_INIT_ARGS": "c", "CONSEAL_PROTECTOR_HSM_MAX_SESSIONS": "3",
		"CONSEAL_PROTECTOR_HSM_TIMEOUT": "4s", "CONSEAL_PROTECTOR_HSM_ENVIRONMENT": "C,D", "CONSEAL_PROTECTOR_HSM_OBJECTS_IDENTITY": "id=a", "CONSEAL_PROTECTOR_HSM_OBJECTS_WRAP": "w",
		"CONSEAL_LIMITS_MESSAGE": "10", "CONSEAL_LIMITS_SIGN_DEADLINE": "3s", "CONSEAL_LIMITS_KEYGEN_DEADLINE": "4s",
		"CONSEAL_LIMITS_SESSIONS_PER_PEER": "5", "CONSEAL_LIMITS_PEER_RATE": "6", "CONSEAL_LIMITS_EPOCHS_PER_PEER": "9", "CONSEAL_LIMITS_ERASURES_PER_HOUR": "11", "CONSEAL_LIMITS_CALLER_RATE": "7",
		"CONSEAL_LIMITS_PRESIGNATURES": "4",
		"CONSEAL_LOG_LEVEL":            "error", "CONSEAL_LOG_FORMAT": "json",
	}
	for name, value := range variables {
		t.Setenv(name, value)
	}
	got, err := load(t, full("/not/there"))
	if err != nil {
		t.Fatal(err)
	}
	want := &config.Host{
		Name: "beta", State: "/s", Roster: "/r", InsecureLab: true,
		Listen: config.Listen{Address: ":7", SignSocket: "/sign", AdminSocket: "/admin"},
		Protector: config.Protector{
			Kind: "hsm",
			TPM:  config.TPM{Device: "unix:/t", PCRs: []int{0, 7}, NVRoot: 0x01800700, PolicyKey: "/k", NVCounter: 0x01800701, NVReceipts: 0x01800702, PIN: "fd:7", SRKHandle: 0x81000005, Timeout: 2 * time.Second},
			HSM:  config.HSM{URI: "pkcs11:serial=1?module-path=/x&pin-source=file:" + pin, SecondURI: "pkcs11:serial=2?module-path=/x", SecondPIN: "fd:8", Modules: []string{"/x"}, Method: "aes-kwp", Erasure: "replicated", InitArgs: "c", MaxSessions: 3, Timeout: 4 * time.Second, Environment: []string{"C", "D"}, Objects: config.Objects{Identity: "id=a", Wrap: "w"}},
		},
		Limits: config.Limits{Message: 10, SignDeadline: 3 * time.Second, KeygenDeadline: 4 * time.Second, SessionsPerPeer: 5, PeerRate: 6, EpochsPerPeer: 9, ErasuresPerHour: 11, CallerRate: 7, Presignatures: 4},
		Log:    config.Log{Level: "error", Format: "json"},
	}
	if diff := cmp.Diff(got, want, ignoreOrigins); diff != "" {
		t.Errorf("got -, want +:\n%s", diff)
	}
	if got, want := len(variables), leaves(reflect.TypeFor[config.Host]()); got != want {
		t.Errorf("variables tried: got %d, want %d, one for each key", got, want)
	}
}

func leaves(t reflect.Type) int {
	n := 0
	for f := range t.Fields() {
		switch {
		case f.Tag.Get("toml") == "":
		case f.Type.Kind() == reflect.Struct:
			n += leaves(f.Type)
		default:
			n++
		}
	}
	return n
}

func TestEnvironmentRefused(t *testing.T) {
	tests := []struct{ name, value, want string }{
		{"CONSEAL_LOGLEVEL", "info", "CONSEAL_LOGLEVEL: unknown variable: did you mean CONSEAL_LOG_LEVEL? If not, unset it"},
		{"CONSEAL_SIGN_SOCKETS", "x", "CONSEAL_SIGN_SOCKETS: unknown variable: unset it"},
		{"CONSEAL_LISTEN", "x", "CONSEAL_LISTEN: unknown variable: unset it"},
		{"CONSEAL_LOG_LEVEL", "inf", `CONSEAL_LOG_LEVEL: "inf": wants "debug" or "info" or "warn" or "error"; did you mean "info"?`},
		{"CONSEAL_LOG_LEVEL", "", `CONSEAL_LOG_LEVEL: missing: wants "debug" or "info" or "warn" or "error"`},
		{"CONSEAL_LIMITS_MESSAGE", "1 MB", `CONSEAL_LIMITS_MESSAGE: "1 MB": wants a whole number, without point or quotes`},
		{"CONSEAL_LIMITS_MESSAGE", "010", `CONSEAL_LIMITS_MESSAGE: "010": wants a whole number, without point or quotes`},
		{"CONSEAL_LIMITS_SIGN_DEADLINE", "10", `CONSEAL_LIMITS_SIGN_DEADLINE: "10": wants a duration such as "90s" or "2m"`},
		{"CONSEAL_INSECURE_LAB", "1", `CONSEAL_INSECURE_LAB: "1": wants true or false`},
		{"CONSEAL_PROTECTOR_TPM_PCRS", "", `CONSEAL_PROTECTOR_TPM_PCRS: empty: shares would open in any state of the host; wants some of 0 to 15, such as [0, 2, 4, 7]`},
		{"CONSEAL_PROTECTOR_TPM_PCRS", "7,", `CONSEAL_PROTECTOR_TPM_PCRS: [7 ]: wants a list of numbers: [1, 2]`},
		{"CONSEAL_PROTECTOR_TPM_NV_ROOT", "0x1018000600", `CONSEAL_PROTECTOR_TPM_NV_ROOT: 69122131456: wants a smaller number`},
		{"CONSEAL_ROSTER", "/a\x01b", `CONSEAL_ROSTER: "/a\x01b": wants text on one line, in quotes`},
		{"CONSEAL_PROTECTOR_HSM_PIN", "4711", `CONSEAL_PROTECTOR_HSM_PIN: wants where the PIN is, "file:/PATH", "fd:N" from 3 on or "cred:NAME": the PIN itself never stands in the configuration`},
	}
	for _, test := range tests {
		t.Run(test.name+"="+test.value, func(t *testing.T) {
			t.Setenv(test.name, test.value)
			_, err := load(t, `name = "alpha"`)
			if diff := cmp.Diff(refusals(err, ""), []string{test.want}); diff != "" {
				t.Errorf("got -, want +:\n%s", diff)
			}
		})
	}
}

func TestLoadRefused(t *testing.T) {
	const hsm = "name = \"a\"\nprotector.kind = \"hsm\"\n[protector.hsm]\n"
	tests := []struct{ toml, want string }{
		{``, `FILE: name: missing: wants small letters, digits and "-", at most 63, the first no "-"`},
		{`name = "Alpha"`, `FILE:1: name: "Alpha": wants small letters, digits and "-", at most 63, the first no "-"`},
		{`name = 1`, `FILE:1: name: 1: wants text on one line, in quotes`},
		{`name = {}`, `FILE:1: name: a table: wants text on one line, in quotes`},
		{`name = "a`, `FILE:1: basic string not terminated by "`},
		{"name = 'a'\nname = 'b'", `FILE:2: name: set twice, first in line 1`},
		{"name = 'a'\n[log]\n[log]", `FILE:3: log: set twice, first in line 2`},
		{"name = 'a'\nlog = 'info'", `FILE:2: log: wants a table: [log]`},
		{"name = 'a'\n[[log]]", `FILE:2: log: wants a table: [log]`},
		{"name = 'a'\nnmae = 'b'", `FILE:2: nmae: unknown key: did you mean "name"?`},
		{"name = 'a'\nNAME = 'b'", `FILE:2: NAME: unknown key: did you mean "name"?`},
		{"name = 'a'\nlevel = 'debug'", `FILE:2: level: unknown key: did you mean "log.level"?`},
		{"name = 'a'\n'log.level' = 'debug'", `FILE:2: "log.level": unknown key: did you mean "log.level"?`},
		{"name = 'a'\n[log]\nlevle = 'debug'", `FILE:3: log.levle: unknown key: did you mean "level"?`},
		{"name = 'a'\n[log]\ncolour = true", `FILE:3: log.colour: unknown key: known here are format, level`},
		{"name = 'a'\n[logs]\nlevel = 'debug'", `FILE:2: logs: unknown key: did you mean "log"?`},
		{"name = 'a'\nlog = { levle = 'debug' }", `FILE:2: log.levle: unknown key: did you mean "level"?`},
		{"name = 'a'\nstate = 'var'", `FILE:2: state: "var": wants a path that begins with /`},
		{"name = 'a'\nroster = ''", `FILE:2: roster: "": wants a path that begins with /`},
		{"name = 'a'\ninsecure_lab = 'true'", `FILE:2: insecure_lab: "true": wants true or false`},
		{"name = 'a'\nlisten.address = 'alpha'", `FILE:2: listen.address: "alpha": wants host:port, the port 1 to 65535`},
		{"name = 'a'\nlisten.address = ':0'", `FILE:2: listen.address: ":0": wants host:port, the port 1 to 65535`},
		{"name = 'a'\nlisten.address = 'a b:1'", `FILE:2: listen.address: "a b:1": wants a host name or an IP address before the port`},
		{"name = 'a'\nlisten.sign_socket = '/" + strings.Repeat("x", 107) + "'", `FILE:2: listen.sign_socket: 108 bytes long: a socket's path has at most 107`},
		{"name = 'a'\nlisten.sign_socket = '/run/conseal//admin.sock'", `FILE: listen.admin_socket: is sign_socket too: services would be administrators`},
		{"name = 'a'\nlisten.sign_socket_group = 'no-such-group'", `FILE:2: listen.sign_socket_group: "no-such-group": no such group here: groupadd --system no-such-group`},
		{"name = 'a'\nprotector.kind = 'tmp'", `FILE:2: protector.kind: "tmp": wants "tpm" or "hsm"; did you mean "tpm"?`},
		{"name = 'a'\nprotector.tpm.device = '/dev/tpmrm0'", `FILE:2: protector.tpm.device: "/dev/tpmrm0": wants "device:PATH", "unix:PATH" or "tcp:HOST:PORT"`},
		{"name = 'a'\nprotector.tpm.device = 'device:tpmrm0'", `FILE:2: protector.tpm.device: "tpmrm0": wants a path that begins with /`},
		{"name = 'a'\nprotector.tpm.device = 'tcp:0.0.0.0:1'", `FILE:2: protector.tpm.device: "tcp:0.0.0.0:1": wants an address that other hosts can dial`},
		{"name = 'a'\nprotector.tpm.pcrs = []", `FILE:2: protector.tpm.pcrs: empty: shares would open in any state of the host; wants some of 0 to 15, such as [0, 2, 4, 7]`},
		{"name = 'a'\nprotector.tpm.pcrs = [24]", `FILE:2: protector.tpm.pcrs: 24: wants PCRs of 0 to 23`},
		{"name = 'a'\nprotector.tpm.pcrs = [-1]", `FILE:2: protector.tpm.pcrs: -1: wants PCRs of 0 to 23`},
		{"name = 'a'\nprotector.tpm.pcrs = [16]", `FILE:2: protector.tpm.pcrs: 16: any process may reset this PCR, so it proves nothing: leave it out`},
		{"name = 'a'\nprotector.tpm.pcrs = [7, 7]", `FILE:2: protector.tpm.pcrs: 7 is there twice`},
		{"name = 'a'\nprotector.tpm.pcrs = 7", `FILE:2: protector.tpm.pcrs: 7: wants a list of numbers: [1, 2]`},
		{"name = 'a'\nprotector.tpm.nv_root = 0x01c00002", `FILE:2: protector.tpm.nv_root: 0x01c00002: wants 0x01800000 to 0x01bfffff`},
		{"name = 'a'\nprotector.tpm.nv_counter = 0x01800600", `FILE:2: protector.tpm.nv_counter: is nv_root too: they need an index each`},
		{"name = 'a'\nprotector.tpm.nv_receipts = 0x01c00002", `FILE:2: protector.tpm.nv_receipts: 0x01c00002: wants 0x01800000 to 0x01bfffff`},
		{"name = 'a'\nprotector.tpm.nv_receipts = 0x01800600", `FILE:2: protector.tpm.nv_receipts: is nv_root too: they need an index each`},
		{"name = 'a'\nprotector.tpm.nv_receipts = 0x01800601", `FILE:2: protector.tpm.nv_receipts: is nv_counter too: they need an index each`},
		{"name = 'a'\nprotector.tpm.policy_key = 'key.pem'", `FILE:2: protector.tpm.policy_key: "key.pem": wants a path that begins with /`},
		{"name = 'a'\nprotector.tpm.event_log = 'log'", `FILE:2: protector.tpm.event_log: "log": wants a path that begins with /`},
		{"name = 'a'\nprotector.tpm.srk_handle = 1", `FILE:2: protector.tpm.srk_handle: 0x00000001: wants 0x81000000 to 0x817fffff`},
		{"name = 'a'\nprotector.tpm.timeout = 30", `FILE:2: protector.tpm.timeout: 30: wants a duration such as "90s" or "2m"`},
		{"name = 'a'\nprotector.tpm.timeout = '0s'", `FILE:2: protector.tpm.timeout: 0s: wants 1s to 10m0s`},
		{"name = 'a'\nlimits.message = 4194305", `FILE:2: limits.message: 4194305: wants 1 to 4194304`},
		{"name = 'a'\nlimits.message = 1.5", `FILE:2: limits.message: 1.5: wants a whole number, without point or quotes`},
		{"name = 'a'\nlimits.peer_rate = 0", `FILE:2: limits.peer_rate: 0: wants 1 to 1000000`},
		{"name = 'a'\nlimits.sign_deadline = '-1s'", `FILE:2: limits.sign_deadline: -1s: wants 100ms to 10m0s`},
		{"name = 'a'\nlog.format = 'xml'", `FILE:2: log.format: "xml": wants "text" or "json"`},
		{hsm + "pin = 'fd:3'\nmodules = ['/m']", `FILE:3: protector.hsm.uri: missing: wants the token, "pkcs11:token=LABEL;serial=SERIAL"`},
		{hsm + "pin = 'fd:3'\nmodules = ['/m']\nuri = 'token=a'", `FILE:6: protector.hsm.uri: wants a URI that begins with "pkcs11:"`},
		{hsm + "pin = 'fd:3'\nmodules = ['/m']\nuri = 'pkcs11:?module-path=/m'", `FILE:6: protector.hsm.uri: has neither token nor serial: it would fit any token`},
		{hsm + "pin = 'fd:3'\nmodules = ['/m']\nuri = 'pkcs11:token=a;token=b'", `FILE:6: protector.hsm.uri: has token twice`},
		{hsm + "pin = 'fd:3'\nmodules = ['/m']\nuri = 'pkcs11:token=%zz'", `FILE:6: protector.hsm.uri: the value of token is not percent-encoded as it should be`},
		{hsm + "pin = 'fd:3'\nmodules = ['/m', '/n']\nuri = 'pkcs11:token=a'", `FILE:6: protector.hsm.uri: has no module-path: add ?module-path=/m`},
		{hsm + "pin = 'fd:3'\nmodules = ['/m']\nuri = 'pkcs11:token=a?module-path=/n'", `FILE:5: protector.hsm.modules: "/n", the URI's module-path, is not among them`},
		{hsm + "pin = 'fd:3'\nmodules = ['/m', 'm']\nuri = 'pkcs11:token=a?module-path=/m'", `FILE:5: protector.hsm.modules: "m": wants a path that begins with /`},
		{hsm + "pin = 'fd:3'\nmodules = ['/m', '/m']\nuri = 'pkcs11:token=a?module-path=/m'", `FILE:5: protector.hsm.modules: "/m" is there twice`},
		{hsm + "pin = 'fd:3'\nuri = 'pkcs11:token=a'", `FILE:3: protector.hsm.modules: missing: wants the PKCS#11 libraries that may be loaded: ["/usr/lib/softhsm/libsofthsm2.so"]`},
		{hsm + "modules = ['/m']\nuri = 'pkcs11:token=a?module-path=/m'", `FILE:3: protector.hsm.pin: missing: wants "file:/PATH", "fd:N" or "cred:NAME"`},
		{hsm + "modules = ['/m']\nuri = 'pkcs11:token=a?module-path=/m&pin-source=fd:3'\npin = 'fd:3'", `FILE:6: protector.hsm.pin: the URI has a pin-source as well: keep one of them`},
		{hsm + "modules = ['/m']\nuri = 'pkcs11:token=a?module-path=/m'\npin = 'file:/not/there'", `FILE:6: protector.hsm.pin: /not/there does not exist: install -m 0600 /dev/null /not/there, then write the PIN to it`},
		{hsm + "pin = 'fd:3'\nmodules = ['/m']\nuri = 'pkcs11:token=a?module-path=/m'\nsecond_uri = 'pkcs11:object=a?module-path=/m'\nsecond_pin = 'fd:4'", `FILE:7: protector.hsm.second_uri: has neither token nor serial: it would fit any token`},
		{hsm + "pin = 'fd:3'\nmodules = ['/m']\nuri = 'pkcs11:token=a?module-path=/m'\nsecond_uri = 'pkcs11:token=b'\nsecond_pin = 'fd:4'", `FILE:7: protector.hsm.second_uri: has no module-path: add ?module-path=/m`},
		{hsm + "pin = 'fd:3'\nmodules = ['/m', '/n']\nuri = 'pkcs11:token=a;serial=1?module-path=/m'\nsecond_uri = 'pkcs11:serial=%31;token=%61?module-path=/n'\nsecond_pin = 'fd:4'", `FILE:7: protector.hsm.second_uri: names the token that uri names: wants another one`},
		{hsm + "modules = ['/m']\nuri = 'pkcs11:token=a?module-path=/m&pin-source=fd:3'\nsecond_uri = 'pkcs11:token=b?module-path=/m'", `FILE:3: protector.hsm.second_pin: missing: wants "file:/PATH", "fd:N" or "cred:NAME"`},
		{hsm + "pin = 'fd:3'\nmodules = ['/m']\nuri = 'pkcs11:token=a?module-path=/m'\nsecond_uri = 'pkcs11:token=b?module-path=/m'", `FILE:3: protector.hsm.second_pin: both tokens would read fd:3, at the same time: give the second a descriptor of its own`},
		{hsm + "pin = 'fd:3'\nmodules = ['/m']\nuri = 'pkcs11:token=a?module-path=/m'\nsecond_pin = 'fd:4'", `FILE:7: protector.hsm.second_pin: there is no second_uri`},
		{"name = 'a'\nprotector.hsm.erasure = 'devise'", `FILE:2: protector.hsm.erasure: "devise": wants "device" or "host-file" or "replicated"; did you mean "device"?`},
		{"name = 'a'\nprotector.hsm.objects.wrap = 'id=%0'", `FILE:2: protector.hsm.objects.wrap: "id=%0": wants a label, or "id=" and the percent-encoded id, "id=%01%AB"`},
		{"name = 'a'\nprotector.hsm.objects.identity = 'id='", `FILE:2: protector.hsm.objects.identity: "id=": wants a label, or "id=" and the percent-encoded id, "id=%01%AB"`},
		{"name = 'a'\nprotector.hsm.objects.identity = 'conseal/a/identity'", `FILE:2: protector.hsm.objects.identity: "conseal/a/identity": labels that begin with conseal/ are those of keys that hosts make for themselves: name another key, or leave this out`},
		{"name = 'a'\nprotector.hsm.method = 'aes-cbc'", `FILE:2: protector.hsm.method: "aes-cbc": wants "aes-gcm" or "aes-kw-enc" or "aes-kw" or "aes-kwp" or "rsa-oaep-sha256" or "hmac-sha256-prf" or "rsa-oaep-sha1"`},
		{hsm + "modules = ['/m']\nuri = 'pkcs11:token=a?module-path=/m'\npin = 'fd:3'\nmax_sessions = 0", `FILE:7: protector.hsm.max_sessions: 0: wants 1 to 1024`},
		{hsm + "modules = ['/m']\nuri = 'pkcs11:token=a?module-path=/m'\npin = 'fd:3'\ntimeout = '1ms'", `FILE:7: protector.hsm.timeout: 1ms: wants 1s to 10m0s`},
		{hsm + "modules = ['/m']\nuri = 'pkcs11:token=a?module-path=/m'\npin = 'fd:3'\nenvironment = ['A=1']", `FILE:7: protector.hsm.environment: "A=1": wants the name of a variable, not its value`},
		{hsm + "modules = ['/m']\nuri = 'pkcs11:token=a?module-path=/m'\npin = 'fd:3'\nenvironment = ['A', 'A']", `FILE:7: protector.hsm.environment: "A" is there twice`},
	}
	for _, test := range tests {
		t.Run(test.want, func(t *testing.T) {
			path := file(t, test.toml, 0o600)
			h, err := config.Load(path)
			if diff := cmp.Diff(refusals(err, path), []string{test.want}); diff != "" {
				t.Errorf("got -, want +:\n%s", diff)
			}
			if h != nil {
				t.Error("a refused configuration was returned")
			}
		})
	}
}

func TestErrorsDoNotRepeatPINs(t *testing.T) {
	const pin = "47110815"
	for _, content := range []string{
		`pin = "` + pin + `"`, `pin = ` + pin, `pin = ["` + pin + `"]`, `pin = "file:` + pin + `"`, `pin = "cred:` + pin + `/"`,
		`uri = "pkcs11:token=a?pin-value=` + pin + `"`, `uri = "pkcs11:token=a?PIN-VALUE=` + pin + `"`, `uri = ` + pin,
		`uri = "pkcs11:token=a?pin-source=` + pin + `"`, `uri = "pkcs11:token=a?pin-source=%z` + pin + `"`,
		`pin_value = "` + pin + `"`, `pin = "` + pin, `pin = '` + pin + `' '`,
	} {
		_, err := load(t, "name = \"a\"\n[protector.hsm]\n"+content)
		if err == nil {
			t.Errorf("%s: accepted", content)
		} else if strings.Contains(err.Error(), pin) {
			t.Errorf("%s: the error shows the PIN: %v", content, err)
		}
	}
}

func TestModes(t *testing.T) {
	tests := []struct {
		name string
		make func(t *testing.T) (path, blame string)
		want string // BLAME is the path of what is to blame
	}{
		{"configuration that others can write", func(t *testing.T) (string, string) {
			path := file(t, `name = "a"`, 0o646)
			return path, path
		}, "BLAME: other users may write it (mode 0646): chmod go-w BLAME"},
		{"configuration that is a folder", func(t *testing.T) (string, string) {
			path := t.TempDir()
			return path, path
		}, "BLAME: not a regular file"},
		{"configuration that is missing", func(t *testing.T) (string, string) {
			path := filepath.Join(t.TempDir(), "none")
			return path, path
		}, "BLAME: reading it: open BLAME: no such file or directory"},
		{"state that others can read", func(t *testing.T) (string, string) {
			state := t.TempDir()
			if err := os.Chmod(state, 0o750); err != nil {
				t.Fatal(err)
			}
			return file(t, fmt.Sprintf("name = 'a'\nstate = %q", state), 0o644), state
		}, "FILE:2: state: the folder's mode is 0750 and must be 0700: chmod 0700 BLAME"},
		{"state that is a file", func(t *testing.T) (string, string) {
			state := file(t, "", 0o600)
			return file(t, fmt.Sprintf("name = 'a'\nstate = %q", state), 0o644), state
		}, "FILE:2: state: BLAME is not a folder"},
		{"PIN that others can read", func(t *testing.T) (string, string) {
			pin := file(t, "1234", 0o640)
			return file(t, full(pin), 0o644), pin
		}, "FILE:21: protector.hsm.pin: other users may read or write BLAME (mode 0640): chmod 0600 BLAME"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			path, blame := test.make(t)
			_, err := config.Load(path)
			want := strings.ReplaceAll(test.want, "BLAME", blame)
			if path == blame {
				want = strings.ReplaceAll(want, path, "FILE")
			}
			if diff := cmp.Diff(refusals(err, path), []string{want}); diff != "" {
				t.Errorf("got -, want +:\n%s", diff)
			}
		})
	}
}

func TestEverythingWrongAtOnce(t *testing.T) {
	t.Setenv("CONSEAL_LIMITS_PEER_RATE", "fast")
	path := file(t, `nmae = "alpha"
state = 1
insecure_lab = "no"
[listen]
adress = "x"
sign_socket = "sock"
[protector]
kind = "tpn"
[protector.tpm]
pcrs = []
timeout = 30
[limits]
message = 99999999
[log]
level = "loud"
`, 0o644)
	_, err := config.Load(path)
	want := []string{
		`FILE: name: missing: wants small letters, digits and "-", at most 63, the first no "-"`,
		`FILE:1: nmae: unknown key: did you mean "name"?`,
		`FILE:2: state: 1: wants text on one line, in quotes`,
		`FILE:3: insecure_lab: "no": wants true or false`,
		`FILE:5: listen.adress: unknown key: did you mean "address"?`,
		`FILE:6: listen.sign_socket: "sock": wants a path that begins with /`,
		`FILE:8: protector.kind: "tpn": wants "tpm" or "hsm"; did you mean "tpm"?`,
		`FILE:10: protector.tpm.pcrs: empty: shares would open in any state of the host; wants some of 0 to 15, such as [0, 2, 4, 7]`,
		`FILE:11: protector.tpm.timeout: 30: wants a duration such as "90s" or "2m"`,
		`FILE:13: limits.message: 99999999: wants 1 to 4194304`,
		`FILE:15: log.level: "loud": wants "debug" or "info" or "warn" or "error"`,
		`CONSEAL_LIMITS_PEER_RATE: "fast": wants a whole number, without point or quotes`,
	}
	if diff := cmp.Diff(refusals(err, path), want); diff != "" {
		t.Errorf("got -, want +:\n%s", diff)
	}
}

func TestCheckWithoutFile(t *testing.T) {
	h := config.Default()
	want := config.Problems{{Key: "name", Text: `missing: wants small letters, digits and "-", at most 63, the first no "-"`}}
	if diff := cmp.Diff(h.Check(), want); diff != "" {
		t.Errorf("got -, want +:\n%s", diff)
	}
	h.Name = "a"
	if got := h.Check(); len(got) != 0 {
		t.Errorf("got %v, want no problems", got)
	}
}

func TestHostileFiles(t *testing.T) {
	many := strings.Repeat("[", 1<<19)
	var keys strings.Builder
	for i := range 80_000 {
		fmt.Fprintf(&keys, "k%d = 1\n", i)
	}
	tests := []struct{ name, toml, want string }{
		{"long", strings.Repeat("#", 1<<20+1), "longer than 1048576 bytes"},
		{"nested arrays", "name = " + many, "more than 65536 brackets"},
		{"unknown keys", keys.String(), "too many unknown keys: is this the right file?"},
		{"unknown keys inside", "x = {" + strings.ReplaceAll(keys.String(), "\n", ",") + "y = 1}", "too many unknown keys: is this the right file?"},
		{"dotted key", "log." + strings.Repeat("a.", 1<<18) + "a = 1", "too many unknown keys: is this the right file?"},
		{"dotted key in an unknown table", "[x]\n" + strings.Repeat("a.", 1<<18) + "a = 1", "too many unknown keys: is this the right file?"},
		{"nested lists", "name = " + strings.Repeat("[", 1<<15) + strings.Repeat("]", 1<<15), "wants text on one line, in quotes"},
		{"nested tables", "name = " + strings.Repeat("{a=", 1<<15) + "1" + strings.Repeat("}", 1<<15), "too many unknown keys: is this the right file?"},
		{"pcrs", "protector.tpm.pcrs = [" + strings.Repeat("99,", 1<<16) + "]", "and 65437 more"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			_, err := load(t, test.toml)
			lines := refusals(err, "")
			if !slices.ContainsFunc(lines, func(s string) bool { return strings.HasSuffix(s, test.want) }) {
				t.Errorf("got %d problems, the last %.200q, want one that ends with %q", len(lines), lines[len(lines)-1], test.want)
			}
		})
	}
}

func TestPrint(t *testing.T) {
	t.Setenv("CONSEAL_LOG_LEVEL", "debug")
	h, err := load(t, "name = 'alpha'\n[protector.tpm]\npcrs = [7]\n")
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	if err := h.Print(&out); err != nil {
		t.Fatal(err)
	}
	want, err := os.ReadFile("testdata/printed.toml")
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(out.String(), string(want)); diff != "" {
		t.Errorf("got -, want +:\n%s", diff)
	}
	again, err := load(t, out.String())
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(again, h, ignoreOrigins); diff != "" {
		t.Errorf("read back -, printed +:\n%s", diff)
	}
}

func FuzzLoadHost(f *testing.F) {
	f.Add("name = 'alpha'\n[protector.tpm]\npcrs = [7]\n")
	f.Add(full("/not/there"))
	f.Add("name = 'a'\nlisten = {sign_socket = '/\u200b\u00e9'}\nprotector.hsm.modules = ['/\\\"']")
	path := filepath.Join(f.TempDir(), "fuzz.toml")
	write := func(t *testing.T, b []byte) {
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	f.Fuzz(func(t *testing.T, content string) {
		write(t, []byte(content))
		h, err := config.Load(path)
		if err != nil {
			return
		}
		var out bytes.Buffer
		if err := h.Print(&out); err != nil {
			t.Fatal(err)
		}
		write(t, out.Bytes())
		again, err := config.Load(path)
		if err != nil {
			t.Fatalf("what was printed is refused: %v\n%s", err, out.Bytes())
		}
		if diff := cmp.Diff(again, h, ignoreOrigins); diff != "" {
			t.Errorf("read back -, printed +:\n%s", diff)
		}
	})
}
