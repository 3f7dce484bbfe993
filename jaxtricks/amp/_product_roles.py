"""Decide which products run in 8 bits: by their place in the model and in its pass.

Every value has an origin: INPUT, if only movements of data, casts and elementwise
operations lie between it and the arguments of the function; PRODUCT, downstream of a
product; OTHER, downstream of something else, such as a gather or a norm. In a backward
pass it is a cotangent, FRESH until it has passed through a product. Joining is the
maximum.

From these follows the role of a product. Published recipes leave three in 16 bits:
"first" (a product of two inputs, as in the patches of a vision transformer), "last" (no
product follows: logits) and "attention" (a product of activations under batch axes).
Rouhani et al., "Microscaling data formats", arXiv 2310.10537; DeepSeek-AI,
"DeepSeek-V3", arXiv 2412.19437, section 3.3; Micikevicius et al., "FP8 formats for deep
learning", arXiv 2209.05433.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from jaxtricks import _jaxpr
from jaxtricks.amp import _precision_table as table
from jaxtricks.amp._rounding8 import Side

INPUT, OTHER, PRODUCT, FRESH, COTANGENT = range(5)
Origins = tuple[int, ...]
Followed = tuple[int, ...]
FORWARD, BACKWARD = 1, 2
"""Flags of a value: a product of that pass reads it, or what is computed of it."""
ANY = FORWARD | BACKWARD
ONWARD, RETURN, AGAIN = range(3)
"""Forward pass, backward pass, and what the backward pass of a checkpoint recomputes."""
ROLES = ("first", "last", "attention")


@dataclasses.dataclass(frozen=True, eq=False)
class Choice:
    """How one equation runs, if it is a product or has inner jaxprs.

    Attributes:
      role: "first", "last", "attention" or "".
      sides: how the operands are rounded; None: not at all.
      operands: origins of the operands.
      bodies: choices for its inner jaxprs.
    """

    role: str = ""
    sides: tuple[Side, Side] | None = None
    operands: Origins = ()
    bodies: tuple["Choices", ...] = ()


@dataclasses.dataclass(frozen=True, eq=False)
class Choices:
    """The choices for a jaxpr.

    Attributes:
      eqns: one per equation.
      outs: origins of the results.
    """

    eqns: tuple[Choice | None, ...]
    outs: Origins

    def products(self) -> Iterator[Choice]:
        """Yield the choices for products, inner ones too."""
        for choice in filter(None, self.eqns):
            if choice.bodies:
                for body in choice.bodies:
                    yield from body.products()
            else:
                yield choice


def of_eqns(
    choices: Choices | None, jaxpr: _jaxpr.Jaxpr
) -> Sequence[Choice | None]:
    """Return the choices for the equations of a jaxpr, None for each without 8 bits."""
    return choices.eqns if choices else (None,) * len(jaxpr.eqns)


def of_bodies(choice: Choice | None, number: int) -> Sequence[Choices | None]:
    """Return the choices for the bodies of an equation, None for each without 8 bits."""
    return choice.bodies if choice else (None,) * number


class Chooser:
    """The choice for the products of one traced function.

    Args:
      format: dtype of the operands of a forward product.
      scaling: what shares a scale.
      wide_roles: roles that stay in 16 bits.
      is_wide: whether the caller's rules keep an equation in 16 bits.
    """

    def __init__(
        self,
        format: str,
        scaling: str,
        wide_roles: frozenset[str],
        is_wide: Callable[[Any], bool],
    ):
        self.format = format
        self.scaling = scaling
        self.wide_roles = wide_roles
        self.is_wide = is_wide
        self._has_first = False
        self._roles_of: dict[str, set[str]] = {}
        self._origins: dict[Any, dict[Any, int]] = {}
        self._flags: dict[Any, dict[Any, int]] = {}
        self._choices: dict[Any, Choices] = {}

    def whole(self, jaxpr: _jaxpr.Jaxpr) -> Choices:
        """Return the choices for a whole function; those for parts of it may follow."""
        origins = (INPUT,) * len(jaxpr.invars)
        unread = (0,) * len(jaxpr.outvars)
        choices = self.choose(jaxpr, origins, unread)
        if {"first", "last"} & {choice.role for choice in choices.products()}:
            # Once more, with what is known now: whether there is a first product, whose
            # gradient reads an input as well, and the roles of what is recomputed.
            self._has_first = any(
                choice.role == "first" for choice in choices.products()
            )
            self._choices.clear()
            choices = self.choose(jaxpr, origins, unread)
        if not any(choice.sides for choice in choices.products()):
            # A function of one or two products means these.
            self.wide_roles = self.wide_roles - {"first", "last"}
            self._choices.clear()
            choices = self.choose(jaxpr, origins, unread)
        return choices

    def choose(
        self,
        jaxpr: _jaxpr.Jaxpr,
        ins: Sequence[int],
        followed: Sequence[int],
        direction: int = ONWARD,
    ) -> Choices:
        """Return the choices for a jaxpr.

        Args:
          jaxpr: an open jaxpr.
          ins: origins of its inputs.
          followed: flags of its results.
          direction: the pass that it is part of.
        """
        key = jaxpr, tuple(ins), tuple(followed), direction
        if key not in self._choices:
            self._choices[key] = self._choose(*key)
        return self._choices[key]

    def _choose(
        self,
        jaxpr: _jaxpr.Jaxpr,
        ins: Origins,
        followed: Followed,
        direction: int,
    ) -> Choices:
        origins = self._origins_of(jaxpr, ins, direction)
        flags = self._flags_of(jaxpr, ins, followed, direction)
        choices = tuple(
            self._choice(eqn, origins, flags, direction) for eqn in jaxpr.eqns
        )
        return Choices(choices, _read(origins, jaxpr.outvars))

    def _choice(
        self,
        eqn: Any,
        origins: Mapping[Any, int],
        flags: Mapping[Any, int],
        direction: int,
    ) -> Choice | None:
        operands = _read(origins, eqn.invars)
        if _jaxpr.has_bodies(eqn):
            parts = self._parts(eqn, operands, _flags(flags, eqn), direction)
            bodies = tuple(self.choose(*part) for part in parts)
            if _jaxpr.primitive(eqn).startswith("custom_"):
                # The products of its rule have the line that calls it.
                roles = self._roles_of.setdefault(
                    _jaxpr.source_line(eqn), set()
                )
                roles.update(c.role for body in bodies for c in body.products())
            return Choice("", None, operands, bodies)
        if _jaxpr.primitive(eqn) not in table.ROUNDED:
            return None
        role = self._role(eqn, operands, flags.get(eqn.outvars[0], 0))
        if self.wide_roles:
            is_onward = _direction(eqn, direction) == ONWARD
            role = self._role_at(eqn, role, is_onward and max(operands) < FRESH)
        if self.is_wide(eqn):
            return Choice("", None, operands)
        if role in self.wide_roles:
            return Choice(role, None, operands)
        side = Side(self.format, self.scaling)
        lhs, rhs = (
            side.of_gradient() if origin >= FRESH else side
            for origin in operands
        )
        is_rounded = lhs.format is not None or rhs.format is not None
        return Choice(role, (lhs, rhs) if is_rounded else None, operands)

    def _role(self, eqn: Any, operands: Origins, flags: int) -> str:
        low, high = min(operands), max(operands)
        is_batched = _jaxpr.primitive(eqn) == "dot_general" and any(
            _jaxpr.dimension_numbers(eqn)[1]
        )
        if high >= FRESH:
            if high == FRESH:
                return "last"
            if self._has_first and low == INPUT and not flags & BACKWARD:
                return "first"
            is_attention = is_batched and low == PRODUCT and flags & BACKWARD
            return "attention" if is_attention else ""
        if high == INPUT:
            return "first"
        if is_batched and low == PRODUCT:
            return "attention"
        return "" if flags & FORWARD else "last"

    def _role_at(self, eqn: Any, role: str, is_onward: bool) -> str:
        """Return the role that the source line of a product has in the forward pass.

        The gradients of a product, and where a checkpoint recomputes it, have its line.

        Args:
          eqn: the product.
          role: by what surrounds it.
          is_onward: whether it belongs to the forward pass.
        """
        line = _jaxpr.source_line(eqn)
        if is_onward:
            self._roles_of.setdefault(line, set()).add(role)
            return role
        roles = self._roles_of.get(line, {role})
        # A line that a loop over layers runs several times may have several.
        if role in roles:
            return role
        return "" if "" in roles else min(roles)

    # Forward through a jaxpr: origins.

    def _origins_of(
        self, jaxpr: _jaxpr.Jaxpr, ins: Origins, direction: int
    ) -> dict[Any, int]:
        key = jaxpr, ins, direction
        if key in self._origins:
            return self._origins[key]
        origins = dict.fromkeys(jaxpr.constvars, INPUT)
        origins |= dict(zip(jaxpr.invars, ins, strict=True))
        for eqn in jaxpr.eqns:
            operands = _read(origins, eqn.invars)
            if _jaxpr.has_bodies(eqn):
                outs = self._outs(eqn, operands, direction)
            elif _jaxpr.primitive(eqn) == "optimization_barrier":
                outs = operands
            else:
                origin = _origin(eqn, operands, _direction(eqn, direction))
                outs = (origin,) * len(eqn.outvars)
            origins.update(zip(eqn.outvars, outs, strict=True))
        self._origins[key] = origins
        return origins

    def _outs(self, eqn: Any, operands: Origins, direction: int) -> Origins:
        """Return the origins of the results of an equation with bodies."""
        direction = _direction(eqn, direction)
        outs = [
            _read(self._origins_of(body, ins, direction), body.outvars)
            for body, ins in self._entered(eqn, operands, direction)
        ]
        if _jaxpr.primitive(eqn) == "cond":
            return tuple(map(max, zip(*outs, strict=True)))
        # Before the body of a while loop comes its condition.
        return outs[-1]

    def _entered(
        self, eqn: Any, operands: Origins, direction: int
    ) -> list[tuple[_jaxpr.Jaxpr, Origins]]:
        """Return the bodies of an equation with the origins of their inputs."""
        bodies = [body.jaxpr for body in _jaxpr.bodies(eqn)]
        name = _jaxpr.primitive(eqn)
        if name == "cond":
            return [(body, operands[1:]) for body in bodies]
        if name == "scan":
            parts = _jaxpr.scan_parts(eqn)
            first, last = parts.consts, parts.consts + parts.carry
            ins = self._after_rounds(
                bodies[0], operands, first, last, direction
            )
            return [(bodies[0], ins)]
        if name == "while":
            cond_consts, first = _jaxpr.while_consts(eqn)
            cond, body = bodies
            ins = self._after_rounds(
                body, operands[cond_consts:], first, len(body.invars), direction
            )
            return [
                (cond, (*operands[:cond_consts], *ins[first:])),
                (body, ins),
            ]
        return [(body, operands) for body in bodies]

    def _after_rounds(
        self,
        body: _jaxpr.Jaxpr,
        ins: Origins,
        first: int,
        last: int,
        direction: int,
    ) -> Origins:
        """Return the origins of a loop's inputs, carries from first to last, in any round."""
        while True:
            outs = _read(self._origins_of(body, ins, direction), body.outvars)
            carry = tuple(map(max, ins[first:last], outs))
            if carry == ins[first:last]:
                return ins
            ins = (*ins[:first], *carry, *ins[last:])

    # Backward through a jaxpr: what follows a value.

    def _flags_of(
        self,
        jaxpr: _jaxpr.Jaxpr,
        ins: Origins,
        followed: Followed,
        direction: int,
    ) -> dict[Any, int]:
        key = jaxpr, ins, followed, direction
        if key in self._flags:
            return self._flags[key]
        origins = self._origins_of(jaxpr, ins, direction)
        flags: dict[Any, int] = {}

        def mark(v: Any, flag: int) -> None:
            if not _jaxpr.is_literal(v):
                flags[v] = flags.get(v, 0) | flag

        for v, flag in zip(jaxpr.outvars, followed, strict=True):
            mark(v, flag)
        for eqn in reversed(jaxpr.eqns):
            outs = _flags(flags, eqn)
            operands = _read(origins, eqn.invars)
            if _jaxpr.has_bodies(eqn):
                entering = self._entering(eqn, operands, outs, direction)
                for v, flag in zip(eqn.invars, entering, strict=True):
                    mark(v, flag)
                continue
            following = _union(outs)
            if _jaxpr.primitive(eqn) in table.PRODUCTS:
                following |= BACKWARD if max(operands) >= FRESH else FORWARD
            for v in eqn.invars:
                mark(v, following)
        self._flags[key] = flags
        return flags

    def _entering(
        self, eqn: Any, operands: Origins, outs: Followed, direction: int
    ) -> list[int]:
        """Return the flags of the operands of an equation with bodies."""
        parts = self._parts(eqn, operands, outs, direction)
        ins = [
            [self._flags_of(*part).get(v, 0) for v in part[0].invars]
            for part in parts
        ]
        name = _jaxpr.primitive(eqn)
        if name == "cond":
            return [0, *map(_union, zip(*ins, strict=True))]
        if name == "while":
            cond_consts, _ = _jaxpr.while_consts(eqn)
            return [*ins[0][:cond_consts], *ins[1]]
        return ins[0]

    def _parts(
        self, eqn: Any, operands: Origins, outs: Followed, direction: int
    ) -> list[tuple[_jaxpr.Jaxpr, Origins, Followed, int]]:
        """Return the arguments of `choose` for the bodies of an equation."""
        direction = _direction(eqn, direction)
        entered = self._entered(eqn, operands, direction)
        name = _jaxpr.primitive(eqn)
        if name == "scan":
            scan = _jaxpr.scan_parts(eqn)
            first, carries = scan.consts, scan.carry
        elif name == "while":
            first, carries = _jaxpr.while_consts(eqn)[1], len(outs)
        else:
            return [(body, ins, outs, direction) for body, ins in entered]
        body, ins = entered[-1]
        # What a round does to a carry, the next round reads.
        while True:
            flags = self._flags_of(body, ins, outs, direction)
            again = [
                flags.get(v, 0) for v in body.invars[first : first + carries]
            ]
            joined = tuple(map(int.__or__, outs[:carries], again))
            if joined == outs[:carries]:
                break
            outs = (*joined, *outs[carries:])
        parts = [(body, ins, outs, direction)]
        if name == "while":
            cond, cond_ins = entered[0]
            parts.insert(0, (cond, cond_ins, (0,), direction))
        return parts


