#!/bin/sh
# Fuzzes every Fuzz function of the module, one after the other, for $1 each; those whose package and
# name match $2, if given.
set -eu
cd "$(dirname "$0")/.."
for file in $(grep -rl --include='*_test.go' '^func Fuzz' .); do
    for target in $(sed -n 's/^func \(Fuzz[A-Za-z0-9_]*\)(.*/\1/p' "$file"); do
        case "$file/$target" in *${2:-}*) ;; *) continue ;; esac
        echo "== $target in $(dirname "$file") for $1"
        go test -tags fuzz -run '^$' -parallel "${FUZZPARALLEL:-2}" -fuzz "^$target\$" -fuzztime "$1" "./$(dirname "$file")"
    done
done
