"""The parts of README.md that commands write; `python -m benchmarks.readme RUN` writes an ablation's."""

import argparse
import json
import pathlib
import re

from jaxtricks.lab.commands import ablate

README = pathlib.Path(__file__).parents[1] / "README.md"


def markers(name: str) -> tuple[str, str]:
    """What stands before and after a part."""
    return f"<!-- {name}: begin -->", f"<!-- {name}: end -->"


def part(name: str, path: pathlib.Path = README) -> str:
    """The text of a part.

    Raises:
      ValueError: the file does not have it exactly once.
    """
    begin, end = map(re.escape, markers(name))
    found = re.findall(
        f"{begin}\n(.*?)\n{end}", path.read_text(), flags=re.DOTALL
    )
    if len(found) != 1:
        raise ValueError(
            f"{path.name} has {len(found)} parts {name!r}: it needs one"
        )
    return found[0]


def replace(name: str, text: str, path: pathlib.Path = README) -> None:
    """Write the text of a part; errors as `part`."""
    begin, end = markers(name)
    old, new = (
        f"{begin}\n{body}\n{end}" for body in (part(name, path), text.strip())
    )
    path.write_text(path.read_text().replace(old, new))


def main() -> None:
    """Write the table of `jaxtricks ablate`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.readme")
    parser.add_argument(
        "run", type=pathlib.Path, help="run directory of `jaxtricks ablate`"
    )
    parser.add_argument(
        "--name", default="ablation", help="the place in README.md"
    )
    args = parser.parse_args()
    rows = json.loads((args.run / "results.json").read_text())
    replace(args.name, ablate.table(rows).markdown())


if __name__ == "__main__":
    main()
