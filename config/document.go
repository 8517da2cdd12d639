package config

import (
	"bytes"
	"encoding"
	"errors"
	"fmt"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/pelletier/go-toml/v2"
	"github.com/pelletier/go-toml/v2/unstable"
)

// Bounds that no sensible file reaches. go-toml v2 recurses on brackets until
// the stack is full, which ends the process, and takes time quadratic in the
// keys of a table: 25 s for 100,000 of them.
const (
	maxBrackets = 1 << 16
	maxUnknown  = 50
)

// parse reads a TOML document, notes the line of every key, and refuses keys
// that are not those of schema, a struct with toml tags. It returns nil if
// there is no document to go on with.
func (r *report) parse(b []byte, schema reflect.Type) map[string]any {
	if b == nil {
		return nil
	}
	if len(b) > maxFile {
		r.problem(Problem{File: r.file, Text: fmt.Sprintf("longer than %d bytes", maxFile)})
		return nil
	}
	if bytes.Count(b, []byte("["))+bytes.Count(b, []byte("{")) > maxBrackets {
		r.problem(Problem{File: r.file, Text: fmt.Sprintf("more than %d brackets", maxBrackets)})
		return nil
	}
	ix := &index{r: r, doc: b, line: 1, kinds: kindsOf(schema, ""), elements: map[string]int{}}
	if !ix.walk() {
		return nil
	}
	doc := map[string]any{}
	if err := toml.Unmarshal(b, &doc); err != nil {
		p := Problem{File: r.file, Text: strings.TrimPrefix(err.Error(), "toml: ")}
		if where := (*toml.DecodeError)(nil); errors.As(err, &where) {
			p.Line, _ = where.Position()
		}
		if p.Line > 0 || !ix.twice {
			r.problem(p)
		}
		return nil
	}
	return doc
}

// kind says what a key of a schema holds.
type kind int

const (
	aValue  kind = iota
	aTable       // [name]
	aTables      // [[name]]
)

// kindsOf lists the keys of the struct t: of list elements without index.
func kindsOf(t reflect.Type, base string) map[string]kind {
	kinds := map[string]kind{}
	for f := range t.Fields() {
		name := f.Tag.Get("toml")
		if name == "" || name == "-" {
			continue
		}
		name, _, _ = strings.Cut(name, ",")
		path, inner := join(base, name), f.Type
		kinds[path] = aValue
		if inner.Kind() == reflect.Slice && inner.Elem().Kind() == reflect.Struct {
			kinds[path], inner = aTables, inner.Elem()
		} else if inner.Kind() == reflect.Struct {
			kinds[path] = aTable
		}
		if kinds[path] != aValue {
			for sub, k := range kindsOf(inner, path) {
				kinds[sub] = k
			}
		}
	}
	return kinds
}

func join(base, name string) string {
	if base == "" {
		return name
	}
	return base + "." + name
}

// index walks over the expressions of a document: the only way to the lines of
// values, which go-toml does not keep.
type index struct {
	r        *report
	doc      []byte
	offset   int // of line
	line     int
	kinds    map[string]kind
	elements map[string]int // of [[tables]], so far
	unknown  int
	twice    bool // a key was set twice
}

// place is where a key is: with index for lines, without for the schema.
type place struct{ path, pattern string }

// walk returns whether the document is worth parsing. Syntax errors end it and
// are left to go-toml, which says more about them.
func (ix *index) walk() bool {
	p := unstable.Parser{}
	p.Reset(ix.doc)
	at, ok := place{}, true
	for p.NextExpression() {
		e := p.Expression()
		if e.Kind == unstable.KeyValue {
			ix.keyValue(at, e, ok)
		} else {
			at, ok = ix.enter(place{}, e)
		}
		if ix.unknown > maxUnknown {
			ix.r.problem(Problem{File: ix.r.file, Line: ix.line, Text: "too many unknown keys: is this the right file?"})
			return false
		}
	}
	return true
}

// keyValue notes a key and what is in its inline tables. Inside of what is not
// known, it only counts.
func (ix *index) keyValue(base place, e *unstable.Node, known bool) {
	at := base
	if known {
		at, known = ix.enter(base, e)
	} else {
		ix.countUnknown(e.Key())
	}
	ix.inside(at, e.Value(), known)
}

