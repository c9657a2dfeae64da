"""Questions by name, the report, and a ladder that is measured."""

import json
import runpy
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from loopwise.engine.ladder import EFFORTS
from loopwise.errors import ConfigError, InputError
from loopwise.loops.drivers import run_until
from loopwise.models.looped_lm import LoopedLM
from loopwise.study.ask import QUESTIONS, Answer, Studies, answer, ask
from loopwise.study.examples import Examples, head, of_pointer_chasing, of_task, of_text
from loopwise.study.ladder import Run, calibrate_ladder, choose
from loopwise.study.report import ASKED, page, report, training
from loopwise.study.subject import StudyConfig, Subject, open_data
from loopwise.tasks.corpus import Corpus
from loopwise.tasks.pointer_chasing import PointerChasing, PointerChasingConfig
from loopwise.tasks.problems import IGNORED

folder = Path(__file__).parent
tiny = runpy.run_path(str(folder.parent / "models" / "naive_lm.py"))["tiny"]
minds = runpy.run_path(str(folder / "minds.py"))
painter = runpy.run_path(str(folder / "test_states.py"))["Painter"]
HOPS = PointerChasingConfig(nodes=4, max_hops=2, questions=3)
CONFIG = StudyConfig(data="pointer-chasing", units=60, pointer_chasing=HOPS)


@pytest.fixture(scope="module")
def subject() -> Subject:
    model = tiny("ouro", vocab_size=22, trained_loops=(1, 3), max_positions=64)
    return Subject(model=model, name="tiny <b>", run=None)


def boards() -> Studies:
    config = StudyConfig(data="mazes", units=3)
    return Studies(Subject(model=painter(most=4), name="painter", run=None), config)


@pytest.mark.parametrize("question", [name for name in QUESTIONS if name != "grid"])
def test_every_question_answers_with_arrays_words_and_a_figure(question: str, subject: Subject) -> None:
    pytest.importorskip("plotly")
    found = ask(question, subject, CONFIG)
    assert found.lines
    assert all(line and "nan" not in line for line in found.lines)
    told = json.loads(json.dumps(found.data(), allow_nan=False))
    arrays = [value for result in told["results"].values() for value in result.values()]
    assert any(isinstance(value, dict) and {"axes", "values"} == set(value) for value in arrays)
    for figure in found.figures.values():
        layout = figure.to_dict()["layout"]
        assert layout["title"]["text"].startswith("<b>")
        axes = [value for key, value in layout.items() if key.startswith(("xaxis", "yaxis"))]
        titled = [axis for axis in axes if axis.get("title", {}).get("text")]
        assert len(titled) >= len(axes) - 1
        assert figure.to_dict()["data"]


def test_boards_are_drawn_frame_by_frame() -> None:
    pytest.importorskip("plotly")
    found = answer("grid", boards())
    figure = found.figures["grid"]
    assert len(figure.frames) == 4
    assert len(figure.data) == 3
    with pytest.raises(ConfigError, match="type grid"):
        answer("lens", boards())


def test_without_figures_plotly_is_not_needed(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "plotly.graph_objects", None)
    assert ask("depth", subject, CONFIG, draw=False).figures == {}
    with pytest.raises(ImportError, match=r"pip install 'loopwise\[study\]'"):
        ask("depth", subject, CONFIG)


def test_questions_that_do_not_suit_say_so(subject: Subject) -> None:
    with pytest.raises(ConfigError, match="did you mean exits"):
        ask("exit", subject, CONFIG)
    with pytest.raises(ConfigError, match="type lens"):
        ask("grid", subject, CONFIG)
    with pytest.raises(ConfigError, match="not for language models"):
        open_data(subject, StudyConfig(data="mazes"))
    with pytest.raises(ConfigError, match="no tokenizer"):
        open_data(subject, StudyConfig(data="python"))
    with pytest.raises(ConfigError, match="knows 22"):
        open_data(subject, StudyConfig(data="pointer-chasing", pointer_chasing=PointerChasingConfig(nodes=9)))
    with pytest.raises(InputError, match="rows 0 to"):
        ask("lens", subject, StudyConfig(**(vars(CONFIG) | {"number": 99})))


class Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def test_the_report_is_one_page_that_needs_nothing_else(subject: Subject) -> None:
    pytest.importorskip("plotly")
    answers = report(subject, CONFIG)
    assert [found.question for found in answers] == [name for name in QUESTIONS if name != "grid"]
    text = page(answers, title="tiny <b>")
    reader = Reader()
    reader.feed(text)
    boxes = {
        attributes["id"] for tag, attributes in reader.tags if tag == "div" and attributes.get("class") == "figure"
    }
    data = text.split('id="figures">')[1].split("</script>")[0]
    figures = json.loads(data)
    assert set(figures) == boxes
    assert len(boxes) == 9
    assert not [
        tag for tag, attributes in reader.tags if {"src", "href"} & set(attributes) and "#" not in str(attributes)
    ]
    assert "tiny &lt;b&gt;" in text
    assert "<title>tiny <b>" not in text
    assert text.count("plotly.js v") <= 2
    assert set(ASKED) == {"run", *QUESTIONS}
    with pytest.raises(InputError, match="at least one"):
        page([], title="")


def test_what_a_figure_says_cannot_end_the_script() -> None:
    go = pytest.importorskip("plotly.graph_objects")
    figure = go.Figure(layout={"title": {"text": "</script><script>alert(1)</script>"}})
    text = page([Answer(question="depth", results={}, lines=["<i>"], figures={"depth": figure})], title="t")
    data = text.split('id="figures">')[1].split("</script>")[0]
    assert json.loads(data)["figure-depth-depth"]["layout"]["title"]["text"].startswith("</script>")
    assert "<li>&lt;i&gt;</li>" in text


def test_training_is_read_from_the_run(tmp_path: Path) -> None:
    pytest.importorskip("plotly")
    rows = [
        {"step": 10, "loss_total": 3.0},
        {"step": 20, "loss_total": 2.0},
        {"step": 20, "validation_loss_loop_2": 2.5},
    ]
    torn = '{"step": 30, "loss_to'  # the run is still going on
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n" + torn)
    found = training(tmp_path)
    assert found.lines == [
        "20 steps",
        "training loss 3.000 at first, 2.000 at the end",
        "validation loss 2.500 at 2 loops",
    ]
    gated = [
        {"step": 10, "loss_total": 3.0, "loss_loop_1": 3.5, "loss_loop_2": 3.25},
        {"step": 20, "loss_total": 0.5, "loss_loop_1": 2.5, "loss_loop_2": 2.25},
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, gated)) + "\n")
    assert training(tmp_path).lines == ["20 steps", "training loss at 2 loops 3.250 at first, 2.250 at the end"]
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ConfigError, match="no steps yet"):
        training(tmp_path)


def text_examples(model: LoopedLM) -> list[Examples]:
    drawn = torch.randint(model.config.vocab_size, (6, 13), generator=torch.Generator().manual_seed(0))
    return [Examples(inputs=drawn[:, :-1], targets=drawn[:, 1:])]


def test_a_measured_ladder_is_what_running_its_rungs_gives() -> None:
    model = tiny("ouro", seed=3, trained_loops=(1, 4))
    data = text_examples(model)
    ladder = calibrate_ladder(model, data, rounds=1)
    assert ladder.measured
    assert [rung.effort for rung in ladder.rungs] == list(EFFORTS)
    losses = []
    for rung in ladder.rungs:
        outcome = run_until(
            model, model.encode(data[0].inputs), rung.exit or f"fixed:{rung.max_loops}", max_loops=rung.max_loops
        )
        assert rung.mean_loops == pytest.approx(float(outcome.loops.double().mean()))
        loss = torch.nn.functional.cross_entropy(outcome.prediction.flatten(0, 1), data[0].targets.flatten())
        assert rung.loss == pytest.approx(float(loss), rel=1e-5)
        assert rung.seconds_per_token is not None
        assert rung.seconds_per_token > 0
        losses.append(rung.loss)
    assert losses == sorted(losses, reverse=True)


