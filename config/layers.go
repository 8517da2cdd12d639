package config

import (
	"bytes"
	"fmt"
	"reflect"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/viper"
)

const envPrefix = "CONSEAL_"

func envName(key string) string {
	return envPrefix + strings.ToUpper(strings.ReplaceAll(key, ".", "_"))
}

// environment notes which keys the environment sets and refuses variables with
// our prefix that set none: a misspelt limit would be no limit.
func (r *report) environment(options []option, environ []string) {
	keys := map[string]string{}
	var names []string
	for _, o := range options {
		keys[o.env()] = o.key
		names = append(names, strings.TrimPrefix(o.env(), envPrefix))
	}
	slices.Sort(environ)
	for _, variable := range environ {
		name, _, _ := strings.Cut(variable, "=")
		rest, ours := strings.CutPrefix(name, envPrefix)
		if !ours {
			continue
		}
		if name == "CONSEAL_SIGN_SOCKET" || name == "CONSEAL_ADMIN_SOCKET" {
			continue // where the conseal command finds the agent
		}
		if key, known := keys[name]; known {
			r.env[key] = name
			continue
		}
		hint := ""
		if near := nearest(rest, names); near != "" {
			hint = fmt.Sprintf("did you mean %s%s? If not, ", envPrefix, near)
		}
		r.problem(Problem{Key: name, Text: "unknown variable: " + hint + "unset it"})
	}
}

// fill sets in h, which holds the defaults, what the file b and the environment
// say, and notes the origin of every value.
func (h *Host) fill(r *report, b []byte) {
	options := h.options()
	v := viper.New() // not viper's global one; nothing is watched
	v.SetConfigType("toml")
	v.AllowEmptyEnv(true)
	for _, o := range options {
		v.SetDefault(o.key, o.value.Interface())
		_ = v.BindEnv(o.key, o.env()) // fails only without a key
	}
	if err := v.ReadConfig(bytes.NewReader(b)); err != nil {
		r.problem(Problem{File: r.file, Text: err.Error()})
		return
	}
	h.origins = map[string]string{}
	for _, o := range options {
		raw := v.Get(o.key)
		switch {
		case r.env[o.key] != "":
			raw = fromText(v.GetString(o.key), o.value.Type())
			h.origins[o.key] = o.env()
		case r.lines[o.key] > 0:
			h.origins[o.key] = fmt.Sprintf("file, line %d", r.lines[o.key])
		default:
			h.origins[o.key] = "default"
			continue
		}
		if wanted := decode(raw, o.value); wanted != "" {
			r.refuse(o.key, "%swants %s", show(raw, o.hidden), wanted)
		}
	}
}

// fromText turns the text of a variable into what TOML would give for a value
// of type t. What it cannot turn stays text, which decode refuses.
func fromText(s string, t reflect.Type) any {
	switch {
	case t.Kind() == reflect.Bool && (s == "true" || s == "false"):
		return s == "true"
	case t != durationType && (t.Kind() == reflect.Int || t.Kind() == reflect.Uint32):
		octal := len(s) > 1 && s[0] == '0' && s[1] >= '0' && s[1] <= '9' // 010 would be 8
		if n, err := strconv.ParseInt(s, 0, 64); err == nil && !octal {
			return n
		}
	case t.Kind() == reflect.Slice:
		list := []any{}
		for part := range strings.SplitSeq(s, ",") {
			if part = strings.TrimSpace(part); part != "" || strings.TrimSpace(s) != "" {
				list = append(list, fromText(part, t.Elem()))
			}
		}
		return list
	}
	return s
}
