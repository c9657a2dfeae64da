"""Launches as CUDA graphs, on a CPU that repeats noted operations (`recorded.py`); float64."""

import runpy
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from loopwise.engine import graphs, still
from loopwise.engine.answer import Completion
from loopwise.engine.engine import Engine
from loopwise.engine.graphs import CudaCapture, GraphedRows
from loopwise.engine.reference import generate
from loopwise.engine.runner import Runner
from loopwise.engine.sampling import Sampling
from loopwise.engine.seats import Seats
from loopwise.models.looped_lm import LoopedLM
from loopwise.nn.kernels import masked_attention

here = Path(__file__)
matrix: dict[str, Any] = runpy.run_path(str(here.with_name("test_engine_matrix.py")))
tiny: Callable[..., LoopedLM] = matrix["tiny"]
Recorder: Any = runpy.run_path(str(here.with_name("recorded.py")))["Recorder"]
PROMPTS = [[1, 2, 3, 4, 5], [7, 6], [9]]


class Graphed:
    """An engine whose launches are noted and repeated."""

    def __init__(self, model: LoopedLM, policy: str = "per_loop", **options: Any) -> None:
        self.engine = Engine(model, policy, **({"memory": "4MiB"} | options))
        self.runner: Runner = self.engine._core.runner
        memory = self.runner.memory
        for pool in (memory.core, memory.boundary):
            for table in () if pool is None else (*pool.keys.values(), *pool.values.values()):
                table.fill_(torch.nan)  # what nobody has written must not be read
        self.recorders: list[Any] = []
        # The model's own modules: those of its fast twin call kernels that cannot be noted.
        self.rows = self.runner._few = GraphedRows(model, memory, self.runner.seats, self.record)

    def record(self) -> Any:
        self.recorders.append(Recorder())
        return self.recorders[-1]

    def replays(self) -> int:
        return sum(graph.replays for recorder in self.recorders for graph in recorder.graphs)


def check_cell(
    name: str, rule: str | None, policy: str, *, sampled: bool, ways: Sequence[str], rounds: int = 2
) -> None:
    model = tiny(name)
    mine, prompts = matrix["settings"](rule, sampled=sampled), matrix["prompts"](model)
    wanted = matrix["reference"](model, mine, policy)
    for way in ways:
        options = {"max_loops": matrix["LOOPS"]} | matrix["WAYS"][way]
        if "memory" in options:
            options["memory"] = matrix["few_pages"](model)
        graphed = Graphed(model, policy, **options)
        for _ in range(rounds):  # a second time prefixes are found
            matrix["check_same"](graphed.engine.generate(prompts, mine), wanted)
        graphed.engine.check_idle()
        assert graphed.replays() > 50


@pytest.mark.parametrize(
    ("name", "rule", "policy"),
    [
        ("ouro", "hazard:0.7", "per_loop"),
        ("ouro", "hazard:0.7", "last_exited"),
        ("huginn", "delta:0.8", "last_exited"),
        ("retrofitted-llama", None, "per_loop"),
        ("coda", "hazard:0.9", "last_exited"),
    ],
)
def test_answers_are_those_of_the_readable_generator(name: str, rule: str | None, policy: str) -> None:
    """With drafts, chunks, prefixes and stepping aside; launches of 1 to 5 rows, so that some are padded."""
    check_cell(name, rule, policy, sampled=policy == "last_exited", ways=["everything"], rounds=1 + (name == "ouro"))


@pytest.mark.slow
@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
@pytest.mark.parametrize("policy", matrix["POLICIES"])
@pytest.mark.parametrize(("name", "rule"), matrix["WHOLE"])
def test_the_whole_matrix(name: str, rule: str | None, policy: str, sampled: bool) -> None:
    check_cell(name, rule, policy, sampled=sampled, ways=list(matrix["WAYS"]))


def agree(found: Sequence[Completion], wanted: Sequence[Completion]) -> None:
    matrix["check_same"](found, wanted)
    for mine, theirs in zip(found, wanted, strict=True):
        for hazards, others in zip(mine.signals, theirs.signals, strict=True):
            assert hazards == pytest.approx(others, abs=1e-10)


@pytest.mark.parametrize("shape", ["ouro", "universal", "zeros", "retrofitted-olmo"])
def test_tokens_are_chosen_in_a_graph_too(shape: str) -> None:
    """At temperatures, 0 among them, and from start states of every request its own; hazards are read as well."""
    model = tiny(shape)
    settings = [
        Sampling(
            max_tokens=9,
            temperature=heat,
            seed=seed,
            exit="hazard:0.6" if model.config.gate else None,
            start=5 if heat == 2.0 and model.facts.random_start else None,
        )
        for seed, heat in enumerate([0.0, 0.8, 2.0])
    ]
    told = model.facts.signal is not None
    wanted = Engine(model, memory="1MiB").generate(PROMPTS, settings, signals=told)
    graphed = Graphed(model, speculate="off")
    agree(graphed.engine.generate(PROMPTS, settings, signals=told), wanted)
    agree([graphed.engine.generate([PROMPTS[0]], settings[0], signals=told)[0]], wanted[:1])
    kinds = {kind for kind, _ in graphed.rows._replays}
    assert kinds == {"begin", "loop", "read", "say", "draw"}
    assert {rows for kind, rows in graphed.rows._replays if kind == "loop"} >= {1, 4}


