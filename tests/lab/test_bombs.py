"""Small files that unpack to gigabytes: they are refused before the memory is taken."""

import io
import json
import struct
import subprocess
import sys
import zipfile
import zlib

import numpy as np
import pytest
from jaxtricks.lab.config import UserError
from jaxtricks.lab.data import UnreadableError, arrays, images
from PIL import Image

GIB = 2**30
BLOCK = 2**26
LIMIT = 500 * 2**20
"""Bytes that the child may grow by: the most of one file in a zip, 256 MiB, and room to work."""

CHILD = """
import json, resource, sys
resource.setrlimit(resource.RLIMIT_AS, (6 * 2**30, 6 * 2**30))
from PIL import features
from jaxtricks.lab import data
from jaxtricks.lab.config import UserError
for warm in sys.argv[1:2]:
    data.check(warm)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
said = []
for path in sys.argv[2:]:
    try:
        report = data.check(path)
        said.append([reason for _, reason in report.unreadable])
    except UserError as error:
        said.append(str(error))
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    said[-1] = [said[-1], grown * 1024]
print(json.dumps(said))
"""


def zeros(nbytes, wbits=-15, front=b""):
    """Compressed zeros after `front`, in a moment: what is flushed in full can be repeated."""
    packer = zlib.compressobj(9, zlib.DEFLATED, wbits)
    start = packer.compress(front) + packer.flush(zlib.Z_FULL_FLUSH)
    middle = packer.compress(bytes(BLOCK)) + packer.flush(zlib.Z_FULL_FLUSH)
    return start + middle * (nbytes // BLOCK) + b"\x03\x00"


def zipped(entries):
    """A zip of {name: (compressed bytes, claimed length)}."""
    body, directory = b"", b""
    for name, (raw, claim) in entries.items():
        fields = struct.pack("<HHHHHIIIHH", 20, 0, 8, 0, 0, 0, len(raw), claim, len(name), 0)
        directory += b"PK\x01\x02\x14\x00" + fields + struct.pack("<HHHII", 0, 0, 0, 0, len(body))
        directory += name.encode()
        body += b"PK\x03\x04" + fields + name.encode() + raw
    end = struct.pack("<HHHHIIH", 0, 0, len(entries), len(entries), len(directory), len(body), 0)
    return body + directory + b"PK\x05\x06" + end


def header(shape, version=1, padding=0):
    text = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}"
    size = (len(text) + padding).to_bytes(2 if version == 1 else 4, "little")
    return b"\x93NUMPY" + bytes([version, 0]) + size + text.encode()


def png(width, height, *chunks):
    def chunk(kind, body):
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    ihdr = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    parts = [(b"IHDR", ihdr), *chunks, (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def tiff(tags, body):
    """A gray TIFF of 8 x 8 pixels, deflated, with more tags; `body` begins at 8."""
    tags = {0x100: 8, 0x101: 8, 0x102: 8, 0x103: 8, 0x106: 1, 0x115: 1, **tags}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, tags[tag]) for tag in sorted(tags))
    directory = struct.pack("<H", len(tags)) + entries + bytes(4)
    return b"II*\0" + struct.pack("<I", 8 + len(body)) + body + directory


def sound():
    """Entries of `zipped` that are images."""
    raw = png(8, 8, (b"IDAT", zlib.compress(bytes(72))))
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    entry = packer.compress(raw) + packer.flush(), len(raw)
    return {f"{c}/{i}.png": entry for c in "ab" for i in range(4)}


