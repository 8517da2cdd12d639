#!/bin/sh
# Fuzzes every Fuzz function of the module, one after the other, for $1 each.
set -eu
cd "$(dirname "$0")/.."
for file in $(grep -rl --include='*_test.go' '^func Fuzz' .); do
    for target in $(sed -n 's/^func \(Fuzz[A-Za-z0-9_]*\)(.*/\1/p' "$file"); do
        echo "== $target in $(dirname "$file") for $1"
        go test -run '^$' -fuzz "^$target\$" -fuzztime "$1" "./$(dirname "$file")"
    done
done
