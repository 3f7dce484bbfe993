"""Long-tail methods on one data set: one trunk, one schedule, one table."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from rich.console import Console

import jaxtricks as jt
from benchmarks.longtail import methods
from benchmarks.longtail.methods import TRAINED, Method
from jaxtricks import _table, longtail
from jaxtricks.lab import data as data_lib
from jaxtricks.lab import models, rundir
from jaxtricks.lab import step as step_lib
from jaxtricks.lab.commands import ablate, train
from jaxtricks.lab.commands.ablate import REPORT
from jaxtricks.lab.config import (
    MOST,
    Train,
    UserError,
    check_positive,
    check_ranges,
    option,
)
from jaxtricks.lab.data.pipeline import stack
from jaxtricks.lab.report import counted, hardware
from jaxtricks.lab.rundir import RunDir, can_begin

METHODS = (
    "cross_entropy",
    "focal",
    "class_balanced",
    "ldam_drw",
    "balanced_softmax",
    "logit_adjusted",
    "post_hoc",
    "vs",
    "crt",
    "tau_norm",
    "mixup",
    "ride",
)
"""In the order of the table. post_hoc, crt and tau_norm start from the trained cross_entropy."""


@dataclasses.dataclass(frozen=True)
class LongtailBench:
    """Compare long-tail methods on one data set: balanced accuracy, many, medium and few, over seeds."""

    data: str = option(
        "digits",
        "'digits' (embedded), a folder or a zip of class folders, or what else train takes for images.",
    )
    root: str = option(
        "", "Folder that the paths in --data LIST.txt begin in, as in train."
    )
    out: str = option(
        "runs/longtail", "Run directory to create: results.json, report.md."
    )
    methods: tuple[str, ...] = option(
        METHODS, "The methods to compare; cross_entropy is always there."
    )
    seeds: int = option(
        3,
        "Repetitions: of the images that are kept, the order and the initial weights.",
        least=1,
        most=MOST,
    )
    steps: int = option(1000, "Optimizer steps a run.")
    batch: int = option(128, "Images a step.")
    rate: float = option(0.1, "Peak learning rate, the same for all methods.")
    imbalance: float = option(
        100.0, "Images of the largest over the smallest class."
    )
    size: int = option(
        0,
        "Side of the square that images are resized to; 0 takes what most of them have.",
    )
    widths: tuple[int, ...] = option((16, 32, 64), "Channels of each stage.")
    blocks: int = option(
        1, "Residual blocks a stage: 1 is a ResNet-8, 5 a ResNet-32."
    )

    def check(self) -> None:
        """Raise UserError for a value that can't be meant."""
        check_ranges(self)
        check_positive(self.rate, "--rate")
        # What a run of the same settings refuses.
        names = (
            "data",
            "root",
            "out",
            "steps",
            "batch",
            "blocks",
            "imbalance",
            "size",
            "widths",
        )
        Train(**{name: getattr(self, name) for name in names}).check()
        unknown = [m for m in self.methods if m not in METHODS]
        if unknown:
            raise UserError(
                f"--methods has no {unknown[0]!r}: use some of {', '.join(METHODS)}"
            )


# The report: a table of methods, and report.md.


BASE = "cross_entropy"
FIGURES = ("balanced_accuracy", "many", "medium", "few")


def table(rows: list[dict[str, Any]]) -> _table.Table:
    """Means and sample deviations over the seeds; the difference to cross entropy is paired by seed."""
    base = {row["seed"]: row for row in rows if row["method"] == BASE}
    lines = []
    for name in dict.fromkeys(row["method"] for row in rows):
        mine = [row for row in rows if row["method"] == name]
        cells = [_spread([100 * row[key] for row in mine]) for key in FIGURES]
        gains = [
            [100 * (r[key] - base[r["seed"]][key]) for r in mine]
            for key in ("balanced_accuracy", "few")
        ]
        lines.append(
            (
                name,
                len(mine),
                *cells,
                *("-" if name == BASE else _error(g) for g in gains),
            )
        )
    headers = (
        "method",
        "n",
        "balanced %",
        "many",
        "medium",
        "few",
        "change",
        "change, few",
    )
    return _table.make(headers, lines)


