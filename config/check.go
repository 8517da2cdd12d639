package config

import (
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"os"
	"os/user"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
)

const (
	maxMessage = 4 << 20 // bytes
	maxSocket  = 107     // bytes of a path: sun_path less its zero, unix(7)
)

const nameWanted = `small letters, digits and "-", at most 63, the first no "-"`

var (
	namePattern     = regexp.MustCompile(`^[a-z0-9][a-z0-9-]{0,62}$`) // of a fleet, host or key
	userPattern     = regexp.MustCompile(`^[a-z_][a-z0-9_.-]{0,31}$`) // useradd(8)
	variablePattern = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_]*$`)
	hostPattern     = regexp.MustCompile(`^[A-Za-z0-9_]([A-Za-z0-9_.-]{0,251}[A-Za-z0-9_.])?$`)
)

// Check returns everything that is wrong with h, and with the modes of the files
// that it names. Whether the TPM or HSM is there is not checked, nor the roster.
func (h *Host) Check() Problems {
	r := newReport("")
	h.check(r)
	return r.all()
}

func (h *Host) check(r *report) {
	r.name("name", h.Name)
	r.absolute("state", h.State)
	r.stateFolder(h.State)
	r.absolute("roster", h.Roster)
	h.Listen.check(r)
	r.oneOf("protector.kind", h.Protector.Kind, "tpm", "hsm")
	h.Protector.TPM.check(r, h.Protector.Kind == "tpm")
	h.Protector.HSM.check(r, h.Protector.Kind == "hsm")
	h.Limits.check(r)
	r.oneOf("log.level", h.Log.Level, "debug", "info", "warn", "error")
	r.oneOf("log.format", h.Log.Format, "text", "json")
}

func (l *Listen) check(r *report) {
	if _, err := canonicalAddress(l.Address, false); err != nil {
		r.add("listen.address", "%q: %v", l.Address, err)
	}
	r.socket("listen.sign_socket", l.SignSocket)
	r.socket("listen.admin_socket", l.AdminSocket)
	if filepath.Clean(l.SignSocket) == filepath.Clean(l.AdminSocket) {
		r.add("listen.admin_socket", "is sign_socket too: services would be administrators")
	}
	if l.SignSocketGroup == "" {
		return
	}
	if _, err := user.LookupGroup(l.SignSocketGroup); err != nil {
		r.add("listen.sign_socket_group", "%q: no such group here: groupadd --system %s", l.SignSocketGroup, l.SignSocketGroup)
	}
}

// check looks for the PIN only if the TPM is used.
func (t *TPM) check(r *report, used bool) {
	r.device("protector.tpm.device", t.Device)
	r.pcrs("protector.tpm.pcrs", t.PCRs)
	r.handle("protector.tpm.nv_root", t.NVRoot, 0x01800000, 0x01bfffff)
	if t.PolicyKey != "" {
		r.absolute("protector.tpm.policy_key", t.PolicyKey)
	}
	r.handle("protector.tpm.nv_counter", t.NVCounter, 0x01800000, 0x01bfffff)
	if t.NVCounter == t.NVRoot {
		r.add("protector.tpm.nv_counter", "is nv_root too: they need an index each")
	}
	if t.PIN != "" {
		r.pinSource("protector.tpm.pin", t.PIN, used)
	}
	if t.EventLog != "" {
		r.absolute("protector.tpm.event_log", t.EventLog)
	}
	r.handle("protector.tpm.nv_receipts", t.NVReceipts, 0x01800000, 0x01bfffff)
	switch t.NVReceipts {
	case t.NVRoot:
		r.add("protector.tpm.nv_receipts", "is nv_root too: they need an index each")
	case t.NVCounter:
		r.add("protector.tpm.nv_receipts", "is nv_counter too: they need an index each")
	}
	r.handle("protector.tpm.srk_handle", t.SRKHandle, 0x81000000, 0x817fffff)
	r.lasts("protector.tpm.timeout", t.Timeout, time.Second, 10*time.Minute)
}

// check demands a token, a PIN and a module only if the HSM is used, and
// refuses what is wrong, such as a PIN in the clear, in any case.
func (m *HSM) check(r *report, used bool) {
	if used && m.URI == "" {
		r.add("protector.hsm.uri", `missing: wants the token, "pkcs11:token=LABEL;serial=SERIAL"`)
	}
	m.checkToken(r, "", m.URI, m.PIN, used)
	if m.SecondURI != "" {
		m.checkToken(r, "second_", m.SecondURI, m.SecondPIN, used)
		if sameToken(m.URI, m.SecondURI) {
			r.add("protector.hsm.second_uri", "names the token that uri names: wants another one")
		}
	} else if m.SecondPIN != "" {
		r.add("protector.hsm.second_pin", "there is no second_uri")
	}
	if used && len(m.Modules) == 0 {
		r.add("protector.hsm.modules", `missing: wants the PKCS#11 libraries that may be loaded: ["/usr/lib/softhsm/libsofthsm2.so"]`)
	}
	for _, module := range m.Modules {
		r.absolute("protector.hsm.modules", module)
	}
	r.once("protector.hsm.modules", m.Modules)
	r.oneOf("protector.hsm.method", m.Method, "aes-gcm", "aes-kw-enc", "aes-kw", "aes-kwp", "rsa-oaep-sha256", "hmac-sha256-prf", "rsa-oaep-sha1")
	if m.Erasure != "" {
		r.oneOf("protector.hsm.erasure", m.Erasure, "device", "host-file", "replicated")
	}
	r.object("protector.hsm.objects.identity", m.Objects.Identity)
	r.object("protector.hsm.objects.wrap", m.Objects.Wrap)
	r.within("protector.hsm.max_sessions", m.MaxSessions, 1, 1024)
	r.lasts("protector.hsm.timeout", m.Timeout, time.Second, 10*time.Minute)
	for _, name := range m.Environment {
		if !variablePattern.MatchString(name) {
			r.add("protector.hsm.environment", "%s: wants the name of a variable, not its value", clip(strconv.Quote(name)))
		}
	}
	r.once("protector.hsm.environment", m.Environment)
}

