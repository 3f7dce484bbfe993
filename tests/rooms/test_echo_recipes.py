"""Where the echo stands: before the augmentation, after it, or after the batch; with Grain and without."""

import itertools
import json
from collections import Counter, defaultdict

import grain
import jax
import numpy as np
import pytest
from benchmarks import echo_arms, echo_quality
from benchmarks.image_task import Split
from grain import experimental as grain_experimental
from jaxtricks import echo

N, FACTOR, BATCH = 24, 3, 6
IMAGES = np.random.default_rng(0).normal(size=(N, 4, 4, 1))
EXAMPLES = [
    {"schedule": "adjacent"},
    {"batch_size": BATCH},
    {"distance": 7},
    {"schedule": "pool", "distance": 8},
]
WHOLE = [{"schedule": "adjacent"}, {"batch_size": 1}]


@pytest.fixture
def calls():
    """One entry for every image that was augmented."""
    return []


def batched(examples):
    """Examples as batches, without Grain."""
    examples = iter(examples)
    while chunk := list(itertools.islice(examples, BATCH)):
        yield {name: np.stack([x[name] for x in chunk]) for name in chunk[0]}


def noisy(image, rng):
    return image + rng.normal(size=image.shape)


def before(kind, calls, **options):
    """Batches of images that are echoed, then augmented by a key of their own."""

    def augment(echoed):
        image, ordinal, copy = echoed
        calls.append(ordinal)
        rng = np.random.default_rng((7, ordinal, copy))
        return {"image": noisy(image, rng), "ordinal": ordinal, "copy": copy}

    if kind == "grain":
        source = grain.MapDataset.source(IMAGES)
        return echo.echo(source, FACTOR, tag=True, **options).map(augment).batch(BATCH)
    return batched(map(augment, echo.echo(IMAGES, FACTOR, tag=True, **options)))


def after(kind, calls, **options):
    """Batches of images that are augmented, then echoed."""

    def augment(ordinal, rng):
        calls.append(ordinal)
        return {"image": noisy(IMAGES[ordinal], rng), "ordinal": ordinal}

    if kind == "grain":
        source = grain.MapDataset.range(N).seed(7).random_map(augment)
        return echo.echo(source, FACTOR, **options).batch(BATCH)

    def source():
        return (augment(i, np.random.default_rng((7, i))) for i in range(N))

    return batched(echo.echo(source, FACTOR, **options))


def batches(kind, calls, **options):
    """Batches that are echoed, each as a whole, after everything else."""

    def augment(ordinal, rng):
        calls.append(ordinal)
        return {"image": noisy(IMAGES[ordinal], rng), "ordinal": ordinal}

    if kind == "grain":
        source = grain.MapDataset.range(N).seed(7).random_map(augment).batch(BATCH)
        return echo.echo(source, FACTOR, **options)

    def source():
        return batched(augment(i, np.random.default_rng((7, i))) for i in range(N))

    return echo.echo(source, FACTOR, **options)


def copies(outputs):
    """{ordinal: its images, in the order they came}."""
    found = defaultdict(list)
    for batch in outputs:
        for image, ordinal in zip(batch["image"], batch["ordinal"], strict=True):
            found[int(ordinal)].append(image)
    assert sorted(found) == list(range(N)) and {len(x) for x in found.values()} == {FACTOR}
    return found


both = pytest.mark.parametrize("kind", ["grain", "iterable"])


@both
@pytest.mark.parametrize("options", EXAMPLES, ids=str)
def test_before_the_augmentation_every_copy_differs(kind, options, calls):
    for images in copies(before(kind, calls, **options)).values():
        for one, other in itertools.combinations(images, 2):
            assert not np.any(one == other)
    assert Counter(calls) == dict.fromkeys(range(N), FACTOR)


@both
def test_a_key_of_ordinal_and_copy_gives_the_same_images_in_every_order(kind, calls):
    def images(options):
        found = copies(before(kind, calls, **options))
        return {i: {image.tobytes() for image in found[i]} for i in found}

    first, *rest = map(images, EXAMPLES)
    assert all(other == first for other in rest)


