"""Text to token ids and back, for every tokenizer that a looped language model uses.

A thin class over `tokenizers.Tokenizer`: byte-level BPE trained here (`Tokenizer.train`), raw bytes
(`Tokenizer.bytes`), or a checkpoint's own file (`Tokenizer.load`). All three are stored as tokenizer.json beside
tokenizer_config.json, which transformers reads too.

Two promises. Text is text: no string in it turns into a special token, neither in `encode` nor inside a chat
message. And decoding goes through bytes, so that a token stream may be cut anywhere, within a character too.
"""

import builtins
import codecs
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from loopwise.errors import CheckpointError, ConfigError, InputError, NotFoundError, StorageError
from loopwise.hub.chat_template import Shield, check_roles, render
from loopwise.hub.token_bytes import BYTE_OF, ByteDecoder
from loopwise.hub.tokenizer_files import SpecialIds, ids_in, read_json, read_text, template_in, token_text

END_OF_TEXT = "<|endoftext|>"
"""The one special token of the tokenizers made here: it begins, ends and pads."""


class Tokenizer:
    """One vocabulary with its special ids and its chat template.

    Args:
        serialized: the text of a tokenizer.json; `save` writes it back unchanged.
        special: the special ids. They must lie in the vocabulary.
        chat_template: a Jinja template as transformers uses it, or `None`.
        settings: further keys of tokenizer_config.json, kept for `save`.

    Raises:
        CheckpointError: `serialized` is not a tokenizer that can be decoded byte by byte.
    """

    def __init__(
        self,
        serialized: str,
        *,
        special: SpecialIds,
        chat_template: str | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self.serialized = serialized
        self.special = special
        self.chat_template = chat_template
        self.settings = dict(settings or {})
        self._plain = _build(serialized, recognise_special=False)
        self._decoder = ByteDecoder.of(json.loads(serialized).get("decoder"))
        added = self._plain.get_added_tokens_decoder()
        self._added = {index: token.content for index, token in added.items()}
        self._special = {index: token.content for index, token in added.items() if token.special}
        self.vocab_size = 1 + max(self._plain.get_vocab(with_added_tokens=True).values(), default=-1)
        for name, value in (("bos", special.bos), ("eos", special.eos), ("pad", special.pad)):
            if value is not None and value >= self.vocab_size:
                raise CheckpointError(
                    f"{name} id {value} is outside the tokenizer's {self.vocab_size} tokens; pass {name}_id=… to choose"
                )

    def __deepcopy__(self, memo: dict[int, Any]) -> "Tokenizer":
        """Itself: nothing changes it, and a large vocabulary takes a while to copy."""
        return self

    @classmethod
    def bytes(cls) -> "Tokenizer":
        """Raw bytes: token id = byte value, and 256 is `<|endoftext|>`. The same library with no merges."""
        tokenizer = tokenizers.Tokenizer(models.BPE(vocab=dict(BYTE_OF), merges=[]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        return cls._made_here(tokenizer)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """Byte-level BPE of at most `vocab_size` tokens: fewer where `texts` holds fewer repeated pairs.

        Raises:
            ConfigError: `vocab_size` leaves no room for the 256 bytes and `<|endoftext|>`.
            InputError: `texts` is empty.
        """
        if vocab_size < 257:
            raise ConfigError(
                f"vocab_size={vocab_size} is too small for byte-level BPE: 256 bytes and {END_OF_TEXT} need 257; "
                "give at least 257, or use tokenizer=bytes"
            )
        tokenizer = tokenizers.Tokenizer(models.BPE(vocab={}, merges=[]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size - 1,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        characters = 0

        def counted() -> Iterator[str]:
            nonlocal characters
            for text in texts:
                characters += len(text)
                yield text

        tokenizer.train_from_iterator(counted(), trainer)
        if characters == 0:
            raise InputError("there is no text to train a tokenizer on; give a corpus with text in it")
        return cls._made_here(tokenizer)

    @classmethod
    def _made_here(cls, tokenizer: tokenizers.Tokenizer) -> "Tokenizer":
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens([tokenizers.AddedToken(END_OF_TEXT, special=True, normalized=False)])
        end = tokenizer.token_to_id(END_OF_TEXT)
        return cls(tokenizer.to_str(), special=SpecialIds(bos=end, eos=end, pad=end))

    @classmethod
    def load(
        cls,
        folder: str | os.PathLike[str],
        *,
        bos_id: int | None = None,
        eos_id: int | None = None,
        pad_id: int | None = None,
        chat_template: str | None = None,
    ) -> "Tokenizer":
        """Reads a checkpoint folder's tokenizer.json and what its other files say about special ids.

        An id comes from the argument, else generation_config.json, config.json, tokenizer_config.json, in this
        order. The arguments are for checkpoints that ship wrong ids. An id of -1 (early Llama files)
        means none.

        Raises:
            NotFoundError: there is no tokenizer.json.
            CheckpointError: a file is not what it should be.
        """
        path = Path(folder)
        if not (path / "tokenizer.json").is_file():
            raise NotFoundError(
                f"{path} has no tokenizer.json; make one with transformers: "
                "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
            )
        serialized = read_text(path / "tokenizer.json")
        settings = read_json(path / "tokenizer_config.json")
        files = [read_json(path / name) for name in ("generation_config.json", "config.json")]
        vocabulary = _build(serialized, recognise_special=True)
        given = {"bos": bos_id, "eos": eos_id, "pad": pad_id}
        found = {
            name: (value,) if value is not None else ids_in(name, files, settings, vocabulary)
            for name, value in given.items()
        }
        first = {name: ids[0] if ids else None for name, ids in found.items()}
        special = SpecialIds(bos=first["bos"], eos=first["eos"], pad=first["pad"], stop=found["eos"])
        if chat_template is None:
            chat_template = template_in(path, settings)
        return cls(serialized, special=special, chat_template=chat_template, settings=settings)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes tokenizer.json, tokenizer_config.json and, where there is one, chat_template.jinja.

        Raises:
            StorageError: the disk refused.
        """
        settings = {key: value for key, value in self.settings.items() if key != "chat_template"}
        settings.setdefault("tokenizer_class", "PreTrainedTokenizerFast")
        settings.update(self._special_strings())
        files = {
            "tokenizer.json": self.serialized,
            "tokenizer_config.json": json.dumps(settings, indent=2, ensure_ascii=False) + "\n",
        }
        if self.chat_template is not None:
            files["chat_template.jinja"] = self.chat_template
        path = Path(folder)
        try:
            path.mkdir(parents=True, exist_ok=True)
            for name, text in files.items():
                aside = path / f".{name}.writing"
                aside.write_text(text, encoding="utf-8", newline="")
                aside.replace(path / name)
        except OSError as error:
            raise StorageError(
                f"cannot write the tokenizer to {path}: {error.strerror}; free the disk or choose another folder"
            ) from error

    @property
    def bos_id(self) -> int | None:
        """Id written before a document."""
        return self.special.bos

    @property
    def eos_id(self) -> int | None:
        """Id written after a document."""
        return self.special.eos

    @property
    def pad_id(self) -> int | None:
        """Id that fills batches."""
        return self.special.pad

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Every id that ends a reply, `eos_id` first."""
        return self.special.stop

    @property
    def digest(self) -> str:
        """SHA-256 of what decides how text becomes ids: the same digest, the same tokens."""
        identity = json.dumps([self.serialized, self.special.bos, self.special.eos])
        return hashlib.sha256(identity.encode("utf-8", "surrogatepass")).hexdigest()

    def encode(self, text: str, *, parse_special: bool = False, add_special: bool = False) -> list[int]:
        """Ids of `text`.

        Args:
            text: any text that UTF-8 can write.
            parse_special: let strings such as `<|im_end|>` become the special tokens they name. Never for text from
                somebody else.
            add_special: add what the checkpoint puts around a sequence (Llama's leading bos, for instance).

        Raises:
            InputError: `text` is not a string that UTF-8 can write.
        """
        tokenizer = self._aware if parse_special else self._plain
        return list(tokenizer.encode(_checked(text), add_special_tokens=add_special).ids)

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, as `encode` gives them, worked out on all cores."""
        encodings = self._plain.encode_batch_fast([_checked(text) for text in texts], add_special_tokens=False)
        return [list(encoding.ids) for encoding in encodings]

    def decode(self, ids: Iterable[int], *, skip_special: bool = True, continuation: bool = False) -> str:
        """Text of `ids`; bytes that are not UTF-8, and ids without a token, show as U+FFFD.

        Args:
            ids: token ids.
            skip_special: leave special tokens out of the text.
            continuation: `ids` follow other text, so a SentencePiece vocabulary keeps its first space.

        Raises:
            InputError: a negative id.
        """
        stream = StreamDecoder(self, skip_special=skip_special, continuation=continuation)
        return "".join([stream.push(index) for index in ids]) + stream.flush()

    def pieces(self, ids: Iterable[int]) -> list[str]:
        """Display text of each id by itself, special tokens by name; part of a character shows as U+FFFD."""
        return [self.token_bytes(index).decode("utf-8", "replace") for index in ids]

    def is_special(self, index: int) -> bool:
        """Whether `index` is a special token, which decoded text leaves out."""
        return index in self._special

    def names_special(self, text: str) -> bool:
        """Whether `text` is the name of a special token."""
        return text in self._special.values()

    def token_bytes(self, index: int) -> builtins.bytes:
        """The bytes that token `index` writes; a special token's are its name, a token-less id's are U+FFFD.

        Raises:
            InputError: a negative id.
        """
        if index < 0:
            raise InputError(f"token id {index} is negative; ids run from 0 to {self.vocab_size - 1}")
        return self._bytes_of[index] if index < self.vocab_size else b"\xef\xbf\xbd"

    @cached_property
    def _bytes_of(self) -> list[builtins.bytes]:
        table = [b"\xef\xbf\xbd"] * self.vocab_size
        for token, index in self._plain.get_vocab(with_added_tokens=True).items():
            table[index] = token.encode() if index in self._added else self._decoder.token_bytes(token)
        return table

    @cached_property
    def _aware(self) -> tokenizers.Tokenizer:
        return _build(self.serialized, recognise_special=True)

    @cached_property
    def _plain_inside(self) -> tokenizers.Tokenizer:
        """Like `_plain`, for a stretch that is not the start of the text: no space is put before it."""
        serialized = re.sub(r'("prepend_scheme"\s*:\s*)"first"', r'\1"never"', self.serialized)
        return _build(serialized, recognise_special=False)

    def _special_strings(self) -> dict[str, str]:
        named = {"bos_token": self.bos_id, "eos_token": self.eos_id, "pad_token": self.pad_id}
        tokens = {name: self._plain.id_to_token(index) for name, index in named.items() if index is not None}
        return {name: token for name, token in tokens.items() if token is not None}

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Ids of a conversation, laid out by the checkpoint's chat template.

        Special tokens come from the template's own text alone (see `Shield`): stretches that hold shielded user text
        are restored and encoded as ordinary text.

        Args:
            messages: `{"role": …, "content": …}` and whatever further keys the template reads.
            generation_prompt: end with the opening of the reply.
            variables: further template variables, such as `{"enable_thinking": False}`.

        Raises:
            ConfigError: there is no chat template.
            InputError: the messages are malformed, or the template refuses them.
        """
        if self.chat_template is None:
            raise ConfigError("this tokenizer has no chat template; send plain text, or load it with chat_template=…")
        check_roles(messages)
        shield = Shield.over(self._special.values(), messages, self.chat_template)
        rendered = render(
            self.chat_template,
            shield.cover(list(messages)),
            generation_prompt=generation_prompt,
            variables={**self._named_tokens(), **(variables or {})},
        )
        encoding = self._aware.encode(_checked(rendered), add_special_tokens=False)
        ids: list[int] = []
        run: list[int] = []
        begin = 0
        for index, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            if self._special.get(index) != rendered[start:end].strip():
                run.append(index)
                continue
            ids += [*self._stretch(shield, rendered, begin, start, run), index]
            begin, run = end, []
        return ids + self._stretch(shield, rendered, begin, len(rendered), run)

    def _stretch(self, shield: Shield, rendered: str, begin: int, end: int, ids: list[int]) -> list[int]:
        """The ids between two special tokens: as the template gave them, or anew where user text was shielded
        (or where the tokenizer's normalisation made a special token out of other text).
        """
        text = rendered[begin:end]
        if not shield.used_in(text) and self._special.keys().isdisjoint(ids):
            return ids
        tokenizer = self._plain if begin == 0 else self._plain_inside
        return list(tokenizer.encode(shield.restore(text), add_special_tokens=False).ids)

    def _named_tokens(self) -> dict[str, str]:
        """What a template may call `bos_token`, `eos_token` and so on."""
        named = {key: token_text(value) for key, value in self.settings.items() if key.endswith("_token")}
        return {key: token for key, token in named.items() if token is not None} | self._special_strings()


class StreamDecoder:
    """Text of a token stream as it grows; a character is given out once all its bytes are there.

    The texts of all pushes and of `flush`, joined, are `Tokenizer.decode` of the ids.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = True, continuation: bool = False) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._strip = tokenizer._decoder.strips_first_space and not continuation
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, index: int) -> str:
        """The text that this id completes; empty in the middle of a character."""
        if self._skip_special and self._tokenizer.is_special(index):
            return ""
        text = self._utf8.decode(self._tokenizer.token_bytes(index))
        return self._shown(text) if self._strip else text

    def flush(self) -> str:
        """What is left at the end: U+FFFD for the bytes of an unfinished character."""
        return self._shown(self._utf8.decode(b"", final=True))

    def _shown(self, text: str) -> str:
        if self._strip and text:
            self._strip = False
            return text.removeprefix(" ")
        return text


def _build(serialized: str, *, recognise_special: bool) -> tokenizers.Tokenizer:
    try:
        tokenizer = tokenizers.Tokenizer.from_str(serialized)
    except Exception as error:  # the library raises bare Exception for every malformed file
        raise CheckpointError(f"tokenizer.json is not a tokenizer: {error}; fetch the file again") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = not recognise_special
    return tokenizer


def _checked(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"text holds a lone surrogate at character {error.start}; give text that UTF-8 can write"
        ) from error
    return text
