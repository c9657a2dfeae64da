"""Token stores, rows and their order, against a naive reading of the documents."""

import itertools
import json
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loopwise.errors import ConfigError, InputError, StorageError
from loopwise.hub.tokenizer import Tokenizer
from loopwise.tasks.corpus import Corpus
from loopwise.tasks.pointer_chasing import PointerChasing, PointerChasingConfig
from loopwise.train import token_store as stores
from loopwise.train.batches import Batch, BatchSource
from loopwise.train.packing import Packing, shuffled
from loopwise.train.sources import PackedSource, PointerChasingSource
from loopwise.train.token_store import TokenStore, open_store, token_store

BYTES = Tokenizer.bytes()
END = 256


def write(folder: Path, texts: list[str]) -> Corpus:
    path = folder / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return Corpus(str(path))


def whole_store(folder: Path, texts: list[str]) -> TokenStore:
    return token_store(write(folder, texts), BYTES, folder / "cache", part="train", held_out=0.0)


def same(one: Batch, other: Batch) -> bool:
    names = ("tokens", "targets", "documents", "mask")
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in names)


TEXTS = st.lists(
    st.text("abé\n", min_size=1, max_size=12).filter(lambda text: not text.isspace()), min_size=1, max_size=7
)


@given(texts=TEXTS, length=st.integers(1, 40))
def test_rows_hold_every_token_once_within_its_document(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], length: int
) -> None:
    store = whole_store(tmp_path_factory.mktemp("store"), texts)
    stream = [(token, number) for number, text in enumerate(texts) for token in [END, *text.encode(), END]]
    assert store.facts.tokens == len(stream)
    assert store.facts.documents == len(texts)
    assert store.facts.text_bytes == sum(len(text.encode()) for text in texts)
    packing = Packing(store, length)
    rows = packing.rows(torch.arange(len(packing)))
    flat = [getattr(rows, name).flatten().tolist() for name in ("tokens", "targets", "documents", "mask")]
    expected = [
        (token, target, number, number == following)
        for (token, number), (target, following) in itertools.pairwise(stream)
    ]
    padding = len(flat[0]) - len(expected)
    assert 0 <= padding < length
    assert list(zip(*flat, strict=True)) == expected + [(0, 0, len(texts), False)] * padding
    assert sum(flat[3]) == len(stream) - len(texts)
    counted = sum(flat[3])
    assert store.bytes_per_token == pytest.approx(store.facts.text_bytes / counted)


