"""Every effect that is claimed: where, what is measured against what, by which rule, and from which figures.

Rules are the targets that the benches had already, else two standard errors in the claimed direction, or a
limit that follows from the claim's own words.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

from benchmarks import claims_evidence as recorded
from benchmarks import claims_fresh as fresh
from benchmarks.claims_evidence import (
    FEWER,
    MORE,
    Figures,
    Rule,
    at_least,
    at_most,
    no_loss,
)

FRESH = "make claims"  # the origin of what is measured anew: `exact` is equal everywhere
EXACT, COMPILED, TIMED = "exact", "compiled", "timed"
GAIN = at_most(0.9)  # of times and bytes
HALF = at_most(0.6)


class Claim(NamedTuple):
    """One row.

    Attributes:
      key: the technique.
      effect: what is claimed.
      source: by whom.
      metric: what is measured, with its unit.
      baseline: what it is compared with.
      rule: how the verdict is decided.
      origin: a results file, or FRESH.
      figures: measures or reads; None where nothing here can.
      otherwise: if it is not held or not testable: why, and what would test it.
      kind: of fresh figures, EXACT, COMPILED or TIMED.
      only: the experiment of the file's command.
    """

    key: str
    effect: str
    source: str
    metric: str
    baseline: str
    rule: Rule
    origin: str
    figures: Callable[[], Figures] | None
    otherwise: str = ""
    kind: str = EXACT
    only: str = ""


def part(
    function: Callable[..., Figures], *given: Any
) -> Callable[[], Figures]:
    """The function with its arguments, to be called later."""
    return functools.partial(function, *given)


CHOI = "Choi et al. 1907.05550"
MICIKEVICIUS = "Micikevicius et al. 1710.03740"
SHAZEER, ANIL = "Shazeer, Stern 1804.04235", "Anil et al. 1901.11150"
QIAO, BROCK = "Qiao et al. 1903.10520", "Brock et al. 2102.06171"
CHEN, LUO, SMITH = (
    "Chen et al. 1604.06174",
    "Luo, Peng 2003.05569",
    "Smith 1506.01186",
)
DING, DING_VGG = "Ding et al. 1908.03930", "Ding et al. 2101.03697"
NETS, TAIL, TEXT = (
    "networks.json",
    "longtail_methods.md",
    "memopt_training.json",
)
PEERS_TPU, PLAN, CAST = "tpu_amp.md", "remat_plan.md", "amp_training.md"
LAB_TPU, SPEED, COPIES = "tpu_aot.md", "echo_speed.md", "echo_quality.json"
TEST = "test accuracy, %"
SHORT = "Few images, 16 x 16, and hundreds of steps: "


def net(
    key: str,
    effect: str,
    source: str,
    versus: tuple[str, str, str, str],
    rule: Rule = MORE,
    otherwise: str = "",
    figure: str = "test",
) -> Claim:
    """A row of the `networks` bench; versus: experiment, our arm, the baseline's, its name."""
    experiment, ours, base, name = versus
    metric = TEST if figure == "test" else "steps to the target"
    found = part(recorded.networks, experiment, ours, base, figure)
    return Claim(
        key,
        effect,
        source,
        metric,
        name,
        rule,
        NETS,
        found,
        otherwise,
        only=experiment,
    )


def tailed(method: str, name: str, source: str, otherwise: str = "") -> Claim:
    """A row of the long-tail bench: balanced accuracy against cross entropy."""
    metric, base = "balanced accuracy, %", "cross entropy"
    found, effect = (
        part(recorded.tail, method),
        f"{name}: higher balanced accuracy",
    )
    return Claim(
        "longtail", effect, source, metric, base, MORE, TAIL, found, otherwise
    )


ECHO = [
    Claim(
        "echo", "steps are min(e, R) times as fast behind a slow reader", CHOI,
        "speed-up, where its share of that is least", "min(e, R)", at_least(0.9), SPEED, recorded.sped_up,
    ),
    Claim(
        "echo", "copies are worth fresh data (e = 4, spread, augmented each)", CHOI, TEST,
        "fresh images, 4 times the reads", no_loss(1.0), COPIES,
        part(recorded.echoed, "spread, each", "fresh"),
    ),
    Claim(
        "echo", "copies in a row (flat_map, repeat) are worth fresh data", "seed", TEST,
        "fresh images, 4 times the reads", no_loss(1.0), COPIES,
        part(recorded.echoed, "adjacent, each", "fresh"),
        "Three quarters of each batch are copies of the rest. `schedule=\"spread\"` is the default for that.",
    ),
    Claim(
        "echo", "copies behind the augmentation are worth fresh data (e = 4, spread)", CHOI, TEST,
        "fresh images, 4 times the reads", no_loss(1.0), COPIES,
        part(recorded.echoed, "spread, once", "fresh"),
        "The paper finds them worth less than copies before it too. 32 batches apart they are nearly worth "
        "fresh data (echo_quality.md).",
    ),
    Claim(
        "echo", "ResNet-50 on ImageNet 3.25 times sooner over a network", CHOI, "hours to 75 %",
        "no echo", at_most(0.5), "", None,
        "Needs ImageNet, a network to read it over and accelerators; the first rows are its two parts.",
    ),
]  # fmt: skip

