package main_test

import (
	"io"
	"path/filepath"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"

	"conseal/testenv"
)

// TestStories tells every story to its end.
func TestStories(t *testing.T) {
	bin, err := testenv.Build(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer testenv.Clean()
	p, ended := testenv.Stories(t.Context(), bin, "testdata", io.Discard)
	t.Run("told", func(t *testing.T) { testscript.Run(t, p) })
	files, err := filepath.Glob("testdata/*.txtar")
	if err != nil || len(files) == 0 {
		t.Fatalf("no stories: %v", err)
	}
	if ended() != len(files) {
		t.Errorf("%d of %d stories got to their end", ended(), len(files))
	}
}
