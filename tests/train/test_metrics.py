import errno
import json
import math
import os
import resource

import pytest

from loopwise.errors import InputError, StorageError
from loopwise.train.metrics import MetricsLog, read_metrics, rewind


def write(path, steps, **options):
    with MetricsLog(path, **options) as log:
        for step in steps:
            log.log({"loss": 1 / step, "loss_by_loop": [0.1, 0.2]}, step)


def test_a_resumed_file_equals_an_uninterrupted_one(tmp_path):
    whole, killed = tmp_path / "whole.jsonl", tmp_path / "killed.jsonl"
    write(whole, range(1, 9))
    write(killed, range(1, 7))
    with killed.open("ab") as file:
        file.write(b'{"step": 7, "lo')
    write(killed, range(5, 9), resume_step=4)
    assert killed.read_bytes() == whole.read_bytes()
    assert sorted(child.name for child in tmp_path.iterdir()) == ["killed.jsonl", "whole.jsonl"]


def test_every_cut_of_the_file_can_be_resumed(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 4))
    data = path.read_bytes()
    for cut in range(len(data) + 1):
        path.write_bytes(data[:cut])
        whole_lines = data[:cut].count(b"\n")
        assert [line["step"] for line in read_metrics(path)] == list(range(1, whole_lines + 1))
        write(path, range(whole_lines + 1, 4))
        assert path.read_bytes() == data


def test_lines_are_on_disk_at_once_and_seen_by_other_readers(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    log = MetricsLog(path)
    log.log({"loss": 2.0}, 1)
    assert read_metrics(path) == [{"step": 1, "loss": 2.0}]
    log.sync()
    log.close()


def test_numbers_survive_exactly_and_the_file_is_strict_json(tmp_path):
    path = tmp_path / "metrics.jsonl"
    values = {"third": 1 / 3, "nan": math.nan, "nest": {"up": [math.inf, -math.inf]}, "n": 3, "text": "é\n", "no": None}
    with MetricsLog(path) as log:
        log.log(values, 7)

    def forbid(name):
        raise AssertionError(name)

    json.loads(path.read_text(), parse_constant=forbid)
    (line,) = read_metrics(path)
    assert math.isnan(line.pop("nan"))
    assert line == {"step": 7, **{key: value for key, value in values.items() if key != "nan"}}


def test_rewind_leaves_a_file_with_nothing_to_drop_alone(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 4))
    before = path.stat().st_ino
    rewind(path, 3)
    assert path.stat().st_ino == before
    rewind(path, 2)
    assert [line["step"] for line in read_metrics(path)] == [1, 2]


def test_a_kill_while_rewinding_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 4))
    data = path.read_bytes()

    def refuse(*arguments):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(StorageError, match="cannot write"):
        MetricsLog(path, resume_step=1)
    assert path.read_bytes() == data


def test_garbage_in_the_middle_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(InputError, match="line 2"):
        read_metrics(path)


def test_a_full_disk_is_one_line_and_the_file_can_be_resumed(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    log.log({"loss": 1.0}, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 5, hard))
    try:
        for step in (2, 3):
            with pytest.raises(StorageError) as error:
                log.log({"loss": 1.0}, step)
            assert "\n" not in str(error.value)
            assert "cannot write" in str(error.value)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        log.close()
    with MetricsLog(path, resume_step=1) as log:
        log.log({"loss": 1.0}, 2)
    assert [line["step"] for line in read_metrics(path)] == [1, 2]
