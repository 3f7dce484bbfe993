"""TensorBoard and Weights & Biases: what arrives, what a resumed run must not repeat, what is missing."""

import json
import math
import struct
import sys
import types

import pytest
from jaxtricks.lab import writers
from jaxtricks.lab.config import Train, UserError
from tensorboardX.proto import event_pb2


def events(folder):
    """Events of every file of the folder, in the order in which TensorBoard reads them."""
    found = []
    for path in sorted(folder.glob("*tfevents*")):
        data, at = path.read_bytes(), 0
        while at < len(data):  # a record: length, its checksum, the bytes, their checksum
            (length,) = struct.unpack_from("<Q", data, at)
            found.append(event_pb2.Event.FromString(data[at + 12 : at + 12 + length]))
            at += 16 + length
    return found


def shown(folder):
    """{tag: {step: value}} as TensorBoard shows it: a session's start hides what was at later steps."""
    values = {}
    for event in events(folder):
        if event.HasField("session_log") and event.session_log.status == event.session_log.START:
            for steps in values.values():
                for step in [s for s in steps if s >= event.step]:
                    del steps[step]
        for value in event.summary.value:
            assert event.step not in values.setdefault(value.tag, {})  # never twice
            values[value.tag][event.step] = round(value.simple_value, 5)
    return values


def write(writer, steps, offset=0.0):
    for step in steps:
        writer.write(step, {"loss": step + offset, "nothing": None, "lost": math.nan})
    writer.close()


def test_tensorboard_gets_values_at_their_steps(tmp_path):
    writer = writers.TensorBoard(tmp_path)
    writer.write(10, {"loss": 2.5, "val_accuracy": 0.25})
    writer.write(20, {"loss": math.inf, "val_accuracy": 0.5, "learning_rate": None})
    writer.close()
    assert shown(tmp_path) == {"loss": {10: 2.5}, "val_accuracy": {10: 0.25, 20: 0.5}}


def test_tensorboard_shows_no_step_twice_after_resuming(tmp_path):
    write(writers.TensorBoard(tmp_path), (10, 20, 30, 40))
    write(writers.TensorBoard(tmp_path, start=20), (30, 40, 50), offset=0.5)
    assert shown(tmp_path) == {"loss": {10: 10, 20: 20, 30: 30.5, 40: 40.5, 50: 50.5}}
    assert len(list(tmp_path.iterdir())) == 2  # made within a second, and neither is lost


class FakeWandb(types.ModuleType):
    """wandb's calls as this project makes them, and a server that keeps runs by id."""

    class Error(Exception):
        """wandb.Error."""

    def __init__(self, offline=False, broken=False):
        super().__init__("wandb")
        self.offline, self.broken, self.runs, self.calls = offline, broken, {}, []

    def init(self, *, project, dir, id, resume, config, allow_val_change):
        if self.broken:
            raise self.Error("No API key\nconfigured")
        self.calls.append({"project": project, "dir": dir, "id": id, "resume": resume})
        self.config = config
        return FakeRun(self.runs.setdefault(id, []), self.offline)


class FakeRun:
    def __init__(self, history, offline):
        self.history, self.offline, self.finished = history, offline, False
        self.step = history[-1][0] + 1 if history and not offline else 0

    def log(self, data, step):
        assert not self.finished and all(map(math.isfinite, data.values()))
        self.history.append((step, data))

    def finish(self):
        self.finished = True


@pytest.mark.parametrize("offline", [False, True])
def test_wandb_continues_its_run_without_repeating_steps(monkeypatch, tmp_path, offline):
    wandb = FakeWandb(offline)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    write(writers.WandB("cats", tmp_path, {"seed": 0}), (10, 20, 30))
    write(writers.WandB("cats", tmp_path, {"seed": 0}, resume_step=10), (20, 30, 40))
    (history,) = wandb.runs.values()  # one id
    assert [step for step, _ in history] == [10, 20, 30, 40]
    assert history[-1][1] == {"loss": 40.0}
    assert all(call["resume"] == "allow" and call["project"] == "cats" for call in wandb.calls)
    assert wandb.calls[0]["dir"] == str(tmp_path)


def test_wandb_starts_afresh_with_a_new_run(monkeypatch, tmp_path):
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for _ in range(2):  # a run that was killed before its first checkpoint starts at 0 again
        write(writers.WandB("cats", tmp_path, {}), (10,))
    assert len(wandb.runs) == 2
    (tmp_path / "wandb.json").write_text('{"id": ')
    write(writers.WandB("cats", tmp_path, {}, resume_step=10), (20,))
    assert [[step for step, _ in history] for history in wandb.runs.values()] == [[10], [10], [20]]
    assert set(json.loads((tmp_path / "wandb.json").read_text())) == {"id", "next"}


def test_wandb_without_login_is_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb(broken=True))
    with pytest.raises(UserError, match="No API key configured.*wandb login.*WANDB_MODE=offline"):
        writers.WandB("cats", tmp_path, {})


@pytest.mark.parametrize(
    ("module", "cfg"),
    [("tensorboardX", Train(tensorboard=True)), ("wandb", Train(wandb="cats"))],
)
def test_a_missing_package_is_named_with_its_extra(monkeypatch, tmp_path, module, cfg):
    monkeypatch.setitem(sys.modules, module, None)
    extra = module.removesuffix("X").lower()
    with pytest.raises(UserError, match=rf"--{extra} needs {module} .*'jaxtricks\[{extra}\]'"):
        writers.open_writers(cfg, tmp_path)


def test_only_the_writers_that_were_asked_for_are_opened(monkeypatch, tmp_path):
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    assert writers.open_writers(Train(), tmp_path) == [] and not list(tmp_path.iterdir())
    opened = writers.open_writers(Train(wandb="cats", tensorboard=True, seed=3), tmp_path, 20)
    for writer in opened:
        write(writer, (30,))
    assert shown(tmp_path / "tensorboard") == {"loss": {30: 30.0}}
    (history,) = wandb.runs.values()
    assert history == [(30, {"loss": 30.0})] and wandb.config["seed"] == 3
