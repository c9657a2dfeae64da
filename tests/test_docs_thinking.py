"""The pages on Deep Thinking and pondering run as they are printed, if not as long."""

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"


@pytest.mark.parametrize(("page", "said"), [("deep-thinking", "loops on average"), ("pondering", "tensor(")])
def test_the_page_runs(page: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / f"{page}.md").read_text(encoding="utf-8"), flags=re.S)
    assert blocks
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block.replace("steps = 300", "steps = 2"), page, "exec"), names)
    assert said in capsys.readouterr().out
