"""Describe what each axis of a parameter means, for memopt, agc and weightstd.

What. A leaf's roles are one word per axis: "batch" (independent copies: scanned or
vmapped layers, experts), "in" (fan-in, and the spatial axes of a kernel), "out"
(fan-out) or "none" (everything else). The kernel of a 3x3 convolution is ("in", "in",
"in", "out"); five of them scanned over are ("batch", "in", "in", "in", "out"); biases
and scales are ("none",) after any "batch".

Use. Exact rules come from the model's own layers: `jt.nnx.roles(model)` and
`jt.linen.roles(module, *init_args)`. For anything else write a rule, pass a function
(path, shape) -> roles, or pass a tree of roles. Paths are keys joined by "/".

    rule = jt.roles.by_path({r"stack/kernel": ("batch", "in", "out")})
    tx = jt.memopt.adafactor(1e-3, roles=rule)
    print(jt.roles.describe(params, jt.roles.infer))

`matrix_view` says which axes make a leaf a matrix, for optimizers of matrices (Muon,
Shampoo, SOAP), and `exclude` leaves parameters out by path.

optax decides by rank and size alone, so it clips and factors scanned layers, attention
kernels and stacked biases over the wrong axes.
"""

import dataclasses
import difflib
import re
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np

from jaxtricks import _table, _tree
from jaxtricks._arguments import check_regex, checked, described
from jaxtricks._typing import Params, Roles

__all__ = [
    "ROLES",
    "Exact",
    "Exclude",
    "MatrixView",
    "Rule",
    "by_path",
    "describe",
    "exact",
    "exclude",
    "infer",
    "is_kernel",
    "leaf_roles",
    "matrix_view",
    "positions",
]

ROLES = ("batch", "in", "out", "none")

_DENSE: Roles = ("in", "out")
# Names that fix the meaning in Flax: "Dense_3/kernel" is a matrix whatever precedes it.
_LAYERS = re.compile(r"^(Dense|Conv|WSConv|Embed)(_\d+)?$")
# The matrices of recurrent cells: "hi" (linen; "if_" in nnx, since "if" is Python's),
# "dense_h" (nnx).
_GATES = re.compile(r"^([ih][ifgornz]_?|dense_[ih])$")
# Prefixes that nn.vmap and nn.scan give a class: its parameters have further axes.
_LIFTED = re.compile(r"^(Vmap|Scan)[A-Z]")


@dataclasses.dataclass(frozen=True)
class Rule:
    """Map (path, shape) to roles by regular expressions; the result of `by_path`.

    Attributes:
      patterns: (regex, roles) in order of precedence; a regex must match the whole
        path.
      strict: every regex must match some leaf, and every leaf some regex, checked in
        `init`.
    """

    patterns: tuple[tuple[str, Roles], ...]
    strict: bool = True

    def __call__(self, path: str, shape: tuple[int, ...]) -> Roles | None:
        """Return the roles of the first match; further leading axes are "batch"."""
        for pattern, roles in self.patterns:
            if re.fullmatch(pattern, path):
                return _stacked(path, shape, roles)
        return None

    def check(self, paths: Iterable[str]) -> None:
        """Raise if a pattern is of no use, or if a path matches none."""
        paths = list(paths)
        matching = {path: self._matching(path) for path in paths}
        for pattern, _ in self.patterns:
            matched = [path for path in paths if pattern in matching[path]]
            if not matched:
                raise ValueError(
                    f"roles: the rule {pattern!r} matches no parameter; paths "
                    f"look like {_some(paths)}"
                )
            if all(matching[path][0] != pattern for path in matched):
                earlier = matching[matched[0]][0]
                raise ValueError(
                    f"roles: the rule {pattern!r} is never used, since "
                    f"{earlier!r} comes first; swap them"
                )
        for path in paths:
            if not matching[path]:
                raise ValueError(
                    f"roles: no rule matches the parameter {path!r}; add one "
                    "or pass strict=False"
                )

    def _matching(self, path: str) -> list[str]:
        return [
            pattern
            for pattern, _ in self.patterns
            if re.fullmatch(pattern, path)
        ]


