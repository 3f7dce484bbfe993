"""What the TPU's compiler multiplies in 8 bits: libtpu, no TPU."""

import pytest

from tests.tpu_aot import compiled

pytestmark = [pytest.mark.tpu, pytest.mark.slow]


def test_both_operands_have_8_bits_forward_and_backward():
    names = ("bfloat16, by hand", "float8, grad(autocast)")
    script = (
        "import json; from benchmarks import tpu_amp8; "
        f"print(json.dumps(tpu_amp8.rows('remat', {names})))"
    )
    rows = {name: numbers for name, *numbers in compiled(script)}
    assert rows[names[0]][4] == 0
    # Four products a layer: forward, again, and their two gradients each, less the last
    # of the layer, which is not needed again.
    assert rows[names[1]][4] == 15
    assert rows[names[1]][1] <= 1.03
