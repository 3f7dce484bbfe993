"""Models as others wrote them, small, and the lab's own: losses to differentiate.

Those of packages from PyPI are built where the package is installed: attnax,
mamba2-jax (Flax NNX), equimo (Equinox) and dm-haiku. No weights are downloaded.
"""

import functools
import importlib
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxtricks.lab import models

Loss = Callable[[Any, Any], Any]
TEXT, IMAGES = (4, 65), (16, 32, 32, 3)
VOCABULARY, CLASSES = 128, 10


class Task(NamedTuple):
    """A loss and its arguments.

    Attributes:
      kind: "decoder", "ViT", "conv net", "SSM", or "" for none of these.
      loss: (params, batch) -> scalar.
      args: params and batch.
      hand: the loss cast to bfloat16 by hand.
      own: the model computing in bfloat16 by its framework's own argument, as a loss
        and the number of lines that this changes.
      remade: loss and params of the model that a function of the NNX model returns.
    """

    kind: str
    loss: Loss
    args: tuple[Any, Any]
    hand: Loss | None = None
    own: tuple[Loss, int] | None = None
    remade: Callable[[Callable[[Any, Any], Any]], tuple[Loss, Any]] | None = (
        None
    )


def tasks() -> dict[str, Callable[[], Task]]:
    """name -> what makes the task."""
    return {
        "lab ResNet": _resnet,
        "lab RepVGG": _repvgg,
        "lab transformer": _transformer,
        "attnax decoder": _attnax_decoder,
        "attnax ViT": _attnax_vit,
        "equimo ConvNeXt": _equimo_convnext,
        "haiku ResNet": _haiku_resnet,
        "mamba2-jax Mamba2": _mamba2,
    }