@dataclasses.dataclass(frozen=True, eq=False)
class Exact:
    """Map (path, shape) to roles by exact paths; the result of `exact`.

    `jt.nnx.roles` and `jt.linen.roles` return one.

    Attributes:
      table: {path: roles}.
      assumed: paths whose stacked axis is an assumption; `describe` marks them.
    """

    table: Mapping[str, Roles]
    assumed: frozenset[str] = frozenset()

    def check(self, paths: Iterable[str], matrices: Iterable[str]) -> None:
        """Raise if the roles belong to another model; warn if they are likely to.

        Args:
          paths: of all parameters.
          matrices: paths of parameters with more than one axis; roles hardly matter
            for the others.

        Raises:
          ValueError: none of the paths is in the table, and a matrix is among them.
        """
        paths = list(paths)
        unknown = [path for path in matrices if path not in self.table]
        if not unknown or not self.table:
            return
        if not any(path in self.table for path in paths):
            nearest = difflib.get_close_matches(unknown[0], self.table, 1, 0.0)[
                0
            ]
            raise ValueError(
                f"roles: the roles know none of the parameters: {unknown[0]!r} "
                f"is not among them, and the nearest is {nearest!r}; take them "
                "from the model that is trained (jt.nnx.roles, jt.linen.roles)"
            )
        if not self.table.keys() <= set(paths):
            unused = next(path for path in self.table if path not in paths)
            warnings.warn(
                f"roles: the roles do not know the parameter {unknown[0]!r}, "
                f"and know {unused!r}, which is not there: do they describe "
                "the model before a change (convert, fuse)?",
                stacklevel=4,
            )

    def __call__(self, path: str, shape: tuple[int, ...]) -> Roles | None:
        """Return the roles of the path, or None if the table lacks it."""
        if path not in self.table:
            return None
        return _stacked(path, shape, self.table[path])


@checked
def by_path(rules: Mapping[str, Roles], strict: bool = True) -> Rule:
    r"""Build a rule from regular expressions over paths.

    Args:
      rules: {regex: roles}; the regex must match the whole path ("a/b/0/kernel"), the
        first match wins. A leaf may have more axes than roles: the leading ones are
        "batch".
      strict: raise (in `init`) for a regex that matches nothing or that an earlier one
        always precedes, and for a leaf that nothing matches.

    Returns:
      A rule for `roles=`.

    Raises:
      ValueError: unknown role, or a regex that does not compile.

    Example:
      >>> rule = by_path({r".*/kernel": ("in", "out"), r".*/bias": ("none",)})
      >>> rule("a/kernel", (5, 3, 4))
      ('batch', 'in', 'out')
    """
    for pattern, roles in rules.items():
        _check_words(pattern, roles)
        check_regex("roles: the rule", pattern)
    patterns = tuple(
        (pattern, tuple(roles)) for pattern, roles in rules.items()
    )
    return Rule(patterns, strict)


@checked
def exact(roles: Mapping[str, Roles], assumed: Iterable[str] = ()) -> Exact:
    """Build a rule from exact paths; it returns None for every other leaf.

    Args:
      roles: {path: roles}; a leaf may have more axes, the leading ones are "batch".
      assumed: paths for which the position of a "batch" axis is an assumption;
        `describe` marks them.

    Example:
      >>> exact({"a/kernel": ("in", "out")})("a/kernel", (5, 3, 4))
      ('batch', 'in', 'out')
    """
    return Exact(dict(roles), frozenset(assumed))


@checked
def infer(path: str, shape: tuple[int, ...]) -> Roles | None:
    """Return roles where a Flax name fixes the meaning, else None; never guess.

    Args:
      path: "encoder/Dense_0/kernel".
      shape: shape of the leaf; only its rank is used.

    Returns:
      Roles for kernels below `Dense_n`, `Conv_n`, `query|key|value|out` and the gates
      of recurrent cells (`hi`, `if`, `dense_h`, ...), for `embedding`, `lora_a`,
      `lora_b`, and for `scale`, `bias` and `gain` of rank 1, else None. A rank that the
      name does not explain gives None as well, and so does a Conv kernel of rank 5
      (3-D, or 2-D and stacked?). Rank 4 is read as a 2-D convolution; a stacked 1-D one
      looks the same unless Flax named it ("VmapConv_0"): use the model's `roles`.

    Example:
      >>> infer("Dense_0/kernel", (3, 4)), infer("mystery/kernel", (3, 4, 5))
      (('in', 'out'), None)
    """
    *parents, name = path.split("/")
    parent = parents[-1] if parents else ""
    rank = len(shape)
    if name in ("scale", "bias", "gain"):
        return ("none",) if rank == 1 else None
    if name in ("embedding", "lora_a", "lora_b"):
        return _DENSE if rank == 2 else None
    if name != "kernel" or any(map(_LIFTED.match, parents)):
        return None
    if _GATES.match(parent):
        return _DENSE if rank == 2 else None
    if parent in ("query", "key", "value") and rank == 3:
        return ("in", "out", "out")
    if parent == "out" and rank == 3:
        return ("in", "in", "out")
    layer = _LAYERS.match(parent)
    if layer and layer[1] == "Dense":
        return _DENSE if rank == 2 else None
    if layer and layer[1] in ("Conv", "WSConv"):
        return ("in",) * (rank - 1) + ("out",) if rank in (3, 4) else None
    return None


