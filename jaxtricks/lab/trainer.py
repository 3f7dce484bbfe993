"""What this host reads: its rows of every batch of one stream that all hosts share."""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.progress import Progress

import jaxtricks as jt
from jaxtricks import _tree
from jaxtricks._typing import Array
from jaxtricks.lab import collectives
from jaxtricks.lab import data as data_lib
from jaxtricks.lab import step as step_lib
from jaxtricks.lab.checkpoint import Checkpoints, Restored
from jaxtricks.lab.config import Train, UserError
from jaxtricks.lab.distributed import Hosts, Interrupt, Placement, device_bytes, first
from jaxtricks.lab.rundir import RunDir
from jaxtricks.lab.step import Program, TrainState

_READERS = 4  # threads that decode large images; small ones are faster decoded without
_SMALL = 64 * 64  # pixels


class Feed:
    """Endless micro-batches of the training split, on their devices.

    Batch k is made of positions k * batch, ..., k * batch + batch - 1 of the stream, whatever the number of
    hosts: each of them reads the rows that lie on its devices. Echoing is a host's own: the copies of an
    example stay with the host that read it.

    Args:
      cfg: the settings.
      data: what to read.
      place: where batches lie.

    Attributes:
      rows: the first of its rows and how many there are.
    """

    def __init__(self, cfg: Train, data: data_lib.Data, place: Placement):
        rows = place.rows(cfg.micro_batch).tolist()
        order = step_lib.build_order(cfg, data) or data_lib.shuffled(len(data.train), cfg.seed)
        self._cfg, self._reads = cfg, Reads(order, rows, cfg.micro_batch)
        self.rows = [rows[0], len(rows)]
        self._batches = data_lib.pipeline(
            data.train,
            batch=len(rows),
            seed=cfg.seed,
            transform=step_lib.build_reads(cfg, len(rows) * cfg.accumulate),
            to_device=place.put,
            order=self._reads,
            readers=_READERS if math.prod(data.shape[:2]) > _SMALL else 0,
        )

    def __iter__(self) -> "Feed":
        return self

    def __next__(self) -> Any:
        return next(self._batches)

    def get_state(self) -> dict[str, Any]:
        """JSON: the state of the batches given out, and what of the stream has been read."""
        return {
            "rows": self.rows,
            "first": self._reads.first,
            "read": self._reads.read,
            "batches": self._batches.get_state(),
        }

    def resume(self, step: int, states: list[dict[str, Any]], rows: list[list[int]]) -> str:
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
        said = f"{len(states)} hosts read before, {len(rows)} now: reading goes on "
        if self._cfg.tricks.echo:
            first = max(state["read"] for state in states)
            how = "after example {} of the stream, without the copies still to come of those before"
        else:
            first = step * self._cfg.batch
            how = "exactly where it was, after example {} of the stream"
        self._reads.begin_at(first)
        return said + how.format(first)


class Reads:
    """Position in this host's stream -> index of the example.

    Args:
      order: position in the stream of all hosts -> index.
      rows: of each batch, those that this host reads.
      batch: examples of a batch of all hosts.

    Attributes:
      first: position in the stream of all hosts where this one begins.
      read: position in the stream of all hosts behind the last batch that was begun to be read.
    """

    def __init__(self, order: Callable[[int], int], rows: Sequence[int], batch: int):
        self._order, self._rows, self._batch = order, rows, batch
        self.begin_at(0)

    def begin_at(self, first: int) -> None:
        """Let position 0 of this host be there in the stream of all hosts."""
        self.first = self.read = first

    def __call__(self, position: int) -> int:
        """The index of the example at a position of this host's stream."""
        k, j = divmod(position, len(self._rows))
        start = self.first + k * self._batch
        self.read = max(self.read, start + self._batch)
        return self._order(start + self._rows[j])


# --------------------------------------------------------------------------------------------------
# What a split is worth: loss, accuracy, and the metrics of long-tailed classification.
# --------------------------------------------------------------------------------------------------


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


# --------------------------------------------------------------------------------------------------
# Ends a run that has diverged, before anything of it is saved.
# --------------------------------------------------------------------------------------------------


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


# --------------------------------------------------------------------------------------------------
# The loop around the step, and the means that it logs.
# --------------------------------------------------------------------------------------------------


