"""A corpus as token ids on disk: made once, found again by what it was made from, checked whenever it is opened.

A store is a folder `train-<digest>` or `validation-<digest>`:

- `tokens.bin`: all documents one after the other, uint16 where the vocabulary allows it, else uint32, little-endian;
- `starts.bin`: where each document begins, uint64;
- `store.json`: counts, and the SHA-256 of the other two.

Its name is a digest of the corpus' text, the split and the tokenizer, so a resumed run finds exactly the data that
it began with. It is built aside, synced and renamed: a kill leaves either a whole store or none.
"""

import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from loopwise.errors import InputError, StorageError, UserError
from loopwise.hub.tokenizer import Tokenizer
from loopwise.tasks.corpus import Corpus, Part

VERSION = 1
TOKENS, STARTS, FACTS = "tokens.bin", "starts.bin", "store.json"
ASIDE = ".writing-"
_SLICE = 2**18
_BATCH = 2**21


@dataclass(frozen=True, kw_only=True)
class StoreFacts:
    """What store.json says."""

    version: int
    """Of this layout."""
    name: str
    """The folder's name: a digest of what the store was made from."""
    tokens: int
    """Token ids in it, separators included."""
    documents: int
    """Documents in it."""
    text_bytes: int
    """UTF-8 bytes of the text it was made from."""
    dtype: str
    """Number type of tokens.bin."""
    digest: str
    """SHA-256 of tokens.bin followed by starts.bin."""


class TokenStore:
    """An opened store; tokens stay on disk and are read where needed."""

    def __init__(self, folder: Path, facts: StoreFacts) -> None:
        self.folder = folder
        self.facts = facts

    @cached_property
    def tokens(self) -> NDArray[np.unsignedinteger]:
        """All token ids, (tokens,)."""
        return np.memmap(self.folder / TOKENS, dtype=self.facts.dtype, mode="r")

    @cached_property
    def starts(self) -> NDArray[np.uint64]:
        """Where each document begins, (documents,); the first is 0."""
        return np.fromfile(self.folder / STARTS, dtype="<u8")

    @property
    def bytes_per_token(self) -> float:
        """Bytes of text for each token whose loss counts: all but the first of a document."""
        return self.facts.text_bytes / max(1, self.facts.tokens - self.facts.documents)


def token_store(
    corpus: Corpus, tokenizer: Tokenizer, cache: str | os.PathLike[str], *, part: Part, held_out: float = 0.05
) -> TokenStore:
    """The store of one part of a corpus: the one in `cache`, or a new one.

    A document is its separator (bos, else eos), its tokens, and eos; nothing where the tokenizer has neither.

    Args:
        corpus: the text.
        tokenizer: turns it into ids.
        cache: the folder that holds stores.
        part: which part of the corpus.
        held_out: the share of the text that validation gets.

    Raises:
        InputError: that part of the corpus holds no text.
        StorageError: the disk refused, or the store in `cache` is damaged.
    """
    identity = json.dumps([VERSION, corpus.summary.digest, part, held_out, tokenizer.digest])
    name = f"{part}-{hashlib.sha256(identity.encode()).hexdigest()[:24]}"
    folder = Path(cache) / name
    if folder.is_dir():
        return open_store(folder)
    try:
        return _build(corpus.part(part, held_out=held_out), tokenizer, folder, what=f"the {part} part of {corpus.spec}")
    except UserError:
        raise
    except OSError as error:
        raise StorageError(
            f"cannot write {folder}: {error.strerror}; free the disk or choose another folder"
        ) from error


def open_store(folder: str | os.PathLike[str]) -> TokenStore:
    """Opens a store and compares its bytes with its digest.

    Raises:
        StorageError: it is incomplete or damaged.
    """
    path = Path(folder)
    damaged = f"the token store {path} is damaged; delete that folder, and it will be made again from the corpus"
    try:
        facts = StoreFacts(**json.loads((path / FACTS).read_text(encoding="utf-8")))
        digest = hashlib.sha256()
        for name in (TOKENS, STARTS):
            with (path / name).open("rb") as file:
                while block := file.read(_BATCH):
                    digest.update(block)
    except (OSError, ValueError, TypeError) as error:
        raise StorageError(damaged) from error
    sizes = facts.tokens * np.dtype(facts.dtype).itemsize, facts.documents * 8
    if (
        facts.version != VERSION
        or facts.name != path.name
        or digest.hexdigest() != facts.digest
        or sizes != tuple((path / name).stat().st_size for name in (TOKENS, STARTS))
    ):
        raise StorageError(damaged)
    return TokenStore(path, facts)


def _build(documents: Iterator[str], tokenizer: Tokenizer, folder: Path, *, what: str) -> TokenStore:
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")
    first = tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id
    before = [] if first is None else [first]
    after = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    aside = folder.with_name(f"{ASIDE}{folder.name}-{os.getpid()}")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        starts: list[int] = []
        count = text_bytes = 0
        digest = hashlib.sha256()
        with (aside / TOKENS).open("wb") as file:
            for text, slices in _encoded(documents, tokenizer):
                starts.append(count)
                for ids in (before, *slices, after):
                    data = np.array(ids, dtype=dtype).tobytes()
                    file.write(data)
                    digest.update(data)
                    count += len(ids)
                text_bytes += len(text.encode())
            file.flush()
            os.fsync(file.fileno())
        if not starts:
            raise InputError(f"{what} holds no text; give more text, or another held_out")
        digest.update(np.array(starts, dtype="<u8").tobytes())
        facts = StoreFacts(
            version=VERSION,
            name=folder.name,
            tokens=count,
            documents=len(starts),
            text_bytes=text_bytes,
            dtype=dtype.str,
            digest=digest.hexdigest(),
        )
        for name, data in (
            (STARTS, np.array(starts, dtype="<u8").tobytes()),
            (FACTS, json.dumps(asdict(facts), indent=2).encode()),
        ):
            with (aside / name).open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        _publish(aside, folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return open_store(folder)


def _publish(aside: Path, folder: Path) -> None:
    try:
        aside.rename(folder)
    except OSError:
        # Another process of the same run made the same store first; its own is as good.
        if not folder.is_dir():
            raise


def _encoded(documents: Iterator[str], tokenizer: Tokenizer) -> Iterator[tuple[str, list[list[int]]]]:
    """Documents with the ids of their slices, many encoded at a time."""
    for group in _groups(documents):
        slices = [_slices(text) for text in group]
        ids = iter(tokenizer.encode_many(list(itertools.chain.from_iterable(slices))))
        for text, parts in zip(group, slices, strict=True):
            yield text, list(itertools.islice(ids, len(parts)))


def _groups(documents: Iterator[str]) -> Iterator[list[str]]:
    group: list[str] = []
    characters = 0
    for text in documents:
        group.append(text)
        characters += len(text)
        if characters >= _BATCH:
            yield group
            group, characters = [], 0
    if group:
        yield group


def _slices(text: str) -> Sequence[str]:
    """A long text in parts that are encoded by themselves, so that memory stays bounded.

    A cut falls between a line break and a character that is not white space, where a byte-level BPE never joins the
    two sides; where there is none, anywhere.
    """
    parts: list[str] = []
    begin = 0
    while len(text) - begin > _SLICE:
        end = begin + _SLICE
        place = text.rfind("\n", begin, end - 1)
        while place > begin and (text[place + 1].isspace() or text[place - 1].isspace()):
            place = text.rfind("\n", begin, place)
        end = place + 1 if place > begin else end
        parts.append(text[begin:end])
        begin = end
    return [*parts, text[begin:]]
