"""Training speed and memory on this machine, beside transformers' Llama and beside the machine's own limit.

    python benchmarks/training.py            all parts; leave the machine alone meanwhile (about 12 minutes)
    python benchmarks/training.py speed      one part: attention, speed, depth or memory

attention   forward and backward of one layer's attention within documents, beside torch's with a mask of numbers.
speed   compiled core, last loop, document mask, clipping and optimiser included: share of the measured matrix-multiply
        peak, and tokens/s beside a compiled transformers Llama of the same shapes with loops x layers layers.
        The sides take turns in one process. Bars: 75% of the peak, 1.1 times Llama.
depth   random depth (8 different ones) against fixed depth, seconds per executed FLOP. Bar: at most 3% more.
memory  V=49,152, T=1,024, recomputation per loop: peak memory of the all-loops loss (stage I) over that of a last-loop
        loss with the same chunked head, each in a process of its own. Bar: 1.1.

Probes of matrix products and copies run before and after; a part whose probes drifted by more than 15% is run again,
at most three times, and is marked if it never held still.
"""

import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

# As `loopwise train` does, and for both sides; it counts only before torch is loaded.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")

import torch
from torch import Tensor

from loopwise.models.config import LoopedLMConfig
from loopwise.models.looped_lm import LoopedLM, attention_mask, document_starts, initialise
from loopwise.nn.attention import attend_dense
from loopwise.nn.kernels.causal import causal_attention
from loopwise.objectives.base import LoopPlan
from loopwise.objectives.registry import build_objective
from loopwise.train.batches import Batch
from loopwise.train.machine import Probe, environment, keep_freed_memory, matmul_peak
from loopwise.train.optimizers import Optimizer, OptimizerConfig, build_optimizer
from loopwise.train.step import executed_flops, micro_batch_loss

RESULTS = Path(__file__).parent / "results" / "training.json"
ROWS, TOKENS, VOCABULARY, WIDTH, HEADS, MLP, LAYERS, LOOPS = 8, 256, 4096, 512, 8, 1408, 4, 4
ROUNDS = 9
DEPTHS = (1, 2, 3, 4, 5, 6, 7, 8)


def looped(vocabulary: int, context: int) -> LoopedLM:
    config = LoopedLMConfig(
        vocab_size=vocabulary,
        width=WIDTH,
        heads=HEADS,
        kv_heads=HEADS,
        head_width=WIDTH // HEADS,
        mlp_width=MLP,
        core_layers=LAYERS,
        loops=LOOPS,
        trained_loops=(1, max(DEPTHS)),
        max_positions=context,
        norm="pre_branch",
        loop_norm=True,
        final_norm=False,
        gate=True,
    )
    model = LoopedLM(config)
    initialise(model, seed=0)
    return model


def batch_of(rows: int, tokens: int, vocabulary: int) -> Batch:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary, (rows, tokens + 1), generator=generator)
    documents = (torch.arange(tokens) // 97).expand(rows, -1).contiguous()
    mask = torch.ones(rows, tokens, dtype=torch.bool)
    mask[:, :-1] = documents[:, :-1] == documents[:, 1:]
    return Batch(tokens=ids[:, :-1].contiguous(), targets=ids[:, 1:].contiguous(), documents=documents, mask=mask)


def loop_step(model: LoopedLM, optimizer: Optimizer, batch: Batch, objective: str, plan: LoopPlan) -> None:
    result = micro_batch_loss(model, batch, build_objective(objective), plan)
    result.loss.total.backward()
    optimizer.step(1e-4)
    optimizer.zero_grad()


class LlamaSide:
    """transformers' Llama with as many layers as the loops unroll, compiled, its own loss, AdamW and clipping."""

    def __init__(self, batch: Batch) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            intermediate_size=MLP,
            num_hidden_layers=LAYERS * LOOPS,
            num_attention_heads=HEADS,
            num_key_value_heads=HEADS,
            max_position_embeddings=TOKENS,
            attn_implementation="sdpa",
            use_cache=False,
        )
        torch.manual_seed(0)
        self.model = LlamaForCausalLM(config)
        self.compiled = torch.compile(self.model)
        self.optimizer = build_optimizer(self.model.named_parameters(), OptimizerConfig())
        same = batch.documents[:, :, None] == batch.documents[:, None, :]
        causal = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
        self.mask: Tensor = (same & causal)[:, None]
        self.labels = torch.where(batch.mask, batch.targets, -100)
        self.batch = batch

    def step(self) -> None:
        out = self.compiled(input_ids=self.batch.tokens, attention_mask=self.mask)
        loss = torch.nn.functional.cross_entropy(out.logits.flatten(0, 1), self.labels.flatten())
        loss.backward()
        self.optimizer.step(1e-4)
        self.optimizer.zero_grad()


