"""The lab's pipeline: its order, exact resumption at every position, reads in place, meshes."""

import io
import itertools
import struct
import threading
import zipfile

import grain
import jax
import jaxtricks as jt
import numpy as np
import pytest
from jaxtricks.lab import config, data
from jaxtricks.lab.config import Parallel
from jaxtricks.lab.data import folders
from jaxtricks.lab.data.dataset import Source, UnreadableError, shuffled
from jaxtricks.lab.data.pipeline import _AHEAD, _largest_divisor
from jaxtricks.lab.distributed import Placement
from jaxtricks.lab.trainer import Feed, Reads
from PIL import Image

# The order.


@pytest.mark.parametrize("length", [1, 2, 3, 5, 17, 23, 257, 1437, 65_536, 65_538])
def test_the_order_is_grains(length):
    order = shuffled(length, 7)
    theirs = grain.MapDataset.range(length).shuffle(seed=7).repeat()
    positions = range(3 * length) if length < 2000 else range(length - 500, length + 500)
    assert [order(i) for i in positions] == [theirs[i] for i in positions]


def test_no_example_is_lost_where_grains_shuffle_loses_one():
    length = 65_537
    order = shuffled(length, 3)
    first = np.array([order(i) for i in range(length)])
    np.testing.assert_array_equal(np.sort(first), np.arange(length))
    second = [order(i) for i in range(length, length + 1000)]
    assert np.mean(first[:1000] == second) < 0.01


def test_what_falls_on_the_padding_goes_where_the_padding_went():
    length = 65_537
    order = shuffled(length, 0)

    def shuffle(i):
        return grain.experimental.index_shuffle(i, max_index=length, seed=0, rounds=4)

    [end] = [i for i in range(length) if shuffle(i) == length]
    assert order(end) == shuffle(length) < length


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_seeds_out_of_range(seed):
    with pytest.raises(ValueError, match="seed is"):
        shuffled(10, seed)
    assert 0 <= shuffled(10, 2**32 - 1)(25) < 10


# States.


def test_an_element_is_tried_again_after_an_error():
    broken = {3}

    def read(i):
        if i in broken:
            raise UnreadableError(f"image {i}", "the disk is away")
        return {"image": np.full((2, 2, 1), i, np.uint8), "label": np.int32(i)}, 4

    source = Source(read, 10, np.arange(10, dtype=np.int32))
    batches = data.pipeline(source, batch=2, seed=0, order=lambda i: i % 10)
    assert next(batches)["label"].tolist() == [0, 1]
    with pytest.raises(UnreadableError, match="away"):
        next(batches)
    broken.clear()
    assert next(batches)["label"].tolist() == [2, 3]


def numbered(n=150):
    def read(i):
        return {"image": np.full((2, 2, 1), i, np.uint8), "label": np.int32(i)}, 4

    return Source(read, n, np.arange(n, dtype=np.int32))


TRANSFORMS = {
    "plain": None,
    "echo2": lambda ds: jt.echo.echo(ds, 2, batch_size=6),
    "echo1.5": lambda ds: jt.echo.echo(ds, 1.5, batch_size=6),
}


@pytest.mark.parametrize("to_device", [None, lambda b: b], ids=["host", "thread"])
@pytest.mark.parametrize("readers", [0, 2])
@pytest.mark.parametrize(
    ("transform", "batch"),
    # With threads: blocks that are batches, blocks of one, two blocks a batch.
    [("plain", 6), ("plain", 11), ("plain", 16), ("echo2", 6), ("echo1.5", 6)],
)
def test_every_position_is_one_to_go_on_from(transform, readers, to_device, batch):
    def start():
        return data.pipeline(
            numbered(),
            batch=batch,
            seed=3,
            transform=TRANSFORMS[transform],
            to_device=to_device,
            readers=readers,
        )

    straight, states, labels = start(), [], []
    for _ in range(14):
        states.append(straight.get_state())
        labels.append(next(straight)["label"].tolist())
    assert labels[0] != labels[1]
    for k, state in enumerate(states):
        resumed = start()
        resumed.set_state(state)
        rest = [next(resumed)["label"].tolist() for _ in labels[k:]]
        assert rest == labels[k:], k
        resumed.close()


