package config

import (
	"cmp"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
)

// Problem is one thing that is wrong, and what to do about it.
type Problem struct {
	File string // empty if the file is not to blame
	Line int    // in File, from 1; 0 if no line is to blame
	Key  string // as in "limits.message", or the environment's variable; may be empty
	Text string
}

// String is "file:line: key: text", without the parts that are unknown.
func (p Problem) String() string {
	s := p.Text
	if p.Key != "" {
		s = p.Key + ": " + s
	}
	switch {
	case p.File != "" && p.Line > 0:
		s = fmt.Sprintf("%s:%d: %s", p.File, p.Line, s)
	case p.File != "":
		s = p.File + ": " + s
	}
	return s
}

// Problems are all that is wrong. As an error it has one line for each.
type Problems []Problem

func (ps Problems) Error() string {
	lines := make([]string, len(ps))
	for i, p := range ps {
		lines[i] = p.String()
	}
	return strings.Join(lines, "\n")
}

// maxProblems is how many problems are listed; nobody reads on.
const maxProblems = 100

// maxFile is the size in bytes of the largest file that is read.
const maxFile = 1 << 20

// report collects problems and knows where each key was set. Keys are paths:
// "limits.message", "host[1].name".
type report struct {
	file     string
	lines    map[string]int    // of the keys and tables that the file sets
	env      map[string]string // variables, by the keys that they set
	labels   map[string]string // for people, of list elements: host "beta" for host[1]
	broken   map[string]bool   // keys without a value to check
	problems Problems
	more     int // problems not listed
}

func newReport(file string) *report {
	return &report{
		file: file, lines: map[string]int{}, env: map[string]string{},
		labels: map[string]string{}, broken: map[string]bool{},
	}
}

// problem adds p as it is.
func (r *report) problem(p Problem) {
	if len(r.problems) == maxProblems {
		r.more++
		return
	}
	r.problems = append(r.problems, p)
}

// add adds a problem of the value at path, unless there was no value to check.
func (r *report) add(path, format string, args ...any) {
	if r.broken[path] {
		return
	}
	if len(r.problems) == maxProblems {
		r.more++ // without the work of putting it into words
		return
	}
	p := Problem{File: r.file, Line: r.lines[path], Key: r.label(path), Text: fmt.Sprintf(format, args...)}
	if name := r.env[path]; name != "" {
		p = Problem{Key: name, Text: p.Text}
	}
	for table := path; p.Line == 0 && p.File != "" && strings.Contains(table, "."); {
		table = table[:strings.LastIndexByte(table, '.')]
		p.Line = r.lines[table] // a key that is missing: its table says where
	}
	r.problem(p)
}

// refuse adds a problem of the value at path that leaves nothing to check.
func (r *report) refuse(path, format string, args ...any) {
	r.add(path, format, args...)
	r.broken[path] = true
}

// label is the path for people.
func (r *report) label(path string) string {
	element, key, _ := strings.Cut(path, ".")
	label, known := r.labels[element]
	if !known {
		return path
	}
	return strings.TrimSpace(label + " " + key)
}

// err is [Problems], or nil if there are none.
func (r *report) err() error {
	if all := r.all(); len(all) > 0 {
		return all
	}
	return nil
}

// all is what was found, in the order of the file, then what is not in it.
func (r *report) all() Problems {
	all := r.problems
	slices.SortStableFunc(all, func(a, b Problem) int {
		if (a.File == "") != (b.File == "") {
			return cmp.Compare(b.File, a.File)
		}
		return cmp.Compare(a.Line, b.Line)
	})
	if r.more > 0 {
		all = append(all, Problem{File: r.file, Text: fmt.Sprintf("and %d more", r.more)})
	}
	return all
}

// read returns the content of the file at path, nil if it is refused. Size and
// mode are those of the file that was opened.
func (r *report) read(path string) []byte {
	b, err := readGuarded(path)
	if err != nil {
		r.problem(Problem{File: path, Text: err.Error()})
		return nil
	}
	return b
}

func readGuarded(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("reading it: %w", err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, fmt.Errorf("reading its mode: %w", err)
	}
	if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("not a regular file")
	}
	if mode := info.Mode().Perm(); mode&0o022 != 0 {
		return nil, fmt.Errorf("other users may write it (mode %04o): chmod go-w %s", mode, path)
	}
	b, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err != nil {
		return nil, fmt.Errorf("reading it: %w", err)
	}
	return b, nil
}

// repeated lists what is in list more than once.
func repeated(list []string) []string {
	seen := map[string]int{}
	var twice []string
	for _, s := range list {
		if seen[s]++; seen[s] == 2 {
			twice = append(twice, s)
		}
	}
	return twice
}

// nearest is the name in known that name was probably meant to be, "" if none
// is near. Names have parts, separated by "."; the right last part in the wrong
// table is near.
func nearest(name string, known []string) string {
	best, least := "", max(2, len(last(name))/3)+1
	for _, k := range known {
		d := distance(name, k)
		if strings.Contains(k, ".") || strings.Contains(name, ".") {
			d = min(d, distance(last(name), last(k))+1)
		}
		if d < least {
			best, least = k, d
		}
	}
	return best
}

func last(path string) string { return path[strings.LastIndexByte(path, '.')+1:] }

// distance is the number of letters to insert, delete or replace (Levenshtein)
// to get from a to b, whatever their case.
func distance(a, b string) int {
	a, b = strings.ToLower(a), strings.ToLower(b)
	if len(a) > 2*len(b)+8 {
		return len(a) // far: do not spend time on long nonsense
	}
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := diagonal
			if a[i] != b[j] {
				cost = 1 + min(diagonal, row[j], row[j+1])
			}
			diagonal, row[j+1] = row[j+1], cost
		}
	}
	return row[len(b)]
}
