"""Corpora of every kind, their split, and what is said when one is wrong."""

import hashlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loopwise.errors import ConfigError, InputError, MissingExtraError, NotFoundError, UserError
from loopwise.tasks.corpus import Corpus


def one_line(error: pytest.ExceptionInfo[UserError]) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


def test_the_python_library_is_real_text_in_a_fixed_order() -> None:
    corpus = Corpus("python")
    texts = list(corpus)
    assert any('"""' in text and "JSON" in text for text in texts)
    assert len(texts) > 100
    assert corpus.summary == Corpus("python").summary
    assert corpus.summary.documents == len(texts)
    assert corpus.summary.size == sum(len(text.encode()) for text in texts)
    assert not any("class IdleConf" in text for text in texts)
    assert len(list(Corpus("python", limit=200_000))) < 60
    assert list(Corpus("python", limit=200_000))[:3] == texts[:3]


def test_a_limit_cuts_within_a_character_to_whole_characters(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("añb", encoding="utf-8")
    (tmp_path / "b.txt").write_text("cd", encoding="utf-8")
    assert list(Corpus(str(tmp_path), limit=2)) == ["a"]
    assert list(Corpus(str(tmp_path), limit=3)) == ["añ"]
    assert list(Corpus(str(tmp_path), limit=5)) == ["añb", "c"]
    assert list(Corpus(str(tmp_path), limit=50)) == ["añb", "cd"]
    assert Corpus("python", limit=20_000).summary.size == 20_000
    with pytest.raises(ConfigError, match="positive"):
        Corpus("python", limit=0)


def test_folders_files_and_globs(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "sub" / "b.md").write_text("second")
    (tmp_path / "a.txt").write_text("\ufefffirst", encoding="utf-8")
    (tmp_path / "blank.txt").write_text(" \n")
    (tmp_path / ".hidden" / "c.txt").write_text("hidden")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\xff")
    (tmp_path / "z.jsonl").write_text('{"text": "third"}\n\n{"text": ""}\n{"text": "fourth"}\n')
    assert list(Corpus(str(tmp_path))) == ["first", "second", "third", "fourth"]
    assert list(Corpus(str(tmp_path / "a.txt"))) == ["first"]
    assert list(Corpus(str(tmp_path / "**" / "*.md"))) == ["second"]
    assert list(Corpus(str(tmp_path / "*.jsonl") + ":text")) == ["third", "fourth"]


def test_json_lines_fields(tmp_path: Path) -> None:
    path = tmp_path / "qa.jsonl"
    path.write_text("".join(json.dumps({"question": f"q{i}?", "answer": f"a{i}"}) + "\n" for i in range(2)))
    assert list(Corpus(f"{path}:answer")) == ["a0", "a1"]
    assert list(Corpus(f"{path}:question+answer")) == ["q0?\na0", "q1?\na1"]
    with pytest.raises(InputError) as error:
        list(Corpus(str(path)))
    message = one_line(error)
    assert "qa.jsonl line 1 has no field 'text'; it has question, answer; type" in message


def test_parquet_columns(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "data.parquet"
    parquet.write_table(pyarrow.table({"title": ["t", "u"], "body": ["one", None], "n": [1, 2]}), path)
    assert list(Corpus(f"{path}:title+body")) == ["t\none", "u"]
    with pytest.raises(InputError) as error:
        list(Corpus(str(path)))
    assert "no field 'text'; it has title, body, n" in one_line(error)
    with pytest.raises(InputError) as error:
        list(Corpus(f"{path}:n"))
    assert "field 'n' holds a int, not text" in one_line(error)
    path.write_bytes(b"not parquet")
    with pytest.raises(InputError) as error:
        list(Corpus(str(path)))
    assert "is not a Parquet file" in one_line(error)


class Dataset(list[dict[str, object]]):
    column_names = ("text", "label")


def test_data_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(name: str, config: str | None, *, split: str) -> Dataset:
        asked.append((name, config, split))
        if name == "org/absent":
            raise FileNotFoundError("Dataset 'org/absent' doesn't exist\non the Hub")
        return Dataset([{"text": "one", "label": 1}, {"text": "two", "label": 0}])

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert list(Corpus("hf:org/name")) == ["one", "two"]
    assert list(Corpus("hf:org/name@plain:train[:10%]:text")) == ["one", "two"]
    assert asked == [("org/name", None, "train"), ("org/name", "plain", "train[:10%]")]
    with pytest.raises(NotFoundError) as error:
        list(Corpus("hf:org/absent:test"))
    assert "Dataset 'org/absent' doesn't exist; write hf:" in one_line(error)
    with pytest.raises(InputError) as error:
        list(Corpus("hf:org/name:test:body"))
    assert "no field 'body'; it has text, label; type hf:org/name:test:FIELD" in one_line(error)
    with pytest.raises(ConfigError, match="does not name a data set"):
        Corpus("hf:")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtraError, match=r"loopwise\[train\]"):
        list(Corpus("hf:org/name"))


@pytest.mark.parametrize(
    ("name", "content", "field", "expected"),
    [
        ("latin.txt", b"caf\xe9", "", "is not UTF-8 text (byte 3)"),
        ("empty.txt", b"", "", "holds no text"),
        ("bad.jsonl", b'{"text": "a"}\n{"text"', "", "bad.jsonl line 2 is not JSON"),
        ("latin.jsonl", b'{"text": "\xe9"}', "", "latin.jsonl line 1 is not JSON"),
        ("list.jsonl", b"[1]", "", "line 1 is not a JSON object"),
        ("number.jsonl", b'{"text": 3}', "", "field 'text' holds a int, not text"),
        ("plain.txt", b"text", ":field", "is plain text, which has no field 'field'"),
    ],
)
def test_wrong_files(tmp_path: Path, name: str, content: bytes, field: str, expected: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        list(Corpus(str(tmp_path / name) + field))
    assert expected in one_line(error)


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError) as error:
        Corpus(str(tmp_path / "absent.txt"))
    assert "give python, a folder, a text file" in one_line(error)
    (tmp_path / "a.bin").write_bytes(b"\xff")
    with pytest.raises(InputError) as error:
        Corpus(str(tmp_path))
    assert "holds no text file" in one_line(error)


def test_many_documents_are_split_by_their_own_hash(tmp_path: Path) -> None:
    path = tmp_path / "many.jsonl"
    texts = [f"document {i % 700}" for i in range(900)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    corpus = Corpus(str(path))
    train, validation = list(corpus.part("train", held_out=0.1)), list(corpus.part("validation", held_out=0.1))
    assert sorted(train + validation) == sorted(texts)
    assert not set(train) & set(validation)
    assert 40 < len(validation) < 150
    for text in validation:
        assert int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "little") < 0.1 * 2**48
    path.write_text(path.read_text() + json.dumps({"text": "one more"}) + "\n")
    assert set(Corpus(str(path)).part("validation", held_out=0.1)) - {"one more"} == set(validation)


LINES = st.lists(st.text(st.sampled_from("ab\né"), min_size=1, max_size=30), min_size=1, max_size=6)


@given(texts=LINES, held_out=st.floats(0, 0.9))
def test_few_documents_are_split_at_the_end(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], held_out: float
) -> None:
    path = tmp_path_factory.mktemp("corpus") / "few.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in [*texts, "end"]))
    corpus = Corpus(str(path))
    train, validation = (
        list(corpus.part("train", held_out=held_out)),
        list(corpus.part("validation", held_out=held_out)),
    )
    kept = [text for text in [*texts, "end"] if not text.isspace()]
    assert "".join("".join(train + validation).split()) == "".join("".join(kept).split())
    characters = sum(map(len, kept))
    assert sum(map(len, train)) <= characters * (1 - held_out)
    if len(kept) > 1:
        assert len(train) + len(validation) <= len(kept) + 1


def test_a_single_text_is_cut_at_a_line_break(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("".join(f"line {i:04d}\n" for i in range(1000)))
    corpus = Corpus(str(tmp_path / "book.txt"))
    (train,), (validation,) = corpus.part("train"), corpus.part("validation")
    assert train + validation == (tmp_path / "book.txt").read_text()
    assert validation.startswith("line 0950\n")
    (tmp_path / "line.txt").write_text("x" * 5000)
    corpus = Corpus(str(tmp_path / "line.txt"))
    assert [len(text) for part in ("train", "validation") for text in corpus.part(part)] == [4750, 250]
    assert list(corpus.part("validation", held_out=0.0)) == []
    with pytest.raises(ConfigError, match=r"held_out=1\.0"):
        corpus.part("train", held_out=1.0)
