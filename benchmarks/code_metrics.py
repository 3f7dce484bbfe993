"""Measure how the code reads: size, density, comments, and how its modules hang together.

`python -m benchmarks.code_metrics` prints one row per room. Density is AST nodes per line of
code; docstrings, comments and blank lines are not code. A module has one importer if a single
other module of the library imports it.
"""

import argparse
import ast
import collections
import io
import pathlib
import re
import tokenize
from typing import NamedTuple

from jaxtricks import _table

PACKAGE = pathlib.Path(__file__).parents[1] / "jaxtricks"
APPLICATION = ("lab", "plot")
BARE_PARTICIPLES = re.compile(r"\b(found|kept|own|given|made|seen)\b")
PRAGMA = re.compile(r"#\s*(noqa|type:|pyrefly|pragma|fmt)")
NOT_CODE = (
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
    tokenize.COMMENT,
)


class Size(NamedTuple):
    """Counts over one or several modules; they add up.

    Attributes:
      modules: number of files.
      lines: all lines.
      code: lines with a token that is neither comment nor docstring.
      comments: comments other than pragmas.
      nodes: nodes of the syntax tree.
      docstrings: lines of docstrings.
      participles: occurrences of the bare participles that are no names.
    """

    modules: int = 0
    lines: int = 0
    code: int = 0
    comments: int = 0
    nodes: int = 0
    docstrings: int = 0
    participles: int = 0

    def plus(self, other: "Size") -> "Size":
        """Add two sizes."""
        return Size(*(a + b for a, b in zip(self, other, strict=True)))


def docstring_lines(tree: ast.AST) -> set[int]:
    """Return the numbers of the lines that belong to docstrings."""
    lines: set[int] = set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            continue
        if ast.get_docstring(node) is not None:
            docstring = node.body[0]
            lines |= set(range(docstring.lineno, docstring.end_lineno + 1))
    return lines


def size_of(source: str) -> Size:
    """Measure one module."""
    tree = ast.parse(source)
    code: set[int] = set()
    comments = 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and not PRAGMA.match(token.string):
            comments += 1
        if token.type not in NOT_CODE:
            code |= set(range(token.start[0], token.end[0] + 1))
    docstrings = docstring_lines(tree)
    return Size(
        modules=1,
        lines=source.count("\n"),
        code=len(code - docstrings),
        comments=comments,
        nodes=sum(1 for _ in ast.walk(tree)),
        docstrings=len(docstrings),
        participles=len(BARE_PARTICIPLES.findall(source)),
    )


def importers(package: pathlib.Path) -> dict[str, set[str]]:
    """Return {module: the modules that import it}, inside the package."""
    paths = {module_name(path, package): path for path in package.rglob("*.py")}
    table: dict[str, set[str]] = collections.defaultdict(set)
    for name, path in paths.items():
        for node in ast.walk(ast.parse(path.read_text())):
            targets: list[str] = []
            if isinstance(node, ast.ImportFrom) and node.module:
                for alias in node.names:
                    inner = f"{node.module}.{alias.name}"
                    targets.append(inner if inner in paths else node.module)
            elif isinstance(node, ast.Import):
                targets = [alias.name for alias in node.names]
            for target in targets:
                if target in paths:
                    table[target].add(name)
    return table


def module_name(path: pathlib.Path, package: pathlib.Path) -> str:
    """Return the dotted name of a file of the package."""
    parts = [package.name, *path.relative_to(package).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(path: pathlib.Path, package: pathlib.Path) -> str:
    """Return the room of a file; the modules of the ground floor are one room."""
    first = path.relative_to(package).parts[0].removesuffix(".py")
    return "ground" if first.startswith("_") else first


def measure(package: pathlib.Path = PACKAGE) -> dict[str, Size]:
    """Return {room: size}."""
    sizes: dict[str, Size] = collections.defaultdict(Size)
    for path in sorted(package.rglob("*.py")):
        room = room_of(path, package)
        sizes[room] = sizes[room].plus(size_of(path.read_text()))
    return dict(sizes)


def single_importers(package: pathlib.Path = PACKAGE) -> list[str]:
    """Return the modules with one importer, the application aside."""
    prefixes = tuple(f"{package.name}.{name}" for name in APPLICATION)
    table = importers(package)
    return sorted(
        name
        for name, users in table.items()
        if len(users) == 1 and not name.startswith(prefixes)
    )


def row(name: str, size: Size) -> tuple[object, ...]:
    """Format one room."""
    code = max(size.code, 1)
    return (
        name,
        size.modules,
        size.lines,
        size.code,
        f"{size.nodes / code:.1f}",
        f"{100 * size.comments / code:.1f} %",
        size.docstrings,
        size.participles,
    )


def table(sizes: dict[str, Size]) -> _table.Table:
    """Tabulate the rooms, with one total for the library and one for the application."""
    totals = {"library": Size(), "application": Size()}
    for room, size in sizes.items():
        kind = "application" if room in APPLICATION else "library"
        totals[kind] = totals[kind].plus(size)
    headers = (
        "room",
        "modules",
        "lines",
        "code",
        "nodes/line",
        "comments",
        "docstrings",
        "participles",
    )
    rows = [row(name, size) for name, size in {**sizes, **totals}.items()]
    single = single_importers()
    return _table.make(
        headers, rows, [f"modules with one importer: {len(single)}"]
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--out", type=pathlib.Path, help="also write Markdown there"
    )
    args = parser.parse_args()
    result = table(measure())
    print(result)
    if args.out:
        args.out.write_text(
            "How the code reads: `python -m benchmarks.code_metrics --out "
            f"{args.out}`\n\n{result.markdown()}\n"
        )


if __name__ == "__main__":
    main()