_NOT_KERNELS = ("bias", "scale", "gain", "mean", "var")


@checked
def is_kernel(path: str, shape: tuple[int, ...]) -> bool:
    """Return whether weight decay usually applies: to kernels and embeddings.

    Args:
      path: "block/0/conv/kernel"; only the last key counts.
      shape: shape of the leaf; vectors and scalars are never kernels.

    Example:
      >>> is_kernel("conv/kernel", (3, 3, 8, 8)), is_kernel("norm/scale", (8,))
      (True, False)
    """
    name = path.rsplit("/", 1)[-1]
    return len(shape) >= 2 and name not in _NOT_KERNELS


@checked
def describe(params: Params, roles: Any) -> _table.Table:
    """Tabulate what a rule decides for each leaf.

    Args:
      params: pytree of arrays, ShapeDtypeStructs or boxes around them; None leaves are
        left out.
      roles: anything `roles=` takes.

    Returns:
      A table (its `str()` is text) of path, shape and roles; "by rank and size" where
      the rule returns None, so that the transform follows its reference. Notes count
      those leaves, and the ones whose stacked axis is an assumption.

    Raises:
      ValueError: as `leaf_roles`.

    Example:
      >>> print(describe({"Dense_0": {"kernel": np.ones((3, 4))}, "w": np.ones((2, 3, 4))}, infer))
      parameter       shape  roles
      --------------  -----  ----------------
      Dense_0/kernel  3x4    in out
      w               2x3x4  by rank and size
      1 of 2 leaves: by rank and size, as the transform's reference does without `roles`, \
which cannot tell stacked layers and heads; take the roles from the model \
(jt.nnx.roles, jt.linen.roles) or write roles.by_path
    """
    if callable(params) or isinstance(params, Rule | Exact):
        raise ValueError(
            "roles.describe: `params` is a rule: the parameters come first, "
            "describe(params, roles)"
        )
    leaves = _tree.leaves_with_paths(params)
    assumed = roles.assumed if isinstance(roles, Exact) else frozenset()
    rows = []
    undecided = []
    for (path, leaf), axis_roles in zip(
        leaves, leaf_roles(roles, params), strict=True
    ):
        shape = "x".join(map(str, np.shape(leaf))) or "scalar"
        decision = _decision(leaf, axis_roles, path in assumed)
        rows.append((path, shape, decision))
        if decision == _BY_RANK:
            undecided.append(leaf)
    decisions = [decision for _, _, decision in rows]
    notes = _notes(decisions, undecided, isinstance(roles, Exact))
    return _table.make(("parameter", "shape", "roles"), rows, notes)


@checked
def leaf_roles(roles: Any, params: Params) -> list[Roles | None]:
    """Return the roles of every leaf in flattening order; None = the reference's rule.

    Args:
      roles: None, a function (path, shape) -> roles or None, a `Rule`, or a tree of
        roles with the structure of params.
      params: pytree of arrays (or shapes); None leaves and optax.MaskedNode have no
        entry.

    Raises:
      ValueError: a strict rule that does not fit, an unknown role, or a wrong number of
        roles.
    """
    leaves = _tree.leaves_with_paths(params)
    if roles is None:
        return [None] * len(leaves)
    _check_rule(roles)
    paths = [path for path, _ in leaves]
    # Under optax.masked a rule sees a part of the parameters and cannot be judged.
    is_whole = leaves and not _tree.has_masked(params)
    if isinstance(roles, Rule) and roles.strict and is_whole:
        roles.check(paths)
    if isinstance(roles, Exact) and is_whole:
        roles.check(paths, [path for path, leaf in leaves if np.ndim(leaf) > 1])
    if callable(roles):
        per_leaf = [roles(path, np.shape(leaf)) for path, leaf in leaves]
    else:
        # optax calls init with an empty tree to locate the parameters in a state.
        per_leaf = _flatten_like(params, roles) if leaves else []
    return [
        _checked(path, np.shape(leaf), axis_roles)
        for (path, leaf), axis_roles in zip(leaves, per_leaf, strict=True)
    ]


