"""Ends a run that has diverged, before anything of it is saved."""

import math
from collections.abc import Iterable
from typing import Any

import jax

import jaxtricks as jt
from jaxtricks.lab.config import Train, UserError
from jaxtricks.lab.loop import TrainState
from jaxtricks.lab.placement import Placement


class Divergence:
    """Looks whether a run still has finite numbers: where its log or a checkpoint reads the device anyway.

    All hosts see the same numbers, and so decide alike.

    Args:
      cfg: the settings.
      place: where the state lies.

    Attributes:
      saved: the newest checkpoint, 0 if there is none.
    """

    def __init__(self, cfg: Train, place: Placement):
        self.saved = 0
        self._cfg = cfg
        self._finite = jax.jit(jt.amp.all_finite, out_shardings=place.everywhere)

    def losses(self, step: int, losses: Iterable[float], opt_state: Any) -> None:
        """The check of a window of the log that ends at `step`.

        Raises:
          UserError: a loss is not finite; with amp, which skips such steps: too many in a row were skipped.
        """
        if self._cfg.tricks.amp:
            try:
                jt.amp.check(opt_state)
            except FloatingPointError as error:
                skipped = str(error).split(": ", 1)[1].split(";")[0]
                raise self._diverged(f"{skipped}, until step {step}") from error
        elif not all(map(math.isfinite, losses)):
            raise self._diverged(f"the loss is not finite at step {step} or shortly before")

    def state(self, step: int, state: TrainState) -> None:
        """The check of what a checkpoint of `step` would hold.

        Raises:
          UserError: a parameter or a statistic is not finite.
        """
        if not bool(self._finite((state.params, state.model_state))):
            raise self._diverged(f"the parameters are not finite after step {step}")

    def _diverged(self, what: str) -> UserError:
        agc = "" if self._cfg.tricks.agc else " or add --agc"
        kept = f"its checkpoint of step {self.saved} is from before" if self.saved else "nothing is saved"
        return UserError(f"{what}: lower --learning-rate{agc}, and give another --out ({kept})")
