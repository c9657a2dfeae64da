"""key=value words and files over dataclasses: values, types, and what a mistake is answered with."""

import contextlib
import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loopwise.configuration import build, describe, from_dict, to_dict
from loopwise.errors import ConfigError, NotFoundError


@dataclass(frozen=True, kw_only=True)
class Stage:
    loops: int
    rate: float = 1e-3

    def __post_init__(self) -> None:
        if self.loops < 1:
            raise ConfigError(f"loops={self.loops}: one or more")


@dataclass(frozen=True, kw_only=True)
class Run:
    name: str = "run"
    loops: int = 4
    rate: float = 0.5
    flag: bool = False
    kind: Literal["last", "all", 3] = "last"
    seed: int | None = None
    note: str | None = None
    folder: Path = Path("runs")
    span: tuple[int, int] = (1, 4)
    widths: tuple[int, ...] = ()
    marks: list[float] = field(default_factory=list)
    weights: dict[str, float] = field(default_factory=dict)
    amount: int | float | str = 1
    stage: Stage = field(default_factory=lambda: Stage(loops=2, rate=0.25))
    last: Stage | None = None
    stages: tuple[Stage, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Needy:
    path: str
    stage: Stage


@pytest.mark.parametrize(
    ("word", "name", "value"),
    [
        ("name=x=y", "name", "x=y"),
        ("name=12", "name", "12"),
        ("name=true", "name", "true"),
        ('name="q"', "name", '"q"'),
        ("name=", "name", ""),
        ("loops=8", "loops", 8),
        ("loops=1_000", "loops", 1000),
        ("rate=3e-4", "rate", 3e-4),
        ("rate=.5", "rate", 0.5),
        ("rate=2", "rate", 2.0),
        ("flag=true", "flag", True),
        ("flag=False", "flag", False),
        ("kind=all", "kind", "all"),
        ("kind=3", "kind", 3),
        ("seed=7", "seed", 7),
        ("seed=none", "seed", None),
        ("seed=null", "seed", None),
        ("note=none", "note", None),
        ("note=12", "note", "12"),
        ("folder=a/b", "folder", Path("a/b")),
        ("span=[2,8]", "span", (2, 8)),
        ("widths=[1,2,3]", "widths", (1, 2, 3)),
        ("marks=[1,2.5]", "marks", [1.0, 2.5]),
        ('weights={"a": 1}', "weights", {"a": 1.0}),
        ("amount=3", "amount", 3),
        ("amount=3.5", "amount", 3.5),
        ("amount=many", "amount", "many"),
        ("stage.loops=5", "stage", Stage(loops=5, rate=0.25)),
        ('stage={"loops": 5}', "stage", Stage(loops=5, rate=0.25)),
        ("last.loops=5", "last", Stage(loops=5)),
        ('stages=[{"loops": 1}, {"loops": 2, "rate": 1}]', "stages", (Stage(loops=1), Stage(loops=2, rate=1.0))),
    ],
)
def test_a_word_sets_its_field_alone(word: str, name: str, value: Any) -> None:
    run = build(Run, None, [word])
    assert getattr(run, name) == value
    assert type(getattr(run, name)) is type(value)
    assert dataclasses.replace(run, **{name: getattr(Run(), name)}) == Run()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["lops=3"], "unknown key lops; did you mean loops; allowed: name, loops, rate"),
        (["zzz=3"], "unknown key zzz; allowed: name, loops"),
        (["stage.lops=3"], "unknown key stage.lops; did you mean stage.loops; allowed: loops, rate"),
        (["stge.loops=3"], "unknown key stge; did you mean stage; allowed: name"),
        (["loops.x=3"], "loops has no keys of its own; type: loops=VALUE"),
        (["loops"], "'loops' gives no value; type: key=value; allowed keys: name, loops"),
        (["=3"], "'=3' gives no value"),
        (["loops=four"], 'loops: expected integer, got "four"; for example loops=4'),
        (["loops=4.0"], "loops: expected integer, got 4.0"),
        (["loops=true"], "loops: expected integer, got true"),
        (["rate=inf"], "rate: expected number, got Infinity"),
        (["flag=1"], "flag: expected true or false, got 1"),
        (["kind=first"], 'kind: expected "last" or "all" or 3, got "first"'),
        (["seed=x"], 'seed: expected integer or none, got "x"'),
        (["span=[1]"], "span: expected [integer, integer], got [1]; for example span=[1, 4]"),
        (["span=3"], "span: expected [integer, integer], got 3"),
        (['widths=[1,"a"]'], 'widths[1]: expected integer, got "a"'),
        (['weights={"a": "b"}'], 'weights.a: expected number, got "b"'),
        (["stage=3"], "stage: expected an object of keys and values, got 3"),
        (["stage.loops=0"], "loops=0: one or more"),
        (['stages=[{"loops": 1}, {"lops": 2}]'], "unknown key stages[1].lops; did you mean stages[1].loops"),
        (["stages=[{}]"], "missing stages[0].loops; type: stages[0].loops=VALUE (integer)"),
        (["last.rate=1"], "missing last.loops; type: last.loops=VALUE (integer)"),
        (["loops=1", "loops=2"], "loops would overwrite loops, given before it"),
        (["stage.loops=1", 'stage={"loops": 2}'], "stage would overwrite stage.loops, given before it"),
    ],
)
def test_a_mistake_is_one_line(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build(Run, None, words)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_a_missing_key_is_named() -> None:
    with pytest.raises(ConfigError, match=r"^missing path; type: path=VALUE \(text\)$"):
        build(Needy, None, [])
    assert build(Needy, None, ["path=x", "stage.loops=1"]) == Needy(path="x", stage=Stage(loops=1))


def test_files_then_words_then_defaults(tmp_path: Path) -> None:
    json_file, toml_file = tmp_path / "a.json", tmp_path / "a.toml"
    json_file.write_text('{"loops": 8, "last": null, "stage": {"rate": 1}}')
    toml_file.write_text("loops = 8\n[stage]\nrate = 1\n")
    wanted = Run(loops=8, stage=Stage(loops=3, rate=1.0), last=Stage(loops=9))
    for file in (json_file, toml_file):
        assert build(Run, file, ["stage.loops=3", "last.loops=9"]) == wanted


def test_a_base_gives_what_nobody_names() -> None:
    base = Run(name="preset", stage=Stage(loops=7, rate=0.5), last=Stage(loops=6, rate=0.75))
    run = build(Run, None, ["stage.rate=1", "last.loops=1"], base=base)
    assert run == dataclasses.replace(base, stage=Stage(loops=7, rate=1.0), last=Stage(loops=1, rate=0.75))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.yaml", "loops: 1", "a.yaml is neither JSON nor TOML; allowed endings: .json, .toml"),
        ("a.json", "{", "a.json cannot be read as JSON: "),
        ("a.toml", "loops =", "a.toml cannot be read as TOML: "),
        ("a.json", "[1]", "a.json holds a list; it should hold an object"),
        ("a.json", '{"loops": 1, "loops": 2}', "a key is given twice among loops, loops"),
        ("a.json", '{"rate": NaN}', "NaN is not a number that JSON has"),
        ("a.json", '{"lops": 1}', "unknown key lops; did you mean loops"),
        ("a.json", '{"loops": "4"}', 'loops: expected integer, got "4"; for example loops=4'),
    ],
)
def test_a_bad_file_is_one_line(name: str, text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError) as caught:
        build(Run, tmp_path / name, [])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_a_part_that_is_no_object(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="there is no file"):
        build(Run, tmp_path / "a.json", [])
    (tmp_path / "b.json").write_text('{"stage": 3}')
    with pytest.raises(ConfigError, match="stage: expected Stage, got 3"):
        build(Run, tmp_path / "b.json", ["stage.loops=1"])
    (tmp_path / "c.json").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="cannot be read as JSON"):
        build(Run, tmp_path / "c.json", [])


