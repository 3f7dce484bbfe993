"""ArrayRecord files as data: what is read, and what is refused."""

import io
import struct
import sys
import threading

import numpy as np
import pytest
from jaxtricks.lab import data
from jaxtricks.lab.config import UserError
from jaxtricks.lab.data import records
from PIL import Image

writer = pytest.importorskip("array_record.python.array_record_module").ArrayRecordWriter


def varint(value):
    value, out = value % 2**64, bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def field(number, body):
    return varint(number << 3 | 2) + varint(len(body)) + body


def strings(*values):
    return field(1, b"".join(field(1, v) for v in values))


def integers(*values, packed=True):
    if packed:
        return field(3, field(1, b"".join(map(varint, values))))
    return field(3, b"".join(varint(1 << 3) + varint(v) for v in values))


def example(**features):
    """A tf.train.Example; "__" in names stands for "/"."""
    entries = [
        field(1, field(1, name.replace("__", "/").encode()) + field(2, feature))
        for name, feature in features.items()
    ]
    return field(1, b"".join(entries))


RNG = np.random.default_rng(0)


def png(value=None, size=(8, 8)):
    pixels = RNG.integers(0, 256, (*size, 3), np.uint8)
    if value is not None:
        pixels[:] = value
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def image_records(n=20, classes=2):
    return [example(image=strings(png(i)), label=integers(i % classes)) for i in range(n)]


def write(path, raws):
    path.parent.mkdir(exist_ok=True)
    file = writer(str(path), "group_size:1")
    for raw in raws:
        file.write(raw)
    file.close()
    return str(path)


def refused(name, *words):
    with pytest.raises(UserError) as error:
        data.load(str(name))
    text = str(error.value)
    assert "\n" not in text and all(word in text for word in words), text


# The wire format.


@pytest.mark.parametrize("packed", [True, False])
def test_integers_packed_or_not(packed):
    values = [0, 1, 127, 128, 300, -1, 2**63 - 1, -(2**63)]
    raw = example(other=strings(b"x"), label=integers(*values, packed=packed))
    assert records.integers(records.features(raw)["label"]) == values


def test_what_protobuf_writes_is_read():
    made = records._example_class()()
    feature = made.features.feature
    feature["image"].bytes_list.value.append(b"abc" * 1000)
    feature["label"].int64_list.value.append(300)
    feature["many"].int64_list.value.extend([0, -1, 2**62, -(2**63)])
    feature["score"].float_list.value.extend([0.5, 1.5])
    feature["name"].bytes_list.value.extend([b"", b"x"])
    raw = made.SerializeToString()
    found = records.features(raw)
    assert set(found) == {"image", "label", "many", "score", "name"}
    assert records.image(raw) == b"abc" * 1000 and records.label(raw) == ("label", 300)
    assert records.integers(found["many"]) == [0, -1, 2**62, -(2**63)]
    assert records.strings(found["name"]) == [b"", b"x"]
    assert records.strings(found["score"]) == records.integers(found["score"]) == []
    # And what these tests write is what protobuf reads.
    made = records._example_class().FromString(
        example(image=strings(b"abc"), label=integers(-7, 8))
    )
    assert list(made.features.feature["label"].int64_list.value) == [-7, 8]
    assert list(made.features.feature["image"].bytes_list.value) == [b"abc"]


def test_unknown_fields_are_passed_over():
    known = example(image=strings(b"abc"), label=integers(3))
    extra = varint(9 << 3) + varint(5) + varint(10 << 3 | 1) + bytes(8) + varint(11 << 3 | 5)
    raw = extra + bytes(4) + field(12, b"xyz") + known
    assert records.image(raw) == b"abc" and records.label(raw) == ("label", 3)
    assert records.strings(records.features(known)["label"]) == []
    assert records.integers(records.features(known)["image"]) == []


def test_every_cut_is_noticed_or_empty():
    raw = example(image=strings(b"abc"), label=integers(3))
    for end in range(1, len(raw)):
        with pytest.raises(ValueError, match="can't be decoded"):
            records.label(raw[:end])
    with pytest.raises(ValueError, match="no features"):
        records.label(b"")
    with pytest.raises(ValueError, match="can't be decoded"):
        records.features(b"\xff" * 12)
    with pytest.raises(ValueError, match="can't be decoded"):
        records.features(struct.pack("B", 1 << 3 | 3))


# Files and folders.


def test_one_file_is_split_like_a_folder(tmp_path):
    d = data.load(write(tmp_path / "own.array_record", image_records()))
    assert (len(d.train), len(d.test), d.validation) == (16, 4, None)
    assert d.shape == (8, 8, 3) and d.classes == ("0", "1") and d.counts.tolist() == [8, 8]
    for x in d.train:
        assert int(x["image"][0, 0, 0]) % 2 == int(x["label"])
    assert (
        d.train.bytes_read == sum(len(r) for r in image_records(16))
        and d.train[0]["label"].dtype == np.int32
    )
    assert any("read once" in note for note in d.notes)


