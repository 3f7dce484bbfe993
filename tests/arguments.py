"""Calls with one argument of a wrong type, and how many of them end without its name.

A script, since tests check types on their own: `python tests/arguments.py` prints how many calls it made, how
many failed, and which of these do not name the argument or the function in one line.
"""

import json
import re
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtricks import (
    agc,
    amp,
    cyclical,
    ebn,
    echo,
    longtail,
    memopt,
    remat,
    reparam,
    roles,
    weightstd,
)
from jaxtricks.longtail import (
    contrib,
    decoupling,
    distill,
    experts,
    heads,
    metrics,
    mix,
    posthoc,
    sampling,
)
from jaxtricks.longtail import weights as class_weights

PARAMS = {"head": {"kernel": np.ones((3, 4), np.float32), "bias": np.zeros(4, np.float32)}}
N = np.array([40, 20, 10, 5])
Z = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
Y = np.array([0, 1, 2, 3, 0, 1], np.int32)
X = np.ones((6, 3), np.float32)
KERNEL = np.ones((3, 3, 4, 4), np.float32)
TABLE = {"labels": Y, "probabilities": np.full(4, 0.25, np.float32)}


def loss(w, x):
    return jnp.sum((x @ w) ** 2)


def step(carry, batch):
    return carry, jnp.zeros(())


