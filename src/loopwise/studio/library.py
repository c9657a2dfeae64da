"""What is open in the studio: models with an engine each, traces, runs and grids.

A model is loaded when it is first used. An answer is made by the engine, so what is shown is what a server would have
said; its trace is recorded afterwards by running the finished text once more through every loop.
"""

import itertools
import json
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from loopwise.engine.answer import Completion
from loopwise.engine.checks import encode_prompt
from loopwise.engine.engine import Engine
from loopwise.engine.ladder import read_ladder
from loopwise.engine.record import record_trace
from loopwise.engine.sampling import Sampling
from loopwise.engine.ticket import Ticket
from loopwise.errors import ConfigError, InputError, NotFoundError
from loopwise.hub.checkpoints import load
from loopwise.hub.locate import SHIPPED
from loopwise.loops.drivers import unroll
from loopwise.models.accounting import count_flops, count_parameters, kv_bytes
from loopwise.models.looped_lm import LoopedLM
from loopwise.studio.glyphs import visible
from loopwise.studio.paths import state_paths
from loopwise.studio.wire import wire
from loopwise.trace import LoopTrace

KEPT = 24
"""Traces that stay open; the oldest leaves first."""


class OpenModel:
    """One checkpoint: loaded on first use, with an engine that a thread of its own drives."""

    def __init__(self, name: str, source: str, *, policy: str, memory: str) -> None:
        self.name = name
        self.source = source
        self.policy = policy
        self._memory = memory
        self._opening = threading.Lock()
        self._model: LoopedLM | None = None
        self._engine: Engine | None = None

    @property
    def model(self) -> LoopedLM:
        """The weights."""
        with self._opening:
            if self._model is None:
                model = load(self.source)
                # A CPU multiplies half-width numbers slowly.
                self._model = model.float().eval() if model.embed.weight.device.type == "cpu" else model.eval()
            return self._model

    @property
    def engine(self) -> Engine:
        """What answers prompts."""
        model = self.model
        with self._opening:
            if self._engine is None:
                self._engine = Engine(model, policy=self.policy, memory=self._memory).__enter__()
            return self._engine

    def close(self) -> None:
        """Stop the engine's thread."""
        with self._opening:
            if self._engine is not None:
                self._engine.__exit__(None, None, None)
                self._engine = None

    def facts(self) -> dict[str, Any]:
        """What the page says about it before anything is asked."""
        model = self.model
        config = model.config
        return {
            "name": self.name,
            "loops": config.loops,
            "trained_loops": list(model.facts.trained_loops),
            "signal": model.facts.signal,
            "policy": self.policy,
            "parameters": count_parameters(config).stored,
            "max_positions": config.max_positions,
            "random_start": model.facts.random_start,
            "text": model.tokenizer is not None,
            "lens": "coda lens" if len(model.coda) else "logit lens",
            "ladder": read_ladder(model).facts(),
        }


@dataclass(kw_only=True)
class Shown:
    """A trace that is open, and what else is known about it."""

    trace: LoopTrace
    extra: dict[str, Any] = field(default_factory=dict)
    """What the page draws beside the trace itself: `paths`, `costs`, `lens`, where they are known."""
    drawn: bytes | None = None
    """All of it as JSON, once somebody asked."""


