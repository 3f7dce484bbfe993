"""Bytes and JSON that are almost right: strategies for test_fuzz.py, and the watch that they run under."""

import contextlib
import copy
import json
import os
import struct
import sys
import tempfile

import hypothesis
from hypothesis import strategies as st

EXTREMES = {
    size: sorted({0, 1, 2, 0x14, *(2**b + d for b in (7, 8, 15, 16, 31, 32, 62, 63, 64)
                                   for d in (-1, 0) if 2**b + d < 256**size)})
    for size in (1, 2, 4, 8)
}  # fmt: skip
NAMES = [
    "cat/0.png",
    "train/cat/0.jpg",
    "../../x.png",
    "cat/../../../x.png",
    "/abs/x.png",
    "C:\\x.png",
    "..\\x.png",
    "cat\\dog\\x.png",
    "a\0b/x.png",
    "cat/a\nb\x1b[2J.png",
    "cat/\u202egnp.png",
    "\u00e9t\u00e9/\U0001f600.png",
    "x" * 5000 + "/x.png",
    "9" * 5000 + "/x.png",
    "//.//x.png",
    "cat/",
    "",
    ".",
    "cat/x.png/",
]


def search(check, count, times=1, **strategies):
    """Run check on `count` inputs, always the same; or on `times` as many random ones, if that is over 1."""
    settings = hypothesis.settings(
        max_examples=count * times,
        derandomize=times == 1,
        database=None,
        deadline=None,
        print_blob=True,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    settings(hypothesis.given(**strategies)(check))()


# Bytes.


@st.composite
def damaged(draw, raw, most=3):
    """The bytes with up to `most` injuries: cut off, bits flipped, bytes put in, taken out or at extremes."""
    for _ in range(draw(st.integers(0, most))):
        at = draw(st.integers(0, max(0, len(raw) - 1)))
        kind = draw(st.sampled_from(["cut", "flip", "put", "take", "set"]))
        if kind == "cut":
            raw = raw[:at]
        elif kind == "flip":
            raw = (
                raw[:at]
                + bytes(b ^ draw(st.integers(1, 255)) for b in raw[at : at + 1])
                + raw[at + 1 :]
            )
        elif kind == "put":
            raw = raw[:at] + draw(st.binary(min_size=1, max_size=12)) + raw[at:]
        elif kind == "take":
            raw = raw[:at] + raw[at + draw(st.integers(1, 40)) :]
        else:
            raw = put(raw, at, *draw(extreme(draw(st.sampled_from(list(EXTREMES))))))
    return raw


def extreme(size):
    """(size, value, byte order) of a number of `size` bytes that is likely to be at a border."""
    return st.tuples(
        st.just(size), st.sampled_from(EXTREMES[size]), st.sampled_from(["little", "big"])
    )


def put(raw, at, size, value, order="little"):
    """The bytes with a number written over those at a place."""
    return raw[:at] + value.to_bytes(size, order) + raw[at + size :]


_RECORDS = {  # (offset, size) of the fields of a zip's records
    b"PK\x03\x04": [(4, 2), (6, 2), (8, 2), (14, 4), (18, 4), (22, 4), (26, 2), (28, 2)],
    b"PK\x01\x02": [(6, 2), (8, 2), (10, 2), (16, 4), (20, 4), (24, 4), (28, 2), (30, 2), (32, 2)]
    + [(34, 2), (42, 4)],
    b"PK\x05\x06": [(4, 2), (6, 2), (8, 2), (10, 2), (12, 4), (16, 4), (20, 2)],
}


@st.composite
def damaged_zip(draw, raw, most=2):
    """A zip with up to `most` fields of its headers at extremes, maybe of zip64, and maybe injuries."""
    fields = [
        (at + offset, size)
        for magic, parts in _RECORDS.items()
        for at in _places(raw, magic)
        for offset, size in parts
    ]
    for _ in range(draw(st.integers(0, most)) if fields else 0):
        at, size = draw(st.sampled_from(fields))
        raw = put(raw, at, *draw(extreme(size))[:2])
    if draw(st.integers(0, 9)) == 0:
        raw = _as_zip64(raw, draw)
    return draw(damaged(raw)) if draw(st.booleans()) else raw


def _as_zip64(raw, draw):
    """With a zip64 end of directory and its locator in front of the end."""
    at = raw.rfind(b"PK\x05\x06")
    if at < 0:
        return raw
    numbers = [draw(st.sampled_from(EXTREMES[8])) for _ in range(4)]
    end = b"PK\x06\x06" + struct.pack("<QHHII4Q", 44, 45, 45, 0, 0, *numbers)
    locator = b"PK\x06\x07" + struct.pack(
        "<IQI", draw(st.sampled_from([0, 1])), draw(st.sampled_from([at, 0, 2**64 - 1])),
        draw(st.sampled_from([0, 1, 2])),
    )  # fmt: skip
    return raw[:at] + end + locator + raw[at:]


def _places(raw, magic):
    at = raw.find(magic)
    while at >= 0:
        yield at
        at = raw.find(magic, at + 1)


# JSON.

STRANGE = [
    None, True, False, 0, -1, 1, 2**31, 2**63, 10**400, 0.5, -1e308, float("nan"), float("inf"), "", "x", "1",
    "a\nb", "\x1b[2J", "\ud800", "'", "../../x", "x" * 3000, [], [[]], [None], ["x"], {}, {"x": 1}, [1, "x"],
]  # fmt: skip


def paths(value, here=()):
    """The places inside a JSON value."""
    yield here
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for key, x in items:
        yield from paths(x, (*here, key))


@st.composite
def strange_json(draw, value, most=3):
    """Text of the JSON value with up to `most` places changed to something else, gone, or nested deeply."""
    value = json.loads(json.dumps(value))
    for _ in range(draw(st.integers(1, most))):
        places = [path for path in paths(value) if path]
        if not places:
            break
        *way, last = draw(st.sampled_from(places))
        parent = value
        for key in way:
            parent = parent[key]
        kind = draw(st.sampled_from(["set", "set", "set", "gone", "deep"]))
        if kind == "gone":
            del parent[last]
        else:
            parent[last] = (
                copy.deepcopy(draw(st.sampled_from(STRANGE))) if kind == "set" else "DEEP"
            )
    n = draw(st.sampled_from([90, 400, 950, 5000, 100_000]))
    return json.dumps(value).replace('"DEEP"', "[" * n + "]" * n)


def damaged_json(value):
    """Bytes of a JSON file with changed values or injuries."""
    raw = json.dumps(value).encode()
    return st.one_of(strange_json(value).map(str.encode), damaged(raw), st.just(raw))


# The watch.

_WRITING = {
    "os.mkdir",
    "os.rename",
    "os.remove",
    "os.rmdir",
    "os.symlink",
    "os.link",
    "os.truncate",
}
_NEVER = {"pickle.find_class", "os.system", "os.exec", "subprocess.Popen", "socket.connect"}


class _Watch:
    folder, seen = None, None

    def __call__(self, event, args):
        if self.folder is None or not (event in _NEVER | _WRITING or event == "open"):
            return
        if event == "open" and not (args[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return
        given = args[: 2 if event == "os.rename" else 1]
        paths = [os.fsdecode(x) for x in given if isinstance(x, str | bytes | os.PathLike)]
        if event in _NEVER or any(map(self._outside, paths)):
            self.seen.append((event, paths))

    def _outside(self, path):
        # Modules are compiled on their first import.
        return not os.path.realpath(path).startswith(self.folder) and "__pycache__" not in path


_watch = _Watch()
sys.addaudithook(_watch)


@contextlib.contextmanager
def watched():
    """A new folder; nothing may be written outside of it, unpickled, run or sent while it is open."""
    with tempfile.TemporaryDirectory() as folder:
        _watch.seen = seen = []
        _watch.folder = os.path.realpath(folder)
        try:
            yield os.path.realpath(folder)
        finally:
            _watch.folder = None
        assert not seen, seen
