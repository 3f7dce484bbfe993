"""Bad bytes: whatever a file holds, the answer is a result or the error that the documentation names."""

import functools
import io
import os
import pathlib
import zipfile

import numpy as np
import pytest
from hypothesis import strategies as st
from jaxtricks.lab import data
from jaxtricks.lab.config import UserError
from jaxtricks.lab.data import arrays, folders, images, records
from PIL import Image

from tests.lab import mangle

TIMES = pytest.mark.parametrize("times", [1, pytest.param(20, marks=pytest.mark.slow)])


def allowed(error):
    """One sentence that any terminal can show."""
    text = str(error)
    assert text.isprintable() and text == text.encode("utf-8", "replace").decode(), repr(text)
    assert text and len(text) < 20_000


# Images.


def encode(picture, kind="PNG", **options):
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


@functools.cache
def pictures():
    """{name: bytes} of small images of every kind, and some that lie."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 12, 3), np.uint8))
    deep = Image.fromarray(np.array([[0, 257, 40000, 65535]], np.uint16))
    frames = [noise, noise.rotate(180)]
    found = {
        "png": encode(noise),
        "gray": encode(noise.convert("L")),
        "palette": encode(noise.convert("P"), transparency=1),
        "alpha": encode(noise.convert("RGBA")),
        "bit": encode(noise.convert("1")),
        "deep": encode(deep),
        "jpeg": encode(noise, "JPEG"),
        "progressive": encode(noise, "JPEG", progressive=True),
        "cmyk": encode(noise.convert("CMYK"), "JPEG"),
        "bmp": encode(noise, "BMP"),
        "gif": encode(noise, "GIF"),
        "animated": encode(noise, "GIF", save_all=True, append_images=frames),
        "webp": encode(noise, "WEBP"),
        "lossless": encode(noise, "WEBP", lossless=True),
        "moving": encode(noise, "WEBP", save_all=True, append_images=frames),
        "tiff": encode(noise, "TIFF"),
        "nothing": b"",
    }
    huge = mangle.put(mangle.put(found["png"], 16, 4, 60_000, "big"), 20, 4, 60_000, "big")
    return found | {"huge": huge, "large": mangle.put(found["png"], 16, 4, 4_000_000, "big")}


damaged_images = st.sampled_from(list(pictures())).flatmap(lambda k: mangle.damaged(pictures()[k]))


@TIMES
def test_images(times):
    def check(raw):
        try:
            out = images.decode(raw, "x")
        except data.UnreadableError as error:
            allowed(error)
        else:
            assert out.dtype == np.uint8 and out.ndim == 3 and out.shape[2] in (1, 3)
            assert 0 < out.shape[0] * out.shape[1] <= images.MAX_PIXELS

    mangle.search(check, 240, times, raw=damaged_images)


# Zips.


@st.composite
def zips(draw):
    file = io.BytesIO()
    methods = st.sampled_from([0, 8, 0, 8, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
    with zipfile.ZipFile(file, "w") as archive:
        for i in range(8):
            name = f"{'ab'[i % 2]}/{i}.png"
            raw, method = pictures()["png"], 8 * (i % 3 == 0)
            if draw(st.integers(0, 9)) == 0:
                name, raw, method = (
                    draw(st.sampled_from(mangle.NAMES)),
                    draw(damaged_images),
                    draw(methods),
                )
            info = zipfile.ZipInfo("x")
            info.filename, info.compress_type = name, method
            archive.writestr(info, raw)
    return draw(mangle.damaged_zip(file.getvalue()))


@TIMES
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_zips(times):
    def check(raw, skip):
        with mangle.watched() as folder:
            path = pathlib.Path(folder, "x.zip")
            path.write_bytes(raw)
            try:
                print(data.check(str(path)))
                data.load(str(path), skip_unreadable=skip).train[0]
            except UserError as error:
                allowed(error)
            assert [p.name for p in pathlib.Path(folder).iterdir()] == ["x.zip"]

    mangle.search(check, 200, times, raw=zips(), skip=st.booleans())


# Arrays.

HEADERS = [
    "{'descr': '|u1', 'fortran_order': False, 'shape': (6, 8, 8, 3), }",
    "{'descr': '|u1', 'fortran_order': True, 'shape': (6, 8, 8, 3), }",
    "{'descr': '|O', 'fortran_order': False, 'shape': (6,), }",
    "{'descr': '|u1', 'fortran_order': False, 'shape': (99999999999, 8, 8, 3), }",
    "{'descr': '|u1', 'fortran_order': False, 'shape': (0, 8, 8, 3), }",
    "{'descr': '|u1', 'fortran_order': False, 'shape': (-6, 8, -8, 3), }",
    "{'descr': '|u1', 'fortran_order': False, 'shape': (), }",
    "{'descr': '|S0', 'fortran_order': False, 'shape': (4611686018427387904,), }",
    "{'descr': '|V0', 'fortran_order': False, 'shape': (4294967296, 4294967296), }",
    "{'descr': '<f8', 'fortran_order': False, 'shape': (True, 144), }",
    "{'descr': [('a', '|u1'), ('b', '|O')], 'fortran_order': False, 'shape': (6,), }",
    "{'descr': '(3,)u1', 'fortran_order': False, 'shape': (6, 8, 8), }",
    "{'descr': ('|u1', (2, 2)), 'fortran_order': False, 'shape': (288,), }",
    "{'descr': 'x', 'fortran_order': 3, 'shape': [6], }",
    "__import__('os').abort()",
    "(" * 3000,
    "-" * 9000 + "1",
    " " * 20_000,
    "",
]
LABELS = "{'descr': '<i8', 'fortran_order': False, 'shape': (6,), }"
PICKLE = b"cos\nsystem\n(S'false'\ntR."


def npy(header, body, version=1, length=None):
    text = header.encode()
    size = len(text) if length is None else length
    return (
        b"\x93NUMPY"
        + bytes([version, 0])
        + size.to_bytes(2 if version == 1 else 4, "little")
        + text
        + body
    )


@st.composite
def npzs(draw):
    body = draw(st.sampled_from([bytes(1152), bytes(1152), PICKLE, b"", bytes(10_000)]))
    header = draw(st.sampled_from([HEADERS[0], *HEADERS]))
    images = npy(
        header, body, *draw(st.sampled_from([(1,), (1,), (2,), (3,), (2, 2**32 - 1), (255,)]))
    )
    labels = npy(
        LABELS, np.array([0, 1, 0, 1, 0, draw(st.sampled_from([1, 1, -1, 2**62]))]).tobytes()
    )
    members = {
        "images.npy": draw(mangle.damaged(images, 1)),
        "labels.npy": draw(mangle.damaged(labels, 1)),
    }
    if draw(st.integers(0, 9)) == 0:
        members[draw(st.sampled_from([*mangle.NAMES, "x_train.npy", "a\nb.npy"]))] = images
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", draw(st.sampled_from([0, 8, 8, zipfile.ZIP_LZMA]))) as archive:
        for name, raw in members.items():
            archive.writestr(name or "x", raw)
    return draw(mangle.damaged_zip(file.getvalue()))


@TIMES
def test_npz(times):
    def check(raw):
        with mangle.watched() as folder:
            path = pathlib.Path(folder, "x.npz")
            path.write_bytes(raw)
            try:
                found = arrays.npz(path)
            except UserError as error:
                allowed(error)
            else:
                assert all(found.read(i)[0].dtype == np.uint8 for i in range(len(found.names)))

    mangle.search(check, 200, times, raw=npzs())


# Records.


def varint(value):
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def field(number, body, kind=2):
    return varint(number << 3 | kind) + (varint(len(body)) if kind == 2 else b"") + body


@st.composite
def protos(draw):
    """A tf.train.Example of an image, most often a sound one."""
    label = draw(st.sampled_from([0, 1, 1, 0, 2**62, 2**63, 2**64 - 1, 2**69, 2**70 - 1, 2**77]))
    kind = draw(st.sampled_from([0, 0, 0, 2, 1, 5, 3, 7]))
    value = field(1, varint(label), kind)
    name = draw(st.sampled_from([b"label"] * 6 + [b"image/class/label", b"\xff", b"", b"a\nb"]))
    entries = field(1, b"image") + field(2, field(1, field(1, draw(damaged_images))))
    entries = field(1, entries) + field(1, field(1, name) + field(2, field(3, value)))
    return draw(mangle.damaged(field(1, entries), 1))


@TIMES
def test_examples_of_protobuf(times):
    def check(raw):
        for read in (records.image, records.label, records.features):
            try:
                found = read(raw)
            except ValueError:
                continue
            if read is records.label:
                assert -(2**63) <= found[1] < 2**63

    mangle.search(check, 120, times, raw=protos())


@TIMES
def test_array_records(times):
    writer = pytest.importorskip("array_record.python.array_record_module").ArrayRecordWriter

    def check(raws, names, damage):
        with mangle.watched() as folder:
            path = pathlib.Path(folder, "x.array_record")
            file = writer(str(path), "group_size:1")
            for raw in raws:
                file.write(raw)
            file.close()
            path.write_bytes(damage(path.read_bytes()))
            if names is not None:
                (path.parent / "label.labels.txt").write_bytes(names)
            try:
                print(data.check(str(path)))
            except UserError as error:
                allowed(error)

    names = st.sampled_from([None, None, b"a\nb", b"\xff\xfe\x00", b"\x1b[2Ja\nb", b""])
    injured = st.randoms(use_true_random=False).map(lambda r: functools.partial(_injured, r))
    damage = st.one_of(st.just(lambda raw: raw), injured)
    mangle.search(
        check,
        40,
        times,
        raws=st.lists(protos(), min_size=1, max_size=8),
        names=names,
        damage=damage,
    )


def _injured(random, raw):
    """Bits flipped, or cut off; at random, for the length is known only here."""
    at = random.randrange(len(raw))
    if random.random() < 0.3:
        return raw[:at]
    return raw[:at] + bytes([raw[at] ^ 1 << random.randrange(8)]) + raw[at + 1 :]


# Folders and text.


@TIMES
def test_folders(times):
    names = [n.encode() for n in mangle.NAMES if "\0" not in n and ".." not in n and len(n) < 200]
    names += [
        b"\xff/x.png",
        b"cat/\xff.png",
        b"\xed\xa0\x80/x.png",
        b"n.labels.txt",
        b"y.array_record",
    ]
    names += [b"x.array_record-00000-of-99999999999999", b"x.array_record-7-of-3"]

    def check(chosen, raw):
        with mangle.watched() as folder:
            for name in chosen:
                path = pathlib.Path(folder, os.fsdecode(name.strip(b"/")))
                if not any(p.is_file() for p in path.parents) and not path.exists():
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(raw)
            try:
                str(data.check(folder)).encode()
            except UserError as error:
                allowed(error)

    chosen = st.lists(st.sampled_from(names), min_size=1, max_size=6, unique=True)
    mangle.search(check, 60, times, chosen=chosen, raw=damaged_images)


@TIMES
def test_text(times):
    valid = ("héllo wörld \U0001f600\n" * 20).encode()

    def check(raw):
        with mangle.watched() as folder:
            path = pathlib.Path(folder, "x.txt")
            path.write_bytes(raw)
            try:
                print(data.check(str(path), context=8))
            except UserError as error:
                allowed(error)

    mangle.search(check, 40, times, raw=st.one_of(mangle.damaged(valid), st.binary(max_size=200)))


def test_the_watch_sees_what_it_is_for(tmp_path):
    import pickle

    with pytest.raises(AssertionError, match=r"find_class"), mangle.watched():
        pickle.loads(pickle.dumps(folders.stored))
    with pytest.raises(AssertionError, match="open"), mangle.watched():
        (tmp_path / "x").write_text("")