def write(
    folder: RunDir,
    rows: list[dict[str, Any]],
    data: Any,
    cfg: LongtailBench,
    command: str,
) -> None:
    """report.md."""
    counts = ", ".join(str(int(n)) for n in data.counts)
    height, width, _ = data.shape
    layers = 2 * len(cfg.widths) * cfg.blocks + 2
    lines = [
        f"# Long-tail methods on {data.name}",
        f"`{command}`" if command else "",
        f"{len(data.train)} images of {len(data.classes)} classes ({counts}) to train on, "
        f"{len(data.test)} to test on, {height} x {width}; ResNet of {layers} layers, widths "
        f"{cfg.widths}; {cfg.steps} steps of {cfg.batch}, SGD with Nesterov momentum 0.9, rate "
        f"{cfg.rate} for all methods, weight decay 5e-4, cosine. Many, medium and few are thirds of the "
        f"classes. {counted(cfg.seeds, 'seed')}: mean +- sample standard deviation. Changes are those "
        "from cross entropy, paired by seed, mean +- standard error.",
        table(rows).markdown(),
        f"{hardware()}.",
    ]
    folder.write_text(
        REPORT, "\n\n".join(line for line in lines if line) + "\n"
    )


def _spread(values: list[float]) -> str:
    return f"{np.mean(values):.1f} +- {ablate.spell(ablate.deviation(values), len(values))}"


def _error(values: list[float]) -> str:
    mean = round(float(np.mean(values)), 1) + 0.0  # no -0.0
    return f"{mean:+.1f} +- {ablate.spell(ablate.standard_error(values), len(values))}"


# The comparison: long-tail methods on one data set, one trunk, one schedule.


WARM_UP = 0.05  # share of the run
SECOND_STAGE = 0.1  # steps of cRT, as a share of those of the first
_EVALUATED = 500  # images of one call


class Images(NamedTuple):
    """uint8 [N, H, W, C] and int32 [N]."""

    images: Any
    labels: Any


class Carry(NamedTuple):
    """What a step changes: {"trunk", "head"}, statistics of the trunk, the optimizer's state."""

    params: Any
    state: Any
    moments: Any


def run(cfg: LongtailBench, command: str = "") -> list[dict[str, Any]]:
    """Train every method on every seed; write results.json and report.md.

    Args:
      cfg: checked settings.
      command: the command line, for the report.

    Returns:
      The rows: method, seed, and the figures of `longtail.metrics.summary`.
    """
    console, rows = Console(), []
    say = functools.partial(
        console.print, highlight=False, markup=False, soft_wrap=True
    )
    names = [BASE, *(m for m in cfg.methods if m != BASE)]
    can_begin(cfg.out)
    train.refuse_text(cfg.data, cfg.root)
    data, trainers = _load(cfg, 0), {}
    with RunDir(cfg.out, rundir.describe(cfg, command)) as folder:
        try:
            for seed in range(cfg.seeds):
                data = _load(cfg, seed) if seed else data
                for name, figures in of_seed(cfg, names, data, seed, trainers):
                    rows.append({"method": name, "seed": seed, **figures})
                    say(
                        f"seed {seed} {name:<18} {100 * figures['balanced_accuracy']:.1f} %"
                    )
                    folder.write("results.json", rows)  # what is done is kept
        except KeyboardInterrupt:
            say(f"stopped: the report has what is done, {folder.path / REPORT}")
            raise
        finally:
            if rows:
                write(folder, rows, data, cfg, command)
    say(str(table(rows)))
    say(f"report: {folder.path / REPORT}")
    return rows


def _load(cfg: LongtailBench, seed: int) -> data_lib.Data:
    return data_lib.load(
        cfg.data,
        root=cfg.root,
        imbalance=cfg.imbalance,
        seed=seed,
        size=cfg.size,
    )


