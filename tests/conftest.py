"""What every test shares: no network, no time limits, the same examples in every run; and how a run is written down."""

import datetime
import json
import os
import platform
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path

import pytest
from _pytest.terminal import TerminalReporter
from hypothesis import settings

RECORD = Path(__file__).parent / "test-all.json"
"""What the last `make test-all` came to."""
_BEGAN = time.time()

# Read by huggingface_hub and tokenizers when they are imported, hence before anything else is.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

settings.register_profile("repeatable", deadline=None, derandomize=True, database=None)
# Dear tests ask for a part of what a profile gives, so that a wider search is wider for them too.
settings.register_profile("search", deadline=None, max_examples=500)
settings.load_profile("repeatable")


def pytest_configure(config: pytest.Config) -> None:
    """Refuse to compile what jaxtyping checks: torch reports it as wrong shapes, far from the cause."""
    # A background job of a script is started with Ctrl-C ignored, and hands that on to all that it starts.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if config.option.markexpr == "compiles" and config.getoption("--jaxtyping-packages"):
        raise pytest.UsageError("checked code cannot be compiled; type: pytest --jaxtyping-packages= -m compiles")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--record", metavar="NAME", help=f"write what this run came to into {RECORD.name}, under this name"
    )


def pytest_terminal_summary(terminalreporter: TerminalReporter, config: pytest.Config) -> None:
    """Write the run down, where that was asked for: counts, and where the time went."""
    name = config.getoption("--record")
    if name is None:
        return
    outcomes = {
        outcome: len(reports) for outcome, reports in terminalreporter.stats.items() if outcome not in ("", "warnings")
    }
    seconds: Counter[str] = Counter()
    single: Counter[str] = Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                single[report.nodeid] += report.duration
    for node, took in single.items():
        seconds["/".join(node.split("::")[0].split("/")[:2])] += took
    revision = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    record = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else {}
    record[name] = {
        "commit": revision.stdout.strip(),
        "date": datetime.date.today().isoformat(),
        "outcomes": outcomes,
        "seconds": round(time.time() - _BEGAN),
        "seconds_of_tests": {part: round(took, 1) for part, took in seconds.most_common()},
        "longest": {node: round(took, 1) for node, took in single.most_common(10)},
        "cores": os.cpu_count(),
        "python": platform.python_version(),
    }
    RECORD.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