class Meter:
    """Means over a window of steps; the device is read once a window, or when a checkpoint asks.

    Args:
      rows: the window so far, of an earlier `rows()`.
    """

    def __init__(self, rows: Iterable[dict[str, float]] = ()):
        self._rows: list[dict[str, Any]] = list(rows)

    def add(self, metrics: dict[str, Array]) -> None:
        """Another step's metrics, still on the device."""
        self._rows.append(metrics)

    def rows(self) -> list[dict[str, float]]:
        """The window so far as Python numbers."""
        rows = jax.device_get(self._rows)
        # float64 from here on: a mean must not depend on whether a checkpoint cut the window in two.
        self._rows = [{name: float(value) for name, value in row.items()} for row in rows]
        return list(self._rows)

    def mean(self) -> dict[str, float]:
        """The means, and an empty window."""
        rows, self._rows = self.rows(), []
        return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}


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
    after: Callable[[int, TrainState, dict[str, float] | None], bool] = lambda *_: False,
) -> TrainState:
    """Run steps start + 1 ... steps; the device is read only every log_every steps.

    Args:
      step: (state, batch) -> (state, metrics), jitted or compiled.
      state: after `start` steps; donated.
      batches: of one micro-batch each.
      steps: the number of the last step.
      start: steps done before.
      accumulate: micro-batches a step.
      log_every: steps a window.
      meter: the window that an interrupted run left behind.
      after: called after every step with its number, the state, and the means since the last window at
        the window's end, else None; True stops.
    """
    meter = meter or Meter()
    for done in range(start + 1, steps + 1):
        for _ in range(accumulate):
            state, metrics = step(state, next(batches))
            meter.add(metrics)
        ends = done % log_every == 0 or done == steps
        if after(done, state, meter.mean() if ends else None):
            break
    return state


# --------------------------------------------------------------------------------------------------
# A training run: its state, what it reads, and what it writes.
# --------------------------------------------------------------------------------------------------


_SAMPLE = 4096  # examples, spread evenly, behind the curves and the training figure
_CURVES = ("loss", "accuracy", "balanced_accuracy")
_SHOWN = {"loss": "loss", "val_loss": "val", "val_accuracy": "acc"}


