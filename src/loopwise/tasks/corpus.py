"""A corpus: documents of text from a name or a path, always in the same order, split for validation."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from loopwise.errors import ConfigError, InputError
from loopwise.tasks.text_sources import find_source

Part = Literal["train", "validation"]

FEWEST_HELD_OUT = 16
"""Whole documents are held out where at least this many are to be expected; otherwise the end of the text is."""
_LINE = 1000


@dataclass(frozen=True, kw_only=True)
class CorpusSummary:
    """What one pass over a corpus counts."""

    documents: int
    """Documents that are not blank."""
    characters: int
    """Unicode characters in them."""
    size: int
    """Bytes of UTF-8 in them."""
    digest: str
    """SHA-256 of the documents in their order: the same digest, the same corpus."""


class Corpus:
    """Documents of text, read anew on each pass; nothing but the current document is kept in memory.

    Args:
        spec: one of

            - `python`: the sources and documentation strings of this Python's standard library, a document per module;
            - a text file (one document), a folder (every text, JSON-lines and Parquet file below it, by path), or a
              glob such as `notes/**/*.md`; write `./python` for a folder of that name;
            - JSON lines, `path.jsonl` or `path.jsonl:field`; the field is `text` unless named. `question+answer` joins
              fields by a line break;
            - Parquet, `path.parquet:column`, with fields as above;
            - `hf:org/name:split:field`, a data set of the `datasets` package (`hf:org/name@config:…` for one of its
              configurations); the split is `train` and the field `text` unless named.
        limit: stop after this many bytes of UTF-8; the last document is cut there.

    Raises:
        NotFoundError: there is no such file, folder or data set.
        ConfigError: the name is malformed or the limit is not positive.
        InputError: (while reading) a file is not UTF-8, a line is not JSON, a field is missing, or all is blank.
    """

    def __init__(self, spec: str, *, limit: int | None = None) -> None:
        if limit is not None and limit <= 0:
            raise ConfigError(
                f"a corpus limit of {limit} bytes leaves nothing; give a positive number, or none for all"
            )
        self.spec = spec
        self.limit = limit
        self._source = find_source(spec)

    def __iter__(self) -> Iterator[str]:
        left = self.limit
        empty = True
        for text in self._source():
            if left is not None:
                encoded = text.encode()
                text = encoded[:left].decode("utf-8", "ignore")
                left -= len(encoded)
            if text and not text.isspace():
                empty = False
                yield text
            if left is not None and left <= 0:
                break
        if empty:
            raise InputError(f"the corpus {self.spec} holds no text; give one that does")

    @cached_property
    def summary(self) -> CorpusSummary:
        """Counts and digest, from one pass over everything."""
        documents = characters = size = 0
        digest = hashlib.sha256()
        for text in self:
            encoded = text.encode()
            documents, characters, size = documents + 1, characters + len(text), size + len(encoded)
            digest.update(len(encoded).to_bytes(8, "little") + encoded)
        return CorpusSummary(documents=documents, characters=characters, size=size, digest=digest.hexdigest())

    def part(self, name: Part, *, held_out: float = 0.05) -> Iterator[str]:
        """The documents of one part; the parts share no text (unless the corpus repeats itself).

        A document belongs to the part that its own SHA-256 says, so that copies of it fall into the same part and
        nothing moves when documents are added. Where that would hold out fewer than 16 documents (a single file,
        say), the end of the corpus is held out instead, cut at a line break.

        Args:
            name: which part.
            held_out: the share of the text that validation gets.

        Raises:
            ConfigError: `held_out` is not at least 0 and below 1.
        """
        if not 0 <= held_out < 1:
            raise ConfigError(f"held_out={held_out} is not a share of the text; give a number from 0 up to below 1")
        if held_out == 0:
            return iter(self) if name == "train" else iter(())
        if self.summary.documents * held_out >= FEWEST_HELD_OUT:
            return (text for text in self if (_share(text) < held_out) == (name == "validation"))
        return self._before_or_after(int(self.summary.characters * (1 - held_out)), name)

    def _before_or_after(self, cut: int, name: Part) -> Iterator[str]:
        for text in self:
            here = min(max(cut, 0), len(text))
            if 0 < here < len(text):
                line_break = text.rfind("\n", max(0, here - _LINE), here)
                here = line_break + 1 if line_break >= 0 else here
            part = text[:here] if name == "train" else text[here:]
            if part and not part.isspace():
                yield part
            cut -= len(text)


def _share(text: str) -> float:
    """Where a document falls in [0, 1)."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "little") / 2**48