def of_seed(
    cfg: LongtailBench,
    names: list[str],
    data: data_lib.Data,
    seed: int,
    trainers: dict[Method, "Trainer"] | None = None,
) -> Iterator[tuple[str, dict[str, float]]]:
    """(method, figures), in the order of the names; seeds that pass the same trainers compile once."""
    trainers = {} if trainers is None else trainers
    train, test = gathered(data.train), gathered(data.test)
    counts = jnp.asarray(
        longtail.class_counts(np.asarray(train.labels), len(data.classes))
    )
    base: Carry | None = None
    for name in names:
        method = TRAINED.get(name, TRAINED[BASE])
        if method not in trainers:
            trainers[method] = Trainer(cfg, method, data)
        trainer = trainers[method]
        if name in TRAINED:
            carry = trainer.fit(train, counts, seed, cfg.steps)
            base = carry if name == BASE else base
            logits = trainer.logits(carry, test)
        else:
            logits = second_stage(
                name, trainer, base, train, test, counts, cfg, seed
            )
        yield name, scores(logits, test.labels, counts)


def second_stage(
    name: str,
    trainer: "Trainer",
    base: Any,
    train: Images,
    test: Images,
    counts: Any,
    cfg: LongtailBench,
    seed: int,
) -> Any:
    """Logits of what starts from the network that cross entropy has trained."""
    if name == "post_hoc":
        return longtail.posthoc.adjust(trainer.logits(base, test), counts)
    if name == "tau_norm":
        kernel = longtail.heads.tau_normalize(
            base.params["head"]["kernel"], 1.0
        )
        head = {
            "kernel": kernel,
            "bias": jnp.zeros_like(base.params["head"]["bias"]),
        }
        carry = base._replace(params={**base.params, "head": head})
        return trainer.logits(carry, test)
    steps = max(1, round(SECOND_STAGE * cfg.steps))
    return trainer.logits(
        trainer.retrained(base, train, counts, seed, steps), test
    )


def scores(logits: Any, labels: Any, counts: Any) -> dict[str, float]:
    """Figures of the test images; thirds of the classes are many, medium and few."""
    state = longtail.metrics.update(
        longtail.metrics.init(len(counts)), logits, jnp.asarray(labels)
    )
    found = longtail.metrics.summary(state, counts, split="rank")
    wanted = ("balanced_accuracy", "many", "medium", "few", "ece")
    return {key: float(found[key]) for key in wanted}


def gathered(source: data_lib.Source) -> Images:
    """All examples of a source."""
    found = stack([source[i] for i in range(len(source))])
    return Images(found["image"], found["label"])


