package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"conseal/config"
	"conseal/hsm"
	"conseal/internal/disk"
)

// erasureRecord is what `conseald init` guessed of a token, kept in the token's folder.
type erasureRecord struct {
	Version int         `json:"version"`
	Erasure hsm.Erasure `json:"erasure"`
	Why     string      `json:"why"`
}

const erasureVersion = 1

func erasurePath(folder string) string { return filepath.Join(folder, "erasure.json") }

func recordErasure(folder string, p hsm.Provisioned) error {
	b, err := json.MarshalIndent(erasureRecord{erasureVersion, p.Erasure, p.ErasureWhy}, "", "  ")
	if err != nil {
		return err
	}
	return disk.WriteFile(erasurePath(folder), append(b, '\n'))
}

// erasure says how final it is that this host's tokens destroy a key, and who says so:
// the configuration, or the records, of which the least counts. It is told and decides
// nothing, so that a record that is missing or damaged stops no agent.
func erasure(c *config.Host) (kind, why string) {
	if e := c.Protector.HSM.Erasure; e != "" {
		return e, "protector.hsm.erasure says so"
	}
	folders := []string{hsmFolder(c)}
	if c.Protector.HSM.SecondURI != "" {
		folders = append(folders, secondFolder(c))
	}
	least := len(hsm.Erasures())
	for _, folder := range folders {
		r, err := readErasure(folder)
		if err != nil {
			return "", err.Error()
		}
		if at := slices.Index(hsm.Erasures(), r.Erasure); at < least {
			least, kind, why = at, string(r.Erasure), "a guess: "+r.Why
		}
	}
	return kind, why
}

func readErasure(folder string) (r erasureRecord, err error) {
	path := erasurePath(folder)
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return r, errors.New("not recorded: run `conseald init` again, or set protector.hsm.erasure")
	}
	if err != nil {
		return r, err
	}
	if err := json.Unmarshal(b, &r); err != nil || r.Version != erasureVersion || !slices.Contains(hsm.Erasures(), r.Erasure) {
		return r, fmt.Errorf("%s is damaged or of another version: remove it and run `conseald init` again", path)
	}
	return r, nil
}