def test_too_much_noise_is_drawn_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    model, settings = tiny("ouro"), Sampling(max_tokens=5, temperature=1.0)
    wanted = [generate(model, [prompt], settings)[0] for prompt in PROMPTS]
    monkeypatch.setattr(graphs, "NOISE", 50)
    graphed = Graphed(model)
    matrix["check_same"](graphed.engine.generate(PROMPTS, settings), wanted)
    assert ("draw", 4) not in graphed.rows._replays


def test_more_rows_than_a_graph_takes_are_left_to_the_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of them that answer may be few enough."""
    model = tiny("coda")
    settings = [Sampling(max_tokens=4, ignore_eos=True, max_loops=loops) for loops in (1, 2, 3)]
    wanted = [generate(model, [prompt], mine)[0] for prompt, mine in zip(PROMPTS, settings, strict=True)]
    monkeypatch.setattr(graphs, "MOST", 2)
    graphed = Graphed(model, speculate="off")
    tickets = [graphed.engine.submit(*job) for job in zip(PROMPTS, settings, strict=True)]
    while not all(ticket._request.flight for ticket in tickets):
        assert graphed.engine.tick()
    assert "loop" not in {kind for kind, _ in graphed.rows._replays}
    matrix["check_same"]([ticket.wait() for ticket in tickets], wanted)
    assert {("read", 1), ("say", 1)} <= set(graphed.rows._replays)
    assert all(rows <= 2 for _, rows in graphed.rows._replays)


@pytest.mark.parametrize("shape", ["ouro", "huginn"])
def test_a_launch_touches_its_own_rows_alone(shape: str) -> None:
    graphed = Graphed(tiny(shape), speculate="off")
    runner, core = graphed.runner, graphed.engine._core
    tickets = [graphed.engine.submit(prompt, Sampling(max_tokens=9, ignore_eos=True)) for prompt in PROMPTS]
    while not all(ticket._request.flight for ticket in tickets):
        assert graphed.engine.tick()
    memory, seats = runner.memory, runner.seats
    tables = [*memory.core.keys.values(), *memory.core.values.values()]
    with torch.inference_mode():
        runner.launch(core.scheduler.plan(lambda rows: 0).rows, [])  # captures, and begins rows
        states, pools = seats.state.clone(), [table.clone() for table in tables]
        plan = core.scheduler.plan(lambda rows: 0)
        runner.launch(plan.rows, [])
    assert len(plan.rows) == 3
    mine = {row.seat for _, row in plan.rows}
    changed = (states != seats.state).any(1).nonzero()[:, 0].tolist()
    assert mine <= set(changed) <= mine | {0}
    slots = {
        int(memory.tables[request.pages.seat, row.loop, row.position]) for request, row in plan.rows if request.pages
    }
    for table, old in zip(tables, pools, strict=True):
        same = torch.isclose(table, old, rtol=0, atol=0, equal_nan=True).flatten(1).all(1)
        assert slots <= set((~same).nonzero()[:, 0].tolist()) <= slots | {memory.core.nowhere}


def test_what_is_moved_is_captured_anew() -> None:
    """Tables and seats that had to grow, and weights that lie elsewhere."""
    model, other = (tiny("zeros", max_positions=400, loops=1, seed=seed) for seed in (0, 1))
    long = Sampling(max_tokens=260, temperature=1.0, ignore_eos=True)
    graphed = Graphed(model, speculate="off", prefix_cache=False, seats=40)
    agree(graphed.engine.generate(PROMPTS[:1], long), generate(model, PROMPTS[:1], long))
    assert len(graphed.recorders) == 2  # for longer tables
    many, short = [[token] for token in range(20)], Sampling(max_tokens=3)
    wanted = [generate(model, [prompt], short)[0] for prompt in many]
    agree(graphed.engine.generate(many, short), wanted)
    assert len(graphed.recorders) == 3
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        mine.data = theirs.data.clone()
    agree(graphed.engine.generate(PROMPTS[:1], short), generate(other, PROMPTS[:1], short))
    assert len(graphed.recorders) == 4
    model.float()
    with pytest.raises(RuntimeError, match="changed their type"):
        graphed.engine.generate(PROMPTS, short)


@pytest.mark.parametrize("shape", ["ouro", "huginn"])
def test_all_that_graphs_use_is_held(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph holds addresses alone: what lies there must live as long. With what Triton's kernel is told, too."""

    def attention(
        q: Tensor,
        keys: Tensor,
        values: Tensor,
        table: Tensor,
        rows: Tensor,
        lengths: Tensor,
        tiles: Tensor,
        scale: float,
    ) -> Tensor:
        first, count = tiles.long().unbind(1)
        return masked_attention(q[first] * count[:, None, None], keys, values, table[rows], lengths, scale)

    stand_in = SimpleNamespace(triton_attention=attention)
    monkeypatch.setitem(sys.modules, "loopwise.nn.kernels.triton_attention", stand_in)
    monkeypatch.setattr(still, "tiles_wanted", lambda device, dtype: True)
    model, settings = tiny(shape), Sampling(max_tokens=4, temperature=1.0)
    graphed = Graphed(model)
    wanted = [generate(model, [prompt], settings)[0] for prompt in PROMPTS]
    matrix["check_same"](graphed.engine.generate(PROMPTS, settings), wanted)
    memory, rows = graphed.runner.memory, graphed.rows._rows
    assert rows is not None
    held = [*graphed.rows._weights._kept, *rows._numbers.values(), *rows._rotary]
    held += [value for value in vars(rows).values() if isinstance(value, Tensor)]
    for pool in (memory.core, memory.boundary):
        held += () if pool is None else (*pool.keys.values(), *pool.values.values())
    places = {tensor.untyped_storage().data_ptr() for tensor in held}
    noted = graphed.recorders[-1].graphs
    assert len(noted) == len(graphed.rows._replays) > 4
    for graph in noted:
        assert graph.given <= places


