"""Ends a run that has diverged, before anything of it is saved."""

import math
from collections.abc import Iterable

import jax

import jaxtricks as jt
from jaxtricks.lab.config import Train, UserError
from jaxtricks.lab.distributed import Placement
from jaxtricks.lab.step import TrainState


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

    def check(self, step: int, losses: Iterable[float], state: TrainState) -> None:
        """Raise unless the losses since the last check, and the state after `step`, are finite.

        With amp, which skips steps whose gradients are not finite, a loss alone may be anything.

        Raises:
          UserError: they are not; with amp: too many steps in a row were skipped.
        """
        if self._cfg.tricks.amp:
            try:
                jt.amp.check(state.opt_state)
            except FloatingPointError as error:
                skipped = str(error).removeprefix("amp.check: ").split(";")[0]
                raise self._diverged(f"{skipped}, until step {step}") from error
            losses = ()
        # Parameters too: a relu that XLA makes of a fast maximum turns NaN into a loss that looks right.
        finite = self._finite((state.params, state.model_state))
        if not (all(map(math.isfinite, losses)) and bool(finite)):
            raise self._diverged(
                f"the loss or a parameter is not finite at step {step} or shortly before"
            )

    def _diverged(self, what: str) -> UserError:
        agc = "" if self._cfg.tricks.agc else " or add --agc"
        kept = (
            f"its checkpoint of step {self.saved} is from before"
            if self.saved
            else "nothing is saved"
        )
        return UserError(f"{what}: lower --learning-rate{agc}, and give another --out ({kept})")
