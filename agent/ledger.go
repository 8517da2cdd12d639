package agent

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"conseal/internal/disk"
)

// entry is one line of the audit log. Every field but Sequence, Time and Prev is
// the writer's.
type entry struct {
	Sequence uint64    `json:"seq"`
	Time     time.Time `json:"time"`
	// Prev is SHA-256 of the line before, without its newline: a line that is
	// taken out or changed breaks the chain.
	Prev string `json:"prev"`
	// Event is "ask": a caller here asked; "sign": this host lends its share; "reshare": it
	// deals new shares from its share of an epoch; "suspend": no line of the key that is one of these follows, until "resume".
	Event   string   `json:"event"`
	Key     string   `json:"key"` // "*" for all, with "suspend" and "resume"
	Epoch   string   `json:"epoch,omitempty"`
	Session string   `json:"session,omitempty"`
	Asker   string   `json:"asker"` // the host that coordinates
	Signers []string `json:"signers,omitempty"`
	Caller  *caller  `json:"caller,omitempty"` // only at the asking host
	SHA256  string   `json:"sha256"`           // of the message
	Size    int      `json:"size"`
	// Presignature is the id of the one that is used up, if any.
	Presignature string `json:"presignature,omitempty"`
	Reason       string `json:"reason,omitempty"` // of a suspension
}

// errLedger is returned for entries that did not reach the disk.
var errLedger = errors.New("audit log")

// ledger is the audit log: one JSON line for every use of a key, on disk before
// the use. Lines that come at the same time share one fsync.
type ledger struct {
	path string
	in   chan *pendingEntry
	done chan struct{} // closed when the writer has ended
	stop context.CancelFunc

	// dealt has, by key, the sessions in which this host dealt before it started.
	dealt map[string]dealings

	// Owned by the writer goroutine.
	f        *os.File
	size     int64 // bytes that are known to be on disk
	sequence uint64
	head     [32]byte // hash of the last line on disk
	torn     bool     // bytes of a failed write may stand behind size
}

// dealings are the sessions in which a host dealt from one epoch, its last.
type dealings struct {
	epoch    string
	sessions map[string]bool
}

type pendingEntry struct {
	e       entry
	settled chan struct{} // closed once err says whether it is on disk
	err     error
}

// openLedger verifies the chain of the log in dir and starts its writer. A last
// line without its end is what a crash leaves: no use followed it, and it is cut
// off. Anything else that does not fit is an error.
func openLedger(dir string) (*ledger, error) {
	l := &ledger{path: filepath.Join(dir, "audit.log"), in: make(chan *pendingEntry, 256), done: make(chan struct{}), dealt: map[string]dealings{}}
	f, err := os.OpenFile(l.path, os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, fmt.Errorf("opening the audit log: %w", err)
	}
	l.f = f
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil { // before verify, which may cut its end off
		f.Close()
		return nil, fmt.Errorf("locking the audit log %s: %w: another agent runs with this state folder; stop it first", l.path, err)
	}
	if err := l.verify(); err != nil {
		f.Close()
		return nil, err
	}
	if err := disk.Sync(dir); err != nil {
		f.Close()
		return nil, fmt.Errorf("syncing the audit log's folder: %w", err)
	}
	ctx, stop := context.WithCancel(context.Background())
	l.stop = stop
	go l.write(ctx)
	return l, nil
}

// verify reads the whole log and leaves the writer's state at its end.
func (l *ledger) verify() error {
	r := bufio.NewReaderSize(l.f, 1<<20)
	for {
		line, err := r.ReadBytes('\n')
		if err == io.EOF {
			if len(line) > 0 { // torn by a crash: the use that it announces did not happen
				if err := l.f.Truncate(l.size); err != nil {
					return fmt.Errorf("cutting off the audit log's unfinished last line: %w", err)
				}
			}
			return nil
		}
		if err != nil {
			return fmt.Errorf("reading the audit log: %w", err)
		}
		var e entry
		if err := json.Unmarshal(line, &e); err != nil || e.Sequence != l.sequence+1 || e.Prev != hex.EncodeToString(l.head[:]) {
			return fmt.Errorf("the audit log %s was changed: line %d does not follow the line before it; keep the file as evidence, move it away, and start again", l.path, l.sequence+1)
		}
		if e.Event == "reshare" {
			l.noteDealt(&e)
		}
		l.sequence++
		l.head = sha256.Sum256(bytes.TrimSuffix(line, []byte("\n")))
		l.size += int64(len(line))
	}
}

func (l *ledger) noteDealt(e *entry) {
	d := l.dealt[e.Key]
	if d.epoch != e.Epoch {
		d = dealings{e.Epoch, map[string]bool{}}
		l.dealt[e.Key] = d
	}
	d.sessions[e.Session] = true
}

// Append enters e and returns at once. The function it returns waits until e is
// on disk, as often as it is called; what e announces must not happen before it
// returned nil.
func (l *ledger) Append(e entry) (wait func(context.Context) error) {
	p := &pendingEntry{e: e, settled: make(chan struct{})}
	select {
	case l.in <- p:
	case <-l.done:
		return func(context.Context) error { return fmt.Errorf("%w: closed", errLedger) }
	}
	return func(ctx context.Context) error {
		select {
		case <-p.settled:
			return p.err
		case <-l.done:
			select {
			case <-p.settled:
				return p.err
			default:
				return fmt.Errorf("%w: closed", errLedger)
			}
		case <-ctx.Done():
			return fmt.Errorf("%w: %w", errLedger, context.Cause(ctx))
		}
	}
}

// write is the writer goroutine: it takes what is there, writes it in one go and
// syncs once.
func (l *ledger) write(ctx context.Context) {
	defer close(l.done)
	for {
		var batch []*pendingEntry
		select {
		case <-ctx.Done():
			return
		case p := <-l.in:
			batch = append(batch, p)
		}
		for more := true; more && len(batch) < 256; {
			select {
			case p := <-l.in:
				batch = append(batch, p)
			default:
				more = false
			}
		}
		err := l.commit(batch)
		for _, p := range batch {
			p.err = err
			close(p.settled)
		}
	}
}

// commit writes a batch after what is known to be on disk. If that fails,
// nothing of it counts, and the next batch is written over it.
func (l *ledger) commit(batch []*pendingEntry) error {
	sequence, head := l.sequence, l.head
	var out bytes.Buffer
	for _, p := range batch {
		sequence++
		p.e.Sequence, p.e.Time, p.e.Prev = sequence, time.Now().UTC(), hex.EncodeToString(head[:])
		line, err := json.Marshal(p.e)
		if err != nil {
			return fmt.Errorf("%w: %w", errLedger, err)
		}
		head = sha256.Sum256(line)
		out.Write(append(line, '\n'))
	}
	if err := l.put(out.Bytes()); err != nil {
		l.torn = true
		return fmt.Errorf("%w: %w; nothing is signed that cannot be logged: make room in %s", errLedger, err, filepath.Dir(l.path))
	}
	l.sequence, l.head = sequence, head
	l.size += int64(out.Len())
	return nil
}

func (l *ledger) put(lines []byte) error {
	if l.torn {
		if err := l.f.Truncate(l.size); err != nil {
			return err
		}
		l.torn = false
	}
	if _, err := l.f.WriteAt(lines, l.size); err != nil {
		return err
	}
	return unix.Fdatasync(int(l.f.Fd()))
}

// Close ends the writer. Entries that wait are refused.
func (l *ledger) Close() error {
	l.stop()
	<-l.done
	return l.f.Close()
}
