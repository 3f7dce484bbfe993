#!/bin/sh
# Under jax_scan3, lax.scan(..., reverse=True) runs from the first element on, and nothing warns.
#
# Seen with jax 0.12.0.1 and 0.10.2. jax_scan3 is off unless one asks for it ("embrace the future
# of loops"); its source says "TODO: don't ignore" beside `reverse` and `unroll`. So a program that
# runs under it need not compute what it did: returns discounted from the end, say.
#
# Output:
#   jax 0.12.0.1
#   without the flag: [2.0, 4.0, 8.0]
#   with it: [0.0, 0.0, 8.0]

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

rewards = jnp.asarray([0.0, 0.0, 8.0])
print("jax", jax.__version__)
print("without the flag:", now := discounted(rewards))
jax.config.update("jax_scan3", True)
print("with it:", then := discounted(rewards))
sys.exit((now, then) != ([2.0, 4.0, 8.0], [0.0, 0.0, 8.0]))
END