// checkToken checks a token's uri and pin, whose keys begin with which.
func (m *HSM) checkToken(r *report, which, uri, pin string, used bool) {
	key := "protector.hsm." + which + "uri"
	attributes, err := attributesOf(uri)
	if err != nil {
		r.add(key, "%v", err)
	} else if uri != "" && attributes["token"] == "" && attributes["serial"] == "" {
		r.add(key, "has neither token nor serial: it would fit any token")
	}
	switch chosen := attributes["module-path"]; {
	case len(m.Modules) == 0 && used: // is said once
	case chosen != "" && !slices.Contains(m.Modules, chosen):
		r.add("protector.hsm.modules", "%s, the URI's module-path, is not among them", clip(strconv.Quote(chosen)))
	case used && chosen == "" && uri != "" && err == nil:
		r.add(key, "has no module-path: add ?module-path=%s", m.Modules[0])
	}
	inURI, pinKey := attributes["pin-source"], "protector.hsm."+which+"pin"
	switch {
	case which != "" && strings.HasPrefix(m.PIN, "fd:") && (pin == m.PIN || pin == "" && inURI == ""):
		r.add(pinKey, "both tokens would read %s, at the same time: give the second a descriptor of its own", m.PIN)
	case pin != "" && inURI != "":
		r.add(pinKey, "the URI has a pin-source as well: keep one of them")
	case inURI != "":
		r.pinSource(key, inURI, used)
	case pin != "":
		r.pinSource(pinKey, pin, used)
	case used && (which == "" || m.PIN == ""):
		r.add(pinKey, `missing: wants "file:/PATH", "fd:N" or "cred:NAME"`)
	}
}

// sameToken tells whether two URIs select by the same values: a wrong PIN would be sent to
// that token twice.
func sameToken(a, b string) bool {
	first, _ := attributesOf(a) // what is wrong with them was said
	second, _ := attributesOf(b)
	same := true
	for _, name := range []string{"token", "serial", "manufacturer", "model", "slot-id"} {
		same = same && first[name] == second[name]
	}
	return same
}

