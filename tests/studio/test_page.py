import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loopwise.errors import ConfigError, InputError, StorageError
from loopwise.studio.page import Table, render_page, write_page
from loopwise.trace import LoopTrace

NASTY = "</script><script>alert(1)</script><img src=x onerror=alert(2)>{{data}}<!--card-->&amp;\"'\u202e\x1b\u2028"


def make(tokens: int = 6, loops: int = 4, candidates: int = 3, **changes: Any) -> LoopTrace:
    noise = np.random.default_rng(tokens + loops)
    top_ids = noise.integers(0, 49_152, (tokens, loops, candidates))
    probabilities = noise.dirichlet(np.ones(12), (tokens, loops))[..., :candidates]
    fields: dict[str, Any] = {
        "title": "a title",
        "model": "tiny",
        "rule": "hazard:0.6",
        "policy": "last_exited",
        "max_loops": loops,
        "prompt_length": 1,
        "tokens": noise.integers(0, 49_152, tokens),
        "texts": [f" word{index}" for index in range(tokens)],
        "loops": np.arange(tokens) % (loops + 1),
        "signal_kind": "hazard",
        "signals": noise.beta(1, 3, (tokens, loops)).astype(np.float32),
        "top_ids": top_ids,
        "top_probs": probabilities,
        "vocabulary": {int(token): f" w{token}" for token in np.unique(top_ids)},
        "losses": noise.random((tokens, loops)) * 3,
        "entropy": noise.random((tokens, loops)) * 3,
    }
    return LoopTrace(**(fields | changes))


class Page(HTMLParser):
    """What a browser would find: tags with their attributes, and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.script: dict[str, str] = {}
        self.text = ""
        self._script: str | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self._script = dict(attrs).get("id") or ""

    def handle_endtag(self, tag: str) -> None:
        if tag == "script":
            self._script = None

    def handle_data(self, data: str) -> None:
        if self._script is None:
            self.text += data
        else:
            self.script[self._script] = self.script.get(self._script, "") + data

    @property
    def tokens(self) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.tags if tag == "span" and attributes.get("role") == "option"]

    @property
    def data(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = json.loads(self.script["data"])
        return found


def test_every_token_stands_in_the_page_without_the_script() -> None:
    trace = make()
    page = Page(render_page([trace], title="T", intro="first\n\nsecond"))
    assert "".join(trace.texts) in page.text
    assert [token["data-n"] for token in page.tokens] == ["", "1", "2", "3", "4", ""]
    assert page.tokens[2]["aria-label"] == "␣word2, 2 of 4 loops"
    assert page.tokens[0]["aria-label"] == "␣word0, given"
    assert [token["style"] for token in page.tokens][1:5] == ["--n:0", "--n:0.333", "--n:0.667", "--n:1"]
    assert "first" in page.text
    assert "second" in page.text


def test_line_structure_of_code_is_kept_and_marked() -> None:
    page = render_page([make(tokens=2, texts=["if x:\n", "\treturn"])], title="T")
    assert 'if x:<i class="nl"></i>\n</span>' in page
    assert '<i class="tab"></i>\treturn</span>' in page


def test_model_text_cannot_act() -> None:
    nasty = make(
        title=NASTY,
        model=NASTY,
        policy=NASTY,
        texts=[NASTY] * 6,
        vocabulary=dict.fromkeys(make().vocabulary, NASTY),
    )
    table = Table(title=NASTY, columns=[NASTY], rows=[[NASTY]], note=NASTY)
    text = render_page([nasty], title=NASTY, intro=NASTY, tables=[table], next_commands=[NASTY])
    page, calm = Page(text), Page(render_page([make(tokens=6)], title="T"))
    assert "img" not in [tag for tag, _ in page.tags]
    assert [tag for tag, _ in page.tags].count("script") == [tag for tag, _ in calm.tags].count("script") == 2
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert len(page.tokens) == 6
    assert page.script[""] == calm.script[""]
    assert "</script>" in page.data[0]["words"][0]
    assert not {"\u202e", "\x1b", "\u2028"} & set(text)


def test_the_page_needs_nothing_from_outside() -> None:
    page = Page(render_page([make()], title="T"))
    assert not [value for _, attributes in page.tags for name in ("src", "href") if (value := attributes.get(name))]
    policy = next(attributes["content"] for _, attributes in page.tags if attributes.get("http-equiv"))
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    template = resources.files("loopwise.studio").joinpath("page.html").read_text(encoding="utf-8")
    assert not re.search(r"https?://|@import|url\(|fetch\(|XMLHttpRequest", template)
    assert len(template.splitlines()) < 300


def script_replay(data: dict[str, Any], threshold: float) -> list[int]:
    """The rule of the page's script."""
    exits = []
    for row, recorded in zip(data["cdf"], data["loops"], strict=True):
        reached = [at for at, value in enumerate(row) if value >= round(threshold * 10_000)] if threshold < 1 else []
        exits.append(reached[0] + 1 if reached else len(row) or recorded)
    return exits


