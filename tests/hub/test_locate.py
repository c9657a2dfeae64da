"""Local folders and hub ids: cached, and offline when the environment says so."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import huggingface_hub.constants
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from loopwise.errors import NotFoundError
from loopwise.hub.checkpoints import inspect
from loopwise.hub.locate import locate


def cached(cache: Path, name: str, source: Path, files: tuple[str, ...]) -> None:
    """Lay files out as the hub's own client does."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    home = cache / f"models--{name.replace('/', '--')}"
    for folder in ("blobs", "refs", f"snapshots/{commit}"):
        (home / folder).mkdir(parents=True)
    (home / "refs" / "main").write_text(commit)
    for file in files:
        (home / "blobs" / file).write_bytes((source / file).read_bytes())
        (home / "snapshots" / commit / file).symlink_to(f"../../blobs/{file}")


SCRIPT = """
import json, loopwise
from loopwise.errors import NotFoundError
model = loopwise.load("tiny/ouro")
try:
    loopwise.load("nobody/nothing")
except NotFoundError as error:
    message = str(error)
print(json.dumps({"loops": model.config.loops, "folder": str(model.origin.folder), "message": message}))
"""


def test_a_cached_hub_id_loads_offline(golden: Path, tmp_path: Path) -> None:
    cached(tmp_path / "hub", "tiny/ouro", golden / "ouro-tiny", ("config.json", "model.safetensors"))
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment |= {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=True)
    said = json.loads(done.stdout)
    assert said["loops"] == 4
    assert said["folder"].startswith(str(tmp_path / "hub"))
    assert said["message"] == (
        "nobody/nothing: not a folder, not in the hub cache, and the hub is out of reach (offline?); "
        "give a local folder, or fetch it once with a network"
    )


def test_a_cached_config_is_enough_for_info(golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cached(tmp_path, "tiny/ouro", golden / "ouro-tiny", ("config.json",))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    seen = inspect("tiny/ouro")
    assert (seen.family, seen.weights, seen.problem) == ("ouro", None, None)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> SimpleNamespace:
    """A hub that notes what is asked of it."""
    box = SimpleNamespace(patterns=[], answer=None)

    def snapshot_download(name: str, allow_patterns: list[str]) -> str:
        box.patterns = allow_patterns
        if box.answer is not None:
            raise box.answer
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return box


def test_only_what_is_needed_is_fetched(asked: SimpleNamespace, tmp_path: Path) -> None:
    assert locate("org/name") == tmp_path
    assert asked.patterns == ["*.json", "*.jinja", "*.safetensors"]
    locate("org/name", weights=False)
    assert asked.patterns == ["*.json", "*.jinja"]


def test_what_the_hub_refuses(asked: SimpleNamespace) -> None:
    asked.answer = LocalEntryNotFoundError("a long\nexplanation")
    with pytest.raises(NotFoundError, match="out of reach") as caught:
        locate("org/name")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "a/b/c", "word", "~/none", ""])
def test_what_is_no_hub_id(name: str, asked: SimpleNamespace) -> None:
    with pytest.raises(NotFoundError):
        locate(name)
    assert asked.patterns == []


@pytest.mark.parametrize("name", ["org/bad name", "org/--x", "../weights", "org/"])
def test_what_the_client_calls_invalid(name: str) -> None:
    with pytest.raises(NotFoundError) as caught:
        locate(name)
    assert "\n" not in str(caught.value)


def test_a_folder_comes_before_a_hub_id(
    asked: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, copy: Callable[[str], Any]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert locate("org/name") == Path("org/name")
    assert asked.patterns == []
