"""Read and write safetensors, whole or sharded, one tensor at a time."""

import json
import os
from collections.abc import Iterator, Mapping
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
        NotFoundError: when there are no safetensors.
        CheckpointError: when a shard is missing, truncated or corrupt.
    """
    if (folder / INDEX).is_file():
        shards = sorted(set(read_json(folder / INDEX).get("weight_map", {}).values()))
        files = [folder / Path(shard).name for shard in shards]
    else:
        files = [folder / SINGLE]
    found: dict[str, StoredTensor] = {}
    for file in files:
        if not file.is_file():
            others = sorted(path.name for path in folder.glob("*") if path.suffix in (".bin", ".pt", ".pth"))
            hint = f"; {others[0]} is a pickle, which is never read: convert it to safetensors" if others else ""
            raise NotFoundError(f"{folder} has no {file.name}{hint}")
        try:
            with safe_open(file, "pt") as stored:
                for name in stored.keys():  # noqa: SIM118 (safe_open is not a dict)
                    part = stored.get_slice(name)
                    found[name] = StoredTensor(
                        file=file, shape=tuple(part.get_shape()), dtype=_DTYPES.get(part.get_dtype())
                    )
        except SafetensorError as error:
            raise CheckpointError(f"{file} is corrupt or truncated ({error}); fetch or write it again") from None
    return found


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

    Every file is written aside, synced and renamed, the index last.

    Raises:
        StorageError: when the disk refuses; files that were there before stay whole.
    """
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    if len(shards) == 1:
        _write_shard(folder / SINGLE, shards[0])
        (folder / INDEX).unlink(missing_ok=True)
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_shard(folder / file, shard)
        weight_map |= dict.fromkeys(shard, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_text(folder / INDEX, json.dumps(index, indent=2) + "\n")
    (folder / SINGLE).unlink(missing_ok=True)


def _write_shard(path: Path, tensors: dict[str, Tensor]) -> None:
    aside = path.with_name(path.name + ".tmp")
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, aside, metadata={"format": "pt"})
        _sync(aside)
        os.replace(aside, path)
    except (OSError, SafetensorError) as error:
        aside.unlink(missing_ok=True)
        raise StorageError(f"cannot write {path}: {error}; free space or choose another folder") from None


def write_text(path: Path, text: str) -> None:
    """Write a small file aside, sync it and rename it into place.

    Raises:
        StorageError: when the disk refuses; a file that was there before stays whole.
    """
    aside = path.with_name(path.name + ".tmp")
    try:
        aside.write_text(text, encoding="utf-8")
        _sync(aside)
        os.replace(aside, path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise StorageError(f"cannot write {path}: {error}; free space or choose another folder") from None


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