// attributesOf are those of a URI, of its path and its query. Errors name no
// value: one may be a PIN. What the attributes mean is package hsm's business.
func attributesOf(uri string) (map[string]string, error) {
	attributes := map[string]string{}
	if uri == "" {
		return attributes, nil
	}
	rest, ok := strings.CutPrefix(uri, "pkcs11:")
	if !ok {
		return nil, fmt.Errorf(`wants a URI that begins with "pkcs11:"`)
	}
	path, query, _ := strings.Cut(rest, "?")
	for _, part := range append(strings.Split(path, ";"), strings.Split(query, "&")...) {
		name, value, _ := strings.Cut(part, "=")
		value, err := url.PathUnescape(value)
		switch {
		case part == "":
		case strings.EqualFold(name, "pin-value"):
			return nil, fmt.Errorf("has a pin-value: a PIN never stands in the configuration; change that PIN, and use pin")
		case err != nil:
			return nil, fmt.Errorf("the value of %s is not percent-encoded as it should be", clip(name))
		case attributes[name] != "":
			return nil, fmt.Errorf("has %s twice", clip(name))
		default:
			attributes[name] = value
		}
	}
	return attributes, nil
}

// object checks the name of a key in a token.
func (r *report) object(path, name string) {
	escaped, isID := strings.CutPrefix(name, "id=")
	id, err := url.PathUnescape(escaped)
	switch {
	case isID && (err != nil || id == ""):
		r.add(path, `%s: wants a label, or "id=" and the percent-encoded id, "id=%%01%%AB"`, clip(strconv.Quote(name)))
	case strings.HasPrefix(name, "conseal/"):
		r.add(path, "%s: labels that begin with conseal/ are those of keys that hosts make for themselves: name another key, or leave this out", clip(strconv.Quote(name)))
	}
}

func (l *Limits) check(r *report) {
	r.within("limits.message", l.Message, 1, maxMessage)
	r.lasts("limits.sign_deadline", l.SignDeadline, 100*time.Millisecond, 10*time.Minute)
	r.lasts("limits.keygen_deadline", l.KeygenDeadline, time.Second, 24*time.Hour)
	r.within("limits.sessions_per_peer", l.SessionsPerPeer, 1, 1<<16)
	r.within("limits.peer_rate", l.PeerRate, 1, 1_000_000)
	r.within("limits.epochs_per_peer", l.EpochsPerPeer, 1, 1<<16)
	r.within("limits.erasures_per_hour", l.ErasuresPerHour, 1, 1<<16)
	r.within("limits.caller_rate", l.CallerRate, 1, 1_000_000)
	r.within("limits.presignatures", l.Presignatures, 0, 64)
}

func (r *report) name(path, s string) {
	switch {
	case s == "":
		r.add(path, "missing: wants %s", nameWanted)
	case !namePattern.MatchString(s):
		r.add(path, "%s: wants %s", clip(strconv.Quote(s)), nameWanted)
	}
}

func (r *report) oneOf(path, s string, allowed ...string) {
	if slices.Contains(allowed, s) {
		return
	}
	wanted := strconv.Quote(allowed[0])
	for _, a := range allowed[1:] {
		wanted += " or " + strconv.Quote(a)
	}
	if s == "" {
		r.add(path, "missing: wants %s", wanted)
		return
	}
	hint := ""
	if near := nearest(s, allowed); near != "" {
		hint = fmt.Sprintf("; did you mean %q?", near)
	}
	r.add(path, "%s: wants %s%s", clip(strconv.Quote(s)), wanted, hint)
}

func (r *report) once(path string, list []string) {
	for _, s := range repeated(list) {
		r.add(path, "%s is there twice", clip(strconv.Quote(s)))
	}
}

func (r *report) within(path string, n, least, most int) {
	if n < least || n > most {
		r.add(path, "%d: wants %d to %d", n, least, most)
	}
}

func (r *report) lasts(path string, d, least, most time.Duration) {
	if d < least || d > most {
		r.add(path, "%v: wants %v to %v", d, least, most)
	}
}

func (r *report) handle(path string, handle, least, most uint32) {
	if handle < least || handle > most {
		r.add(path, "0x%08x: wants 0x%08x to 0x%08x", handle, least, most)
	}
}

func (r *report) absolute(path, file string) {
	if !filepath.IsAbs(file) {
		r.add(path, "%s: wants a path that begins with /", clip(strconv.Quote(file)))
	}
}

