"""List what a compiled program sends between devices: every collective, with its bytes."""

import collections
import re
from typing import Any, NamedTuple

from jaxtricks import _table

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
# One line of HLO: "%name = shape kind(operands), ...". The end of an asynchronous one
# (-done) is no second collective.
_LINE = re.compile(rf"^\s*(?:ROOT )?\S+ = (.+?) ({'|'.join(KINDS)})(-start)?\(")
_ARRAY = re.compile(r"([a-z]+)(\d*)\w*\[([^\]]*)\]")
_ORIGIN = re.compile(r'op_name="([^"]*)"')
# One collective of the TPU's compiler that is sent while others compute has these in
# each of its parts.
_CHAIN = re.compile(r'channel_id=(\d+).*\bchain_id="(\d+)"')
# The TPU's compiler writes a reduce-scatter as a computation of this name, with an
# all-reduce inside: "%all-reduce-scatter.6 (input_0: ...) -> (f32[256,64], f32[64]) {".
_SCATTER = re.compile(r"^%all-reduce-scatter\S* \(.*\) -> (.+) \{$")


class Collective(NamedTuple):
    """One collective instruction.

    Attributes:
      kind: one of `KINDS`.
      bytes: of its result, as one device holds it: of an all-gather the whole, of a
        reduce-scatter the device's part.
      name: where it comes from, as JAX names it ("jit(step)/.../psum"); "" where the
        compiler created it of nothing that has a name.
    """

    kind: str
    bytes: int
    name: str


def census(program: Any) -> tuple[Collective, ...]:
    """Return the collectives of a program, in the order of its text.

    Those inside a loop's body are counted once, however often it runs, and those of all
    branches of a conditional, of which one runs. What the TPU's compiler sends while it
    computes is in its text once for every computation that it overlaps: counted once.

    Args:
      program: what `jax.jit(fn).lower(...).compile()` returns, or its HLO text.

    Returns:
      One `Collective` per instruction.

    Example:
      >>> text = "%r = (f32[4]{0}, bf16[2,3]{1,0}) all-reduce(%a, %b), to_apply=%add"
      >>> census(text)
      (Collective(kind='all-reduce', bytes=28, name=''),)
    """
    text = program if isinstance(program, str) else program.as_text()
    collectives: dict[Any, Collective] = {}
    scattered = None
    for i, line in enumerate(text.splitlines()):
        if line.endswith("{"):  # a computation begins
            header = _SCATTER.match(line)
            scattered = header and header.group(1)
        elif match := _LINE.match(line):
            chain = _CHAIN.search(line)
            collectives.setdefault(
                chain.groups() if chain else i,
                _collective(line, match, scattered),
            )
    return tuple(collectives.values())


def table(collectives: tuple[Collective, ...]) -> _table.Table:
    """Count the collectives of each kind, and their bytes.

    Args:
      collectives: of `census`.

    Example:
      >>> print(table(census("%r = f32[4]{0} all-reduce(%a), to_apply=%add")))
      collective  how many  bytes
      ----------  --------  -----
      all-reduce         1     16
    """
    many, size = collections.Counter(), collections.Counter()
    for collective in collectives:
        many[collective.kind] += 1
        size[collective.kind] += collective.bytes
    rows = [(kind, many[kind], size[kind]) for kind in KINDS if many[kind]]
    return _table.make(("collective", "how many", "bytes"), rows)


def _collective(
    line: str, match: re.Match[str], scattered: str | None
) -> Collective:
    shape, kind, start = match.groups()
    if scattered and kind == "all-reduce":
        shape, kind = scattered, "reduce-scatter"
    shape = re.sub(r"\{[^}]*\}", "", shape)  # layouts have parentheses too
    if start and kind != "all-reduce":  # (operands, results, ...)
        shape = _entries(shape)[1]
    origin = _ORIGIN.search(line)
    return Collective(kind, _bytes(shape), origin.group(1) if origin else "")


def _entries(shape: str) -> list[str]:
    """Split a tuple shape into its parts, nested ones whole."""
    parts, depth = [""], 0
    for letter in shape.strip()[1:-1]:
        depth += {"(": 1, "[": 1, ")": -1, "]": -1}.get(letter, 0)
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def _bytes(shape: str) -> int:
    """Return the bytes of an array shape, or of all in a tuple; "bf16[2,<=3]" bounds its second size."""
    total = 0
    for kind, bits, sizes in _ARRAY.findall(shape):
        entries = 1
        for size in re.findall(r"\d+", sizes):
            entries *= int(size)
        total += entries * (8 if kind == "pred" else int(bits or 0)) // 8
    return total