AMP = [
    *(
        Claim(
            "amp", f"{dtype} trains as float32 does ({what})", MICIKEVICIUS, "training loss, nats",
            "float32", at_most(1.01), CAST, part(recorded.cast, table, f"{dtype}, autocast"),
        )
        for dtype in ("bfloat16", "float16")
        for table, what in (("arm", "text"), ("arm #2", "images"))
    ),
    *(
        Claim(
            "amp", f"memory is nearly halved ({what}, TPU v5e)", MICIKEVICIUS, "temporaries, MiB",
            "float32", HALF, origin, part(recorded.quotient, origin, *rows), otherwise,
        )
        for what, origin, rows, otherwise in (
            ("ResNet step", LAB_TPU, ("resnet, one chip", "temp MiB", "amp", "baseline"), ""),
            (
                "transformer step", LAB_TPU, ("transformer, one chip", "temp MiB", "amp", "baseline"),
                "A third is saved: what sums, softmax and norms keep in float32 stays.",
            ),
            (
                "decoder gradient", PEERS_TPU, ("unrolled", "temp MiB", "grad(autocast)", "float32"),
                "A quarter is saved; the cast by hand saves 12 % there.",
            ),
        )
    ),
    Claim(
        "amp", "memory is nearly halved (decoder gradient, this machine)", MICIKEVICIUS, "temporaries, MiB",
        "float32", HALF, FRESH, fresh.compiled_loss,
        "An eighth is saved on this CPU; a TPU saves more.",
        COMPILED,
    ),
    Claim(
        "amp", "less traffic with memory (decoder gradient, TPU v5e)", MICIKEVICIUS, "GiB accessed",
        "float32", GAIN, PEERS_TPU,
        part(recorded.quotient, PEERS_TPU, "unrolled", "GiB accessed", "grad(autocast)", "float32"),
    ),
    Claim(
        "amp", "compiling the step (jit, the seed's XLA half) makes it faster", "seed",
        "ms a gradient", "op by op", GAIN, FRESH, part(fresh.timed, "jit", "eager"), kind=TIMED,
    ),
    Claim(
        "amp", "autocast makes the compiled step faster (this machine)", "seed", "ms a gradient",
        "jit, float32", GAIN, FRESH, part(fresh.timed, "autocast", "jit"),
        "Where the CPU multiplies bfloat16, a large product takes half of float32's time, but the whole step "
        "takes longer. An accelerator would test it.",
        TIMED,
    ),
    Claim(
        "amp", "2 to 6 times as fast on tensor cores", MICIKEVICIUS, "ms a step", "float32",
        at_most(0.5), "", None,
        "No accelerator here; programs for TPUs are compiled, not run. `python -m benchmarks.claims` on one "
        "would measure the row above.",
    ),
]  # fmt: skip

MEMOPT = [
    Claim(
        "memopt", "Adafactor's state is sublinear", SHAZEER, "bytes a parameter", "AdamW",
        at_most(0.01), FRESH, part(fresh.state, "memopt.adafactor"),
    ),
    Claim(
        "memopt", "SM3's state without momentum is sublinear", ANIL, "bytes a parameter", "AdamW",
        at_most(0.01), FRESH, part(fresh.state, "memopt.sm3"),
    ),
    Claim(
        "memopt", "SM3's state with momentum is half of Adam's", ANIL, "bytes a parameter", "AdamW",
        at_most(0.51), FRESH, part(fresh.state, "memopt.sm3 momentum 0.9"),
    ),
    Claim(
        "memopt", "Adafactor trains as Adam does", SHAZEER, "validation loss, nats", "AdamW",
        at_most(1.02), TEXT, part(recorded.optimizer, "adafactor"),
    ),
    Claim(
        "memopt", "SM3 trains as Adam does", ANIL, "validation loss, nats", "AdamW", at_most(1.02),
        TEXT, part(recorded.optimizer, "sm3"),
        "200 steps of one small transformer; six rates tried. The paper's runs are of hundreds of thousands, "
        "which would test it.",
    ),
]  # fmt: skip

