"""The bench on real images: its data, its steps and its tables, on a tiny made-up data set."""

import functools

import numpy as np
import pytest
from benchmarks import image_task, network_arms, networks
from flax import nnx
from jaxtricks.lab.models import RepVGG
from PIL import Image

COUNTS = {"train": 4, "validation": 2, "test": 2}


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """Ten classes that differ in brightness; no two images are equal."""
    root, value = tmp_path_factory.mktemp("images"), 0
    for split, count in (("train", 7), ("test", 3)):
        for label in range(10):
            folder = root / split / f"class{label}"
            folder.mkdir(parents=True)
            for i in range(count):
                image = np.full((32, 32, 3), 25 * label, np.uint8)
                image[:2, :2] = value
                value += 1
                Image.fromarray(image).save(folder / f"{i}.png")
    return image_task.make_task(root, COUNTS)


def marks(split):
    return set(split.images[:, 0, 0, 0].tolist())


def test_splits_are_balanced_disjoint_and_halved(task):
    for name, count in COUNTS.items():
        split = getattr(task, name)
        assert split.images.shape == (10 * count, 16, 16, 3)
        assert np.bincount(split.labels).tolist() == [count] * 10
        assert np.array_equal(split.images[:, 9, 9, 0], 25 * split.labels)
        assert len(marks(split)) == 10 * count
    assert not marks(task.train) & marks(task.validation)


def test_halved_takes_means_of_four_pixels():
    image = np.arange(16, dtype=np.uint8).reshape(4, 4, 1) * 2
    assert image_task.halved(image)[..., 0].tolist() == [[5, 9], [21, 25]]


def test_the_order_is_whole_epochs_and_does_not_depend_on_how_many_are_needed():
    long, short = image_task.order(7, 20, 3), image_task.order(7, 9, 3)
    assert np.array_equal(long[:9], short)
    assert sorted(long[:7]) == sorted(long[7:14]) == list(range(7))
    assert not np.array_equal(long, image_task.order(7, 20, 4))


def tiny(rngs):
    return RepVGG(3, 10, widths=(8,), blocks=0, block=small_block, rngs=rngs)


small_block = functools.partial(
    network_arms.jt.nnx.RepVGGBlock, norm=functools.partial(nnx.BatchNorm, momentum=0.9)
)


@pytest.fixture(scope="module")
def rows(task):
    arm = image_task.Arm("tiny", tiny, 20, 1200, rates=(0.1, 1e-6), target=0.2, fuse=True)
    saves, rows = [], {}
    networks.measure(
        task,
        {
            "one": arm,
            "two": arm._replace(rates=(), images=100, like=("one", float("nan")), fuse=False),
        },
        rows,
        lambda: saves.append(len(rows)),
        seeds=2,
    )
    assert saves == [1, 2]
    return rows


def test_training_learns_tunes_and_fuses(rows):
    row = rows["one"]
    assert row["rate"] == 0.1
    assert [r["rate"] for r in row["tried"]] == [0.1, 1e-6]
    assert [r["seed"] for r in row["runs"]] == [0, 1]
    for run in row["runs"]:
        assert run["test"] > 0.25 and not run["diverged"]
        assert run["reached"] % image_task.LOOK == 0
        assert run["difference"] < 1e-4 * max(1.0, run["largest"])
    assert row["tried"][1]["loss"] > row["tried"][0]["loss"]


def test_a_run_that_diverges_is_counted(rows):
    row = rows["two"]
    assert np.isnan(row["rate"])
    assert [(run["diverged"], run["loss"]) for run in row["runs"]] == [(True, None)] * 2


def test_the_table_has_the_figures(rows):
    experiment = network_arms.Experiment("tiny", {}, ("A note.",))
    text = str(networks.table(rows, experiment))
    assert "2 of 2" in text and "0 of 2" in text and "A note." in text
    assert networks.spread([r["reached"] for r in rows["one"]["runs"]], 0) in text
    assert "0.1 was the best of 0.1" in text


@pytest.mark.parametrize("name", network_arms.EXPERIMENTS)
def test_every_rate_of_an_experiment_is_given_or_derived(name):
    arms = network_arms.EXPERIMENTS[name]().arms
    for arm in arms.values():
        assert bool(arm.rates) != bool(arm.like)
        assert arm.like is None or arm.like[0] in arms
    # Equal examples, or the comparison would be of budgets.
    assert len({arm.images for arm in arms.values()}) == 1
    assert all(arm.images % arm.batch == 0 for arm in arms.values())


def test_a_split_is_thinned_class_by_class(task):
    counts = (4, 3, 2, 1, 1, 1, 1, 1, 1, 1)
    few = image_task.thinned(task.train, counts)
    assert np.bincount(few.labels).tolist() == list(counts)
    assert marks(few) < marks(task.train)


def test_an_arm_trains_on_its_counts_with_its_loss_and_rates(task):
    seen = []

    def loss(logits, labels):
        seen.append(logits.shape)
        return 0.0 * logits.sum(-1) + 7.0

    def share(step, steps):
        return seen.append((step, steps)) or 1.0

    arm = image_task.Arm("tiny", tiny, 5, 10, counts=(1,) * 10, loss=loss, share=share)
    run = image_task.trainer(task, arm)(0, 0.1)
    assert run["loss"] == 7 and {(5, 10), (0, 2), (1, 2)} <= set(seen)


def test_cycles_are_whole_and_start_at_a_quarter():
    one, two = network_arms.triangles(1), network_arms.triangles(2)
    assert [one(i, 400) for i in (0, 100, 200, 300)] == pytest.approx([0.25, 0.625, 1, 0.625])
    assert [two(i, 400) for i in (0, 100, 200, 300)] == pytest.approx([0.25, 1, 0.25, 1])
    assert network_arms.constant(3, 400) == 1
