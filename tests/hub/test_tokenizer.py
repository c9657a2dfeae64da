"""The tokenizer against the `tokenizers` library and transformers, on text of every kind."""

import inspect
import json
import json.decoder
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers

from loopwise.errors import CheckpointError, ConfigError, InputError, NotFoundError
from loopwise.hub.tokenizer import END_OF_TEXT, SpecialIds, StreamDecoder, Tokenizer

TEXTS = [
    inspect.getsource(json.decoder),
    "def add(first, second):\n    return first + second\n",
    "the rain in Spain, naïve café — 日本語 😀\n",
]
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{{ message['content'] | trim + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]))

BPE = Tokenizer.train(TEXTS, 330)
BYTES = Tokenizer.bytes()


def chat_tokenizer(template: str = CHATML) -> Tokenizer:
    library = tokenizers.Tokenizer.from_str(BPE.serialized)
    library.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    return Tokenizer(library.to_str(), special=SpecialIds(bos=0, eos=331), chat_template=template)


CHAT = chat_tokenizer()


def sentencepiece() -> Tokenizer:
    words = ["<unk>", "<s>", "</s>", *[f"<0x{byte:02X}>" for byte in range(256)], "▁", "a", "b", "▁a", "ab", "▁ab"]
    merges = [("▁", "a"), ("a", "b"), ("▁a", "b")]
    library = tokenizers.Tokenizer(
        models.BPE(vocab={w: i for i, w in enumerate(words)}, merges=merges, unk_token="<unk>", byte_fallback=True)
    )
    library.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    library.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    library.add_special_tokens(["<unk>", "<s>", "</s>"])
    return Tokenizer(library.to_str(), special=SpecialIds(bos=1, eos=2))


@given(text=ANY_TEXT)
@pytest.mark.parametrize("tokenizer", [BPE, BYTES, CHAT], ids=["bpe", "bytes", "chat"])
def test_any_text_round_trips(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(text=ANY_TEXT)
def test_sentencepiece_round_trips(text: str) -> None:
    tokenizer = sentencepiece()
    text = text.replace("▁", " ")
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(text=ANY_TEXT)
def test_byte_ids_are_the_bytes(text: str) -> None:
    assert BYTES.encode(text) == list(text.encode())
    assert BYTES.vocab_size == 257


@pytest.mark.parametrize("tokenizer", [BPE, sentencepiece()], ids=["bpe", "sentencepiece"])
@given(data=st.data())
def test_decoding_any_ids_equals_the_library(tokenizer: Tokenizer, data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1)))
    library = tokenizers.Tokenizer.from_str(tokenizer.serialized)
    if "ByteFallback" in tokenizer.serialized:
        # The library shows U+FFFD per byte for a whole broken run; only runs that are UTF-8 have one right answer.
        ids = [index for index in ids if not 3 + 128 <= index < 3 + 256]
    assert tokenizer.decode(ids) == library.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("tokenizer", [BPE, BYTES, sentencepiece()], ids=["bpe", "bytes", "sentencepiece"])
@given(data=st.data(), skip=st.booleans(), continuation=st.booleans())
def test_stream_joins_to_the_decoded_text(
    tokenizer: Tokenizer, data: st.DataObject, skip: bool, continuation: bool
) -> None:
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 3)))
    stream = StreamDecoder(tokenizer, skip_special=skip, continuation=continuation)
    text = "".join([stream.push(index) for index in ids]) + stream.flush()
    assert text == tokenizer.decode(ids, skip_special=skip, continuation=continuation)
    whole = b"".join(tokenizer.token_bytes(i) for i in ids if not (skip and tokenizer.is_special(i)))
    expected = whole.decode("utf-8", "replace")
    drops_space = tokenizer is not BPE and tokenizer is not BYTES and not continuation
    assert text == (expected.removeprefix(" ") if drops_space else expected)


def test_stream_waits_for_the_last_byte_of_a_character() -> None:
    stream = StreamDecoder(BYTES)
    assert [stream.push(byte) for byte in "é😀".encode()] == ["", "é", "", "", "", "😀"]
    assert stream.push(0xC3) == ""
    assert stream.flush() == "\ufffd"


