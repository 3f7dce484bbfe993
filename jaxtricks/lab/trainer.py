"""Train a run: read batches, loop over the step, evaluate, log, save, and stop what diverges."""

import functools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.progress import Progress

import jaxtricks as jt
from jaxtricks import _tree, remat
from jaxtricks._typing import Array
from jaxtricks.lab import collectives
from jaxtricks.lab import data as data_lib
from jaxtricks.lab import step as step_lib
from jaxtricks.lab.checkpoint import Checkpoints, Restored
from jaxtricks.lab.config import Train, UserError
from jaxtricks.lab.distributed import (
    Hosts,
    Interrupt,
    Placement,
    device_bytes,
    is_first,
)
from jaxtricks.lab.rundir import RunDir
from jaxtricks.lab.step import TrainState, TrainStep

# Examples, spread evenly, behind the curves and the training figure.
_SAMPLE = 4096
_CURVES = ("loss", "accuracy", "balanced_accuracy")
_STATUS = {"loss": "loss", "val_loss": "val", "val_accuracy": "acc"}
# Threads that decode large images; small ones are faster decoded without.
_READERS = 4
_SMALL = 64 * 64  # pixels
# The usual thresholds (100 and 20 images) leave groups empty where classes are few.
_MANY_CLASSES = 100


