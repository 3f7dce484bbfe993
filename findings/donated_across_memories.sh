#!/bin/sh
# jax.jit pairs a donated array with a result of its shape in another memory, and the TPU's compiler
# fails: "Unimplemented DMA from hbm to hbm".
#
# Seen with jax 0.12.0.1 and libtpu 0.0.50.1, compiled for v5e:2x2 without a TPU. Donated arrays and
# results are paired by shape and dtype, in order. The kind of memory takes part only where
# out_shardings give it for every result (mlir._set_up_aliases), although each result's type says
# whether it is on the host. A step that takes (state, params) and returns (params, state) gives the
# buffer of a state on the host to the new parameters.
#
# So a step with donated arrays on the host returns them in the order in which it takes them, or is
# jitted with out_shardings.
#
# Output:
#   jax 0.12.0.1, libtpu 0.0.50.1
#   same order: compiles
#   other order: FAILED_PRECONDITION: Unimplemented DMA from hbm to hbm.
#   other order, out_shardings: compiles

set -eu
for python in "${PYTHON:-none}" python3.13 python3.12 python3.14 \
  "$HOME"/.pyenv/versions/3.1[2-4].*/bin/python; do
  "$python" -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null && break
done
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/show.py" <<'EOF'
import os
import sys
from importlib.metadata import version

os.environ.update(
    JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", TPU_ACCELERATOR_TYPE="v5litepod-4",
    TPU_WORKER_HOSTNAMES="localhost", TPU_WORKER_ID="0",
)

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

chips = topologies.get_topology_desc(
    platform="tpu", topology_name="v5e:2x2", chips_per_host_bounds=(2, 2, 1)
)
chip = SingleDeviceSharding(chips.devices[0])
host = chip.with_memory_kind("pinned_host")
params = jax.ShapeDtypeStruct((4096, 4096), jnp.float32, sharding=chip)
state = jax.ShapeDtypeStruct((4096, 4096), jnp.float32, sharding=host)

def step(params, state):
    new = 0.9 * jax.device_put(state, jax.memory.Space.Device) + params
    return params - new, jax.device_put(new, jax.memory.Space.Host)

def other(state, params):
    return step(params, state)

def compiles(fn, *args, **kwargs):
    try:
        jax.jit(fn, donate_argnums=(0, 1), **kwargs).lower(*args).compile()
    except jax.errors.JaxRuntimeError as error:
        return str(error).splitlines()[0]
    return "compiles"

print(f"jax {jax.__version__}, libtpu {version('libtpu')}")
outcomes = {
    "same order": compiles(step, params, state),
    "other order": compiles(other, state, params),
    "other order, out_shardings": compiles(other, state, params, out_shardings=(chip, host)),
}
print("\n".join(f"{name}: {outcome}" for name, outcome in outcomes.items()))
sys.exit([outcome == "compiles" for outcome in outcomes.values()] != [True, False, True])
EOF
"$python" -m venv "$folder/env"
"$folder/env/bin/pip" install -q --disable-pip-version-check \
  "jax==${JAX:-0.12.0.1}" "jaxlib==${JAX:-0.12.0.1}" "libtpu==${LIBTPU:-0.0.50.1}"
"$folder/env/bin/python" "$folder/show.py"
