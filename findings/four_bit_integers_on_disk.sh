#!/bin/sh
# Orbax saves an array of int4, but not one of uint4; and nbytes of either is twice what the device holds.
#
# Seen with jax 0.12.0.1, orbax-checkpoint 0.12.8 and tensorstore 0.1.86 on CPU. JAX has both dtypes, and
# XLA packs two entries into a byte (memory_analysis). jax.Array.nbytes counts a byte each, as NumPy does
# on the host. TensorStore's zarr driver knows int4 alone of the two.
#
# So state in four bits is int4, whatever it stands for, and its bytes are counted by bits.
#
# Output:
#   jax 0.12.0.1, orbax-checkpoint 0.12.8
#   int4: nbytes 4096, on the device 2048, saved and restored
#   uint4: nbytes 4096, on the device 2048, ValueError: ... Unsupported data type: "uint4"

set -eu
for python in "${PYTHON:-none}" python3.13 python3.12 python3.14 \
  "$HOME"/.pyenv/versions/3.1[2-4].*/bin/python; do
  "$python" -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null && break
done
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/show.py" <<'EOF'
import pathlib
import sys
from importlib.metadata import version

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

print(f"jax {jax.__version__}, orbax-checkpoint {version('orbax-checkpoint')}")
found = []
for dtype in (jnp.int4, jnp.uint4):
    x = (jnp.arange(4096) % 8).astype(dtype)
    held = jax.jit(lambda x: x + x).lower(x).compile().memory_analysis().argument_size_in_bytes
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            path = pathlib.Path(sys.argv[1]) / x.dtype.name
            checkpointer.save(path, {"x": x})
            checkpointer.wait_until_finished()
            restored = checkpointer.restore(path, {"x": jax.ShapeDtypeStruct(x.shape, x.dtype)})
        same = bool((restored["x"] == x).all())
        outcome = "saved and restored" if same else "changed"
    except ValueError as error:
        outcome = f"ValueError: ... {str(error)[str(error).index('Unsupported'):].splitlines()[0]}"
    print(f"{x.dtype.name}: nbytes {x.nbytes}, on the device {held}, {outcome}")
    found.append((x.nbytes, held, outcome.split(":")[0]))
sys.exit(found != [(4096, 2048, "saved and restored"), (4096, 2048, "ValueError")])
EOF
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check jax==0.12.0.1 jaxlib==0.12.0.1 \
  orbax-checkpoint==0.12.8 tensorstore==0.1.86 2>/dev/null
"$folder/venv/bin/python" "$folder/show.py" "$folder" 2>/dev/null
