"""Format rows as an aligned table; `str()` of the rooms' reports prints it."""

from collections.abc import Sequence
from typing import Any, NamedTuple


class Table(NamedTuple):
    """A table that prints aligned and converts to Markdown.

    Attributes:
      headers: the column names.
      rows: one tuple per row; floats are printed with four significant digits, None as
        "-".
      notes: sentences printed below the table.
    """

    headers: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        cells = [self.headers, *(tuple(map(cell, row)) for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        right = [
            all(_numeric(r[i]) for r in self.rows)
            for i in range(len(self.headers))
        ]
        lines = [_line(row, widths, right) for row in cells]
        lines.insert(1, "  ".join("-" * w for w in widths))
        return "\n".join([*lines, *self.notes])

    def markdown(self) -> str:
        """Format the rows as a Markdown table."""
        lines = [
            self.headers,
            ("---",) * len(self.headers),
            *(map(cell, r) for r in self.rows),
        ]
        body = ["| " + " | ".join(line) + " |" for line in lines]
        return "\n".join([*body, *(f"\n{note}" for note in self.notes)])


def make(
    headers: Sequence[str],
    rows: Sequence[Sequence[Any]],
    notes: Sequence[str] = (),
) -> Table:
    """Build a table from any sequences."""
    return Table(tuple(headers), tuple(map(tuple, rows)), tuple(notes))


def cell(x: Any) -> str:
    """Format one value."""
    if x is None:
        return "-"
    if isinstance(x, float):
        return f"{x:.4g}"
    return printable(str(x))


def printable(text: str) -> str:
    """Escape what a terminal would obey or cannot show, on one line."""
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode()
        for c in text
    )


def format_bytes(n: float) -> str:
    """Format bytes: 12_345_678 -> "11.8 MiB"; integers below 1 KiB stay exact."""
    if abs(n) < 1024:
        return f"{n:.0f} B"
    for unit in ("KiB", "MiB", "GiB"):
        n /= 1024
        if abs(n) < 1024 or unit == "GiB":
            return f"{n:.1f} {unit}"
    raise AssertionError("unreachable")


def _numeric(x: Any) -> bool:
    return x is None or isinstance(x, int | float)


def _line(
    row: Sequence[str], widths: Sequence[int], right: Sequence[bool]
) -> str:
    pairs = zip(row, widths, right, strict=True)
    return "  ".join(
        c.rjust(w) if r else c.ljust(w) for c, w, r in pairs
    ).rstrip()