@pytest.mark.parametrize("readers", [0, 3])
@pytest.mark.parametrize("batch", [4, 7, 24])
def test_blocks_hold_what_single_examples_would(readers, batch):
    options = {"batch": batch, "seed": 5, "readers": readers}
    whole = data.pipeline(numbered(), transform=None, **options)
    single = data.pipeline(numbered(), transform=lambda ds: ds.map(lambda e: e), **options)
    theirs = grain.MapDataset.range(150).shuffle(seed=5).repeat()
    for k in range(10):
        ours, other = next(whole), next(single)
        expected = [theirs[i] for i in range(k * batch, (k + 1) * batch)]
        assert ours["label"].tolist() == other["label"].tolist() == expected
        assert ours["image"].shape == (batch, 2, 2, 1) and ours["image"].dtype == np.uint8
        assert ours["label"].dtype == other["label"].dtype == np.int32
        np.testing.assert_array_equal(ours["image"][:, 0, 0, 0], expected)


def test_blocks_divide_the_batch():
    found = {n: _largest_divisor(n, 8) for n in (1, 6, 8, 12, 17, 256, 250)}
    assert found == {1: 1, 6: 6, 8: 8, 12: 6, 17: 1, 256: 8, 250: 5}


def test_threads_read_a_bounded_number_ahead():
    source = numbered()
    batches = data.pipeline(source, batch=16, seed=0, transform=None, readers=2)
    for _ in range(50):
        next(batches)
    batches.close()
    assert 50 * 16 <= source.bytes_read / 4 <= 50 * 16 + 2 * _AHEAD


def test_text_is_stacked_too():
    d = data.load("topics", context=16)
    batch = next(data.pipeline(d.train, batch=5, seed=0, transform=None))
    assert batch["text"].shape == (5, 17) and batch["text"].dtype == np.int32


@pytest.mark.devices
def test_batches_are_spread_over_a_mesh_and_the_state_is_the_consumers():
    placement = Placement.of(Parallel(mesh="data=8"))

    def start(to_device):
        return data.pipeline(
            numbered(), batch=16, seed=1, transform=TRANSFORMS["echo2"], to_device=to_device
        )

    sharded, host = start(lambda b: jax.device_put(b, placement.batch)), start(None)
    for _ in range(5):
        ours, expected = next(sharded), next(host)
        assert ours["image"].sharding == placement.batch
        shards = ours["image"].addressable_shards
        assert len({s.device for s in shards}) == 8
        assert {s.data.shape for s in shards} == {(2, 2, 2, 1)}
        np.testing.assert_array_equal(ours["image"], expected["image"])
        # The thread is two batches ahead, and its state is not.
        assert sharded.get_state() == host.get_state()
    resumed = start(lambda b: jax.device_put(b, placement.batch))
    resumed.set_state(sharded.get_state())
    np.testing.assert_array_equal(next(resumed)["label"], next(host)["label"])


# Zips.


class Stream(io.BytesIO):
    """A file that can't be sought in: sizes and checksums come after the bytes of an entry."""

    def seekable(self):
        return False

    def seek(self, *_):
        raise OSError("not seekable")


def make_zip(path, kind):
    """A zip of stored entries that has what zips may have; its contents."""
    rng = np.random.default_rng(0)
    files = {f"cat/{i}.jpg": rng.bytes(20_000 + i) for i in range(3)} | {
        "dog/äöü.jpg": rng.bytes(700)
    }
    files |= {"dog/none.jpg": b""}
    target = Stream() if kind == "streamed" else io.BytesIO()
    with zipfile.ZipFile(target, "w") as archive:
        for name, raw in files.items():
            entry = zipfile.ZipInfo(name)
            if kind.startswith("extra"):
                n = int(kind[5:])
                entry.extra = struct.pack("<HH", 0x7777, n) + bytes(n)
            with archive.open(entry, "w", force_zip64=kind == "zip64") as file:
                file.write(raw)
    before = b"#!/bin/sh\n" if kind == "preamble" else b""
    path.write_bytes(before + target.getvalue())
    return files


KINDS = ["plain", "extra8", "extra500", "zip64", "streamed", "preamble"]


@pytest.mark.parametrize("kind", KINDS)
def test_stored_entries_are_read(tmp_path, kind):
    files = make_zip(tmp_path / "x.zip", kind)
    tree = folders.open_zip(tmp_path / "x.zip")
    assert {name: tree.read(name) for name in tree.images.values()} == files


