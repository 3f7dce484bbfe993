"""What ends a command in one sentence, and the checks that find it. Imports no jax."""

import ast
import dataclasses
import difflib
import inspect
import itertools
import math
import os
import re
import reprlib
from typing import Literal

from jaxtricks import KEYS
from jaxtricks._table import printable

_UNITS = {"b": 1} | {
    f"{letter}{b}": base**power
    for power, letter in enumerate("kmgt", 1)
    for b, base in (("b", 1000), ("ib", 1024))
}
_SIZE = re.compile(rf"\s*(?P<number>(\d+\.?|\d*\.\d+)(e\d+)?)\s*(?P<unit>{'|'.join(_UNITS)})?\s*")


class UserError(Exception):
    """One sentence for the person at the command line: what is wrong and what to do; exit code 2."""

    def __init__(self, sentence: str):
        # It may quote names and values from files of others, line breaks and terminal codes included.
        super().__init__(re.sub(r"\S{200,}", _shortened, printable(sentence)))


def _shortened(word: re.Match[str]) -> str:
    return f"{word[0][:80]}...{word[0][-20:]}"


class HostLostError(Exception):
    """Another process of the run is gone; exit code 75: the same command with --resume goes on."""


def at_least(value: float, least: float, name: str, hint: str) -> None:
    """Raise UserError if value < least, or is infinite or no number."""
    if not least <= value < math.inf:
        finite = "" if math.isfinite(value) else "a finite number of "
        raise UserError(f"{name} must be {finite}at least {least}, not {value}: {hint}")


def positive(value: float, name: str) -> None:
    """Raise UserError unless 0 < value < infinity."""
    if not 0 < value < math.inf:
        finite = "positive" if math.isfinite(value) else "a finite positive number"
        raise UserError(f"{name} must be {finite}, not {value}")


def at_most(value: float, most: float, name: str) -> None:
    """Raise UserError if value > most."""
    if value > most:
        raise UserError(f"{name} must be at most {most}, not {value}")


def share(value: float, name: str) -> None:
    """Raise UserError unless 0 <= value < 1."""
    if not 0 <= value < 1:
        raise UserError(f"{name} must be at least 0 and less than 1, not {value}")


def budget(text: str, name: str) -> None:
    """Raise UserError unless it is a size, or a fraction, that `remat.plan` can read too."""
    match = _SIZE.fullmatch(text.lower())
    size = float(match["number"]) * _UNITS[match["unit"] or "b"] if match else math.nan
    if not 0 <= size < 2**63:
        raise UserError(
            f"{name} is {reprlib.repr(text)}: give a size such as 4GiB, or a fraction such as 0.5"
        )
    if not size:
        raise UserError(f"{name} must be above 0, not {text}")


def named(path: str, name: str) -> None:
    """Raise UserError if there is no path."""
    if not path.strip():
        raise UserError(f"{name} is empty: give a path, or leave it out")


def outside(out: str, **folders: str) -> None:
    """Raise UserError if a directory to create would lie in a folder of data, where it would be data.

    Args:
      out: the directory.
      folders: option -> what it says, a folder or something else.
    """
    for name, folder in folders.items():
        if out and os.path.isdir(folder):
            inside, around = os.path.realpath(out), os.path.realpath(folder)
            if inside == around or inside.startswith(os.path.join(around, "")):
                raise UserError(
                    f"--out {out} lies in --{name} {folder}, where it would be taken for a class of "
                    "images: give an --out outside of it"
                )


def flag(name: str) -> str:
    """The option of a field."""
    return "--" + name.replace("_", "-")


# --------------------------------------------------------------------------------------------------
# What the command line can set of devices and hosts; the docstrings are the help. Imports no jax.
# --------------------------------------------------------------------------------------------------


DATA, MODEL = "data", "model"


