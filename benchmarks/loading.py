"""Load, run and save a checkpoint with the names, shapes and dtype of Ouro-1.4B: how much memory does it take?

    python benchmarks/loading.py

Weights are random: this measures the loader, not the model. Each step is a process of its own, so that its peak of
resident memory is its own. The bar: loading takes at most 1.15 times the size of the checkpoint, beyond what the
imports took. Needs some 6 GB of disk in the temporary folder and 4 GB of memory; leaves nothing there.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "loading.json"
BAR = 1.15
LAYERS, WIDTH, MLP, VOCABULARY = 24, 2048, 5632, 49152
SHARD_BYTES = 10**9
THREADS = 2
CONFIG = {
    "architectures": ["OuroForCausalLM"],
    "model_type": "ouro",
    "hidden_size": WIDTH,
    "intermediate_size": MLP,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 128,
    "hidden_act": "silu",
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 65536,
    "rope_theta": 1000000.0,
    "rms_norm_eps": 1e-06,
    "tie_word_embeddings": False,
    "total_ut_steps": 4,
    "early_exit_threshold": 1.0,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "torch_dtype": "bfloat16",
}


def shapes() -> dict[str, tuple[int, ...]]:
    """Tensor names and shapes as published."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, WIDTH)}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        for name in ("input_layernorm", "input_layernorm_2", "post_attention_layernorm", "post_attention_layernorm_2"):
            found[f"{prefix}.{name}.weight"] = (WIDTH,)
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            found[f"{prefix}.self_attn.{name}.weight"] = (WIDTH, WIDTH)
        for name, shape in (("gate_proj", (MLP, WIDTH)), ("up_proj", (MLP, WIDTH)), ("down_proj", (WIDTH, MLP))):
            found[f"{prefix}.mlp.{name}.weight"] = shape
    found["model.norm.weight"] = (WIDTH,)
    found["model.early_exit_gate.weight"] = (1, WIDTH)
    found["model.early_exit_gate.bias"] = (1,)
    found["lm_head.weight"] = (VOCABULARY, WIDTH)
    return found


def make(folder: Path) -> dict[str, Any]:
    """Write the checkpoint, shard by shard."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    pool = (torch.randn(2**24, generator=generator) * 0.02).bfloat16()
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    size = 0
    for name, shape in shapes().items():
        number = 2 * torch.Size(shape).numel()
        if size + number > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = shape
        size += number
    weight_map: dict[str, str] = {}
    for index, shard in enumerate(shards, 1):
        tensors = {}
        for name, shape in shard.items():
            count = torch.Size(shape).numel()
            # Every tensor is another stretch of the same noise, so that a tensor in a wrong place would show.
            offset = int(torch.randint(len(pool), (), generator=generator))
            tensor = pool.roll(-offset).repeat(-(-count // len(pool)))[:count].reshape(shape)
            tensors[name] = tensor + 1 if "norm" in name else tensor
        file = f"model-{index:05d}-of-{len(shards):05d}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=2))
    return {
        "bytes": sum(file.stat().st_size for file in folder.glob("*.safetensors")),
        "shards": len(shards),
        "tensors": len(weight_map),
        "parameters": sum(torch.Size(shape).numel() for shape in shapes().values()),
    }


def run(folder: Path, target: Path) -> dict[str, Any]:
    """Load, generate and save, with the peak of resident memory after each."""
    import torch

    from loopwise.engine.reference import generate
    from loopwise.engine.sampling import Sampling
    from loopwise.hub.checkpoints import load, save

    torch.set_num_threads(THREADS)
    torch.ones(64, 64).bfloat16() @ torch.ones(64, 64).bfloat16()  # what the matrix library sets up once
    baseline = peak()
    started = time.perf_counter()
    model = load(folder)
    loaded = time.perf_counter()
    after_load = peak()
    (answer,) = generate(model, [list(range(100, 116))], Sampling(max_tokens=8, ignore_eos=True))
    generated = time.perf_counter()
    after_generate = peak()
    save(model, target, shard_bytes=SHARD_BYTES)
    saved = time.perf_counter()
    return {
        "dtype": str(model.embed.weight.dtype).removeprefix("torch."),
        "baseline_bytes": baseline,
        "load_peak_bytes": after_load - baseline,
        "generate_peak_bytes": after_generate - baseline,
        "save_peak_bytes": peak() - baseline,
        "load_seconds": loaded - started,
        "generate_seconds": generated - loaded,
        "save_seconds": saved - generated,
        "tokens": list(answer.tokens),
        "loops": list(answer.loops),
    }


def compare(folder: Path, target: Path) -> dict[str, Any]:
    """Whether both folders hold the same tensors, bit for bit, and the same config.json."""
    import torch
    from safetensors import safe_open

    def places(home: Path) -> dict[str, Path]:
        index = json.loads((home / "model.safetensors.index.json").read_text())
        return {name: home / file for name, file in index["weight_map"].items()}

    first, second = places(folder), places(target)
    same = first.keys() == second.keys()
    for name in first:
        with safe_open(first[name], "pt") as one, safe_open(second[name], "pt") as other:
            left, right = one.get_tensor(name), other.get_tensor(name)
            same = same and left.dtype == right.dtype and torch.equal(left.view(torch.int16), right.view(torch.int16))
    configs = [json.loads((home / "config.json").read_text()) for home in (folder, target)]
    return {"tensors_compared": len(first), "same_bits": same, "same_config": configs[0] == configs[1]}


def peak() -> int:
    """The process's peak of resident memory so far, in bytes."""
    highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return highest if sys.platform == "darwin" else highest * 1024


