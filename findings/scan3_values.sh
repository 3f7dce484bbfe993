#!/bin/sh
# Under jax_scan3, lax.scan computes other values, and nothing warns: reverse=True runs from the
# first element on, and within jax.jit a loop that stacks no outputs returns the carry it started
# with, since the loop is removed as dead code.
#
# Seen with jax 0.12.0.1 (`reverse` with 0.10.2, too). jax_scan3 is off unless one asks for it
# ("embrace the future of loops"). Its gradient and vmap raise NotImplementedError, so what runs
# under it is a forward pass or an optimizer's loop, which goes wrong in silence.
#
# Output:
#   jax 0.12.0.1
#   without the flag: [2.0, 4.0, 8.0] 6.0 6.0
#   with it: [0.0, 0.0, 8.0] 6.0 0.0

set -eu
for python in "${PYTHON:-none}" python3.13 python3.12 python3.14 \
  "$HOME"/.pyenv/versions/3.1[2-4].*/bin/python; do
  "$python" -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null && break
done
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check "jax==${JAX:-0.12.0.1}"
JAX_PLATFORMS=cpu "$folder/venv/bin/python" - <<'END'
import sys

import jax
import jax.numpy as jnp

def discounted(rewards):
    step = lambda later, reward: (reward + 0.5 * later, reward + 0.5 * later)
    return jax.lax.scan(step, 0.0, rewards, reverse=True)[1].tolist()

def total(xs):
    return jax.lax.scan(lambda carry, x: (carry + x, None), 0.0, xs)[0]

def values():
    jax.clear_caches()
    xs = jnp.arange(4.0)
    return discounted(jnp.asarray([0.0, 0.0, 8.0])), float(total(xs)), float(jax.jit(total)(xs))

print("jax", jax.__version__)
print("without the flag:", *(now := values()))
jax.config.update("jax_scan3", True)
print("with it:", *(then := values()))
sys.exit((now, then) != (([2.0, 4.0, 8.0], 6.0, 6.0), ([0.0, 0.0, 8.0], 6.0, 0.0)))
END
