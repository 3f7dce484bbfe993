#!/bin/sh
# jnp.zeros_like loses an explicit sharding while it is traced, unless the mesh is in force.
#
# Seen with jax 0.12.0.1 and 0.11.0; jax 0.10.2, 0.10.0, 0.9.0, 0.8.0 and 0.7.2 keep the sharding.
# - The same for ones_like, full_like and lax.full_like, and for a mesh of devices as for an
#   AbstractMesh. `x * 0` keeps the sharding on all.
# - Under jax.sharding.use_abstract_mesh nothing is lost.
# - jax.jit(jnp.zeros_like)(x) outside of the mesh: the result lies whole on one device. jax 0.10.2
#   raises there.
#
# In consequence the state of an optimizer comes out replicated, and nothing warns, where its
# shardings are read off jax.eval_shape(tx.init, params): optax makes moments with zeros_like.
#
# Output:
#   jax 0.10.2
#   zeros_like: ('x', None)
#   times 0: ('x', None)
#   adam's mu: ('x', None)
#   zeros_like in the mesh: ('x', None)
#   jax 0.12.0.1
#   zeros_like: None
#   times 0: ('x', None)
#   adam's mu: None
#   zeros_like in the mesh: ('x', None)

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
import optax
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

mesh = AbstractMesh((8,), ("x",), axis_types=(AxisType.Explicit,))
sharding = NamedSharding(mesh, PartitionSpec("x", None))
w = jax.ShapeDtypeStruct((8, 4), jnp.float32, sharding=sharding)

def spec(fn):
    there = jax.eval_shape(fn, w).sharding
    return None if there is None else tuple(there.spec)

def moments(w):
    return optax.adam(1e-3).init(w)[0].mu

print("jax", jax.__version__)
shown = {"zeros_like": spec(jnp.zeros_like), "times 0": spec(lambda x: x * 0)}
shown["adam's mu"] = spec(moments)
with jax.sharding.use_abstract_mesh(mesh):
    shown["zeros_like in the mesh"] = spec(jnp.zeros_like)
for name, value in shown.items():
    print(f"{name}: {value}")
lost = None if sys.argv[1] == "lost" else ("x", None)
sys.exit(list(shown.values()) != [lost, ("x", None), lost, ("x", None)])
END
try() {
  "$python" -m venv "$folder/$1"
  "$folder/$1/bin/pip" install -q --disable-pip-version-check "jax==$1" optax==0.2.8
  JAX_PLATFORMS=cpu "$folder/$1/bin/python" "$folder/show.py" "$2"
}
try 0.10.2 kept
try "${JAX:-0.12.0.1}" lost
