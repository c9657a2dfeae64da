"""kill -9 at random moments, checkpoint writing included: the run ends in the bits of one that was left in peace."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loopwise.configuration import to_dict

# One process imports torch once and forks for every attempt at training.
ATTEMPTS = '''
import io, json, os, random, select, signal, sys, time
from pathlib import Path
from rich.console import Console
from loopwise.configuration import build
from loopwise.train import run
from loopwise.train.config import TrainConfig
from loopwise.train.progress import Progress

run.matmul_peak = lambda dtype, device: 1e9
home = str(Path(run.__file__).parent)


def die_at_line(number, file):
    """SIGKILL before the given line that runs in this package's training code, or in one file of it."""
    left = number

    def inside(frame, event, argument):
        nonlocal left
        if event == "line":
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return inside

    sys.settrace(lambda frame, event, argument: inside if frame.f_code.co_filename.startswith(home + file) else None)
    return lambda: number - left


def attempt(config, *, line=None, after=None):
    """Train in a process of its own until it is done or dead."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        lines = die_at_line(*line) if line else lambda: 0
        run.train(config, progress=Progress(console=Console(file=io.StringIO())))
        os.write(writer, str(lines()).encode())
        os._exit(0)
    os.close(writer)
    began = time.monotonic()
    if not select.select([reader], [], [], after)[0]:
        os.kill(child, signal.SIGKILL)
    said = os.read(reader, 100)
    os.close(reader)
    status = os.waitpid(child, 0)[1]
    assert status == 0 or os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, status
    return {"killed": status != 0, "lines": int(said or 0), "seconds": time.monotonic() - began}


undisturbed, broken = (build(TrainConfig, Path(name), []) for name in sys.argv[1:3])
chance, count, clock = random.Random(int(sys.argv[3])), int(sys.argv[4]), sys.argv[5] == "clock"
whole = attempt(undisturbed, line=None if clock else [10**9, "/"])
done = []
for number in range(count):
    if clock:
        done.append(attempt(broken, after=chance.uniform(0, whole["seconds"] / 4)))
    elif number % 2:
        done.append(attempt(broken, line=[chance.randint(1, whole["lines"] // 3), "/"]))
    else:
        done.append(attempt(broken, line=[chance.randint(1, 400), "/checkpoint.py"]))
done.append(attempt(broken))
print(json.dumps([one["killed"] for one in done]))
'''


@pytest.fixture
def crash(tiny_run: Callable[..., Any], assert_same_run: Callable[..., None]) -> Callable[..., None]:
    """`crash(recipe, count, by, seed)`: kill a run `count` times, by the clock or at a line, and let it finish."""

    def run(recipe: str, count: int, by: str, seed: int) -> None:
        configs = [tiny_run(recipe, name) for name in ("undisturbed", "broken")]
        files = [f"{config.run}.json" for config in configs]
        for file, config in zip(files, configs, strict=True):
            Path(file).write_text(json.dumps(to_dict(config)))
        done = subprocess.run(
            [sys.executable, "-c", ATTEMPTS, *files, str(seed), str(count), by],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
        )
        assert done.returncode == 0, done.stderr
        *killed, last = json.loads(done.stdout)
        assert sum(killed) >= min(3, count - 1)
        assert not last
        assert_same_run(configs[1].run, configs[0].run)

    return run


def test_killed_anywhere_and_while_saving(crash: Callable[..., None]) -> None:
    crash("two stages of Ouro", 3, "line", seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("by", ["line", "clock"])
@pytest.mark.parametrize("recipe", ["two stages of Ouro", "random depth by Muon", "pointer chasing"])
def test_ten_kills_at_random_moments(recipe: str, by: str, crash: Callable[..., None]) -> None:
    crash(recipe, 10, by, seed=1)
