"""Long-tailed metrics: scores against a float64 reference, intervals, sums, bad input, the picture."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec
from jaxtricks import longtail, plot
from jaxtricks.longtail import metrics
from matplotlib.backends.backend_agg import FigureCanvasAgg

from tests.reference import longtail_sampling as reference

SCORES = (
    "accuracy",
    "balanced_accuracy",
    "balanced_error",
    "geometric_mean",
    "harmonic_mean",
    "many",
    "medium",
    "few",
    "per_class",
    "ece",
    "ece_many",
    "ece_medium",
    "ece_few",
)


def rows(seed, num_classes=12, n=700):
    """(labels, predictions, confidence, counts): right more often in the head, class 3 not in the test."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, num_classes, n)
    labels[labels == 3] = 4
    right = rng.uniform(size=n) < np.linspace(0.95, 0.3, num_classes)[labels]
    predictions = np.where(right, labels, rng.integers(0, num_classes, n))
    # Away from the edges of the bins, which float32 and float64 round differently.
    confidence = (rng.integers(0, 15, n) + rng.uniform(0.01, 0.99, n)) / 15
    counts = longtail.data.exponential_counts(400, num_classes, 100)
    return labels, predictions, confidence, rng.permutation(counts)


def state_of(labels, predictions, confidence, num_classes):
    update = jax.jit(metrics.update_predictions)
    return update(metrics.init(num_classes), predictions, np.float32(confidence), labels)


@pytest.mark.usefixtures("ours")
@pytest.mark.parametrize("seed", range(4))
def test_summary_equals_the_reference_on_the_rows(seed):
    labels, predictions, confidence, counts = rows(seed)
    if seed == 3:
        predictions = np.where(labels == 7, 8, predictions)  # a class that is never right
    state = state_of(labels, predictions, confidence, 12)
    summary = functools.partial(metrics.summary, many=100, few=20)
    got, eager = jax.jit(summary)(state, counts), summary(state, counts)
    want = reference.scores(labels, predictions, confidence, counts, 100, 20)
    for name in SCORES:
        np.testing.assert_allclose(got[name], want[name], rtol=2e-5, atol=1e-6, err_msg=name)
        np.testing.assert_allclose(got[name], eager[name], rtol=1e-5, atol=1e-7, err_msg=name)
    assert (float(got["geometric_mean"]) == 0) == (seed == 3)
    assert (float(got["harmonic_mean"]) == 0) == (seed == 3)


@pytest.mark.usefixtures("ours")
def test_the_order_of_the_classes_is_no_matter():
    labels, predictions, confidence, counts = rows(0)
    order = np.random.default_rng(1).permutation(12)  # class c becomes order[c]
    moved = np.empty(12, int)
    moved[order] = counts
    got = metrics.summary(state_of(labels, predictions, confidence, 12), counts)
    other = metrics.summary(state_of(order[labels], order[predictions], confidence, 12), moved)
    for name in SCORES:
        a, b = np.asarray(got[name]), np.asarray(other[name])
        np.testing.assert_allclose(a, b[order] if name == "per_class" else b, rtol=1e-5)


@pytest.mark.usefixtures("ours")
def test_golden_calibration_of_groups_adds_up(golden):
    arrays, _ = golden("longtail")
    names = ("counts", "labels", "preds", "confidence")
    counts, labels, predictions, confidence = (arrays[f"metrics/a__{n}"] for n in names)
    state = state_of(labels, predictions, confidence, 100)
    # One group with all classes is the whole: the reference's figure.
    got = metrics.summary(state, counts, many=0, few=0)
    want = float(arrays["metrics/a__ece_15__expected_calibration_error"])
    assert float(got["ece_many"]) == pytest.approx(want, abs=1e-6)
    assert np.isnan(got["ece_few"]) and np.isnan(got["ece_medium"])
    np.testing.assert_array_equal(state.bin_count, arrays["metrics/a__ece_15__counts"])
    filled = np.asarray(state.bin_count) > 0
    for ours, theirs in ((state.bin_correct, "accuracies"), (state.bin_confidence, "confidences")):
        mean = np.asarray(ours)[filled] / np.asarray(state.bin_count)[filled]
        np.testing.assert_allclose(mean, arrays[f"metrics/a__ece_15__{theirs}"][filled], rtol=1e-5)


