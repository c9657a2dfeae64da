"""Small checkpoints of every family, and a way to change one on disk."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor

GOLDEN = Path(__file__).parents[1] / "golden"


@dataclass
class Folder:
    """A checkpoint folder that a test may change."""

    path: Path

    def tensors(self) -> dict[str, Tensor]:
        return {name: tensor for file in self.path.glob("*.safetensors") for name, tensor in load_file(file).items()}

    def config(self) -> dict[str, Any]:
        return dict(json.loads((self.path / "config.json").read_text()))

    def configure(self, **changes: Any) -> None:
        kept = {key: value for key, value in (self.config() | changes).items() if value is not ...}
        (self.path / "config.json").write_text(json.dumps(kept))

    def store(self, tensors: dict[str, Tensor]) -> None:
        save_file(
            {name: tensor.contiguous().clone() for name, tensor in tensors.items()}, self.path / "model.safetensors"
        )


@pytest.fixture
def copy(tmp_path: Path) -> Callable[[str], Folder]:
    """A copy of a golden checkpoint ("ouro-tiny", "huginn-tiny")."""

    def make(name: str) -> Folder:
        folder = tmp_path / name
        folder.mkdir()
        for file in ("config.json", "model.safetensors"):
            shutil.copyfile(GOLDEN / name / file, folder / file)
        return Folder(folder)

    return make


@pytest.fixture
def golden() -> Path:
    """The folder of golden checkpoints."""
    return GOLDEN