@settings(max_examples=settings().max_examples * 2 // 5)
@given(size=st.integers(1, 300), seed=st.integers(0, 2**62), epoch=st.integers(0, 10**6))
def test_each_pass_is_a_permutation(size: int, seed: int, epoch: int) -> None:
    positions = torch.arange(size) + epoch * size
    order = shuffled(positions, size, seed=seed)
    assert sorted(order.tolist()) == list(range(size))
    alone = [int(shuffled(positions[i : i + 1], size, seed=seed)) for i in (0, size // 2, size - 1)]
    assert alone == [int(order[i]) for i in (0, size // 2, size - 1)]


def test_passes_and_seeds_have_orders_of_their_own() -> None:
    orders = [shuffled(torch.arange(50) + 50 * epoch, 50, seed=seed).tolist() for seed in (0, 1) for epoch in (0, 1, 2)]
    assert len({tuple(order) for order in orders}) == 6
    # Over many passes each row comes first about equally often: within six standard deviations of 4000 fair draws.
    first = shuffled(10 * torch.arange(4000), 10, seed=0)
    assert (first.bincount(minlength=10) - 400).abs().max() < 6 * 360**0.5


@pytest.fixture(scope="module")
def forty_rows(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    return whole_store(tmp_path_factory.mktemp("store"), [f"{number:05d}" for number in range(40)])


@pytest.mark.parametrize(("rows", "micros", "first"), [(1, 1, 0), (7, 3, 0), (4, 2, 30), (3, 3, 100), (50, 1, 7)])
def test_steps_take_each_row_once_an_epoch(forty_rows: TokenStore, rows: int, micros: int, first: int) -> None:
    source = PackedSource(
        train=forty_rows, validation=None, vocab_size=257, length=7, micros=micros, first_row=first, seed=3
    )
    size = len(source.train)
    assert size == 40
    everything = {tuple(row): i for i, row in enumerate(source.train.rows(torch.arange(size)).tokens.tolist())}
    assert len(everything) == size
    steps = -(-3 * size // (rows * micros))
    taken = [
        everything[tuple(row)]
        for step in range(steps)
        for micro in range(micros)
        for row in source.batch(step, micro, rows=rows).tokens.tolist()
    ]
    begin = -first % size
    for epoch in range((len(taken) - begin) // size):
        assert sorted(taken[begin + epoch * size : begin + (epoch + 1) * size]) == list(range(size))


def test_a_reopened_source_goes_on_with_the_same_batches(tmp_path: Path) -> None:
    texts = [f"document {number} " * (number % 7 + 1) for number in range(400)]

    def open_source() -> PackedSource:
        return PackedSource.open(write(tmp_path, texts), BYTES, tmp_path / "cache", length=16, seed=5, micros=2)

    before = open_source()
    batches = [before.batch(step, micro, rows=3) for step in range(4) for micro in range(2)]
    after = open_source()
    assert after.state() == before.state()
    assert json.loads(json.dumps(after.state())) == after.state()
    for place in (6, 3, 7):
        assert same(after.batch(*divmod(place, 2), rows=3), batches[place])
    assert len(list((tmp_path / "cache").iterdir())) == 2
    source: BatchSource = after
    assert source.vocab_size == 257
    with pytest.raises(ConfigError, match="micro-batch 2 of 2"):
        after.batch(0, 2, rows=3)


def test_other_text_tokenizer_or_split_is_other_data(tmp_path: Path) -> None:
    corpus = write(tmp_path, [f"some text {number}" for number in range(50)])
    digests = {
        token_store(corpus, tokenizer, tmp_path / "cache", part="train", held_out=held_out).facts.digest
        for tokenizer, held_out in [(BYTES, 0.05), (BYTES, 0.1), (Tokenizer.train(corpus, 270), 0.05)]
    }
    digests.add(token_store(write(tmp_path, ["other"]), BYTES, tmp_path / "cache", part="train").facts.digest)
    assert len(digests) == 4


def test_validation_rows_are_fixed_spread_and_held_out(tmp_path: Path) -> None:
    corpus = write(tmp_path, [f"a line of text with number {number}" for number in range(400)])
    source = PackedSource.open(corpus, BYTES, tmp_path / "cache", length=20, held_out=0.2)
    assert source.held_out is not None
    everything = source.held_out.rows(torch.arange(len(source.held_out)))
    (few,) = source.validation(5)
    places = [i * len(source.held_out) // 5 for i in range(5)]
    assert torch.equal(few.tokens, everything.tokens[places])
    assert torch.equal(few.mask, everything.mask[places])
    assert same(source.validation(5)[0], few)
    (every,) = source.validation(10**6)
    assert same(every, everything)
    training = set(source.train.store.tokens.tobytes().split(b"\x00\x01"))
    assert not training & (set(source.held_out.store.tokens.tobytes().split(b"\x00\x01")) - {b""})
    assert PackedSource.open(corpus, BYTES, tmp_path / "cache", length=20, held_out=0.0).validation(5) == []


def test_too_little_text_says_what_would_do(tmp_path: Path) -> None:
    store = whole_store(tmp_path, ["abc"])
    with pytest.raises(InputError, match=r"makes 5 tokens, too few for one row of 5 .* length of at most 4"):
        PackedSource(train=store, validation=None, vocab_size=257, length=5)
    assert len(PackedSource(train=store, validation=None, vocab_size=257, length=4).train) == 1
    with pytest.raises(InputError, match=r"the validation part of .* holds no text"):
        token_store(write(tmp_path, ["ab" * 50]), BYTES, tmp_path / "cache", part="validation", held_out=0.0)
    with pytest.raises(ConfigError, match="length of at least 1"):
        Packing(store, 0)


@pytest.mark.parametrize("name", ["tokens.bin", "starts.bin", "store.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_store_is_noticed(tmp_path: Path, name: str, damage: str) -> None:
    store = whole_store(tmp_path, ["first text", "second text"])
    path = store.folder / name
    content = bytearray(path.read_bytes())
    if damage == "remove":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(content[:-2])
    else:
        content[content.index(b'"tokens": ') + 10 if name == "store.json" else 3] ^= 1
        path.write_bytes(content)
    with pytest.raises(StorageError, match="is damaged; delete that folder") as error:
        whole_store(tmp_path, ["first text", "second text"])
    assert "\n" not in str(error.value)


def test_a_failed_build_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="No space left on device; free the disk"):
        whole_store(tmp_path, ["text"])
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_store_that_another_process_finished_first_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = Path.rename

    def late(self: Path, target: Path) -> Path:
        monkeypatch.undo()
        whole_store(tmp_path, ["text"])
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", late)
    store = whole_store(tmp_path, ["text"])
    assert [child.name for child in (tmp_path / "cache").iterdir()] == [store.folder.name]
    assert open_store(store.folder).facts == store.facts


def test_large_vocabularies_take_four_bytes(tmp_path: Path) -> None:
    tokenizer = Tokenizer.bytes()
    tokenizer.vocab_size = 2**16 + 1
    corpus = write(tmp_path, ["é"])
    store = token_store(corpus, tokenizer, tmp_path / "wide", part="train", held_out=0.0)
    assert store.facts.dtype == "<u4"
    assert store.tokens.tolist() == [256, 0xC3, 0xA9, 256]
    assert whole_store(tmp_path, ["é"]).facts.dtype == "<u2"


def test_a_tokenizer_without_special_tokens_separates_by_document_alone(tmp_path: Path) -> None:
    from loopwise.hub.tokenizer import SpecialIds

    bare = Tokenizer(BYTES.serialized, special=SpecialIds())
    store = token_store(write(tmp_path, ["ab", "cd"]), bare, tmp_path / "cache", part="train", held_out=0.0)
    assert store.tokens.tolist() == [97, 98, 99, 100]
    assert Packing(store, 3).rows(torch.tensor([0])).mask.tolist() == [[True, False, True]]


def test_long_documents_are_encoded_in_slices_without_a_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "".join(
        f"line {number} of the text,\n" + ("\n  indented\n" if number % 5 == 0 else "") for number in range(99)
    )
    tokenizer = Tokenizer.train([text], 300)
    corpus = write(tmp_path, [text, "x" * 500, text])
    expected = [id for document in corpus for id in [299, *tokenizer.encode(document), 299]]
    monkeypatch.setattr(stores, "_SLICE", 100)
    monkeypatch.setattr(stores, "_BATCH", 50)
    store = token_store(corpus, tokenizer, tmp_path / "cache", part="train", held_out=0.0)
    slices = list(stores._slices(text))
    assert len(slices) > 20
    assert "".join(slices) == text
    assert max(map(len, slices)) <= 100
    ends = store.starts[1:].tolist()
    got = store.tokens.tolist()
    assert got[: ends[0]] == expected[: ends[0]]
    assert got[ends[1] :] == expected[: ends[0]]
    assert tokenizer.decode(got[ends[0] : ends[1]]) == "x" * 500


def test_questions_count_from_their_own_loop() -> None:
    source = PointerChasingSource(PointerChasing(PointerChasingConfig(nodes=6, max_hops=3, questions=4)), seed=1)
    batch = source.batch(2, 1, rows=5)
    assert batch.first_loop is not None
    assert torch.equal(batch.mask, batch.first_loop > 0)
    assert batch.mask.sum(dim=1).tolist() == [4] * 5
    assert not batch.documents.any()
    for row in range(5):
        for place in batch.mask[row].nonzero()[:, 0].tolist():
            assert source.task.verify(batch.tokens[row, : place + 1].tolist(), int(batch.targets[row, place]))
    assert same(source.batch(2, 1, rows=5), batch)
    others = [source.batch(2, 0, rows=5), source.batch(1, 1, rows=5), *source.validation(5)]
    assert not any(torch.equal(other.tokens, batch.tokens) for other in others)
    assert sum(len(part.tokens) for part in source.validation(1000)) == 1000
    assert json.loads(json.dumps(source.state())) == source.state()
    checked: BatchSource = source
    assert checked.vocab_size == 6 + 3 + 36


def test_batches_move_to_a_device() -> None:
    batch = PointerChasingSource(PointerChasing(PointerChasingConfig())).batch(0, 0, rows=2).to("meta")
    assert batch.first_loop is not None
    assert {tensor.device.type for tensor in (batch.tokens, batch.targets, batch.documents, batch.mask)} == {"meta"}
    assert batch.first_loop.device.type == "meta"
