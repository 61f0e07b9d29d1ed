# Each target does its own set-up; what is up to date is not done again.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMPS := .build

RUST   := $(shell find src -name '*.rs' -o -name '*.cpp' -o -name '*.h' -o -name '*.cu*') build.rs Cargo.toml Cargo.lock .cargo/config.toml
export VIRTUAL_ENV := $(CURDIR)/$(VENV)
export PATH := $(CURDIR)/$(BIN):$(PATH)

.DEFAULT_GOAL := help
.PHONY: help build test rust-test python-test lint format demo bench parity other-processors wheel wheel-check clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sort | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

# A virtual environment with torch and the tools; made again when pyproject.toml changes.
$(STAMPS)/venv: pyproject.toml
	@mkdir -p $(STAMPS)
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) \
		|| { $(PYTHON) -m pip install --user virtualenv && $(PYTHON) -m virtualenv $(VENV); }
	$(BIN)/python tools/requirements.py requires dev > $(STAMPS)/requirements.txt
	$(BIN)/python -m pip install --quiet -r $(STAMPS)/requirements.txt
	@touch $@

$(STAMPS)/build: $(STAMPS)/venv $(RUST)
	@touch $@.begun  # what changes from here on is newer
	$(BIN)/maturin develop --release --quiet
	@mv $@.begun $@

build: $(STAMPS)/build  ## build the extension into .venv

test: lint rust-test python-test  ## formatting, lints, Rust tests, Python tests

rust-test:  ## the kernels alone: no torch, no Python
	cargo test --release --no-default-features --quiet

python-test: $(STAMPS)/build $(STAMPS)/integrations  ## pytest, with the stubs and the README's snippets
	$(BIN)/python -m pytest

lint: $(STAMPS)/venv  ## formatting and lints, warnings denied
	tools/if_installed.sh "cargo fmt" cargo fmt --check
	tools/if_installed.sh "cargo clippy" cargo clippy --release --all-targets --quiet -- -D warnings
	tools/if_installed.sh "cargo clippy" cargo clippy --release --no-default-features --all-targets --quiet -- -D warnings
	$(BIN)/ruff check --quiet .
	$(BIN)/ruff format --check --quiet .

format: $(STAMPS)/venv  ## format all sources
	cargo fmt
	$(BIN)/ruff check --quiet --fix .
	$(BIN)/ruff format --quiet .

demo: $(STAMPS)/build  ## FlexMatch learns digits from 40 labels; table, losses and picture in demo/
	$(BIN)/python examples/digits_flexmatch.py

bench: $(STAMPS)/build $(STAMPS)/bench  ## every method against plain PyTorch, other packages and its limit
	$(BIN)/python -m benches --save
	$(BIN)/python -m benches --draw --pages

parity: $(STAMPS)/build  ## compare with tllib itself, where it is installed or TLLIB_DIR names it
	$(BIN)/python tools/parity.py

other-processors: $(STAMPS)/build  ## under qemu: the kernels on NEON, the package on an x86-64 without AVX
	tools/other_processors.sh

wheel: $(STAMPS)/venv  ## one abi3 wheel in dist/, its links checked
	rm -rf dist
	$(BIN)/maturin build --release --quiet --out dist
	$(BIN)/python tools/check_wheel.py dist/*.whl

wheel-check: wheel  ## install the wheel for the oldest and the newest Python 3.10+ at hand and use it
	$(PYTHON) tools/try_wheel.py dist/*.whl

.PHONY: docs
docs: $(STAMPS)/docs  ## docs/ as a site in site/, warnings denied
	$(BIN)/mkdocs build --strict

# One more list of pyproject.toml into the environment.
$(STAMPS)/bench $(STAMPS)/docs $(STAMPS)/integrations: $(STAMPS)/%: $(STAMPS)/venv
	$(BIN)/python tools/requirements.py requires $* > $(STAMPS)/requirements-$*.txt
	$(BIN)/python -m pip install --quiet -r $(STAMPS)/requirements-$*.txt
	@touch $@

clean:  ## remove everything that was built
	rm -rf $(VENV) $(STAMPS) target dist demo site python/tllib_rs/*.so
