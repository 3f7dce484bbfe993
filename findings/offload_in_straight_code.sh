#!/bin/sh
# Residuals that jax.checkpoint offloads to the host raise what a TPU needs in straight code, and
# lower it in lax.scan.
#
# Seen with jax 0.12.0.1 and libtpu 0.0.50.1, compiled for v5e:2x2 without a TPU. The same layers,
# the same policy (save_and_offload_only_these_names, "device" to "pinned_host"): in a Python loop
# the temporaries of the device grow although the copies are counted on the host; in lax.scan they
# fall. In straight code the originals stay until their copies are done, and all copies come back
# before the backward pass needs them.
#
# So an offloading policy has to be looked at with memory_analysis, and belongs into the body of a
# scan.
#
# MiB of temporaries of value_and_grad of 8 layers x + tanh(x @ w1) @ w2, bfloat16, x [4096, 512],
# w1 [512, 2048]; "offloaded" is x @ w1. nothing: jax.checkpoint without a policy.
#
# Output:
#   jax 0.12.0.1, libtpu 0.0.50.1
#   scanned, saved: 256, and 0 on the host
#   scanned, offloaded: 16, and 128 on the host
#   scanned, nothing: 0, and 0 on the host
#   unrolled, saved: 88, and 0 on the host
#   unrolled, offloaded: 185, and 128 on the host
#   unrolled, nothing: 31, and 0 on the host

set -eu
for python in "${PYTHON:-none}" python3.13 python3.12 python3.14 \
  "$HOME"/.pyenv/versions/3.1[2-4].*/bin/python; do
  "$python" -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null && break
done
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/show.py" <<'END'
import os
import sys
from importlib.metadata import version

os.environ.update(
    JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", TPU_ACCELERATOR_TYPE="v5litepod-4",
    TPU_WORKER_HOSTNAMES="localhost", TPU_WORKER_ID="0",
)

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

chips = topologies.get_topology_desc(
    platform="tpu", topology_name="v5e:2x2", chips_per_host_bounds=(2, 2, 1)
)
chip = SingleDeviceSharding(chips.devices[0])
offload = jax.checkpoint_policies.save_and_offload_only_these_names(
    names_which_can_be_saved=[], names_which_can_be_offloaded=["up"],
    offload_src="device", offload_dst="pinned_host",
)

def layer(x, w):
    return x + jnp.tanh(checkpoint_name(x @ w[0], "up")) @ w[1]

def scanned(wrap):
    body = wrap(layer)
    return lambda ws, x: jnp.mean(
        jax.lax.scan(lambda x, w: (body(x, w), None), x, ws)[0].astype(jnp.float32) ** 2
    )

def unrolled(wrap):
    body = wrap(layer)

    def loss(ws, x):
        for i in range(8):
            x = body(x, (ws[0][i], ws[1][i]))
        return jnp.mean(x.astype(jnp.float32) ** 2)

    return loss

WAYS = {
    "saved": lambda f: f,
    "offloaded": lambda f: jax.checkpoint(f, policy=offload),
    "nothing": jax.checkpoint,
}
shape = lambda *n: jax.ShapeDtypeStruct(n, jnp.bfloat16, sharding=chip)
args = (shape(8, 512, 2048), shape(8, 2048, 512)), shape(4096, 512)
temp = {}
print(f"jax {jax.__version__}, libtpu {version('libtpu')}")
for code in (scanned, unrolled):
    for way, wrap in WAYS.items():
        sizes = jax.jit(jax.value_and_grad(code(wrap))).lower(*args).compile().memory_analysis()
        temp[code, way] = sizes.temp_size_in_bytes / 2**20
        host = sizes.host_temp_size_in_bytes / 2**20
        print(f"{code.__name__}, {way}: {temp[code, way]:.0f}, and {host:.0f} on the host")
same = (
    temp[scanned, "offloaded"] < 0.7 * temp[scanned, "saved"]
    and temp[unrolled, "offloaded"] > temp[unrolled, "saved"]
)
sys.exit(not same)
END
"$python" -m venv "$folder/env"
"$folder/env/bin/pip" install -q --disable-pip-version-check \
  "jax==${JAX:-0.12.0.1}" "jaxlib==${JAX:-0.12.0.1}" "libtpu==${LIBTPU:-0.0.50.1}"
"$folder/env/bin/python" "$folder/show.py"
