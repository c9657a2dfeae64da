"""Which drafts pay for a model: measured, and kept beside its weights."""

import json
import os
from pathlib import Path
from typing import Any

from loopwise.bench.engine import Load, ratios, serve, take_turns
from loopwise.engine.engine import Engine
from loopwise.engine.sampling import Sampling
from loopwise.engine.speculation import Speculation
from loopwise.errors import StorageError
from loopwise.hub.tokenizer_files import read_json
from loopwise.models.looped_lm import LoopedLM


def tune_drafts(model: LoopedLM, load: Load) -> dict[str, Any]:
    """Every first draft loop, read again at later loops or not, on one request at a time beside plain decoding.

    Args:
        load: `requests` prompts, `tokens` each, `rounds` turns.
    """
    prompts = load.prompts(model)
    sampling = Sampling(max_tokens=load.tokens, temperature=load.temperature, ignore_eos=True)
    ways = [
        Speculation(draft_loop=loop, redraft=again)
        for loop in range(1, model.config.loops)
        for again in (True, False)
        if again or loop < model.config.loops - 1
    ]
    options: dict[str, Any] = {"prefix_cache": False, "seats": 1}
    engines = {"off": Engine(model, "last_exited", speculate="off", **options)}
    engines |= {str(way): Engine(model, "last_exited", speculate=way, **options) for way in ways}
    sides = {name: (lambda engine=engine: serve(engine, prompts, sampling).seconds) for name, engine in engines.items()}
    times = take_turns(sides, load.rounds)
    found: dict[str, Any] = {name: ratios(times["off"], times[name]) for name in sides}
    # Ties go to the plainer way: a gain within the noise is none.
    best = max(found, key=lambda name: (round(found[name]["median"], 2), name == "off"))
    return {"speedup": found, "best": best}


def keep_drafts(model: LoopedLM, best: str) -> Path:
    """Write the best way into the checkpoint's generation_config.json, which `speculate="auto"` reads.

    Raises:
        StorageError: the model has no folder, or it cannot be written to.
    """
    folder = None if model.origin is None else model.origin.folder
    if folder is None:
        raise StorageError("this model has no folder to keep its drafts in; save it first")
    path = folder / "generation_config.json"
    raw = read_json(path)
    raw["loopwise"] = {**raw.get("loopwise", {}), "speculate": best}
    aside = path.with_suffix(".json.new")
    try:
        aside.write_text(json.dumps(raw, indent=2) + "\n")
        os.replace(aside, path)
    except OSError as error:
        raise StorageError(
            f"{path} cannot be written: {error.strerror}; convert the model to a folder of yours"
        ) from None
    return path
