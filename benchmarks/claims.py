"""Every effect that the seed and the papers claim, and whether it held: `make claims` writes claims.md.

Training takes hours and is read from the recorded results; what is exact or quick is measured anew. The
rows are in `claims_rows`, the rules and figures in `claims_evidence`.
"""

import pathlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

from benchmarks import claims_evidence as evidence
from benchmarks.claims_evidence import HELD, NOT_HELD, NOT_TESTABLE, Figures
from benchmarks.claims_rows import CLAIMS, COMPILED, FRESH, TIMED, Claim
from jaxtricks import _table
from jaxtricks.lab.report import hardware

OUT = pathlib.Path(__file__).parents[1] / "claims.md"
HEADERS = (
    "verdict",
    "trick",
    "claimed effect",
    "by",
    "metric",
    "with it",
    "baseline",
)
HEADERS += ("change", "n", "held if", "hardware", "from")
WORDS = (HELD, NOT_HELD, NOT_TESTABLE)
INTRO = """\
# Claims

Every effect that the papers and the seed (the Keras collection of ten tricks that this library began as)
claim, and whether it held where we could look. `make claims` writes this page: training is read from the
recorded results, which took hours on the machines named below; what is exact or quick is measured anew.

With it, baseline: mean +- sample standard deviation over n seeds (rounds, where times are taken). Change:
the difference paired by seed, mean +- standard error, or the ratio (x). Rates are tuned on another seed, the
baseline's too (agc's are the best of six on the validation images; echo, amp and the long-tail losses share
one rate with their baseline).

Held if: the target that the bench had already, else two standard errors in the claimed direction, or a limit
that follows from the claim's own words. Most figures had been seen when the rules were written down. Two
standard errors of three seeds are a weak rule: of effects that are not there one in eleven passes. Small
networks on CIFAR-10 at 16 x 16, or text: what holds here is a hint and no record, and what does not hold here
may hold at the papers' size. The digits of `make demo` are a smoke test and decide nothing here."""


class Row(NamedTuple):
    """A claim, its figures and its verdict."""

    claim: Claim
    figures: Figures | None
    verdict: str


def judged(
    claims: Sequence[Claim],
    wanted: Callable[[Claim], bool] = lambda claim: True,
) -> list[Row]:
    """The wanted claims with their figures and verdicts."""
    rows = []
    for claim in filter(wanted, claims):
        figures = None if claim.figures is None else claim.figures()
        rows.append(Row(claim, figures, evidence.verdict(figures, claim.rule)))
    return rows


def recordable(claim: Claim) -> bool:
    """Whether the row is the same on every machine: read from results, or counted from shapes."""
    return claim.kind not in (COMPILED, TIMED)


def letters(claims: Sequence[Claim]) -> dict[str, str]:
    """A letter for every origin, in the order in which they appear."""
    origins = dict.fromkeys(claim.origin for claim in claims if claim.origin)
    return {origin: chr(ord("a") + i) for i, origin in enumerate(origins)}


def cells(row: Row, letter: dict[str, str]) -> tuple[str, ...]:
    """One row of the table; see `HEADERS`."""
    claim, figures, verdict = row
    shown = ("-", f"- ({claim.baseline})", "-", "-")
    if figures is not None:
        base = f"{figures.base} ({claim.baseline})"
        shown = (figures.ours, base, str(figures), str(figures.n))
    ours, base, change, n = shown
    told = (claim.key, claim.effect, claim.source, claim.metric)
    where = (claim.rule.text, ground(claim), letter.get(claim.origin, "-"))
    return f"**{verdict}**", *told, ours, base, change, n, *where


def ground(claim: Claim) -> str:
    """What the figures were made on, in a few words."""
    if claim.origin == FRESH:
        return "shapes alone" if recordable(claim) else "this machine"
    if not claim.origin:
        return "-"
    machine = evidence.made(claim.origin)[1]
    return (
        "TPU v5e, compiled only"
        if "libtpu" in machine
        else machine.split(", ")[1] + " of a CPU"
    )


def table(rows: Sequence[Row]) -> _table.Table:
    """All rows."""
    letter = letters(CLAIMS)
    return _table.make(HEADERS, [cells(row, letter) for row in rows])


def overview(rows: Sequence[Row]) -> _table.Table:
    """How many of each verdict every trick has."""
    counts = {row.claim.key: [0, 0, 0] for row in rows}
    for row in rows:
        counts[row.claim.key][WORDS.index(row.verdict)] += 1
    return _table.make(
        ("trick", *WORDS), [(key, *found) for key, found in counts.items()]
    )


def sources(claims: Sequence[Claim], here: str) -> list[str]:
    """A line for each letter: the file, the commands that make it, on what it was made."""
    lines = []
    for origin, letter in letters(claims).items():
        if origin == FRESH:
            lines.append(f"- {letter}: measured by `{FRESH}`. {here}.")
            continue
        command, machine = evidence.made(origin)
        only = dict.fromkeys(
            c.only for c in claims if c.origin == origin and c.only
        )
        options = ", ".join(f"`--only {name}`" for name in only)
        lines.append(
            f"- {letter}: `benchmarks/results/{origin}`, made by `{command}`"
            + f" (one experiment: {options})" * bool(only)
            + f". {machine}."
        )
    return lines


def remarks(rows: Sequence[Row]) -> list[str]:
    """A line on each verdict that is not "held": why, and what would test it."""
    return [
        f"- {row.claim.key}, {row.claim.effect}: {row.verdict}. {row.claim.otherwise}"
        for row in rows
        if row.verdict != HELD
    ]


def markdown(rows: Sequence[Row], here: str) -> str:
    """The whole page; `here` is the machine that measures."""
    parts = [INTRO, overview(rows).markdown(), table(rows).markdown()]
    parts += [
        "## What did not hold, or could not be tested",
        "\n".join(remarks(rows)),
    ]
    parts += ["## From where", "\n".join(sources(CLAIMS, here))]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    """Judge, and write the page."""
    rows = judged(CLAIMS)
    OUT.write_text(markdown(rows, hardware()))
    print(table(rows), f"\n{OUT}")


if __name__ == "__main__":
    main()