func (ix *index) inside(at place, value *unstable.Node, known bool) {
	children := value.Children()
	for i := 0; children.Next(); i++ {
		switch child := children.Node(); {
		case value.Kind == unstable.InlineTable:
			ix.keyValue(at, child, known)
		case child.Kind == unstable.InlineTable:
			ix.inside(place{fmt.Sprintf("%s[%d]", at.path, i), at.pattern}, child, known)
		default:
			ix.inside(at, child, false) // no list of lists is known
		}
	}
}

// enter follows the key of a table or value from base, and notes its line. It
// returns false, and the reason is reported, if nothing may be there.
func (ix *index) enter(base place, e *unstable.Node) (at place, known bool) {
	at = base
	for it := e.Key(); it.Next(); {
		node := it.Node()
		name := string(node.Data)
		if !plain(name) {
			name = strconv.Quote(name) // a dot in quotes is no dot
		}
		at = place{join(at.path, name), join(at.pattern, name)}
		ix.advance(int(node.Raw.Offset))
		k, found := ix.kinds[at.pattern]
		if !found {
			ix.unknown++
			ix.countUnknown(it)
			ix.r.problem(Problem{File: ix.r.file, Line: ix.line, Key: clip(at.pattern), Text: "unknown key" + ix.hint(at.pattern)})
			return at, false
		}
		if it.IsLast() {
			known = ix.settle(&at, e, k)
			return at, known
		}
		at.path += ix.element(at.path)
	}
	return at, false // a key has a part at least
}

// countUnknown counts the parts of a key that are left: go-toml makes a table
// of each.
func (ix *index) countUnknown(parts unstable.Iterator) {
	for parts.Next() {
		ix.unknown++
	}
}

// settle notes the line of the key at at, which e ends with, and refuses what
// is no table where a table has to be.
func (ix *index) settle(at *place, e *unstable.Node, k kind) bool {
	if e.Kind == unstable.ArrayTable && k == aTables {
		ix.elements[at.path]++
		at.path += ix.element(at.path)
	}
	if first := ix.r.lines[at.path]; first > 0 {
		ix.twice = true
		ix.r.problem(Problem{File: ix.r.file, Line: ix.line, Key: at.pattern, Text: fmt.Sprintf("set twice, first in line %d", first)})
	}
	ix.r.lines[at.path] = ix.line
	inline := e.Kind == unstable.KeyValue && e.Value().Kind == unstable.InlineTable
	if k == aTable && e.Kind != unstable.Table && !inline {
		ix.r.refuse(at.path, "wants a table: [%s]", at.pattern)
		return false
	}
	return true
}

// element is the index of the last [[table]] at path, "" if it is none.
func (ix *index) element(path string) string {
	if n := ix.elements[path]; n > 0 {
		return fmt.Sprintf("[%d]", n-1)
	}
	return ""
}

// advance counts lines up to offset; the parser only goes forward.
func (ix *index) advance(offset int) {
	if offset > ix.offset {
		ix.line += bytes.Count(ix.doc[ix.offset:offset], []byte("\n"))
		ix.offset = offset
	}
}

// hint says what an unknown key may have been meant to be.
func (ix *index) hint(pattern string) string {
	table := pattern[:max(0, strings.LastIndexByte(pattern, '.'))]
	var all, siblings []string
	for k := range ix.kinds {
		all = append(all, k)
		if parent := k[:max(0, strings.LastIndexByte(k, '.'))]; parent == table {
			siblings = append(siblings, last(k))
		}
	}
	slices.Sort(all)
	slices.Sort(siblings)
	if near := nearest(pattern, all); near != "" {
		if strings.TrimSuffix(near, last(near)) == strings.TrimSuffix(pattern, last(pattern)) {
			near = last(near)
		}
		return fmt.Sprintf(": did you mean %q?", near)
	}
	if len(siblings) == 0 {
		return ""
	}
	return ": known here are " + strings.Join(siblings, ", ")
}

// plain tells whether a key is spelt as ours are.
func plain(name string) bool {
	return name != "" && !strings.ContainsFunc(name, func(c rune) bool {
		return c != '_' && c != '-' && (c > unicode.MaxASCII || !unicode.IsLetter(c) && !unicode.IsDigit(c))
	})
}