class Trainer:
    """One run: its state, what it reads, and what it writes.

    Args:
      cfg: the settings.
      data: what to train on.
      step: the training step.
      plan: what the step recomputes, if that was planned.
      folder: where to log.
      checkpoints: where to save.
      hosts: that train together.
    """

    def __init__(
        self,
        cfg: Train,
        data: data_lib.Data,
        step: TrainStep,
        plan: remat.Plan | None,
        folder: RunDir,
        checkpoints: Checkpoints,
        hosts: Hosts,
    ):
        self.cfg, self.data, self.folder, self.checkpoints = (
            cfg,
            data,
            folder,
            checkpoints,
        )
        self.plan, self.hosts, self.placement = plan, hosts, step.placement
        self.evaluate = Evaluator(step, data, cfg.micro_batch)
        self.state = step.start(cfg.seed, data.counts)
        self.batches = Feed(cfg, data, self.placement)
        self.meter, self.bytes_before = Meter(), 0
        self.skipped_before: set[str] = set()
        self._reported = 0  # images that broke, of those that were named
        self.divergence = Divergence(cfg, self.placement)
        self._step, self.temp_bytes = step.compile(
            self.state, step.batch_shapes()
        )

    def restore(
        self, tell: Callable[[str], None], session: dict[str, Any]
    ) -> int:
        """Go back to the newest checkpoint and cut the logs there; return the number of steps done."""
        restored = self.checkpoints.restore(self.state, tell) or Restored(
            0, self.state, None
        )
        self.state, self.divergence.saved_step = restored.state, restored.step
        if restored.host:
            self._continue(restored, tell)
        self.hosts.on_first(
            lambda: self.folder.begin_again(restored.step, session)
        )
        tell(f"going on after step {restored.step} of {self.cfg.steps}")
        return restored.step

    def _continue(
        self, restored: Restored, tell: Callable[[str], None]
    ) -> None:
        rows = self.hosts.gather(self.batches.rows)
        try:
            sentence = self.batches.resume(
                restored.step, restored.host["feeds"], rows
            )
            self.meter = Meter(restored.host["window"])
            self.bytes_before = int(restored.host["bytes_read"])
            self.skipped_before = set(
                map(str, restored.host.get("skipped", ()))
            )
        except (
            Exception
        ) as error:  # the datasets of Grain and those here fail in many ways
            raise UserError(
                f"the checkpoint of step {restored.step} in {self.folder.path} "
                f"does not say how far its data was read ({error!r}): remove "
                "it to use the one before"
            ) from error
        if sentence:
            tell(sentence)

    def fit(
        self,
        start: int,
        interrupt: Interrupt,
        outputs: list[Any],
        progress: Progress,
    ) -> None:
        """Train from `start` to the last step, or until interrupted; log, evaluate and save on the way."""
        cfg = self.cfg
        interrupt.wait()
        stopwatch = Stopwatch(start)
        # A step that is evaluated ends a window of the log.
        every = cfg.eval_every or max(1, cfg.steps // 5)
        every = math.ceil(every / cfg.log_every) * cfg.log_every
        task = progress.add_task(
            "", total=cfg.steps, completed=start, status=""
        )

        def after(
            step: int, state: TrainState, means: dict[str, float] | None
        ) -> bool:
            self.state = state
            if means is not None:
                self.divergence.check(step, [means["loss"]], state)
                timing = stopwatch.timing(
                    step, cfg.batch
                ) | self._report_skipped(progress)
                if step % every == 0 or step == cfg.steps:
                    means = {**means, **self.validate()}
                if is_first():
                    self.folder.log(step, means, timing)
                for output in outputs:
                    output.write(step, means)
                progress.update(
                    task, completed=step, status=status(means, timing)
                )
            stop = interrupt.due(step)
            if stop or step % cfg.save_every == 0 or step == cfg.steps:
                self.save(step)
            if means is not None:
                stopwatch.begin(step)
            return stop

        fit(
            self._step,
            self.state,
            self.batches,
            cfg.steps,
            start=start,
            accumulate=cfg.accumulate,
            log_every=cfg.log_every,
            meter=self.meter,
            after=after,
        )

    def validate(self) -> dict[str, float]:
        """Return metrics of (a sample of) the validation split, named val_*."""
        if self.data.validation is None:
            return {}
        summary = self.evaluate(self.state, self.data.validation, _SAMPLE)
        return {
            f"val_{name}": summary[name] for name in _CURVES if name in summary
        }

    def save(self, step: int) -> None:
        """Save everything that the next step depends on.

        Raises:
          UserError: it would hold what is not finite, or can't be written.
        """
        window = self.meter.rows()
        self.divergence.check(step, [row["loss"] for row in window], self.state)
        host = {
            "feeds": self.hosts.gather(self.batches.get_state()),
            "window": window,
            "bytes_read": self.bytes_read(),
            "skipped": self.skipped(),
        }
        self.checkpoints.save(step, self.state, host)
        self.divergence.saved_step = step

    def bytes_read(self) -> int:
        """Return the bytes of examples read by all hosts, earlier sessions included, prefetched ones too."""
        return self.bytes_before + sum(
            self.hosts.gather(self.data.train.bytes_read)
        )

    def skipped(self) -> list[str]:
        """Return the names of the examples that could not be read since the run began, on all hosts."""
        if not self.cfg.skip_unreadable:
            return []
        here = [
            name
            for _, source in self.data.splits()
            for name in list(source.skipped)
        ]
        return sorted(self.skipped_before.union(*self.hosts.gather(here)))

    def _report_skipped(self, progress: Progress) -> dict[str, int]:
        """Name the training images that broke since the last call; how many there are, for the log.

        The log of times, not that of metrics: threads read ahead, and meet them sooner
        or later.
        """
        broken = dict(self.data.train.skipped)
        for name in list(broken)[self._reported :]:
            progress.console.print(
                f"{name} can't be read any more ({broken[name]}): another "
                "image of its class is used",
                highlight=False,
                markup=False,
                soft_wrap=True,
            )
        self._reported = len(broken)
        return {"skipped_records": len(broken)} if broken else {}

    def result(self) -> dict[str, Any]:
        """Return what result.json says; the training split is measured on a sample."""
        bytes_read = self.bytes_read()
        result: dict[str, Any] = {"kind": self.data.kind}
        for name, source in self.data.splits():
            limit = _SAMPLE if name == "train" else None
            result[name] = self.evaluate(self.state, source, limit)
        result["parameters"] = sum(
            x.size for x in jax.tree.leaves(self.state.params)
        )
        result["state_bytes"] = _tree.nbytes(self.state.opt_state)
        result["temp_bytes"] = self.temp_bytes
        if self.plan:
            result["plan"] = {
                "peak_bytes": self.plan.peak,
                "unplanned_peak_bytes": self.plan.baseline,
                "budget_bytes": self.plan.budget,
                "extra_flops": self.plan.extra_flops,
            }
        skipped = self.skipped()
        if skipped:
            result["skipped_records"] = len(skipped)
        if self.placement.mesh.size > 1:
            result["mesh"] = mesh_figures(
                self.placement, self.state, self._step
            )
        return {**result, "bytes_read": bytes_read}


def mesh_figures(
    placement: Placement, state: TrainState, step: Any
) -> dict[str, Any]:
    """Return a mesh's axes, what one device holds, and what a compiled step sends."""
    rows = collectives.table(collectives.census(step)).rows
    return {
        "axes": ", ".join(
            f"{name}={size}" for name, size in placement.mesh.shape.items()
        ),
        "processes": jax.process_count(),
        "device_parameter_bytes": device_bytes(state.params),
        "device_state_bytes": device_bytes(state.opt_state),
        "sent": {kind: count for kind, count, _ in rows},
        "sent_bytes": {kind: size for kind, _, size in rows},
    }


def status(means: dict[str, float], timing: dict[str, float]) -> str:
    """Return throughput and the newest figures, short enough for a line of 80 columns."""
    figures = [
        f"{name} {means[key]:.3f}"
        for key, name in _STATUS.items()
        if key in means
    ]
    return "  ".join([f"{timing['examples_per_s']:.0f}/s", *figures])


class Stopwatch:
    """Training time of the steps between two lines of the log, evaluation and writing left out."""

    def __init__(self, step: int):
        self.begin(step)

    def begin(self, step: int) -> None:
        """Start the clock after this step."""
        self._step, self._start = step, time.perf_counter()

    def timing(self, step: int, batch: int) -> dict[str, float]:
        """Return a line of timing.jsonl."""
        steps, seconds = step - self._step, time.perf_counter() - self._start
        rate = steps * batch / seconds
        return {
            "steps": steps,
            "seconds": round(seconds, 4),
            "examples_per_s": round(rate, 1),
        }


# The loop around the step.


class Meter:
    """Means over a window of steps; the device is read once a window, or when a checkpoint asks.

    Args:
      rows: the window so far, of an earlier `rows()`.
    """

    def __init__(self, rows: Iterable[dict[str, float]] = ()):
        self._rows: list[dict[str, Any]] = list(rows)

    def add(self, metrics: dict[str, Array]) -> None:
        """Add another step's metrics, still on the device."""
        self._rows.append(metrics)

    def rows(self) -> list[dict[str, float]]:
        """Return the window so far as Python numbers."""
        rows = jax.device_get(self._rows)
        # float64 from here on: a mean must not depend on whether a checkpoint cut the
        # window in two.
        self._rows = [
            {name: float(value) for name, value in row.items()} for row in rows
        ]
        return list(self._rows)

    def mean(self) -> dict[str, float]:
        """Return the means, and empty the window."""
        rows, self._rows = self.rows(), []
        return {
            name: float(np.mean([row[name] for row in rows]))
            for name in rows[0]
        }


def fit(
    step: Callable[..., Any],
    state: TrainState,
    batches: Iterator[Any],
    steps: int,
    *,
    start: int = 0,
    accumulate: int = 1,
    log_every: int = 10,
    meter: Meter | None = None,
    after: Callable[
        [int, TrainState, dict[str, float] | None], bool
    ] = lambda *_: False,
) -> TrainState:
    """Run steps start + 1 ... steps; the device is read only every log_every steps.

    Args:
      step: (state, batch) -> (state, metrics), jitted or compiled.
      state: after `start` steps; donated.
      batches: of one micro-batch each.
      steps: the number of the last step.
      start: steps done before.
      accumulate: micro-batches per step.
      log_every: steps per window.
      meter: the window that an interrupted run left behind.
      after: called after every step with its number, the state, and the means since the
        last window at the window's end, else None; True stops.
    """
    meter = meter or Meter()
    for number in range(start + 1, steps + 1):
        for _ in range(accumulate):
            state, metrics = step(state, next(batches))
            meter.add(metrics)
        ends_window = number % log_every == 0 or number == steps
        if after(number, state, meter.mean() if ends_window else None):
            break
    return state


class Divergence:
    """Looks whether a run still has finite numbers: where its log or a checkpoint reads the device anyway.

    All hosts see the same numbers, and so decide alike.

    Args:
      cfg: the settings.
      placement: where the state lies.

    Attributes:
      saved_step: the newest checkpoint, 0 if there is none.
    """

    def __init__(self, cfg: Train, placement: Placement):
        self.saved_step = 0
        self._cfg = cfg
        self._all_finite = jax.jit(
            jt.amp.all_finite, out_shardings=placement.replicated
        )

    def check(
        self, step: int, losses: Iterable[float], state: TrainState
    ) -> None:
        """Raise unless the losses since the last check, and the state after `step`, are finite.

        With amp, which skips steps whose gradients are not finite, a loss alone may be
        anything.

        Raises:
          UserError: they are not; with amp: too many steps in a row were skipped.
        """
        if self._cfg.tricks.amp:
            try:
                jt.amp.check_skipped(state.opt_state)
            except FloatingPointError as error:
                skipped = (
                    str(error).removeprefix("amp.check_skipped: ").split(";")[0]
                )
                raise self._diverged(f"{skipped}, until step {step}") from error
            losses = ()
        # Parameters too: a relu that XLA makes of a fast maximum turns NaN into a loss
        # that looks right.
        finite = self._all_finite((state.params, state.model_state))
        if not (all(map(math.isfinite, losses)) and bool(finite)):
            raise self._diverged(
                f"the loss or a parameter is not finite at step {step} or "
                "shortly before"
            )

    def _diverged(self, what: str) -> UserError:
        agc = "" if self._cfg.tricks.agc else " or add --agc"
        saved = "nothing is saved"
        if self.saved_step:
            saved = f"its checkpoint of step {self.saved_step} is from before"
        return UserError(
            f"{what}: lower --learning-rate{agc}, and give another --out ({saved})"
        )


# Evaluation.


class Evaluator:
    """Loss and confusion metrics of a split; the compiled functions stay between calls.

    Args:
      step: what predicts.
      data: what it was composed for.
      batch: examples predicted at once.
    """

    def __init__(self, step: TrainStep, data: data_lib.Data, batch: int):
        self._num_classes, self._batch, self._kind = (
            len(data.classes),
            batch,
            data.kind,
        )
        self._step, self._placement = step, step.placement
        jit = functools.partial(
            jax.jit, out_shardings=self._placement.replicated
        )
        self._update, self._summary = jit(self._updated), jit(self._summarized)
        self._averaged = jax.jit(step.averaged)

    def __call__(
        self,
        state: TrainState,
        source: data_lib.Source,
        limit: int | None = None,
    ) -> dict[str, Any]:
        """Summarize the source (or `limit` examples spread over it); host values.

        Images: loss, accuracy and what `longtail.metrics.summary` gives. Text: loss, in
        nats per character, and accuracy.
        """
        totals = (
            jt.longtail.metrics.init(self._num_classes),
            jnp.float32(0),
            jnp.int32(0),
        )
        totals = jax.device_put(totals, self._placement.replicated)
        params = self._averaged(state)
        rows = self._placement.rows(self._batch)
        for batch in data_lib.eval_batches(source, self._batch, limit, rows):
            batch = self._placement.put(batch)
            totals = self._update(totals, params, state.model_state, batch)
        values = self._summary(totals, state.counts)
        if self._kind == "text":
            values = {name: values[name] for name in ("loss", "accuracy")}
        return {
            name: np.asarray(value).tolist() for name, value in values.items()
        }

    def _updated(
        self, totals: Any, params: Any, model_state: Any, batch: Any
    ) -> Any:
        metrics, loss, count = totals
        logits, labels = self._step.predict(params, model_state, batch)
        # Text has a label per character.
        mask = batch["where"].reshape(-1, *[1] * (labels.ndim - 1))
        where = jnp.broadcast_to(mask, labels.shape)
        losses = jt.longtail.cross_entropy()(logits, labels, where=where)
        metrics = jt.longtail.metrics.update(metrics, logits, labels, where)
        return metrics, loss + losses.sum(), count + where.sum()

    def _summarized(self, totals: Any, counts: Array) -> dict[str, Array]:
        metrics, loss, count = totals
        split = "rank" if self._num_classes < _MANY_CLASSES else "threshold"
        summary = jt.longtail.metrics.summary(metrics, counts, split=split)
        return {"loss": loss / count, **summary}


# Reading.


class Feed:
    """Endless micro-batches of the training split, on their devices.

    Batch k holds positions k * batch, ..., k * batch + batch - 1 of the stream,
    whatever the number of hosts: each of them reads the rows that lie on its devices.
    Echoing is local: the copies of an example stay with the host that read it.

    Args:
      cfg: the settings.
      data: what to read.
      placement: where batches lie.

    Attributes:
      rows: the first row of each batch that this host reads, and how many there are.
    """

    def __init__(self, cfg: Train, data: data_lib.Data, placement: Placement):
        rows = placement.rows(cfg.micro_batch).tolist()
        order = step_lib.build_order(cfg, data)
        self._cfg, self._reads = cfg, Reads(order, rows, cfg.micro_batch)
        self.rows = [rows[0], len(rows)]
        self._batches = data_lib.pipeline(
            data.train,
            batch=len(rows),
            seed=cfg.seed,
            transform=step_lib.build_echo(cfg, len(rows) * cfg.accumulate),
            to_device=placement.put,
            order=self._reads,
            readers=_READERS if math.prod(data.shape[:2]) > _SMALL else 0,
        )

    def __iter__(self) -> "Feed":
        return self

    def __next__(self) -> Any:
        return next(self._batches)

    def get_state(self) -> dict[str, Any]:
        """Return as JSON the state of the batches so far, and what of the stream has been read."""
        return {
            "rows": self.rows,
            "first": self._reads.first,
            "read": self._reads.read,
            "batches": self._batches.get_state(),
        }

    def resume(
        self, step: int, states: list[dict[str, Any]], rows: list[list[int]]
    ) -> str:
        """Go on after a step, before anything is read here.

        Args:
          step: steps done.
          states: of `get_state`, of all hosts that read until then.
          rows: those of all hosts that read now.

        Returns:
          A sentence, if other hosts read until then.
        """
        self._reads.begin_at(states[0]["first"])
        if rows == [state["rows"] for state in states]:
            self._batches.set_state(states[jax.process_index()]["batches"])
            return ""
        sentence = f"{len(states)} hosts read before, {len(rows)} now: reading goes on "
        if self._cfg.tricks.echo:
            first = max(state["read"] for state in states)
            how = f"after example {first} of the stream, without the copies still to come of those before"
        else:
            first = step * self._cfg.batch
            how = f"exactly where it was, after example {first} of the stream"
        self._reads.begin_at(first)
        return sentence + how


class Reads:
    """Position in this host's stream -> index of the example.

    Args:
      order: position in the stream of all hosts -> index.
      rows: of each batch, those that this host reads.
      batch: examples of a batch of all hosts.

    Attributes:
      first: position in the stream of all hosts where this one begins.
      read: position in the stream of all hosts behind the last batch that was begun to
        be read.
    """

    def __init__(
        self, order: Callable[[int], int], rows: Sequence[int], batch: int
    ):
        self._order, self._rows, self._batch = order, rows, batch
        self.begin_at(0)

    def begin_at(self, first: int) -> None:
        """Put position 0 of this host there in the stream of all hosts."""
        self.first = self.read = first

    def __call__(self, position: int) -> int:
        """Return the index of the example at a position of this host's stream."""
        batch, row = divmod(position, len(self._rows))
        start = self.first + batch * self._batch
        self.read = max(self.read, start + self._batch)
        return self._order(start + self._rows[row])
