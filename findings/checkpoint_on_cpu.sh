#!/bin/sh
# jax.checkpoint saves memory on XLA's CPU backend since jaxlib 0.11.2; before, it costs memory.
#
# Seen with jax 0.12.0.1 and 0.11.2 on one side, 0.11.0, 0.10.2, 0.10.0, 0.9.0, 0.8.0 and 0.7.2 on
# the other. What keeps the second forward pass apart from the first is lax.optimization_barrier.
# The older backend deletes the barriers before it merges common subexpressions: what remains is
# the program without jax.checkpoint (as many operations), in more memory. In the body of a
# lax.scan jax.checkpoint saves memory on 0.12.0.1, 0.10.2 and 0.7.2 alike.
#
# So what a test on CPU says of rematerialization depends on the version.
#
# Bytes of temporaries of value_and_grad of 16 layers tanh(x @ w), four to a checkpointed block,
# x [1024, 128], w [128, 128].
#
# Output:
#   jax 0.10.2: plain 8912896, checkpoint 10485760, operations x1.00
#   jax 0.12.0.1: plain 8912896, checkpoint 4194304, operations x1.34

set -eu
for python in "${PYTHON:-none}" python3.13 python3.12 python3.14 \
  "$HOME"/.pyenv/versions/3.1[2-4].*/bin/python; do
  "$python" -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null && break
done
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/show.py" <<'END'
import sys

import jax
import jax.numpy as jnp

def block(ws, x):
    for w in ws:
        x = jnp.tanh(x @ w)
    return x

def measured(wrap):
    def loss(ws, x):
        for i in range(0, 16, 4):
            x = wrap(block)(ws[i : i + 4], x)
        return (x**2).mean()

    ws = [jax.ShapeDtypeStruct((128, 128), jnp.float32)] * 16
    x = jax.ShapeDtypeStruct((1024, 128), jnp.float32)
    compiled = jax.jit(jax.value_and_grad(loss)).lower(ws, x).compile()
    return compiled.memory_analysis().temp_size_in_bytes, compiled.cost_analysis()["flops"]

plain, saved = measured(lambda f: f), measured(jax.checkpoint)
operations = f"operations x{saved[1] / plain[1]:.2f}"
print(f"jax {jax.__version__}: plain {plain[0]}, checkpoint {saved[0]}, {operations}")
works = saved[0] < plain[0] and saved[1] > 1.2 * plain[1]
sys.exit(works != (sys.argv[1] == "works"))
END
try() {
  "$python" -m venv "$folder/$1"
  "$folder/$1/bin/pip" install -q --disable-pip-version-check "jax==$1"
  JAX_PLATFORMS=cpu "$folder/$1/bin/python" "$folder/show.py" "$2"
}
try 0.10.2 fails
try "${JAX:-0.12.0.1}" works
