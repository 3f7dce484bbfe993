"""Long-tailed sampling: probabilities, draws with and without replacement, schedules, the lab's order."""

import dataclasses
import functools
import itertools
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtricks import echo, longtail
from jaxtricks._random_bits import permuted
from jaxtricks.lab import config
from jaxtricks.lab import data as lab_data
from jaxtricks.lab import step as step_lib
from jaxtricks.lab.data.dataset import Source, sampled
from jaxtricks.lab.distributed import Placement
from jaxtricks.lab.trainer import Feed
from jaxtricks.longtail import contrib, sampling, weights

from tests.reference import longtail_sampling as reference

COUNTS = np.array([90, 40, 0, 9, 1])
LABELS = np.random.default_rng(0).permutation(np.repeat(np.arange(5), COUNTS))


def close(a, b, rtol=1e-6):
    b = np.asarray(b)
    np.testing.assert_allclose(np.asarray(a), b, rtol=0, atol=rtol * np.abs(b).max())


@pytest.fixture
def gold(golden):
    return golden("longtail_samplers")[0]


# --- probabilities -------------------------------------------------------------------------------


@pytest.mark.usefixtures("ours")
def test_golden_probability_of_each_example(gold):
    n, labels = gold["samplers/a__counts"], gold["samplers/a__labels"]
    cases = {
        "balanced_example_prob": sampling.class_probabilities(n, 0.0),
        "square_root_example_prob": sampling.class_probabilities(n, 0.5),
        "nroot_example_prob": sampling.class_probabilities(n, 0.25),
        "effective_number_example_prob": sampling.effective_number(n, 0.9999),
        "mislas_EffectNumSampler": sampling.effective_number(n, 0.9999),
        "cmo_example_prob": sampling.class_probabilities(n, 0.0),
    }
    for name, p in cases.items():
        want = gold[f"samplers/a__{name}__prob"]
        close((np.asarray(p) / n)[labels], want / want.sum())
    want = gold["samplers/a__progressive_example_prob__prob"]
    for t, row in zip(np.linspace(0, 1, 10), want, strict=True):
        close((np.asarray(sampling.progressive(n, t)) / n)[labels], row)


@pytest.mark.usefixtures("ours")
def test_golden_progressive_of_the_one_based_code(gold):
    n, want = (gold[f"samplers/a__{k}"] for k in ("counts", "bagoftricks_class_prob__progressive"))
    for e, row in enumerate(want):
        close(sampling.progressive(n, weights.ramp(e + 1, 0, 10)), row)


@pytest.mark.usefixtures("ours")
@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_golden_meta_rates(power, gold):
    n, labels = gold["samplers/a__counts"], gold["samplers/a__labels"]
    rates = np.asarray(jax.jit(contrib.meta_rates)(n, power))
    close(rates[labels], gold[f"samplers/a__meta_init_pow{power}__example_rate"], 2e-6)
    logits = gold[f"samplers/a__meta_init_pow{power}__fc_weight"][0]
    np.testing.assert_allclose(np.log(rates / (1 - rates)), logits, atol=2e-6)
    close(
        rates * n / np.sum(rates * n), gold[f"samplers/a__meta_init_pow{power}__class_prob"], 2e-6
    )
    close(sampling.class_probabilities(n, 1 - power), rates * n / np.sum(rates * n), 2e-6)


@pytest.mark.parametrize("seed", range(3))
def test_probabilities_equal_the_float64_reference_and_follow_the_classes(seed, x64):
    rng = np.random.default_rng(seed)
    n = rng.integers(1, 3000, 7)
    beta, power = rng.uniform(0.9, 0.99999), rng.uniform(-1, 1.5)
    order = rng.permutation(7)
    n64 = n.astype(np.float64)
    for function, want in (
        (lambda n: sampling.class_probabilities(n, power), reference.probabilities(n, power)),
        (lambda n: sampling.effective_number(n, beta), reference.effective_number(n, beta)),
        (lambda n: contrib.meta_rates(n, power), reference.meta_rates(n, power)),
        (lambda n: sampling.deferred(n, 5, 5, power), reference.probabilities(n, power)),
        (lambda n: sampling.deferred(n, 4, 5, power), reference.probabilities(n, 1)),
    ):
        np.testing.assert_allclose(function(n64), want, rtol=1e-9)
        np.testing.assert_allclose(jax.jit(function)(n64), want, rtol=1e-9)
        np.testing.assert_allclose(function(n64[order]), want[order], rtol=1e-9)