def test_describe() -> None:
    assert describe(tuple[int, ...] | None) == "a list of integer or none"
    assert describe(dict[str, list[bool]]) == "an object of a list of true or false"


finite = st.floats(allow_nan=False, allow_infinity=False)
stages = st.builds(Stage, loops=st.integers(1), rate=finite)
runs = st.builds(
    Run,
    name=st.text(),
    loops=st.integers(),
    rate=finite,
    flag=st.booleans(),
    kind=st.sampled_from(["last", "all", 3]),
    seed=st.none() | st.integers(),
    note=st.none() | st.text(),
    folder=st.sampled_from([Path("a"), Path("/b/c d")]),
    span=st.tuples(st.integers(), st.integers()),
    widths=st.lists(st.integers()).map(tuple),
    marks=st.lists(finite),
    weights=st.dictionaries(st.text(), finite),
    amount=st.integers() | finite | st.text(),
    stage=stages,
    last=st.none() | stages,
    stages=st.none() | st.lists(stages).map(tuple),
)


def same(one: Any, other: Any) -> bool:
    """Equal, with equal types all the way down (1 == 1.0 == True would hide a wrong one)."""
    return repr(one) == repr(other)


@settings(max_examples=settings().max_examples * 2 // 5)
@given(runs)
def test_a_config_survives_json(run: Run) -> None:
    assert same(from_dict(Run, json.loads(json.dumps(to_dict(run)))), run)


@settings(max_examples=settings().max_examples * 2 // 5)
@given(runs)
def test_a_config_survives_being_typed(run: Run) -> None:
    """Every field written as a word builds the same config; text needs no quotes unless it reads as something else."""
    words = []
    for name, value in to_dict(run).items():
        word = value if isinstance(value, str) else json.dumps(value)
        if isinstance(getattr(run, name), str) and name in ("note", "amount"):
            word = f"~{word}"
            run = dataclasses.replace(run, **{name: word})
        words.append(f"{name}={word}")
    assert same(build(Run, None, words), run)


names = st.sampled_from([field.name for field in dataclasses.fields(Run)]) | st.text()


@settings(max_examples=settings().max_examples * 2 // 5)
@given(st.dictionaries(names, st.recursive(st.none() | st.booleans() | st.text() | finite, st.lists)))
def test_from_dict_fails_with_a_config_error_or_not_at_all(data: dict[str, Any]) -> None:
    with contextlib.suppress(ConfigError):
        from_dict(Run, data)
