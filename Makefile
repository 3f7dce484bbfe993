# `make demo` and `make test` need Python 3.11 or newer and nothing else.
# pyenv's own commands only work where a version is chosen, so each candidate is tried.
PYENV := $(HOME)/.pyenv/versions
newest = $(shell for python in $(1); do "$$python" -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 11))' \
	2>/dev/null && echo "$$python" && break; done)
ifndef PYTHON
PYTHON := $(call newest,$(foreach v,3.14 3.13 3.12,python$(v) $(wildcard $(PYENV)/$(v).*/bin/python)) python3)
endif
VENV ?= .venv
, := ,
BIN := $(VENV)/bin
# jax 0.10.2 is the last for Python 3.11.
ifndef CONSTRAINTS
CONSTRAINTS := constraints/$(shell '$(PYTHON)' -c 'import sys; print("py311" if sys.version_info < (3, 12) else "newest")').txt
endif
COLAB_PYTHON ?= $(call newest,python3.13 $(wildcard $(PYENV)/3.13.*/bin/python))
PY311 ?= $(call newest,python3.11 $(wildcard $(PYENV)/3.11.*/bin/python))
PYTEST_WORKERS ?= 2
# By files: what a file builds and compiles once stays in one process.
PYTEST = $(BIN)/python -m pytest -n $(PYTEST_WORKERS) --dist loadfile
TPU_VENV ?= $(VENV)-tpu
GPU_VENV ?= $(VENV)-gpu

.PHONY: demo test test-all test-colab test-py311 has-py311 test-next multihost gpu-check check format bench claims clean

define install
	@if [ -z '$(PYTHON)' ]; then echo 'no Python 3.11 or newer here: set PYTHON=/path/to/python'; exit 1; fi
	$(PYTHON) -m venv $(VENV)
	@echo 'installing jax and what goes with it into $(VENV): about 1 GB, a few minutes'
	$(BIN)/pip install -q --disable-pip-version-check -c $(CONSTRAINTS) -e '.[$(1)]'
	touch $@
endef

$(VENV)/.installed: pyproject.toml $(CONSTRAINTS)
	$(call install,lab$(,)test)

# Without the developer's tools, unless they are there already.
$(VENV)/.runs: pyproject.toml $(CONSTRAINTS)
	$(call install,lab)

# Another `make demo` goes on where the last one was stopped.
demo: $(if $(wildcard $(VENV)/.installed),$(VENV)/.installed,$(VENV)/.runs)
	$(BIN)/jaxtricks ablate --no-search --resume

# Twice, for speed: see XLA_FLAGS in tests/conftest.py.
STOCK_TESTS = $(shell grep -rl mark.stock tests --include='test_*.py')
test: $(VENV)/.installed
	CHEAP_COMPILER=1 $(PYTEST) -m 'not slow and not stock' $(TESTS)
	$(PYTEST) -m 'stock and not slow' $(or $(TESTS),$(STOCK_TESTS))

# The TPU compiler lives apart: in the ordinary environment it would greet every look for devices.
# (beartype: the package `tests` imports it. libtpu by itself: Colab's is not the one that jax[tpu] asks for.)
$(TPU_VENV)/.installed: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(TPU_VENV)
	$(TPU_VENV)/bin/pip install -q --disable-pip-version-check -c $(CONSTRAINTS) -e '.[lab]' libtpu beartype
	touch $@

test-all: $(VENV)/.installed $(TPU_VENV)/.installed
	TPU_PYTHON=$(abspath $(TPU_VENV))/bin/python $(PYTEST)

# The laws under what jax offers early, a flag at a time; tests/flags.py lists what fails and why.
NEXT_TESTS := $(wildcard tests/laws/test_laws*.py tests/rooms/test_amp_autocast.py) \
	tests/rooms/test_remat.py tests/rooms/test_remat_names.py
test-next: $(VENV)/.installed
	for flag in JAX_REMAT3 JAX_CUSTOM_JVP3 JAX_CUSTOM_VJP3 JAX_SCAN3; do \
	env $$flag=1 CHEAP_COMPILER=1 $(PYTEST) -m 'not slow and not stock' $(NEXT_TESTS) || exit 1; done

# Two processes of four devices each on this machine: trained, killed, resumed; about five minutes.
multihost: $(VENV)/.installed
	$(BIN)/python -m pytest -v tests/lab/test_multihost.py

$(GPU_VENV)/.installed: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(GPU_VENV)
	$(GPU_VENV)/bin/pip install -q --disable-pip-version-check -c $(CONSTRAINTS) -e '.[lab,test,cuda]'
	touch $@

# On a machine with one NVIDIA GPU: the benches into gpu.md, then the suite. Its tests compare in float32 and
# bit by bit: no TF32, one order of sums. (cpu: callbacks run there.)
GPU_PLATFORM ?= cuda,cpu
gpu-check: export XLA_PYTHON_CLIENT_PREALLOCATE = false
gpu-check: $(GPU_VENV)/.installed
	JAX_PLATFORMS=$(GPU_PLATFORM) $(GPU_VENV)/bin/python -m benchmarks.gpu --out benchmarks/results/gpu.md
	TEST_PLATFORM=$(GPU_PLATFORM) NVIDIA_TF32_OVERRIDE=0 \
	XLA_FLAGS='--xla_gpu_enable_triton_gemm=false --xla_gpu_deterministic_ops=true' \
	$(PYTEST:$(BIN)/%=$(GPU_VENV)/bin/%) -m 'not slow'

check: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyrefly check
	$(BIN)/lint-imports
	$(BIN)/pylint jaxtricks # lines that stand twice

# What Google Colab ships: Python 3.13, jax 0.7.2, flax 0.11.2, optax 0.2.8.
test-colab:
	@if [ -z '$(COLAB_PYTHON)' ]; then echo 'no Python 3.13 here: set COLAB_PYTHON=/path/to/python3.13'; exit 1; fi
	$(MAKE) test VENV=.venv-colab CONSTRAINTS=constraints/colab.txt PYTHON=$(COLAB_PYTHON)

# Python 3.11, jax 0.10.2: every import, the differences between versions, the laws, the golden arrays.
# `make test-py311 PY311_TESTS=` runs the whole suite there.
has-py311:
	@test -n '$(PY311)'
PY311_ROOMS := $(patsubst %,tests/rooms/test_%.py,memopt agc ebn cyclical longtail reparam)
PY311_TESTS ?= $(PY311_ROOMS) \
	$(wildcard tests/ground/test_compat.py tests/ground/test_primitives.py tests/laws/test_laws*.py tests/*/test_*golden.py)
test-py311:
	@if [ -z '$(PY311)' ]; then echo 'no Python 3.11 here: set PY311=/path/to/python3.11'; exit 1; fi
	$(MAKE) test VENV=.venv-py311 CONSTRAINTS=constraints/py311.txt PYTHON=$(PY311) TESTS='$(PY311_TESTS)'

# Ours beside optax, Flax, jmp, grampax and jaxamp: every table, and the one in README.md.
bench: $(VENV)/.installed
	$(BIN)/pip install -q --disable-pip-version-check -c $(CONSTRAINTS) -e '.[bench]'
	$(BIN)/python -m benchmarks
	$(BIN)/python -m benchmarks.peers --readme 1

# Judges every claimed effect by the recorded results, measures what is quick, and writes claims.md.
claims: $(VENV)/.installed
	$(BIN)/python -m benchmarks.claims

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(TPU_VENV) $(GPU_VENV) .venv-colab .venv-colab-tpu runs