# name -> (function, the arguments of a right call)
CALLS = {
    "agc.adaptive_grad_clip": (agc.adaptive_grad_clip, {"clipping": 0.1, "eps": 1e-3}),
    "roles.exclude": (roles.exclude, {}),
    "agc.unitwise_norm": (agc.unitwise_norm, {"x": X, "roles": ("in", "out")}),
    "roles.by_path": (roles.by_path, {"rules": {".*kernel": ("in", "out")}, "strict": False}),
    "roles.exact": (roles.exact, {"roles": {"a": ("in",)}, "assumed": ()}),
    "roles.infer": (roles.infer, {"path": "Dense_0/kernel", "shape": (3, 4)}),
    "roles.is_kernel": (roles.is_kernel, {"path": "a/kernel", "shape": (3, 4)}),
    "roles.describe": (roles.describe, {"params": PARAMS, "roles": roles.infer}),
    "roles.matrix_view": (roles.matrix_view, {"params": PARAMS, "roles": roles.infer}),
    "memopt.muon": (
        lambda **k: memopt.muon(**k).init(PARAMS),
        {"learning_rate": 1e-2, "roles": {"head": {"kernel": ("in", "out"), "bias": ("none",)}},
         "path_filter": None},
    ),
    "memopt.adafactor": (
        lambda **k: memopt.adafactor(**k).init(PARAMS),
        {
            "learning_rate": 1e-2, "warmup_init": False, "beta1": 0.9, "momentum_dtype": "bfloat16",
            "momentum_before_lr": False, "decay": "pow", "decay_rate": 0.8, "decay_offset": 0,
            "decay_cap": 1.0, "clipping_threshold": 1.0, "eps": (1e-30, 1e-3),
            "multiply_by_parameter_scale": True, "max_parameter_scale": None, "factored": True,
            "min_dim_size_to_factor": 128, "roles": None, "clip_per_slice": True, "weight_decay": 0.0,
        },
    ),
    "memopt.sm3": (
        lambda **k: memopt.sm3(**k).init(PARAMS),
        {"learning_rate": 0.1, "momentum": 0.9, "momentum_dtype": None, "roles": None, "eps": 1e-30},
    ),
    "memopt.scale_by_sm3": (lambda **k: memopt.scale_by_sm3(**k).init(PARAMS), {"momentum": 0.9}),
    "memopt.stochastic_round": (memopt.stochastic_round, {"seed": 0}),
    "memopt.host_offload": (memopt.host_offload, {"inner": optax.adam(1e-3), "min_bytes": 0}),
    "memopt.release_gradients": (
        lambda **k: memopt.release_gradients(params=X[None], x=X, **k),
        {"layer": lambda w, x: x * w, "tx": optax.sgd(0.1), "state": optax.EmptyState()},
    ),
    "memopt.state_bytes": (memopt.state_bytes, {"tx": optax.adam(1e-3), "params": PARAMS}),
    "memopt.state_table": (memopt.state_table, {"tx": optax.adam(1e-3), "params": PARAMS}),
    "amp.autocast": (
        lambda **k: amp.autocast(**k)(np.ones((3, 2), np.float32), X),
        {"fn": loss, "policy": "p=f32,c=bf16,o=f32", "rules": None, "scan_carry": "keep"},
    ),
    "amp.explain": (lambda **k: amp.explain(k.pop("fn"), X.T, X, **k), {"fn": loss, "policy": "half"}),
    "amp.with_policy": (amp.with_policy, {"fn": loss, "policy": "half"}),
    "amp.full_precision": (amp.full_precision, {"fn": loss}),
    "amp.value_and_grad": (
        lambda **k: amp.value_and_grad(**k)(X.T, X),
        {"loss_fn": loss, "policy": None, "scale": 2.0, "has_aux": False, "argnums": 0},
    ),
    "amp.dynamic_loss_scale": (
        lambda **k: amp.dynamic_loss_scale(**k).init(PARAMS),
        {
            "inner": optax.sgd(0.1), "init": 2.0, "growth_interval": 10, "growth": 2.0,
            "backoff": 0.5, "min_scale": 1.0, "max_consecutive": 5, "axis_name": None,
        },
    ),
    "amp.skip_nonfinite": (
        lambda **k: amp.skip_nonfinite(**k).init(PARAMS),
        {"inner": optax.sgd(0.1), "max_consecutive": 5},
    ),
    "amp.all_finite": (amp.all_finite, {"tree": PARAMS, "axis_name": None}),
    "amp.Policy.parse": (amp.Policy.parse, {"text": "half"}),
    "cyclical.cyclical": (
        lambda **k: cyclical.cyclical(**k)(3),
        {
            "base": 0.1, "peak": 1.0, "step_size_up": 10, "step_size_down": None,
            "mode": "exp_range", "gamma": 0.9, "scale_fn": None, "scale_by": "cycle",
        },
    ),
    "cyclical.one_cycle": (
        lambda **k: cyclical.one_cycle(**k)(3),
        {
            "peak": 1.0, "total_steps": 10, "pct_start": 0.3, "anneal": "cos", "div_factor": 25.0,
            "final_div_factor": 1e4, "three_phase": False,
        },
    ),
    "cyclical.one_cycle_momentum": (
        lambda **k: cyclical.one_cycle_momentum(**k)(3),
        {"base": 0.8, "peak": 0.9, "total_steps": 10},
    ),
    "cyclical.warm_restarts": (
        lambda **k: cyclical.warm_restarts(**k)(3),
        {"peak": 1.0, "first_period": 4, "period_mult": 2, "floor": 0.0},
    ),
    "cyclical.lr_range_test": (
        cyclical.lr_range_test,
        {
            "step": lambda c, b, lr: (c, jnp.zeros(())), "carry": 0.0, "batches": [1, 2, 3], "lo": 0.1,
            "hi": 1.0, "num_steps": 3, "spacing": "exp", "smoothing": 0.5, "stop_factor": 4.0,
        },
    ),
    "ebn.extended_moments": (
        ebn.extended_moments,
        {"x": X, "mask": None, "axis_name": None, "variance": "channel"},
    ),
    "ebn.normalize": (
        ebn.normalize,
        {"x": X, "mean": X[0], "var": np.float32(1), "scale": X[0], "bias": X[0], "epsilon": 1e-3},
    ),
    "echo.echo": (
        lambda **k: list(echo.echo(**k)),
        {
            "source": range(8), "factor": 2, "schedule": "spread", "distance": 2, "batch_size": None,
            "max_bytes": None, "class_of": None, "max_factor": 4, "tag": False, "guard": True, "seed": 0,
        },
    ),
    "echo.num_steps": (echo.num_steps, {"fresh": 10, "batch": 2, "factor": 2.0}),
    "echo.augmentation_keys": (
        echo.augmentation_keys,
        {"key": None, "ordinal": np.arange(3), "copy": np.arange(3)},
    ),
    "echo.echo_step": (echo.echo_step, {"step": step, "factor": 2, "augment": None}),
    "weightstd.standardize": (
        weightstd.standardize,
        {"kernel": KERNEL, "gain": None, "preset": "nfnet", "eps": None, "out_axis": -1},
    ),
    "weightstd.standardize_params": (
        weightstd.standardize_params,
        {"params": PARAMS, "path_filter": lambda path: path.endswith("kernel")},
    ),
    "weightstd.l2": (weightstd.l2, {"params": PARAMS, "scale": 1e-4, "path_filter": None}),
    "weightstd.residual_scales": (weightstd.residual_scales, {"depths": [2, 2], "alpha": 0.2}),
    "weightstd.scaled_activation": (weightstd.scaled_activation, {"fn": jnp.tanh}),
    "weightstd.stochastic_depth": (weightstd.stochastic_depth, {"key": None, "x": X, "rate": 0.5}),
    "remat.recompute_grad": (lambda **k: remat.recompute_grad(**k)(X.T, X), {"fn": loss, "seed": None}),
    "remat.checkpoint": (
        lambda **k: remat.checkpoint(**k)(X.T, X),
        {"fn": loss, "save": (), "offload": ()},
    ),
    "remat.checkpoint_name": (remat.checkpoint_name, {"x": X, "label": "x"}),
    "remat.memory_analysis": (lambda **k: remat.memory_analysis(k["fn"], X.T, X), {"fn": loss}),
    "remat.scan": (
        remat.scan,
        {"body": lambda c, x: (c + x.sum(), None), "init": np.float32(0), "xs": X, "levels": "sqrt"},
    ),
    "remat.sequential": (remat.sequential, {"fns": [jnp.tanh, jnp.sin], "segments": "sqrt"}),
    "remat.plan": (
        lambda **k: remat.plan(k.pop("fn"), X.T, X, **k),
        {
            "fn": loss, "budget_bytes": 1.0, "argnums": 0, "has_aux": False, "within": None,
            "wrt": "peak", "max_compiles": 2, "topology": None,
        },
    ),
    "reparam.fuse": (reparam.fuse, {"node": reparam.Conv(KERNEL), "kernel_size": None}),
    "reparam.apply": (
        reparam.apply,
        {
            "node": reparam.Conv(KERNEL), "x": np.ones((1, 5, 5, 4), np.float32), "strides": 1,
            "padding": "SAME", "dilation": 1, "kernel_size": None,
        },
    ),
    "reparam.error_bound": (
        reparam.error_bound,
        {"node": reparam.Conv(KERNEL), "x": np.ones((1, 5, 5, 4), np.float32)},
    ),
    "longtail.class_counts": (longtail.class_counts, {"labels": Y, "num_classes": 4, "names": None}),
    "longtail.softmax_loss": (longtail.softmax_loss, {"weights": N, "focal_gamma": 1.0}),
    "longtail.weighted": (longtail.weighted, {"weights": N}),
    "longtail.focal": (longtail.focal, {"gamma": 1.0, "weights": None}),
    "longtail.class_balanced": (longtail.class_balanced, {"counts": N, "beta": 0.99}),
    "longtail.ldam": (longtail.ldam, {"counts": N, "max_margin": 0.5, "s": 1.0}),
    "longtail.balanced_softmax": (longtail.balanced_softmax, {"counts": N}),
    "longtail.logit_adjusted": (longtail.logit_adjusted, {"counts": N, "tau": 1.0}),
    "longtail.vs": (longtail.vs, {"counts": N, "gamma": 0.3, "tau": 1.0}),
    "longtail.cdt": (longtail.cdt, {"counts": N, "gamma": 0.2}),
    "longtail.label_aware_smoothing": (
        longtail.label_aware_smoothing,
        {"counts": N, "head": 0.4, "tail": 0.1, "shape": "concave", "power": 1.0},
    ),
    "longtail.seesaw": (longtail.seesaw, {"counts": N, "p": 0.8, "q": 2.0}),
    "longtail.lade": (longtail.lade, {"counts": N, "lam": 0.01, "alpha": 0.1}),
    "longtail.equalization": (longtail.equalization, {"counts": N, "gamma": 0.9, "threshold": 0.1}),
    "longtail.reduce_loss": (longtail.reduce_loss, {"per_example": Z[:, 0], "weights": None, "kind": "mean"}),
    "longtail.equalization_v2": (longtail.equalization_v2, {"num_classes": 4, "gamma": 12.0}),
    "contrib.online_seesaw": (longtail.contrib.online_seesaw, {"num_classes": 4, "p": 0.8, "q": 2.0}),
    "longtail.class_mean": (longtail.class_mean, {"num_classes": 4, "num_features": 3, "momentum": 0.9}),
    "a loss": (longtail.cross_entropy(), {"logits": Z, "labels": Y, "where": None}),
    "a seesaw loss": (longtail.seesaw(N), {"logits": Z, "labels": Y, "where": None}),
    "weights.effective_number": (class_weights.effective_number, {"counts": N, "beta": 0.9}),
    "weights.inverse_frequency": (class_weights.inverse_frequency, {"counts": N, "power": 1.0}),
    "sampling.class_probabilities": (sampling.class_probabilities, {"counts": N, "power": 1.0}),
    "sampling.progressive": (sampling.progressive, {"counts": N, "t": 0.5}),
    "sampling.table": (sampling.table, dict(TABLE)),
    "sampling.sample_indices": (sampling.sample_indices, {"key": None, "table": None, "n": 4}),
    "data.exponential_counts": (
        longtail.data.exponential_counts,
        {"n_max": 100, "num_classes": 4, "imbalance": 10},
    ),
    "heads.tau_normalize": (heads.tau_normalize, {"kernel": X.T, "tau": 1.0}),
    "heads.cosine": (heads.cosine, {"x": X, "kernel": X[:3], "s": 16.0}),
    "heads.centroids": (
        heads.centroids,
        {"features": X, "labels": Y, "num_classes": 4, "kind": "un", "where": None},
    ),
    "posthoc.adjust": (posthoc.adjust, {"logits": Z, "counts": N, "tau": 1.0}),
    "posthoc.shift_prior": (posthoc.shift_prior, {"logits": Z, "source": N, "target": N}),
    "posthoc.fit_tau": (posthoc.fit_tau, {"logits": Z, "labels": Y, "counts": N, "where": None}),
    "mix.mixup": (mix.mixup, {"key": None, "x": X, "labels": Y, "num_classes": 4, "alpha": 1.0}),
    "experts.ride": (experts.ride, {"base": None, "counts": N, "diversity": -0.2}),
    "experts.sade": (experts.sade, {"counts": N, "tau": 2.0, "compat": None}),
    "experts.aggregate": (experts.aggregate, {"logits": Z[None], "weights": None}),
    "distill.kd": (distill.kd, {"logits": Z, "teacher": Z, "temperature": 3.0, "power": 1.0}),
    "contrib.dive": (contrib.dive, {"base": longtail.cross_entropy(), "alpha": 0.5}),
    "decoupling.tau_norm": (decoupling.tau_norm, {"params": PARAMS, "head": "head", "tau": 1.0}),
    "metrics.init": (metrics.init, {"num_classes": 4, "bins": 15}),
    "metrics.update": (metrics.update, {"state": None, "logits": Z, "labels": Y, "where": None}),
}  # fmt: skip

