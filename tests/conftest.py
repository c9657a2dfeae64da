"""What every test shares: no network, no time limits, the same examples in every run."""

import os
import signal

import pytest
from hypothesis import settings

# Read by huggingface_hub and tokenizers when they are imported, hence before anything else is.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

settings.register_profile("repeatable", deadline=None, derandomize=True, database=None)
settings.register_profile("search", deadline=None, max_examples=500)
settings.load_profile("repeatable")


def pytest_configure(config: pytest.Config) -> None:
    """Refuse to compile what jaxtyping checks: torch reports it as wrong shapes, far from the cause."""
    # A background job of a script is started with Ctrl-C ignored, and hands that on to all that it starts.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if config.option.markexpr == "compiles" and config.getoption("--jaxtyping-packages"):
        raise pytest.UsageError("checked code cannot be compiled; type: pytest --jaxtyping-packages= -m compiles")
