#!/bin/sh
# A model that qwix quantized and one that it did not share the trace of `x @ kernel`, whichever ran first.
#
# Seen with qwix 0.1.8, jax 0.12.0.1 and flax 0.12.12. qwix replaces functions of jax.lax while a quantized
# module runs. `x @ kernel` calls jnp.matmul, which is jitted, and JAX keeps its trace by shapes and dtypes:
# traced inside a quantized module, it holds the 8-bit product, and a model of the same shapes that nobody
# quantized runs it, without a word. The other way round, the quantized model multiplies in float32.
#
# So what a comparison of both measures depends on the order, unless jax.clear_caches() runs between them.
# nnx.Linear is not affected: it calls jax.lax itself.
#
# Output:
#   jax 0.12.0.1, flax 0.12.12, qwix 0.1.8
#   quantized first: quantized 8 bits, plain 8 bits
#   plain first: quantized 32 bits, plain 32 bits

set -eu
for python in "${PYTHON:-none}" python3.13 python3.12 python3.14 \
  "$HOME"/.pyenv/versions/3.1[2-4].*/bin/python; do
  "$python" -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null && break
done
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/show.py" <<'EOF'
import sys
from importlib.metadata import version

import jax
import jax.numpy as jnp
import qwix
from flax import nnx

print(f"jax {jax.__version__}, flax {version('flax')}, qwix {version('qwix')}")


class Layer(nnx.Module):
    def __init__(self):
        self.kernel = nnx.Param(jnp.ones((64, 32)))

    def __call__(self, x):
        return x @ self.kernel[...]


x = jnp.ones((16, 64))
rule = qwix.QtRule(module_path=".*", weight_qtype="float8_e4m3fn", act_qtype="float8_e4m3fn")
models = {
    "plain": Layer(),
    "quantized": qwix.quantize_model(Layer(), qwix.QtProvider([rule]), x, skip_nnx_init=True),
}


def products(jaxpr):
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            yield eqn
        for inner in inside(eqn):
            yield from products(inner)


def inside(eqn):
    for value in eqn.params.values():
        for part in value if isinstance(value, (tuple, list)) else [value]:
            part = getattr(part, "jaxpr", part)
            if hasattr(part, "eqns"):
                yield part


def bits(model):
    traced = jax.make_jaxpr(lambda x: model(x))(x)
    (eqn,) = products(traced.jaxpr)
    return 8 * eqn.invars[0].aval.dtype.itemsize


found = []
for order in (["quantized", "plain"], ["plain", "quantized"]):
    jax.clear_caches()
    seen = {name: bits(models[name]) for name in order}
    print(f"{order[0]} first: quantized {seen['quantized']} bits, plain {seen['plain']} bits")
    found.append((seen["quantized"], seen["plain"]))
sys.exit(found != [(8, 8), (32, 32)])
EOF
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check jax==0.12.0.1 jaxlib==0.12.0.1 flax==0.12.12 \
  qwix==0.1.8 2>/dev/null
"$folder/venv/bin/python" "$folder/show.py" 2>/dev/null