@pytest.mark.parametrize("shape", ["ouro", "huginn", "retrofitted-llama", "zeros"])
def test_the_device_is_asked_nothing(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device that has shapes and no numbers, where whatever lies on another is refused as well."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)  # it knows no such device
    engine = Engine(tiny(shape).to("meta"), memory="64KiB", speculate="off")
    runner, runs = engine._core.runner, 0

    def capture(function: Callable[[], None]) -> Callable[[], None]:
        nonlocal runs
        function()
        runs += 1
        return lambda: None

    rows = GraphedRows(runner.model, runner.memory, runner.seats, lambda: capture)
    with torch.inference_mode():
        found = rows._find(runner._rotary)
        for kind in ("begin", "loop", "read", "say", "draw"):
            rows._replay(found, kind, 4)
    assert runs == 5


def test_others_are_left_to_their_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("ouro")

    def found(model: LoopedLM, policy: str = "per_loop") -> GraphedRows | None:
        runner = Engine(model, policy, memory="1MiB", chunk=None, prefix_cache=False)._core.runner
        return GraphedRows.of(model, runner.memory, runner.seats)

    assert found(model) is None  # there is no GPU
    monkeypatch.setattr(graphs, "tiles_wanted", lambda device, dtype: True)
    monkeypatch.setattr(graphs, "CudaCapture", lambda device: Recorder())
    assert found(model) is not None
    assert found(model, "average") is None
    model.core[0].register_forward_hook(lambda *_: None)
    assert found(model) is None
    monkeypatch.setenv("LOOPWISE_GRAPHS", "off")
    assert found(tiny("ouro")) is None


def test_a_capture_follows_the_manual(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a stand-in for CUDA, whose names and arguments are those of this torch."""
    did: list[str] = []

    class Stream:
        def __init__(self, name: object) -> None:
            self.name = name

        def wait_stream(self, other: "Stream") -> None:
            did.append(f"{self.name} waits for {other.name}")

    class Graph:
        def replay(self) -> None:
            did.append("replay")

    def captured(graph: object, pool: object, stream: Stream, *, capture_error_mode: str) -> Any:
        did.append(f"capture in {pool} on {stream.name}, {capture_error_mode}")
        return nullcontext()

    for name, stand_in in {
        "synchronize": lambda device: did.append("synchronize"),
        "Stream": lambda device: Stream("side"),
        "graph_pool_handle": lambda: "pool",
        "current_stream": lambda: Stream("main"),
        "stream": lambda stream: nullcontext(),
        "device": lambda device: nullcontext(),
        "CUDAGraph": Graph,
        "graph": captured,
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    replay = CudaCapture(torch.device("cuda", 0))(lambda: did.append("run"))
    replay()
    assert did == [
        *("synchronize", "side waits for main", "run", "run", "run", "main waits for side"),
        *("capture in pool on side, thread_local", "run", "replay"),
    ]


def test_a_seat_and_a_slot_are_nobodys() -> None:
    seats = Seats(2, injected=True, dtype=torch.float32, device=torch.device("cpu"))
    taken = [seats.take() for _ in range(40)]
    assert sorted(taken) == list(range(1, 41))
    assert seats.taken == 40
    pool = Engine(tiny("coda"), memory="64KiB")._core.runner.memory.core
    assert pool.nowhere == pool.pages * pool.page == len(next(iter(pool.keys.values()))) - 1
    assert np.unique([pool.take() for _ in range(pool.pages)]).max() < pool.nowhere // pool.page
