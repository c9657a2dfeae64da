"""Checkpoints that are whole or invisible: written aside, synced, then renamed into place, with a digest.

A checkpoint is a folder `step-00001234` that holds

- `state.safetensors`: every tensor (weights, optimiser moments, averages);
- `meta.json`: everything else that JSON can carry (step counters, data position, configuration);
- `manifest.json`: size and SHA-256 of the other two.

The folder is built under a name that readers ignore, each file and then the folder is synced to disk, and one
rename makes it visible. A kill or a power cut at any moment leaves the older checkpoints as they were.
A folder whose bytes do not match its manifest is passed over, and the next older whole one is taken.
"""

import hashlib
import itertools
import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from loopwise.errors import CheckpointError, CheckpointWarning, ConfigError, NotFoundError, StorageError

TENSORS = "state.safetensors"
META = "meta.json"
MANIFEST = "manifest.json"
VERSION = 1
ASIDE = ".writing-"
REMOVING = ".removing-"
CHUNK_BYTES = 16 * 2**20

# Names of the safetensors format, version 0.x of its README.
DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A whole checkpoint, verified against its digest and read into memory."""

    path: Path
    """The folder `step-00001234`."""
    step: int
    """Number of optimiser steps completed when it was written."""
    tensors: dict[str, Tensor]
    """Tensors by name, bit for bit as they were saved."""
    meta: dict[str, Any]
    """The JSON part: after a round trip tuples are lists and keys are strings (see `flatten` for exact trees)."""


@dataclass(frozen=True, kw_only=True)
class Flat:
    """A nested structure taken apart: named tensors, and a JSON skeleton that says where each belongs."""

    tensors: dict[str, Tensor]
    """Tensors by path, such as `optimizer/state/0/exp_avg`."""
    skeleton: Any
    """JSON; `unflatten` puts the tensors back into it."""


def save(
    folder: str | Path,
    step: int,
    tensors: Mapping[str, Tensor],
    meta: Mapping[str, Any],
    *,
    keep: int | None = None,
    every: int | None = None,
) -> Path:
    """Writes the checkpoint `folder/step-...` and returns its path; afterwards drops old ones if `keep` is given.

    `keep` is the number of newest checkpoints that stay; those whose step is a multiple of `every` stay as well.
    One process writes to a folder at a time: what an earlier writer left half done is removed first.

    Raises `StorageError` if the disk refuses (full, read-only); nothing half-written is then visible and the
    earlier checkpoints are as they were. Raises `ConfigError` for a dtype that safetensors cannot store.
    """
    if step < 0 or (keep is not None and keep < 1) or (every is not None and every < 1):
        raise ConfigError(f"save(step={step}, keep={keep}, every={every}): step must be >= 0, keep and every >= 1")
    folder = Path(folder)
    text = json.dumps(dict(meta)).encode()
    final = folder / _name(step)
    aside = folder / f"{ASIDE}{final.name}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        clean(folder)
        aside.mkdir()
        files = {
            TENSORS: _write(aside / TENSORS, _safetensors_bytes(tensors)),
            META: _write(aside / META, iter([text])),
        }
        manifest = {"version": VERSION, "step": step, "files": files}
        _write(aside / MANIFEST, iter([json.dumps(manifest, indent=1).encode()]))
        _sync_folder(aside)
        replaced = [path for number, _, path in _folders(folder) if number == step]
        # A step that is saved again gets a new name beside the old one: at no moment is there neither.
        for attempt in itertools.count(1):
            if not final.exists():
                break
            final = folder / f"{_name(step)}.{attempt}"
        os.rename(aside, final)
        _sync_folder(folder)
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        reason = error.strerror or str(error)
        raise StorageError(
            f"cannot write checkpoint {final}: {reason}; earlier checkpoints are intact; "
            "free some space or give another run folder, then start the same command again to resume"
        ) from error
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    for path in replaced:
        _remove(path)
    if keep is not None:
        prune(folder, keep=keep, every=every, protect=step)
    return final


def load(path: str | Path, *, device: str | torch.device = "cpu") -> Checkpoint:
    """Reads one checkpoint folder and checks it against its digest.

    Raises `NotFoundError` if there is no such folder, `CheckpointError` if it is truncated, corrupt or incomplete.
    """
    path = Path(path)
    if not path.is_dir():
        raise NotFoundError(f"no checkpoint folder {path}; give a folder named step-00001234 of a run's checkpoints/")
    try:
        manifest = _read_manifest(path)
        for name, entry in manifest["files"].items():
            _verify(path / name, entry)
        meta = json.loads((path / META).read_bytes())
        tensors = load_file(path / TENSORS, device=str(device))
    except OSError as error:
        raise CheckpointError(
            f"checkpoint {path} cannot be read: {error.strerror or error}; use an older one"
        ) from error
    return Checkpoint(path=path, step=manifest["step"], tensors=tensors, meta=meta)


def newest(folder: str | Path, *, device: str | torch.device = "cpu") -> Checkpoint | None:
    """The newest whole checkpoint under `folder`, or None if there is none.

    A broken one costs a one-line `CheckpointWarning`, and the next older is tried.
    """
    folder = Path(folder)
    for _, _, path in reversed(_folders(folder)):
        try:
            return load(path, device=device)
        except (CheckpointError, NotFoundError) as error:
            warnings.warn(f"passing over a broken checkpoint: {error}", CheckpointWarning, stacklevel=2)
    return None


def steps(folder: str | Path) -> list[int]:
    """Steps of the checkpoints visible under `folder`, in rising order, without reading them."""
    return sorted({step for step, _, _ in _folders(Path(folder))})


def prune(folder: str | Path, *, keep: int, every: int | None = None, protect: int | None = None) -> list[int]:
    """Removes all but the `keep` newest checkpoints, those at multiples of `every`, and `protect`.

    Returns the removed steps. Raises `StorageError` if one cannot be removed.
    """
    folder = Path(folder)
    old = steps(folder)[:-keep]
    removed = [step for step in old if step != protect and not (every is not None and step % every == 0)]
    for step, _, path in _folders(folder):
        if step in removed:
            _remove(path)
    return removed


def clean(folder: str | Path) -> None:
    """Removes what a killed writer left half done; only the process that writes to `folder` may call it."""
    for child in Path(folder).iterdir():
        if child.name.startswith((ASIDE, REMOVING)):
            shutil.rmtree(child)


def flatten(tree: Any, prefix: str) -> Flat:
    """Takes a nest of dicts, lists, tuples, tensors and JSON scalars apart without loss: an optimiser's `state_dict()`.

    Key types (int or str), tuples against lists, and floats survive exactly. Tensor names start with `prefix/`.
    Raises `CheckpointError` for any other type of value.
    """
    tensors: dict[str, Tensor] = {}

    def visit(node: Any, path: str) -> Any:
        if isinstance(node, Tensor):
            tensors[path] = node
            return ["tensor", path]
        if isinstance(node, dict):
            return ["dict", [[key, visit(value, f"{path}/{key}")] for key, value in node.items()]]
        if isinstance(node, list | tuple):
            items = [visit(value, f"{path}/{index}") for index, value in enumerate(node)]
            return ["tuple" if isinstance(node, tuple) else "list", items]
        if node is None or isinstance(node, bool | int | float | str):
            return ["value", node]
        raise CheckpointError(
            f"{path} is a {type(node).__name__}; a checkpoint stores tensors, numbers, text and nests"
        )

    skeleton = visit(tree, prefix)
    return Flat(tensors=tensors, skeleton=skeleton)


def unflatten(tensors: Mapping[str, Tensor], skeleton: Any) -> Any:
    """Inverse of `flatten`; raises `CheckpointError` if a tensor of the skeleton is missing."""
    kind, content = skeleton
    if kind == "tensor":
        if content not in tensors:
            raise CheckpointError(f"the checkpoint lacks tensor {content!r}; use an older checkpoint")
        return tensors[content]
    if kind == "dict":
        return {key: unflatten(tensors, node) for key, node in content}
    if kind in ("list", "tuple"):
        items = [unflatten(tensors, node) for node in content]
        return tuple(items) if kind == "tuple" else items
    return content


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _safetensors_bytes(tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """The safetensors file, piece by piece: only one tensor at a time is copied to the host.

    Written here because the digest is then taken in the same pass, a full disk shows as the operating system's own
    error, and the file gets the permissions of the user's umask.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPE_NAMES:
            raise ConfigError(f"tensor {name!r} has dtype {tensor.dtype}; allowed: {', '.join(DTYPE_NAMES.values())}")
    # Widest first, as the format's own writer does, so that every tensor starts on a multiple of its item size.
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in order:
        size = tensors[name].numel() * tensors[name].element_size()
        header[name] = {
            "dtype": DTYPE_NAMES[tensors[name].dtype],
            "shape": list(tensors[name].shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little")
    yield text
    for name in order:
        flat = tensors[name].detach().cpu().contiguous().reshape(-1)
        yield flat.view(torch.uint8).numpy().data


def _write(path: Path, pieces: Iterator[bytes | memoryview]) -> dict[str, Any]:
    digest = hashlib.sha256()
    size = 0
    with path.open("wb") as file:
        for piece in pieces:
            for start in range(0, len(piece), CHUNK_BYTES):
                part = piece[start : start + CHUNK_BYTES]
                file.write(part)
                digest.update(part)
                size += len(part)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": size, "sha256": digest.hexdigest()}


def _folders(folder: Path) -> list[tuple[int, int, Path]]:
    """(step, attempt, path) of every visible checkpoint, oldest first."""
    if not folder.is_dir():
        return []
    found = ((re.fullmatch(r"step-(\d{8,})(?:\.(\d+))?", child.name), child) for child in folder.iterdir())
    return sorted((int(match[1]), int(match[2] or 0), child) for match, child in found if match)


def _remove(path: Path) -> None:
    hidden = path.with_name(f"{REMOVING}{path.name}")
    try:
        # Out of sight first: a kill in the middle of a deletion must not leave a visible half.
        os.rename(path, hidden)
        shutil.rmtree(hidden)
    except OSError as error:
        raise StorageError(
            f"cannot remove old checkpoint {path}: {error.strerror or error}; remove it by hand"
        ) from error


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":  # Windows cannot open a folder to sync it
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        version, step, names = manifest["version"], manifest["step"], set(manifest["files"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"checkpoint {path}: {MANIFEST} is corrupt; use an older checkpoint") from error
    if version != VERSION:
        raise CheckpointError(f"checkpoint {path} has format version {version}; this program reads version {VERSION}")
    if _name(step) != path.name.partition(".")[0] or names != {TENSORS, META}:
        raise CheckpointError(f"checkpoint {path}: {MANIFEST} does not belong to this folder; use an older checkpoint")
    return manifest  # type: ignore[no-any-return]  # json.loads is untyped; the fields were just checked


def _verify(path: Path, entry: dict[str, Any]) -> None:
    size = path.stat().st_size
    if size != entry["bytes"]:
        raise CheckpointError(
            f"{path} has {size:,} bytes instead of {entry['bytes']:,}: truncated; use an older checkpoint"
        )
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != entry["sha256"]:
        raise CheckpointError(f"{path} does not match its digest: corrupt; use an older checkpoint")
