"""What the command line of `plan` can set, beyond `train`; the docstrings are the help. Imports no jax."""

import dataclasses
from typing import Literal

from jaxtricks.lab.config import MOST, NOT_TRAINED, Train, UserError, at_least, at_most
from jaxtricks.lab.errors import budget, named, outside

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
