"""What a split is worth: loss, accuracy, and the metrics of long-tailed classification."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxtricks as jt
from jaxtricks._typing import Array
from jaxtricks.lab import data as data_lib
from jaxtricks.lab.step import Program, TrainState


class Evaluator:
    """Loss and confusion metrics of a split; the compiled functions are kept between calls.

    Args:
      program: what predicts.
      data: what it was composed for.
      batch: examples predicted at once.
    """

    def __init__(self, program: Program, data: data_lib.Data, batch: int):
        self._num_classes, self._batch, self._kind = len(data.classes), batch, data.kind
        self._place = program.place
        # The usual thresholds (100 and 20 images) leave groups empty where classes are few.
        split = "rank" if self._num_classes < 100 else "threshold"

        def update(seen: Any, params: Any, model_state: Any, batch: Any) -> Any:
            metrics, total, n = seen
            logits, labels = program.predict(params, model_state, batch)
            where = jnp.broadcast_to(
                batch["where"][(...,) + (None,) * (labels.ndim - 1)], labels.shape
            )
            losses = jt.longtail.cross_entropy()(logits, labels, where=where)
            metrics = jt.longtail.metrics.update(metrics, logits, labels, where)
            return metrics, total + losses.sum(), n + where.sum()

        def summary(seen: Any, counts: Array) -> dict[str, Array]:
            metrics, total, n = seen
            return {"loss": total / n, **jt.longtail.metrics.summary(metrics, counts, split=split)}

        everywhere = self._place.everywhere
        self._update = jax.jit(update, out_shardings=everywhere)
        self._summary = jax.jit(summary, out_shardings=everywhere)
        self._averaged = jax.jit(program.averaged)

    def __call__(
        self, state: TrainState, source: data_lib.Source, limit: int | None = None
    ) -> dict[str, Any]:
        """Summary over the source (or `limit` examples spread over it); host values.

        Images: loss, accuracy and what `longtail.metrics.summary` gives. Text: loss, in nats per
        character, and accuracy.
        """
        seen = jt.longtail.metrics.init(self._num_classes), jnp.float32(0), jnp.int32(0)
        seen = jax.device_put(seen, self._place.everywhere)
        params = self._averaged(state)
        rows = self._place.rows(self._batch)
        for batch in data_lib.eval_batches(source, self._batch, limit, rows):
            seen = self._update(seen, params, state.model_state, self._place.put(batch))
        values = self._summary(seen, state.counts)
        if self._kind == "text":
            values = {name: values[name] for name in ("loss", "accuracy")}
        return {name: np.asarray(value).tolist() for name, value in values.items()}