def seconds(work: Callable[[], None]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def measure_attention() -> dict[str, Any]:
    documents = batch_of(ROWS, TOKENS, VOCABULARY).documents
    starts, mask = document_starts(documents, documents), attention_mask(documents, documents=documents)
    added = torch.zeros(mask.shape).masked_fill_(~mask, float("-inf"))
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad = torch.randn(4, ROWS, TOKENS, HEADS, WIDTH // HEADS, generator=generator).unbind()
    leaves = [x.requires_grad_() for x in (q, k, v)]
    sides: dict[str, Callable[[], Tensor]] = {
        "loopwise": lambda: causal_attention(q, k, v, starts),
        "torch": lambda: attend_dense(q, k, v, added),
    }
    times: dict[str, list[float]] = {f"{name} {way}": [] for name in sides for way in ("forward", "backward")}
    for _ in range(50):
        for name, attend in sides.items():
            began = time.perf_counter()
            out = attend()
            times[f"{name} forward"].append(time.perf_counter() - began)
            times[f"{name} backward"].append(seconds(lambda out=out: torch.autograd.grad(out, leaves, grad)))
    kept = {name: sorted(values[5:]) for name, values in times.items()}
    both = {
        name: [a + b for a, b in zip(times[f"{name} forward"], times[f"{name} backward"], strict=True)][5:]
        for name in sides
    }
    ratios = [theirs / ours for theirs, ours in zip(both["torch"], both["loopwise"], strict=True)]
    return {
        "milliseconds": {name: 1e3 * statistics.median(values) for name, values in kept.items()},
        "quartiles": {name: [1e3 * q for q in statistics.quantiles(values)[::2]] for name, values in kept.items()},
        "times_torch": statistics.median(ratios),
        "times_torch_quartiles": statistics.quantiles(ratios)[::2],
    }


def measure_speed() -> dict[str, Any]:
    batch = batch_of(ROWS, TOKENS, VOCABULARY)
    model = looped(VOCABULARY, TOKENS)
    model.compile_core()
    optimizer = build_optimizer(model.named_parameters(), OptimizerConfig())
    plan = LoopPlan(loops=LOOPS)
    llama = LlamaSide(batch)
    sides: dict[str, Callable[[], None]] = {
        "loopwise": lambda: loop_step(model, optimizer, batch, "last", plan),
        "llama": llama.step,
    }
    for _ in range(2):
        for work in sides.values():
            work()
    times: dict[str, list[float]] = {name: [] for name in sides}
    peaks = [matmul_peak()]
    for _ in range(ROUNDS):
        for name, work in sides.items():
            times[name].append(seconds(work))
        peaks.append(matmul_peak())
    flops = executed_flops(model.config, plan, tokens=ROWS * TOKENS, context=TOKENS, trains="model")
    # Ratios within a round: where the machine's clock changes from round to round, medians of seconds say little.
    around = [(before + after) / 2 for before, after in pairwise(peaks)]
    shares = [flops / took / peak for took, peak in zip(times["loopwise"], around, strict=True)]
    ratios = [theirs / ours for theirs, ours in zip(times["llama"], times["loopwise"], strict=True)]
    median = {name: statistics.median(values) for name, values in times.items()}
    return {
        "rounds": ROUNDS,
        "seconds": median,
        "spread": {name: [min(values), max(values)] for name, values in times.items()},
        "tokens_per_second": {name: ROWS * TOKENS / value for name, value in median.items()},
        "peak_gflops": statistics.median(peaks) / 1e9,
        "share_of_peak": statistics.median(shares),
        "share_of_peak_spread": [min(shares), max(shares)],
        "times_llama": statistics.median(ratios),
        "times_llama_spread": [min(ratios), max(ratios)],
    }


def measure_depth() -> dict[str, Any]:
    batch = batch_of(ROWS, TOKENS, VOCABULARY)
    model = looped(VOCABULARY, TOKENS)
    model.compile_core()
    optimizer = build_optimizer(model.named_parameters(), OptimizerConfig())

    def cost(loops: int) -> tuple[float, float]:
        plan = LoopPlan(loops=loops)
        took = seconds(lambda: loop_step(model, optimizer, batch, "last", plan))
        return took, executed_flops(model.config, plan, tokens=ROWS * TOKENS, context=TOKENS, trains="model")

    for loops in (*DEPTHS, LOOPS):
        cost(loops)
    order = (5, 2, 8, 1, 6, 3, 7, 4)
    random_rates, fixed_rates = [], []
    for _ in range(3):
        random_costs, fixed_costs = [], []
        for loops in order:
            random_costs.append(cost(loops))
            fixed_costs.append(cost(LOOPS))
        random_rates.append(sum(c[0] for c in random_costs) / sum(c[1] for c in random_costs))
        fixed_rates.append(sum(c[0] for c in fixed_costs) / sum(c[1] for c in fixed_costs))
    ratios = [r / f for r, f in zip(random_rates, fixed_rates, strict=True)]
    return {
        "depths": list(order),
        "seconds_per_flop_over_fixed": statistics.median(ratios),
        "spread": [min(ratios), max(ratios)],
    }


def measure_memory() -> dict[str, Any]:
    peaks = {}
    for objective in ("last", "expected"):
        command = [sys.executable, __file__, "memory-child", objective]
        peaks[objective] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return {"peak_bytes": peaks, "ratio": peaks["expected"]["over"] / peaks["last"]["over"]}


def peak_memory() -> int:
    """Peak bytes of this program. Not ru_maxrss, which begins with the size of the process that started this one."""
    return int(re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[0]) * 1024


def memory_child(objective: str) -> None:
    """Peak memory beyond the imports of three steps, on stdout."""
    before = peak_memory()
    batch = batch_of(2, 1024, 49_152)
    model = looped(49_152, 1024)
    optimizer = build_optimizer(model.named_parameters(), OptimizerConfig())
    built = build_objective(objective)
    for step in range(3):
        plan = built.plan(seed=0, step=step, micro=0)
        micro_batch_loss(model, batch, built, plan, recompute=True).loss.total.backward()
        optimizer.step(1e-4)
        optimizer.zero_grad()
    peak = peak_memory()
    print(json.dumps({"peak": peak, "over": peak - before}))


def steady(part: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A part between two probes, again while the machine did not hold still."""
    for attempt in range(1, 4):
        torch.compiler.reset()
        probe = Probe()
        probe.read()
        found = part()
        probe.read()
        if not probe.drifted:
            break
        print(f"  probes drifted by {probe.drift:.0%}, attempt {attempt} of 3", file=sys.stderr)
    return {**found, "drift": probe.drift, "held_still": not probe.drifted}


def main() -> None:
    if sys.argv[1:2] == ["memory-child"]:
        memory_child(sys.argv[2])
        return
    keep_freed_memory()
    parts = {"attention": measure_attention, "speed": measure_speed, "depth": measure_depth, "memory": measure_memory}
    wanted = sys.argv[1:] or list(parts)
    results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    for name in wanted:
        results[name] = steady(parts[name])
        print(f"{name}: {json.dumps(results[name], indent=2)}")
    results["machine"] = environment()
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
