# `make demo` and `make test` do all the set-up themselves: a virtual environment in .venv, the build, the job.
# Needed beforehand: Python 3.11 or newer with its headers, and a C++ compiler. For the tests of the
# server's page there has to be a Chromium; as root on Debian it is installed, elsewhere these tests may be skipped.

PYTHON ?= $(shell for p in python3.11 python3 python3.12 python3.13; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
NATIVE := CMakeLists.txt $(wildcard csrc/*)
PYTEST_ARGS ?= --numprocesses 2 --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help demo test check docs format clean

help:
	@echo "make demo    run the built-in model with room for a quarter of its experts"
	@echo "make test    lint, types and all tests"
	@echo "make check   lint and types only"
	@echo "make docs    write docs/options.md anew"
	@echo "make format  format the code"
	@echo "make clean   remove the virtual environment and what was built"

demo: $(READY)
	@$(BIN)/moestro demo

test: check
	@tests/install_chromium
	$(BIN)/python -m pytest $(PYTEST_ARGS)

check: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

docs: $(READY)
	$(BIN)/python -m moestro.cli.docs > docs/options.md

format: $(READY)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache

# The package is installed in place: only a change of the compiled part, or of the dependencies, needs another run.
$(READY): pyproject.toml constraints.txt $(NATIVE)
	@test -n "$(PYTHON)" || { \
		echo "error: no Python 3.11 or newer was found. Install it, or name it: make PYTHON=/path/to/python3.11" >&2; exit 2; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "error: $(PYTHON) is older than Python 3.11, or does not run. Name another: make PYTHON=/path/to/python3.11" >&2; exit 2; }
	@"$(PYTHON)" -c 'import os, sysconfig; os.stat(os.path.join(sysconfig.get_path("include"), "Python.h"))' 2>/dev/null || { \
		echo "error: $(PYTHON) has no headers (Python.h). Install them, on Debian: apt install python3-dev" >&2; exit 2; }
	@command -v "$${CXX:-c++}" >/dev/null || { \
		echo "error: no C++ compiler was found. Install one, on Debian: apt install g++, or name it: make CXX=clang++" >&2; exit 2; }
	@echo "Setting up $(VENV) (a few minutes the first time) ..."
	@test -x $(BIN)/python || "$(PYTHON)" -m venv $(VENV)
	PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip install --quiet --progress-bar off --disable-pip-version-check --editable ".[dev]"
	@touch $@
