"""Small models to talk with: one layer of Ouro's golden weights and a byte tokenizer, with and without a template."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

import loopwise

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