func (r *report) socket(path, file string) {
	r.absolute(path, file)
	if len(file) > maxSocket {
		r.add(path, "%d bytes long: a socket's path has at most %d", len(file), maxSocket)
	}
}

func (r *report) device(path, device string) {
	kind, where, _ := strings.Cut(device, ":")
	switch kind {
	case "device":
		r.absolute(path, where)
	case "unix":
		r.socket(path, where)
	case "tcp":
		if _, err := canonicalAddress(where, true); err != nil {
			r.add(path, "%q: %v", device, err)
		}
	default:
		r.add(path, `%s: wants "device:PATH", "unix:PATH" or "tcp:HOST:PORT"`, clip(strconv.Quote(device)))
	}
}

func (r *report) pcrs(path string, pcrs []int) {
	if len(pcrs) == 0 {
		r.add(path, "empty: shares would open in any state of the host; wants some of 0 to 15, such as [0, 2, 4, 7]")
	}
	for i, pcr := range pcrs {
		switch {
		case pcr < 0 || pcr > 23:
			r.add(path, "%d: wants PCRs of 0 to 23", pcr)
		case pcr == 16 || pcr == 23:
			r.add(path, "%d: any process may reset this PCR, so it proves nothing: leave it out", pcr)
		case slices.Contains(pcrs[:i], pcr):
			r.add(path, "%d is there twice", pcr)
		}
	}
}

// stateFolder refuses a folder of shares that others can look into.
func (r *report) stateFolder(path string) {
	info, err := os.Stat(path)
	switch {
	case err != nil: // made by the agent, or named by its error
	case !info.IsDir():
		r.add("state", "%s is not a folder", path)
	case info.Mode().Perm() != 0o700:
		r.add("state", "the folder's mode is %04o and must be 0700: chmod 0700 %s", info.Mode().Perm(), path)
	}
}

// pinSource never repeats source, which may be the PIN by mistake. The file is
// looked at only if what needs the PIN is used.
func (r *report) pinSource(path, source string, used bool) {
	kind, where, _ := strings.Cut(source, ":")
	n, err := strconv.Atoi(where)
	switch {
	case kind == "file" && filepath.IsAbs(where) && filepath.Clean(where) == where:
		if used {
			r.secretFile(path, where)
		}
	case kind == "fd" && err == nil && n >= 3 && strconv.Itoa(n) == where:
	case kind == "cred" && where != "" && where != "." && where != ".." && !strings.Contains(where, "/"):
	default:
		r.add(path, `wants where the PIN is, "file:/PATH", "fd:N" from 3 on or "cred:NAME": the PIN itself never stands in the configuration`)
	}
}

func (r *report) secretFile(path, file string) {
	info, err := os.Stat(file)
	switch {
	case os.IsNotExist(err):
		r.add(path, "%s does not exist: install -m 0600 /dev/null %s, then write the PIN to it", file, file)
	case err != nil:
		r.add(path, "%v", err)
	case !info.Mode().IsRegular():
		r.add(path, "%s is not a regular file", file)
	case info.Mode().Perm()&0o077 != 0:
		r.add(path, "other users may read or write %s (mode %04o): chmod 0600 %s", file, info.Mode().Perm(), file)
	}
}

// canonicalAddress returns host:port in the one form that equal addresses have
// in common. An address to dial needs a host that is one host.
func canonicalAddress(address string, dial bool) (string, error) {
	host, port, err := net.SplitHostPort(address)
	n, portErr := strconv.ParseUint(port, 10, 16)
	if err != nil || portErr != nil || n == 0 {
		return "", fmt.Errorf("wants host:port, the port 1 to 65535")
	}
	ip, ipErr := netip.ParseAddr(host)
	switch {
	case ipErr == nil:
		host = ip.Unmap().String()
	case host == "" && !dial:
	case !hostPattern.MatchString(host):
		return "", fmt.Errorf("wants a host name or an IP address before the port")
	}
	if dial && ipErr == nil && ip.Unmap().IsUnspecified() {
		return "", fmt.Errorf("wants an address that other hosts can dial")
	}
	return net.JoinHostPort(strings.ToLower(host), strconv.FormatUint(n, 10)), nil
}
