import json
import subprocess

import pytest
import torch

from loopwise.errors import ConfigError
from loopwise.train import machine
from loopwise.train.machine import Probe, Reading, buffer_bytes, environment, revision


def test_rates_follow_from_the_work_and_the_time(monkeypatch):
    monkeypatch.setattr(machine, "_best_time", lambda work, device, seconds: (work(), 0.5)[1])
    monkeypatch.setattr(machine, "CPU_SIZES", (8, 16))
    assert machine.matmul_peak() == 2 * 16**3 / 0.5
    assert machine.copy_bandwidth(size=4000) == 2 * 4000 / 0.5
    assert machine.read_bandwidth(size=4000) == 4000 / 0.5


def test_the_number_of_threads_is_put_back(monkeypatch):
    seen = []

    def spy(work, device, seconds):
        seen.append(torch.get_num_threads())
        return 1.0

    monkeypatch.setattr(machine, "_best_time", spy)
    before = torch.get_num_threads()
    machine.matmul_peak(threads=before + 1)
    assert set(seen) == {before + 1}
    assert torch.get_num_threads() == before


def test_a_real_measurement_is_the_shortest_of_several():
    calls = []
    shortest = machine._best_time(lambda: calls.append(1), torch.device("cpu"), 0.0)
    assert len(calls) == 4
    assert shortest > 0


def test_the_buffer_is_larger_than_the_cache(monkeypatch):
    monkeypatch.setattr(machine, "_last_level_cache", lambda: 10 * 2**20)
    assert buffer_bytes() == 40 * 2**20
    monkeypatch.setattr(machine, "_free_memory", lambda: 80 * 2**20)
    assert buffer_bytes() == 10 * 2**20


@pytest.mark.parametrize(
    ("readings", "drift", "drifted"),
    [
        ([], 0.0, False),
        ([(100.0, 10.0)], 0.0, False),
        ([(100.0, 10.0), (90.0, 10.0)], 0.1, False),
        ([(80.0, 10.0), (100.0, 10.0)], 0.2, True),
        ([(100.0, 10.0), (100.0, 8.0), (100.0, 10.0)], 0.2, True),
    ],
)
def test_drift_of_either_limit(monkeypatch, readings, drift, drifted):
    probe = Probe()
    values = iter(readings)
    current = {}
    monkeypatch.setattr(machine, "copy_bandwidth", lambda device, size: current["reading"][1])
    monkeypatch.setattr(machine, "matmul_peak", lambda dtype, device: current["reading"][0])
    for current["reading"] in values:
        probe.read()
    assert probe.readings == [Reading(matmul=matmul, copy=copy) for matmul, copy in readings]
    assert probe.drift == pytest.approx(drift)
    assert probe.drifted is drifted


def test_a_wrong_tolerance_is_refused():
    with pytest.raises(ConfigError, match="tolerance"):
        Probe(tolerance=15.0)


def test_environment_is_json_and_says_what_matters():
    record = json.loads(json.dumps(environment()))
    assert record["packages"]["torch"] == torch.__version__
    assert record["threads"] == torch.get_num_threads()
    assert record["cpu"]
    assert "accelerator" not in record


def test_revision_of_a_checkout(tmp_path):
    def git(*arguments):
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True)

    assert revision(tmp_path) is None
    git("init")
    assert revision(tmp_path) is None
    (tmp_path / "code.py").write_text("1")
    git("add", "code.py")
    git("commit", "-m", "first")
    clean = revision(tmp_path)
    assert clean is not None
    assert len(clean) == 40
    (tmp_path / "code.py").write_text("2")
    assert revision(tmp_path) == f"{clean}-dirty"
    (tmp_path / "installed").mkdir()
    (tmp_path / "installed" / "foreign.py").touch()
    assert revision(tmp_path / "installed") is None


def test_without_git_there_is_no_revision(monkeypatch):
    monkeypatch.setattr(machine.shutil, "which", lambda name: None)
    assert revision() is None