WRONG = [
    None, True, 3, 2.5, "x", b"x", 1j, (), [], {}, set(), object(), object, len, ["a"], {"a": 1}, 1 + 2j,
    np.float32(1), np.array("x"), np.array([1j]), np.zeros(3, bool), np.zeros((2, 2), np.float32),
    jnp.zeros(2, jnp.complex64), range(3), slice(3), Ellipsis, float("nan"), ValueError("x"),
]  # fmt: skip


def arguments(name):
    """The right call's; keys and states, which are not made at import, in their places."""
    keywords = dict(CALLS[name][1])
    if "key" in keywords:
        keywords["key"] = jax.random.key(0)
    if name == "sampling.sample_indices":
        keywords["table"] = sampling.table(**TABLE)
    if name == "metrics.update":
        keywords["state"] = metrics.init(4)
    return keywords


def outcomes(name, wrong_values=WRONG):
    """(argument, wrong value, error) of every call that fails with one argument wrong."""
    function, _ = CALLS[name]
    for argument, right in arguments(name).items():
        for wrong in wrong_values:
            right_type = type(wrong) is type(right) and not isinstance(wrong, np.ndarray)
            if right_type or (callable(wrong) and callable(right)):
                continue
            try:
                function(**{**arguments(name), argument: wrong})
            except Exception as error:
                yield argument, wrong, error


def is_named(name, argument, error):
    """One line with the argument in backticks, or the name of the function."""
    text = str(error)
    short = name.split(".")[-1]
    words = re.findall(r"\w+", text)
    named = f"`{argument}`" in text or short in words or (len(argument) > 3 and argument in words)
    return named and "\n" not in text.strip() and len(text) < 400


def main(every):
    """Try every `every`-th wrong value."""
    warnings.simplefilter("ignore")
    tried, failed, unnamed = 0, 0, []
    for name in CALLS:
        CALLS[name][0](**arguments(name))
        tried += len(arguments(name)) * len(WRONG[::every])
        for argument, _, error in outcomes(name, WRONG[::every]):
            failed += 1
            if not is_named(name, argument, error):
                unnamed.append(f"{name} {argument}: {type(error).__name__} {str(error)[:80]}")
    print(json.dumps({"tried": tried, "failed": failed, "unnamed": unnamed}))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1)
