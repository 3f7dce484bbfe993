"""Update a scanned stack of layers in its backward pass, a layer at a time."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxtricks import _tree
from jaxtricks._arguments import checked
from jaxtricks._typing import Params, State

Update = Callable[[Any], tuple[Any, Params, State]]
"""update(dy) -> (dx, new params, new state)"""


@checked
def release_gradients(
    layer: Callable[..., Any],
    tx: optax.GradientTransformation,
    params: Params,
    state: State,
    x: Any,
    xs: Any = None,
) -> tuple[Any, Update]:
    """Return the output of a stack of layers, and its backward pass with the updates.

        x_0 = x,  x_{i+1} = layer(params_i, x_i),  y = x_L
        dx_i, g_i = vjp of layer at (params_i, x_i), of dx_{i+1};  dx_L = dy
        params_i, state_i <- the step of tx on g_i

    `lax.scan` stacks the gradients of all layers before the optimizer sees the first;
    here the gradient of one layer is alive at a time. Layers written out in a Python
    loop need no such thing: XLA runs each update right after its gradient.

    It stands where `jax.vjp` of the stack would, inside the jit of the step; donate
    params and state, which are written in place. What comes before the stack and after
    it is differentiated by jax.vjp (see the example) and updated as usual. Of the
    forward pass the inputs of the layers are kept, and each layer runs a second time,
    as with `jax.checkpoint` around it. (On CPU with a jaxlib before 0.11.2 XLA copies
    params and state: there it costs more than it saves.)

    It can't do what needs all gradients before the first update: clipping by the global
    norm, skipping a step whose gradients overflow, accumulating gradients, a second use
    of the same parameters. A clip inside `tx` is of one layer. What `layer` closes over
    is constant: it gets no gradient.

    Args:
      layer: layer(params of one layer, x) -> x, or layer(params, x, xs of the layer);
        the structure, shapes and dtypes of x stay.
      tx: any optax transformation.
      params: parameters of all L layers, arrays [L, ...].
      state: `jax.vmap(tx.init)(params)`, arrays [L, ...].
      x: the input of the first layer, a pytree of floating arrays.
      xs: other inputs of each layer, arrays [L, ...], for example keys; no gradient.

    Returns:
      (y, update): the output of the last layer, and update(dy) -> (dx, params, state),
      which takes the gradient of the loss by y.

    Raises:
      ValueError: arrays of params, state and xs without the same leading axis.

    Example:
      >>> layer = lambda w, x: x + jnp.tanh(x @ w)
      >>> tx = optax.sgd(0.5)
      >>> params = {"head": jnp.ones(3), "layers": jnp.ones((4, 3, 3)) / 3}
      >>> @jax.jit
      ... def step(params, state, x):
      ...     y, update = release_gradients(layer, tx, params["layers"], state, x)
      ...     loss, vjp = jax.vjp(lambda w, y: jnp.mean((y @ w) ** 2), params["head"], y)
      ...     d_head, dy = vjp(jnp.ones_like(loss))
      ...     _, layers, state = update(dy)
      ...     head = params["head"] - 1e-3 * d_head
      ...     return {"head": head, "layers": layers}, state, loss
      >>> state = jax.vmap(tx.init)(params["layers"])
      >>> params, state, loss = step(params, state, jnp.ones((2, 3)))
      >>> params["layers"].shape
      (4, 3, 3)

    References:
      Lv, Yang, Liu, Gao, Guo, Qiu, "Full Parameter Fine-tuning for Large Language Models
      with Limited Resources", arXiv 2306.09782 (LOMO, algorithm 1).
    """
    length = _length(params, state, xs)

    def run(w: Params, x: Any, more: Any) -> Any:
        return layer(w, x) if xs is None else layer(w, x, more)

    def forward(x: Any, inputs: Any) -> tuple[Any, Any]:
        w, more = inputs
        return run(w, x, more), x

    y, layer_inputs = jax.lax.scan(forward, x, (params, xs), length=length)

    def update(dy: Any) -> tuple[Any, Params, State]:
        def backward(carry: Any, inputs: Any) -> tuple[Any, None]:
            dx, stacked = carry
            i, x, more = inputs
            # The carry is updated in place if nothing reads it after the first write.
            # XLA for CPU fuses such reads into the writes, and copies all of it, unless
            # barriers say otherwise.
            w, s = jax.lax.optimization_barrier(_at(stacked, i))
            _, vjp = jax.vjp(lambda w, x: run(w, x, more), w, x)
            gradient, dx = vjp(dx)
            updates, s = tx.update(gradient, s, w)
            new = optax.apply_updates(w, updates), s
            dx, new = jax.lax.optimization_barrier((dx, new))
            return (dx, _with(stacked, new, i)), None

        # Stacked results of a scan (ys) never take the place of its inputs (xs).
        (dx, (new_params, new_state)), _ = jax.lax.scan(
            backward,
            (dy, (params, state)),
            (jnp.arange(length), layer_inputs, xs),
            reverse=True,
        )
        return dx, new_params, new_state

    return y, update


def _length(params: Params, state: State, xs: Any) -> int:
    """Return the number of layers; raise where arrays disagree."""
    lengths: dict[int | None, str] = {}
    for name, tree in (("params", params), ("state", state), ("xs", xs)):
        for path, leaf in _tree.leaves_with_paths(tree):
            where = f"`{name}`" + (f" at {path!r}" if path else "")
            lengths.setdefault((*jnp.shape(leaf), None)[0], where)
    if len(lengths) == 1 and lengths.keys().isdisjoint({None, 0}):
        return next(int(n) for n in lengths if n is not None)
    found = ", ".join(
        f"{where} has {'no axis' if n is None else n}"
        for n, where in lengths.items()
    )
    raise ValueError(
        "memopt.release_gradients: every array needs a leading axis of the same "
        f"length, one entry per layer ({found or 'there are no arrays'}): stack "
        "`params`, and make `state` with jax.vmap(tx.init)(params)"
    )


def _at(tree: Any, i: Any) -> Any:
    return jax.tree.map(
        lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), tree
    )


def _with(tree: Any, new: Any, i: Any) -> Any:
    return jax.tree.map(
        lambda x, y: jax.lax.dynamic_update_index_in_dim(x, y, i, 0), tree, new
    )
