"""The engine on this machine: beside its own full depth, beside transformers, and beside what the machine can do.

    python benchmarks/engine.py                     all parts with 2 threads; leave the machine alone meanwhile
    python benchmarks/engine.py depth llama         some parts: depth, asking, llama, one, wavefront, crowd
    python benchmarks/engine.py --threads 1 depth   with one thread
    python benchmarks/engine.py wavefront models=runs/a,runs/b

depth      256 requests on 64 seats, sampled, replayed depths with a mean of half the loops: speed-up over full depth
           beside the bound that arithmetic sets, and real exits. Ouro-like and Huginn-like, width 512. Bars: 95% and
           90% of the bound; at full depth products at 70% of plain products' rate.
asking     what it costs to ask an exit rule when nobody leaves. Bar: 3%.
llama      64 requests of 16 to 256 tokens in and out against transformers' generate on a Llama of the same shapes with
           loops x layers layers, left-padded, same process. Bar: 3 times the throughput.
one        one request, a core of more than 256 MB: share of the measured read bandwidth. Bar: 60%.
wavefront  drafts on trained models: speed-up beside what acceptance and the cost of a tick predict. Bar: 90% of that.
crowd      32 requests at once, drafts left to the engine, over none. Bar: 0.97.

Results go to benchmarks/results/engine.json, by number of threads.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import loopwise
from loopwise.bench.engine import Load, asking, crowd, depth_batching, one_request, ratios, steady
from loopwise.engine.engine import Engine
from loopwise.engine.sampling import Sampling
from loopwise.models.config import LoopedLMConfig
from loopwise.models.looped_lm import LoopedLM, initialise
from loopwise.nn.noise import uniform
from loopwise.train.machine import environment, keep_freed_memory

RESULTS = Path(__file__).parent / "results" / "engine.json"
VOCABULARY, WIDTH, HEADS, MLP, LAYERS, LOOPS = 4096, 512, 8, 1408, 4, 4
OURO: dict[str, Any] = {"norm": "pre_branch", "loop_norm": True, "final_norm": False, "gate": True}
HUGINN: dict[str, Any] = {
    "norm": "pre_post",
    "prelude_layers": 1,
    "coda_layers": 1,
    "coda_norm": True,
    "start": "normal",
    "injection": "adapter",
    "rotary": "interleaved",
    "tied_head": True,
    "loops": 8,
    "trained_loops": (1, 8),
}

SHAPES = {"ouro": OURO, "huginn": HUGINN}


def make(**changes: Any) -> LoopedLM:
    shape: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "width": WIDTH,
        "heads": HEADS,
        "kv_heads": HEADS,
        "head_width": 64,
        "mlp_width": MLP,
        "core_layers": LAYERS,
        "loops": LOOPS,
        "trained_loops": (1, LOOPS),
        "max_positions": 1024,
    }
    model = LoopedLM(LoopedLMConfig(**(shape | changes))).eval()
    initialise(model, seed=0)
    return model


def depth() -> dict[str, Any]:
    load = Load(requests=256, seats=64, prompt=16, tokens=32)
    ouro, huginn = make(**OURO), make(**HUGINN)
    return {
        "ouro": steady(lambda: depth_batching(ouro, load, rule="hazard:0.7")),
        "huginn": steady(lambda: depth_batching(huginn, Load(requests=128, tokens=24), rule="delta:0.3")),
    }


def asked() -> dict[str, Any]:
    load = Load(requests=64, prompt=16, tokens=24, rounds=9)
    return {name: steady(lambda shape=shape: asking(make(**shape), load)) for name, shape in SHAPES.items()}


def llama() -> dict[str, Any]:
    return steady(beside_llama)


def beside_llama() -> dict[str, Any]:
    from transformers import LlamaConfig, LlamaForCausalLM

    model = make(**OURO)
    torch.manual_seed(0)
    other = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            intermediate_size=MLP,
            num_hidden_layers=LAYERS * LOOPS,
            num_attention_heads=HEADS,
            num_key_value_heads=HEADS,
            max_position_embeddings=1024,
            attn_implementation="sdpa",
        )
    ).eval()
    requests = torch.arange(64)
    prompt_lengths = (16 + uniform(0, "bench lengths in", requests) * 241).long().tolist()
    answer_lengths = (16 + uniform(0, "bench lengths out", requests) * 241).long().tolist()
    prompts = [
        (uniform(number, "bench prompts", torch.arange(length)) * (VOCABULARY - 1) + 1).long().tolist()
        for number, length in enumerate(prompt_lengths)
    ]
    longest = max(prompt_lengths)
    padded = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = (padded != 0).long()
    engine = Engine(model, "last_exited", speculate="off", prefix_cache=False, seats=64)

    def ours(rule: str | None) -> float:
        settings = [Sampling(max_tokens=length, ignore_eos=True, exit=rule) for length in answer_lengths]
        began = time.perf_counter()
        engine.generate(prompts, settings)
        return sum(answer_lengths) / (time.perf_counter() - began)

    def theirs() -> float:
        # A batch ends with its longest answer; tokens beyond a request's own length are of no use to it.
        began = time.perf_counter()
        with torch.inference_mode():
            other.generate(
                padded,
                attention_mask=mask,
                max_new_tokens=max(answer_lengths),
                min_new_tokens=max(answer_lengths),
                do_sample=False,
                pad_token_id=0,
            )
        return sum(answer_lengths) / (time.perf_counter() - began)

    # The warm-up turn of take_turns would double minutes; a short generation warms both sides.
    other.generate(padded[:2, -16:], max_new_tokens=2, pad_token_id=0)
    engine.generate(prompts[:2], Sampling(max_tokens=2))
    found: dict[str, list[float]] = {"theirs": [], "ours": [], "ours with exits": []}
    for _ in range(2):
        found["theirs"].append(theirs())
        found["ours"].append(ours(None))
        found["ours with exits"].append(ours("hazard:0.7"))
    return {
        "tokens_per_second": found,
        "times_transformers": ratios(found["ours"], found["theirs"]),
        "times_transformers_with_exits": ratios(found["ours with exits"], found["theirs"]),
    }


def one() -> dict[str, Any]:
    model = make(**OURO, width=1024, heads=16, kv_heads=16, mlp_width=2816, core_layers=6)
    load = Load(requests=2, seats=1, prompt=16, tokens=12, temperature=0.0, rounds=2)
    return steady(lambda: one_request(model, load))


def wavefront() -> dict[str, Any]:
    names = next((word.removeprefix("models=").split(",") for word in sys.argv if word.startswith("models=")), [])
    out: dict[str, Any] = {}
    for name in names or ["shipped"]:
        model = loopwise.load(name, dtype="float32")
        for temperature in (0.0, 0.7):
            load = Load(requests=4, seats=1, prompt=32, tokens=96, temperature=temperature, rounds=4)
            key = f"{Path(name).name} R={model.config.loops} width={model.config.width} T={temperature}"
            out[key] = steady(lambda model=model, load=load: one_request(model, load))
    return out


def crowded() -> dict[str, Any]:
    model = make(**OURO)
    return steady(lambda: crowd(model, Load(requests=64, seats=32, prompt=16, tokens=32)))


PARTS: dict[str, Callable[[], dict[str, Any]]] = {
    "depth": depth,
    "asking": asked,
    "llama": llama,
    "one": one,
    "wavefront": wavefront,
    "crowd": crowded,
}


def main() -> None:
    words = sys.argv[1:]
    if "--threads" in words:
        torch.set_num_threads(int(words[words.index("--threads") + 1]))
    keep_freed_memory()
    results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    mine = results.setdefault(f"{torch.get_num_threads()} threads", {})
    results["machine"] = environment()
    RESULTS.parent.mkdir(exist_ok=True)
    for name in [word for word in words if word in PARTS] or list(PARTS):
        mine[name] = PARTS[name]()
        print(f"{name}: {json.dumps(mine[name], indent=2)}")
        RESULTS.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
