import builtins
import importlib
import math
import sys
from types import ModuleType

import pytest

from loopwise.errors import ConfigError, MissingExtraError
from loopwise.train.trackers import build_trackers, scalars

VALUES = {
    "loss": 2.5,
    "loss_by_loop": [3.0, 2.5],
    "timing": {"tokens_per_second": 1000},
    "ok": True,
    "stage": "one",
    "nothing": None,
    "bad": math.nan,
}


class FakeRun:
    def __init__(self, options):
        self.options, self.logged, self.finished = options, [], False

    def log(self, values, step):
        self.logged.append((step, values))

    def finish(self):
        self.finished = True


@pytest.fixture
def fake(monkeypatch, request):
    module = ModuleType(request.param)
    module.runs = []

    def init(**options):
        module.runs.append(FakeRun(options))
        return module.runs[-1]

    module.init = init
    monkeypatch.setitem(sys.modules, request.param, module)
    return module


def build(names, folder):
    return build_trackers(names, folder=folder, project="loops", run="first", config={"width": 8})


def test_scalars_flatten_numbers_only():
    found = scalars(VALUES)
    assert math.isnan(found.pop("bad"))
    assert found == {
        "loss": 2.5,
        "loss_by_loop/1": 3.0,
        "loss_by_loop/2": 2.5,
        "timing/tokens_per_second": 1000.0,
        "ok": 1.0,
    }


@pytest.mark.parametrize("fake", ["wandb", "trackio"], indirect=True)
def test_boards_get_their_run_and_their_numbers(fake, tmp_path):
    (tracker,) = build([fake.__name__], tmp_path)
    tracker.log(VALUES, 12)
    tracker.close()
    (run,) = fake.runs
    expected = {"project": "loops", "name": "first", "config": {"width": 8}, "resume": "allow"}
    if fake.__name__ == "wandb":
        expected |= {"id": "first", "dir": str(tmp_path)}
    assert run.options == expected
    ((step, values),) = run.logged
    assert step == 12
    assert values == {key: value for key, value in scalars(VALUES).items() if key != "bad"}
    assert run.finished


def test_tensorboard_writes_event_files_that_it_can_read(tmp_path):
    (tracker,) = build(["tensorboard"], tmp_path)
    tracker.log({"loss": 2.5, "loss_by_loop": [3.0, 2.5]}, 1)
    tracker.log({"loss": 2.25}, 2)
    tracker.close()
    module = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    events = module.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 2.5), (2, 2.25)]
    assert [event.value for event in events.Scalars("loss_by_loop/1")] == [3.0]


@pytest.mark.parametrize("name", ["wandb", "trackio", "tensorboard"])
def test_a_missing_package_names_the_command_before_anything_starts(name, tmp_path, monkeypatch):
    real_import = builtins.__import__

    def refuse(wanted, *arguments, **options):
        if wanted.split(".")[0] == name:
            raise ImportError(wanted)
        return real_import(wanted, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", refuse)
    for loaded in [key for key in sys.modules if key.split(".")[0] == name or "torch.utils.tensorboard" in key]:
        monkeypatch.delitem(sys.modules, loaded)
    if name != "tensorboard":
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtraError, match=rf"pip install 'loopwise\[{name}\]'"):
        build([name], tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_tracker_lists_the_right_ones(tmp_path):
    with pytest.raises(ConfigError, match="wandb, trackio, tensorboard"):
        build(["mlflow"], tmp_path)
