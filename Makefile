# Optimus: set-up, demo, tests. `make help` lists the targets.
#
#   PYTHON=python3.12                     another interpreter for the environment
#   VENV_FLAGS=--system-site-packages     use the torch that is already installed (GPU machines);
#                                         pins are then off and only what is missing is installed
#   JOBS=4                                parallel compile and test jobs
#   OPTIMUS_CUDA=auto|0|1                 the CUDA backend, see setup.py

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.NOTPARALLEL:
MAKEFLAGS += --no-print-directory

PYTHON ?= python3
VENV ?= .venv
VENV_FLAGS ?=
EXTRAS ?= test,bench
CONSTRAINTS ?= $(if $(findstring --system-site-packages,$(VENV_FLAGS)),,third_party/constraints.txt)
JOBS ?= $(shell nproc)
BUILD_DIR ?= build

BIN := $(abspath $(VENV))/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check \
               $(if $(CONSTRAINTS),--constraint $(CONSTRAINTS))
export PATH := $(BIN):$(PATH)
export MAX_JOBS ?= $(JOBS)

DEMO_PROMPT ?= Mia has 48 apples. Mia gives half of the apples away. Mia buys 3 boxes with 6 apples each. Then Mia gives 12 apples to Leo. Later Mia finds 7 more apples. How many apples does Mia have now?
DEMO_GENERATE = $(BIN)/optimus generate "$(DEMO_PROMPT)"
DEMO_BENCH = $(BIN)/optimus bench offline --concurrency 1,4 --modes ar,block,chunk,elastic --num-prompts 16

# Two cores are enough for the tests, and spinning OpenMP threads on busy cores cost milliseconds.
TEST_ENV := OMP_NUM_THREADS=2 OMP_WAIT_POLICY=PASSIVE

ENGINE_FILES := $(shell find csrc -type f)
CXX_FILES = $(shell find csrc tests/cpp bench -name '*.h' -o -name '*.inl' -o -name '*.cpp' \
              -o -name '*.cu' -o -name '*.cuh')

.PHONY: help setup extension demo test test-cpp test-python lint format sanitize bench clean

help:
	@echo "make setup     create $(VENV), install the dependencies, build the extension"
	@echo "make demo      generate with the demo model, then compare the decode modes"
	@echo "make test      C++ and Python tests (make test-cpp, make test-python: one of them)"
	@echo "make lint      ruff, clang-format, mypy; make format rewrites"
	@echo "make sanitize  C++ tests under AddressSanitizer and UndefinedBehaviorSanitizer"
	@echo "make bench     kernel microbenchmarks"
	@echo "make clean     remove builds and caches; the environment $(VENV) stays"

# ------------------------------------------------------------------------------------------ set-up

setup: extension $(VENV)/.installed

$(VENV)/.created:
	@third_party/debian-packages.sh setup $(PYTHON)
	@$(PYTHON) -c 'import sys; (3, 11) <= sys.version_info[:2] <= (3, 13) or sys.exit( \
	  "Optimus needs Python 3.11 to 3.13; $(PYTHON) is %d.%d. Choose one with PYTHON=..." \
	  % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV_FLAGS) $(VENV)
	@touch $@

# torch first and alone: the exact pin keeps the resolver from fetching another build of it.
$(VENV)/.build-tools: $(VENV)/.created $(CONSTRAINTS)
	$(PIP_INSTALL) "torch>=2.11,<2.15"
	$(PIP_INSTALL) "setuptools>=77" wheel "pybind11>=2.13" ninja numpy
	@touch $@

extension: $(VENV)/.extension

$(VENV)/.extension: $(VENV)/.build-tools setup.py $(ENGINE_FILES)
	$(BIN)/python setup.py --quiet build_ext --inplace 2>&1 | sed -uE 's/^(\[[0-9/]+\]) .* -c ([^ ]+) -o .*/\1 \2/'
	@touch $@

# Editable: the package stays in python/, next to the extension that was just built.
$(VENV)/.installed: pyproject.toml setup.py $(VENV)/.build-tools | $(VENV)/.extension
	$(PIP_INSTALL) --no-build-isolation --editable ".$(if $(EXTRAS),[$(EXTRAS)])"
	@touch $@

# -------------------------------------------------------------------------------------------- runs

demo: setup
	$(DEMO_GENERATE)
	$(DEMO_BENCH)

test: test-cpp test-python

test-cpp:
	@third_party/debian-packages.sh cpp
	cmake -S . -B $(BUILD_DIR)
	cmake --build $(BUILD_DIR) --parallel $(JOBS)
	$(TEST_ENV) ctest --test-dir $(BUILD_DIR) --output-on-failure --parallel $(JOBS)

test-python: setup
	$(TEST_ENV) $(BIN)/python -m pytest -q --durations=10

sanitize:
	@third_party/debian-packages.sh cpp
	cmake -S . -B build-sanitize -DCMAKE_BUILD_TYPE=RelWithDebInfo \
	  -DOPTIMUS_SANITIZE=address,undefined -DOPTIMUS_BUILD_BENCHMARKS=OFF
	cmake --build build-sanitize --parallel $(JOBS)
	$(TEST_ENV) ctest --test-dir build-sanitize --output-on-failure --parallel $(JOBS)

bench:
	@third_party/debian-packages.sh cpp
	cmake -S . -B $(BUILD_DIR)
	cmake --build $(BUILD_DIR) --parallel $(JOBS)
	@shopt -s nullglob; for program in $(BUILD_DIR)/bench/*; do echo "$$program"; "$$program"; done

lint: setup
	@status=0; \
	for check in "ruff check ." "ruff format --check ." "clang-format --dry-run -Werror $(CXX_FILES)" mypy; do \
	  echo "lint: $${check%% *}"; $(BIN)/$$check || status=1; \
	done; \
	exit $$status

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

clean:
	rm -rf build build-sanitize dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	rm -rf python/*.egg-info python/optimus/_C.*.so $(VENV)/.extension $(VENV)/.installed
	find python tests bench -name __pycache__ -prune -exec rm -rf {} +