def test_a_class_without_examples_is_never_likely():
    for p in (sampling.effective_number(COUNTS), sampling.deferred(COUNTS, 1, 1)):
        assert p[2] == 0 and float(p.sum()) == pytest.approx(1, abs=1e-6)
    assert not np.any(sampling.effective_number([0, 0]))
    rates = contrib.meta_rates(COUNTS, 1.0)
    assert rates[2] == rates[4] and np.all((rates > 0) & (rates < 1))
    huge = contrib.meta_rates(np.array([10**9, 10**5, 1]), 4.0)  # n^-4 is no float32
    assert np.all(np.isfinite(huge)) and float(huge[-1]) == pytest.approx(1)


# --- schedules -----------------------------------------------------------------------------------


@pytest.mark.usefixtures("ours")
def test_golden_bbn(gold):
    epochs, want = (
        gold["schedules/bbn__alpha_max200__epoch"],
        gold["schedules/bbn__alpha_max200__l"],
    )
    got = jax.jit(jax.vmap(lambda e: weights.bbn(e, 200)))((epochs - 1).astype(np.int32))
    close(got, want)
    assert float(weights.bbn(500, 200)) == 0


@pytest.mark.usefixtures("ours")
def test_golden_deferred_of_a_hundred_classes(gold):
    n, epochs, want = (
        gold[f"schedules/cifar100_lt50__{k}"] for k in ("counts", "drw__epochs", "drw__w")
    )
    after = weights.effective_number(n, 0.9999)
    for epoch, row in zip(epochs, want, strict=True):
        close(weights.deferred(int(epoch), 160, np.ones(100, np.float32), after), row)


@pytest.mark.usefixtures("ours")
def test_ramps():
    ramp = jax.jit(weights.ramp, static_argnames="shape")
    steps = np.array([0, 10, 15, 20, 25, 30, 99])
    x = np.array([0, 0, 0.25, 0.5, 0.75, 1, 1])
    np.testing.assert_allclose([ramp(s, 10, 30) for s in steps], x, atol=1e-7)
    cosine = [ramp(s, 10, 30, shape="cosine") for s in steps]
    np.testing.assert_allclose(cosine, (1 - np.cos(np.pi * x)) / 2, atol=1e-6)
    assert [float(ramp(s, 10, 10)) for s in (9, 10, 11)] == [0, 0, 1]
    far = 2**30  # float32 cannot tell these steps apart
    assert float(ramp(far + 1, far, far + 2)) == 0.5
    before, after = [1.0, 1.0], [0.5, 1.5]
    for t in (0.0, 0.25, 1.0):
        np.testing.assert_allclose(weights.blend(t, before, after), [1 - t / 2, 1 + t / 2])
    with pytest.raises(ValueError, match="blend: `before` has 2"):
        weights.blend(0.5, before, [1.0])


# --- draws with replacement ----------------------------------------------------------------------


@pytest.mark.usefixtures("ours")
def test_shares_of_hosts_are_the_draw_of_one():
    table = sampling.table(LABELS, sampling.class_probabilities(COUNTS, 0))
    draw = jax.jit(sampling.sample_indices, static_argnames="n")
    part = jax.jit(lambda key, table, h: sampling.sample_indices(key, table, 64, shard=(h, 8)))
    for step in range(3):
        key = jax.random.fold_in(jax.random.key(0), step)
        whole = draw(key, table, n=64)
        parts = [part(key, table, h) for h in range(8)]
        np.testing.assert_array_equal(np.concatenate(parts), whole)
        aware = [
            sampling.class_aware_indices(key, table, 48, step, per_class=3, shard=(h, 4))
            for h in range(4)
        ]
        want = sampling.class_aware_indices(key, table, 48, step, per_class=3)
        np.testing.assert_array_equal(np.concatenate(aware), want)


@pytest.mark.devices
def test_eight_devices_draw_their_own_parts():
    table = sampling.table(LABELS, sampling.class_probabilities(COUNTS, 0.5))
    key, mesh = jax.random.key(1), Mesh(np.array(jax.devices()[:8]), ("data",))
    spec = PartitionSpec("data")

    @jax.jit
    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(PartitionSpec(), PartitionSpec()), out_specs=spec
    )
    def each(key, table):
        shard = (jax.lax.axis_index("data"), 8)
        with_replacement = sampling.sample_indices(key, table, 64, shard=shard)
        return with_replacement, sampling.class_aware_indices(key, table, 64, 3, shard=shard)

    got = each(key, table)
    want = sampling.sample_indices(key, table, 64), sampling.class_aware_indices(key, table, 64, 3)
    for ours, theirs in zip(got, want, strict=True):
        np.testing.assert_array_equal(ours, theirs)
        assert ours.sharding.spec == spec
    sharded = jax.jit(
        lambda k, t: sampling.sample_indices(k, t, 64), out_shardings=NamedSharding(mesh, spec)
    )(key, table)
    np.testing.assert_array_equal(sharded, want[0])


