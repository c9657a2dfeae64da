"""A studio with a small trained model, a run, a trace of a long text and a maze; a real Chromium beside it."""

import importlib.util
import json
import os
import shutil
import socket
import threading

import numpy as np
import pytest

from loopwise.trace import LoopTrace

# `make test` installs no browser; `make test-browser` does, and fails when it then finds no tests.
collect_ignore_glob = [] if importlib.util.find_spec("playwright") else ["test_*.py"]

TOKENS, LOOPS, CANDIDATES = 512, 32, 5


def large_trace():
    """512 tokens of 32 loops with five candidates each: what the studio promises to be quick with."""
    noise = np.random.default_rng(0)
    hazards = noise.random((TOKENS, LOOPS)) / 8
    words = [f"{word} " for word in ("loop", "state", "gate", "plane", "row", "tick", "core", "head")]
    return LoopTrace(
        title="a large trace",
        model="large",
        rule="hazard:0.6",
        policy="last_exited",
        max_loops=LOOPS,
        tokens=noise.integers(0, 49152, TOKENS),
        texts=[words[i % len(words)] for i in range(TOKENS)],
        loops=np.minimum((1 - np.cumprod(1 - hazards, axis=1) < 0.6).sum(1) + 1, LOOPS),
        signal_kind="hazard",
        signals=hazards,
        top_ids=noise.integers(0, 3000, (TOKENS, LOOPS, CANDIDATES)),
        top_probs=-np.sort(-noise.random((TOKENS, LOOPS, CANDIDATES)) / 3),
        vocabulary={token: f"word{token}" for token in range(3000)},
        losses=noise.random((TOKENS, LOOPS)) * 5,
        entropy=noise.random((TOKENS, LOOPS)) * 5,
        kl=noise.random((TOKENS, LOOPS)),
    )


def maze():
    """A maze by hand, as `loopwise study grid` writes one: the route grows by a cell with every tick."""
    rows = ["#####", "#S..#", "##..#", "##.G#", "#####"]
    cells = [cell for row in rows for cell in row]
    route = [7, 12, 17]
    target = [index in route if cell not in "#" else None for index, cell in enumerate(cells)]
    answers = [[cell != "#" and index in route[:tick] for index, cell in enumerate(cells)] for tick in range(4)]
    attention = [[float(index == route[min(tick, 2)]) for index in range(25)] for tick in range(4)]
    problem = {
        "rows": 5,
        "columns": 5,
        "problem": cells,
        "target": target,
        "answers": answers,
        "attention": attention,
        "certainty": [0.1, 0.3, 0.6, 0.9],
        "difficulty": 4,
    }
    return {"title": "A maze by hand", "problems": [problem]}


@pytest.fixture(scope="session")
def address(tmp_path_factory):
    import uvicorn

    from loopwise.studio.app import build_studio
    from loopwise.studio.library import Library

    folder = tmp_path_factory.mktemp("studio")
    (folder / "maze.json").write_text(json.dumps(maze()))
    run = folder / "run"
    run.mkdir()
    lines = [
        {"step": step, "stage": "stage I", "loss_loop_1": 5 / step, "loss_loop_2": 4 / step} for step in range(1, 30)
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    library = Library(
        ["shipped", str(folder / "maze.json"), str(run), str(large_trace().save(folder / "large.safetensors"))]
    )
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(build_studio(library), log_level="error"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{listening.getsockname()[1]}/"
    server.should_exit = True
    thread.join()
    library.close()


@pytest.fixture(scope="session")
def browser():
    from playwright.sync_api import sync_playwright

    path = os.environ.get("CHROMIUM") or shutil.which("chromium")
    with sync_playwright() as playwright:
        # The sandbox of Chromium does not start for root, as in most containers.
        chromium = playwright.chromium.launch(executable_path=path or None, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser, address):
    opened = browser.new_page(viewport={"width": 1360, "height": 1100}, accept_downloads=True)
    problems = []
    opened.on("pageerror", lambda error: problems.append(str(error)))
    opened.on("console", lambda message: problems.append(message.text) if _is_error(message) else None)
    opened.on("request", lambda request: problems.append(request.url) if not _own(request.url, address) else None)
    opened.goto(address)
    opened.locator("#model option").first.wait_for(state="attached")
    yield opened
    opened.close()
    assert not problems


def _is_error(message):
    # What the server refuses is said on the page; the browser notes it in the console too.
    return message.type == "error" and "status of 400" not in message.text


def _own(url, address):
    return url.startswith((address, "data:", "blob:"))
