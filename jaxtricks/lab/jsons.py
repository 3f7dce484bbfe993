"""JSON that may be damaged or come from somebody else. Imports no jax."""

import json
from typing import Any

MAX_DEPTH = 64
"""Values nested more deeply are refused: whatever walks them would run out of stack."""


def parse(text: str | bytes) -> Any:
    """The value of a JSON text.

    Raises:
      ValueError: it isn't JSON, not in UTF-8, or nested more than 64 deep.
    """
    try:
        value = json.loads(text if isinstance(text, str) else text.decode("utf-8"))
    except RecursionError as error:
        raise ValueError(_TOO_DEEP) from error
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [x for parent in level for x in _inside(parent)]
        if not level:
            return value
    raise ValueError(_TOO_DEEP)


_TOO_DEEP = f"it is nested more than {MAX_DEPTH} deep"


def _inside(value: Any) -> list[Any]:
    return (
        list(value.values())
        if isinstance(value, dict)
        else value
        if isinstance(value, list)
        else []
    )
