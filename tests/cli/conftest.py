"""Small models to talk with: one layer of Ouro's golden weights and a byte tokenizer, with and without a template."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import loopwise
from loopwise.engine.answer import Answer, Emission
from loopwise.engine.sampling import Sampling
from loopwise.engine.write import Writer, Writing

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="session")
def base_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that continues text; 512 tokens of context, 4 loops, a gate."""
    folder = tmp_path_factory.mktemp("models") / "base"
    golden = loopwise.load(GOLDEN / "ouro-tiny")
    model = loopwise.LoopedLM(replace(golden.config, core_layers=1))
    # The deeper layers have no place in it.
    model.load_state_dict(golden.state_dict(), strict=False)
    model.tokenizer = loopwise.Tokenizer.bytes()
    loopwise.save(model, folder, family="loopwise")
    return folder


@pytest.fixture(scope="session")
def chat_model(base_model: Path) -> Path:
    """The same with a chat template."""
    folder = base_model.with_name("talker")
    shutil.copytree(base_model, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


Say = Callable[[Callable[[int], int]], None]
"""Takes the token ids of answers, by their place in the answer; whatever it raises comes in the middle of writing."""


@pytest.fixture
def say(monkeypatch: pytest.MonkeyPatch) -> Say:
    """Put words into the model's mouth."""
    take = Answer.take

    def script(chosen: Callable[[int], int]) -> None:
        def taken(answer: Answer, emission: Emission) -> list[Emission]:
            return take(answer, replace(emission, token=chosen(len(answer.made))))

        monkeypatch.setattr(Answer, "take", taken)

    return script


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Writing, Sampling]]:
    """Every answer that was begun, and with which settings."""
    seen: list[tuple[Writing, Sampling]] = []
    stream = Writer.stream

    def watched(writer: Writer, prompt: Any, sampling: Any, **options: Any) -> Writing:
        writing = stream(writer, prompt, sampling, **options)
        seen.append((writing, sampling))
        return writing

    monkeypatch.setattr(Writer, "stream", watched)
    return seen
