"""The tour's code runs, block after block, as one program."""

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"


def test_the_tour_runs(tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "tour.md").read_text(encoding="utf-8"), flags=re.S)
    assert len(blocks) >= 6
    names: dict[str, object] = {"folder": tmp_path}
    for block in blocks:
        exec(compile(block, "docs/tour.md", "exec"), names)
    assert (tmp_path / "tour.html").is_file()
    assert (tmp_path / "run" / "model" / "config.json").is_file()


def test_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = (DOCS.parent / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.S)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})
    assert (tmp_path / "copy" / "config.json").is_file()