@dataclasses.dataclass(frozen=True)
class Parallel:
    """The devices and hosts that a run is spread over."""

    mesh: str = ""
    """Devices along each axis of the mesh, such as data=4,model=2: examples are split over data, kernels
    over model. Not given: one device, or all devices of all hosts over data."""
    fsdp: bool = False
    """Split parameters and optimizer state over data too (ZeRO-3); each is gathered where it is used."""
    coordinator: str = ""
    """Several hosts: HOST:PORT of process 0, the same everywhere, with --processes and --process; or auto,
    what the cluster says (Slurm, Open MPI, Kubernetes, Cloud TPU). --out must be on a shared disk."""
    processes: int = 0
    """Processes, one a host, with --coordinator HOST:PORT."""
    process: int = -1
    """Which of them this one is, from 0."""

    @property
    def axes(self) -> dict[str, int]:
        """The mesh, {"data": 4, "model": 2}; {} if it is not given.

        Raises:
          UserError: it can't be read.
        """
        axes: dict[str, int] = {}
        for part in filter(None, self.mesh.split(",")):
            name, _, size = part.partition("=")
            number = int(size) if size.isdecimal() and len(size) < 7 else 0
            if name not in (DATA, MODEL) or name in axes or number < 1:
                raise UserError(
                    f"--mesh {self.mesh} can't be read: give sizes such as data=4,model=2"
                )
            axes[name] = number
        return axes and {DATA: axes.get(DATA, 1), MODEL: axes.get(MODEL, 1)}

    @property
    def devices(self) -> int:
        """Devices of the mesh; 1 if it is not given."""
        return math.prod(self.axes.values())

    def check(self, batch: int, accumulate: int) -> None:
        """Raise UserError for a value that can't be meant with these batches."""
        over = self.axes.get(DATA, 1)
        if batch % (over * accumulate):
            raise UserError(
                f"--batch {batch} does not divide over {over} devices and {accumulate} "
                "micro-batches: choose a multiple"
            )
        self._check_hosts()

    def check_alone(self, command: str) -> None:
        """Raise UserError if a command that one process does was given several."""
        if self.coordinator:
            raise UserError(f"{command} runs in one process: drop --coordinator")

    def _check_hosts(self) -> None:
        counted = self.processes != 0 or self.process != -1
        if not self.coordinator or self.coordinator == "auto":
            if counted:
                raise UserError(
                    "--processes and --process need --coordinator HOST:PORT of process 0"
                )
            return
        host, _, port = self.coordinator.rpartition(":")
        if not host or not port.isdecimal() or len(port) > 5 or not 0 < int(port) < 2**16:
            raise UserError(
                f"--coordinator {self.coordinator} is no address: give HOST:PORT of process 0, or auto"
            )
        if not 0 <= self.process < self.processes:
            raise UserError(
                f"--coordinator needs --processes N and --process from 0 to N - 1, not "
                f"{self.processes} and {self.process}"
            )


# --------------------------------------------------------------------------------------------------
# What the command line can set: frozen dataclasses; their docstrings are the help. Imports no jax.
# --------------------------------------------------------------------------------------------------


MOST = 2**31 - 1
"""Steps are counted in 32 bits."""
# What makes arrays, and the most that could be meant.
_SIZES = {"batch": 2**20, "blocks": 1000, "size": 8000}
_TEXT_SIZES = {"context": 2**20, "features": 2**16, "layers": 1000, "heads": 2**16}
_WIDTH = 2**16
_ECHO = 1000

# Tricks that have nothing to act on in a model, and why.
_NO_CONVOLUTION = "it has no convolution"
IDLE = {
    "weightstd": {
        "nfnet": "its convolutions are weight-standardized already",
        "transformer": _NO_CONVOLUTION,
    },
    "ebn": {"nfnet": "it has no normalization", "transformer": "it has no batch normalization"},
    "reparam": {
        "nfnet": "it has no normalization, which the branches need",
        "repvgg": "its blocks are re-parameterized already",
        "transformer": _NO_CONVOLUTION,
    },
}

# What else people call a trick, or a part of it, in small letters and digits alone.
_NAMES = {
    "echo": "dataecho dataechoing batchecho batchechoing",
    "amp": "mixedprecision bf16 bfloat16 fp16 float16 lossscale lossscaling",
    "memopt": "adafactor sm3",
    "weightstd": "ws weightstandardization",
    "agc": "clip clipping gradientclipping",
    "remat": "checkpoint checkpointing recompute recomputation rematerialization",
    "ebn": "bn batchnorm batchnormalization",
    "cyclical": "clr onecycle sgdr",
    "reparam": "acnet dbb repvgg fuse",
    "longtail": "focal imbalance ldam logitadjustment",
}
_ALSO = {name: key for key, names in _NAMES.items() for name in names.split()}


