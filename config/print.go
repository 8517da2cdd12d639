package config

import (
	"fmt"
	"io"
	"reflect"
	"strings"
	"time"
)

// Print writes the values that h has as TOML that [Load] reads back to the same
// values, each with a comment on where it comes from: "default", "file, line 3"
// or the name of a variable.
func (h *Host) Print(w io.Writer) error {
	var out strings.Builder
	table := ""
	for _, o := range h.options() {
		if t := o.key[:max(0, strings.LastIndexByte(o.key, '.'))]; t != table {
			table = t
			fmt.Fprintf(&out, "\n[%s]\n", table)
		}
		line := last(o.key) + " = " + literal(o.value)
		if origin := h.origins[o.key]; origin != "" {
			line = fmt.Sprintf("%-44s # %s", line, origin)
		}
		out.WriteString(line + "\n")
	}
	_, err := io.WriteString(w, out.String())
	return err
}

// literal is v in TOML. Text has no control characters, so that Go's quoting is
// TOML's; handles, the only unsigned numbers, are hexadecimal as in TPM manuals.
func literal(v reflect.Value) string {
	switch x := v.Interface().(type) {
	case time.Duration:
		return fmt.Sprintf("%q", x.String())
	case string:
		return fmt.Sprintf("%q", x)
	case uint32:
		return fmt.Sprintf("0x%08x", x)
	}
	if v.Kind() != reflect.Slice {
		return fmt.Sprint(v.Interface())
	}
	items := make([]string, v.Len())
	for i := range items {
		items[i] = literal(v.Index(i))
	}
	return "[" + strings.Join(items, ", ") + "]"
}
