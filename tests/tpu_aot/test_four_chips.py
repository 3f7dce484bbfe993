"""The training step on four chips: what each holds, and what they send each other.

A chip's arguments lie as the settings say, and no program sends a parameter more often than it must.
"""

import pytest

from tests.tpu_aot import costs

pytestmark = pytest.mark.tpu
FSDP, MEGATRON = "data=4 fsdp", "data=2,model=2"


@pytest.fixture(scope="module")
def resnet():
    return costs("four_chips", "resnet")


@pytest.fixture(scope="module")
def transformer():
    return costs("four_chips", "transformer")


@pytest.fixture(params=["resnet", "transformer"])
def found(request):
    return request.getfixturevalue(request.param)


def sent(cost, kind):
    """Bytes of the collectives of a kind, and their names."""
    these = [(size, name) for k, size, name in cost.sent if k == kind]
    return sum(size for size, _ in these), {name for _, name in these}


def test_every_mesh_compiles(found):
    assert set(found) == {"data=4", FSDP, MEGATRON}
    base = found["data=4"]
    for cost in found.values():
        assert cost.flops == pytest.approx(base.flops, rel=0.2)


def test_examples_over_data_only_sum_the_gradients(found):
    cost = found["data=4"]
    assert {kind for kind, *_ in cost.sent} == {"all-reduce"}
    # The rest are means, variances and their gradients.
    assert cost.params <= sent(cost, "all-reduce")[0] <= 1.01 * cost.params


def test_fsdp_holds_a_quarter(found):
    base, cost = found["data=4"], found[FSDP]
    assert cost.args < 0.3 * base.args


def test_fsdp_gathers_every_parameter_once_and_for_the_model_only(found):
    """Kept for the backward pass; those of products in bfloat16, as the TPU multiplies float32."""
    cost = found[FSDP]
    size, names = sent(cost, "all-gather")
    assert 0.49 * cost.params <= size <= 0.52 * cost.params
    # Named for where the step asks for it, or (libtpu 0.0.50) for what is gathered.
    assert all(
        ("jvp" in name and "sharding_constraint" in name) or name.startswith("state.params")
        for name in names
    )


def test_fsdp_splits_the_sums_of_gradients(found):
    """A reduce-scatter of nearly all; a few small ones are summed whole, with the statistics."""
    cost = found[FSDP]
    size, _ = sent(cost, "reduce-scatter")
    assert 0.95 * cost.params <= 4 * size <= cost.params
    assert sent(cost, "all-reduce")[0] <= 0.05 * cost.params
    assert {kind for kind, *_ in cost.sent} == {"all-gather", "reduce-scatter", "all-reduce"}


def test_kernels_over_model_sum_activations_four_times_a_block(transformer):
    """After attention and after the MLP, forward and backward; and once the gradients."""
    cost = transformer[MEGATRON]
    assert cost.args < 0.55 * transformer["data=4"].args
    assert {kind for kind, *_ in cost.sent} == {"all-reduce"} and len(cost.sent) == 4 * 4 + 1
    activations = 64 // 2 * 256 * 256 * 4
    size, _ = sent(cost, "all-reduce")
    assert 16 * activations < size < 16 * activations + 0.6 * cost.params
