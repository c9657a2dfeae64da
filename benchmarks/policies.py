"""What it costs to keep fewer planes of keys and values: every plane policy on text that the model has not seen.

    python benchmarks/policies.py [MODEL]    about 2 minutes on one core; MODEL is the shipped checkpoint by default

Each text is cut into a prompt and a continuation. The engine follows the continuation's own tokens (teacher forcing)
under each policy, and every prediction is compared with that of `per_loop`, the policy that the model was trained
with: the divergence KL(per_loop || policy) and the loss, in nats per token. `full` runs every loop; in `exits` every
policy runs the loops at which the learned gate stopped under `per_loop`, so that policies alone differ.
Spread: the standard error of the mean over texts.
"""

import json
import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from loopwise.engine.answer import Completion
from loopwise.engine.engine import Engine
from loopwise.engine.request import Replay
from loopwise.engine.sampling import Sampling
from loopwise.hub.checkpoints import load
from loopwise.hub.locate import SHIPPED
from loopwise.loops.planes import parse_policy
from loopwise.models.accounting import kv_bytes
from loopwise.models.looped_lm import LoopedLM
from loopwise.tasks.corpus import Corpus
from loopwise.train.machine import environment

RESULTS = Path(__file__).parent / "results" / "policies.json"
PROMPT, ANSWER, TEXTS = 64, 64, 48
MEAN = 2.5
"""Loops per token that `exits` aims at."""
SHARED = ("single", "average", "first_then_shared", "modulo:2", "modulo:3")
POLICIES = ("per_loop", "last_exited", "decode_shared", "collapse", *SHARED, *(f"{one}:per_position" for one in SHARED))
LETTERS = {"decode_shared": "A", "collapse": "B", "single": "B", "single:per_position": "C"}
"""The three procedures that all go by the name of sharing the last loop's keys and values."""


@dataclass(frozen=True)
class Text:
    """One passage, cut in two."""

    prompt: list[int]
    answer: tuple[int, ...]


