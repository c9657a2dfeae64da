"""LoopedLM once more, straight from the formulas of `LoopedLMConfig`: one token, one head, one pair at a time.

Written in numpy float64 from the documentation alone; it shares no code with the package. Tests load it with
`runpy.run_path`, because test folders are no packages.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import NormalDist

import numpy as np
import torch

from loopwise.models.config import LoopedLMConfig
from loopwise.models.looped_lm import LoopedLM
from loopwise.nn.rotary import RotaryScaling

BASE = {
    "vocab_size": 23,
    "width": 16,
    "heads": 4,
    "kv_heads": 4,
    "head_width": 4,
    "mlp_width": 20,
    "core_layers": 2,
    "loops": 3,
    "trained_loops": (1, 16),
    "max_positions": 64,
}
OUTER = {"prelude_layers": 1, "coda_layers": 1, "core_layers": 1}
RETROFIT = OUTER | {"start": "normal", "start_std": 0.7, "injection": "adapter", "tied_head": True}
STRETCH = RotaryScaling(factor=8.0, low_frequency_factor=1.0, high_frequency_factor=4.0, original_positions=32)
SHAPES: dict[str, dict[str, object]] = {
    "llama": {"kv_heads": 2},
    "ouro": {"norm": "pre_branch", "loop_norm": True, "final_norm": False, "gate": True},
    "huginn": RETROFIT
    | {"norm": "pre_post", "rotary": "interleaved", "qk_bias": True, "coda_norm": True, "embed_scale": 4.0},
    "retrofitted-llama": RETROFIT | {"kv_heads": 2, "adapter_bias": True, "rotary_scaling": STRETCH},
    "retrofitted-olmo": RETROFIT | {"norm": "branch", "qk_norm": True, "kv_heads": 1, "rotary_base": 500.0},
    "universal": {"norm": "post", "injection": "add", "gate": True, "rotary": "interleaved"},
    "zeros": OUTER
    | {"start": "zeros", "injection": "add", "loop_norm": True, "coda_norm": True, "gate": True, "head_width": 6},
    "coda": {"prelude_layers": 2, "coda_layers": 2, "gate": True, "qk_bias": True, "kv_heads": 2, "norm_eps": 1e-2},
}


def tiny(shape: str = "ouro", *, seed: int = 0, **changes: object) -> LoopedLM:
    """A small float64 model in which no weight has a value that could hide a mistake."""
    model = LoopedLM(LoopedLMConfig(**(BASE | SHAPES[shape] | changes))).double().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if "norm" in name:
                parameter.copy_(1 + 0.3 * drawn)
            elif parameter.dim() == 2 and "qk_bias" not in name:
                parameter.copy_(drawn * (2.5 if name.startswith("gate") else 1.2) / parameter.shape[1] ** 0.5)
            else:
                parameter.copy_(0.5 * drawn)
    return model


def naive_uniform(seed: int, domain: str, *counters: int) -> float:
    """splitmix64's finaliser over the counters, in Python's own integers."""
    whole = 2**64 - 1

    def mix(x: int) -> int:
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & whole
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & whole
        return x ^ (x >> 31)

    mixed = int.from_bytes(hashlib.sha256(f"{domain}:{seed}".encode()).digest()[:8], "little")
    for counter in counters:
        mixed = mix((counter * 0x9E3779B97F4A7C15 + mixed) & whole)
    return ((mix((mixed + 0x9E3779B97F4A7C15) & whole) >> 12) + 0.5) / 2**52


def naive_normal(seed: int, domain: str, *counters: int, cut: float = 3.0) -> float:
    normal = NormalDist()
    low, high = normal.cdf(-cut), normal.cdf(cut)
    return normal.inv_cdf(low + (high - low) * naive_uniform(seed, domain, *counters))


@dataclass
class Row:
    """One token and everything that was seen of it."""

    states: list[np.ndarray]
    """The start state, then the state after each loop that it ran before it stopped."""
    hazards: list[float] = field(default_factory=list)
    logits: list[np.ndarray] = field(default_factory=list)
    """Readout after each loop, reading earlier tokens' final codas."""
    loops: int = 0
    prediction: np.ndarray | None = None
    """Readout of the state it stopped at."""


Stop = Callable[[int, Row], bool]
"""(token, what was seen up to the loop that has just run) -> stop now?"""