@dataclasses.dataclass(frozen=True)
class Tricks:
    """Which of the ten tricks are on."""

    echo: bool = False
    """Data echoing: every image read is used `echo_factor` times, far apart."""
    amp: bool = False
    """Mixed precision: bfloat16 computation, float32 parameters, dynamic loss scale."""
    memopt: bool = False
    """Adafactor in place of AdamW: factored second moments, no first moment."""
    weightstd: bool = False
    """Weight standardization of every convolution."""
    agc: bool = False
    """Adaptive gradient clipping, unit by unit."""
    remat: bool = False
    """Recompute each residual block in the backward pass."""
    ebn: bool = False
    """Extended batch normalization in place of batch normalization."""
    cyclical: bool = False
    """Triangular cyclical learning rate in place of the warm-up and cosine."""
    reparam: bool = False
    """Asymmetric convolution blocks in place of 3x3 convolutions."""
    longtail: bool = False
    """Logit-adjusted loss from the class counts in place of cross entropy."""

    @classmethod
    def of(cls, *keys: str) -> "Tricks":
        """The tricks with these keys on."""
        for key in keys:
            if key not in KEYS:
                near = difflib.get_close_matches(key.lower(), KEYS, n=1)
                meant = _ALSO.get(re.sub("[^a-z0-9]", "", key.lower())) or next(iter(near), None)
                hint = f"did you mean {meant}? The tricks are" if meant else "use one of"
                raise UserError(f"unknown trick {key!r}: {hint} {', '.join(KEYS)}")
        return cls(**dict.fromkeys(keys, True))

    @property
    def on(self) -> tuple[str, ...]:
        """Keys of the tricks that are on."""
        return tuple(key for key in KEYS if getattr(self, key))


@dataclasses.dataclass(frozen=True)
class Text:
    """The transformer over characters."""

    context: int = 64
    """Characters a window; "images" of --batch are windows here."""
    features: int = 128
    """Width of the residual stream."""
    layers: int = 2
    """Attention blocks."""
    heads: int = 4
    """Attention heads; they divide the features."""


