"""Budgets: bytes, text, or a fraction of what the program needs unplanned."""

import numbers
import re

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
        why = ""
        if budget < fixed:
            needed = _table.format_bytes(fixed)
            why = f" ({needed} of it are arguments and results, which recomputation cannot shrink)"
        super().__init__(
            f"budget_bytes is {_table.format_bytes(budget)} and the smallest {wrt} reached is "
            f"{_table.format_bytes(best)}{why}: raise the budget or make the batch smaller"
        )
        self.best = best


def parse(budget: int | float | str, unplanned: int) -> int:
    """Bytes of a budget.

    Args:
      budget: bytes, text such as "4GiB" or "500 MB", or a float above 0 and up to 1: that fraction of
        `unplanned`.
      unplanned: bytes.

    Raises:
      ValueError: budget is not positive, is text but not a size, or is above 1 and not an integer.
    """
    if isinstance(budget, str):
        found = re.fullmatch(r"\s*([0-9.]+(?:e[0-9]+)?)\s*([a-z]*)\s*", budget.lower())
        number = _number(found[1]) if found else None
        if found is None or number is None or found[2] not in _UNITS:
            raise ValueError(f'budget_bytes is {budget!r}: write a size such as "4GiB" or "500 MB"')
        budget = int(number * _UNITS[found[2]])
    real = isinstance(budget, numbers.Real)
    if not real or isinstance(budget, bool) or (budget > 1 and budget % 1):
        shown = budget if real else type(budget).__name__
        raise ValueError(
            f'budget_bytes is {shown}: write bytes, a size such as "4GiB", or a fraction up to 1'
        )
    if not budget > 0:
        raise ValueError(f"budget_bytes must be above 0, not {budget}")
    fraction = budget <= 1 and not isinstance(budget, numbers.Integral)
    return int(budget * unplanned) if fraction else int(budget)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
