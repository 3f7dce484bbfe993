"""Traffic and memory on a TPU v5e, from its compiler: no TPU is needed, libtpu is.

`make test-all` installs libtpu into an environment of its own (beside the ordinary one, where it would
greet every command that looks for devices) and names its interpreter in TPU_PYTHON.
"""

from typing import NamedTuple

import pytest
from benchmarks import common

from tests.tpu_aot import compiled, costs

pytestmark = pytest.mark.tpu
SCRIPT = "import json; from benchmarks import tpu; print(json.dumps(tpu.rows(tpu.leaf())))"
# Bytes accessed on one 8192 x 8192 leaf, as a ratio to AdamW's 28 a parameter (p, g, m, v read, p, m, v
# written), and 1 % more.
LIMITS = {
    "memopt.adafactor": 0.87,  # g three times, p twice, p written: 24 bytes
    "memopt.sm3": 12 / 28 * 1.01,  # p, g, p written
    "memopt.sm3 momentum 0.9": 20 / 28 * 1.01,  # and m read and written
    "agc, sgd momentum 0.9": 1.01,  # the norms read g and p once more: 28 bytes
}
TEMP_MIB = 2


class Row(NamedTuple):
    """One row of `tpu.rows`, after its name."""

    accessed: float
    ratio: float
    temp: float
    state: float


@pytest.mark.slow
def test_traffic_with_hbm():
    rows = {row[0]: Row(*row[1:]) for row in compiled(SCRIPT)}
    print("\n".join(f"{name:32}{row.accessed:8.2f}" for name, row in rows.items()))
    assert set(rows) == set(common.optimizers())
    assert rows["adamw"].accessed == pytest.approx(28, rel=1e-3)
    assert {n: rows[n].ratio for n, limit in LIMITS.items() if rows[n].ratio > limit} == {}
    assert {n: rows[n].temp for n in LIMITS if rows[n].temp > TEMP_MIB} == {}
    assert rows["memopt.adafactor"].accessed < rows["optax.adafactor"].accessed


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "way", "limit"),
    [
        ("scan", "grad(autocast)", 1.03),
        ("remat", "grad(autocast)", 1.03),
        ("unrolled", "grad(autocast)", 1.10),
    ],
)
def test_autocast_needs_the_memory_of_a_cast_by_hand(form, way, limit):
    names = ("cast by hand", way)
    found = f"tpu_amp.rows({form!r}, {names})"
    script = f"import json; from benchmarks import tpu_amp; print(json.dumps({found}))"
    rows = {name: ratio for name, _, ratio, _, _ in compiled(script)}
    assert set(rows) == set(names) and rows[way] <= limit


SHARDED = """
import json, jax, optax
from benchmarks import tpu, scale, scale_model as model
from jaxtricks import remat
size, tx, on = model.Size(2, 512, 1024, 4, 256, 4096), optax.adamw(1e-3), scale.mesh("v5e:4x4")
report = scale.compiled(size, "v5e:4x4", tx, scale.AUTOCAST, scale.LAYER)
params, state = scale.paper_bytes(model.shapes(size), tx, on)
nothing = remat.memory_analysis(lambda x: x + 1, jax.ShapeDtypeStruct((), "float32", sharding=tpu.chip()))
print(json.dumps([report.args, report.alias, params + state, nothing.temp]))
"""


@pytest.mark.slow
def test_one_device_of_sixteen_holds_the_bytes_on_paper():
    args, alias, paper, offset = compiled(SHARDED)
    # The rest is the tokens and 512 bytes for each of the small leaves.
    assert paper <= args <= 1.01 * paper
    assert alias == pytest.approx(paper, rel=0.01)  # all of it is donated
    assert offset == 0  # a constant that libtpu added would be in every temporary of the table


GENERATIONS = ("v5e:2x2", "v6e:2x2", "tpu7x:2x2x1")
PLANNED = f"""
import json, os, jax, jax.numpy as jnp
from jaxtricks import remat

os.environ.update(remat.libtpu_environment({GENERATIONS[0]!r}))

def loss(ws, x):
    for w in ws:
        x = jnp.tanh(x @ w)
    return jnp.mean(x**2)

shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, "float32")
args = [shape(1024, 1024)] * 8, shape(32768, 1024)
kwargs = dict(budget_bytes=0.6, wrt="temp", max_compiles=4)
plans = [remat.plan(loss, *args, topology=one, **kwargs) for one in {GENERATIONS}]
print(json.dumps([(p.peak, p.budget, p.baseline) for p in plans]))
"""


@pytest.mark.slow
def test_plans_meet_their_budgets_on_every_generation():
    found = compiled(PLANNED)
    assert len(found) == len(GENERATIONS)
    for peak, budget, baseline in found:
        assert 0 < peak <= budget < baseline


@pytest.mark.slow
@pytest.mark.parametrize(("topology", "limit"), [("v6e:2x2", 0.5), ("tpu7x:2x2x1", 0.75)])
def test_all_tricks_compile_on_later_generations(topology, limit):  # tests/tpu_aot has v5e
    names = ("baseline", "all")
    found = costs("one_chip", "transformer", names, topology)
    base, every = (found[name] for name in names)
    assert every.temp < limit * base.temp and every.args < base.args


OFFLOADED = """
import json, os
from benchmarks import tpu_remat
from jaxtricks import remat
os.environ.update(remat.libtpu_environment({topology!r}))
loss, args = tpu_remat.stacked(2, 256, 256)
kwargs = dict(budget_bytes=0.3, wrt="temp", max_compiles=3, topology={topology!r})
plans = [remat.plan(loss, *args, host_bandwidth=bandwidth, **kwargs) for bandwidth in (0, 1e13)]
print(json.dumps([(p.peak, p.budget, p.host, p.extra_flops) for p in plans]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("topology", GENERATIONS)
def test_where_loops_offload_the_same_budget_takes_less_recomputation(topology):
    recomputed, offloaded = compiled(OFFLOADED.format(topology=topology))
    assert recomputed[0] <= recomputed[1] and offloaded[0] <= offloaded[1]
    assert recomputed[2] == 0 < offloaded[2]
    assert offloaded[3] <= 0.5 * recomputed[3]