@dataclasses.dataclass(frozen=True)
class Train:
    """Train one model on your images or text, with the tricks you name; stop and resume at will."""

    tricks: Tricks = dataclasses.field(default_factory=Tricks)
    text: Text = dataclasses.field(default_factory=Text)
    parallel: Parallel = dataclasses.field(default_factory=Parallel)
    data: str = "auto"
    """A folder or a zip of class folders ([train|val|test/]CLASS/*), FILE.npz (images, labels),
    FILE.array_record or a folder of them, FILE.txt, LIST.txt with --root, package.module:function (any
    random-access source), "digits" or "topics" (both embedded). "auto" is digits, or topics for the
    transformer."""
    root: str = ""
    """Folder that the paths in --data LIST.txt begin in; on each line of the list are a path and a label,
    as ImageNet-LT, Places-LT and iNaturalist have them."""
    check_data: bool = False
    """Read every file once, list what cannot be read, and stop."""
    skip_unreadable: bool = False
    """Name the files that cannot be read, leave them out, and train; if one breaks later on, another one of
    its class takes its place."""
    size: int = 0
    """Side of the square to which images are resized; 0 takes the size that most of them have."""
    validation: float = 0.1
    """Share of the training images held out, class by class, where the data has no validation split."""
    test: float = 0.2
    """The same for the test split."""
    out: str = "runs/train"
    """Run directory to create: report.md, config.json, metrics.jsonl, checkpoints and more."""
    resume: bool = False
    """Go on from the newest checkpoint in --out; a new run if there is none yet."""
    model: Literal["resnet", "nfnet", "repvgg", "transformer"] = "resnet"
    """The network."""
    widths: tuple[int, ...] = (16, 32, 64)
    """Channels of each stage; every stage after the first halves the resolution."""
    blocks: int = 1
    """Residual blocks a stage."""
    steps: int = 300
    """Optimizer steps."""
    batch: int = 64
    """Images a step."""
    accumulate: int = 1
    """Micro-batches that a step's batch is split into; their gradients are averaged."""
    learning_rate: float = 3e-3
    """Peak learning rate."""
    weight_decay: float = 1e-2
    """Decoupled weight decay of kernels, times the learning rate."""
    label_smoothing: float = 0.0
    """Probability spread over all classes in the training targets."""
    ema: float = 0.0
    """Decay of the moving average of the parameters that is evaluated; 0 evaluates the parameters."""
    imbalance: float = 1.0
    """Images of the largest over the smallest class; 1 keeps the data as it is."""
    sampling: Literal["instance", "square-root", "balanced", "progressive"] = "instance"
    """How classes are drawn: as the data has them, by the square root of their counts, evenly, or from the
    data to evenly over the run. All but instance draw with replacement; the loss stays as it is."""
    echo_factor: float | Literal["auto"] = 2.0
    """Uses of each image read, when echo is on; auto follows how much slower reading is than the step."""
    remat_budget: str | None = None
    """Peak bytes of the training step, such as 4GiB, or a fraction of what it needs as it is, such as 0.5:
    what to recompute is planned once, before training, in place of remat's every block."""
    seed: int = 0
    """Seed of the split, the order, the initial weights and the augmentation."""
    log_every: int = 10
    """Steps between two lines of metrics.jsonl; the device is read only then."""
    eval_every: int = 0
    """Steps between two evaluations of the validation split; 0 makes it five a run."""
    save_every: int = 100
    """Steps between two checkpoints."""
    keep: int = 3
    """Checkpoints to keep."""
    tensorboard: bool = False
    """Write TensorBoard events into the run directory too; needs jaxtricks[tensorboard]."""
    wandb: str = ""
    """Weights & Biases project to log to; needs jaxtricks[wandb]."""

    @property
    def source(self) -> str:
        """The data set, "auto" resolved."""
        if self.data != "auto":
            return self.data
        return "topics" if self.model == "transformer" else "digits"

    @property
    def micro_batch(self) -> int:
        """Examples of one forward and backward pass."""
        return self.batch // self.accumulate

    def check(self) -> None:
        """Raise UserError for a value that can't be meant."""
        at_least(self.imbalance, 1, "--imbalance", "1 keeps the data as it is, 100 is a long tail")
        if self.echo_factor != "auto":
            at_least(self.echo_factor, 1, "--echo-factor", "1 uses every image once, 2 twice")
            at_most(self.echo_factor, _ECHO, "--echo-factor")
        for name in ("steps", "batch", "accumulate", "blocks", "log_every", "save_every", "keep"):
            at_least(getattr(self, name), 1, flag(name), "a positive number")
            at_most(getattr(self, name), _SIZES.get(name, MOST), flag(name))
        at_most(self.steps * self.accumulate, MOST, "--steps times --accumulate")
        for name in ("size", "eval_every", "weight_decay", "seed"):
            at_least(getattr(self, name), 0, flag(name), "zero or a positive number")
            at_most(getattr(self, name), _SIZES.get(name, MOST), flag(name))
        for name in ("label_smoothing", "ema", "validation", "test"):
            share(getattr(self, name), flag(name))
        if self.validation + self.test >= 1:
            raise UserError("--validation and --test leave nothing to train on: lower them")
        if not self.test:
            raise UserError(
                "--test must be above 0: a run ends by measuring what it never trained on"
            )
        check_widths(self.widths)
        self.parallel.check(self.batch, self.accumulate)
        positive(self.learning_rate, "--learning-rate")
        if self.remat_budget is not None:
            budget(self.remat_budget, "--remat-budget")
        self._check_paths()
        self._check_model()
        self._check_sampling()

    def check_alone(self, command: str) -> None:
        """Raise UserError for what a command that trains nothing can't do."""
        self.parallel.check_alone(command)
        for name in ("resume", "check_data"):
            if getattr(self, name):
                raise UserError(
                    f"{flag(name)} is an option of train, and {command} has none: drop it"
                )

    def _check_paths(self) -> None:
        named(self.data, "--data")
        named(self.out, "--out")
        outside(self.out, data=self.data, root=self.root)

    def _check_model(self) -> None:
        for trick in self.tricks.on:
            if why := IDLE.get(trick, {}).get(self.model):
                raise UserError(f"--{trick} does nothing for --model {self.model} ({why}): drop it")
        if self.model != "transformer":
            return
        for name, most in _TEXT_SIZES.items():
            at_least(getattr(self.text, name), 1, flag(name), "a positive number")
            at_most(getattr(self.text, name), most, flag(name))
        if self.text.features % self.text.heads:
            raise UserError(
                f"--features {self.text.features} does not divide into {self.text.heads} --heads: "
                "choose a multiple"
            )
        if self.imbalance != 1:
            raise UserError("--imbalance thins out classes of images, and text has none: drop it")

    def _check_sampling(self) -> None:
        if self.sampling == "instance":
            return
        given = f"--sampling {self.sampling}"
        if self.tricks.longtail:
            raise UserError(
                f"{given} and --longtail both make up for the class counts, together twice: drop one"
            )
        if self.model == "transformer":
            raise UserError(f"{given} draws classes of images, and text has none: drop it")
        if self.sampling == "progressive" and self.tricks.echo and self.echo_factor == "auto":
            raise UserError(
                f"{given} must know how many images the run reads: give --echo-factor a number"
            )