WEIGHTSTD = [
    net("weightstd", "training is faster", QIAO,
        ("standardization", "standardized", "plain", "plain kernels"), FEWER, figure="reached"),
    net("weightstd", "accuracy is higher", QIAO,
        ("standardization", "standardized", "plain", "plain kernels")),
    net("weightstd", "with group norm, batch 2 does as well as batch norm at batch 32", QIAO,
        ("small_batches", "GroupNorm, standardized 2", "BatchNorm 32", "batch norm, batch 32"), no_loss(1.0),
        "Rates are tuned at batch 32 and scaled to 2. " + SHORT + "tuning at batch 2 and longer runs would "
        "test it."),
    Claim("weightstd", "with group norm and 1 image a GPU, as well as batch norm: ImageNet, COCO", QIAO,
          "top-1 error, AP", "batch norm",
          no_loss(0.0), "", None, "Needs ImageNet, COCO and accelerators."),
]  # fmt: skip

AGC = [
    Claim("agc", "training is stable at larger rates (batch 512)", BROCK, "largest rate without divergence",
          "no clipping", at_least(2.0), NETS, part(recorded.stable, "clipping", "on", "off"),
          only="clipping"),
    Claim("agc", "accuracy at batch 512 is higher (each at its best of six rates)", BROCK, TEST,
          "no clipping", MORE, NETS, part(recorded.best, "clipping", "on", "off"), only="clipping"),
    net("agc", "with it, networks without normalization match batch norm (batch 1024)", BROCK,
        ("large_batch", "nf 1024", "bn 1024", "ResNet, batch norm"), no_loss(1.0),
        "24 steps; branches without normalization start at zero and need longer. A full schedule would test "
        "it."),
    Claim("agc", "NFNets train 8.7 times as fast as EfficientNet-B7 to its accuracy", BROCK,
          "hours, ImageNet", "EfficientNet-B7", at_most(0.5), "", None, "Needs ImageNet and accelerators."),
]  # fmt: skip

REMAT = [
    Claim("remat", "a fraction of the memory (12-layer decoder, sqrt(n) segments, CPU)", CHEN,
          "temporaries, MiB", "no recomputation", at_most(0.5), PLAN,
          part(recorded.quotient, PLAN, "tf12", "temp MiB", "sqrt(n) segments", "no remat")),
    Claim("remat", "it costs one more forward pass (the same decoder)", CHEN, "extra FLOPs",
          "no recomputation", at_most(1.4), PLAN,
          part(recorded.flops, "tf12", "sqrt(n) segments")),
    Claim("remat", "the seed's recompute_grad saves memory (16-layer MLP)", "seed", "temporaries, MiB",
          "no recomputation", HALF, FRESH, fresh.recomputed, kind=COMPILED),
    Claim("remat", "memory grows as sqrt(n): from 16 to 64 layers twice", CHEN, "temporaries, MiB",
          "16 layers", at_most(2.5), FRESH, part(fresh.growth, "sqrt"), kind=COMPILED),
    Claim("remat", "by recursion as log(n): from 16 to 64 layers 1.5 times", CHEN, "temporaries, MiB",
          "16 layers", at_most(1.75), FRESH, part(fresh.growth, "log"), kind=COMPILED),
    *(
        Claim("remat", f"less memory on a TPU v5e ({model} step)", CHEN, "temporaries, MiB",
              "no recomputation", at_most(0.75), LAB_TPU,
              part(recorded.quotient, LAB_TPU, f"{model}, one chip", "temp MiB", "remat", "baseline"))
        for model in ("resnet", "transformer")
    ),
]  # fmt: skip

EBN = [
    *(
        net("ebn", f"better than batch norm at batch {batch}", LUO,
            ("small_batches", f"ExtendedBatchNorm {batch}", f"BatchNorm {batch}", "batch norm"),
            otherwise="At batch 2 a channel still has 32 values here, enough for its own variance. Layers "
            "with fewer, rates tuned for every batch and longer runs would test it.")
        for batch in (8, 4, 2)
    ),
    net("ebn", "batch 2 does as well as batch norm at batch 32", LUO,
        ("small_batches", "ExtendedBatchNorm 2", "BatchNorm 32", "batch norm, batch 32"), no_loss(1.0),
        "Batch norm itself loses 2 points there. Layers with fewer values a channel and rates tuned at batch "
        "2 would test it."),
    net("ebn", "better than group norm at batch 2", LUO,
        ("small_batches", "ExtendedBatchNorm 2", "GroupNorm 2", "group norm"),
        otherwise="Group norm knows no batch and loses nothing at 2, but is behind at 32 already. More seeds "
        "would tell."),
    Claim("ebn", "better than batch norm at small batches on ImageNet", LUO, TEST, "batch norm", MORE, "",
          None,
          "Needs ImageNet and accelerators."),
]  # fmt: skip