@both
@pytest.mark.parametrize("options", EXAMPLES, ids=str)
def test_after_the_augmentation_all_copies_are_equal_and_made_once(kind, options, calls):
    found = copies(after(kind, calls, **options))
    for i, images in found.items():
        assert all(np.array_equal(image, images[0]) for image in images)
        assert not np.any(images[0] == IMAGES[i])
    assert Counter(calls) == dict.fromkeys(range(N), 1)


@both
@pytest.mark.parametrize("options", WHOLE, ids=str)
def test_a_batch_that_is_echoed_comes_back_as_it_was(kind, options, calls):
    outputs = list(batches(kind, calls, **options))
    places = defaultdict(list)
    for place, batch in enumerate(outputs):
        assert len(batch["image"]) == BATCH
        places[tuple(batch["ordinal"].tolist())].append(place)
    assert list(places) == [tuple(range(i, i + BATCH)) for i in range(0, N, BATCH)]
    for first, *others in places.values():
        assert len(others) == FACTOR - 1
        for place in others:
            assert np.array_equal(outputs[place]["image"], outputs[first]["image"])
    apart = {b - a for x in places.values() for a, b in itertools.pairwise(x)}
    assert apart == ({1} if options.get("schedule") == "adjacent" else {4})
    assert Counter(calls) == dict.fromkeys(range(N), 1)


def test_grains_own_random_map_behind_the_echo_makes_copies_that_differ():
    stage = echo.echo(grain.MapDataset.source(IMAGES), FACTOR, batch_size=BATCH, tag=True).seed(7)

    def augment(echoed, rng):
        return {"image": noisy(echoed.element, rng), "ordinal": echoed.ordinal}

    for images in copies(stage.random_map(augment).batch(BATCH)).values():
        assert len({image.tobytes() for image in images}) == FACTOR


class Repeat(grain_experimental.FlatMapTransform):
    """The seed's echo: flat_map(repeat)."""

    def __init__(self, factor):
        self.max_fan_out = factor

    def flat_map(self, element):
        """The element, factor times."""
        return [element] * self.max_fan_out


@pytest.mark.parametrize("factor", [1, 2, 5])
def test_adjacent_is_grains_flat_map_of_repeats(factor):
    source = grain.MapDataset.source(IMAGES).shuffle(seed=3).to_iter_dataset()
    want = list(grain_experimental.FlatMapIterDataset(source, Repeat(factor)))
    assert len(want) == N * factor
    assert np.array_equal(list(echo.echo(source, factor, schedule="adjacent")), want)
    assert np.array_equal(list(echo.echo(list(source), factor, schedule="adjacent")), want)


# --- the bench that compares them ----------------------------------------------------------------


def reader(arm, reads):
    images = np.arange(2000 * 48, dtype=np.uint32).reshape(2000, 4, 4, 3) % 251
    split = Split(images.astype(np.uint8), np.arange(2000))
    order = np.random.default_rng(0).permutation(2000)[: reads * arm.reads]
    return echo_arms.Reader(split, order, echo_arms.BATCH if arm.batches else None), split


@pytest.mark.parametrize("key", echo_arms.arms())
def test_every_arm_of_the_bench_counts_its_reads_and_gives_each_copy_once(key):
    arm = echo_arms.arms()[key]
    source, split = reader(arm, 448)
    found = list(echo_arms.stream(arm, source))
    assert len(source.given) == len(set(source.given)) == 448 * arm.reads
    assert len(found) == 7 * arm.factor * arm.reads
    pairs = Counter()
    for batch in found:
        index = np.array(source.given)[batch.ordinals]
        assert np.array_equal(batch.labels, index)
        assert np.array_equal(batch.images, split.images[index])
        pairs.update(zip(batch.ordinals.tolist(), batch.copies.tolist(), strict=True))
    assert pairs == dict.fromkeys(itertools.product(range(448 * arm.reads), range(arm.factor)), 1)


