"""Budgets: bytes, text, or a fraction of what the program needs unplanned."""

import numbers
import re

import numpy as np

from jaxtricks import _table

_UNITS = {"": 1, "b": 1}
_UNITS |= {f"{p}ib": 1024**i for i, p in enumerate("kmgt", 1)}
_UNITS |= {f"{p}b": 1000**i for i, p in enumerate("kmgt", 1)}


class BudgetInfeasible(ValueError):  # noqa: N818 (reads as what it says)
    """No plan meets the budget.

    Attributes:
      best: the smallest figure that was reached, bytes.
    """

    def __init__(self, budget: int, best: int, fixed: int, wrt: str):
        asked, reached = map(_table.format_bytes, (budget, best))
        if asked == reached:
            asked, reached = f"{budget:,} B", f"{best:,} B"
        why = ""
        if budget < fixed:
            needed = _table.format_bytes(fixed)
            why = f" ({needed} of it are arguments and results, which recomputation cannot shrink)"
        super().__init__(
            f"budget_bytes is {asked} and the smallest {wrt} reached is {reached}{why}: raise the budget "
            "or make the batch smaller"
        )
        self.best = best


_MOST = 2**63
_CURE = 'write bytes, a size such as "4GiB" or "500 MB", or a fraction up to 1'


def parse(budget: int | float | str, unplanned: int) -> int:
    """Bytes of a budget.

    Args:
      budget: bytes, text such as "4GiB" or "500 MB", or a float above 0 and up to 1: that fraction of
        `unplanned`.
      unplanned: bytes.

    Raises:
      ValueError: budget is not positive, is text but not a size, is above 1 and not an integer, or is
        beyond any machine.
    """
    shown = f"{budget!s:.40}" if isinstance(budget, str | numbers.Real) else type(budget).__name__
    if isinstance(budget, str):
        shown = repr(shown)
        found = re.fullmatch(r"\s*([0-9.]+(?:e[0-9]+)?)\s*([a-z]*)\s*", budget.lower())
        number = _number(found[1]) if found else None
        if found is None or number is None or found[2] not in _UNITS:
            raise ValueError(f"budget_bytes is {shown}: {_CURE}")
        size = number * _UNITS[found[2]]
        budget = int(size) if size < _MOST else _MOST
    if isinstance(budget, np.generic):
        budget = budget.item()
    if isinstance(budget, bool) or not isinstance(budget, numbers.Real):
        raise ValueError(f"budget_bytes is {shown}: {_CURE}")
    if not 0 < budget < _MOST:
        raise ValueError(f"budget_bytes is {shown}, not above 0 and below 2**63: {_CURE}")
    if isinstance(budget, numbers.Integral):
        return int(budget)
    budget = float(budget)
    if budget > 1 and budget % 1:
        raise ValueError(f"budget_bytes is {shown}: {_CURE}")
    return int(budget * unplanned) if budget <= 1 else int(budget)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
