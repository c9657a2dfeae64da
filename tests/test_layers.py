"""The import direction that pyproject.toml declares holds, and the check of it is alive."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def lint(config: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    script = (
        f"import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports({str(config)!r}, no_cache=True))"
    )
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=folder)


def test_imports_point_one_way(tmp_path: Path) -> None:
    result = lint(ROOT / "pyproject.toml", tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr


def test_an_upward_import_is_caught(tmp_path: Path) -> None:
    package = tmp_path / "house"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "low.py").write_text("def f():\n    import house.high\n")
    (package / "high.py").write_text("")
    config = tmp_path / "setup.cfg"
    config.write_text(
        "[importlinter]\nroot_package = house\n"
        "[importlinter:contract:1]\nname = layers\ntype = layers\nlayers =\n  house.high\n  house.low\n"
    )
    result = lint(config, tmp_path)
    assert result.returncode == 1
    assert "house.low is not allowed to import house.high" in result.stdout


def test_every_package_is_under_a_contract() -> None:
    declared = (ROOT / "pyproject.toml").read_text()
    packages = [path.parent.name for path in (ROOT / "src/loopwise").glob("*/__init__.py")]
    assert [name for name in packages if f'"loopwise.{name}"' not in declared] == []
