"""What the command line of `plan` can set, beyond `train`; the docstrings are the help. Imports no jax."""

import dataclasses
from typing import Annotated, Literal

import tyro

from jaxtricks.lab.config import Train, UserError, at_least


@dataclasses.dataclass(frozen=True)
class Plan(Train):
    """Plan what the training step of a run recomputes to meet a budget of bytes; nothing is trained."""

    remat_budget: Annotated[str | None, tyro.conf.arg(name="budget")] = None
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
        super().check()
        self.parallel.check_alone("plan")
        if not self.remat_budget:
            raise UserError("plan needs --budget: bytes such as 4GiB, or a fraction such as 0.5")
        at_least(self.max_compiles, 1, "--max-compiles", "a positive number")
        at_least(self.channels, 1, "--channels", "3 for colour, 1 for gray")
        at_least(self.classes, 0, "--classes", "zero or a positive number")
        if self.topology and self.parallel.devices > 1:
            raise UserError("--topology plans for the first chip alone: drop --mesh")