CYCLICAL = [
    net("cyclical", "fewer steps to a target than at a constant rate", SMITH,
        ("cycles", "one", "constant", "constant rate"), FEWER,
        SHORT + "one cycle of the shortest legs that the paper advises. Its gain comes where the rate falls, "
        "in the end; the paper's runs are of 25,000 steps.",
        figure="reached"),
    net("cyclical", "fewer steps to a target than under a decay", SMITH,
        ("cycles", "one", "cosine", "warm-up and cosine"), FEWER,
        "The cosine was tuned over the same peaks. Three seeds spread too far to tell; more would.",
        figure="reached"),
    net("cyclical", "higher accuracy in the end than at a constant rate", SMITH,
        ("cycles", "one", "constant", "constant rate"),
        otherwise=SHORT + "longer runs would test it."),
    net("cyclical", "more cycles in the same steps do as well", SMITH,
        ("cycles", "two", "one", "1 cycle"), no_loss(1.0),
        "Legs of one epoch, shorter than the paper advises; longer runs would test it."),
]  # fmt: skip

REPARAM = [
    net("reparam", "ACNet's accuracy is higher", DING, ("branches", "acblock", "plain", "one convolution"),
        otherwise="The papers' gains are 0.3 to 1 point at the end of full schedules, here at n = 3 below "
        "what can be seen. Hundreds of epochs and five seeds or more would test it."),
    net("reparam", "RepVGG's accuracy is higher than without branches", DING_VGG,
        ("branches", "repvgg", "plain", "one convolution"),
        otherwise="120 steps: the paper's gain is at the end of full schedules, which would test it."),
    Claim("reparam", "the fused network is the same function", DING, "largest difference of a logit",
          "largest logit", at_most(1e-5), NETS, part(recorded.fused, "branches", "acblock"), only="branches"),
    Claim("reparam", "a fused block costs no more than one convolution", DING, "inference time, to it",
          "one convolution", at_most(1.1), "blocks.md",
          part(recorded.quotient, "blocks.md", "inference, fused", "ratio", "ACBlock, fused", "nnx.Conv", 5)),
]  # fmt: skip

LONGTAIL = [
    Claim("longtail", "balanced softmax raises the accuracy of the rarest third", "Ren et al. 2007.10740",
          TEST, "cross entropy", MORE, TAIL,
          part(recorded.tail, "balanced_softmax", "few", "few to it")),
    net("longtail", "balanced softmax reaches a balanced accuracy in fewer steps", "seed",
        ("long_tail", "balanced softmax", "cross entropy", "cross entropy"), FEWER,
        "25 % is reached while both learn the frequent classes. Cross entropy ends at 29 % and balanced "
        "softmax at 40 %: any target between them only one reaches.", figure="reached"),
    tailed("balanced_softmax", "balanced softmax", "Ren et al. 2007.10740"),
    tailed("logit_adjusted", "logit adjustment (tau 1: the same loss)", "Menon et al. 2007.07314"),
    tailed("post_hoc", "logit adjustment after training", "Menon et al. 2007.07314"),
    tailed("class_balanced", "weights by effective numbers", "Cui et al. 1901.05555"),
    tailed("focal", "the focal loss", "Lin et al. 1708.02002"),
    tailed("ldam_drw", "LDAM with deferred weights", "Cao et al. 1906.07413"),
    tailed("vs", "the VS loss", "Kini et al. 2103.01550"),
    tailed("crt", "a classifier trained anew (cRT)", "Kang et al. 1910.09217"),
    tailed("tau_norm", "tau-normalization", "Kang et al. 1910.09217"),
    tailed("ride", "an ensemble of experts (RIDE)", "Wang et al. 2010.01809"),
    tailed("mixup", "mixup in the first stage", "Zhong et al. 2104.00466",
           "1,000 steps are too few for mixup, which slows training, and its second stage is left out. 200 "
           "epochs would test it."),
]  # fmt: skip

CLAIMS = [
    *ECHO,
    *AMP,
    *MEMOPT,
    *WEIGHTSTD,
    *AGC,
    *REMAT,
    *EBN,
    *CYCLICAL,
    *REPARAM,
    *LONGTAIL,
]