def test_pieces_show_partial_characters_and_special_names() -> None:
    assert BYTES.pieces([*"né".encode(), 256]) == ["n", "\ufffd", "\ufffd", END_OF_TEXT]
    assert BYTES.pieces([300]) == ["\ufffd"]
    assert BYTES.decode([104, 105, 256]) == "hi"
    assert BYTES.decode([104, 105, 256], skip_special=False) == "hi<|endoftext|>"
    with pytest.raises(InputError, match="-1 is negative"):
        BYTES.decode([-1])


def test_text_never_becomes_a_special_token() -> None:
    for tokenizer in (BPE, BYTES, CHAT):
        text = f"before {END_OF_TEXT} after"
        ids = tokenizer.encode(text)
        assert not any(tokenizer.is_special(index) for index in ids)
        assert tokenizer.encode_many([text, "x"]) == [ids, tokenizer.encode("x")]
        parsed = tokenizer.encode(text, parse_special=True)
        assert [tokenizer.pieces([index]) for index in parsed if tokenizer.is_special(index)] == [[END_OF_TEXT]]


def test_lone_surrogates_are_refused() -> None:
    with pytest.raises(InputError, match="lone surrogate at character 1"):
        BPE.encode("a\ud800")


def test_training_is_deterministic_and_bounded() -> None:
    assert Tokenizer.train(TEXTS, 330).serialized == BPE.serialized
    assert Tokenizer.train(TEXTS, 330).digest == BPE.digest
    assert Tokenizer.train(TEXTS, 300).digest != BPE.digest
    assert BPE.vocab_size == 330
    assert Tokenizer.train(["ab"], 5000).vocab_size < 300
    assert BPE.bos_id == BPE.eos_id == BPE.pad_id == 329
    with pytest.raises(ConfigError, match="at least 257"):
        Tokenizer.train(TEXTS, 256)
    with pytest.raises(InputError, match="no text"):
        Tokenizer.train([], 300)


def test_chat_equals_transformers(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    CHAT.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "  what is 日本? < | >\n"}]
    for prompt in (True, False):
        expected = theirs.apply_chat_template(messages, add_generation_prompt=prompt, return_dict=False)
        assert CHAT.chat(messages, generation_prompt=prompt) == expected
    assert theirs.encode("plain text", add_special_tokens=False) == CHAT.encode("plain text")
    assert theirs.eos_token_id == CHAT.eos_id


INJECTIONS = st.lists(
    st.sampled_from(
        ["<|im_start|>", "<|im_end|>", END_OF_TEXT, "<|im_", "end|>", "<", "|>", " ", "hello", "\n", "é", "\ufdd0"]
    ),
    max_size=8,
).map("".join)


@given(contents=st.lists(INJECTIONS, min_size=1, max_size=4))
def test_chat_messages_cannot_write_special_tokens(contents: list[str]) -> None:
    messages = [{"role": "user", "content": content} for content in contents]
    ids = CHAT.chat(messages)
    start, end = CHAT.encode("<|im_start|><|im_end|>", parse_special=True)
    marks = [index for index in ids if CHAT.is_special(index)]
    assert marks == [start, end] * len(contents) + [start]
    expected = "".join(f"<|im_start|>user\n{content.strip()}<|im_end|>\n" for content in contents)
    assert CHAT.decode(ids, skip_special=False) == expected + "<|im_start|>assistant\n"


def test_chat_parts_cannot_add_up_to_a_special_token() -> None:
    joined = "{% for m in messages %}{{ m.role }}{% for part in m.content %}{{ part.text }}{% endfor %}{% endfor %}"
    tokenizer = chat_tokenizer(joined)
    parts = [{"type": "text", "text": "<|im_e"}, {"type": "text", "text": "nd|>"}]
    ids = tokenizer.chat([{"role": "user", "content": parts}])
    assert tokenizer.decode(ids, skip_special=False) == "user<|im_end|>"
    assert not any(tokenizer.is_special(index) for index in ids)


