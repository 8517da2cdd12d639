package secret_test

import (
	"bytes"
	"encoding/gob"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"strings"
	"sync"
	"testing"

	"conseal/internal/secret"
)

func TestTakeWipesItsSource(t *testing.T) {
	src := []byte("top secret")
	s := secret.Take(src)
	defer s.Wipe()
	if !bytes.Equal(src, make([]byte, 10)) {
		t.Errorf("source still holds %q", src)
	}
	err := s.Use(func(b []byte) error {
		if string(b) != "top secret" {
			t.Errorf("got %q", b)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

func TestReadTakesExactlyItsLength(t *testing.T) {
	r := strings.NewReader("top secret, and more")
	s, err := secret.Read(r, 10)
	if err != nil || !s.Equal(secret.Copy([]byte("top secret"))) || r.Len() != 10 {
		t.Errorf("%d bytes are left, %v", r.Len(), err)
	}
	if s, err := secret.Read(r, 11); s != nil || !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("more than there is: %v", err)
	}
}

func TestNothingPrintsOrMarshals(t *testing.T) {
	s := secret.Copy([]byte("top secret"))
	defer s.Wipe()
	wrapped := struct{ Key *secret.Bytes }{s}
	var log bytes.Buffer
	slog.New(slog.NewTextHandler(&log, nil)).Info("x", "key", s, "wrapped", wrapped)
	slog.New(slog.NewJSONHandler(&log, nil)).Info("x", "key", s, "wrapped", wrapped)
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%d"} {
		fmt.Fprintf(&log, verb, s)
		fmt.Fprintf(&log, verb, wrapped)
	}
	if _, err := json.Marshal(wrapped); err == nil {
		t.Error("JSON accepted a secret")
	}
	if err := gob.NewEncoder(&log).Encode(s); err == nil {
		t.Error("gob accepted a secret")
	}
	for _, leak := range []string{"top secret", "dG9wIHNlY3JldA", "746f7020736563726574", "116 111 112"} {
		if strings.Contains(log.String(), leak) {
			t.Errorf("output holds %q:\n%s", leak, log.String())
		}
	}
}

func TestUseAfterWipe(t *testing.T) {
	s := secret.Random(32)
	s.Wipe()
	s.Wipe()
	(*secret.Bytes)(nil).Wipe()
	if err := s.Use(func([]byte) error { return nil }); !errors.Is(err, secret.ErrWiped) {
		t.Errorf("got %v, want ErrWiped", err)
	}
	if s.Len() != 0 || s.Equal(s) || new(secret.Bytes).Equal(new(secret.Bytes)) {
		t.Error("a wiped secret has a length or equals something")
	}
}

func TestEqual(t *testing.T) {
	a, b, c := secret.Copy([]byte("abc")), secret.Copy([]byte("abc")), secret.Copy([]byte("abd"))
	if !a.Equal(b) || a.Equal(c) || a.Equal(secret.Copy([]byte("ab"))) {
		t.Error("Equal is wrong")
	}
}

func TestWipeWaitsForUse(t *testing.T) {
	s := secret.Random(64)
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for range 200 {
				_ = s.Use(func(b []byte) error { _ = b[63]; return nil })
			}
		})
	}
	s.Wipe()
	wg.Wait()
}

func TestCloneIsItsOwn(t *testing.T) {
	s := secret.Copy([]byte("abc"))
	c, err := s.Clone()
	if err != nil || !c.Equal(s) {
		t.Fatalf("a clone differs: %v", err)
	}
	s.Wipe()
	defer c.Wipe()
	if err := c.Use(func(b []byte) error {
		if string(b) != "abc" {
			t.Errorf("after the original was wiped the clone is %q", b)
		}
		return nil
	}); err != nil {
		t.Error(err)
	}
	if _, err := s.Clone(); !errors.Is(err, secret.ErrWiped) {
		t.Errorf("cloning what was wiped: %v", err)
	}
}
