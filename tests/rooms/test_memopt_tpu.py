"""What the TPU's compiler reserves with state on the host and with released gradients: libtpu, no TPU."""

import pytest

from tests.tpu_aot import compiled

pytestmark = [pytest.mark.tpu, pytest.mark.slow]
TABLES = ("update_rows", "training_rows", "sharded_rows", "stack_rows")


@pytest.fixture(scope="module")
def tables():
    """{table: {row: (arguments, temporaries, both, host arguments, host temporaries)}}, in MiB."""
    found = ", ".join(f"{name!r}: tpu_memopt.{name}()" for name in TABLES)
    script = f"import json; from benchmarks import tpu_memopt; print(json.dumps({{{found}}}))"
    rows = compiled(script)
    return {table: {name: numbers for name, *numbers in rows[table]} for table in TABLES}


@pytest.mark.parametrize("table", TABLES[:3])
def test_the_device_never_holds_all_of_the_state(tables, table):
    rows = tables[table]
    usual, ours = rows["adamw"], rows["host_offload"]
    assert usual[0] - ours[0] == pytest.approx(ours[3])  # MiB that are on the host
    assert ours[2] < 0.72 * usual[2]
    if "copied at once" in rows:
        assert rows["copied at once"][2] > usual[2]


def test_a_guard_goes_outside(tables):
    rows = tables["update_rows"]
    assert rows["dynamic_loss_scale(host_offload)"][2] < 0.9 * rows["adamw"][2]
    assert rows["host_offload(dynamic_loss_scale)"][2] > rows["adamw"][2]


def test_a_scanned_stack_needs_its_gradients_released(tables):
    rows = tables["stack_rows"]
    assert rows["straight code"][1] < 0.1 * rows["scan"][1]
    assert rows["release_gradients"][1] < 0.35 * rows["scan"][1]
    assert rows["scan, host_offload"][2] > rows["scan"][2]
    assert rows["release_gradients, host_offload"][2] < 0.35 * rows["scan"][2]