@pytest.mark.devices
def test_states_of_devices_and_hosts_add_up():
    labels, predictions, confidence, counts = rows(2, n=640)
    labels[:3] = [-1, 12, 99]
    whole = state_of(labels, predictions, confidence, 12)
    halves = [
        state_of(labels[part], predictions[part], confidence[part], 12)
        for part in (slice(0, 100), slice(100, None))
    ]
    on_host = jax.tree.map(np.asarray, halves[0])
    mesh = Mesh(np.array(jax.devices()[:8]), ("data",))
    spec = PartitionSpec("data")

    @jax.jit
    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(spec,) * 3, out_specs=PartitionSpec())
    def over_devices(labels, predictions, confidence):
        state = metrics.update_predictions(metrics.init(12), predictions, confidence, labels)
        return jax.lax.psum(state, "data")

    sums = (
        metrics.merge(on_host, halves[1]),
        over_devices(labels, predictions, confidence.astype(np.float32)),
    )
    for state in sums:
        for ours, theirs in zip(jax.tree.leaves(state), jax.tree.leaves(whole), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    assert float(metrics.summary(whole, counts)["out_of_range"]) == pytest.approx(3 / 640)


@pytest.mark.usefixtures("ours")
def test_labels_out_of_range_are_counted_and_nothing_else():
    logits = np.eye(3, dtype=np.float32)[[0, 1, 2, 0]]
    update = jax.jit(metrics.update)
    where = np.array([True, True, True, False])
    state = update(metrics.init(3), logits, np.array([0, 3, -7, 5]), where)
    assert int(state.out_of_range) == 2 and int(state.confusion.sum()) == 1
    assert int(state.bin_count.sum()) == 1
    summary = metrics.summary(state, [3, 2, 1])
    assert (
        float(summary["out_of_range"]) == pytest.approx(2 / 3) and float(summary["accuracy"]) == 1
    )


# --- intervals -----------------------------------------------------------------------------------


@pytest.mark.usefixtures("ours")
def test_intervals_over_examples_are_binomial():
    num, n = 6, 400
    labels = np.repeat(np.arange(num), n)
    shares = np.array([0.9, 0.8, 0.7, 0.5, 0.4, 0.2])
    right = np.tile(np.arange(n), num) < (shares * n).round()[labels]
    predictions = np.where(right, labels, (labels + 1) % num)
    state = state_of(labels, predictions, np.full(len(labels), 0.5), num)
    counts = np.array([500, 200, 90, 50, 10, 5])
    got = jax.jit(metrics.bootstrap, static_argnames=("samples", "level", "unit"))(
        jax.random.key(0), state, counts, samples=2000, level=0.9
    )
    for name, members in (("balanced_accuracy", range(6)), ("many", (0, 1)), ("few", (4, 5))):
        p = shares[list(members)]
        half = 1.645 * np.sqrt(np.sum(p * (1 - p) / n)) / len(p)
        np.testing.assert_allclose(got[name], p.mean() + half * np.array([-1, 1]), atol=0.15 * half)
    low, high = got["geometric_mean"]
    value = float(metrics.summary(state, counts)["geometric_mean"])
    assert low < value < high
    np.testing.assert_allclose(got["balanced_error"], 1 - got["balanced_accuracy"][::-1], atol=1e-6)
    again = metrics.bootstrap(jax.random.key(0), state, counts, samples=2000, level=0.9)
    np.testing.assert_allclose(again["few"], got["few"], rtol=1e-6)


@pytest.mark.usefixtures("ours")
def test_intervals_over_classes_are_those_of_the_mean():
    labels, predictions, confidence, counts = rows(5)
    state = state_of(labels, predictions, confidence, 12)
    got = metrics.bootstrap(jax.random.key(1), state, counts, samples=4000, unit="class")
    per_class = np.asarray(metrics.summary(state, counts)["per_class"], np.float64)
    present = per_class[~np.isnan(per_class)]  # eleven of twelve
    rng = np.random.default_rng(0)
    means = rng.choice(present, (20_000, len(present))).mean(1)
    np.testing.assert_allclose(
        got["balanced_accuracy"], np.quantile(means, [0.025, 0.975]), atol=0.012
    )
    assert got["few"][0] <= got["few"][1]


@pytest.mark.usefixtures("ours")
def test_intervals_where_there_is_nothing():
    nothing = metrics.bootstrap(jax.random.key(0), metrics.init(3), [3, 2, 1], samples=5)
    assert all(np.all(np.isnan(ends)) for ends in nothing.values())
    perfect = state_of(np.arange(3), np.arange(3), np.ones(3), 3)
    for unit in ("example", "class"):
        ends = metrics.bootstrap(jax.random.key(0), perfect, [300, 50, 1], samples=20, unit=unit)
        assert all(np.all(ends[name] == 1) for name in ("accuracy", "many", "few", "harmonic_mean"))
    for bad in ({"samples": 0}, {"level": 1.0}):
        with pytest.raises(ValueError, match="bootstrap needs"):
            metrics.bootstrap(jax.random.key(0), perfect, [3, 2, 1], **bad)
    with pytest.raises(ValueError, match="counts. has 2 classes"):
        metrics.bootstrap(jax.random.key(0), perfect, [3, 2])


# --- relative accuracy ---------------------------------------------------------------------------


def test_relative_accuracy_is_the_surveys():
    # Survey table 5, 90 epochs: accuracy, upper reference, relative accuracy in percent.
    for accuracy, upper, want in ((45.5, 57.3, 79.4), (51.1, 57.3, 89.2), (57.3, 61.9, 92.6)):
        got = metrics.relative_accuracy(accuracy, upper, 40.0)
        assert round(100 * float(got), 1) == want
    with pytest.raises(ValueError, match="upper"):
        metrics.relative_accuracy(45.5)


@pytest.mark.parametrize("seed", range(3))
def test_the_balanced_counterpart_is_even_and_as_large(seed):
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, 900, 17)
    got = longtail.data.balanced_counterpart(counts)
    assert got.sum() == counts.sum() and got.max() - got.min() <= 1
    more = got > got.min()
    assert not more.any() or counts[more].min() >= counts[~more].max()
    with pytest.raises(ValueError, match="negative"):
        longtail.data.balanced_counterpart([3, -1])


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.usefixtures("ours")
@pytest.mark.parametrize(
    "use",
    [
        longtail.balanced_softmax,
        longtail.ldam,
        longtail.weights.effective_number,
        longtail.weights.inverse_frequency,
        longtail.sampling.class_probabilities,
        longtail.sampling.effective_number,
        longtail.contrib.meta_rates,
        lambda n: longtail.posthoc.adjust(jnp.zeros((2, 3)), n),
        lambda n: metrics.summary(metrics.init(3), n),
    ],
)
def test_negative_and_nan_counts_raise_where_they_are_seen(use):
    with pytest.raises(ValueError, match=r"is -4.* for class 1: pass numbers"):
        use([9, -4, 1])
    with pytest.raises(ValueError, match="is nan for class 2"):
        use(np.array([9, 4, np.nan], np.float32))
    use(np.array([9, 0, 1]))  # a class without examples is defined
    jax.jit(lambda n: jax.tree.leaves(use(n)))(
        np.array([9, -4, 1])
    )  # unseen: as if without examples