def passages(model: LoopedLM, count: int, *, prompt: int = PROMPT, answer: int = ANSWER) -> list[Text]:
    """Passages from the middles of as many files, spread over the held-out part of Python's own library."""
    assert model.tokenizer is not None
    found: list[Text] = []
    length = prompt + answer
    for text in Corpus("python").part("validation"):
        tokens = model.tokenizer.encode(text, add_special=False)
        if len(tokens) >= 3 * length:
            first = len(tokens) // 3
            found.append(Text(tokens[first : first + prompt], tuple(tokens[first + prompt : first + length])))
    return found if len(found) <= count else [found[place * len(found) // count] for place in range(count)]


def follow(
    model: LoopedLM,
    policy: str,
    texts: Sequence[Text],
    *,
    rule: str | None = None,
    loops: Sequence[tuple[int, ...] | None] | None = None,
    chances: bool = False,
) -> list[Completion]:
    """The engine's answers, forced to be the texts' own."""
    whole = parse_policy(policy).chunk_invariant
    engine = Engine(
        model,
        policy,
        speculate="off",
        chunk=256 if whole else None,
        prefix_cache=False,
        max_loops=model.config.loops,
    )
    sampling = Sampling(
        max_tokens=ANSWER, ignore_eos=True, exit=rule, logprobs=model.config.vocab_size if chances else 0
    )
    recordings = [
        Replay(tokens=text.answer, loops=depths)
        for text, depths in zip(texts, loops or [None] * len(texts), strict=True)
    ]
    return engine.generate([text.prompt for text in texts], sampling, replays=recordings)


def log_chances(done: Completion) -> np.ndarray:
    """Log-probabilities of the whole vocabulary at each token, (T, V)."""
    table = np.empty((len(done.tokens), len(done.tops[0])))
    for row, pairs in zip(table, done.tops, strict=True):
        ids, logs = zip(*pairs, strict=True)
        row[list(ids)] = logs
    return table


def compare(
    model: LoopedLM, texts: Sequence[Text], loops: Sequence[tuple[int, ...] | None] | None
) -> dict[str, dict[str, Any]]:
    """Every policy beside `per_loop`, text by text."""
    kl: dict[str, list[float]] = {policy: [] for policy in POLICIES}
    loss: dict[str, list[float]] = {policy: [] for policy in POLICIES}
    turn = iter(range(len(texts)))
    # A few texts at a time: whole distributions are large.
    while part := list(islice(turn, 8)):
        mine = [texts[place] for place in part]
        depths = None if loops is None else [loops[place] for place in part]
        wanted: list[np.ndarray] = []
        for policy in POLICIES:
            answers = follow(model, policy, mine, loops=depths, chances=True)
            tables = [log_chances(answer) for answer in answers]
            wanted = wanted or tables
            for answer, got, right in zip(answers, tables, wanted, strict=True):
                kl[policy].append(float((np.exp(right) * (right - got)).sum(-1).mean()))
                loss[policy].append(-statistics.mean(answer.logprobs))
    rows = {}
    for policy in POLICIES:
        more = [mine - theirs for mine, theirs in zip(loss[policy], loss["per_loop"], strict=True)]
        rows[policy] = {
            "kl": statistics.mean(kl[policy]),
            "kl_error": standard_error(kl[policy]),
            "kl_worst_text": max(kl[policy]),
            "loss": statistics.mean(loss[policy]),
            "loss_more": statistics.mean(more),
            "loss_more_error": standard_error(more),
        }
    return rows


def standard_error(values: Sequence[float]) -> float:
    return statistics.stdev(values) / math.sqrt(len(values))


def gate_depths(model: LoopedLM, texts: Sequence[Text]) -> tuple[str, list[tuple[int, ...]]]:
    """The threshold whose mean comes nearest to what is asked for, and where tokens stop under it."""
    best: tuple[float, str, list[tuple[int, ...]]] = (math.inf, "", [])
    for hundredths in range(20, 96, 5):
        rule = f"hazard:{hundredths / 100:g}"
        depths = [answer.loops for answer in follow(model, "per_loop", texts, rule=rule)]
        off = abs(mean_loops(depths) - MEAN)
        if off < best[0]:
            best = (off, rule, depths)
    return best[1], best[2]


def mean_loops(depths: Sequence[tuple[int, ...]]) -> float:
    """Over the rows of answers; the first token comes from the prompt."""
    return statistics.mean(loops for one in depths for loops in one[1:])


def sizes(model: LoopedLM, policy: str, depths: Sequence[tuple[int, ...]]) -> dict[str, int]:
    """Bytes of keys and values for each token of a prompt, which runs every loop, and of an answer of these loops."""
    most, numbers = model.config.loops, model.embed.weight.dtype.itemsize

    def size(loops: int, *, generated: bool) -> float:
        return kv_bytes(
            model.config, policy, loops=most, mean_loops=loops, bytes_per_number=numbers, generated=generated
        )

    ran = [size(loops, generated=True) for one in depths for loops in one[1:]]
    return {
        "prompt_bytes": int(size(most, generated=False)),
        "answer_bytes": round(statistics.mean(ran or [size(most, generated=True)])),
    }


def tell(title: str, rows: dict[str, dict[str, Any]]) -> None:
    print(f"\n{title}\n{'policy':32}{'bytes: prompt':>15}{'answer':>9}{'KL':>18}{'loss':>9}{'more':>20}")
    for policy, row in rows.items():
        name = f"{policy} ({LETTERS[policy]})" if policy in LETTERS else policy
        print(
            f"{name:32}{row['prompt_bytes']:15,}{row['answer_bytes']:9,}{row['kl']:10.4f} ±{row['kl_error']:.4f}"
            f"{row['loss']:9.4f}{row['loss_more']:+12.4f} ±{row['loss_more_error']:.4f}"
        )


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else SHIPPED
    model = load(name, dtype="float32")
    texts = passages(model, TEXTS)
    rule = ""
    depths: list[tuple[int, ...]] = []
    if model.config.gate:
        rule, depths = gate_depths(model, texts)
    results: dict[str, Any] = {
        "model": name,
        "loops": model.config.loops,
        "texts": len(texts),
        "prompt_tokens": PROMPT,
        "answer_tokens": ANSWER,
        "full": compare(model, texts, None),
    }
    if rule:
        results |= {"rule": rule, "mean_loops": mean_loops(depths), "exits": compare(model, texts, depths)}
    for part, ran in (("full", []), ("exits", depths)):
        if part in results:
            results[part] = {policy: sizes(model, policy, ran) | row for policy, row in results[part].items()}
            tell(part, results[part])
    results["machine"] = environment()
    if name == SHIPPED:
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