def test_all_arms_begin_with_the_same_images_and_some_read_them_again():
    arms = echo_arms.arms()
    orders = {key: echo_arms.order(arm, 50, 20, seed=1) for key, arm in arms.items()}
    first = orders["spread, each"]
    assert len(set(first)) == len(first) == 20
    assert all(np.array_equal(order[:20], first) for order in orders.values())
    assert len(orders["fresh"]) == len(orders["epochs"]) == 80 and len(set(orders["fresh"])) == 50
    passes = orders["epochs"].reshape(4, 20)
    assert all(set(x) == set(first) for x in passes)
    assert len({tuple(x) for x in passes}) == 4


def test_the_bench_counts_what_shares_a_batch_and_how_far_copies_are_apart():
    ordinals = np.array([[0, 0, 1, 2], [3, 1, 4, 5]])
    assert echo_arms.shared(ordinals) == 0.125
    assert echo_arms.apart(ordinals) == 1
    assert echo_arms.apart(ordinals[:, 1:]) == 2
    assert echo_arms.apart(ordinals[1:]) is None


def test_on_the_device_copies_differ_by_the_key_and_are_equal_without_the_copy_in_it():
    images = np.random.default_rng(0).normal(size=(8, 16, 16, 3)).astype(np.float32)
    same = np.repeat(images, 16, axis=0)
    ordinals, number = np.repeat(np.arange(8), 16), np.tile(np.arange(16), 8)
    augment = jax.jit(echo_quality.augmented)
    labels = np.zeros_like(ordinals)
    each = augment(0, echo_arms.Batch(same, labels, ordinals, number))
    once = augment(0, echo_arms.Batch(same, labels, ordinals, np.zeros_like(number)))
    for i in range(8):
        mine = slice(16 * i, 16 * i + 16)
        assert len({x.tobytes() for x in np.asarray(each[mine])}) > 8  # of 50 that are possible
        assert len({x.tobytes() for x in np.asarray(once[mine])}) == 1
        assert np.array_equal(once[16 * i], each[16 * i])  # copy 0


def made_up(test, reads=10):
    figures = {
        "loss": 1.0,
        "reads": reads,
        "distinct": reads,
        "shared": 0.25,
        "apart": 9,
        "held": 5,
    }
    return [{"seed": seed, "test": x, **figures} for seed, x in enumerate(test)]


def test_the_table_pairs_seeds_and_says_what_is_within_noise():
    rows = {
        "none": made_up([0.40, 0.42]),
        "fresh": made_up([0.50, 0.54], reads=40),
        "epochs": made_up([0.51, 0.53], reads=40),
        "spread, each": made_up([0.50, 0.52]),
        "spread, once": made_up([0.45, 0.49]),
    }
    cells = echo_quality.cells("spread, each", rows)
    assert cells["minus fresh"] == "-1.00 +- 1.00" and cells["of the gain"] == "91 %"
    assert cells["test %"] == "51.00 +- 1.41" and cells["twice in a batch"] == "25.0 %"
    assert echo_quality.cells("none", rows)["apart"] is None
    each, once = echo_quality.table(rows).notes
    assert "fresh data: met (-1.00 +- 1.00 points, 10 reads for 40); -1.00 +- 0.00 to" in each
    assert "fresh data: MISSED (-5.00 +- 0.00" in once


def test_finished_runs_are_kept_unless_they_are_of_other_settings(tmp_path):
    out = tmp_path / "found.json"
    assert echo_quality.kept(out, {"reads": 1}) == {}
    out.write_text(json.dumps({"settings": {"reads": 1}, "rows": {"fresh": made_up([0.5])}}))
    assert echo_quality.kept(out, {"reads": 1}) == {"fresh": made_up([0.5])}
    with pytest.raises(SystemExit, match="remove it"):
        echo_quality.kept(out, {"reads": 2})
