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
GPU_VENV ?= $(VENV)-gpu

.PHONY: demo test test-all test-colab multihost gpu-check check format bench claims clean

$(VENV)/.installed: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --disable-pip-version-check -c $(CONSTRAINTS) -e '.[lab,test]'
	touch $@

demo: $(VENV)/.installed
	$(BIN)/jaxtricks ablate --no-search

# Twice, for speed: see XLA_FLAGS in tests/conftest.py.
test: $(VENV)/.installed
	CHEAP_COMPILER=1 $(PYTEST) -m 'not slow and not stock'
	$(PYTEST) -m 'stock and not slow' tests

# The TPU compiler lives apart: in the ordinary environment it would greet every look for devices.
# (beartype: the package `tests` imports it.)
$(TPU_VENV)/.installed: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(TPU_VENV)
	$(TPU_VENV)/bin/pip install -q --disable-pip-version-check -c $(CONSTRAINTS) -e '.[lab,tpu]' beartype
	touch $@

test-all: $(VENV)/.installed $(TPU_VENV)/.installed
	TPU_PYTHON=$(abspath $(TPU_VENV))/bin/python $(PYTEST)

# Two processes of four devices each on this machine: trained, killed, resumed; about five minutes.
multihost: $(VENV)/.installed
	$(BIN)/python -m pytest -v tests/test_multihost.py

$(GPU_VENV)/.installed: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(GPU_VENV)
	$(GPU_VENV)/bin/pip install -q --disable-pip-version-check -c $(CONSTRAINTS) -e '.[lab,test,cuda]'
	touch $@

# On a machine with one NVIDIA GPU: the benches into gpu.md, then the suite. Its tests compare in float32 and
# bit by bit: no TF32, one order of sums. (cpu: callbacks run there.)
GPU_PLATFORM ?= cuda,cpu
gpu-check: export XLA_PYTHON_CLIENT_PREALLOCATE = false
gpu-check: $(GPU_VENV)/.installed
	JAX_PLATFORMS=$(GPU_PLATFORM) $(GPU_VENV)/bin/python -m tests.bench.gpu --out tests/bench/results/gpu.md
	TEST_PLATFORM=$(GPU_PLATFORM) NVIDIA_TF32_OVERRIDE=0 \
	XLA_FLAGS='--xla_gpu_enable_triton_gemm=false --xla_gpu_deterministic_ops=true' \
	$(PYTEST:$(BIN)/%=$(GPU_VENV)/bin/%) -m 'not slow'

check: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyrefly check
	$(BIN)/lint-imports
	$(BIN)/pylint jaxtricks # modules that are too long, lines that stand twice

# What Google Colab ships: Python 3.13, jax 0.7.2, flax 0.11.2, optax 0.2.8.
test-colab:
	@if [ -z '$(COLAB_PYTHON)' ]; then echo 'no Python 3.13 here: set COLAB_PYTHON=/path/to/python3.13'; exit 1; fi
	$(MAKE) test VENV=.venv-colab CONSTRAINTS=constraints/colab.txt PYTHON=$(COLAB_PYTHON)

# Ours beside optax, Flax, jmp, grampax and jaxamp: every table, and the one in README.md.
bench: $(VENV)/.installed
	$(BIN)/pip install -q --disable-pip-version-check -c $(CONSTRAINTS) -e '.[bench]'
	$(BIN)/python -m tests.bench
	$(BIN)/python -m tests.bench.peers --readme 1

# Judges every claimed effect by the recorded results, measures what is quick, and writes claims.md.
claims: $(VENV)/.installed
	$(BIN)/python -m tests.bench.claims

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(TPU_VENV) $(GPU_VENV) .venv-colab .venv-colab-tpu runs
