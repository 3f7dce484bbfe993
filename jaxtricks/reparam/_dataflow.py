"""What feeds what in a traced model: where a convolution's output goes to one normalization and no further.

The layers of a model mark their inputs and outputs in the trace (`mark`); `read` finds
the marks again, through jit, remat and custom derivatives. The state tree of
bn(conv(x)) is that of bn(relu(conv(x))): only the trace tells them apart.
"""

import collections
import itertools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
from jax.ad_checkpoint import checkpoint_name

from jaxtricks import _compat, _jaxpr

_PREFIX = "jaxtricks.fuse"
# What is run where it stands: its inputs and outputs are those of the equation.
_CALLS = ("jit", "call", "checkpoint", "custom_jvp_call", "custom_vjp_call")


class Mark(NamedTuple):
    """A value of the trace: input or output of a layer.

    Attributes:
      side: "in" or "out".
      layer: path of the layer.
    """

    side: str
    layer: str


def mark(x: Any, side: str, layer: str) -> Any:
    """x, marked as a layer's "in" or "out" for `read`; the identity in every computation."""
    return jax.tree.map(
        lambda leaf: checkpoint_name(leaf, f"{_PREFIX}:{side}:{layer}"), x
    )


class Flow(NamedTuple):
    """The marked values of a trace, one entry for every time that a layer runs.

    Attributes:
      reads: {layer: the layer whose marked output it is given, else None}.
      read_by: {layer: the layers that are given its output; None for everything else
        that uses it}.
    """

    reads: Mapping[str, list[str | None]]
    read_by: Mapping[str, list[list[str | None]]]

    def source(self, norm: str, convs: Mapping[str, Any]) -> str:
        """The one convolution that feeds this normalization, and nothing else.

        Raises:
          ValueError: there is none; the message says why, by name.
        """
        sources = set(self.reads.get(norm, ()))
        if not sources:
            raise ValueError(f"{norm!r} is not called on the example")
        conv = sources.pop()
        if sources or conv not in convs:
            raise ValueError(
                f"what {norm!r} normalizes is not the output of one convolution or linear layer itself"
            )
        uses = self.read_by[conv]
        if any(use != [norm] for use in uses):
            times = (
                f"is called {len(uses)} times, and its output"
                if len(uses) > 1
                else "has an output that"
            )
            raise ValueError(f"{conv!r} {times} is used by more than {norm!r}")
        return conv


def read(closed: _jaxpr.ClosedJaxpr) -> Flow:
    """The marks of a trace."""
    trace = _Trace()
    trace.leave(trace.run(closed.jaxpr, {}))
    reads, read_by = collections.defaultdict(list), collections.defaultdict(list)
    for value, made in trace.marks.items():
        if made.side == "out":
            users = [
                m.layer if m and m.side == "in" else None for m in trace.users[value]
            ]
            read_by[made.layer].append(users)
        else:
            source = trace.marks.get(trace.inputs[value])
            reads[made.layer].append(
                source.layer if source and source.side == "out" else None
            )
    return Flow(reads, read_by)


class _Trace:
    """Values by number, the same inside and outside of a call."""

    def __init__(self) -> None:
        self.numbers = itertools.count()
        self.marks: dict[int, Mark] = {}  # value -> what made it
        self.inputs: dict[int, int] = {}  # marked value -> the value that was marked
        self.users: dict[int, list[Mark | None]] = collections.defaultdict(list)

    def leave(self, values: list[int]) -> None:
        """Values that something unmarked uses."""
        for value in values:
            self.users[value].append(None)

    def run(self, jaxpr: _jaxpr.Jaxpr, env: dict[Any, int]) -> list[int]:
        """Number every value; the numbers of the outputs."""

        def number(atom: Any) -> int:
            if hasattr(atom, "val"):  # a literal
                return next(self.numbers)
            return env.setdefault(atom, next(self.numbers))

        for eqn in jaxpr.eqns:
            ins = list(map(number, eqn.invars))
            if _compat.primitive(eqn) in _CALLS:
                body = _compat.bodies(eqn)[0].jaxpr
                outs = self.run(body, dict(zip(body.invars, ins, strict=True)))
                env.update(zip(eqn.outvars, outs, strict=True))
                continue
            for body in _jaxpr.sub_jaxprs(
                eqn
            ):  # of a loop or a branch: what leaves it is used
                self.leave(self.run(body, {}))
            made = _mark_of(eqn)
            for value in ins:
                self.users[value].append(made)
            if made:
                out = number(eqn.outvars[0])
                self.marks[out], self.inputs[out] = made, ins[0]
        return list(map(number, jaxpr.outvars))


def _mark_of(eqn: Any) -> Mark | None:
    name = str(_compat.params(eqn).get("name"))
    if _compat.primitive(eqn) != "name" or not name.startswith(_PREFIX):
        return None
    _, side, layer = name.split(":", 2)
    return Mark(side, layer)