# Options of a run that no command but train uses: they may stay where a command line is tried with another.
NOT_TRAINED = {"resume", "check_data", "steps", "learning_rate", "log_every", "eval_every"}
NOT_TRAINED |= {"save_every", "keep", "tensorboard", "wandb", "coordinator", "processes", "process"}
NOT_SWEPT = NOT_TRAINED | {"accumulate", "ema"}


@dataclasses.dataclass(frozen=True)
class LrFind(Train):
    """Learning-rate range test of a run: sweep the rate, draw the loss, suggest a rate."""

    UNUSED = NOT_SWEPT
    out: str = "runs/lr-find"
    """Run directory to create: report.md, lr_range.png, range.json."""
    lo: float = 1e-6
    """First learning rate."""
    hi: float = 1.0
    """Last learning rate; the sweep ends earlier where the loss explodes."""
    rates: int = 100
    """Rates, one step each."""

    def check(self) -> None:
        """Raise UserError for a value that can't be meant."""
        super().check()
        self.check_alone("lr-find")
        at_least(self.rates, 2, "--rates", "one step is taken at each")
        at_most(self.rates, MOST, "--rates")
        if not 0 < self.lo < self.hi < float("inf"):
            raise UserError(
                f"--lo {self.lo} and --hi {self.hi} are no range: give finite 0 < lo < hi"
            )


@dataclasses.dataclass(frozen=True)
class Compare:
    """Compare runs: one table of what they reached, what they cost, and where their settings differ."""

    runs: tuple[str, ...] = dataclasses.field(default=(), metadata={"positional": True})
    """Run directories of `jaxtricks train`."""
    picture: str = ""
    """PNG to draw: their curves, and accuracy against cost."""

    def check(self) -> None:
        """Raise UserError if there is nothing to compare."""
        if not self.runs:
            raise UserError("compare needs run directories: give one or more that train made")


@dataclasses.dataclass(frozen=True)
class Fuse:
    """A run's model with every block and normalization fused: weights and a program for deployment."""

    run: str = dataclasses.field(default="", metadata={"positional": True})
    """Run directory of `jaxtricks train`; its newest checkpoint is taken."""
    out: str = ""
    """Directory to create: model.safetensors, model.stablehlo, fuse.json; RUN/fused if not given."""
    batch: int = 64
    """Images to compare and to time both models on."""

    def check(self) -> None:
        """Raise UserError for a value that can't be meant."""
        if not self.run:
            raise UserError("fuse needs a run directory: give one that `jaxtricks train` made")
        at_most(self.batch, _SIZES["batch"], "--batch")
        at_least(self.batch, 1, "--batch", "a positive number")


@dataclasses.dataclass(frozen=True)
class Ablate:
    """What each trick costs and gains: baseline, each alone, all, all but one, the best subset found."""

    data: str = "digits"
    """"digits" (embedded), a folder or a zip of class folders, or what else train takes for images."""
    root: str = ""
    """Folder that the paths in --data LIST.txt begin in, as in train."""
    out: str = "runs/ablation"
    """Run directory to create: results.json, report.md, ablation.png."""
    tricks: tuple[str, ...] = KEYS
    """The tricks to compare."""
    seeds: int = 2
    """Repetitions; mean and standard deviation are over them."""
    steps: int = 160
    """Optimizer steps a run."""
    batch: int = 64
    """Images a step."""
    imbalance: float = 20.0
    """Images of the largest over the smallest class."""
    size: int = 0
    """Side of the square to which images are resized; 0 takes the size that most of them have."""
    widths: tuple[int, ...] = (16, 32)
    """Channels of each stage."""
    search: bool = True
    """Search for the best subset too, greedily, on the validation split: at most a run a trick."""
    resume: bool = False
    """Go on with what --out has finished; a new comparison if there is none yet."""

    def check(self) -> None:
        """Raise UserError for a value that can't be meant."""
        at_least(self.seeds, 1, "--seeds", "a positive number")
        at_most(self.seeds, MOST, "--seeds")
        if not self.tricks:
            raise UserError(f"--tricks is empty: name some of {', '.join(KEYS)}")
        Tricks.of(*self.tricks)
        self.train(Tricks(), 0).check()

    def train(self, tricks: Tricks, seed: int) -> Train:
        """The run of one row and seed."""
        return Train(
            tricks=tricks,
            data=self.data,
            root=self.root,
            out=self.out,
            steps=self.steps,
            batch=self.batch,
            imbalance=self.imbalance,
            size=self.size,
            widths=self.widths,
            seed=seed,
        )


