"""Which torch the installation takes, and that reusing one links what its build needs and nothing else."""

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "scripts/install.py"


@pytest.fixture
def install() -> ModuleType:
    spec = importlib.util.spec_from_file_location("install", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A site-packages with a CUDA build of torch and much besides."""
    folder = tmp_path / "site"
    packages = {
        "torch": ("2.12.0", ["sympy>=1", "cuda-parts[blas] ; platform_system == 'Linux'", "opt-sum; extra == 'opt'"]),
        "cuda_parts": ("13.0", ["nvidia-blas==1; extra == 'blas'", "nvidia-fft==1; extra == 'fft'"]),
        "nvidia_blas": ("1", []),
        "nvidia_fft": ("1", []),
        "opt_sum": ("1", []),
        "sympy": ("0.1", ["stale"]),
        "stale": ("1", []),
    }
    for name, (version, requires) in packages.items():
        information = folder / f"{name}-{version}.dist-info"
        information.mkdir(parents=True)
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text(f"__version__ = {version!r}\n")
        lines = [f"Name: {name}", f"Version: {version}", *(f"Requires-Dist: {line}" for line in requires)]
        (information / "METADATA").write_text("\n".join(lines) + "\n")
        record = [f"{name}/__init__.py,,", f"{information.name}/METADATA,,", "../../bin/tool,,"]
        (information / "RECORD").write_text("\n".join(record) + "\n")
    monkeypatch.setattr(sys, "path", [str(folder)])
    return folder


def test_reuse_links_the_build_and_nothing_that_is_pinned(install: ModuleType, site: Path, tmp_path: Path) -> None:
    venv = tmp_path / "venv"
    packages = venv / "lib/python3.11/site-packages"
    packages.mkdir(parents=True)
    install.link(install.torch_build({"torch", "sympy"}), venv)
    linked = {"torch", "cuda_parts", "nvidia_blas"}
    information = {"torch-2.12.0.dist-info", "cuda_parts-13.0.dist-info", "nvidia_blas-1.dist-info"}
    assert set(os.listdir(venv / "reused")) == linked | information
    assert (venv / "reused/torch").resolve() == site / "torch"
    assert (packages / "reused.pth").read_text() == f"{venv / 'reused'}\n"


@pytest.mark.parametrize(
    ("version", "allowed"),
    [("2.10.1", False), ("2.11.0", True), ("2.13.0+cu128", True), ("2.14.0", False), ("3.0", False), ("weird", False)],
)
def test_the_range_is_that_of_pyproject(version: str, allowed: bool, install: ModuleType) -> None:
    assert install.in_range(version) is allowed


def test_the_pinned_torch_is_in_range(install: ModuleType) -> None:
    assert install.in_range(install.pins()["torch"].removeprefix("torch=="))
