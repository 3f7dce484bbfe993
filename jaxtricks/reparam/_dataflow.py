"""Follow the marked values of a traced model: what reads the output of each layer.

The layers of a model mark their inputs and outputs in the trace (`mark`); `read` looks
for the marks again, through jit, remat and custom derivatives. The state tree of
bn(conv(x)) is that of bn(relu(conv(x))): only the trace tells them apart.
"""

import collections
import itertools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
from jax.ad_checkpoint import checkpoint_name

from jaxtricks import _jaxpr

_PREFIX = "jaxtricks.fuse"
# Calls that run where they stand: their body's inputs and outputs are the equation's.
_CALLS = _jaxpr.CALLS - {"shard_map"}


class Mark(NamedTuple):
    """A value of the trace: input or output of a layer.

    Attributes:
      side: "in" or "out".
      layer: path of the layer.
    """

    side: str
    layer: str


def mark(
    x: Any,
    side: str,
    layer: str,
) -> Any:
    """Mark x as a layer's "in" or "out" for `read`; else the identity."""
    name = f"{_PREFIX}:{side}:{layer}"
    return jax.tree.map(lambda leaf: checkpoint_name(leaf, name), x)


class Flow(NamedTuple):
    """The marked values of a trace, one entry for every time that a layer runs.

    Attributes:
      reads: {layer: the layer whose marked output is its input, else None}.
      read_by: {layer: the layers whose input is its output; None for everything else
        that uses it}.
    """

    reads: Mapping[str, list[str | None]]
    read_by: Mapping[str, list[list[str | None]]]

    def source(
        self,
        norm: str,
        convs: Mapping[str, Any],
    ) -> str:
        """Return the one convolution that feeds this normalization, and nothing else.

        Raises:
          ValueError: there is none; the message says why, by name.
        """
        sources = set(self.reads.get(norm, ()))
        if not sources:
            raise ValueError(f"{norm!r} is not called on the example")
        conv = sources.pop()
        if sources or conv not in convs:
            raise ValueError(
                f"what {norm!r} normalizes is not the output of one "
                "convolution or linear layer itself"
            )
        uses = self.read_by[conv]
        if any(use != [norm] for use in uses):
            subject = "has an output that"
            if len(uses) > 1:
                subject = f"is called {len(uses)} times, and its output"
            raise ValueError(
                f"{conv!r} {subject} is used by more than {norm!r}"
            )
        return conv


def read(closed: _jaxpr.ClosedJaxpr) -> Flow:
    """Return the flow between the marks of a trace."""
    trace = _Trace()
    trace.use_unmarked(trace.run(closed.jaxpr, {}))
    reads, read_by = (
        collections.defaultdict(list),
        collections.defaultdict(list),
    )
    for value, label in trace.marks.items():
        if label.side == "out":
            users = [_layer(user, "in") for user in trace.users[value]]
            read_by[label.layer].append(users)
        else:
            source = trace.marks.get(trace.inputs[value])
            reads[label.layer].append(_layer(source, "out"))
    return Flow(reads, read_by)


def _layer(label: Mark | None, side: str) -> str | None:
    """Return the layer of a mark on this side."""
    return label.layer if label and label.side == side else None


class _Trace:
    """Values by number, the same inside and outside of a call."""

    def __init__(self) -> None:
        self.numbers = itertools.count()
        self.marks: dict[int, Mark] = {}  # marked value -> its mark
        self.inputs: dict[
            int, int
        ] = {}  # marked value -> the value before the mark
        self.users: dict[int, list[Mark | None]] = collections.defaultdict(list)

    def use_unmarked(self, values: list[int]) -> None:
        """Record that something unmarked uses these values."""
        for value in values:
            self.users[value].append(None)

    def run(
        self,
        jaxpr: _jaxpr.Jaxpr,
        env: dict[Any, int],
    ) -> list[int]:
        """Number every value; return the numbers of the outputs."""

        def number(operand: Any) -> int:
            if _jaxpr.is_literal(operand):
                return next(self.numbers)
            return env.setdefault(operand, next(self.numbers))

        for eqn in jaxpr.eqns:
            ins = list(map(number, eqn.invars))
            if _jaxpr.primitive(eqn) in _CALLS:
                body = _jaxpr.bodies(eqn)[0].jaxpr
                outs = self.run(body, dict(zip(body.invars, ins, strict=True)))
                env.update(zip(eqn.outvars, outs, strict=True))
                continue
            for body in _jaxpr.sub_jaxprs(eqn):
                # Of a loop or a branch: what leaves it is used.
                self.use_unmarked(self.run(body, {}))
            label = _mark_of(eqn)
            for value in ins:
                self.users[value].append(label)
            if label:
                out = number(eqn.outvars[0])
                self.marks[out] = label
                self.inputs[out] = ins[0]
        return list(map(number, jaxpr.outvars))


def _mark_of(eqn: Any) -> Mark | None:
    name = _jaxpr.label_of(eqn)
    if name is None or not name.startswith(_PREFIX):
        return None
    _, side, layer = name.split(":", 2)
    return Mark(side, layer)