@pytest.mark.parametrize(
    ("losses", "seconds", "expected"),
    [
        ([3.0, 2.5, 2.0], [1.0, 2.0, 3.0], [0, 1, 2]),
        ([3.0, 3.1, 2.0], [1.0, 2.0, 3.0], [0, 0, 2]),  # more loops that cost quality
        ([3.0, 2.5, 2.0], [1.0, 3.0, 3.0], [0, 2, 2]),  # fewer loops that save no time
        ([3.0, 2.5, 2.0], [2.95, 2.94, 3.0], [2, 2, 2]),
        ([3.0, 2.5, 2.6], [1.0, 2.0, 1.5], [0, 1, 1]),
        ([3.0, 2.5, 2.0], [None, None, None], [0, 1, 2]),
    ],
)
def test_more_effort_never_costs_quality_and_less_never_time(
    losses: list[float], seconds: list[float | None], expected: list[int]
) -> None:
    settings: list[tuple[int, str | None]] = [(1, None), (4, "hazard:0.5"), (4, None)]
    runs = {
        setting: Run(loss=loss, accuracy=0.5, mean_loops=place + 1.0, seconds=took)
        for place, (setting, loss, took) in enumerate(zip(settings, losses, seconds, strict=True))
    }
    assert choose(settings[::-1], runs) == [settings[place] for place in expected]


def test_a_ladder_of_one_depth_is_one_rung() -> None:
    model = tiny("huginn", trained_loops=(3, 3))
    ladder = calibrate_ladder(model, text_examples(model), rounds=1)
    assert {rung.settings for rung in ladder.rungs} == {(3, None)}
    with pytest.raises(ConfigError, match="rounds=0"):
        calibrate_ladder(model, text_examples(model), rounds=0)


def test_where_prompts_run_every_loop_the_ladder_is_replayed() -> None:
    model = tiny("ouro", vocab_size=22, trained_loops=(1, 3), seed=1)
    data = of_pointer_chasing(PointerChasing(HOPS), seed=0, units=60)
    ladder = calibrate_ladder(model, data)
    assert all(rung.seconds_per_token is None for rung in ladder.rungs)
    asked = data[0].targets != IGNORED
    with torch.no_grad():
        full = model(data[0].inputs, loops=1).logits[asked]
    expected = torch.nn.functional.cross_entropy(full, data[0].targets[asked])
    assert ladder.rung("none").loss == pytest.approx(float(expected))


def test_pointer_chasing_asks_where_questions_end() -> None:
    task = PointerChasing(HOPS)
    data = of_pointer_chasing(task, seed=0, units=60)
    row = data[0].inputs[5].tolist()
    places = (data[0].targets[5] != IGNORED).nonzero()[:, 0].tolist()
    assert len(places) == 3
    assert [task.solve(row[: place + 1]) for place in places] == data[0].targets[5][places].tolist()


def test_text_rows_follow_each_other_within_a_document(tmp_path: Path) -> None:
    from loopwise.hub.tokenizer import Tokenizer

    (tmp_path / "a.txt").write_text("\n".join(f"line {index} of the text" for index in range(400)))
    tokenizer = Tokenizer.bytes()
    data = of_text(Corpus(str(tmp_path)), tokenizer, units=64, length=16)
    assert sum(len(each) for each in data) == 4
    rows, targets = data[0].inputs, data[0].targets
    assert torch.equal(rows[:, 1:], targets[:, :-1])
    assert torch.equal(rows[1:, 0], targets[:-1, -1])
    with pytest.raises(InputError, match="fewer units"):
        of_text(Corpus(str(tmp_path)), tokenizer, units=10**6, length=16)


def test_the_head_of_a_batch_is_verified_as_before() -> None:
    task = minds["Numbers"](most=4, places=2)
    whole = of_task(task, seed=1, count=9)[0]
    cut = head(whole, 4)
    assert len(cut) == 4
    answers = whole.targets[:4].clone()
    answers[2] = 0
    assert cut.verify is not None
    assert cut.verify(answers).tolist() == [True, True, False, True]
    assert head(whole, 20) is whole


def test_settings_that_make_no_sense_are_refused() -> None:
    for wrong in ({"units": 0}, {"length": 0}, {"loops": 0}, {"number": -1}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            StudyConfig(**wrong)