def _check_rule(roles: Any) -> None:
    """Raise for what is neither a function, a rule nor a tree of roles."""
    # Flax is not imported here, so a module is recognized by where its class lives.
    bases = type(roles).__mro__
    if callable(roles) and any(c.__module__.startswith("flax.") for c in bases):
        raise ValueError(
            "roles: `roles` is a model: pass its roles, jt.nnx.roles(model) or "
            "jt.linen.roles(module, x)"
        )
    if isinstance(roles, str | bytes | bool | int | float | complex | type):
        raise ValueError(
            f"roles: `roles` is a {type(roles).__name__}: give a function "
            "(path, shape) -> roles, a rule (roles.by_path, jt.nnx.roles) or a "
            "tree of roles"
        )


def positions(roles: Roles, *words: str) -> tuple[int, ...]:
    """Return the indices of the axes whose role is one of the words."""
    return tuple(i for i, role in enumerate(roles) if role in words)


@dataclasses.dataclass(frozen=True)
class MatrixView:
    """Describe a leaf as matrices [prod(in), prod(out)], one per index of the rest.

    Attributes:
      batch: axes that are neither, "batch" and "none": each index along them is a
        matrix of its own.
      in_axes: axes that a layer sums over, the rows.
      out_axes: axes that remain, the columns.
    """

    batch: tuple[int, ...]
    in_axes: tuple[int, ...]
    out_axes: tuple[int, ...]


@checked
def matrix_view(params: Params, roles: Any) -> Any:
    """Return which axes make every leaf a matrix, for optimizers of matrices.

    Args:
      params: pytree of arrays or shapes.
      roles: anything `roles=` takes.

    Returns:
      A tree with the structure of params and in place of every leaf a `MatrixView`, or
      None: biases, scales and scalars, leaves without elements, and leaves that the
      rule has no roles for. Embeddings and classifiers are matrices; `exclude` leaves
      them out. The kernel of a grouped convolution is one matrix, not one per group,
      since its roles do not tell the groups apart.

    Raises:
      ValueError: as `leaf_roles`.

    Example:
      >>> rule = by_path({"q": ("in", "out", "out"), "bias": ("none",)})
      >>> views = matrix_view({"q": np.ones((5, 8, 2, 4)), "bias": np.ones(4)}, rule)
      >>> views["q"], views["bias"]
      (MatrixView(batch=(0,), in_axes=(1,), out_axes=(2, 3)), None)
    """
    leaves, structure = jax.tree.flatten(params)
    axis_roles = leaf_roles(roles, params)
    views = map(_matrix_view, leaves, axis_roles)
    return jax.tree.unflatten(structure, views)


def _matrix_view(leaf: Any, roles: Roles | None) -> MatrixView | None:
    if roles is None or 0 in np.shape(leaf):
        return None
    in_axes = positions(roles, "in")
    out_axes = positions(roles, "out")
    if not in_axes or not out_axes:
        return None
    return MatrixView(positions(roles, "batch", "none"), in_axes, out_axes)


@dataclasses.dataclass(frozen=True)
class Exclude:
    """Choose the paths that no pattern matches; the result of `exclude`.

    Attributes:
      patterns: regular expressions of what is left out.
    """

    patterns: tuple[str, ...]

    def __call__(self, path: str) -> bool:
        """Return whether the parameter stays."""
        return not any(_matches(pattern, path) for pattern in self.patterns)

    def check(self, params: Params) -> None:
        """Raise if a pattern matches no parameter.

        optax.masked hides parameters, so under it nothing is judged; nor is an empty
        tree, with which optax locates the parameters in a state.
        """
        paths = [path for path, _ in _tree.leaves_with_paths(params)]
        if not paths or _tree.has_masked(params):
            return
        for pattern in self.patterns:
            if not any(_matches(pattern, path) for path in paths):
                raise ValueError(
                    f"roles.exclude: {pattern!r} matches no parameter; paths "
                    f"look like {_some(paths)}"
                )


