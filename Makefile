# `make help` says what there is.
GO      ?= go
VERSION ?= $(shell git describe --always --dirty 2>/dev/null || echo devel)
LDFLAGS  = -X main.version=$(VERSION)
TOOLS    = swtpm:swtpm swtpm_setup:swtpm-tools certtool:gnutls-bin softhsm2-util:softhsm2 pkcs11-tool:opensc certutil:libnss3-tools \
           tpm2_pcrread:tpm2-tools openssl:openssl ssh-keygen:openssh-client protoc:protobuf-compiler gcc:gcc git:git curl:curl
# The race detector, but not inside the big-number arithmetic under ECDSA and the hashes
# of a PIN, which it would make up to ten times slower and which share nothing between
# goroutines.
RACE     = -race $(foreach p,github.com/cronokirby/saferith math/big crypto/pbkdf2 crypto/internal/fips140/...,-gcflags=$(p)=-race=false)
# A process with the detector sleeps for a second before it ends, to see what others still
# do; tests start hundreds.
export GORACE = atexit_sleep_ms=50
# Sweeps of the HSM, one goroutine each, which log in again and again: by themselves and
# without the race detector, which makes each login five times slower, and each start of
# the helper process too. make soak has the detector on for both.
SWEEPS   = ^Test(FaultAtEachCall|FaultThatStays|ATokenThatLies|SessionsLostAtEachCall|TokenGone|OddGCM|KillIn(Epochs|SetRoot|Provision)|Crash(InSetRoot|UponCrash)|Conformance(OfWhatIsLeft|ByName|NSS))$$
# Tests of agents that compute ECDSA or run as processes for minutes: without the detector,
# which sees nothing of other processes. make soak has it on. CRASHES mostly wait.
FLEETS   = ^Test(NoPresignatureTwice|AllSchemesAtOnce|ManyHosts|Presigners|Stock|Refresh)
CRASHES  = ^Test(RandomKills|Chaos|CrashAtEach)

.PHONY: help deps build demo story test check bench fuzz soak clean generate

help: ## say what there is
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "make %-10s %s\n", $$1, $$2}' Makefile

deps: ## install with apt what is missing of the tools that demo and tests need
	@missing=; for t in $(TOOLS); do command -v $${t%%:*} >/dev/null 2>&1 || missing="$$missing $${t##*:}"; done; \
	[ -e /usr/include/stdio.h ] || missing="$$missing libc6-dev"; \
	command -v $(GO) >/dev/null 2>&1 || { echo "Go 1.26 or newer is needed: https://go.dev/dl/"; exit 1; }; \
	[ -z "$$missing" ] || { echo "installing:$$missing"; sudo=; [ $$(id -u) = 0 ] || sudo=sudo; \
	$$sudo apt-get update -q && $$sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends $$missing; } >&2

build: ## build bin/conseald and bin/conseal
	$(GO) build -trimpath -ldflags '$(LDFLAGS)' -o bin/ ./cmd/conseald ./cmd/conseal

demo: deps build ## three hosts make a key, sign a file, and openssl verifies it
	@$(GO) run ./testenv/story demo

story: deps ## run one story and print each step as it happens: make story NAME=demo
	@$(GO) run ./testenv/story $(NAME)

# -count=1: results of tests that build and run the binaries must not be kept. The packages
# that take longest come first. ECDSA, whose sessions are one goroutine each, is without the
# race detector, beside what waits for devices; make soak has the detector on.
test: deps check ## all tests
	$(GO) test $(RACE) -count=1 -timeout 20m -skip '$(SWEEPS)' $$($(GO) list ./tpm ./hsm ./cmd/conseal ./... | grep -v -e /agent$$ -e /hsm/helper$$ -e /protocol/cmp$$)
	$(GO) test -count=1 -timeout 20m -p 1 ./hsm/helper ./protocol/cmp & others=$$!; \
	$(GO) test -count=1 -timeout 20m -run '$(SWEEPS)' ./hsm && $(GO) test -count=1 -timeout 20m -run '$(CRASHES)' ./agent; rest=$$?; wait $$others && exit $$rest
	$(GO) test $(RACE) -count=1 -timeout 20m -skip '$(FLEETS)|$(CRASHES)' ./agent # by itself: its hosts presign at low priority
	$(GO) test -count=1 -timeout 30m -run '$(FLEETS)' ./agent
	CGO_ENABLED=0 $(GO) build -o /dev/null ./cmd/conseald
	CGO_ENABLED=0 $(GO) build -o /dev/null ./cmd/conseal

check: ## format, vet, staticcheck (the import table is a test)
	@ugly=$$(gofmt -l .) && { test -z "$$ugly" || { echo "gofmt -w these:"; echo "$$ugly"; exit 1; }; }
	$(GO) vet ./...
	$(GO) vet -tags failpoints,fuzz ./...
	CGO_ENABLED=0 $(GO) vet ./cmd/... ./hsm/...
	$(GO) tool staticcheck ./...

bench: deps ## measure, one figure a line: bench NAME VALUE UNIT; the TPM and HSM alone: make bench ONLY=hardware
	@$(GO) run ./testenv/bench $(ONLY)

fuzz: ## fuzz every decoder, FUZZTIME each (default 1m): make fuzz FUZZ=protocol/cmp FUZZTIME=10m
	@./internal/fuzz.sh $(or $(FUZZTIME),1m) $(FUZZ)

soak: deps ## the crash tests many times over, chaos around new epochs, two minutes of all schemes at once, 70,000 uses of a TPM, all faults of an HSM, kills around both
	$(GO) test -count=1 -timeout 2h -run 'Random|NoPresignatureTwice|AllSchemesAtOnce|TestReshare' -v ./agent -soak
	$(GO) test -count=1 -timeout 2h -run Chaos -v ./agent -soak
	$(GO) test -count=1 -timeout 2h -run 'ManyUses|Killed' -v ./tpm -soak
	$(GO) test -count=1 -timeout 2h -run 'RandomChanges' -v ./protocol/cmp -soak
	$(GO) test -count=1 -timeout 2h -run 'Kill|Fault|SessionsLost|TokenGone' -v ./hsm -soak
	$(GO) test -count=1 -timeout 2h ./agent/epoch -soak
	$(GO) test $(RACE) -count=1 -timeout 2h ./protocol/cmp ./hsm ./hsm/helper
	$(GO) test $(RACE) -count=1 -timeout 2h ./agent

generate: ## make the code of the .proto files again
	$(GO) generate ./agent/api

clean: ## remove what was built
	rm -rf bin
