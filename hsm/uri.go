package hsm

import (
	"encoding/hex"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"

	"conseal/internal/pin"
)

// URI is what a PKCS#11 URI (RFC 7512) selects. An empty or nil field selects
// nothing: it was not in the URI, for an attribute without value is refused.
type URI struct {
	Token, Manufacturer, Model, Serial string // of the token
	SlotID                             *uint

	Object, Type string // of an object
	ID           []byte

	ModulePath, ModuleName, PINSource string // query
}

// attribute is a text attribute of a URI.
type attribute struct {
	name  string
	query bool
	max   int // bytes; those of the token from CK_TOKEN_INFO, PKCS#11 v2.40 section 3.2
	field func(*URI) *string
}

// attributes are all text attributes, in the order in which they are written.
func attributes() []attribute {
	return []attribute{
		{"token", false, 32, func(u *URI) *string { return &u.Token }},
		{"manufacturer", false, 32, func(u *URI) *string { return &u.Manufacturer }},
		{"model", false, 16, func(u *URI) *string { return &u.Model }},
		{"serial", false, 16, func(u *URI) *string { return &u.Serial }},
		{"object", false, 1024, func(u *URI) *string { return &u.Object }},
		{"type", false, 16, func(u *URI) *string { return &u.Type }},
		{"module-path", true, 1024, func(u *URI) *string { return &u.ModulePath }},
		{"module-name", true, 256, func(u *URI) *string { return &u.ModuleName }},
		{"pin-source", true, 1024, func(u *URI) *string { return &u.PINSource }},
	}
}

const (
	maxURI = 4096
	// RFC 7512 section 2.3: unreserved and pk11-res-avail, then what path and
	// query may hold besides.
	uriBoth  = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~" + ":[]@!$'()*+,="
	uriPath  = uriBoth + "&"
	uriQuery = uriBoth + "/?|"
)

// ParseURI parses a PKCS#11 URI strictly. It takes the attributes token,
// manufacturer, model, serial, slot-id, object, type and id, and the query
// attributes module-path, module-name and pin-source, each once and not empty.
// A PIN in the URI, a command as pin-source, and anything else are refused.
func ParseURI(s string) (*URI, error) {
	rest, ok := strings.CutPrefix(s, "pkcs11:")
	if !ok || len(s) > maxURI {
		return nil, fmt.Errorf("hsm: not a PKCS#11 URI: must start with pkcs11: and have at most %d bytes", maxURI)
	}
	path, query, hasQuery := strings.Cut(rest, "?")
	u := &URI{}
	seen := map[string]bool{}
	if path != "" {
		if err := u.parsePart(path, ";", false, seen); err != nil {
			return nil, fmt.Errorf("hsm: PKCS#11 URI: %w", err)
		}
	}
	if hasQuery {
		if err := u.parsePart(query, "&", true, seen); err != nil {
			return nil, fmt.Errorf("hsm: PKCS#11 URI: %w", err)
		}
	}
	return u, nil
}

func (u *URI) parsePart(part, separator string, query bool, seen map[string]bool) error {
	allowed := uriPath
	if query {
		allowed = uriQuery
	}
	for pair := range strings.SplitSeq(part, separator) {
		name, raw, ok := strings.Cut(pair, "=")
		if name == "pin-value" {
			return errors.New("pin-value is refused, a PIN does not belong in a URI: use pin-source")
		}
		if !ok || raw == "" {
			return fmt.Errorf("attribute %q has no value", name)
		}
		if seen[name] {
			return fmt.Errorf("attribute %q is given twice", name)
		}
		seen[name] = true
		value, err := unescape(raw, allowed)
		if err != nil {
			return fmt.Errorf("attribute %q: %w", name, err)
		}
		if err := u.set(name, value, query); err != nil {
			return fmt.Errorf("attribute %q: %w", name, err)
		}
	}
	return nil
}

