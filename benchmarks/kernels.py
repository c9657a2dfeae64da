"""The CPU kernels of the serving engine beside torch's operations and beside the speed of reading memory.

    python benchmarks/kernels.py             all parts; leave the machine alone meanwhile (about a minute)
    python benchmarks/kernels.py linear      one part: linear, attention or together

linear     products of 1 to 32 rows with weights that no cache holds (a GiB of them, taken in turn), beside F.linear and
           w @ x.T. Bars: one row at 80% of the read bandwidth, 4 rows at most 1.15 times one row, 8 at most 1.4.
attention  1 to 256 rows of 64 to 512 slots, width 512 (8 heads of 64), and 256 rows of one prompt, beside a gather and
           masked attention. Bar: three times faster at 64 rows.
together   kernels and torch's operations by turns against each by itself: two pools of threads would spin against each
           other. And the time of a call that has next to nothing to do.

The read bandwidth is that of a sum over a GiB; a product with several streams may exceed it. Probes of matrix products
and copies run before and after; a part whose probes drifted by more than 15% is run again, at most three times, and is
marked if it never held still.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from loopwise.nn.kernels import gathered_attention, linear, load_cpu_kernels, paged_attention, why_no_cpu_kernels
from loopwise.train.machine import Probe, environment, read_bandwidth

RESULTS = Path(__file__).parent / "results" / "kernels.json"
SHAPES = ((4096, 4096), (5632, 2048), (1536, 512))
ROWS = (1, 2, 4, 8, 16, 32)
WEIGHT_BYTES = 2**30
HEADS, HEAD_WIDTH, LONGEST, PAGE = 8, 64, 512, 16
ROUNDS = 3


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def by_turns(sides: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each side, which take turns; the first turn does not count."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds + 1):
        for name, work in sides.items():
            took = seconds(work)
            if turn:
                times[name].append(took)
    return {name: statistics.median(values) for name, values in times.items()}


def measure_linear() -> dict[str, Any]:
    bandwidth = read_bandwidth(size=2**30)
    out: dict[str, Any] = {"read_gigabytes_per_second": bandwidth / 1e9}
    for outputs, inputs in SHAPES:
        size = outputs * inputs * 4
        weights = [torch.randn(outputs, inputs) for _ in range(WEIGHT_BYTES // size)]
        shape: dict[str, Any] = {}
        one_row = 0.0
        for rows in ROWS:
            x = torch.randn(rows, inputs)
            products: dict[str, Callable[[Tensor], Tensor]] = {
                "kernel": lambda w, x=x: linear(x, w, few=max(ROWS)),
                "F.linear": lambda w, x=x: F.linear(x, w),
                "w @ x.T": lambda w, x=x: (w @ x.T).T,
            }
            sides = {name: lambda one=one, all=weights: [one(w) for w in all] for name, one in products.items()}
            took = {name: value / len(weights) for name, value in by_turns(sides, ROUNDS).items()}
            one_row = took["kernel"] if rows == 1 else one_row
            shape[str(rows)] = {
                "microseconds": {name: value * 1e6 for name, value in took.items()},
                "share_of_read_bandwidth": {name: size / value / bandwidth for name, value in took.items()},
                "kernel_over_one_row": took["kernel"] / one_row,
            }
        out[f"{outputs}x{inputs}"] = shape
    return out


def measure_attention() -> dict[str, Any]:
    bandwidth = read_bandwidth(size=2**30)
    out: dict[str, Any] = {"read_gigabytes_per_second": bandwidth / 1e9}
    draw = torch.Generator().manual_seed(0)
    for rows in (1, 16, 64, 256, "prompt"):
        count = 256 if rows == "prompt" else int(rows)
        sequences = 1 if rows == "prompt" else count
        pages = torch.randperm(sequences * LONGEST // PAGE, generator=draw)
        table = (pages[:, None] * PAGE + torch.arange(PAGE)).view(sequences, LONGEST).int()
        keys, values = (torch.randn(sequences * LONGEST, HEADS, HEAD_WIDTH) for _ in range(2))
        q = torch.randn(count, HEADS, HEAD_WIDTH)
        if rows == "prompt":
            lengths = torch.arange(LONGEST - count, LONGEST) + 1
        elif rows == 1:
            lengths = torch.tensor([LONGEST])
        else:
            lengths = torch.randint(64, LONGEST + 1, (count,), generator=draw)
        given = (q, keys, values, table, torch.arange(count) % sequences, lengths)
        took = by_turns(
            {"kernel": lambda g=given: paged_attention(*g), "gather": lambda g=given: gathered_attention(*g)}, 5
        )
        read = 2 * 4 * HEADS * HEAD_WIDTH * int(lengths.max() if rows == "prompt" else lengths.sum())
        out[str(rows)] = {
            "microseconds": {name: value * 1e6 for name, value in took.items()},
            "times_gather": took["gather"] / took["kernel"],
            "share_of_read_bandwidth": read / took["kernel"] / bandwidth,
        }
    return out


def measure_together() -> dict[str, Any]:
    x, weight, big = torch.randn(4, 2048), torch.randn(2048, 2048), torch.randn(2**20)
    sides: dict[str, Callable[[], object]] = {
        "kernel": lambda: [linear(x, weight) for _ in range(200)],
        "torch": lambda: [big.mul(2.0) for _ in range(200)],
        "by_turns": lambda: [(linear(x, weight), big.mul(2.0)) for _ in range(200)],
    }
    took = by_turns(sides, 5)
    small, tiny = torch.randn(1, 16), torch.randn(16, 16)
    q, pool, table = torch.randn(1, 1, 16), torch.randn(1, 1, 16), torch.zeros(1, 1, dtype=torch.int32)
    one = torch.ones(1, dtype=torch.long)
    calls = by_turns(
        {
            "linear": lambda: [linear(small, tiny) for _ in range(1000)],
            "F.linear": lambda: [F.linear(small, tiny) for _ in range(1000)],
            "paged_attention": lambda: [paged_attention(q, pool, pool, table, one - 1, one) for _ in range(1000)],
        },
        5,
    )
    return {
        "by_turns_over_sum": took["by_turns"] / (took["kernel"] + took["torch"]),
        "microseconds_of_a_call": {name: value * 1e3 for name, value in calls.items()},
    }


PARTS = {"linear": measure_linear, "attention": measure_attention, "together": measure_together}


def measured(part: str) -> dict[str, Any]:
    for _ in range(3):
        probe = Probe()
        probe.read()
        result = PARTS[part]()
        probe.read()
        if not probe.drifted:
            break
    return {**result, "drift": probe.drift, "held_still": not probe.drifted}


def main() -> None:
    if load_cpu_kernels() is None:
        sys.exit(f"no CPU kernels: {why_no_cpu_kernels()}")
    chosen = sys.argv[1:] or list(PARTS)
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    with torch.no_grad():
        for part in chosen:
            results[part] = measured(part)
            print(json.dumps({part: results[part]}, indent=1))
    results["environment"] = environment()
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