@pytest.mark.usefixtures("ours")
def test_new_probabilities_need_no_new_trace_and_are_what_is_drawn():
    table, traces = sampling.table(LABELS, np.ones(5, np.float32)), []

    @jax.jit
    def draw(key, table, t):
        traces.append(None)
        p = sampling.progressive(COUNTS, t)
        return sampling.sample_indices(key, dataclasses.replace(table, probabilities=p), 40_000)

    for t in (0.0, 0.5, 1.0):
        share = np.bincount(LABELS[draw(jax.random.key(0), table, np.float32(t))], minlength=5)
        p = np.asarray(sampling.progressive(COUNTS, t))
        # four standard deviations
        np.testing.assert_array_less(np.abs(share / 40_000 - p), 4 * np.sqrt(p / 40_000) + 1e-9)
    assert len(traces) == 1


@pytest.mark.usefixtures("ours")
def test_many_and_rare_classes_are_drawn_exactly():
    p = np.zeros(5000, np.float32)
    p[[1, 4998]] = 1 - 1e-3, 1e-3  # unlikely, after thousands of impossible classes
    labels = np.arange(5000)
    table = sampling.table(labels, p * 7)  # any scale
    indices = np.asarray(sampling.sample_indices(jax.random.key(2), table, 100_000))
    assert set(indices) == {1, 4998}
    assert np.mean(indices == 4998) == pytest.approx(1e-3, abs=4e-4)


@pytest.mark.usefixtures("ours")
def test_draws_that_cannot_be_meant_raise():
    p = np.ones(5, np.float32)
    table = sampling.table(LABELS, p)
    with pytest.raises(ValueError, match="3 shards do not divide"):
        sampling.sample_indices(jax.random.key(0), table, 64, shard=(0, 3))
    with pytest.raises(ValueError, match="index < number"):
        sampling.sample_indices(jax.random.key(0), table, 64, shard=(4, 4))
    with pytest.raises(ValueError, match="probabilities of shape"):
        bad = dataclasses.replace(table, probabilities=np.ones(4, np.float32))
        sampling.sample_indices(jax.random.key(0), bad, 8)
    with pytest.raises(ValueError, match="probabilities` is -1"):
        sampling.table(LABELS, np.array([1, -1, 1, 1, 1], np.float32))
    with pytest.raises(ValueError, match="labels"):
        sampling.table(LABELS + 1, p)
    with pytest.raises(ValueError, match="per_class"):
        sampling.class_aware_indices(jax.random.key(0), table, 8, 0, per_class=0)


# --- draws without replacement -------------------------------------------------------------------


