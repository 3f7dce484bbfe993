"""What people write by hand, as schedules: candidates beside the model's own."""

import itertools
import math
from collections.abc import Iterator, Sequence

from jaxtricks.remat._solver import Again, Run, Schedule, Solution
from jaxtricks.remat._stages import Choice, Priced


def schedules(solution: Solution) -> Iterator[Schedule]:
    """Products kept and the rest recomputed; every stage recomputed; sqrt(n) groups; binary recursion."""
    n = len(solution.prices)
    yield _products_kept(solution.prices)
    size = math.isqrt(n - 1) + 1
    groups = [range(a, min(a + size, n)) for a in range(0, n, size)]
    yield tuple(Again(tuple(map(_kept, group))) for group in groups[:-1]) + tuple(
        map(_kept, groups[-1])
    )
    yield _halves(0, n)


def _kept(i: int) -> Run:
    return Run(i, Choice())


def _products_kept(prices: Sequence[Priced]) -> Schedule:
    """The cheap-operation rule of Chen et al., section 4.2: drop what costs little to make again."""

    def most_saved(i: int) -> Choice:
        saving = [o for o in prices[i].options if o.choice.saved and not o.choice.outer]
        return max(saving, key=lambda o: len(o.choice.saved or ())).choice if saving else Choice()

    steps: list[Run | Again] = []
    runs = itertools.groupby(range(len(prices)), key=lambda i: most_saved(i) == Choice())
    for bare, group in runs:
        run = tuple(Run(i, most_saved(i)) for i in group)
        whole = bare and len(run) > 1 and all(math.isfinite(prices[s.stage].forward) for s in run)
        steps += [Again(run)] if whole else run
    return tuple(steps)


def _halves(a: int, b: int) -> Schedule:
    if b - a == 1:
        return (_kept(a),)
    middle = (a + b) // 2
    return (Again(_halves(a, middle)), *_halves(middle, b))