class NaiveLM:
    """The formulas, over one sequence."""

    def __init__(self, model: LoopedLM) -> None:
        self.config = model.config
        self.weights = {name: tensor.detach().double().numpy() for name, tensor in model.state_dict().items()}

    def run(
        self,
        tokens: Sequence[int],
        *,
        loops: int,
        stop: Stop | None = None,
        fill: bool = False,
        prompt: int = 0,
        min_loops: int = 1,
        start: int | str | np.ndarray | None = None,
        positions: Sequence[int] | None = None,
        first: Sequence[int] | None = None,
    ) -> list[Row]:
        """Token by token, each to its last loop before the next one begins.

        Args:
            stop: an exit rule; None runs every loop.
            fill: a stopped token runs on to write its remaining planes; else readers find its last plane.
            prompt: the first tokens that run every loop whatever `stop` says.
            positions: for the rotary tables and start states.
            first: for each token the earliest one it may read.
        """
        self.planes: dict[tuple[str, int, int], tuple[np.ndarray, np.ndarray]] = {}
        self.exits: list[int] = []
        self.fill, self.first = fill, first or [0] * len(tokens)
        rows = []
        for place, token in enumerate(tokens):
            position = place if positions is None else positions[place]
            injected = self.weights["embed.weight"][token] * self.config.embed_scale
            for layer in range(self.config.prelude_layers):
                injected = self.block(f"prelude.{layer}", injected, place, position, 0)
            state = self.start(injected, place, position, start)
            row = Row([state])
            ran = 0
            for loop in range(1, loops + 1):
                state = self.loop(state, injected, place, position, loop)
                if ran:
                    continue
                row.states.append(state)
                if self.config.gate:
                    row.hazards.append(self.hazard(state))
                row.logits.append(self.readout(state, place, position))
                fired = stop is not None and place >= prompt and stop(place, row) and loop >= min_loops
                if fired or loop == loops:
                    ran = loop
                    if not fill:
                        break
            row.loops = ran
            # Last, so that later tokens find the coda's keys and values of the state it stopped at.
            row.prediction = self.readout(row.states[ran], place, position)
            self.exits.append(ran)
            rows.append(row)
        return rows

    def read_out_all(self, states: Sequence[np.ndarray], positions: Sequence[int] | None = None) -> np.ndarray:
        """Logits of a whole sequence from one state per token."""
        places = list(range(len(states))) if positions is None else positions
        return np.stack(
            [self.readout(state, i, position) for i, (state, position) in enumerate(zip(states, places, strict=True))]
        )

    def start(
        self, injected: np.ndarray, place: int, position: int, start: int | str | np.ndarray | None
    ) -> np.ndarray:
        if isinstance(start, np.ndarray):
            return start[place]
        if start == "zero" or (start is None and self.config.start == "zeros"):
            return np.zeros_like(injected)
        if self.config.start == "embeddings":
            return injected
        seed, width = self.config.start_seed if start is None else start, self.config.width
        draws = [naive_normal(seed, "start", position * width + feature) for feature in range(width)]
        return np.array(draws) * self.config.start_std

    def loop(self, state: np.ndarray, injected: np.ndarray, place: int, position: int, loop: int) -> np.ndarray:
        if self.config.injection == "add":
            state = state + injected
        elif self.config.injection == "adapter":
            state = self.weights["adapter.weight"] @ np.concatenate([state, injected])
            if self.config.adapter_bias:
                state = state + self.weights["adapter.bias"]
        for layer in range(self.config.core_layers):
            state = self.block(f"core.{layer}", state, place, position, loop)
        return self.norm(state, "norm.weight") if self.config.loop_norm else state

    def readout(self, state: np.ndarray, place: int, position: int) -> np.ndarray:
        hidden = self.norm(state, "norm.weight") if self.config.coda_norm else state
        for layer in range(self.config.coda_layers):
            hidden = self.block(f"coda.{layer}", hidden, place, position, 0)
        hidden = self.norm(hidden, "norm.weight") if self.config.final_norm else hidden
        return self.weights["embed.weight" if self.config.tied_head else "head.weight"] @ hidden

    def hazard(self, state: np.ndarray) -> float:
        seen = state if self.config.loop_norm else self.norm(state, "norm.weight")
        return 1 / (1 + math.exp(-(self.weights["gate.weight"][0] @ seen + self.weights["gate.bias"][0])))

    def norm(self, x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt(np.mean(x * x) + self.config.norm_eps) * self.weights[name]

    def block(self, name: str, x: np.ndarray, place: int, position: int, loop: int) -> np.ndarray:
        x = self.branch(f"{name}.attention", x, lambda y: self.attention(name, y, place, position, loop))
        return self.branch(f"{name}.mlp", x, lambda y: self.mlp(name, y))

    def branch(self, name: str, x: np.ndarray, function: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        inner, outer = f"{name}.norm_in.weight", f"{name}.norm_out.weight"
        match self.config.norm:
            case "pre":
                return x + function(self.norm(x, inner))
            case "post":
                return self.norm(x + function(x), outer)
            case "branch":
                return x + self.norm(function(x), outer)
            case "pre_branch":
                return x + self.norm(function(self.norm(x, inner)), outer)
            case "pre_post":
                return self.norm(x + function(self.norm(x, inner)), outer)

    def mlp(self, name: str, x: np.ndarray) -> np.ndarray:
        both = self.weights[f"{name}.mlp.branch.gate_up.weight"] @ x
        gate, up = both[: self.config.mlp_width], both[self.config.mlp_width :]
        return self.weights[f"{name}.mlp.branch.down.weight"] @ (gate / (1 + np.exp(-gate)) * up)

    def attention(self, name: str, x: np.ndarray, place: int, position: int, loop: int) -> np.ndarray:
        heads, groups, width = self.config.heads, self.config.kv_heads, self.config.head_width
        part = f"{name}.attention.branch"
        fused = self.weights[f"{part}.qkv.weight"] @ x
        q, k, v = fused[: heads * width], fused[heads * width : (heads + groups) * width], fused[-groups * width :]
        if self.config.qk_norm:
            q, k = self.norm(q, f"{part}.q_norm.weight"), self.norm(k, f"{part}.k_norm.weight")
        queries, keys, values = q.reshape(heads, width), k.reshape(groups, width), v.reshape(groups, width)
        if self.config.qk_bias:
            bias = self.weights[f"{part}.qk_bias"]
            queries, keys = queries + bias[:heads], keys + bias[heads:]
        queries = np.stack([self.rotate(query, position) for query in queries])
        keys = np.stack([self.rotate(key, position) for key in keys])
        self.planes[name, loop, place] = keys, values
        out = []
        for head in range(heads):
            group = head // (heads // groups)
            seen = [self.plane(name, loop, place, other) for other in range(self.first[place], place + 1)]
            scores = np.array([queries[head] @ k[group] for k, _ in seen]) / math.sqrt(width)
            weights = np.exp(scores - scores.max())
            out.append(sum(w * v[group] for w, (_, v) in zip(weights / weights.sum(), seen, strict=True)))
        return self.weights[f"{part}.out.weight"] @ np.concatenate(out)

    def plane(self, name: str, loop: int, place: int, other: int) -> tuple[np.ndarray, np.ndarray]:
        """Keys and values that a reader at (place, loop) finds of another token."""
        if other < place and not self.fill:
            loop = min(loop, self.exits[other])
        return self.planes[name, loop, other]

    def rotate(self, x: np.ndarray, position: int) -> np.ndarray:
        width, out = self.config.head_width, x.copy()
        for pair in range(width // 2):
            frequency = self.stretched(self.config.rotary_base ** (-2 * pair / width))
            turn = complex(math.cos(position * frequency), math.sin(position * frequency))
            i, j = (pair, pair + width // 2) if self.config.rotary == "half" else (2 * pair, 2 * pair + 1)
            turned = complex(x[i], x[j]) * turn
            out[i], out[j] = turned.real, turned.imag
        return out

    def stretched(self, frequency: float) -> float:
        scaling = self.config.rotary_scaling
        if scaling is None:
            return frequency
        turns = scaling.original_positions * frequency / (2 * math.pi)
        if turns < scaling.low_frequency_factor:
            return frequency / scaling.factor
        if turns > scaling.high_frequency_factor:
            return frequency
        span = scaling.high_frequency_factor - scaling.low_frequency_factor
        keep = (turns - scaling.low_frequency_factor) / span
        return frequency * (keep + (1 - keep) / scaling.factor)


def naive_rule(text: str) -> Stop:
    """An exit rule from its text, judged afresh from everything that was seen of a token."""
    name, _, argument = text.partition(":")
    if name == "patience":
        count, _, inner = argument.partition(":")
        fires = naive_rule(inner)

        def patient(place: int, row: Row) -> bool:
            loops = len(row.states) - 1
            recent = [
                Row(row.states[: loop + 1], row.hazards[:loop], row.logits[:loop])
                for loop in range(max(loops - int(count), 0) + 1, loops + 1)
            ]
            return len(recent) == int(count) and all(fires(place, past) for past in recent)

        return patient
    if name == "budget":
        mean, _, inner = argument.partition(":")
        fires, ran = naive_rule(inner), {}

        def thrifty(place: int, row: Row) -> bool:
            ran[place] = len(row.states) - 1
            return fires(place, row) or float(mean) * len(ran) - sum(ran.values()) < 1

        return thrifty
    threshold = float(argument)

    def stop(place: int, row: Row) -> bool:
        loops = len(row.states) - 1
        steps = [after - before for before, after in pairwise(row.states)]
        turns = [np.linalg.norm(after - before) for before, after in pairwise(steps)]
        chances = [np.exp(logits - np.max(logits)) for logits in row.logits]
        chances = [chance / chance.sum() for chance in chances]
        entropies = [-float(np.sum(chance * np.log(chance))) for chance in chances]
        match name:
            case "fixed":
                return loops >= threshold
            case "hazard":
                return threshold < 1 and 1 - math.prod(1 - hazard for hazard in row.hazards) >= threshold
            case "delta":
                return float(np.linalg.norm(steps[-1]) / np.linalg.norm(row.states[-1])) < threshold
            case "second-difference":
                return len(turns) > 1 and max(turns[-2:]) < threshold
            case "kl":
                before = chances[-2] if loops > 1 else np.full_like(chances[-1], 1 / len(chances[-1]))
                return float(np.sum(before * np.log(before / chances[-1]))) < threshold
            case "entropy":
                return loops > 1 and abs(entropies[-1] - entropies[-2]) < threshold
            case "stable":
                best = [int(np.argmax(logits)) for logits in row.logits[-int(threshold) - 1 :]]
                return loops > threshold and len(set(best)) == 1
            case "certainty":
                return 1 - entropies[-1] / math.log(len(chances[-1])) >= threshold
        raise ValueError(text)

    return stop
