"""Plane policies straight from their definitions, over one sequence; no plane is ever overwritten here.

Everything that was written is kept by (layer, loop, token). A reader at loop d finds, of what a token has written so
far, the newest among the loops that share d's plane; if there is none, the newest of all. Tests load this with
`runpy.run_path`, because test folders are no packages.
"""

import runpy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from loopwise.engine.sampling import Sampling, choose
from loopwise.models.looped_lm import LoopedLM

_naive = runpy.run_path(str(Path(__file__).parents[1] / "models" / "naive_lm.py"))
NaiveLM, Row, naive_rule = _naive["NaiveLM"], _naive["Row"], _naive["naive_rule"]


@dataclass(frozen=True)
class Answer:
    tokens: tuple[int, ...]
    loops: tuple[int, ...]
    logprobs: tuple[float, ...]


class NaivePlanes(NaiveLM):  # type: ignore[misc,valid-type]
    """Answers one prompt under any policy."""

    def __init__(self, model: LoopedLM, policy: str) -> None:
        super().__init__(model)
        self.name, *rest = policy.split(":")
        self.one_by_one = rest[-1:] == ["per_position"]
        self.period = int(rest[0]) if self.name == "modulo" else 0

    def answer(self, prompt: Sequence[int], sampling: Sampling) -> Answer:
        loops = sampling.max_loops or self.config.loops
        stop = naive_rule(sampling.exit) if sampling.exit else None
        self.planes, self.written, self.prompt = {}, {}, len(prompt)
        self.first = [0] * (len(prompt) + sampling.max_tokens)
        tokens = list(prompt)
        prediction, depth = self.read_prompt(prompt, loops, sampling.start), loops
        depths: list[int] = []
        logprobs: list[float] = []
        for _ in range(sampling.max_tokens):
            if depths:
                prediction, depth = self.decode(tokens[-1], len(tokens) - 1, loops, stop, sampling)
            chances = np.exp(prediction - prediction.max())
            tokens.append(choose(torch.from_numpy(prediction), sampling, position=len(tokens), seen=tokens))
            depths.append(depth)
            logprobs.append(float(np.log(chances[tokens[-1]] / chances.sum())))
        return Answer(tuple(tokens[len(prompt) :]), tuple(depths), tuple(logprobs))

    def read_prompt(self, prompt: Sequence[int], loops: int, start: object) -> np.ndarray:
        injected, states = [], []
        if not self.one_by_one:
            injected = [self.begin(token, place) for place, token in enumerate(prompt)]
            states = [self.start(e, place, place, start) for place, e in enumerate(injected)]
            for loop in range(1, loops + 1):
                states = [self.loop(s, injected[i], i, i, loop) for i, s in enumerate(states)]
            return [self.readout(state, place, place) for place, state in enumerate(states)][-1]
        for place, token in enumerate(prompt):
            mine = self.begin(token, place)
            state = self.start(mine, place, place, start)
            for loop in range(1, loops + 1):
                state = self.loop(state, mine, place, place, loop)
            prediction = self.readout(state, place, place)
        return prediction

    def decode(self, token: int, place: int, loops: int, stop, sampling: Sampling) -> tuple[np.ndarray, int]:  # type: ignore[no-untyped-def]
        injected = self.begin(token, place)
        state = self.start(injected, place, place, sampling.start)
        row = Row([state])
        for loop in range(1, loops + 1):
            state = self.loop(state, injected, place, place, loop)
            row.states.append(state)
            if self.config.gate:
                row.hazards.append(self.hazard(state))
            row.logits.append(self.readout(state, place, place))
            fired = stop is not None and stop(place, row) and loop >= sampling.min_loops
            if fired or loop == loops:
                break
        if self.name == "per_loop":
            filler = state
            for rest in range(loop + 1, loops + 1):
                filler = self.loop(filler, injected, place, place, rest)
        return row.logits[-1], loop

    def begin(self, token: int, place: int) -> np.ndarray:
        state = self.weights["embed.weight"][token] * self.config.embed_scale
        for layer in range(self.config.prelude_layers):
            state = self.block(f"prelude.{layer}", state, place, place, 0)
        return state

    def loop(self, state: np.ndarray, injected: np.ndarray, place: int, position: int, loop: int) -> np.ndarray:
        self.written[place] = loop
        return super().loop(state, injected, place, position, loop)

    def plane(self, name: str, loop: int, place: int, other: int) -> tuple[np.ndarray, np.ndarray]:
        if loop == 0:
            return self.planes[name, 0, other]
        newest = self.written[other]
        if self.name == "average":
            seen = [self.planes[name, one, other] for one in range(1, newest + 1)]
            return sum(k for k, _ in seen) / newest, sum(v for _, v in seen) / newest
        shared = [one for one in range(1, newest + 1) if self.share(one, loop, place, other)]
        return self.planes[name, shared[-1] if shared else newest, other]

    def share(self, one: int, two: int, reader: int, writer: int) -> bool:
        """Whether loops `one` and `two` of `writer` have one plane, as `reader` sees it."""
        match self.name:
            case "per_loop" | "last_exited":
                return one == two
            case "single":
                return True
            case "first_then_shared":
                return (one == 1) == (two == 1)
            case "modulo":
                return (one - two) % self.period == 0
            case "decode_shared":
                return writer >= self.prompt or one == two
            case "collapse":
                return reader >= self.prompt or one == two
        raise ValueError(self.name)
