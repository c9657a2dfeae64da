"""The tokenizer beside the weights: read with the family's ids, written back as it was."""

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from loopwise.errors import CheckpointError
from loopwise.hub.checkpoints import inspect, load, save
from loopwise.hub.tokenizer import Tokenizer

SMOLLM2 = 49152


@pytest.fixture
def talking(copy: Any) -> Any:
    """An Ouro with a tokenizer whose files are as wrong about special ids as the published ones."""
    folder = copy("ouro-tiny")
    Tokenizer.train(["the cat sat on the mat, and the dog sat on the log; " * 3], 300).save(folder.path)
    file = str(folder.path / "tokenizer.json")
    vocabulary = tokenizers.Tokenizer.from_file(file)
    vocabulary.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    vocabulary.save(file)
    settings = json.loads((folder.path / "tokenizer_config.json").read_text())
    (folder.path / "tokenizer_config.json").write_text(json.dumps(settings | {"model_max_length": 77}))
    (folder.path / "generation_config.json").write_text(json.dumps({"eos_token_id": 0, "bos_token_id": 0}))
    folder.configure(bos_token_id=0, eos_token_id=0, pad_token_id=0)
    return folder


def test_no_tokenizer(golden: Path) -> None:
    assert load(golden / "ouro-tiny").tokenizer is None


def test_it_comes_with_the_model_and_goes_with_it(talking: Any, tmp_path: Path) -> None:
    model = load(talking.path)
    assert model.tokenizer is not None
    assert model.tokenizer.decode(model.tokenizer.encode("the cat")) == "the cat"
    save(model, tmp_path / "again")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "config.json"):
        assert json.loads((tmp_path / "again" / name).read_text()) == json.loads((talking.path / name).read_text())


def test_ouro_ids_and_chat_template_are_mended(talking: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = load(talking.path).tokenizer
    assert tokenizer is not None
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.stop_ids) == (0, 0, (0,))
    monkeypatch.setattr("loopwise.hub.ouro._SMOLLM2_VOCABULARY", 320)
    tokenizer = load(talking.path).tokenizer
    assert tokenizer is not None
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.stop_ids) == (1, 2, 0, (2, 0))
    chat = tokenizer.decode(tokenizer.chat([{"role": "user", "content": "the cat"}]), skip_special=False)
    assert chat == "<|im_start|>user\nthe cat<|im_end|>\n<|im_start|>assistant\n"
    answered = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat"}]
    chat = tokenizer.decode(tokenizer.chat(answered, generation_prompt=False), skip_special=False)
    assert chat == "<|im_start|>user\nthe cat<|im_end|>\n<|im_start|>assistant\nsat<|im_end|>\n"


def test_a_vocabulary_without_its_marks_gets_no_template(copy: Any) -> None:
    folder = copy("ouro-tiny")
    Tokenizer.bytes().save(folder.path)
    tokenizer = load(folder.path).tokenizer
    assert tokenizer is not None
    assert tokenizer.chat_template is None


def test_a_template_of_its_own_stays(talking: Any, tmp_path: Path) -> None:
    (talking.path / "chat_template.jinja").write_text("{{ messages[0]['content'] }}!")
    model = load(talking.path)
    assert model.tokenizer is not None
    assert model.tokenizer.decode(model.tokenizer.chat([{"role": "user", "content": "cat"}])) == "cat!"
    save(model, tmp_path / "again")
    assert (tmp_path / "again" / "chat_template.jinja").read_text() == "{{ messages[0]['content'] }}!"


def test_mended_ids_survive_in_another_family(talking: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loopwise.hub.ouro._SMOLLM2_VOCABULARY", 320)
    save(load(talking.path), tmp_path / "ours", family="loopwise")
    tokenizer = load(tmp_path / "ours").tokenizer
    assert tokenizer is not None
    assert (tokenizer.bos_id, tokenizer.stop_ids, tokenizer.pad_id) == (1, (2, 0), 0)
    assert tokenizer.chat_template is not None
    assert "<|im_start|>" in tokenizer.chat_template


def test_another_tokenizer_replaces_the_old_one(talking: Any, tmp_path: Path) -> None:
    model = load(talking.path)
    model.tokenizer = Tokenizer.bytes()
    save(model, tmp_path / "again")
    again = load(tmp_path / "again").tokenizer
    assert again is not None
    assert again.encode("cat") == [99, 97, 116]
    model.origin = None
    save(model, talking.path)
    assert inspect(talking.path).tokenizer is not None
    assert Tokenizer.load(talking.path).encode("cat") == [99, 97, 116]


def test_saving_in_place(talking: Any) -> None:
    before = {path.name: path.read_bytes() for path in talking.path.glob("*token*")}
    save(load(talking.path), talking.path)
    assert {path.name: path.read_bytes() for path in talking.path.glob("*token*")} == before


def test_a_broken_tokenizer_is_one_line(talking: Any) -> None:
    (talking.path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json") as caught:
        load(talking.path)
    assert "\n" not in str(caught.value)
