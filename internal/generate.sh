#!/bin/sh
# Makes the code of the .proto files. With an argument, below that folder
# instead of in the tree (the test that it is not stale does so).
set -eu
cd "$(dirname "$0")/.."
out=${1:-.}
plugins=$(mktemp -d)
trap 'rm -rf "$plugins"' EXIT
go build -o "$plugins" google.golang.org/protobuf/cmd/protoc-gen-go connectrpc.com/connect/cmd/protoc-gen-connect-go
PATH="$plugins:$PATH" protoc --go_out="$out" --go_opt=module=conseal --connect-go_out="$out" --connect-go_opt=module=conseal,simple \
    agent/api/conseal.proto agent/peer/peer.proto