def in_process(step: str, *folders: Path) -> dict[str, Any]:
    """A step in a fresh interpreter. This one stays small, for a child inherits its parent's peak."""
    environment = os.environ | {"OMP_NUM_THREADS": str(THREADS)}
    words = [sys.executable, __file__, "--step", step, *map(str, folders)]
    done = subprocess.run(words, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return dict(json.loads(done.stdout))


def report(result: dict[str, Any]) -> str:
    """The result as a table."""
    size = result["checkpoint"]["bytes"]

    def ratio(name: str) -> str:
        return f"{result[name] / 2**30:6.2f} GiB   {result[name] / size:5.3f} x the checkpoint"

    rows = [
        ("checkpoint", f"{size / 2**30:6.2f} GiB   {result['checkpoint']['shards']} shards, {result['dtype']}"),
        ("peak, loading", f"{ratio('load_peak_bytes')} (bar {BAR}), {result['load_seconds']:.1f} s"),
        ("peak, 8 tokens", f"{ratio('generate_peak_bytes')}, {result['generate_seconds']:.1f} s on {THREADS} threads"),
        ("peak, saving", f"{ratio('save_peak_bytes')}, {result['save_seconds']:.1f} s"),
        ("written back", "bit for bit" if result["same_bits"] and result["same_config"] else "NOT the same"),
    ]
    return "\n".join(f"{name:<16}{value}" for name, value in rows)


def main() -> int:
    """Run all steps, print the table and write the results; 1 when the bar is missed."""
    with tempfile.TemporaryDirectory(prefix="loopwise-loading-") as scratch:
        folder, target = Path(scratch, "checkpoint"), Path(scratch, "again")
        folder.mkdir()
        result: dict[str, Any] = {"checkpoint": in_process("make", folder)}
        result |= in_process("run", folder, target)
        result |= in_process("compare", folder, target)
    result["load_peak_ratio"] = result["load_peak_bytes"] / result["checkpoint"]["bytes"]
    result["machine"] = in_process("machine")
    print(report(result))
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=2) + "\n")
    fine = result["load_peak_ratio"] <= BAR and result["same_bits"] and result["same_config"]
    return 0 if fine else 1


def machine() -> dict[str, Any]:
    """What this ran on."""
    from loopwise.train.machine import environment

    return environment()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--step", help=argparse.SUPPRESS)
    parser.add_argument("folders", nargs="*", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.step is None:
        sys.exit(main())
    steps = {"make": make, "run": run, "compare": compare, "machine": machine}
    print(json.dumps(steps[given.step](*given.folders)))