@checked
def exclude(*regex: str) -> Exclude:
    r"""Build a `path_filter=` that takes everything but these parameters.

    A regex must match the whole path of a parameter, or the whole path of a module
    above it ("head" leaves out all below head). One that matches nothing raises in
    `init`, unless optax.masked hides part of the parameters.

    Args:
      *regex: regular expressions over paths such as "block/0/conv/kernel".

    Returns:
      predicate(path) -> bool, False = left out: not clipped (`agc`), or left to Adam
      (`memopt.muon`).

    Raises:
      ValueError: a regex that does not compile.

    Example:
      >>> path_filter = exclude("head/kernel", r".*/scale")
      >>> [path_filter(path) for path in ("head/kernel", "head/bias", "norm/scale")]
      [False, True, False]
    """
    for pattern in regex:
        check_regex("roles.exclude:", pattern)
    return Exclude(tuple(regex))


def _matches(pattern: str, path: str) -> bool:
    """Return whether the pattern matches the path or that of a module above it."""
    keys = path.split("/")
    return any(
        re.fullmatch(pattern, "/".join(keys[:n]))
        for n in range(1, len(keys) + 1)
    )


def _flatten_like(params: Params, roles: Any) -> list[Any]:
    def empty(x: Any) -> bool:
        return x is None or _tree.is_masked(x)

    # A tree of roles may have an entry where params has None or a masked leaf.
    leaves, structure = jax.tree.flatten(params, is_leaf=empty)
    try:
        roles = structure.flatten_up_to(roles)
    except ValueError:
        raise ValueError(
            f"roles: `roles` is a {type(roles).__name__} whose structure is "
            "not that of the parameters: give a tuple of roles in place of "
            "every parameter, or a function or a rule"
        ) from None
    return [r for x, r in zip(leaves, roles, strict=True) if not empty(x)]


def _checked(path: str, shape: tuple[int, ...], roles: Any) -> Roles | None:
    if roles is None:
        return None
    _check_words(path, roles)
    if len(roles) != len(shape):
        raise ValueError(
            f"roles: {path!r} has shape {tuple(shape)} but the roles "
            f"{tuple(roles)}; give one per axis"
        )
    return tuple(roles)


def _check_words(name: str, roles: Any) -> None:
    is_sequence = isinstance(roles, tuple | list)
    if not is_sequence or not all(isinstance(role, str) for role in roles):
        what = repr(roles) if isinstance(roles, str) else described(roles)
        raise ValueError(
            f"roles: roles of {name!r} are {what}; use a tuple of {', '.join(ROLES)}"
        )
    if any(role not in ROLES for role in roles):
        raise ValueError(
            f"roles: roles of {name!r} are {tuple(roles)}; use a tuple of "
            f"{', '.join(ROLES)}"
        )


def _stacked(path: str, shape: tuple[int, ...], roles: Roles) -> Roles:
    if len(shape) < len(roles):
        raise ValueError(
            f"roles: {path!r} has shape {tuple(shape)} but the rule gives {roles}; "
            'give one role per axis (only leading axes may go without: they are "batch")'
        )
    return ("batch",) * (len(shape) - len(roles)) + roles


_BY_RANK = "by rank and size"
_ASSUMED = " (assumed)"


def _decision(leaf: Any, roles: Roles | None, assumed: bool) -> str:
    if np.ndim(leaf) == 0:
        return "scalar"
    if roles is None:
        return _BY_RANK
    return " ".join(roles) + (_ASSUMED if assumed else "")


def _notes(decisions: list[str], by_rank: list[Any], exact: bool) -> list[str]:
    """Say what to do about leaves without roles, and about assumptions."""
    # Roles change nothing for a vector, so exact rules count matrices alone.
    undecided = sum(np.ndim(x) > 1 or not exact for x in by_rank)
    assumed = sum(decision.endswith(_ASSUMED) for decision in decisions)
    notes = []
    if undecided:
        cure = (
            "no layer that the model's roles know has them; write "
            "roles.by_path for them"
            if exact
            else "take the roles from the model (jt.nnx.roles, jt.linen.roles) or write roles.by_path"
        )
        notes.append(
            f"{undecided} of {len(decisions)} leaves: {_BY_RANK}, as the "
            "transform's reference does without `roles`, which cannot tell "
            f"stacked layers and heads; {cure}"
        )
    if assumed:
        notes.append(
            f"{assumed} of {len(decisions)} leaves{_ASSUMED}: their sizes do "
            "not show which axis was stacked, so the first that fits is taken; "
            "if it is another one, write roles.by_path"
        )
    return notes


def _some(paths: list[str]) -> str:
    return ", ".join(repr(p) for p in paths[:3]) or "nothing (no parameters)"
