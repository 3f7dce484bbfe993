"""Half an hour of compiling: only where an interpreter with libtpu is named, as `make test-all` does."""

import os

import pytest


@pytest.fixture(autouse=True, scope="session")
def named():
    if not os.environ.get("TPU_PYTHON"):
        pytest.skip("compiles for a TPU for half an hour: `make test-all`, which sets TPU_PYTHON")
