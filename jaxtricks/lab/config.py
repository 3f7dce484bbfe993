"""Define the settings of every command, their checks, and the error that ends a command.

The command line makes its options from the fields here. Importing this module imports
no jax.
"""

import dataclasses
import difflib
import math
import os
import re
import reprlib
from typing import Any, Literal

from jaxtricks import KEYS
from jaxtricks._table import printable

DATA, MODEL = "data", "model"
"""Axes of the mesh."""
MOST = 2**31 - 1
"""Steps are counted in 32 bits."""
_MOST_WIDTH = 2**16
_MOST_BATCH = 2**20
_START = 64  # about what a search for the largest batch starts from

_UNITS = {"": 1, "b": 1}
for _power, _letter in enumerate("kmgt", 1):
    _UNITS[f"{_letter}b"] = 1000**_power
    _UNITS[f"{_letter}ib"] = 1024**_power
_SIZE = re.compile(r"\s*((?:\d+\.?|\d*\.\d+)(?:e\d+)?)\s*([a-z]*)\s*")

# Tricks that have nothing to act on in a model, and why.
_NO_CONVOLUTION = "it has no convolution"
IDLE = {
    "weightstd": {
        "nfnet": "its convolutions are weight-standardized already",
        "transformer": _NO_CONVOLUTION,
    },
    "ebn": {
        "nfnet": "it has no normalization",
        "transformer": "it has no batch normalization",
    },
    "reparam": {
        "nfnet": "it has no normalization, which the branches need",
        "repvgg": "its blocks are re-parameterized already",
        "transformer": _NO_CONVOLUTION,
    },
}

