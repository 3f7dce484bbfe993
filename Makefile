# `make demo` and `make test` need Python 3.11 or newer and nothing else.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
CONSTRAINTS ?= constraints/newest.txt
COLAB_PYTHON ?= $(firstword $(wildcard $(HOME)/.pyenv/versions/3.13.*/bin/python) $(shell command -v python3.13))
PYTEST_WORKERS ?= 2
# By files: what a file builds and compiles once stays in one process.
PYTEST = $(BIN)/python -m pytest -n $(PYTEST_WORKERS) --dist loadfile
TPU_VENV ?= $(VENV)-tpu

.PHONY: demo test test-all test-colab multihost check format bench clean

$(VENV)/.installed: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --disable-pip-version-check -c $(CONSTRAINTS) -e '.[lab,test]'
	touch $@

demo: $(VENV)/.installed
	$(BIN)/jaxtricks ablate

# Twice, for speed: see XLA_FLAGS in tests/conftest.py.
test: $(VENV)/.installed
	CHEAP_COMPILER=1 $(PYTEST) -m 'not slow and not stock'
	$(PYTEST) -m 'stock and not slow' tests

# The TPU compiler lives apart: in the ordinary environment it would greet every look for devices.
# (beartype: the package `tests` imports it.)
$(TPU_VENV)/.installed: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(TPU_VENV)
	$(TPU_VENV)/bin/pip install -q --disable-pip-version-check -c $(CONSTRAINTS) -e '.[tpu]' beartype
	touch $@

test-all: $(VENV)/.installed $(TPU_VENV)/.installed
	TPU_PYTHON=$(abspath $(TPU_VENV))/bin/python $(PYTEST)

# Two processes of four devices each on this machine: trained, killed, resumed; about five minutes.
multihost: $(VENV)/.installed
	$(BIN)/python -m pytest -v tests/test_multihost.py

check: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyrefly check
	$(BIN)/lint-imports

# What Google Colab ships: Python 3.13, jax 0.7.2, flax 0.11.2, optax 0.2.8.
test-colab:
	@if [ -z '$(COLAB_PYTHON)' ]; then echo 'no Python 3.13 here: set COLAB_PYTHON=/path/to/python3.13'; exit 1; fi
	$(MAKE) test VENV=.venv-colab CONSTRAINTS=constraints/colab.txt PYTHON=$(COLAB_PYTHON)

bench: $(VENV)/.installed
	$(BIN)/python -m tests.bench

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(TPU_VENV) .venv-colab .venv-colab-tpu runs
