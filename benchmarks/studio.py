"""How quick the studio is in a real Chromium with a trace of 512 tokens x 32 loops and five candidates each.

    python benchmarks/studio.py            (needs the extras `studio` and `browser`; CHROMIUM=path names the browser)

Measured: bytes of the trace on the wire, first paint of the page that opens it, and how long a step of the threshold
takes until the tints are on the screen (from the slider's event to the next painted frame). Bars: 3 MB, 1 s, and 50 ms
at the 95th percentile.
"""

import json
import os
import shutil
import socket
import statistics
import tempfile
import threading
from pathlib import Path
from typing import Any

import numpy as np
import uvicorn
from playwright.sync_api import Browser, sync_playwright

from loopwise.studio.app import build_studio
from loopwise.studio.library import Library
from loopwise.trace import LoopTrace
from loopwise.train.machine import Probe, environment

RESULTS = Path(__file__).parent / "results" / "studio.json"
TOKENS, LOOPS, CANDIDATES, WIDTH = 512, 32, 5, 64
LOADS, STEPS = 7, 200
# From the slider's event until a frame with the new tints has been painted.
RETINT = """async steps => {
  const slider = document.querySelector(".threshold input"), took = [];
  const painted = () => new Promise(done => requestAnimationFrame(() => { const port = new MessageChannel();
    port.port1.onmessage = done; port.port2.postMessage(0); }));
  for (let step = 0; step < steps; step++) {
    await new Promise(done => setTimeout(done, 40));
    const began = performance.now();
    slider.value = step % 2 ? 20 + step % 150 : 190 - step % 150;
    slider.dispatchEvent(new Event("input"));
    await painted();
    took.push(performance.now() - began);
  }
  return took;
}"""


def large_trace() -> LoopTrace:
    """Noise of the size that the bars name."""
    noise = np.random.default_rng(0)
    hazards = noise.random((TOKENS, LOOPS)) / 8
    words = [f"{word} " for word in ("loop", "state", "gate", "plane", "row", "tick", "core", "head")]
    return LoopTrace(
        title="512 tokens of 32 loops",
        model="noise",
        rule="hazard:0.6",
        policy="last_exited",
        max_loops=LOOPS,
        tokens=noise.integers(0, 49152, TOKENS),
        texts=[words[index % len(words)] for index in range(TOKENS)],
        loops=np.minimum((1 - np.cumprod(1 - hazards, axis=1) < 0.6).sum(1) + 1, LOOPS),
        signal_kind="hazard",
        signals=hazards,
        top_ids=noise.integers(0, 5000, (TOKENS, LOOPS, CANDIDATES)),
        top_probs=-np.sort(-noise.random((TOKENS, LOOPS, CANDIDATES)) / 3),
        vocabulary={token: f"word{token}" for token in range(5000)},
        losses=noise.random((TOKENS, LOOPS)) * 5,
        entropy=noise.random((TOKENS, LOOPS)) * 5,
        kl=noise.random((TOKENS, LOOPS)),
        states=noise.random((TOKENS, LOOPS, WIDTH)).astype(np.float16),
    )


def measure(browser: Browser, address: str, key: str) -> dict[str, Any]:
    """First paints of fresh pages, then the steps of one threshold."""
    paints, texts, sizes = [], [], []
    for _ in range(LOADS):
        page = browser.new_context(viewport={"width": 1360, "height": 1100}).new_page()
        page.on("response", lambda answer: sizes.append(answer) if f"/api/traces/{key}" in answer.url else None)
        page.goto(f"{address}#trace={key}&view=lens&token=0")
        page.locator(".lw-t").nth(TOKENS - 1).wait_for()
        texts.append(page.evaluate("performance.now()"))
        paints.append(page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime"))
        if len(paints) < LOADS:
            page.context.close()
    page.wait_for_timeout(2000)
    took = sorted(page.evaluate(RETINT, STEPS))
    wire = sizes[-1].request.sizes()["responseBodySize"]
    plain = len(sizes[-1].body())
    page.context.close()
    return {
        "wire_bytes": wire,
        "uncompressed_bytes": plain,
        "first_paint_ms": {"median": statistics.median(paints), "all": paints},
        "text_on_screen_ms": {"median": statistics.median(texts), "all": texts},
        "retint_ms": {"median": statistics.median(took), "p95": took[int(0.95 * len(took))], "most": took[-1]},
    }


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        library = Library([str(large_trace().save(Path(folder) / "large.safetensors"))])
    key = library.traces()[0]["key"]
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(build_studio(library), log_level="error"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    probe = Probe()
    try:
        with sync_playwright() as playwright:
            path = os.environ.get("CHROMIUM") or shutil.which("chromium")
            # Chromium's sandbox does not start for root, as in most containers.
            browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
            probe.read()
            found = measure(browser, f"http://127.0.0.1:{listening.getsockname()[1]}/", key)
            probe.read()
            found["browser"] = browser.version
            browser.close()
    finally:
        server.should_exit = True
        thread.join()
        library.close()
    found |= {"drift": probe.drift, "held_still": not probe.drifted, "machine": environment()}
    print(json.dumps(found, indent=2))
    RESULTS.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