// unescape undoes percent-encoding; what is not encoded must be in allowed.
func unescape(raw, allowed string) (string, error) {
	var b []byte
	for i := 0; i < len(raw); i++ {
		switch {
		case raw[i] == '%':
			if i+3 > len(raw) {
				return "", errors.New("cut percent-encoding")
			}
			c, err := hex.DecodeString(raw[i+1 : i+3])
			if err != nil {
				return "", errors.New("wrong percent-encoding")
			}
			b = append(b, c[0])
			i += 2
		case strings.IndexByte(allowed, raw[i]) < 0:
			return "", fmt.Errorf("the byte %q must be percent-encoded", raw[i])
		default:
			b = append(b, raw[i])
		}
	}
	return string(b), nil
}

func (u *URI) set(name, value string, query bool) error {
	switch {
	case name == "id" && !query:
		u.ID = []byte(value)
		return nil
	case name == "slot-id" && !query:
		n, err := strconv.ParseUint(value, 10, strconv.IntSize)
		if err != nil || strconv.FormatUint(n, 10) != value {
			return errors.New("not a decimal number that fits")
		}
		id := uint(n)
		u.SlotID = &id
		return nil
	}
	all := attributes()
	i := slices.IndexFunc(all, func(a attribute) bool { return a.name == name && a.query == query })
	if i < 0 {
		return errors.New("unknown or not supported here: remove it")
	}
	if len(value) > all[i].max {
		return fmt.Errorf("longer than %d bytes", all[i].max)
	}
	if !utf8.ValidString(value) || strings.ContainsFunc(value, func(r rune) bool { return r < ' ' || r == 0x7f }) {
		return errors.New("not text in UTF-8 without control characters")
	}
	*all[i].field(u) = value
	return checkText(name, value)
}

// checkText checks what RFC 7512 section 2.3 and this package ask of a text's form.
func checkText(name, value string) error {
	switch name {
	case "type":
		if !slices.Contains([]string{"public", "private", "cert", "secret-key", "data"}, value) {
			return fmt.Errorf("%q is not public, private, cert, secret-key or data", value)
		}
	case "module-path":
		if !filepath.IsAbs(value) {
			return errors.New("must be an absolute path")
		}
	case "module-name":
		if strings.ContainsRune(value, '/') {
			return errors.New("must not hold a slash: a path goes into module-path")
		}
	case "pin-source":
		_, err := pin.ParseSource(value)
		return err
	}
	return nil
}

// String is the URI in canonical form: [ParseURI] gives back an equal value.
func (u *URI) String() string {
	var query []string
	path := u.path()
	for _, a := range attributes() {
		if v := *a.field(u); a.query && v != "" {
			query = append(query, a.name+"="+escape(v, "/:"))
		}
	}
	if len(query) == 0 {
		return path
	}
	return path + "?" + strings.Join(query, "&")
}

// path is the URI without its query: what it selects.
func (u *URI) path() string {
	var path []string
	for _, a := range attributes() {
		if v := *a.field(u); !a.query && v != "" {
			path = append(path, a.name+"="+escape(v, ":"))
		}
	}
	if u.SlotID != nil {
		path = append(path, "slot-id="+strconv.FormatUint(uint64(*u.SlotID), 10))
	}
	if u.ID != nil {
		path = append(path, "id="+escapeAll(u.ID)) // RFC 7512 section 2.3: the whole id should be encoded
	}
	return "pkcs11:" + strings.Join(path, ";")
}

func escape(s, keep string) string {
	const unreserved = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~"
	var b strings.Builder
	for i := range len(s) {
		if strings.IndexByte(unreserved, s[i]) >= 0 || strings.IndexByte(keep, s[i]) >= 0 {
			b.WriteByte(s[i])
		} else {
			fmt.Fprintf(&b, "%%%02X", s[i])
		}
	}
	return b.String()
}

func escapeAll(id []byte) string {
	var b strings.Builder
	for _, c := range id {
		fmt.Fprintf(&b, "%%%02X", c)
	}
	return b.String()
}