def test_names_out_of_order_are_caught():
    labels = np.array([0, 1, 2, 2])
    count = longtail.class_counts
    for names in (["0", "1", "10", "2"], ["c_1", "c_10", "c_2", "c_3"], ["3", "1", "2", "0"]):
        with pytest.raises(ValueError, match="order of strings"):
            count(labels, 4, names=names)
        with pytest.raises(ValueError, match="order of strings"):
            count(jnp.asarray(labels), 4, names=names)
    for names in (["0", "1", "2", "10"], ["cat", "ant", "dog", "x1"], ["n01", "n02", "n03", "n04"]):
        assert count(labels, 4, names=names).tolist() == [1, 1, 2, 0]
    by_name = count(["10", "2", "10", "0"], 4, names=["0", "1", "10", "2"])
    assert by_name.tolist() == [1, 0, 2, 1]
    with pytest.raises(ValueError, match="'7' is among"):
        count(["7"], 2, names=["0", "1"])
    for names in (["a", "b"], ["a", "b", "c", "a"]):
        with pytest.raises(ValueError, match="names. are"):
            count(labels, 4, names=names)
    traced = jax.jit(lambda y: count(y, 4, names=["a", "b", "c", "d"]))(labels)
    assert traced.tolist() == [1, 1, 2, 0]


# --- the picture ---------------------------------------------------------------------------------


def drawn(figure):
    FigureCanvasAgg(figure).draw()
    return figure.axes


def test_shots_draw_classes_by_count_and_groups_as_bars():
    labels, predictions, confidence, counts = rows(0)
    state = state_of(labels, predictions, confidence, 12)
    summary = metrics.summary(state, counts)
    left, right = drawn(plot.shots(summary, counts))
    (line,) = left.get_lines()
    x, y = line.get_data()
    assert len(x) == 12 and np.all(np.diff(x) <= 0) and left.get_xscale() == "log"
    assert left.xaxis_inverted()
    order = np.argsort(-counts, kind="stable")
    np.testing.assert_allclose(y, 100 * np.asarray(summary["per_class"])[order])
    heights = [bar.get_height() for bar in right.patches]
    np.testing.assert_allclose(heights, [100 * summary[g] for g in ("many", "medium", "few")])
    ends = metrics.bootstrap(jax.random.key(0), state, counts, samples=50)
    _, right = drawn(plot.shots(summary, counts, intervals=ends))
    assert len(right.collections) == 3


def test_shots_of_several_methods_and_empty_groups():
    labels, predictions, confidence, counts = rows(0)
    state = state_of(labels, predictions, confidence, 12)
    counts = np.where(counts < 20, 0, counts)
    counts[0] = 0
    methods = {
        "plain": metrics.summary(state, counts, few=0),
        "balanced": metrics.summary(state, counts, few=0),
    }
    figure = plot.shots(methods, counts)
    left, right = drawn(figure)
    assert [line.get_label() for line in left.get_lines()] == ["plain", "balanced"]
    assert len({line.get_linestyle() for line in left.get_lines()}) == 2
    assert len({bar.get_hatch() for bar in right.patches}) == 2 and len(right.patches) == 4
    assert [text.get_text() for text in right.texts].count("none") == 2  # no few-shot class
    assert left.get_lines()[0].get_xdata().min() == 0.5
    with pytest.raises(ValueError, match="training counts"):
        plot.shots(methods, counts[:3])
