# Each target sets up what it needs: a virtual environment in .venv and an editable install.
PYTHON ?= python3
BIN := .venv/bin
WORKERS ?= 2

.PHONY: help demo test check slow lowest clean
help:  ## what can be made
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "mllm_jax needs Python 3.11 or newer: make PYTHON=python3.11 ..."; exit 1; }
	$(PYTHON) -m venv .venv

.venv/.installed: setup.py | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

.venv/.installed-test: setup.py | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	@touch $@ .venv/.installed

demo: .venv/.installed  ## train, stop, resume, evaluate, generate, export and report, on this machine, in ten minutes
	$(BIN)/python -m launch.demo --workdir demo

test: .venv/.installed-test  ## the whole test suite
	$(BIN)/python -m pytest -n $(WORKERS)

slow: .venv/.installed-test  ## the tests that take minutes
	$(BIN)/python -m pytest -m slow

check: test  ## the tests, and the style of the code
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

lowest: $(BIN)/python  ## the tests of each dependency with the lowest version that setup.py allows
	$(BIN)/python tests/helpers/lowest.py .venv/lowest

clean:  ## remove the environment, caches and the demo's output
	rm -rf .venv .cache .pytest_cache .ruff_cache .hypothesis demo build *.egg-info
