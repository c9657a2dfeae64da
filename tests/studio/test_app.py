"""The studio's server: what is shown is what the engine said, and only its own page may ask."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from starlette.testclient import TestClient

from loopwise.engine.record import record_trace
from loopwise.engine.reference import generate
from loopwise.engine.sampling import Sampling
from loopwise.errors import ConfigError, InputError, NotFoundError
from loopwise.hub.checkpoints import load
from loopwise.studio import app as studio_app
from loopwise.studio.app import build_studio
from loopwise.studio.library import KEPT, Library, Shown, measure_costs, parse_sampling
from loopwise.studio.paths import state_paths
from loopwise.studio.run_view import run_view
from loopwise.studio.wire import wire
from loopwise.trace import LoopTrace

SETTINGS = {"max_tokens": 12, "temperature": 0.7, "seed": 3, "exit": "hazard:0.5"}


@pytest.fixture(scope="module")
def library():
    opened = Library(["shipped"])
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def client(library):
    with TestClient(build_studio(library), base_url="http://127.0.0.1:8517") as client:
        yield client


def events(response):
    return [json.loads(part[6:]) for part in response.text.split("\n\n") if part]


@pytest.fixture(scope="module")
def told(client):
    return events(client.post("/api/generate", json={"model": "shipped", "prompt": "def a", "settings": SETTINGS}))


def test_an_answer_is_the_generators(told):
    model = load("shipped", dtype="float32")
    alone = generate(model, ["def a"], Sampling(**SETTINGS), policy="last_exited")[0]
    certain = [each["token"] for each in told if "token" in each and not each["token"]["provisional"]]
    assert [each["id"] for each in certain] == list(alone.tokens)
    assert [each["loops"] for each in certain] == list(alone.loops)
    assert [each["index"] for each in certain] == list(range(len(certain)))
    assert all(len(each["signals"]) == each["loops"] for each in certain)
    assert "".join(told[0]["given"]) == "def a"
    assert told[-1]["finish_reason"] == "length"


def test_its_trace_is_shown(client, told):
    shown = client.get(f"/api/traces/{told[-1]['done']}").json()
    loops = [each["token"]["loops"] for each in told if "token" in each and not each["token"]["provisional"]]
    given = len(told[0]["given"])
    assert shown["loops"][given:] == loops
    assert shown["loops"][:given] == [0] * given
    assert len(shown["texts"]) == len(shown["kl"]) == len(shown["paths"]["steps"]) == given + len(loops)
    assert len(shown["costs"]["flops"]) == len(shown["depths"]) == shown["max"]
    assert shown["lens"] == "logit lens"
    page = client.get(f"/api/traces/{shown['key']}/page")
    assert page.headers["content-disposition"].startswith("attachment")
    assert "<!doctype html>" in page.text


def test_a_text_can_be_read(client):
    key = client.post("/api/read", json={"model": "shipped", "text": "import os\n", "settings": {"exit": "hazard:0.5"}})
    shown = client.get(f"/api/traces/{key.json()['key']}").json()
    assert "".join(shown["texts"]) == "import os\n"
    assert shown["loops"][0] == 0
    assert all(shown["loops"][1:])


def test_the_library_lists_models_with_their_ladder(client):
    (facts,) = client.get("/api/library").json()["models"]
    assert (facts["name"], facts["loops"], facts["signal"]) == ("shipped", 4, "hazard")
    assert facts["ladder"]["rungs"][0]["effort"] == "none"


@pytest.mark.parametrize("name", ["index.html", "studio.js", "views.js", "strip.js", "studio.css", "strip.css"])
def test_the_page_asks_no_other_server(client, name):
    text = client.get("/" if name == "index.html" else f"/web/{name}").text
    assert "http://" not in text
    assert "https://" not in text
    assert "innerHTML" not in text


def test_plotly_comes_from_its_own_wheel(client):
    assert "plotly.js v" in client.get("/web/plotly.min.js").text[:400]


@pytest.mark.parametrize("name", ["..%2Fapp.py", "app.py", "missing.js", "%2e%2e"])
def test_other_files_stay_where_they_are(client, name):
    assert client.get(f"/web/{name}").status_code == 404


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"host": "evil.example"}, 421),
        ({"host": "evil.example:8517"}, 421),
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": "http://127.0.0.1:8517"}, 200),
        ({"content-type": "text/plain"}, 415),
    ],
)
def test_only_its_own_page_may_ask(client, headers, status):
    body = json.dumps({"model": "shipped", "text": "a b", "settings": {}})
    answer = client.post("/api/read", content=body, headers={"content-type": "application/json"} | headers)
    assert answer.status_code == status


@pytest.mark.parametrize(
    ("path", "body", "said"),
    [
        ("/api/generate", {"prompt": "a"}, "model is missing"),
        ("/api/generate", {"model": "shipped"}, "prompt is missing"),
        ("/api/generate", {"model": "other", "prompt": "a"}, "open are: shipped"),
        ("/api/generate", {"model": "shipped", "prompt": "a", "settings": {"colour": 1}}, "no such setting"),
        ("/api/generate", {"model": "shipped", "prompt": "a", "settings": {"max_tokens": "9"}}, "max_tokens='9'"),
        ("/api/generate", {"model": "shipped", "prompt": "a", "settings": {"max_loops": 9}}, "at most 4 loops"),
        ("/api/generate", {"model": "shipped", "prompt": "a", "settings": {"effort": "huge"}}, "effort='huge'"),
        ("/api/generate", {"model": "shipped", "prompt": "a", "settings": {"exit": "hazzard:1"}}, "hazard"),
        ("/api/generate", {"model": "shipped", "prompt": "a", "settings": []}, "settings is an object"),
        ("/api/generate", [], "not a JSON object"),
        ("/api/read", {"model": "shipped", "text": "a"}, "one token"),
    ],
)
def test_a_mistake_is_answered_in_one_line(client, path, body, said):
    answer = client.post(path, json=body)
    assert answer.status_code in (400, 404)
    assert said in answer.json()["error"]
    assert "\n" not in answer.json()["error"]


def test_a_huge_request_is_refused(client, monkeypatch):
    monkeypatch.setattr(studio_app, "MOST_BYTES", 1000)
    answer = client.post("/api/read", json={"model": "shipped", "text": "a" * 2000, "settings": {}})
    assert answer.status_code == 400
    assert "larger than 1000 bytes" in answer.json()["error"]


def test_what_is_not_json_is_refused(client):
    answer = client.post("/api/read", content="{" * 10, headers={"content-type": "application/json"})
    assert answer.status_code == 400


def test_effort_is_the_ladders(library):
    opened = library.model("shipped")
    assert parse_sampling({"effort": "none"}, opened).max_loops == 1
    assert parse_sampling({"effort": "max"}, opened).max_loops == 4
    with pytest.raises(ConfigError, match="either it or them"):
        parse_sampling({"effort": "low", "exit": "hazard:0.5"}, opened)


def test_costs_grow_with_depth():
    model = load("shipped", dtype="float32")
    costs = measure_costs(model, list(range(20)), loops=4, start=None, policy="last_exited")
    for name in ("flops", "kv_bytes", "seconds"):
        assert costs[name] == sorted(costs[name])
        assert len(set(costs[name])) == 4


def test_the_oldest_trace_leaves_first():
    library = Library(["shipped"])
    trace = record_trace(load("shipped", dtype="float32"), [1, 2, 3])
    keys = [library.keep(Shown(trace=trace)) for _ in range(KEPT + 2)]
    assert [each["key"] for each in library.traces()] == keys[2:]
    with pytest.raises(NotFoundError, match="not open any more"):
        library.shown(keys[0])


def test_files_are_told_apart(tmp_path):
    trace = record_trace(load("shipped", dtype="float32"), [1, 2, 3], title="three")
    grid = tmp_path / "maze.json"
    grid.write_text('{"title": "a maze", "problems": []}')
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"step": 1, "loss_loop_1": 2.0}\n')
    library = Library([str(trace.save(tmp_path / "one.safetensors")), str(grid), str(run)])
    assert [each["title"] for each in library.traces()] == ["three"]
    assert library.grid("maze.json")["title"] == "a maze"
    assert [*library.runs] == ["run"]
    assert not library.models
    with pytest.raises(NotFoundError, match="no such file or folder"):
        Library([str(tmp_path / "nothing")])
    grid.write_text("[")
    with pytest.raises(InputError, match="not a grid file"):
        library.grid("maze.json")


def test_a_run_is_drawn_while_it_goes_on(tmp_path):
    lines = [
        {"step": 5, "stage": "stage I", "loss_loop_1": 3.0, "loss_loop_2": 2.5, "timing": {"tokens_per_second": 10.0}},
        {"step": 10, "stage": "stage I", "loss_loop_1": 2.0, "loss_loop_2": 1.5},
        {"step": 10, "validation_loss_loop_1": 2.2, "validation_exit_loop": 1.5},
    ]
    torn = "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 15, "loss'
    (tmp_path / "metrics.jsonl").write_text(torn)
    view = run_view(tmp_path)
    panels = {panel["title"]: panel["lines"] for panel in view["panels"]}
    assert (view["steps"], view["stages"]) == (10, ["stage I"])
    assert panels["Training loss by loop"][1] == {"name": "loop 2", "x": [5, 10], "y": [2.5, 1.5]}
    assert panels["Speed"] == [{"name": "tokens per second", "x": [5], "y": [10.0]}]
    assert panels["Mean exit loop"][0]["y"] == [1.5]


def test_paths_keep_distances_where_three_components_are_all():
    """States on a circle in a plane of a wide space: the projection must be the circle, and every angle the same."""
    turn, radius, centre = 2 * math.pi / 12, 2.0, np.full(8, 5.0)
    plane = np.linalg.qr(np.random.default_rng(0).normal(size=(8, 2)))[0].T
    angles = turn * np.arange(12)
    circle = centre + radius * (np.cos(angles)[:, None] * plane[0] + np.sin(angles)[:, None] * plane[1])
    trace = record_trace(load("shipped", dtype="float32"), [1, 2, 3], max_loops=4, keep_states=True)
    states = np.full((3, 4, 8), np.nan)
    states[1:] = circle[:8].reshape(2, 4, 8)
    paths = state_paths(replace(trace, states=states))
    found = np.array(paths["xyz"][1:], dtype=float).reshape(8, 3)
    apart = np.linalg.norm(found[:, None] - found[None], axis=-1)
    np.testing.assert_allclose(apart, np.linalg.norm(circle[:8, None] - circle[None, :8], axis=-1), atol=2e-3)
    assert sum(paths["explained"][:2]) == pytest.approx(1, abs=1e-3)
    assert paths["xyz"][0] == [[None] * 3] * 4
    assert paths["angles"][1] == [None, None, pytest.approx(30, abs=0.1), pytest.approx(30, abs=0.1)]
    step = 2 * radius * math.sin(turn / 2) / np.linalg.norm(circle[1])
    assert paths["steps"][1][:2] == [None, pytest.approx(step, rel=1e-3)]


def test_a_large_trace_is_small_on_the_wire():
    tokens, loops, candidates = 512, 32, 5
    noise = np.random.default_rng(0)
    trace = LoopTrace(
        model="large",
        rule="hazard:0.6",
        policy="last_exited",
        max_loops=loops,
        tokens=noise.integers(0, 49152, tokens),
        texts=["token"] * tokens,
        loops=noise.integers(1, loops + 1, tokens),
        signal_kind="hazard",
        signals=noise.random((tokens, loops)) / 10,
        top_ids=noise.integers(0, 3000, (tokens, loops, candidates)),
        top_probs=noise.random((tokens, loops, candidates)),
        vocabulary={token: f"word{token}" for token in range(3000)},
        losses=noise.random((tokens, loops)) * 5,
        entropy=noise.random((tokens, loops)) * 5,
        kl=noise.random((tokens, loops)),
        states=noise.random((tokens, loops, 16)).astype(np.float16),
    )
    whole = json.dumps(wire(trace) | {"paths": state_paths(trace)}, separators=(",", ":"))
    assert len(whole) < 3_000_000


def test_weights_stay_as_they_were(library):
    """Recording runs beside the engine and changes nothing."""
    model = library.model("shipped").model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    library.record_text("shipped", "x = 1\n", Sampling())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
