"""Read a budget of bytes, and say when none can be met."""

import numbers
import re

import numpy as np

from jaxtricks import _table

Budget = int | float | str
"""Bytes, a size such as "4GiB", or a fraction up to 1 of the unplanned figure."""

_MAX_BYTES = 2**63
_BUDGET_ADVICE = (
    'write bytes, a size such as "4GiB" or "500 MB", or a fraction up to 1'
)
_UNITS = {"": 1, "b": 1}
_UNITS |= {f"{prefix}ib": 1024**i for i, prefix in enumerate("kmgt", 1)}
_UNITS |= {f"{prefix}b": 1000**i for i, prefix in enumerate("kmgt", 1)}


class BudgetInfeasible(ValueError):  # noqa: N818 (reads as what it says)
    """No plan meets the budget.

    Attributes:
      best: the smallest figure that was reached, bytes.
    """

    def __init__(
        self,
        budget: int,
        best: int,
        fixed: int,
        wrt: str,
    ):
        asked, reached = map(_table.format_bytes, (budget, best))
        if asked == reached:
            asked, reached = f"{budget:,} B", f"{best:,} B"
        why = ""
        if budget < fixed:
            needed = _table.format_bytes(fixed)
            why = (
                f" ({needed} of it are arguments and results, which "
                "recomputation cannot shrink)"
            )
        super().__init__(
            f"budget_bytes is {asked} and the smallest {wrt} reached is "
            f"{reached}{why}: raise the budget or make the batch smaller"
        )
        self.best = best


def parse_budget(budget: Budget, unplanned: int) -> int:
    """Return the bytes of a budget.

    Args:
      budget: bytes, text such as "4GiB" or "500 MB", or a float above 0 and up to 1:
        that fraction of `unplanned`.
      unplanned: bytes.

    Raises:
      ValueError: budget is not positive, is text but not a size, is above 1 and not an
        integer, or is beyond any machine.
    """
    if isinstance(budget, str):
        shown = repr(f"{budget:.40}")
        size = _parse_size(budget)
        if size is None:
            raise ValueError(f"budget_bytes is {shown}: {_BUDGET_ADVICE}")
        budget = int(size) if size < _MAX_BYTES else _MAX_BYTES
    else:
        is_number = isinstance(budget, numbers.Real)
        shown = f"{budget!s:.40}" if is_number else type(budget).__name__
    if isinstance(budget, np.generic):
        budget = budget.item()
    if isinstance(budget, bool) or not isinstance(budget, numbers.Real):
        raise ValueError(f"budget_bytes is {shown}: {_BUDGET_ADVICE}")
    if not 0 < budget < _MAX_BYTES:
        raise ValueError(
            f"budget_bytes is {shown}, not above 0 and below 2**63: {_BUDGET_ADVICE}"
        )
    if isinstance(budget, numbers.Integral):
        return int(budget)
    budget = float(budget)
    if budget > 1 and budget % 1:
        raise ValueError(f"budget_bytes is {shown}: {_BUDGET_ADVICE}")
    return int(budget * unplanned) if budget <= 1 else int(budget)


def _parse_size(text: str) -> float | None:
    """Return the bytes of a number with a unit; None if the text is neither."""
    match = re.fullmatch(
        r"\s*([0-9.]+(?:e[0-9]+)?)\s*([a-z]*)\s*", text.lower()
    )
    if match is None or match[2] not in _UNITS:
        return None
    try:
        return float(match[1]) * _UNITS[match[2]]
    except ValueError:  # two points
        return None