var durationType = reflect.TypeFor[time.Duration]()

// decode sets dst to raw, a value as go-toml gives it. It returns what was
// wanted instead, "" if all is well.
func decode(raw any, dst reflect.Value) (wanted string) {
	if text, ok := dst.Addr().Interface().(encoding.TextUnmarshaler); ok {
		s, _ := raw.(string)
		if err := text.UnmarshalText([]byte(s)); err != nil {
			return err.Error()
		}
		return ""
	}
	if dst.Type() == durationType {
		s, _ := raw.(string)
		d, err := time.ParseDuration(s)
		if err != nil {
			return `a duration such as "90s" or "2m"`
		}
		dst.SetInt(int64(d))
		return ""
	}
	switch dst.Kind() {
	case reflect.Slice:
		return decodeList(raw, dst)
	case reflect.Bool:
		b, ok := raw.(bool)
		if !ok {
			return "true or false"
		}
		dst.SetBool(b)
	case reflect.String:
		s, ok := raw.(string)
		if !ok || !utf8.ValidString(s) || strings.ContainsFunc(s, unicode.IsControl) {
			return "text on one line, in quotes"
		}
		dst.SetString(s)
	default:
		return decodeNumber(raw, dst)
	}
	return ""
}

func decodeNumber(raw any, dst reflect.Value) (wanted string) {
	n, ok := raw.(int64)
	switch {
	case !ok:
		return "a whole number, without point or quotes"
	case dst.CanInt() && !dst.OverflowInt(n):
		dst.SetInt(n)
	case dst.CanUint() && n >= 0 && !dst.OverflowUint(uint64(n)):
		dst.SetUint(uint64(n))
	case dst.CanUint() && n < 0:
		return "0 or more"
	default:
		return "a smaller number"
	}
	return ""
}

func decodeList(raw any, dst reflect.Value) (wanted string) {
	list, ok := raw.([]any)
	values := reflect.MakeSlice(dst.Type(), len(list), len(list))
	for i, v := range list {
		ok = ok && decode(v, values.Index(i)) == ""
	}
	switch {
	case ok:
		dst.Set(values)
		return ""
	case dst.Type().Elem().Kind() == reflect.String:
		return `a list of text: ["one", "two"]`
	}
	return "a list of numbers: [1, 2]"
}

// decodeTable sets the fields of the struct dst to what is in doc.
func (r *report) decodeTable(doc map[string]any, dst reflect.Value, path string) {
	for f, field := range dst.Fields() {
		name, _, _ := strings.Cut(f.Tag.Get("toml"), ",")
		raw, set := doc[name]
		at := join(path, name)
		switch {
		case !set:
		case field.Kind() == reflect.Slice && field.Type().Elem().Kind() == reflect.Struct:
			r.decodeTables(raw, field, at)
		default:
			if wanted := decode(raw, field); wanted != "" {
				r.refuse(at, "%swants %s", show(raw, false), wanted)
			}
		}
	}
}

func (r *report) decodeTables(raw any, dst reflect.Value, path string) {
	list, ok := raw.([]any)
	dst.Set(reflect.MakeSlice(dst.Type(), len(list), len(list)))
	for i, element := range list {
		at := fmt.Sprintf("%s[%d]", path, i)
		r.labels[at] = fmt.Sprintf("%s %d", path, i+1)
		table, isTable := element.(map[string]any)
		ok = ok && isTable
		r.decodeTable(table, dst.Index(i), at)
	}
	if !ok {
		r.refuse(path, "wants one [[%s]] for each", path)
	}
}

// show is a value for an error, with ": " after it; nothing if it is hidden.
func show(raw any, hidden bool) string {
	if hidden {
		return ""
	}
	text := fmt.Sprint(raw)
	switch v := raw.(type) {
	case string:
		text = strconv.Quote(v)
	case map[string]any:
		text = "a table"
	}
	return clip(text) + ": "
}

// clip bounds what an error repeats of a file.
func clip(s string) string {
	const most = 80
	if len(s) <= most {
		return s
	}
	return strings.ToValidUTF8(s[:most], "") + "..."
}
