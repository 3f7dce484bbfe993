"""claims.md says what the recorded results give, its verdicts follow its rules, its commands exist."""

import importlib.util
import math
import pathlib
import re

import jaxtricks as jt
import pytest
from benchmarks import claims, network_arms
from benchmarks import claims_evidence as evidence
from benchmarks.claims_evidence import Figures
from benchmarks.claims_rows import CLAIMS, COMPILED, EXACT, FRESH, TIMED
from jaxtricks.lab import cli

ROOT = pathlib.Path(__file__).parents[2]
PAGE = claims.OUT.read_text()
HEADERS, CELLS = evidence.tables(PAGE)["verdict"]
MEASURED = ("verdict", "with it", "baseline", "change")  # what a machine may have otherwise


@pytest.fixture(scope="module")
def rows():
    """Of the claims that are the same everywhere."""
    return claims.judged(CLAIMS, claims.recordable)


def test_the_page_is_what_the_recorded_results_give(rows):
    letter = claims.letters(CLAIMS)
    expected = {(r.claim.key, r.claim.effect): list(claims.cells(r, letter)) for r in rows}
    assert len(expected) == len(rows) and len(CELLS) == len(CLAIMS)
    for claim, found in zip(CLAIMS, CELLS, strict=True):
        assert found[1:3] == [claim.key, claim.effect]
        if claims.recordable(claim):
            assert found == expected[claim.key, claim.effect]
        else:
            given = list(claims.cells(claims.Row(claim, None, ""), letter))
            kept = [i for i, name in enumerate(HEADERS) if name not in (*MEASURED, "n")]
            assert [found[i] for i in kept] == [given[i] for i in kept]
            assert re.fullmatch(r"x [\d.e+]+", found[HEADERS.index("change")])


def test_what_a_machine_measures_is_judged_by_its_ratio():
    for claim, found in zip(CLAIMS, CELLS, strict=True):
        if not claims.recordable(claim):
            ratio = float(found[HEADERS.index("change")][2:])
            figures = Figures("", "", ratio, None, 1)
            assert found[0] == f"**{evidence.verdict(figures, claim.rule)}**"


def test_verdicts_are_three_words_and_every_trick_has_one():
    words = {evidence.HELD, evidence.NOT_HELD, evidence.NOT_TESTABLE}
    assert {row[0].strip("*") for row in CELLS} == words
    assert list(dict.fromkeys(row[1] for row in CELLS)) == list(jt.KEYS)
    headers, counts = evidence.tables(PAGE)["trick"]
    for key, *found in counts:
        mine = [row[0] for row in CELLS if row[1] == key]
        assert found == [str(mine.count(f"**{word}**")) for word in headers[1:]]
    assert [row[0] for row in counts] == list(jt.KEYS)


def test_what_did_not_hold_says_why(rows):
    lines = PAGE.split("\n")
    for row in rows:
        start = f"- {row.claim.key}, {row.claim.effect}: "
        found = [line for line in lines if line.startswith(start)]
        assert found == claims.remarks([row])
        assert not found or len(row.claim.otherwise) > 20


def test_claims_are_of_known_kinds_and_origins():
    for claim in CLAIMS:
        assert claim.kind in (EXACT, COMPILED, TIMED) and (
            claim.kind == EXACT or claim.origin == FRESH
        )
        assert claim.origin in ("", FRESH) or (evidence.RESULTS / claim.origin).exists()
        assert (claim.figures is None) == (claim.origin == "")


def test_every_command_exists():
    makefile = (ROOT / "Makefile").read_text()
    commands = re.findall(r"`((?:python -m|make|jaxtricks|--only) [^`]*)`", PAGE)
    assert len(commands) > 10
    for command in commands:
        first, *rest = command.split()
        if first == "make":
            assert re.search(rf"^{rest[0]}:", makefile, re.MULTILINE)
        elif first == "python":
            assert importlib.util.find_spec(rest[1])
        elif first == "--only":
            assert rest[0] in network_arms.EXPERIMENTS
        else:
            with pytest.raises(SystemExit, match="0"):
                cli.main([rest[0], "--help"])


def made_up(change, error=None, n=3):
    return Figures("1", "1", change, error, n)


@pytest.mark.parametrize(
    "rule, figures, verdict",
    [
        (evidence.MORE, made_up(2.1, 1.0), "held"),
        (evidence.MORE, made_up(1.9, 1.0), "not held"),
        (evidence.MORE, made_up(-5.0, 1.0), "not held"),
        (evidence.FEWER, made_up(-2.1, 1.0), "held"),
        (evidence.FEWER, made_up(2.1, 1.0), "not held"),
        (evidence.no_loss(1.0), made_up(-0.5, 0.3), "held"),
        (evidence.no_loss(1.0), made_up(-0.7, 0.3), "not held"),  # beyond two errors
        (evidence.no_loss(1.0), made_up(-1.2, 3.0), "not held"),  # more than the margin
        (evidence.no_loss(1.0), made_up(4.0, 0.1), "held"),
        (evidence.at_most(0.5), made_up(0.5), "held"),
        (evidence.at_most(0.5), made_up(0.51), "not held"),
        (evidence.at_least(0.9), made_up(0.9), "held"),
        (evidence.at_least(0.9), made_up(0.89), "not held"),
        (evidence.MORE, None, "not testable here"),
        (evidence.MORE, made_up(9.0), "not testable here"),  # no error is known
        (evidence.MORE, evidence.paired([9.0], [1.0]), "not testable here"),  # one seed
        (evidence.at_most(1.0), made_up(math.nan), "not testable here"),
    ],
)
def test_rules(rule, figures, verdict):
    assert evidence.verdict(figures, rule) == verdict


def test_differences_are_paired():
    found = evidence.paired([1.0, 11.0, 24.0], [0.0, 10.0, 20.0])
    assert (found.ours, found.base) == ("12.00 +- 11.53", "10.00 +- 10.00")
    assert found.change == 2 and found.error == pytest.approx(1.0) and found.n == 3
    assert str(found) == "+2.00 +- 1.00"
    assert str(evidence.ratio(3.0, 2.0)) == "x 1.5"


def test_a_run_that_never_reaches_the_target_counts_as_its_last_step(monkeypatch):
    arms = {
        "ours": {"steps": 50, "runs": [{"reached": 10}, {"reached": 30}]},
        "base": {"steps": 50, "runs": [{"reached": 40}, {"reached": None}]},
    }
    monkeypatch.setattr(evidence, "recorded", lambda name: {"experiments": {"made up": arms}})
    found = evidence.networks("made up", "ours", "base", "reached")
    assert (found.ours, found.base) == ("20 +- 14", "45 +- 7 (1 never)") and found.change == -25


def test_tables_of_a_page():
    text = (
        "| a | b |\n| --- | --- |\n| x | 1 +- 2 |\n\nwords\n\n| a | c |\n| --- | --- |\n| y | 3 |\n"
    )
    assert evidence.tables(text) == {
        "a": (["a", "b"], [["x", "1 +- 2"]]),
        "a #2": (["a", "c"], [["y", "3"]]),
    }