@dataclasses.dataclass(frozen=True)
class Explain:
    """Print the card of a trick: what, use, settings, when it helps and when not, cost, references."""

    key: str = dataclasses.field(default="", metadata={"positional": True})
    """echo, amp, memopt, weightstd, agc, remat, ebn, cyclical, reparam or longtail."""

    def check(self) -> None:
        """Raise UserError for an unknown key."""
        if not self.key:
            raise UserError(f"explain needs a trick: give one of {', '.join(KEYS)}")
        Tricks.of(self.key.lower())


def check_widths(widths: tuple[int, ...]) -> None:
    """Raise UserError for widths that no network has."""
    if not widths or not 1 <= min(widths) <= max(widths) <= _WIDTH:
        raise UserError(f"--widths must be from 1 to {_WIDTH}: give one width a stage")


def docs(cls: type) -> dict[str, str]:
    """Field -> the string below it, which is the help of an option; those of base classes too."""
    found: dict[str, str] = {}
    for base in filter(dataclasses.is_dataclass, reversed(cls.__mro__)):
        (tree,) = ast.parse(inspect.getsource(base)).body
        for field, text in itertools.pairwise(getattr(tree, "body", ())):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                found[ast.unparse(field.target)] = ast.literal_eval(text.value)
    return found


# --------------------------------------------------------------------------------------------------
# What the command line of `plan` can set, beyond `train`; the docstrings are the help. Imports no jax.
# --------------------------------------------------------------------------------------------------


_MOST = 2**20  # channels or classes
_NOT_PLANNED = {"skip_unreadable", "validation", "test", "weight_decay", "imbalance", "sampling"}
_NOT_PLANNED |= {"echo_factor", "seed"}


@dataclasses.dataclass(frozen=True)
class Plan(Train):
    """Plan what the training step of a run recomputes to meet a budget of bytes; nothing is trained."""

    UNUSED = NOT_TRAINED | _NOT_PLANNED
    remat_budget: str | None = dataclasses.field(default=None, metadata={"option": "budget"})
    """Bytes, such as 4GiB or 12345678, or a fraction of what the step needs as it is, such as 0.5."""
    wrt: Literal["peak", "temp"] = "peak"
    """What the budget is of: the step's arguments, results and temporaries, or temporaries alone."""
    topology: str | None = None
    """A TPU that is not attached, such as v5e:2x2; its first chip is planned for. Needs jaxtricks[tpu]."""
    max_compiles: int = 6
    """Programs that may be compiled after the unplanned one; most of the time goes there."""
    data: str = "auto"
    """Data to take the shapes from, as in train. "auto" reads none: --size, --channels and --classes tell."""
    size: int = 0
    """Side of the images; 0 is 32, or with --data the size that most of them have."""
    channels: int = 3
    """Channels of the images; those of one channel are not mirrored."""
    classes: int = 0
    """Classes of the images or characters of the text; 0 is 10 classes, 128 characters."""
    out: str = ""
    """Run directory to create: plan.json, plan.png, config.json; none if not given."""

    def check(self) -> None:
        """Raise UserError for a value that can't be meant."""
        if not self.remat_budget:
            raise UserError("plan needs --budget: bytes such as 4GiB, or a fraction such as 0.5")
        budget(self.remat_budget, "--budget")
        super().check()
        self.check_alone("plan")
        at_least(self.max_compiles, 1, "--max-compiles", "a positive number")
        at_least(self.channels, 1, "--channels", "3 for colour, 1 for gray")
        at_least(self.classes, 0, "--classes", "zero or a positive number")
        at_most(self.max_compiles, MOST, "--max-compiles")
        for name in ("channels", "classes"):
            at_most(getattr(self, name), _MOST, f"--{name}")
        if self.topology and self.parallel.devices > 1:
            raise UserError("--topology plans for the first chip alone: drop --mesh")

    def _check_paths(self) -> None:
        named(self.data, "--data")
        outside(self.out, data=self.data, root=self.root)
