"""Corrupt, truncated, missing: one clear line each, and what was there before stays whole."""

import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from loopwise.errors import CheckpointError, NotFoundError, StorageError
from loopwise.hub import shards
from loopwise.hub.checkpoints import inspect, load, save

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def refuses(folder: Path, kind: type[Exception], *words: str) -> None:
    with pytest.raises(kind) as caught:
        load(folder)
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


@pytest.mark.parametrize("kept", [0, 7, 200, 700_000])
def test_truncated(kept: int, copy: Any) -> None:
    folder = copy("ouro-tiny").path
    whole = (folder / WEIGHTS).read_bytes()
    assert kept < len(whole)
    (folder / WEIGHTS).write_bytes(whole[:kept])
    refuses(folder, CheckpointError, WEIGHTS, "corrupt or truncated", "fetch or write it again")


def test_corrupt_header_and_garbage(copy: Any) -> None:
    folder = copy("ouro-tiny").path
    whole = bytearray((folder / WEIGHTS).read_bytes())
    whole[8:12] = b"\xff\xfe]}"
    (folder / WEIGHTS).write_bytes(whole)
    refuses(folder, CheckpointError, "corrupt or truncated")
    (folder / WEIGHTS).write_bytes(b"not a checkpoint" * 999)
    refuses(folder, CheckpointError, "corrupt or truncated")


@pytest.mark.parametrize("text", ["", "{", "[1]", "\ufeff{}", '{"model_type"'])
def test_config_that_is_no_object(text: str, copy: Any) -> None:
    folder = copy("ouro-tiny").path
    (folder / "config.json").write_text(text)
    refuses(folder, CheckpointError, "config.json")


def test_config_missing(copy: Any, tmp_path: Path) -> None:
    folder = copy("ouro-tiny").path
    (folder / "config.json").unlink()
    refuses(folder, NotFoundError, "config.json")
    refuses(tmp_path / "nowhere", NotFoundError, "nowhere", "no such folder")
    refuses(folder / WEIGHTS, NotFoundError, "is a file; give the folder")


def test_no_weights(copy: Any) -> None:
    folder = copy("ouro-tiny").path
    (folder / WEIGHTS).unlink()
    refuses(folder, NotFoundError, f"has no {WEIGHTS}")


def test_a_pickle_is_never_read(copy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = copy("ouro-tiny").path
    (folder / WEIGHTS).unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("a pickle was read"))
    refuses(folder, NotFoundError, "pytorch_model.bin is a pickle, which is never read: convert it to safetensors")


@pytest.fixture
def sharded(golden: Path, tmp_path: Path) -> Path:
    save(load(golden / "ouro-tiny"), tmp_path / "sharded", shard_bytes=200_000)
    return tmp_path / "sharded"


def test_a_shard_is_missing(sharded: Path) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.unlink()
    refuses(sharded, NotFoundError, f"has no {shard.name}, which {INDEX} names")
    assert str(inspect(sharded).problem).endswith("fetch it again")


def test_a_shard_is_truncated(sharded: Path) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-1])
    refuses(sharded, CheckpointError, shard.name, "corrupt or truncated")


def test_an_index_may_not_point_out_of_its_folder(sharded: Path, golden: Path) -> None:
    raw = json.loads((sharded / INDEX).read_text())
    raw["weight_map"] = dict.fromkeys(raw["weight_map"], str(golden / "ouro-tiny" / "expected.safetensors"))
    (sharded / INDEX).write_text(json.dumps(raw))
    refuses(sharded, NotFoundError, "has no expected.safetensors")


@pytest.mark.parametrize("text", ["{}", '{"weight_map": ["a"]}', '{"weight_map": {"a": 3}}'])
def test_an_index_that_is_none(text: str, sharded: Path) -> None:
    (sharded / INDEX).write_text(text)
    refuses(sharded, CheckpointError, "has no weight_map")


def test_an_empty_index(sharded: Path) -> None:
    (sharded / INDEX).write_text('{"weight_map": {}}')
    refuses(sharded, CheckpointError, "missing")


def test_one_tensor_in_two_shards(sharded: Path) -> None:
    first, second = sorted(sharded.glob("*.safetensors"))[:2]
    second.write_bytes(first.read_bytes())
    refuses(sharded, CheckpointError, "is in both")


@contextmanager
def files_no_larger_than(size: int) -> Iterator[None]:
    """The kernel refuses to write more, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("shard_bytes", [10**9, 200_000])
def test_a_full_disk_leaves_the_old_checkpoint(shard_bytes: int, sharded: Path, copy: Any) -> None:
    before = contents(sharded)
    model = load(sharded)
    with torch.no_grad():
        model.embed.weight.add_(1)
    with files_no_larger_than(120_000), pytest.raises(StorageError, match="free space or choose another folder"):
        save(model, sharded, shard_bytes=shard_bytes)
    assert contents(sharded) == before
    load(sharded)


def test_no_shard_is_replaced_before_all_are_written(
    sharded: Path, golden: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(sharded)
    model = load(sharded)
    with torch.no_grad():
        model.embed.weight.add_(1)
    write, written = shards.save_file, []

    def third_is_too_many(tensors: Any, path: Path, **rest: Any) -> None:
        written.append(path)
        if len(written) == 3:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        write(tensors, path, **rest)

    monkeypatch.setattr(shards, "save_file", third_is_too_many)
    with pytest.raises(StorageError, match="No space left on device"):
        save(model, sharded, shard_bytes=200_000)
    assert contents(sharded) == before


def test_a_full_disk_at_the_config_leaves_no_half_file(
    golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, content: bytes) -> None:
        path.write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shards, "_write_bytes", refuse)
    with pytest.raises(StorageError, match=r"cannot write .*config.json"):
        save(load(golden / "ouro-tiny"), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {WEIGHTS}
    monkeypatch.undo()
    # Without config.json the folder is no checkpoint yet.
    refuses(tmp_path, NotFoundError, "config.json")


def test_a_folder_that_cannot_be_made(golden: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="choose another"):
        save(load(golden / "ouro-tiny"), tmp_path / "file" / "inside")


def test_saving_over_a_broken_checkpoint(sharded: Path, golden: Path) -> None:
    (sharded / INDEX).write_text("{")
    save(load(golden / "ouro-tiny"), sharded)
    assert load_file(sharded / WEIGHTS).keys() == load_file(golden / "ouro-tiny" / WEIGHTS).keys()
    load(sharded)
