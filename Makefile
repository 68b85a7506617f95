# Each target sets up what it needs in .venv (any Python from 3.11 on: `make test PYTHON=python3.12`).
# To develop against another set of libraries: `make test VENV=.venv-oldest CONSTRAINTS=constraints-oldest.txt`.

PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
PYTEST_FLAGS ?=
# Two processes of one thread each: most tests wait for Python, not for a kernel. Half the time of one process with two.
PYTEST := OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest --numprocesses 2 --dist worksteal

BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
NATIVE := src/fourbit/kernels/native/build.txt
CPP := $(shell find csrc -name '*.cpp' -o -name '*.h')

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test test-slow test-search faults check lint type format gen bench gpu docs wheel test-oldest clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(INSTALLED) $(NATIVE)  ## finetune a small 4-bit model from start to end, offline, in a few minutes
	$(BIN)/fourbit demo --output build/demo

check: lint type test  ## everything that CI runs: lint, type, test

test: $(INSTALLED) $(NATIVE)  ## the test suite
	$(PYTEST) -m "not slow" $(PYTEST_FLAGS)

test-slow: $(INSTALLED) $(NATIVE)  ## what takes minutes more: every case of `fourbit bench`, the peers' included
	$(PYTEST) -m slow $(PYTEST_FLAGS)

faults: $(INSTALLED) $(NATIVE)  ## kill -9 at 400 moments of training runs, each of which must end with the same bits
	FOURBIT_FAULTS_KILLS=200 $(PYTEST) tests/faults --capture no $(PYTEST_FLAGS)

test-search: $(INSTALLED) $(NATIVE)  ## the tests that hypothesis feeds, with examples of this run's own
	HYPOTHESIS_PROFILE=search $(PYTEST) -m hypothesis $(PYTEST_FLAGS)

lint: $(INSTALLED) $(NATIVE)  ## ruff, clang-format, the import contracts, drift of generated files
	$(BIN)/ruff check --quiet
	$(BIN)/ruff format --check --quiet
	$(BIN)/clang-format --dry-run --Werror $(CPP)
	$(BIN)/lint-imports --no-logo --no-cache
	$(BIN)/python tools/cli_reference.py --check

type: $(INSTALLED)  ## mypy, strict
	$(BIN)/mypy

format: $(INSTALLED)  ## rewrite the sources the way `make lint` wants them
	$(BIN)/ruff check --fix --quiet
	$(BIN)/ruff format --quiet
	$(BIN)/clang-format -i $(CPP)

gen: $(INSTALLED)  ## write the generated files anew: docs/cli.md
	$(BIN)/python tools/cli_reference.py

bench: $(INSTALLED) $(NATIVE)  ## our kernels and training step beside each installed peer
	$(BIN)/fourbit bench

gpu: $(INSTALLED)  ## everything that is measured on a GPU, in one call of under ten minutes; needs one
	$(BIN)/python benchmarks/gpu.py

docs: gen  ## write docs/cli.md, follow every link, run every command of the README
	$(BIN)/python -m pytest tests/unit/test_documents.py tests/e2e/test_readme.py

wheel:  ## dist/fourbit-*.whl, for every Python on this platform
	rm -rf build/lib* build/bdist* dist # setuptools keeps what is no longer a source
	$(PYTHON) -m pip wheel --quiet --no-deps --wheel-dir dist .

test-oldest:  ## the tests that meet transformers, peft and trl, with the oldest versions we support
	$(MAKE) test VENV=.venv-oldest CONSTRAINTS=constraints-oldest.txt \
		PYTEST_FLAGS="tests/unit/cli tests/unit/models tests/unit/nn tests/unit/data tests/unit/generate tests/unit/train \
			tests/parity tests/e2e $(PYTEST_FLAGS)"

clean:  ## remove what was built, but not .venv
	rm -rf build dist src/fourbit.egg-info $(NATIVE) $(NATIVE:build.txt=libfourbit.so)
	rm -rf .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find src tests tools benchmarks -name __pycache__ -prune -exec rm -rf {} +

$(INSTALLED): pyproject.toml $(CONSTRAINTS) constraints-tools.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS) \
		--editable '.[bench,dev,eval,harness,serve,train]'
	touch $@

# Where there is no compiler the plain-torch backend runs, so that is no failure.
$(NATIVE): setup.py csrc/kernels.def $(CPP) | $(INSTALLED)
	$(BIN)/python setup.py --quiet build_native || ! { command -v g++ || command -v clang++ || command -v c++; } > /dev/null