def check_class_aware(indices, labels, num_classes, per_class):
    """Runs of one class, each class once a cycle, each example once a pass through its class."""
    drawn_labels = labels[indices]
    runs = drawn_labels.reshape(-1, per_class)
    assert np.all(runs == runs[:, :1])
    cycles = runs[: len(runs) // num_classes * num_classes, 0].reshape(-1, num_classes)
    for cycle in cycles:
        assert len(set(cycle)) == num_classes
    for c in set(labels):
        mine = indices[drawn_labels == c]
        size = np.sum(labels == c)
        for start in range(0, len(mine), size):
            part = mine[start : start + size]
            assert len(set(part.tolist())) == len(part)


@pytest.mark.usefixtures("ours")
@pytest.mark.parametrize("per_class", [1, 4])
def test_class_aware_draws_are_those_of_the_reference_up_to_its_generator(per_class, gold):
    labels, counts = gold["samplers/a__labels"], gold["samplers/a__counts"]
    theirs = gold[f"samplers/a__class_aware_k{per_class}__first_indices"]
    check_class_aware(theirs, labels, 10, per_class)
    table = sampling.table(labels, np.ones(10, np.float32))
    draw = jax.jit(
        functools.partial(sampling.class_aware_indices, per_class=per_class), static_argnums=2
    )
    # An epoch of the reference, which is not a whole number of batches of 24 or of passes.
    steps = int(gold["samplers/a__class_aware_k1__epoch_len"]) // 40
    ours = np.concatenate([draw(jax.random.key(5), table, 40, s) for s in range(steps)])
    check_class_aware(ours, labels, 10, per_class)
    assert np.bincount(labels[ours]).tolist() == [200] * 10
    assert np.array_equal(np.unique(ours[labels[ours] == 0]), np.flatnonzero(labels == 0))
    # Any step alone, and other batch sizes, are the same stream.
    np.testing.assert_array_equal(draw(jax.random.key(5), table, 40, 31), ours[31 * 40 : 32 * 40])
    np.testing.assert_array_equal(draw(jax.random.key(5), table, 16, 7), ours[7 * 16 : 8 * 16])
    other = np.asarray(draw(jax.random.key(6), table, 40, 0))
    assert np.any(other != ours[:40])
    cycles = labels[ours][::per_class].reshape(-1, 10)
    assert len({tuple(c) for c in cycles}) > len(cycles) * 0.9  # a new order each cycle
    assert counts.max() == 200


@pytest.mark.usefixtures("ours")
def test_class_aware_draws_skip_empty_classes():
    table = sampling.table(LABELS, np.ones(5, np.float32))
    indices = np.asarray(sampling.class_aware_indices(jax.random.key(0), table, 400, 0))
    assert np.bincount(LABELS[indices], minlength=5).tolist() == [100, 100, 0, 100, 100]
    none = dataclasses.replace(table, counts=np.zeros(5, np.int32))
    assert sampling.class_aware_indices(jax.random.key(0), none, 3, 0).tolist() == [-1] * 3
    assert sampling.sample_indices(jax.random.key(0), none, 3).tolist() == [-1] * 3
    with pytest.raises(ValueError, match="`labels` are empty"):
        sampling.table(np.zeros(0, np.int32), np.ones(2, np.float32))


@pytest.mark.usefixtures("ours")
@pytest.mark.parametrize("size", [1, 2, 3, 4, 1000])
def test_permutations_are_permutations_and_all_alike(size):
    places, n = jnp.arange(size, dtype=jnp.uint32), 4800 if size < 5 else 20
    permute = jax.jit(jax.vmap(lambda seed: permuted(places, jnp.uint32(size), seed)))
    rows = np.asarray(permute(jnp.arange(n, dtype=jnp.uint32)))
    np.testing.assert_array_equal(np.sort(rows, axis=1), np.tile(np.arange(size), (n, 1)))
    if size < 5:
        kinds = list(itertools.permutations(range(size)))
        seen = np.array([np.sum(np.all(rows == kind, axis=1)) for kind in kinds])
        expected = n / len(kinds)
        assert np.sum((seen - expected) ** 2 / expected) < 2 * len(kinds) + 10
    else:
        fixed = np.mean(rows == np.arange(size))
        assert fixed < 3 / size
        steps = np.diff(rows.astype(int), axis=1)
        assert len(set(steps.reshape(-1).tolist())) > size


# --- echo ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("exact", [True, False])
def test_echo_by_class_gives_as_many_of_each(exact):
    n = longtail.class_counts(LABELS, 5)[[0, 1, 3, 4]]
    labels = np.random.default_rng(1).permutation(np.repeat(np.arange(4), n))
    factor = [Fraction(int(n.max()), int(c)) for c in n] if exact else n.max() / n
    stream = list(echo.echo(range(len(labels)), factor, class_of=labels.__getitem__, distance=2))
    totals = longtail.class_counts(labels[stream], 4)
    assert totals.tolist() == [n.max()] * 4
    # What sampling.class_probabilities(n, 0) does on average; the counts of the loss stay those of the data.
    close(totals / totals.sum(), sampling.class_probabilities(n, 0))


# --- the lab -------------------------------------------------------------------------------------


def test_the_labs_order_draws_by_probability():
    order = sampled(LABELS, [1, 1, 5, 1, 1], seed=3)
    indices = np.array([order(i) for i in range(8000)])
    share = np.bincount(LABELS[indices], minlength=5) / 8000
    np.testing.assert_allclose(share, [0.25, 0.25, 0, 0.25, 0.25], atol=0.02)
    within = np.bincount(indices, minlength=len(LABELS))[LABELS == 3] / 2000
    np.testing.assert_allclose(within, 1 / 9, atol=0.03)
    again, other = sampled(LABELS, [1, 1, 5, 1, 1], 3), sampled(LABELS, [1] * 5, 4)
    assert [again(i) for i in range(7999, 7899, -1)] == indices[:-101:-1].tolist()
    # Neighbouring draws and seeds have nothing to do with each other.
    first = LABELS[indices]
    assert np.mean(first[1:] == first[:-1]) == pytest.approx(0.25, abs=0.03)
    second = LABELS[[other(i) for i in range(4000)]]
    assert np.mean(second == first[:4000]) == pytest.approx(0.25, abs=0.04)
    for bad in ([1, 1, 1], [0, 0, 1, 0, 0], [-1, 1, 1, 1, 1]):
        with pytest.raises(ValueError, match="probabilities"):
            sampled(LABELS, bad, 0)


def test_the_labs_order_turns_over_the_run():
    order = sampled(LABELS, [1, 0, 0, 0, 0], 0, after=[0, 1, 0, 0, 0], over=6000)
    labels = LABELS[[order(i) for i in range(9000)]]
    share = labels.reshape(9, 1000).mean(1)  # of class 1
    np.testing.assert_allclose(share, np.clip((np.arange(9) + 0.5) / 6, 0, 1), atol=0.06)
    assert np.all(labels[6000:] == 1)


@pytest.mark.parametrize("readers", [0, 2])
def test_a_pipeline_of_drawn_examples_resumes_anywhere(readers):
    def read(i):
        return {"image": np.full((2, 2, 1), i, np.uint8), "label": LABELS[i].astype(np.int32)}, 4

    def start():
        return lab_data.pipeline(
            Source(read, len(LABELS), LABELS),
            batch=6,
            seed=0,
            transform=lambda ds: ds,
            readers=readers,
            order=sampled(LABELS, [1] * 5, 2),
        )

    whole, cut = start(), start()
    batches = [next(whole)["image"][:, 0, 0, 0].tolist() for _ in range(9)]
    order = sampled(LABELS, [1] * 5, 2)
    assert np.ravel(batches).tolist() == [order(i) for i in range(54)]
    for _ in range(4):
        next(cut)
    again = start()
    again.set_state(cut.get_state())
    assert [next(again)["image"][:, 0, 0, 0].tolist() for _ in range(5)] == batches[4:]


@pytest.mark.parametrize("kind", ["instance", "square-root", "balanced", "progressive"])
def test_a_run_draws_as_it_was_told(kind):
    cfg = config.Train(data="digits", imbalance=20, sampling=kind, steps=40, batch=50)
    cfg.check()
    data = lab_data.load("digits", imbalance=20)
    batches = Feed(cfg, data, Placement.of(cfg.parallel))
    labels = np.concatenate([next(batches)["label"] for _ in range(40)])
    halves = [np.bincount(h, minlength=10) / 1000 for h in np.split(labels, 2)]
    n = data.counts
    data_share, root, even = (np.asarray(sampling.class_probabilities(n, p)) for p in (1, 0.5, 0))
    want = {
        "instance": (data_share, data_share),
        "square-root": (root, root),
        "balanced": (even, even),
        "progressive": (0.75 * data_share + 0.25 * even, 0.25 * data_share + 0.75 * even),
    }[kind]
    for got, p in zip(halves, want, strict=True):
        np.testing.assert_allclose(got, p, atol=0.045)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sampling": "balanced", "tricks": config.Tricks(longtail=True)}, "twice: drop one"),
        ({"sampling": "square-root", "model": "transformer"}, "text has none"),
        (
            {"sampling": "progressive", "tricks": config.Tricks(echo=True), "echo_factor": "auto"},
            "--echo-factor a number",
        ),
    ],
)
def test_sampling_that_cannot_be_meant(settings, message):
    with pytest.raises(config.UserError, match=message):
        config.Train(**settings).check()


def test_progressive_counts_what_is_read_not_what_is_used():
    tricks = config.Tricks(echo=True)
    cfg = config.Train(sampling="progressive", tricks=tricks, echo_factor=4, steps=40, batch=50)
    labels = np.repeat([0, 1], [900, 100]).astype(np.int32)
    source = Source(lambda i: ({}, 0), 1000, labels)
    data = lab_data.load("digits")._replace(train=source, counts=np.array([900, 100]))
    order = step_lib.build_order(cfg, data)
    late = labels[[order(i) for i in range(500, 2500)]]  # after 40 * 50 / 4 reads
    assert late.mean() == pytest.approx(0.5, abs=0.04)