# What else people call a trick, or a part of it, in lower-case letters and digits
# alone.
_SYNONYMS = {
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
_KEY_OF = {
    name: key for key, names in _SYNONYMS.items() for name in names.split()
}


class UserError(Exception):
    """Tell the user in one sentence what is wrong and what to do; exit code 2."""

    def __init__(self, sentence: str):
        # It may quote names from other people's files, line breaks and terminal codes
        # included.
        super().__init__(re.sub(r"\S{200,}", _shorten, printable(sentence)))


def _shorten(word: re.Match[str]) -> str:
    return f"{word[0][:80]}...{word[0][-20:]}"


class HostLostError(Exception):
    """Another process of the run has ended; exit code 75: the same command with --resume goes on."""


# Checks of single values; each raises UserError.


def at_least(value: float, least: float, name: str) -> None:
    """Raise UserError if value < least, or is not finite."""
    if not least <= value < math.inf:
        finite = "" if math.isfinite(value) else "a finite number of "
        raise UserError(f"{name} must be {finite}at least {least}, not {value}")


def at_most(value: float, most: float, name: str) -> None:
    """Raise UserError if value > most."""
    if value > most:
        raise UserError(f"{name} must be at most {most}, not {value}")


def check_positive(value: float, name: str) -> None:
    """Raise UserError unless 0 < value < infinity."""
    if not 0 < value < math.inf:
        finite = (
            "positive" if math.isfinite(value) else "a finite positive number"
        )
        raise UserError(f"{name} must be {finite}, not {value}")


def check_fraction(value: float, name: str) -> None:
    """Raise UserError unless 0 <= value < 1."""
    if not 0 <= value < 1:
        raise UserError(
            f"{name} must be at least 0 and less than 1, not {value}"
        )


def check_budget(text: str, name: str) -> None:
    """Raise UserError unless the text is a size or a fraction that `remat.plan` reads."""
    match = _SIZE.fullmatch(text.lower())
    size = math.nan
    if match and match[2] in _UNITS:
        size = float(match[1]) * _UNITS[match[2]]
    if not 0 <= size < 2**63:
        raise UserError(
            f"{name} is {reprlib.repr(text)}: give a size such as 4GiB, or a "
            "fraction such as 0.5"
        )
    if not size:
        raise UserError(f"{name} must be above 0, not {text}")


def budget(text: str) -> str | float:
    """Return a budget as the planner takes it: a number with a point, up to 1, is a fraction."""
    try:
        value = float(text)
    except ValueError:
        return text
    return value if "." in text and value <= 1 else text


def check_widths(widths: tuple[int, ...]) -> None:
    """Raise UserError for widths that no network has."""
    if not widths or not 1 <= min(widths) <= max(widths) <= _MOST_WIDTH:
        raise UserError(
            f"--widths must be from 1 to {_MOST_WIDTH}: give one width per stage"
        )


def check_path(path: str, name: str) -> None:
    """Raise UserError if the path is empty."""
    if not path.strip():
        raise UserError(f"{name} is empty: give a path, or leave it out")


def check_outside(path: str, option: str = "--out", **folders: str) -> None:
    """Raise UserError if a directory to create would lie in a folder of data, where it would be data.

    Args:
      path: the directory.
      option: what it was given by.
      folders: option -> its value, a folder or something else.
    """
    for name, folder in folders.items():
        if not (path and os.path.isdir(folder)):
            continue
        # Links are followed: a run below a link to the data would be data too.
        inside, around = os.path.realpath(path), os.path.realpath(folder)
        if inside == around or inside.startswith(os.path.join(around, "")):
            raise UserError(
                f"{option} {path} lies in --{name} {folder}, where it would be "
                f"taken for a class of images: give {option} a place outside of it"
            )


# Fields that are options.


def flag(name: str) -> str:
    """Return the option of a field, such as --log-every."""
    return "--" + name.replace("_", "-")


def option(default: Any, text: str, **metadata: Any) -> Any:
    """Make a dataclass field that is an option of the command line.

    Args:
      default: its value where the option is absent.
      text: its help.
      metadata: `least`, `most`: the range of its numbers, checked by `check_ranges`;
        `positional=True` for an argument without a flag; `name`, if the option is
        called otherwise than the field.
    """
    return dataclasses.field(
        default=default, metadata={"help": text, **metadata}
    )


def check_ranges(settings: Any) -> None:
    """Raise UserError for a number outside the range of its option."""
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if value is None or isinstance(value, str):  # "auto", "max"
            continue
        if "least" in field.metadata:
            at_least(value, field.metadata["least"], flag(field.name))
        if "most" in field.metadata:
            at_most(value, field.metadata["most"], flag(field.name))


@dataclasses.dataclass(frozen=True)
class Parallel:
    """The devices and hosts that a run is spread over."""

    mesh: str = option(
        "",
        "Devices along each axis of the mesh, such as data=4,model=2: examples "
        "are split over data, kernels over model. If absent: one device, or "
        "all devices of all hosts over data.",
    )
    fsdp: bool = option(
        False, "Split parameters and optimizer state over data too (ZeRO-3)."
    )
    coordinator: str = option(
        "",
        "Several hosts: HOST:PORT of process 0, the same everywhere, with "
        "--processes and --process; or auto on a cluster (Slurm, Open MPI, "
        "Kubernetes, Cloud TPU). --out must be on a shared disk.",
    )
    processes: int = option(
        0, "Processes, one per host, with --coordinator HOST:PORT."
    )
    process: int = option(-1, "Index of this process, from 0.")

    @property
    def axes(self) -> dict[str, int]:
        """The mesh, {"data": 4, "model": 2}; {} if there is none.

        Raises:
          UserError: it can't be read.
        """
        axes: dict[str, int] = {}
        for part in filter(None, self.mesh.split(",")):
            name, _, size = part.partition("=")
            # A mesh of a million devices is a typing error, and int() of thousands of
            # digits slow.
            devices = int(size) if size.isdecimal() and len(size) < 7 else 0
            if name not in (DATA, MODEL) or name in axes or devices < 1:
                raise UserError(
                    f"--mesh {self.mesh} can't be read: give sizes such as "
                    "data=4,model=2"
                )
            axes[name] = devices
        return axes and {DATA: axes.get(DATA, 1), MODEL: axes.get(MODEL, 1)}

    @property
    def devices(self) -> int:
        """Devices of the mesh; 1 if there is none."""
        return math.prod(self.axes.values())

    def check(self, batch: int, accumulate: int) -> None:
        """Raise UserError for values that can't be meant with these batches."""
        over = self.axes.get(DATA, 1)
        if batch % (over * accumulate):
            raise UserError(
                f"--batch {batch} does not divide over {over} devices and "
                f"{accumulate} micro-batches: choose a multiple"
            )
        self._check_hosts()

    def check_alone(self, command: str) -> None:
        """Raise UserError if a command of one process is to have several."""
        if self.coordinator:
            raise UserError(
                f"{command} runs in one process: drop --coordinator"
            )

    def _check_hosts(self) -> None:
        has_count = self.processes != 0 or self.process != -1
        if not self.coordinator or self.coordinator == "auto":
            if has_count:
                raise UserError(
                    "--processes and --process need --coordinator HOST:PORT of "
                    "process 0"
                )
            return
        # From the right: IPv6 addresses have colons.
        host, _, port = self.coordinator.rpartition(":")
        if (
            not host
            or not port.isdecimal()
            or len(port) > 5
            or not 0 < int(port) < 2**16
        ):
            raise UserError(
                f"--coordinator {self.coordinator} is not an address: give "
                "HOST:PORT of process 0, or auto"
            )
        if not 0 <= self.process < self.processes:
            raise UserError(
                "--coordinator needs --processes N and --process from 0 to N - "
                f"1, not {self.processes} and {self.process}"
            )


@dataclasses.dataclass(frozen=True)
class Tricks:
    """Which of the ten tricks are on."""

    echo: bool = option(
        False, "Data echoing: every image read is used `echo_factor` times."
    )
    amp: bool = option(
        False, "Mixed precision: bfloat16 computation, dynamic loss scale."
    )
    memopt: bool = option(
        False, "Adafactor in place of AdamW: factored second moments."
    )
    weightstd: bool = option(
        False, "Weight standardization of every convolution."
    )
    agc: bool = option(False, "Adaptive gradient clipping, unit by unit.")
    remat: bool = option(
        False, "Recompute each residual block in the backward pass."
    )
    ebn: bool = option(
        False, "Extended batch normalization in place of batch normalization."
    )
    cyclical: bool = option(
        False, "Triangular learning rate in place of warm-up and cosine."
    )
    reparam: bool = option(
        False, "Asymmetric convolution blocks in place of 3x3 convolutions."
    )
    longtail: bool = option(
        False, "Logit-adjusted loss in place of cross entropy."
    )

    @classmethod
    def of(cls, *keys: str) -> "Tricks":
        """Return the tricks with these keys on.

        Raises:
          UserError: a key of no trick; it names the one that may be meant.
        """
        for key in keys:
            if key in KEYS:
                continue
            meant = _KEY_OF.get(re.sub("[^a-z0-9]", "", key.lower()))
            similar = difflib.get_close_matches(key.lower(), KEYS, n=1)
            if meant is None and similar:
                meant = similar[0]
            hint = (
                f"did you mean {meant}? The tricks are"
                if meant
                else "use one of"
            )
            raise UserError(f"unknown trick {key!r}: {hint} {', '.join(KEYS)}")
        return cls(**dict.fromkeys(keys, True))

    @property
    def on(self) -> tuple[str, ...]:
        """Keys of the tricks that are on."""
        return tuple(key for key in KEYS if getattr(self, key))


@dataclasses.dataclass(frozen=True)
class Text:
    """The transformer over characters."""

    context: int = option(
        64,
        "Characters per window; --batch counts windows.",
        least=1,
        most=2**20,
    )
    features: int = option(
        128, "Width of the residual stream.", least=1, most=2**16
    )
    layers: int = option(2, "Attention blocks.", least=1, most=1000)
    heads: int = option(
        4, "Attention heads; they divide the features.", least=1, most=2**16
    )


@dataclasses.dataclass(frozen=True)
class Train:
    """Train one model on your images or text, with the tricks you name; stop and resume at will."""

    tricks: Tricks = dataclasses.field(default_factory=Tricks)
    text: Text = dataclasses.field(default_factory=Text)
    parallel: Parallel = dataclasses.field(default_factory=Parallel)
    data: str = option(
        "auto",
        "A folder or a zip of class folders ([train|val|test/]CLASS/*), "
        "FILE.npz (images, labels), FILE.array_record or a folder of them, "
        "FILE.txt, LIST.txt with --root, package.module:function (any "
        "random-access source), 'digits' or 'topics' (both embedded). 'auto' "
        "is digits, or topics for the transformer.",
    )
    root: str = option(
        "",
        "Folder that the paths in --data LIST.txt begin in; each line of the "
        "list is a path and a label, as ImageNet-LT, Places-LT and iNaturalist "
        "have them.",
    )
    check_data: bool = option(
        False, "Read every file once, list what can't be read, and stop."
    )
    skip_unreadable: bool = option(
        False,
        "Name the files that can't be read, leave them out, and train; if one "
        "breaks later on, another one of its class takes its place.",
    )
    size: int = option(
        0,
        "Side to which images are resized; 0: the commonest size.",
        least=0,
        most=8000,
    )
    validation: float = option(
        0.1,
        "Share of every class held out, where the data has no validation split.",
    )
    test: float = option(0.2, "The same for the test split.")
    out: str = option(
        "runs/train",
        "Run directory to create: report.md, config.json, metrics.jsonl, "
        "checkpoints and more.",
    )
    resume: bool = option(
        False,
        "Go on from the newest checkpoint in --out; a new run if there is none yet.",
    )
    model: Literal["resnet", "nfnet", "repvgg", "transformer"] = option(
        "resnet", "The network."
    )
    widths: tuple[int, ...] = option(
        (16, 32, 64),
        "Channels of each stage; every stage after the first halves the resolution.",
    )
    blocks: int = option(1, "Residual blocks per stage.", least=1, most=1000)
    steps: int = option(300, "Optimizer steps.", least=1, most=MOST)
    batch: int = option(64, "Images per step.", least=1, most=_MOST_BATCH)
    accumulate: int = option(
        1,
        "Micro-batches per step; their gradients are averaged.",
        least=1,
        most=MOST,
    )
    learning_rate: float = option(3e-3, "Peak learning rate.")
    weight_decay: float = option(
        1e-2,
        "Decoupled weight decay of kernels, times the learning rate.",
        least=0,
        most=MOST,
    )
    label_smoothing: float = option(
        0.0, "Probability spread over all classes in the training targets."
    )
    ema: float = option(
        0.0,
        "Decay of the moving average of the parameters that is evaluated; 0: "
        "no average.",
    )
    imbalance: float = option(
        1.0,
        "Images of the largest over the smallest class; 1: the data as it is.",
        least=1,
    )
    sampling: Literal["instance", "square-root", "balanced", "progressive"] = (
        option(
            "instance",
            "How classes are sampled: as the data has them, by the square root "
            "of their counts, evenly, or from the data to evenly over the run. "
            "All but instance sample with replacement.",
        )
    )
    echo_factor: float | Literal["auto"] = option(
        2.0,
        "Uses of each image read, when echo is on; auto follows how much "
        "slower reading is than the step.",
        least=1,
        most=1000,
    )
    remat_budget: str | None = option(
        None,
        "Peak bytes of the training step, such as 4GiB, or a fraction of what "
        "it needs, such as 0.5: what to recompute is planned once, before "
        "training, in place of remat's every block.",
    )
    seed: int = option(
        0,
        "Seed of the split, the order, the weights and the augmentation.",
        least=0,
        most=MOST,
    )
    log_every: int = option(
        10, "Steps between two lines of metrics.jsonl.", least=1, most=MOST
    )
    eval_every: int = option(
        0,
        "Steps between two evaluations of the validation split; 0: five a run.",
        least=0,
        most=MOST,
    )
    save_every: int = option(
        100, "Steps between two checkpoints.", least=1, most=MOST
    )
    keep: int = option(
        3, "Checkpoints that stay on the disk.", least=1, most=MOST
    )
    tensorboard: bool = option(
        False,
        "Write TensorBoard events into the run directory too; needs "
        "jaxtricks[tensorboard].",
    )
    wandb: str = option(
        "", "Weights & Biases project to log to; needs jaxtricks[wandb]."
    )

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
        check_ranges(self)
        # The step counts micro-batches.
        at_most(
            self.steps * self.accumulate, MOST, "--steps times --accumulate"
        )
        for name in ("label_smoothing", "ema", "validation", "test"):
            check_fraction(getattr(self, name), flag(name))
        # Both are shares of what is there before either is held out.
        if self.validation + self.test >= 1:
            raise UserError(
                "--validation and --test leave nothing to train on: lower them"
            )
        if not self.test:
            raise UserError(
                "--test must be above 0: a run ends by measuring on the test split"
            )
        check_widths(self.widths)
        self.parallel.check(self.batch, self.accumulate)
        check_positive(self.learning_rate, "--learning-rate")
        if self.remat_budget is not None:
            check_budget(self.remat_budget, "--remat-budget")
        self._check_paths()
        self._check_model()
        self._check_sampling()

    def check_alone(self, command: str) -> None:
        """Raise UserError for what a command that trains nothing can't do."""
        self.parallel.check_alone(command)
        for name in ("resume", "check_data"):
            if getattr(self, name):
                raise UserError(
                    f"{flag(name)} is an option of train, and {command} has "
                    "none: drop it"
                )

    def _check_paths(self) -> None:
        check_path(self.data, "--data")
        check_path(self.out, "--out")
        check_outside(self.out, data=self.data, root=self.root)

    def _check_model(self) -> None:
        for trick in self.tricks.on:
            why = IDLE.get(trick, {}).get(self.model)
            if why:
                raise UserError(
                    f"--{trick} does nothing for --model {self.model} ({why}): drop it"
                )
        if self.model != "transformer":
            return
        # The sizes of the text model count only where it is used.
        check_ranges(self.text)
        if self.text.features % self.text.heads:
            raise UserError(
                f"--features {self.text.features} does not divide into "
                f"{self.text.heads} --heads: choose a multiple"
            )
        if self.imbalance != 1:
            raise UserError(
                "--imbalance thins out classes of images, and text has none: drop it"
            )

    def _check_sampling(self) -> None:
        if self.sampling == "instance":
            return
        words = f"--sampling {self.sampling}"
        if self.tricks.longtail:
            raise UserError(
                f"{words} and --longtail both make up for the class counts, "
                "together twice: drop one"
            )
        if self.model == "transformer":
            raise UserError(
                f"{words} samples classes of images, and text has none: drop it"
            )
        if (
            self.sampling == "progressive"
            and self.tricks.echo
            and self.echo_factor == "auto"
        ):
            raise UserError(
                f"{words} must know how many images the run reads: give "
                "--echo-factor a number"
            )


# Options of a run that no command but train uses: they are accepted, so that a command
# line of train can be tried with another command.
_ONLY_TRAIN = {
    "resume",
    "check_data",
    "steps",
    "learning_rate",
    "log_every",
    "eval_every",
}
_ONLY_TRAIN |= {
    "save_every",
    "keep",
    "tensorboard",
    "wandb",
    "coordinator",
    "processes",
    "process",
}


@dataclasses.dataclass(frozen=True)
class LrFind(Train):
    """Learning-rate range test of a run: sweep the rate, draw the loss, suggest a rate."""

    UNUSED = _ONLY_TRAIN | {"accumulate", "ema"}
    out: str = option(
        "runs/lr-find",
        "Run directory to create: report.md, lr_range.png, range.json.",
    )
    lo: float = option(1e-6, "First learning rate.")
    hi: float = option(
        1.0,
        "Last learning rate; the sweep ends earlier where the loss explodes.",
    )
    rates: int = option(100, "Rates, one step at each.", least=2, most=MOST)

    def check(self) -> None:
        """Raise UserError for a value that can't be meant."""
        super().check()
        self.check_alone("lr-find")
        if not 0 < self.lo < self.hi < math.inf:
            raise UserError(
                f"--lo {self.lo} and --hi {self.hi} are not a range: give "
                "finite 0 < lo < hi"
            )


@dataclasses.dataclass(frozen=True)
class Plan(Train):
    """Plan what the training step of a run recomputes to meet a budget of bytes; nothing is trained."""

    UNUSED = _ONLY_TRAIN | {
        "skip_unreadable",
        "validation",
        "test",
        "weight_decay",
        "imbalance",
        "sampling",
        "echo_factor",
        "seed",
    }
    remat_budget: str | None = option(
        None,
        "Bytes, such as 4GiB or 12345678, or a fraction of what the step needs "
        "as it is, such as 0.5.",
        name="budget",
    )
    wrt: Literal["peak", "temp"] = option(
        "peak",
        "Budget of arguments, results and temporaries (peak), or of temporaries alone.",
    )
    topology: str | None = option(
        None,
        "A TPU that is not attached, such as v5e:2x2: its first chip. Needs "
        "jaxtricks[tpu].",
    )
    batch: int | Literal["max"] = option(  # pyrefly: ignore
        64,
        "Images per step; max: the largest batch whose step meets the budget.",
        least=1,
        most=_MOST_BATCH,
    )
    batch_step: int = option(
        1,
        "--batch max is a multiple of this, and of the devices times --accumulate.",
        least=1,
        most=_MOST_BATCH,
    )
    max_extra: float = option(
        0.5,
        "The most operations that --batch max runs twice, as a fraction of the "
        "step's.",
        least=0,
    )
    max_compiles: int = option(
        6,
        "Programs that may be compiled after the unplanned one; --batch max "
        "compiles 8 in all.",
        least=1,
        most=MOST,
    )
    host_bandwidth: float | None = option(
        None,
        "Bytes per second from the chip to the memory of its host, which prices "
        "what waits there; 0: nothing waits there. If absent: a table of chips.",
        least=0,
    )
    cache: str = option(
        "",
        "Folder of plans: the same step with the same settings is read from it "
        "in place of planned again; none if absent.",
    )
    data: str = option(
        "auto",
        "Data whose shapes count, as in train; 'auto' reads none, but takes "
        "--size and so on.",
    )
    size: int = option(
        0,
        "Side of the images; 0: 32, or with --data the commonest size.",
        least=0,
        most=8000,
    )
    channels: int = option(
        3,
        "Channels of the images: 3 for colour, 1 for gray.",
        least=1,
        most=2**20,
    )
    classes: int = option(
        0,
        "Classes of images, or characters; 0: 10 classes, 128 characters.",
        least=0,
        most=2**20,
    )
    out: str = option(
        "",
        "Run directory to create, with plan.json and plan.png; none if absent.",
    )

    def check(self) -> None:
        """Raise UserError for a value that can't be meant."""
        if not self.remat_budget:
            raise UserError(
                "plan needs --budget: bytes such as 4GiB, or a fraction such as 0.5"
            )
        check_budget(self.remat_budget, "--budget")
        if self.batch == "max":
            self._check_largest()
            return
        super().check()
        self.check_alone("plan")
        if self.topology and self.parallel.devices > 1:
            raise UserError(
                "--topology plans for the first chip alone: drop --mesh"
            )

    @property
    def multiple(self) -> int:
        """The number that --batch max is a multiple of."""
        over = self.parallel.axes.get(DATA, 1)
        return math.lcm(self.batch_step, over * self.accumulate)

    @property
    def start(self) -> "Plan":
        """The settings with a number for --batch max, from which the search starts."""
        if self.batch != "max":
            return self
        batch = max(1, _START // self.multiple) * self.multiple
        return dataclasses.replace(self, batch=batch)

    def _check_largest(self) -> None:
        check_ranges(self)
        assert self.remat_budget is not None
        if isinstance(budget(self.remat_budget), float):
            raise UserError(
                f"--budget {self.remat_budget} is a fraction of what one batch "
                "needs, and --batch max has none: give a size such as 4GiB"
            )
        if self.multiple > _MOST_BATCH:
            raise UserError(
                f"--batch max must be a multiple of {self.multiple}, which is "
                f"above {_MOST_BATCH}: lower --batch-step or --accumulate"
            )
        self.start.check()

    def _check_paths(self) -> None:
        check_path(self.data, "--data")
        folders = {"data": self.data, "root": self.root}
        check_outside(self.out, **folders)
        check_outside(self.cache, "--cache", **folders)


@dataclasses.dataclass(frozen=True)
class Compare:
    """Compare runs: one table of what they reached, what they cost, and where their settings differ."""

    runs: tuple[str, ...] = option(
        (), "Run directories of `jaxtricks train`.", positional=True
    )
    picture: str = option(
        "", "PNG to draw: their curves, and accuracy against cost."
    )

    def check(self) -> None:
        """Raise UserError if there is nothing to compare."""
        if not self.runs:
            raise UserError(
                "compare needs run directories: give one or more of `jaxtricks train`"
            )


@dataclasses.dataclass(frozen=True)
class Fuse:
    """A run's model with every block and normalization fused: weights and a program for deployment."""

    run: str = option(
        "",
        "Run directory of `jaxtricks train`; its newest checkpoint is taken.",
        positional=True,
    )
    out: str = option(
        "",
        "Directory to create: model.safetensors, model.stablehlo, fuse.json; "
        "RUN/fused if absent.",
    )
    batch: int = option(
        64,
        "Images on which both models are compared and timed.",
        least=1,
        most=2**20,
    )

    def check(self) -> None:
        """Raise UserError for a value that can't be meant."""
        if not self.run:
            raise UserError(
                "fuse needs a run directory: give one of `jaxtricks train`"
            )
        check_ranges(self)


@dataclasses.dataclass(frozen=True)
class Ablate:
    """What each trick costs and gains: baseline, each alone, all, all but one, the best subset."""

    data: str = option(
        "digits",
        "'digits' (embedded), a folder or a zip of class folders, or other "
        "images as in train.",
    )
    root: str = option(
        "", "Folder that the paths in --data LIST.txt begin in, as in train."
    )
    out: str = option(
        "runs/ablation",
        "Run directory to create: results.json, report.md, ablation.png.",
    )
    tricks: tuple[str, ...] = option(KEYS, "The tricks to compare.")
    seeds: int = option(
        2,
        "Repetitions; mean and standard deviation are over them.",
        least=1,
        most=MOST,
    )
    steps: int = option(160, "Optimizer steps per run.")
    batch: int = option(64, "Images per step.")
    imbalance: float = option(
        20.0, "Images of the largest over the smallest class."
    )
    size: int = option(
        0, "Side to which images are resized; 0: the commonest size."
    )
    widths: tuple[int, ...] = option((16, 32), "Channels of each stage.")
    search: bool = option(
        True,
        "Search greedily for the best subset, on the validation split: at most "
        "a run per trick.",
    )
    resume: bool = option(
        False,
        "Go on with what --out has finished; a new comparison if there is none yet.",
    )

    def check(self) -> None:
        """Raise UserError for a value that can't be meant."""
        check_ranges(self)
        if not self.tricks:
            raise UserError(
                f"--tricks is empty: name some of {', '.join(KEYS)}"
            )
        Tricks.of(*self.tricks)
        # The rest is checked as the settings of a run.
        self.train(Tricks(), 0).check()

    def train(self, tricks: Tricks, seed: int) -> Train:
        """Return the settings of the run of one row and seed."""
        names = (
            "data",
            "root",
            "out",
            "steps",
            "batch",
            "imbalance",
            "size",
            "widths",
        )
        shared = {name: getattr(self, name) for name in names}
        return Train(tricks=tricks, seed=seed, **shared)


@dataclasses.dataclass(frozen=True)
class Explain:
    """Print the card of a trick: what, use, settings, when it helps and when not, cost, references."""

    key: str = option("", f"One of {', '.join(KEYS)}.", positional=True)

    def check(self) -> None:
        """Raise UserError for an unknown key."""
        if not self.key:
            raise UserError(
                f"explain needs a trick: give one of {', '.join(KEYS)}"
            )
        Tricks.of(self.key.lower())