def installed(packages: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """(name and version of those that are there, names of those that are not)."""
    there, missing = [], []
    for package in packages:
        try:
            there.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            missing.append(package)
    return there, missing


def _optional(name: str) -> Any:
    """Import a package, if it is there."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def cross_entropy(logits: Any, labels: Any) -> Any:
    """Mean over all examples."""
    logits = jax.nn.log_softmax(logits)
    return -jnp.mean(jnp.take_along_axis(logits, labels[..., None], -1))


def text() -> Any:
    """Tokens, int32 [batch, length + 1]."""
    return jax.random.randint(jax.random.key(1), TEXT, 0, VOCABULARY)


def images() -> tuple[Any, Any]:
    """Images and their labels."""
    keys = jax.random.split(jax.random.key(1))
    labels = jax.random.randint(keys[1], IMAGES[:1], 0, CLASSES)
    return jax.random.normal(keys[0], IMAGES), labels


def _of_nnx(
    kind: str,
    model: nnx.Module,
    batch: Any,
    logits: Callable[[Any, Any], Any] = lambda model, x: model(x),
    **fields: Any,
) -> Task:
    is_text = not isinstance(batch, tuple)
    inputs = batch[:, :-1] if is_text else batch[0]

    def split(model: nnx.Module) -> tuple[Loss, Any]:
        graph, params, rest = nnx.split(model, nnx.Param, ...)

        def loss(params: Any, batch: Any) -> Any:
            # A copy: a norm changes its statistics, which this loss drops.
            again = nnx.merge(graph, params, rest, copy=True)
            x = batch[:, :-1] if is_text else batch[0]
            labels = batch[:, 1:] if is_text else batch[1]
            return cross_entropy(logits(again, x), labels)

        return loss, params

    loss, params = split(model)
    remade = lambda change: split(change(model, inputs))
    return Task(kind, loss, (params, batch), remade=remade, **fields)


def _resnet() -> Task:
    def make(**factories: Any) -> nnx.Module:
        unit = functools.partial(models.ConvNorm, **factories)
        return models.ResNet(
            3, CLASSES, unit=unit, pointwise=unit, rngs=nnx.Rngs(0)
        )

    # The head has no such argument.
    low = make(
        conv=functools.partial(nnx.Conv, dtype=jnp.bfloat16),
        norm=functools.partial(nnx.BatchNorm, dtype=jnp.bfloat16),
    )
    own = _of_nnx("conv net", low, images()).loss, 4
    return _of_nnx("conv net", make(), images(), own=own)


def _repvgg() -> Task:
    model = models.RepVGG(3, CLASSES, rngs=nnx.Rngs(0))
    return _of_nnx("conv net", model, images())


def _transformer() -> Task:
    model = models.Transformer(
        VOCABULARY, features=64, layers=2, heads=2, rngs=nnx.Rngs(0)
    )
    return _of_nnx("decoder", model, text())


def _attnax_decoder() -> Task:
    attnax = importlib.import_module("attnax")
    config = attnax.TransformerConfig(
        vocab_size=VOCABULARY,
        d_model=64,
        num_heads=4,
        num_layers=2,
        d_ff=256,
        dropout_rate=0.0,
        norm_type="rms",
        pos_emb_type="rope",
    )

    class Decoder(nnx.Module):
        """The package leaves the last product to its users."""

        def __init__(self, rngs: nnx.Rngs):
            self.trunk = attnax.TransformerDecoder(rngs, config)
            self.head = nnx.Linear(64, VOCABULARY, use_bias=False, rngs=rngs)

        def __call__(self, tokens: Any) -> Any:
            return self.head(self.trunk(tokens))

    return _of_nnx("decoder", Decoder(nnx.Rngs(0)), text())


def _attnax_vit() -> Task:
    attnax = importlib.import_module("attnax")
    config = attnax.VisionTransformerConfig(
        image_size=32,
        patch_size=4,
        num_classes=CLASSES,
        d_model=64,
        num_heads=4,
        num_layers=2,
        d_ff=256,
        dropout_rate=0.0,
    )
    model = attnax.VisionTransformer(nnx.Rngs(0), config)
    return _of_nnx("ViT", model, images())


def _equimo_convnext() -> Task:
    equinox = importlib.import_module("equinox")
    zoo = importlib.import_module("equimo.vision.models.convnext")
    # Scales of layers at their trained size: at 1e-6 the blocks do nothing.
    model = zoo.ConvNeXt(
        3,
        depths=[1, 1, 2, 1],
        dims=[16, 32, 64, 128],
        layer_scale_init_value=1.0,
        num_classes=CLASSES,
        key=jax.random.key(0),
    )
    params, rest = equinox.partition(model, equinox.is_inexact_array)

    def loss(params: Any, batch: Any) -> Any:
        apply = equinox.nn.inference_mode(equinox.combine(params, rest))
        x, labels = batch
        keys = jax.random.split(jax.random.key(0), len(x))
        logits = jax.vmap(lambda x, key: apply(x, key=key))(
            jnp.moveaxis(x, -1, 1), keys
        )
        return cross_entropy(logits, labels)

    return Task("conv net", loss, (params, images()))


def _haiku_resnet() -> Task:
    haiku = importlib.import_module("haiku")
    jmp = _optional("jmp")

    def forward(x: Any) -> Any:
        net = haiku.nets.ResNet(
            (1, 1, 1, 1),
            CLASSES,
            bottleneck=False,
            channels_per_group=(16, 32, 64, 128),
        )
        return net(x, is_training=True)

    net = haiku.transform_with_state(forward)
    batch = images()
    params, state = jax.jit(net.init)(jax.random.key(0), batch[0])
    head = "res_net/~/logits"
    # Haiku starts it with zeros: then nothing before it has a gradient.
    kernel = params[head]["w"]
    params[head]["w"] = 0.05 * jax.random.normal(
        jax.random.key(2), kernel.shape
    )

    def loss(params: Any, batch: Any) -> Any:
        logits, _ = net.apply(params, state, None, batch[0])
        return cross_entropy(logits, batch[1])

    def own(params: Any, batch: Any) -> Any:
        policy = jmp.get_policy(
            "params=float32,compute=bfloat16,output=float32"
        )
        haiku.mixed_precision.set_policy(haiku.nets.ResNet, policy)
        try:
            return loss(params, batch)
        finally:
            haiku.mixed_precision.clear_policy(haiku.nets.ResNet)

    return Task(
        "conv net", loss, (params, batch), own=(own, 2) if jmp else None
    )


def _mamba2() -> Task:
    package = importlib.import_module("mamba2_jax")
    config = package.Mamba2Config(
        vocab_size=VOCABULARY,
        hidden_size=64,
        state_size=16,
        head_dim=16,
        chunk_size=16,
        num_hidden_layers=2,
    )
    model = package.Mamba2ForCausalLM(config, rngs=nnx.Rngs(0))
    return _of_nnx("SSM", model, text(), lambda m, x: m(x)["logits"])