class Library:
    """Everything that was named on the command line, and what was made of it since.

    Args:
        paths: checkpoints (folders, hub ids, `shipped`), run folders, trace files (`loopwise generate --trace`), grid
            files (`loopwise study grid`).
        policy: the plane policy of the engines.
        memory: what each engine may hold.

    Raises:
        NotFoundError: something that is none of these.
        CheckpointError: a broken file.
    """

    def __init__(self, paths: Sequence[str], *, policy: str = "last_exited", memory: str = "1GiB") -> None:
        self.models: dict[str, OpenModel] = {}
        self.runs: dict[str, Path] = {}
        self.grids: dict[str, Path] = {}
        self._traces: OrderedDict[str, Shown] = OrderedDict()
        self._numbers = itertools.count(1)
        self._changing = threading.Lock()
        self._recording = threading.Lock()
        for path in paths or [SHIPPED]:
            self._open(path, policy, memory)

    def _open(self, path: str, policy: str, memory: str) -> None:
        here = Path(path).expanduser()
        name = path if path == SHIPPED or not here.exists() else here.resolve().name
        if here.is_file() and here.suffix == ".json":
            self.grids[_free(name, self.grids)] = here
        elif here.is_file():
            trace = LoopTrace.load(here)
            self.keep(Shown(trace=trace, extra=_known(trace)))
        elif here.is_dir() and (here / "metrics.jsonl").is_file():
            self.runs[_free(name, self.runs)] = here
            if (here / "model" / "config.json").is_file():
                name = _free(name, self.models)
                self.models[name] = OpenModel(name, path, policy=policy, memory=memory)
        elif here.is_dir() or path == SHIPPED or path.count("/") == 1:
            name = _free(name, self.models)
            self.models[name] = OpenModel(name, path, policy=policy, memory=memory)
        else:
            raise NotFoundError(
                f"{path}: there is no such file or folder; give a checkpoint, a run folder, a trace (.safetensors) "
                "or a grid (.json)"
            )

    def close(self) -> None:
        """Stop every engine."""
        for model in self.models.values():
            model.close()

    def model(self, name: str) -> OpenModel:
        """An open model by its name.

        Raises:
            NotFoundError: there is none of this name.
        """
        if name not in self.models:
            raise NotFoundError(f"no model {name!r} is open; open are: {', '.join(self.models) or 'none'}")
        return self.models[name]

    def shown(self, key: str) -> Shown:
        """An open trace by its key.

        Raises:
            NotFoundError: it was never there, or has left since.
        """
        with self._changing:
            if key not in self._traces:
                raise NotFoundError(f"trace {key!r} is not open any more; run its prompt again")
            return self._traces[key]

    def keep(self, shown: Shown) -> str:
        """Keep a trace open; returns its key."""
        with self._changing:
            key = str(next(self._numbers))
            self._traces[key] = shown
            while len(self._traces) > KEPT:
                self._traces.popitem(last=False)
            return key

    def traces(self) -> list[dict[str, str]]:
        """Key and title of every open trace, oldest first."""
        with self._changing:
            return [{"key": key, "title": one.trace.title or one.trace.model} for key, one in self._traces.items()]

    def submit(self, name: str, prompt: str, sampling: Sampling) -> Ticket:
        """Ask a model; its tokens come with hazards (if it has a gate), drafts marked as provisional."""
        opened = self.model(name)
        return opened.engine.submit(prompt, sampling, signals=opened.model.facts.signal is not None, provisional=True)

    def record_answer(self, name: str, sampling: Sampling, completion: Completion) -> str:
        """The trace of a finished answer; returns its key."""
        opened = self.model(name)
        tokens = [*completion.prompt, *completion.tokens]
        return self._record(
            opened,
            tokens,
            prompt_length=len(completion.prompt),
            loops=completion.loops,
            sampling=sampling,
            title=f"{opened.name}: an answer",
        )

    def record_text(self, name: str, text: str, sampling: Sampling) -> str:
        """The trace of a text that is only read; returns its key."""
        opened = self.model(name)
        tokens = encode_prompt(opened.model, text)
        if len(tokens) < 2:
            raise InputError("a text of one token leaves nothing to predict; give a longer one")
        return self._record(
            opened, tokens, prompt_length=1, loops=None, sampling=sampling, title=f"{opened.name}: reading"
        )

    def _record(
        self,
        opened: OpenModel,
        tokens: Sequence[int],
        *,
        prompt_length: int,
        loops: Sequence[int] | None,
        sampling: Sampling,
        title: str,
    ) -> str:
        model, most = opened.model, sampling.max_loops or opened.model.config.loops
        with self._recording:
            trace = record_trace(
                model,
                tokens,
                prompt_length=prompt_length,
                loops=loops,
                max_loops=most,
                min_loops=sampling.min_loops,
                start=sampling.start,
                rule=sampling.exit,
                policy=opened.policy,
                keep_states=True,
                title=title,
                name=opened.name,
            )
            costs = measure_costs(model, tokens, loops=most, start=sampling.start, policy=opened.policy)
        lens = "coda lens" if len(model.coda) else "logit lens"
        return self.keep(Shown(trace=trace, extra=_known(trace) | {"costs": costs, "lens": lens}))

    def wire(self, key: str) -> bytes:
        """An open trace as the page draws it, JSON; made once."""
        shown = self.shown(key)
        if shown.drawn is None:
            shown.drawn = json.dumps(finite(self._facts(key, shown)), separators=(",", ":")).encode()
        return shown.drawn

    def _facts(self, key: str, shown: Shown) -> dict[str, Any]:
        trace = shown.trace
        facts = {
            "key": key,
            "title": trace.title or trace.model,
            "model": trace.model,
            "rule": trace.rule,
            "policy": trace.policy,
            "prompt_length": trace.prompt_length,
            "texts": [visible(text) for text in trace.texts],
        }
        return facts | wire(trace) | shown.extra

    def grid(self, name: str) -> dict[str, Any]:
        """A grid file's content.

        Raises:
            NotFoundError: there is no such grid.
            InputError: the file is not one.
        """
        if name not in self.grids:
            raise NotFoundError(f"no grid {name!r} is open; open are: {', '.join(self.grids) or 'none'}")
        try:
            content = json.loads(self.grids[name].read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(
                f"{self.grids[name]} is not a grid file ({error}); make one with: loopwise study grid"
            ) from None
        if not isinstance(content, dict):
            raise InputError(f"{self.grids[name]} is not a grid file; make one with: loopwise study grid")
        return content


@torch.no_grad()
def measure_costs(
    model: LoopedLM, tokens: Sequence[int], *, loops: int, start: Any, policy: str
) -> dict[str, list[float]]:
    """What each fixed depth costs per token: estimated operations, bytes of keys and values, measured seconds.

    The seconds are those of reading this text in one pass on this machine: encode, r loops, readout and head.
    """
    config = model.config
    flops = count_flops(config, context=len(tokens))
    width = model.embed.weight.element_size()
    ids = torch.tensor([list(tokens)], device=model.embed.weight.device)
    marks: list[float] = []
    began = time.perf_counter()
    context = model.encode(ids)

    def mark(loop: int, state: torch.Tensor) -> None:
        if state.device.type == "cuda":
            torch.cuda.synchronize()
        marks.append(time.perf_counter())

    out = unroll(model, context, loops=loops, start=start, visit=mark)
    read = time.perf_counter()
    float(model.readout(out.state, context)[0, -1, 0])
    ending = time.perf_counter() - read
    depths = range(1, loops + 1)
    return {
        "flops": [flops.total(depth) for depth in depths],
        "kv_bytes": [
            kv_bytes(config, policy, loops=loops, mean_loops=depth, bytes_per_number=width) for depth in depths
        ],
        "seconds": [(mark - began + ending) / len(tokens) for mark in marks],
    }


def parse_sampling(given: dict[str, Any], opened: OpenModel) -> Sampling:
    """What the page asked for, as settings.

    Args:
        given: max_tokens, temperature, top_p, seed, exit, max_loops, min_loops; or effort instead of the last three.

    Raises:
        ConfigError: an unknown key or a value that is not allowed.
    """
    allowed = {"max_tokens", "temperature", "top_p", "seed", "exit", "max_loops", "min_loops", "effort"}
    for name in given:
        if name not in allowed:
            raise ConfigError(f"{name}: there is no such setting here; allowed are {', '.join(sorted(allowed))}")
    values = {name: value for name, value in given.items() if value is not None}
    effort = values.pop("effort", None)
    if effort is not None:
        if {"exit", "max_loops"} & set(values):
            raise ConfigError("effort already names exit and max_loops; give either it or them")
        rung = read_ladder(opened.model).rung(effort)
        values |= {"max_loops": rung.max_loops, "exit": rung.exit}
    kinds: dict[str, type | tuple[type, ...]] = {
        "max_tokens": int, "seed": int, "max_loops": int, "min_loops": int,
        "temperature": (int, float), "top_p": (int, float), "exit": (str, type(None)),
    }  # fmt: skip
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, kinds[name]):
            raise ConfigError(f"{name}={value!r}: this is not what {name} takes")
    most = opened.model.facts.trained_loops[1]
    if (values.get("max_loops") or 1) > most:
        raise ConfigError(f"max_loops={values['max_loops']}: this model was trained with at most {most} loops")
    return Sampling(**values)


def _known(trace: LoopTrace) -> dict[str, Any]:
    return {} if trace.states is None else {"paths": state_paths(trace)}


def _free(name: str, taken: dict[str, Any]) -> str:
    for number in itertools.count(2):
        if name not in taken:
            return name
        name = f"{name.rsplit(' (', 1)[0]} ({number})"
    raise AssertionError


def finite(values: Any) -> Any:
    """Numbers as JSON can carry them: NaN and infinities become null."""
    if isinstance(values, dict):
        return {str(key): finite(value) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return [finite(value) for value in values]
    if isinstance(values, float | np.floating):
        return float(values) if np.isfinite(values) else None
    return values
