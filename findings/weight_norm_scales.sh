#!/bin/sh
# nnx.WeightNorm: its scales train since flax 0.12.11, under a path that holds a tuple.
#
# Seen with flax 0.12.12 on jax 0.12.0.1 and flax 0.12.8 on jax 0.10.2.
# - Up to flax 0.12.10 the scales are plain arrays: nnx.state(model, nnx.Param) lacks them and an
#   optimizer leaves them at 1. Since 0.12.11 (withdrawn) and 0.12.12 they are nnx.Param: the same
#   program trains more parameters, and the state of its optimizer has another structure.
#   google/flax#5577 asked for it.
# - On all of them the path of a scale is ("scales", ("kernel",)): one of its keys is a tuple. What
#   joins keys to a name fails, among others flax.traverse_util.flatten_dict(..., sep="/").
#
# Output:
#   flax 0.12.8 jax 0.10.2
#   all: [('layer_instance', 'bias'), ('layer_instance', 'kernel'), ('scales', ('kernel',))]
#   parameters: [('layer_instance', 'bias'), ('layer_instance', 'kernel')]
#   flatten_dict: sequence item 1: expected str instance, tuple found
#   flax 0.12.12 jax 0.12.0.1
#   all: [('layer_instance', 'bias'), ('layer_instance', 'kernel'), ('scales', ('kernel',))]
#   parameters: [('layer_instance', 'bias'), ('layer_instance', 'kernel'), ('scales', ('kernel',))]
#   flatten_dict: sequence item 1: expected str instance, tuple found

set -eu
for python in "${PYTHON:-none}" python3.13 python3.12 python3.14 \
  "$HOME"/.pyenv/versions/3.1[2-4].*/bin/python; do
  "$python" -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null && break
done
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/show.py" <<'END'
import sys

import flax
import jax
from flax import nnx, traverse_util

model = nnx.WeightNorm(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0))
paths = lambda state: [path for path, _ in state.flat_state()]
print("flax", flax.__version__, "jax", jax.__version__)
print("all:", paths(nnx.state(model)))
print("parameters:", params := paths(nnx.state(model, nnx.Param)))
try:
    joined = traverse_util.flatten_dict(nnx.to_pure_dict(nnx.state(model)), sep="/")
except (TypeError, ValueError) as error:
    joined = None
    print("flatten_dict:", error)
scale = ("scales", ("kernel",))
trains = sys.argv[1] == "trains"
sys.exit(joined is not None or scale not in paths(nnx.state(model)) or (scale in params) != trains)
END
try() {
  "$python" -m venv "$folder/$1"
  "$folder/$1/bin/pip" install -q --disable-pip-version-check "flax==$1" "jax==$2"
  JAX_PLATFORMS=cpu "$folder/$1/bin/python" "$folder/show.py" "$3"
}
try 0.12.8 0.10.2 still
try "${FLAX:-0.12.12}" "${JAX:-0.12.0.1}" trains