def _origin(eqn: Any, operands: Origins, direction: int) -> int:
    """Return the origin of the results of an equation without bodies."""
    joined = max(operands, default=INPUT)
    name = _jaxpr.primitive(eqn)
    if name in table.PRODUCTS:
        return COTANGENT if joined >= FRESH else PRODUCT
    kind = table.kind_of(name)
    # A constant of the backward pass is the cotangent of a sum, say.
    is_constant = not _jaxpr.variables_of(eqn.invars)
    moves = kind in (table.LAYOUT, table.CONVERT)
    if moves and not (is_constant and direction == RETURN):
        return joined
    if direction == RETURN:
        return max(joined, FRESH)
    return joined if kind == table.FOLLOW else max(joined, OTHER)


def _direction(eqn: Any, outer: int) -> int:
    """Return the pass that an equation is part of, by the names that JAX gives it."""
    names = str(eqn.source_info.name_stack)
    if "rematted_computation" in names:
        return AGAIN
    return RETURN if "transpose(" in names else outer


def _read(origins: Mapping[Any, int], variables: Sequence[Any]) -> Origins:
    return tuple(
        INPUT if _jaxpr.is_literal(v) else origins[v] for v in variables
    )


def _flags(flags: Mapping[Any, int], eqn: Any) -> Followed:
    return tuple(flags.get(v, 0) for v in eqn.outvars)


def _union(flags: Sequence[int]) -> int:
    joined = 0
    for each in flags:
        joined |= each
    return joined
