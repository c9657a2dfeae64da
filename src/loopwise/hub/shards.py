"""Read and write safetensors, whole or sharded, one tensor at a time."""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from loopwise.errors import CheckpointError, NotFoundError, StorageError
from loopwise.hub.locate import read_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_REOPEN_BYTES = 64 * 2**20


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """Where a tensor lies and what it looks like, known without reading it."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype | None
    """None for kinds that no weight has."""


def list_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of a checkpoint folder, from the files' headers alone.

    Raises:
        NotFoundError: when there are no safetensors, or not all that the index names.
        CheckpointError: when a file is truncated or corrupt.
    """
    found: dict[str, StoredTensor] = {}
    for file in weight_files(folder):
        if not file.is_file():
            raise NotFoundError(_absent(folder, file.name))
        try:
            with safe_open(file, "pt") as stored:
                for name in stored.keys():  # noqa: SIM118 (safe_open is not a dict)
                    if name in found:
                        raise CheckpointError(f"{name} is in both {found[name].file.name} and {file.name}; remove one")
                    part = stored.get_slice(name)
                    found[name] = StoredTensor(
                        file=file, shape=tuple(part.get_shape()), dtype=_DTYPES.get(part.get_dtype())
                    )
        except SafetensorError as error:
            raise CheckpointError(f"{file} is corrupt or truncated ({error}); fetch or write it again") from None
    return found


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a checkpoint's weights, whether they are there or not.

    Raises:
        CheckpointError: when the index is no index.
    """
    if not (folder / INDEX).is_file():
        return [folder / SINGLE]
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise CheckpointError(f"{folder / INDEX} has no weight_map of tensor names to files; fetch or write it again")
    # Names alone: an index may not point out of its folder.
    return [folder / name for name in sorted({Path(shard).name for shard in weight_map.values()})]


def _absent(folder: Path, name: str) -> str:
    if (folder / INDEX).is_file():
        return f"{folder} has no {name}, which {INDEX} names; fetch it again"
    others = sorted(path.name for path in folder.glob("*") if path.suffix in (".bin", ".pt", ".pth"))
    if others:
        return f"{folder} has no {name}; {others[0]} is a pickle, which is never read: convert it to safetensors"
    return f"{folder} has no {name}; fetch it again, or give the folder that holds the weights"


def read_tensors(tensors: Mapping[str, StoredTensor]) -> Iterator[tuple[str, Tensor]]:
    """The tensors one after the other.

    Files are mapped into memory, and mapped pages count as this process's own until the file is closed; it is
    opened anew every 64 MiB so that loading needs little more memory than the model.
    """
    by_file: dict[Path, list[str]] = {}
    for name, stored in tensors.items():
        by_file.setdefault(stored.file, []).append(name)
    for file, names in by_file.items():
        remaining = list(reversed(names))
        while remaining:
            read = 0
            with safe_open(file, "pt") as opened:
                while remaining and read < _REOPEN_BYTES:
                    name = remaining.pop()
                    tensor = opened.get_tensor(name)
                    read += tensor.nbytes
                    yield name, tensor
                    del tensor


def write_tensors(folder: Path, tensors: Mapping[str, Tensor], *, shard_bytes: int) -> None:
    """Write tensors into `folder`, sharded with an index when they exceed `shard_bytes`.

    Every file is written aside and synced before the first one is renamed into place, the index last; then files
    of an earlier checkpoint that nothing names any more are removed.

    Raises:
        StorageError: when the disk refuses; the checkpoint that was there before stays whole.
    """
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    before = _named_before(folder)
    if len(shards) == 1:
        files = {folder / SINGLE: shards[0]}
    else:
        files = {
            folder / f"model-{number:05d}-of-{len(shards):05d}.safetensors": shard
            for number, shard in enumerate(shards, 1)
        }
    writers: dict[Path, Callable[[Path], None]] = {file: _shard_writer(shard) for file, shard in files.items()}
    if len(shards) > 1:
        weight_map = {name: file.name for file, shard in files.items() for name in shard}
        total = sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        writers[folder / INDEX] = _text_writer(json.dumps(index, indent=2) + "\n")
    _write_files(writers)
    for stale in sorted(before - writers.keys()):
        stale.unlink(missing_ok=True)


def _named_before(folder: Path) -> set[Path]:
    """Weight files of the checkpoint that may stand in the folder already."""
    try:
        return {*weight_files(folder), folder / SINGLE, folder / INDEX}
    except CheckpointError:
        return {folder / SINGLE, folder / INDEX}


def write_text(path: Path, text: str) -> None:
    """Write a small file aside, sync it and rename it into place.

    Raises:
        StorageError: when the disk refuses; a file that was there before stays whole.
    """
    _write_files({path: _text_writer(text)})


def copy_file(source: Path, target: Path) -> None:
    """Copy a small file: written aside, synced and renamed.

    Raises:
        StorageError: when the disk refuses; a file that was there before stays whole.
    """
    _write_files({target: lambda aside: _write_bytes(aside, source.read_bytes())})


def _shard_writer(shard: dict[str, Tensor]) -> Callable[[Path], None]:
    return lambda aside: save_file(
        {name: tensor.contiguous() for name, tensor in shard.items()}, aside, metadata={"format": "pt"}
    )


def _text_writer(text: str) -> Callable[[Path], None]:
    return lambda aside: _write_bytes(aside, text.encode())


def _write_bytes(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def _write_files(writers: Mapping[Path, Callable[[Path], None]]) -> None:
    """All files aside, then all renamed in order: a full disk shows before anything is replaced."""
    asides: dict[Path, Path] = {}
    path = Path()
    try:
        for path, write in writers.items():
            aside = asides[path] = path.with_name(path.name + ".tmp")
            aside.touch()
            permissions = aside.stat().st_mode
            write(aside)
            # safetensors makes files that only their owner may read.
            aside.chmod(permissions)
            _sync(aside)
        for path, aside in asides.items():
            os.replace(aside, path)
        for folder in {path.parent for path in asides}:
            _sync(folder)
    except (OSError, SafetensorError) as error:
        raise StorageError(f"cannot write {path}: {error}; free space or choose another folder") from None
    finally:
        for aside in asides.values():
            aside.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