def test_deflated_entries_are_read(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("cat/0.jpg", b"a" * 1000)
    assert folders.open_zip(tmp_path / "x.zip").read("cat/0.jpg") == b"a" * 1000


@pytest.mark.parametrize(
    ("at", "words"),
    [(0, "Bad magic"), (31, "File name in directory"), (200, "Bad CRC-32"), (None, "too early")],
)
def test_a_stored_entry_that_changed_is_unreadable(tmp_path, at, words):
    path = tmp_path / "x.zip"
    files = make_zip(path, "plain")
    tree = folders.open_zip(path)
    last = "cat/2.jpg"
    assert tree.read(last) == files[last]
    raw = bytearray(path.read_bytes())
    start = raw.index(b"cat/2.jpg") - 30
    with path.open("r+b") as file:  # in place, as a copy over the file does it
        if at is None:
            file.truncate(start + 300)
        else:
            file.seek(start + at)
            file.write(bytes([raw[start + at] ^ 0x01]))
    with pytest.raises(UnreadableError, match=rf"cat/2.jpg can't be read \(.*{words}"):
        tree.read(last)
    assert tree.read("cat/0.jpg") == files["cat/0.jpg"]
    with path.open("r+b") as file:
        file.truncate(start + 10)  # not even a header
    with pytest.raises(UnreadableError, match="cat/2.jpg can't be read .(Truncated|it ends)"):
        tree.read(last)


def test_threads_read_entries_at_once(tmp_path):
    files = make_zip(tmp_path / "x.zip", "extra500")
    tree, wrong = folders.open_zip(tmp_path / "x.zip"), []

    def read():
        for _, (name, raw) in itertools.product(range(50), files.items()):
            if tree.read(name) != raw:
                wrong.append(name)

    threads = [threading.Thread(target=read) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_zip_and_its_folder_give_the_same_batches(tmp_path):
    rng = np.random.default_rng(0)
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for name in (f"{c}/{i}.jpg" for c in ("cat", "dog") for i in range(12)):
            file = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(file, "JPEG")
            archive.writestr(name, file.getvalue())
        archive.extractall(tmp_path / "x")
    loaded = [data.load(str(tmp_path / name)) for name in ("x.zip", "x")]
    ours, theirs = (
        data.pipeline(d.train, batch=8, seed=0, transform=None, readers=r)
        for d, r in zip(loaded, (0, 2), strict=True)
    )
    for _ in range(6):
        a, b = next(ours), next(theirs)
        np.testing.assert_array_equal(a["image"], b["image"])
        np.testing.assert_array_equal(a["label"], b["label"])


@pytest.mark.parametrize("first", [0, 48])
@pytest.mark.parametrize(
    "parts", [[range(8)], [range(4), range(4, 8)], [(0, 1, 6, 7), (2, 3, 4, 5)]]
)
def test_hosts_read_their_rows_of_one_stream(parts, first):
    order = shuffled(100, 3)
    wanted = np.reshape([order(first + i) for i in range(80)], (10, 8))
    for rows in parts:  # one host each
        reads = Reads(order, list(rows), 8)
        reads.begin_at(first)
        mine = [reads(i) for i in range(10 * len(rows))]
        np.testing.assert_array_equal(np.reshape(mine, (10, -1)), wanted[:, list(rows)])
        assert reads.read == first + 80  # where another number of hosts would go on


def test_a_feed_goes_on_under_other_hosts(tmp_path):
    cfg = config.Train(data="digits", batch=16)
    digits, place = data.load("digits"), Placement.of(Parallel())
    whole = Feed(cfg, digits, place)
    batches = [np.asarray(next(whole)["image"]) for _ in range(6)]
    before = Feed(cfg, digits, place)
    for _ in range(4):
        next(before)
    # As two hosts that read eight rows each would have left it behind.
    states = [{**before.get_state(), "rows": [8 * i, 8]} for i in range(2)]
    after = Feed(cfg, digits, place)
    said = after.resume(4, states, [after.rows])
    assert said.startswith("2 hosts read before, 1 now: reading goes on exactly where it was")
    for batch in batches[4:]:
        np.testing.assert_array_equal(next(after)["image"], batch)
    # And on under the same hosts.
    state = after.get_state()
    again = Feed(cfg, digits, place)
    assert not again.resume(6, [state], [again.rows]) and state["first"] == 64
    np.testing.assert_array_equal(next(again)["image"], next(after)["image"])
