"""The cards of the rooms, read without importing them."""

import ast
import importlib.util
import pathlib

from jaxtricks import KEYS
from jaxtricks.lab.errors import UserError


def card(key: str) -> str:
    """A room's card: its module docstring, read without importing it.

    Raises:
      UserError: not one of the ten.
    """
    spec = importlib.util.find_spec(f"jaxtricks.{key}") if key in KEYS else None
    if spec is None or spec.origin is None:
        raise UserError(f"unknown trick {key!r}; use one of {', '.join(KEYS)}")
    return ast.get_docstring(ast.parse(pathlib.Path(spec.origin).read_text())) or ""