def bombs():
    """{file name: (bytes, words of what is said)}."""
    four = zeros(4 * GIB)
    claim, labels = (
        4 * GIB - BLOCK,
        (zeros(0, front=header((6,)) + bytes(6)), len(header((6,))) + 6),
    )
    true = header((claim, 1, 1, 1))
    long = header((6, 8, 8, 3), 2, padding=2**32 - 200)
    idat = zeros(4 * GIB, 15)
    text = b"Comment\0\0" + idat
    profile = b"icc\0\0" + idat
    strip = zlib.compress(bytes(72))
    pictures = {
        "a/tile.tif": tiff({0x142: 60_000, 0x143: 60_000, 0x144: 8, 0x145: len(idat)}, idat),
        "a/strip.tif": tiff({0x111: 8, 0x116: 8, 0x117: len(idat)}, idat),
        "b/rows.tif": tiff({0x111: 8, 0x116: 2**31, 0x117: len(idat)}, idat),
        "b/sound.tif": tiff({0x111: 8, 0x116: 8, 0x117: len(strip)}, strip),
        "a/huge.png": png(60_000, 60_000, (b"IDAT", idat)),
        "b/small.png": png(8, 8, (b"IDAT", idat)),
        "b/text.png": png(8, 8, (b"zTXt", text), (b"IDAT", zlib.compress(bytes(72)))),
        "b/profile.png": png(8, 8, (b"iCCP", profile), (b"IDAT", zlib.compress(bytes(72)))),
    }
    stored = io.BytesIO(zipped(sound()))
    with zipfile.ZipFile(stored, "a") as archive:
        for name, raw in pictures.items():
            archive.writestr(name, raw)
    true = zeros(claim, front=true), claim + len(true)
    return {
        "honest.zip": (zipped({**sound(), "a/x.png": (four, claim)}), "256 MiB"),
        "lying.zip": (zipped({**sound(), "a/x.png": (four, 1000)}), "CRC"),
        "pictures.zip": (stored.getvalue(), "64 megapixels"),
        "honest.npz": (zipped({"images.npy": true, "labels.npy": labels}), "over the limit of 100"),
        "lying.npz": (zipped({"images.npy": (true[0], 2000), "labels.npy": labels}), "CRC"),
        "header.npz": (
            zipped({"images.npy": (zeros(4 * GIB, front=long), claim), "labels.npy": labels}),
            "header",
        ),
    }


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in other units elsewhere")
def test_bombs(tmp_path):
    made = bombs()
    for name, (raw, _) in made.items():
        (tmp_path / name).write_bytes(raw)
        assert len(raw) < 32 * 2**20
    warm = tmp_path / "sound.zip"
    warm.write_bytes(zipped(sound()))
    names = [str(tmp_path / name) for name in made]
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(warm), *names],
        check=True,
        capture_output=True,
        text=True,
    )
    for (name, (_, words)), (said, grown) in zip(
        made.items(), json.loads(done.stdout), strict=True
    ):
        assert words in str(said), (name, said)
        assert grown < LIMIT, (name, grown)


def jpeg(scans, front=b""):
    """A progressive JPEG with more and more passes over its last bits."""
    file = io.BytesIO()
    Image.new("RGB", (64, 64), (3, 4, 5)).save(file, "JPEG", progressive=True)
    raw = file.getvalue()
    last = raw[raw.rfind(b"\xff\xda") : -2]
    more = scans - raw.count(b"\xff\xda")
    return raw[:2] + front + raw[2:-2] + last * more + raw[-2:]


def test_jpegs_of_very_many_scans_are_refused():
    assert images.decode(jpeg(images.MAX_SCANS), "x").shape == (64, 64, 3)
    with pytest.raises(UnreadableError, match="more than 100 scans"):
        images.decode(jpeg(images.MAX_SCANS + 1), "x")
    # What a preview inside of it or a video behind it happens to have is none of its own.
    others = b"\xff\xda" * 1000
    comment = b"\xff\xfe" + (2 + len(others)).to_bytes(2, "big") + others
    assert images.decode(jpeg(20, comment) + others, "x").shape == (64, 64, 3)


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_compression_without_a_limit_is_refused(tmp_path, method):
    with zipfile.ZipFile(tmp_path / "x.npz", "w", method) as archive:
        archive.writestr("images.npy", b"x")
        archive.writestr("labels.npy", b"x")
    with pytest.raises(UserError, match=f"by method {method}.*make the zip by deflate"):
        arrays.npz(tmp_path / "x.npz")


def test_large_arrays_that_are_there_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(arrays, "MAX_PACKED", 10_000)
    noise = np.random.default_rng(0).integers(0, 256, (100, 8, 8, 3), np.uint8)
    labels = np.arange(100) % 2
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "x.npz", images=noise, labels=labels)
        assert len(arrays.npz(tmp_path / "x.npz").names) == 100
    np.savez(tmp_path / "x.npz", images=0 * noise, labels=labels)
    assert len(arrays.npz(tmp_path / "x.npz").names) == 100
    np.savez_compressed(tmp_path / "x.npz", images=0 * noise, labels=labels)
    with pytest.raises(UserError, match="over the limit of 100 times: save it by np.savez"):
        arrays.npz(tmp_path / "x.npz")
