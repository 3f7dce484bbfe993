#!/bin/sh
# jnp.max and jnp.min drop NaN on XLA's CPU backend from 4096 elements on.
#
# Seen with jax and jaxlib 0.12.0.1, 0.11.0 and 0.10.2 on Linux, x86-64 with AVX-512. NumPy and jax
# 0.10.0, 0.9.0, 0.8.0 and 0.7.2 return NaN; so does jax 0.12.0.1 for 4095 elements.
# - What counts is the number of elements of the operand, over whatever axes: (8, 512) as well.
# - float32 and float64; float16 and bfloat16 in jnp.min only. With jax.jit and without.
# - If every element is NaN, the maximum is -inf and the minimum inf.
# - jnp.linalg.norm(x, jnp.inf) and jnp.ptp drop it too. jnp.argmax, sum, sort, lax.cummax,
#   logsumexp and jnp.isnan(x).any() see it.
# - The cause: such a reduction becomes a "__ynn_fusion". With an empty
#   XLA_FLAGS=--xla_cpu_experimental_ynn_fusion_type= it returns NaN again. xla_cpu_use_xnnpack,
#   xla_cpu_enable_fast_min_max and xla_cpu_enable_fast_math, all false, change nothing.
# - The documentation of jnp.max does not say it, nor an issue of jax that we found.
#   openxla/xla#21461 (2025) is the same symptom on two elements, older than these fusions.
#
# Whether all numbers are finite is a question for jnp.isfinite(x).all(), never for a maximum.
#
# Output:
#   jax 0.12.0.1
#   np.max, jnp.max, jnp.min, jit(jnp.max), jnp.argmax
#   4095 nan nan nan nan 123
#   4096 nan 0.0 0.0 0.0 123
#   bfloat16: max, min nan 0.0
#   all NaN: max, min -inf inf
#   XLA_FLAGS=--xla_cpu_experimental_ynn_fusion_type=
#   jax 0.12.0.1
#   np.max, jnp.max, jnp.min, jit(jnp.max), jnp.argmax
#   4095 nan nan nan nan 123
#   4096 nan nan nan nan 123
#   bfloat16: max, min nan nan
#   all NaN: max, min nan nan

set -eu
for python in "${PYTHON:-none}" python3.13 python3.12 python3.14 \
  "$HOME"/.pyenv/versions/3.1[2-4].*/bin/python; do
  "$python" -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null && break
done
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check "jax==${JAX:-0.12.0.1}" numpy==2.5.5
cat > "$folder/show.py" <<'END'
import jax
import jax.numpy as jnp
import numpy as np

def results(size):
    x = np.where(np.arange(size) == 123, np.nan, 0.0).astype(np.float32)
    fns = jnp.max, jnp.min, jax.jit(jnp.max)
    return float(np.max(x)), *(float(fn(jnp.asarray(x))) for fn in fns), int(jnp.argmax(x))

def halves(dtype):
    x = jnp.zeros(4096, dtype).at[123].set(jnp.nan)
    return float(jnp.max(x)), float(jnp.min(x))

print("jax", jax.__version__)
print("np.max, jnp.max, jnp.min, jit(jnp.max), jnp.argmax")
for size in (4095, 4096):
    print(size, *results(size))
print("bfloat16: max, min", *halves("bfloat16"))
print("all NaN: max, min", *(float(fn(jnp.full(4096, jnp.nan))) for fn in (jnp.max, jnp.min)))
END
export JAX_PLATFORMS=cpu
"$folder/venv/bin/python" "$folder/show.py" | tee "$folder/plain"
flag=--xla_cpu_experimental_ynn_fusion_type=
echo "XLA_FLAGS=$flag"
XLA_FLAGS=$flag "$folder/venv/bin/python" "$folder/show.py" | tee "$folder/flag"
grep -qx '4095 nan nan nan nan 123' "$folder/plain"
grep -qx '4096 nan 0.0 0.0 0.0 123' "$folder/plain"
grep -qx 'all NaN: max, min -inf inf' "$folder/plain"
grep -qx '4096 nan nan nan nan 123' "$folder/flag"
