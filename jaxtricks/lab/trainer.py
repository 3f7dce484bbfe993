"""A training run: its state, what it reads, and what it writes."""

import time
from collections.abc import Callable
from typing import Any

import jax
from rich.progress import Progress

from jaxtricks import _tree
from jaxtricks.lab import collectives
from jaxtricks.lab import data as data_lib
from jaxtricks.lab import planning as planning_lib
from jaxtricks.lab import step as loop_lib
from jaxtricks.lab.checkpoint import Checkpoints, Restored
from jaxtricks.lab.config import Train, UserError
from jaxtricks.lab.distributed import Placement, device_bytes
from jaxtricks.lab.divergence import Divergence
from jaxtricks.lab.evaluation import Evaluator
from jaxtricks.lab.feed import Feed
from jaxtricks.lab.hosts import Hosts, first
from jaxtricks.lab.interrupt import Interrupt
from jaxtricks.lab.rundir import RunDir

_SAMPLE = 4096  # examples, spread evenly, behind the curves and the training figure
_CURVES = ("loss", "accuracy", "balanced_accuracy")
_SHOWN = {"loss": "loss", "val_loss": "val", "val_accuracy": "acc"}


class Trainer:
    """One run: its state, what it reads, and what it writes."""

    def __init__(
        self,
        cfg: Train,
        data: data_lib.Data,
        prepared: planning_lib.Prepared,
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
        self.meter, self.bytes_before = loop_lib.Meter(), 0
        self.skipped_before: set[str] = set()
        self._told = 0
        self.divergence = Divergence(cfg, self.place)
        batch = loop_lib.batch_shapes(cfg, data, self.place)
        self.compiled = loop_lib.compile_step(program, self.state, batch)

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
            self.meter = loop_lib.Meter(restored.host["window"])
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

        def after(done: int, state: loop_lib.TrainState, means: dict[str, float] | None) -> bool:
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

        loop_lib.fit(
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
        more: dict[str, Any] = {"plan": planning_lib.figures(self.plan)} if self.plan else {}
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


def spread(place: Placement, state: loop_lib.TrainState, step: Any) -> dict[str, Any]:
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