@pytest.mark.parametrize(
    "names",
    [
        ("set-train.array_record-{:05d}-of-00002", "set-test.array_record-00000-of-00001"),
        ("train-{:05d}-of-00002.arrayrecord", "test.arrayrecord"),
    ],
)
def test_shards_and_splits_by_name(tmp_path, names):
    raws = image_records(12)
    for k in range(2):
        write(tmp_path / names[0].format(k), raws[4 * k : 4 * k + 4])
    write(tmp_path / names[1], raws[8:])
    (tmp_path / "label.labels.txt").write_text("cat\ndog\n")
    d = data.load(str(tmp_path))
    assert [int(x["image"][0, 0, 0]) for x in d.train] == list(range(8))
    assert [int(x["image"][0, 0, 0]) for x in d.test] == list(range(8, 12))
    assert d.classes == ("cat", "dog")


def test_labels_of_imagenet_are_from_one(tmp_path):
    raws = [
        example(image__encoded=strings(png(i)), image__class__label=integers(i % 2 + 1))
        for i in range(10)
    ]
    d = data.load(write(tmp_path / "x.array_record", raws))
    assert d.counts.tolist() == [4, 4] and any("from 1" in note for note in d.notes)
    # Under the name of TFDS they would be a mistake.
    raws = [example(image=strings(png()), label=integers(i % 2 + 1)) for i in range(10)]
    refused(write(tmp_path / "y.array_record", raws), "labels of", "must be 0 to 1")


def test_threads_read_the_same(tmp_path):
    d = data.load(write(tmp_path / "x.array_record", image_records(40)))
    expected, wrong = [x["image"].tobytes() for x in d.train], []

    def read():
        for i in range(len(d.train)):
            if d.train[i]["image"].tobytes() != expected[i]:
                wrong.append(i)

    threads = [threading.Thread(target=read) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    batches = [
        data.pipeline(d.train, batch=8, seed=0, transform=lambda ds: ds, readers=r) for r in (0, 2)
    ]
    for _ in range(5):
        a, b = map(next, batches)
        np.testing.assert_array_equal(a["image"], b["image"])


# What is refused.


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (b"no example", ("record 3", "not a tf.train.Example", "write an image file")),
        (example(image=strings(b"x")), ("record 3", "'image'", "an integer neither in 'label'")),
        (example(pixels=strings(b"x"), label=integers(1)), ("'label', 'pixels'", "an image file")),
        (example(image=strings(b"x"), label=integers(1, 2)), ("2 integers in 'label'",)),
        (example(image=strings(b"x"), label=strings(b"cat")), ("0 integers in 'label'",)),
        (example(image=strings(b"x"), label=integers(1)), ("record 3", "can't be read", "no JPEG")),
        (example(image=strings(), label=integers(1)), ("record 3", "0 strings in 'image'")),
        (example(image=strings(png()), label=integers(7)), ("must be 0 to 2", "7 occurs")),
    ],
)
def test_records_that_cannot_be_meant(tmp_path, bad, words):
    raws = image_records()
    raws[3] = bad
    refused(write(tmp_path / "x.array_record", raws), *words)


def test_broken_and_empty_files(tmp_path):
    path = tmp_path / "x.array_record"
    write(path, [])
    refused(path, "holds no records")
    path.write_bytes(b"garbage")
    refused(path, "broken ArrayRecord", "fetch it again")
    write(path, image_records())
    raw = path.read_bytes()
    path.write_bytes(raw[: len(raw) // 2])
    refused(path, "broken ArrayRecord", "cut off")


def test_a_shard_that_is_not_there(tmp_path):
    for k in (0, 2):
        write(tmp_path / f"x-train.array_record-{k:05d}-of-00003", image_records(6))
    refused(tmp_path, "2 of the 3 shards", "number 1")


def test_names_with_and_without_a_split(tmp_path):
    write(tmp_path / "x-test.array_record", image_records(6))
    write(tmp_path / "x.array_record", image_records(6))
    refused(tmp_path, "x.array_record", "no split in its name")


def test_without_the_library(tmp_path, monkeypatch):
    path = write(tmp_path / "x.array_record", image_records(6))
    monkeypatch.setitem(sys.modules, "array_record.python.array_record_data_source", None)
    refused(path, "array_record is not installed", "pip install array_record")


def test_unreadable_images_can_be_skipped(tmp_path):
    raws = image_records()
    raws[3] = example(image=strings(b"no image"), label=integers(1))
    path = write(tmp_path / "x.array_record", raws)
    d = data.load(path, skip_unreadable=True)
    assert len(d.train) + len(d.test) == 19 and any("record 3" in note for note in d.notes)
    report = data.check(path)
    assert [name for name, _ in report.unreadable] == [f"record 3 of {path} (train)"]
