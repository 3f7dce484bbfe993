"""What the command line can set: frozen dataclasses; their docstrings are the help. Imports no jax."""

import dataclasses
from typing import Literal

import tyro

from jaxtricks import KEYS


class UserError(Exception):
    """One sentence for the person at the command line: what is wrong and what to do; exit code 2."""


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
        unknown = [key for key in keys if key not in KEYS]
        if unknown:
            raise UserError(f"unknown trick {unknown[0]!r}; use one of {', '.join(KEYS)}")
        return cls(**dict.fromkeys(keys, True))

    @property
    def on(self) -> tuple[str, ...]:
        """Keys of the tricks that are on."""
        return tuple(key for key in KEYS if getattr(self, key))


@dataclasses.dataclass(frozen=True)
class Train:
    """Train one model on real images, long-tailed if you ask, with the tricks you name."""

    tricks: Tricks = dataclasses.field(default_factory=Tricks)
    data: str = "digits"
    """"digits" (embedded), a folder or a zip of class folders (train/CLASS/*, test/CLASS/*)."""
    out: str = "runs/train"
    """Run directory to create: config.json, metrics.jsonl, timing.jsonl, result.json."""
    model: Literal["resnet"] = "resnet"
    """The network."""
    widths: tuple[int, ...] = (16, 32, 64)
    """Channels of each stage; every stage after the first halves the resolution."""
    blocks: int = 1
    """Residual blocks a stage."""
    steps: int = 300
    """Optimizer steps."""
    batch: int = 64
    """Images a step."""
    learning_rate: float = 3e-3
    """Peak learning rate."""
    weight_decay: float = 1e-2
    """Decoupled weight decay of kernels, times the learning rate."""
    imbalance: float = 1.0
    """Images of the largest over the smallest class; 1 keeps the data as it is."""
    echo_factor: float = 2.0
    """Uses of each image read, when echo is on."""
    seed: int = 0
    """Seed of the split, the order, the initial weights and the augmentation."""
    devices: int = 1
    """Devices to spread each batch over."""
    log_every: int = 10
    """Steps between two lines of metrics.jsonl; the device is read only then."""

    def check(self) -> None:
        """Raise UserError for a value that can't be meant."""
        at_least(self.imbalance, 1, "--imbalance", "1 keeps the data as it is, 100 is a long tail")
        at_least(self.echo_factor, 1, "--echo-factor", "1 uses every image once, 2 twice")
        for name in ("steps", "batch", "blocks", "devices", "log_every"):
            at_least(getattr(self, name), 1, "--" + name.replace("_", "-"), "a positive number")
        if not self.widths or min(self.widths) < 1:
            raise UserError("--widths must be positive numbers: give one width a stage")
        if self.batch % self.devices:
            raise UserError(
                f"--batch {self.batch} does not divide over {self.devices} devices: choose a multiple"
            )
        if not self.learning_rate > 0:
            raise UserError(f"--learning-rate must be positive, not {self.learning_rate}")


@dataclasses.dataclass(frozen=True)
class Ablate:
    """What each trick costs and gains: baseline, each alone, all, and all but one, on one data set."""

    data: str = "digits"
    """"digits" (embedded), a folder or a zip of class folders."""
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
    widths: tuple[int, ...] = (16, 32)
    """Channels of each stage."""

    def check(self) -> None:
        """Raise UserError for a value that can't be meant."""
        at_least(self.seeds, 1, "--seeds", "a positive number")
        if not self.tricks:
            raise UserError(f"--tricks is empty: name some of {', '.join(KEYS)}")
        Tricks.of(*self.tricks)
        self.train(Tricks(), 0).check()

    def train(self, tricks: Tricks, seed: int) -> Train:
        """The run of one row and seed."""
        return Train(
            tricks=tricks,
            data=self.data,
            out=self.out,
            steps=self.steps,
            batch=self.batch,
            imbalance=self.imbalance,
            widths=self.widths,
            seed=seed,
        )


@dataclasses.dataclass(frozen=True)
class Explain:
    """Print the card of a trick: what, use, settings, when it helps and when not, cost, references."""

    key: tyro.conf.Positional[str]
    """echo, amp, memopt, weightstd, agc, remat, ebn, cyclical, reparam or longtail."""

    def check(self) -> None:
        """Raise UserError for an unknown key."""
        Tricks.of(self.key)


def at_least(value: float, least: float, name: str, hint: str) -> None:
    """Raise UserError if value < least (or is no number)."""
    if not value >= least:
        raise UserError(f"{name} must be at least {least}, not {value}: {hint}")
