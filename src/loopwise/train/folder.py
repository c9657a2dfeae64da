"""The run folder: which run it belongs to, and that one process at a time writes to it.

config.json        the configuration, complete
environment.json   versions and machine
metrics.jsonl      one JSON object per line
checkpoints/       newest ones first to resume from
data/              tokenizer and token stores
model/             the trained model, at the end
"""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

from loopwise.configuration import build, to_dict
from loopwise.errors import ConfigError, StorageError
from loopwise.hub.shards import write_text
from loopwise.train.config import TrainConfig
from loopwise.train.machine import environment


def check_owner(folder: Path, config: TrainConfig) -> None:
    """Refuse a folder that holds another run. A run that was moved to another folder is the same run.

    Raises:
        ConfigError: it says which settings differ.
    """
    if not (folder / "config.json").is_file():
        return
    held = build(TrainConfig, folder / "config.json", [])
    names = [field.name for field in fields(TrainConfig) if field.name != "run"]
    different = [name for name in names if getattr(held, name) != getattr(config, name)]
    if different:
        raise ConfigError(
            f"{folder} holds another run (it differs in {', '.join(different)}); give run=OTHER_FOLDER, or the same "
            "settings to go on with it"
        )


def claim(folder: Path, config: TrainConfig) -> None:
    """Make a new folder this run's.

    Raises:
        StorageError: the disk refuses.
    """
    if not (folder / "config.json").is_file():
        write_text(folder / "environment.json", json.dumps(environment(config.device), indent=2) + "\n")
        write_text(folder / "config.json", json.dumps(to_dict(config), indent=2) + "\n")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Inside the block this process alone writes to the folder; the system lifts the lock of a process that dies.

    Raises:
        ConfigError: another process is training here.
        StorageError: the disk refuses.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise StorageError(f"cannot write to {folder}: {error.strerror}; give another run folder") from error
    try:
        _lock(descriptor, folder)
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int, folder: Path) -> None:
    # Windows has no flock, and some file systems have no locks: there, nothing keeps two processes apart.
    if sys.platform == "win32":
        return
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ConfigError(f"another process is training in {folder}; wait for it, or give run=OTHER_FOLDER") from None
    except OSError:
        return
