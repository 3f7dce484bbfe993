"""Settings of the `longtail-bench` command. Imports no jax."""

import dataclasses

from jaxtricks.lab.config import MOST, Train, UserError, at_least, at_most
from jaxtricks.lab.errors import positive

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

    data: str = "digits"
    """"digits" (embedded), a folder or a zip of class folders, or what else train takes for images."""
    root: str = ""
    """Folder that the paths in --data LIST.txt begin in, as in train."""
    out: str = "runs/longtail"
    """Run directory to create: results.json, report.md."""
    methods: tuple[str, ...] = METHODS
    """The methods to compare; cross_entropy is always there."""
    seeds: int = 3
    """Repetitions: of the images that are kept, the order and the initial weights."""
    steps: int = 1000
    """Optimizer steps a run."""
    batch: int = 128
    """Images a step."""
    rate: float = 0.1
    """Peak learning rate, the same for all methods."""
    imbalance: float = 100.0
    """Images of the largest over the smallest class."""
    size: int = 0
    """Side of the square that images are resized to; 0 takes what most of them have."""
    widths: tuple[int, ...] = (16, 32, 64)
    """Channels of each stage."""
    blocks: int = 1
    """Residual blocks a stage: 1 is a ResNet-8, 5 a ResNet-32."""

    def check(self) -> None:
        """Raise UserError for a value that can't be meant."""
        for name in ("seeds", "steps", "batch", "blocks"):
            at_least(getattr(self, name), 1, f"--{name}", "a positive number")
        positive(self.rate, "--rate")
        # What a run of the same settings refuses.
        names = ("data", "root", "out", "steps", "batch", "blocks", "imbalance", "size", "widths")
        Train(**{name: getattr(self, name) for name in names}).check()
        at_most(self.seeds, MOST, "--seeds")
        unknown = [m for m in self.methods if m not in METHODS]
        if unknown:
            raise UserError(f"--methods knows no {unknown[0]!r}: use some of {', '.join(METHODS)}")
