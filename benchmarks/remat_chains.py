"""Deep networks as chains of blocks, and the ways to place a recompute wrapper on a chain by hand."""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax

Block = Callable[[Any, Any], Any]  # (parameters, activations) -> activations
Wrap = Callable[[Block], Block]
Chain = Callable[
    [Sequence[Block], Any, Any], Any
]  # (blocks, their parameters, x) -> x


def plain(blocks: Sequence[Block], params: Any, x: Any) -> Any:
    """One block after the other, everything kept."""
    for block, p in zip(blocks, params, strict=True):
        x = block(p, x)
    return x


def each(wrap: Wrap) -> Chain:
    """Every block wrapped."""
    return lambda blocks, params, x: plain([wrap(b) for b in blocks], params, x)


def segments(wrap: Wrap, inner: Chain = plain) -> Chain:
    """About sqrt(n) wrapped segments; `inner` runs the blocks of each."""

    def run(blocks: Sequence[Block], params: Any, x: Any) -> Any:
        n = len(blocks)
        k = math.isqrt(n - 1) + 1
        bounds = [i * n // k for i in range(k + 1)]
        for a, b in itertools.pairwise(bounds):
            x = wrap(lambda p, x, part=blocks[a:b]: inner(part, p, x))(
                params[a:b], x
            )
        return x

    return run


def halves(wrap: Wrap) -> Chain:
    """The first half wrapped, and both halves treated alike: live activations grow with log(n)."""

    def run(blocks: Sequence[Block], params: Any, x: Any) -> Any:
        n = len(blocks) // 2
        if n == 0:
            return plain(blocks, params, x)
        x = wrap(lambda p, x: run(blocks[:n], p, x))(params[:n], x)
        return run(blocks[n:], params[n:], x)

    return run


def scanned(wrap: Wrap = lambda block: block) -> Chain:
    """`lax.scan` over stacked parameters, the body wrapped."""

    def run(blocks: Sequence[Block], params: Any, x: Any) -> Any:
        body = wrap(blocks[0])
        return jax.lax.scan(lambda x, p: (body(p, x), None), x, params)[0]

    return run


def two_level(wrap: Wrap, inner: Chain) -> Chain:
    """A scan over sqrt(n) wrapped scans, which `inner` runs; sqrt(n) must be an integer."""

    def run(blocks: Sequence[Block], params: Any, x: Any) -> Any:
        k = math.isqrt(len(blocks))
        rows = jax.tree.map(lambda a: a.reshape(k, -1, *a.shape[1:]), params)
        row = wrap(lambda p, x: inner(blocks[:k], p, x))
        return jax.lax.scan(lambda x, p: (row(p, x), None), x, rows)[0]

    return run


@dataclass(frozen=True)
class Model:
    """A chain of blocks between an embedding and a head that gives the loss.

    Attributes:
      name: for tables.
      draw: key -> (params, batch); params has "embed", "blocks" and "head".
      blocks: the functions of the chain.
      embed: (params["embed"], batch) -> x.
      head: (params["head"], x, batch) -> loss.
      feed: (params["blocks"], batch) -> parameters of the blocks, a sequence or stacked.
      chain: how the blocks run where no other way is asked for.
    """

    name: str
    draw: Callable[[Any], tuple[Any, Any]]
    blocks: tuple[Block, ...]
    embed: Callable[[Any, Any], Any]
    head: Callable[[Any, Any, Any], Any]
    feed: Callable[[Any, Any], Any] = lambda params, batch: params
    chain: Chain = plain

    def loss(self, chain: Chain | None = None) -> Callable[[Any, Any], Any]:
        """(params, batch) -> loss, the blocks run by `chain`."""
        run = chain or self.chain

        def fn(params: Any, batch: Any) -> Any:
            x = self.embed(params["embed"], batch)
            x = run(self.blocks, self.feed(params["blocks"], batch), x)
            return self.head(params["head"], x, batch)

        return fn

    def shapes(self) -> tuple[Any, Any]:
        """(params, batch) as ShapeDtypeStructs."""
        return jax.eval_shape(self.draw, jax.random.key(0))

    def arrays(self) -> tuple[Any, Any]:
        """(params, batch) as arrays."""
        return self.draw(jax.random.key(0))