def test_chat_refuses_what_it_cannot_lay_out() -> None:
    with pytest.raises(ConfigError, match="no chat template"):
        BPE.chat([{"role": "user", "content": "hi"}])
    with pytest.raises(InputError, match="role 'user<|im_end|>'".replace("|", r"\|")):
        CHAT.chat([{"role": "user<|im_end|>", "content": "hi"}])
    with pytest.raises(InputError, match="at least one"):
        CHAT.chat([])
    refusing = chat_tokenizer("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(InputError, match="roles must alternate"):
        refusing.chat([{"role": "user", "content": "hi"}])


def test_chat_template_variables_and_names() -> None:
    tokenizer = chat_tokenizer("{{ bos_token }}{{ mood }}")
    assert tokenizer.decode(tokenizer.chat([{"role": "user", "content": ""}], variables={"mood": "calm"})) == "!calm"


def test_save_and_load_keep_everything(tmp_path: Path) -> None:
    CHAT.save(tmp_path / "new" / "folder")
    loaded = Tokenizer.load(tmp_path / "new" / "folder")
    assert (loaded.serialized, loaded.chat_template, loaded.digest) == (
        CHAT.serialized,
        CHAT.chat_template,
        CHAT.digest,
    )
    assert (loaded.bos_id, loaded.eos_id, loaded.pad_id, loaded.stop_ids) == (0, 331, None, (331,))


def test_special_ids_come_in_order(tmp_path: Path) -> None:
    CHAT.save(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 7, "bos_token_id": 8, "pad_token_id": -1}))
    loaded = Tokenizer.load(tmp_path)
    assert (loaded.bos_id, loaded.eos_id, loaded.pad_id) == (8, 7, None)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 6], "pad_token_id": 4}))
    loaded = Tokenizer.load(tmp_path)
    assert (loaded.eos_id, loaded.stop_ids, loaded.bos_id, loaded.pad_id) == (5, (5, 6), 8, 4)
    loaded = Tokenizer.load(tmp_path, bos_id=1, eos_id=2, pad_id=0, chat_template="{{ eos_token }}")
    assert (loaded.bos_id, loaded.eos_id, loaded.stop_ids, loaded.pad_id) == (1, 2, (2,), 0)
    assert loaded.chat_template == "{{ eos_token }}"


def test_an_older_template_in_the_settings_is_read(tmp_path: Path) -> None:
    BPE.save(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings["chat_template"] = [{"name": "tools", "template": "x"}, {"name": "default", "template": "y"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert Tokenizer.load(tmp_path).chat_template == "y"


def test_broken_folders_say_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"no tokenizer\.json"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": ')
    with pytest.raises(CheckpointError, match="not a tokenizer"):
        Tokenizer.load(tmp_path)
    BPE.save(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"config\.json is not a JSON object"):
        Tokenizer.load(tmp_path)
    (tmp_path / "config.json").write_text('{"eos_token_id": 999}')
    with pytest.raises(CheckpointError, match="eos id 999 is outside the tokenizer's 330 tokens"):
        Tokenizer.load(tmp_path)
    wordpiece = tokenizers.Tokenizer(models.WordPiece(vocab={"a": 0}, unk_token="a"))
    wordpiece.pre_tokenizer = pre_tokenizers.Whitespace()
    wordpiece.decoder = decoders.WordPiece()
    with pytest.raises(CheckpointError, match="WordPiece"):
        Tokenizer(wordpiece.to_str(), special=SpecialIds())


def test_stored_truncation_is_not_applied() -> None:
    library = tokenizers.Tokenizer.from_str(BPE.serialized)
    library.enable_truncation(2)
    library.enable_padding(length=50)
    assert Tokenizer(library.to_str(), special=SpecialIds()).encode("rain in Spain") == BPE.encode("rain in Spain")


def test_import_stays_light() -> None:
    code = "import sys, loopwise.hub.tokenizer; print({'torch', 'transformers', 'jinja2'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"
