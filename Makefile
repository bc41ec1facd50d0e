# Each target does its own set-up: the virtual environment, the package with its dependencies, once.
# PYTHON=python3.12 chooses the interpreter, ARGS="..." adds flags to the command, WORKDIR=... names a run.

PYTHON ?= python3
VENV := .venv
WORKDIR := runs/quickstart
CONFIG := experiments/quickstart.py
ARGS :=

PY := $(VENV)/bin/python
# A stamp is written last, so that an interrupted installation is taken up again.
INSTALLED_TRAIN := $(VENV)/installed-train
INSTALLED_TEST := $(VENV)/installed-test

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help train report test test-all lint format bench docs clean

help:  ## list the targets
	@echo 'Targets (each installs what it needs into $(VENV) first):'
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' Makefile | awk -F '|' '{ printf "%-18s %s\n", $$1, $$2 }'
	@echo 'Variables: PYTHON=$(PYTHON) VENV=$(VENV) WORKDIR=$(WORKDIR) CONFIG=$(CONFIG) ARGS="flags of the command"'

train: $(INSTALLED_TRAIN)  ## train a small language model on a CPU, write WORKDIR/report.html; continues what was interrupted
	$(PY) -m train.main --config=$(CONFIG) --workdir=$(WORKDIR) $(ARGS)
	$(PY) -m experiments.report --workdir=$(WORKDIR)

report: $(INSTALLED_TRAIN)  ## write WORKDIR/report.html again
	$(PY) -m experiments.report --workdir=$(WORKDIR) $(ARGS)

test: $(INSTALLED_TEST)  ## run the tests
	$(PY) -m pytest -n 2 -m 'not gpu and not long' $(ARGS)

test-all: $(INSTALLED_TEST)  ## run the tests and the longer matrices
	$(PY) -m pytest -n 2 -m 'not gpu' $(ARGS)

lint: $(INSTALLED_TEST)  ## check style and types
	$(PY) -m ruff check .
	$(PY) -m mypy

format: $(INSTALLED_TEST)  ## repair what ruff can repair, then format
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

bench: $(INSTALLED_TRAIN)  ## measure the core on this machine (ARGS="--only=attention" for a part)
	$(PY) -m experiments.bench_core $(ARGS)

docs: $(INSTALLED_TRAIN)  ## write the method table of README.md again
	$(PY) -m experiments.readme

clean:  ## remove the environment and caches; runs/ stays
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(INSTALLED_TRAIN): pyproject.toml
	$(call install,train)
	@touch $@

# `test` includes `train`.
$(INSTALLED_TEST): pyproject.toml
	$(call install,test)
	@touch $(INSTALLED_TRAIN) $@

define install
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
  echo 'error: $(PYTHON) is missing or older than Python 3.11; name another one: make PYTHON=/path/to/python3.11' >&2; exit 1; }
@$(PYTHON) -c 'import ensurepip, venv' || { \
  echo 'error: $(PYTHON) has no venv module; install it (Debian, Ubuntu: apt install python3-venv)' >&2; exit 1; }
@$(PY) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
@echo 'Installing into $(VENV); the first time takes a minute or more.'
$(PY) -m pip install --disable-pip-version-check -e '.[$(1)]'
endef