class Trainer:
    """One run: its state, what it reads, and what it writes."""

    def __init__(
        self,
        cfg: Train,
        data: data_lib.Data,
        prepared: step_lib.Prepared,
        folder: RunDir,
        checkpoints: Checkpoints,
        hosts: Hosts,
    ):
        self.cfg, self.data, self.folder, self.checkpoints = cfg, data, folder, checkpoints
        program, self.plan = prepared
        self.hosts, self.place = hosts, program.place
        self.evaluate = Evaluator(program, data, cfg.micro_batch)
        self.state = program.start(cfg.seed, data.counts)
        self.batches = Feed(cfg, data, self.place)
        self.meter, self.bytes_before = Meter(), 0
        self.skipped_before: set[str] = set()
        self._told = 0
        self.divergence = Divergence(cfg, self.place)
        batch = step_lib.batch_shapes(cfg, data, self.place)
        self.compiled = step_lib.compile_step(program, self.state, batch)

    def restore(self, tell: Callable[[str], None], session: dict[str, Any]) -> int:
        """Go back to the newest checkpoint and cut the logs there; the number of steps done."""
        restored = self.checkpoints.restore(self.state, tell) or Restored(0, self.state, None)
        self.state, self.divergence.saved = restored.state, restored.step
        if restored.host:
            self._continue(restored, tell)
        self.hosts.on_first(lambda: self.folder.begin_again(restored.step, session))
        tell(f"going on after step {restored.step} of {self.cfg.steps}")
        return restored.step

    def _continue(self, restored: Restored, tell: Callable[[str], None]) -> None:
        rows = self.hosts.gather(self.batches.rows)
        try:
            said = self.batches.resume(restored.step, restored.host["feeds"], rows)
            self.meter = Meter(restored.host["window"])
            self.bytes_before = int(restored.host["bytes_read"])
            self.skipped_before = set(map(str, restored.host.get("skipped", ())))
        except Exception as error:  # each dataset of Grain and of ours fails in its own way
            raise UserError(
                f"the checkpoint of step {restored.step} in {self.folder.path} does not say how far its "
                f"data was read ({error!r}): remove it to use the one before"
            ) from error
        if said:
            tell(said)

    def fit(self, start: int, interrupt: Interrupt, outputs: list[Any], progress: Progress) -> None:
        """Train from `start` to the last step, or until interrupted; log, evaluate and save on the way."""
        cfg = self.cfg
        interrupt.wait()
        window = Window(start)
        # A step that is evaluated ends a window of the log.
        every = -(-(cfg.eval_every or max(1, cfg.steps // 5)) // cfg.log_every) * cfg.log_every
        task = progress.add_task("", total=cfg.steps, completed=start, status="")

        def after(done: int, state: step_lib.TrainState, means: dict[str, float] | None) -> bool:
            self.state = state
            if means is not None:
                self.divergence.check(done, [means["loss"]], state)
                timing = window.timing(done, cfg.batch) | self._tell_skipped(progress)
                if done % every == 0 or done == cfg.steps:
                    means = {**means, **self.validate()}
                if first():
                    self.folder.log(done, means, timing)
                for output in outputs:
                    output.write(done, means)
                progress.update(task, completed=done, status=status(means, timing))
            stop = interrupt.due(done)
            if stop or done % cfg.save_every == 0 or done == cfg.steps:
                self.save(done)
            if means is not None:
                window.begin(done)
            return stop

        fit(
            self.compiled.step,
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
        """Metrics of (a sample of) the validation split, named val_*."""
        if self.data.validation is None:
            return {}
        summary = self.evaluate(self.state, self.data.validation, _SAMPLE)
        return {f"val_{name}": summary[name] for name in _CURVES if name in summary}

    def save(self, step: int) -> None:
        """A checkpoint of everything that the next step depends on.

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
        self.divergence.saved = step

    def bytes_read(self) -> int:
        """Bytes of examples read by all hosts, earlier sessions included; the prefetched ones count."""
        return self.bytes_before + sum(self.hosts.gather(self.data.train.bytes_read))

    def skipped(self) -> list[str]:
        """Names of the examples that could not be read since the run began, on all hosts."""
        if not self.cfg.skip_unreadable:
            return []
        here = [name for part in self._splits() for name in list(part.skipped)]
        return sorted(self.skipped_before.union(*self.hosts.gather(here)))

    def _splits(self) -> list[data_lib.Source]:
        splits = (self.data.train, self.data.validation, self.data.test)
        return [part for part in splits if part is not None]

    def _tell_skipped(self, progress: Progress) -> dict[str, int]:
        """Name the training images that broke since the last call; how many there are, for the log.

        The log of times, not that of metrics: threads read ahead, and meet them sooner or later.
        """
        broken = dict(self.data.train.skipped)
        for name in list(broken)[self._told :]:
            progress.console.print(
                f"{name} can't be read any more ({broken[name]}): another image of its class is used",
                highlight=False,
                markup=False,
                soft_wrap=True,
            )
        self._told = len(broken)
        return {"skipped_records": len(broken)} if broken else {}

    def result(self) -> dict[str, Any]:
        """What result.json says; the training split is measured on a sample."""
        data, bytes_read = self.data, self.bytes_read()
        splits = {"train": data.train, "validation": data.validation, "test": data.test}
        measured = {
            name: self.evaluate(self.state, source, _SAMPLE if name == "train" else None)
            for name, source in splits.items()
            if source is not None
        }
        more: dict[str, Any] = {"plan": step_lib.figures(self.plan)} if self.plan else {}
        if skipped := self.skipped():
            more["skipped_records"] = len(skipped)
        if self.place.mesh.size > 1:
            more["mesh"] = spread(self.place, self.state, self.compiled.step)
        return {
            "kind": data.kind,
            **measured,
            "parameters": sum(x.size for x in jax.tree.leaves(self.state.params)),
            "state_bytes": _tree.nbytes(self.state.opt_state),
            "temp_bytes": self.compiled.temp_bytes,
            **more,
            "bytes_read": bytes_read,
        }


def spread(place: Placement, state: step_lib.TrainState, step: Any) -> dict[str, Any]:
    """What result.json says of a mesh: its axes, what one device holds, what a compiled step sends."""
    rows = collectives.table(collectives.census(step)).rows
    return {
        "axes": ", ".join(f"{name}={size}" for name, size in place.mesh.shape.items()),
        "processes": jax.process_count(),
        "device_parameter_bytes": device_bytes(state.params),
        "device_state_bytes": device_bytes(state.opt_state),
        "sent": {kind: count for kind, count, _ in rows},
        "sent_bytes": {kind: size for kind, _, size in rows},
    }


def status(means: dict[str, float], timing: dict[str, float]) -> str:
    """Throughput and the newest figures, short enough for a line of 80 columns."""
    figures = [f"{name} {means[key]:.3f}" for key, name in _SHOWN.items() if key in means]
    return "  ".join([f"{timing['examples_per_s']:.0f}/s", *figures])


class Window:
    """Training time of the steps between two lines of the log, evaluation and writing left out."""

    def __init__(self, step: int):
        self.begin(step)

    def begin(self, step: int) -> None:
        """The clock starts after this step."""
        self._step, self._start = step, time.perf_counter()

    def timing(self, step: int, batch: int) -> dict[str, float]:
        """A line of timing.jsonl."""
        steps, seconds = step - self._step, time.perf_counter() - self._start
        rate = steps * batch / seconds
        return {"steps": steps, "seconds": round(seconds, 4), "examples_per_s": round(rate, 1)}