class Trainer:
    """Trains one method; steps are called one by one, as XLA's convolutions are slow in a CPU loop."""

    def __init__(self, cfg: LongtailBench, method: Method, data: data_lib.Data):
        self._cfg, self._method, self._classes = cfg, method, len(data.classes)
        self._channels, self._examples = (
            data.shape[-1],
            step_lib.image_examples(data),
        )
        self._apply, *_ = self._trunk(0)
        self._step = jax.jit(self._update, donate_argnums=0)
        self._head_step = jax.jit(
            functools.partial(self._update, head_only=True), donate_argnums=0
        )
        self._forward = jax.jit(self._predict)

    def fit(self, train: Images, counts: Any, seed: int, steps: int) -> Carry:
        """Train from scratch, every epoch once through the images."""
        params, state = self._init(seed)
        carry = Carry(params, state, self._tx(0.0).init(params))
        rng = np.random.default_rng(seed)
        order: list[int] = []
        for i in range(steps):
            while len(order) < self._cfg.batch:
                order += rng.permutation(len(train.labels)).tolist()
            index, order = order[: self._cfg.batch], order[self._cfg.batch :]
            carry = self._step(
                carry,
                *_taken(train, index),
                counts,
                *_clock(i, steps, seed, self._cfg),
            )
        return carry

    def retrained(
        self, base: Carry, train: Images, counts: Any, seed: int, steps: int
    ) -> Carry:
        """cRT: the head anew, on class-balanced batches; the trunk stays."""
        head = self._init(seed + 1)[0]["head"]
        params = jax.tree.map(
            jnp.copy, {**base.params, "head": head}
        )  # steps donate it
        carry = Carry(
            params,
            jax.tree.map(jnp.copy, base.state),
            self._tx(0.0).init(params),
        )
        balanced = longtail.sampling.class_probabilities(counts, 0.0)
        table = longtail.sampling.table(jnp.asarray(train.labels), balanced)
        draw = jax.jit(longtail.sampling.sample_indices, static_argnums=2)
        for i in range(steps):
            key = jax.random.fold_in(jax.random.key(seed), i)
            index = np.asarray(draw(key, table, self._cfg.batch))
            clock = _clock(i, steps, seed, self._cfg)
            carry = self._head_step(
                carry, *_taken(train, index), counts, *clock
            )
        return carry

    def logits(self, carry: Carry, split: Images) -> Any:
        """[N, C] of all images."""
        count = len(split.labels)
        parts = [
            split.images[i : i + _EVALUATED]
            for i in range(0, count, _EVALUATED)
        ]
        short = _EVALUATED - len(parts[-1])
        parts[-1] = np.concatenate(
            [parts[-1], np.repeat(parts[-1][:1], short, axis=0)]
        )
        return jnp.concatenate([self._forward(carry, x) for x in parts])[:count]

    def _trunk(self, seed: int) -> Any:
        model = models.ResNet(
            self._channels,
            self._cfg.widths[-1],
            widths=self._cfg.widths,
            blocks=self._cfg.blocks,
            rngs=nnx.Rngs(seed),
        )
        setattr(model, "head", _Identity())  # noqa: B010 - another type
        return jt.nnx.functional(model)

    def _init(self, seed: int) -> tuple[Any, Any]:
        _, trunk, state = self._trunk(seed)
        key = jax.random.fold_in(jax.random.key(seed), 1)
        width = self._cfg.widths[-1]
        head = methods.init_head(key, self._method, width, self._classes)
        return {"trunk": trunk, "head": head}, state

    def _tx(self, rate: Any) -> optax.GradientTransformation:
        decay = optax.add_decayed_weights(5e-4)
        return optax.chain(decay, optax.sgd(rate, momentum=0.9, nesterov=True))

    def _update(
        self,
        carry: Carry,
        images: Any,
        labels: Any,
        counts: Any,
        share: Any,
        rate: Any,
        key: Any,
        head_only: bool = False,
    ) -> Carry:
        augment_key, mix_key = jax.random.split(key)
        x, targets = self._examples(
            {"image": images, "label": labels}, augment_key
        )
        if self._method.mixup:
            x, targets = longtail.mix.mixup(mix_key, x, labels, self._classes)

        def loss_fn(params: Any) -> Any:
            features, state = self._apply(
                params["trunk"], carry.state, x, train=not head_only
            )
            logits = methods.logits_of(self._method, params["head"], features)
            return self._method.loss(
                logits, targets, counts, share
            ).mean(), state

        grads, state = jax.grad(loss_fn, has_aux=True)(carry.params)
        updates, moments = self._tx(rate).update(
            grads, carry.moments, carry.params
        )
        if head_only:
            updates = _of_head(updates)
        return Carry(optax.apply_updates(carry.params, updates), state, moments)

    def _predict(self, carry: Carry, images: Any) -> Any:
        x = step_lib.to_float(images)
        features, _ = self._apply(
            carry.params["trunk"], carry.state, x, train=False
        )
        logits = methods.logits_of(self._method, carry.params["head"], features)
        return methods.predicted(self._method, logits)


def _of_head(updates: Any) -> Any:
    return {**updates, "trunk": jax.tree.map(jnp.zeros_like, updates["trunk"])}


class _Identity(nnx.Module):
    """In place of the network's own head: the trunk ends in features."""

    def __call__(self, x: Any) -> Any:
        return x


def _taken(split: Images, index: Any) -> tuple[Any, Any]:
    return split.images[index], split.labels[index]


def _clock(
    step: int, steps: int, seed: int, cfg: LongtailBench
) -> tuple[Any, Any, Any]:
    """(share of the run that is over, rate, key) of a step: a warm-up, then a cosine."""
    warm = max(1, round(WARM_UP * steps))
    falling = 0.5 * (1 + np.cos(np.pi * (step - warm) / max(1, steps - warm)))
    rate = cfg.rate * (min(1.0, (step + 1) / warm) if step < warm else falling)
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(2), seed), step)
    return np.float32(step / steps), np.float32(rate), key