def test_the_slider_tints_as_the_trace_replays_at_every_step() -> None:
    signals = np.random.default_rng(0).beta(1, 2, (200, 8))
    signals[:, 0] = np.random.default_rng(1).integers(0, 21, 200) / 20
    signals[5, 3:] = signals[6] = np.nan
    trace = make(tokens=200, loops=8, signals=signals, losses=None)
    data = Page(render_page([trace], title="T")).data[0]
    for step in range(201):
        assert script_replay(data, step / 200) == trace.replay(step / 200).tolist(), step


def test_the_numbers_beside_the_slider_are_those_of_the_exit_curve() -> None:
    trace = make(tokens=50)
    data, curve = Page(render_page([trace], title="T")).data[0], trace.exit_curve()
    np.testing.assert_allclose(data["curve"]["loops"], curve.mean_loops, atol=5e-5)
    np.testing.assert_allclose(data["curve"]["loss"], curve.mean_loss, atol=5e-5)
    np.testing.assert_allclose(data["curve"]["mixed"], curve.mixed_loss, atol=5e-5)
    np.testing.assert_allclose(data["depths"], trace.loss_by_loop(), atol=5e-5)


def test_the_slider_starts_where_the_trace_was_recorded_only_if_it_agrees() -> None:
    trace = make()
    assert Page(render_page([trace], title="T")).data[0]["curve"]["home"] is None
    agreeing = replace(trace, loops=trace.replay(0.6))
    assert Page(render_page([agreeing], title="T")).data[0]["curve"]["home"] == 120
    fixed = replace(agreeing, rule="fixed:4")
    assert Page(render_page([fixed], title="T")).data[0]["curve"]["home"] is None


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"signals": None, "signal_kind": None}, "was recorded without hazards"),
        ({"signal_kind": "certainty"}, "carries certainty, not hazards"),
        ({"signals": np.full((6, 4), np.nan)}, "no token of this trace has a recorded hazard"),
    ],
)
def test_without_hazards_the_page_says_why_there_is_no_slider(changes: dict[str, Any], reason: str) -> None:
    page = Page(render_page([make(**changes)], title="T"))
    assert reason in page.text
    assert "curve" not in page.data[0]


def test_savings_are_claimed_only_where_leaving_early_saves() -> None:
    assert "2.50 of 4, 38% fewer than full depth" in Page(render_page([make()], title="T")).text
    assert "fewer" not in Page(render_page([make(policy="per_loop")], title="T")).text


def test_a_trace_with_nothing_but_loops() -> None:
    bare = make(signals=None, signal_kind=None, top_ids=None, top_probs=None, losses=None, entropy=None)
    data = Page(render_page([bare], title="T")).data[0]
    assert data["signals"] is data["losses"] is data["entropy"] is None
    assert not {"top", "cdf", "curve", "depths"} & set(data)


def test_a_large_trace_stays_small() -> None:
    page = render_page([make(tokens=512, loops=32, candidates=5)], title="T")
    assert len(page.encode()) < 3_000_000


def test_tables_and_commands() -> None:
    heat = Table(title="staircase", columns=["k", "1 loop"], rows=[["1", 0.25]], heat=True)
    plain = Table(title="speed", columns=["rule", "loops"], rows=[["fixed:4", 4]], note="measured once")
    text = render_page([make()], title="T", tables=[heat, plain], next_commands=["loopwise chat runs/demo"])
    assert '<td class="heat" style="--n:0.250">0.250</td>' in text
    assert "<td>4</td>" in text
    assert "measured once" in text
    assert "<code>loopwise chat runs/demo</code>" in text
    with pytest.raises(ConfigError, match="has 1 cells; give 2"):
        Table(title="t", columns=["a", "b"], rows=[["x"]])
    with pytest.raises(ConfigError, match="between 0 and 1"):
        Table(title="t", columns=["a"], rows=[[1.5]], heat=True)


def test_no_traces() -> None:
    with pytest.raises(InputError, match="at least one trace"):
        render_page([], title="T")


def test_write_page(tmp_path: Path) -> None:
    path = write_page(tmp_path / "new" / "page.html", [make()], title="T")
    assert path.read_text(encoding="utf-8") == render_page([make()], title="T")
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot write"):
        write_page(tmp_path / "file" / "page.html", [make()], title="T")
