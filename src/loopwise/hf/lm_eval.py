"""lm-evaluation-harness on looped models: every loop scored in one pass.

    results = evaluate_loops(model, ["arc_easy"], loops=(1, 2, 4))      # {1: ..., 2: ..., 4: ...}
    simple_evaluate(model=LoopedEvalModel(model, loops=(1, 2, 4)).at(2), tasks=["arc_easy"])

Axes: R loops that are read, B batch, T tokens, M scored tokens, D width, V vocabulary.
"""

import copy
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from loopwise.engine.sampling import Sampling
from loopwise.engine.write import generate
from loopwise.errors import ConfigError, InputError, MissingExtraError
from loopwise.hub.chat_template import render
from loopwise.hub.checkpoints import load
from loopwise.hub.tokenizer import Tokenizer
from loopwise.loops.drivers import check_loops, unroll
from loopwise.models.looped_lm import LoopedLM

try:
    import lm_eval
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError:
    raise MissingExtraError("lm-eval", "eval") from None

_HEAD_ROWS = 512
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "seed", "exit", "min_loops")
_GENERATION = ("until", "max_gen_toks", "do_sample", "num_loops", *_SAMPLING)
_RESERVED = ("model", "model_args", "use_cache", "device", "batch_size")


@dataclass(frozen=True, kw_only=True)
class LoopScores:
    """One continuation, scored after each loop that is read."""

    logprobs: tuple[float, ...]
    """Log-probability of the whole continuation in nats."""
    greedy: tuple[bool, ...]
    """Whether each of its tokens is the likeliest."""


class LoopedEvalModel(TemplateLM):
    """A looped model as lm-eval's `LM`: it scores a request at all of `loops` at once and answers with one of them.

    What was scored is kept, so that `at(loop)` answers the same requests for another loop without running the model.

    Args:
        model: a `LoopedLM`, a `LoopedForCausalLM` (with adapters or without), a folder or a hub id.
        loops: the loops to read.
        report: the loop to answer with; None for the last of `loops`.
        batch_size: sequences that run together.
        tokenizer: None for the model's own.
        add_bos: begin every text with the bos id. Give it to models that were trained so.
        chat: special tokens in prompts are recognised, as the chat template writes them; goes with
            `apply_chat_template=True` of `simple_evaluate`.

    Raises:
        ConfigError: for loops that make no sense, or without a tokenizer.
    """

    def __init__(
        self,
        model: object,
        *,
        loops: Sequence[int] | None = None,
        report: int | None = None,
        batch_size: int = 8,
        tokenizer: Tokenizer | None = None,
        add_bos: bool = False,
        chat: bool = False,
    ) -> None:
        super().__init__()
        self.model = _looped(model)
        self.loops = tuple(sorted({self.model.config.loops} if loops is None else set(loops)))
        if not self.loops or batch_size < 1:
            raise ConfigError(f"loops={self.loops}, batch_size={batch_size}: give one loop or more, and 1 or more rows")
        for loop in self.loops:
            check_loops(self.model, loop)
        self.report = self._checked(self.loops[-1] if report is None else report)
        self.batch_size = batch_size
        found = self.model.tokenizer if tokenizer is None else tokenizer
        if found is None:
            raise ConfigError("this checkpoint has no tokenizer.json; give tokenizer=loopwise.Tokenizer...")
        if found is not self.model.tokenizer:
            # The generator reads the model's; the caller's own model keeps what it has.
            self.model = copy.copy(self.model)
            self.model.tokenizer = found
        self.tokenizer = found
        self.add_bos = add_bos
        self.chat = chat
        self.passes = 0
        """Batches that went through the model."""
        self._scores: dict[bytes, LoopScores] = {}

    def at(self, loop: int) -> "LoopedEvalModel":
        """The same model, and the same scores, answering with another of its loops."""
        other = copy.copy(self)
        other.report = self._checked(loop)
        return other

    def _checked(self, loop: int) -> int:
        if loop not in self.loops:
            raise ConfigError(f"loop {loop} is not read; allowed are {', '.join(map(str, self.loops))}")
        return loop

    @property
    def device(self) -> torch.device:
        return self.model.embed.weight.device

    @property
    def max_length(self) -> int:
        """Tokens of context."""
        return self.model.config.max_positions

    @property
    def eot_token_id(self) -> int:
        """The id that ends a text.

        Raises:
            ConfigError: when the tokenizer has none.
        """
        if self.tokenizer.eos_id is None:
            raise ConfigError("this tokenizer has no eos id; give it one in tokenizer_config.json")
        return self.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has no context."""
        return self.eot_token_id if self.tokenizer.bos_id is None else self.tokenizer.bos_id

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.digest

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval writes beside the results."""
        origin = self.model.origin
        return {
            "model_name": str(origin.folder) if origin is not None and origin.folder is not None else "in memory",
            "num_loops": self.report,
        }

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **options: Any) -> list[int]:
        if options:
            raise ConfigError(f"tok_encode does not take {', '.join(options)}")
        ids = self.tokenizer.encode(string, parse_special=self.chat)
        bos = self.tokenizer.bos_id
        if self.add_bos and add_special_tokens is not False and bos is not None and ids[:1] != [bos]:
            return [bos, *ids]
        return ids

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        if not self.chat or self.tokenizer.chat_template is None:
            raise ConfigError("chat prompts need a tokenizer with a chat template, and LoopedEvalModel(..., chat=True)")
        ids = {"bos_token": self.tokenizer.bos_id, "eos_token": self.tokenizer.eos_id}
        return render(
            self.tokenizer.chat_template,
            chat_history,
            generation_prompt=add_generation_prompt,
            variables={name: self.tokenizer.pieces([index])[0] for name, index in ids.items() if index is not None},
        )

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        windows: list[tuple[list[int], list[int]]] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            (text,) = request.args
            parts = get_rolling_token_windows(
                token_list=self.tok_encode(text, add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for context, continuation in map(make_disjoint_window, parts):
                windows.append((context, continuation))
                owners.append(number)
        totals = [0.0] * len(requests)
        place = self.loops.index(self.report)
        for owner, scores in zip(owners, self.score(windows), strict=True):
            totals[owner] += scores.logprobs[place]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        place = self.loops.index(self.report)
        scored = self.score([(context, continuation) for _, context, continuation in requests])
        answers = [(scores.logprobs[place], scores.greedy[place]) for scores in scored]
        for (texts, _, _), answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def score(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[LoopScores]:
        """Score continuations (ids) after contexts (ids, at least one) at every loop that is read.

        The oldest tokens of a context that is too long are dropped.

        Raises:
            InputError: for an empty context, or a continuation longer than the model's context.
        """
        for context, continuation in pairs:
            if not context or not 1 <= len(continuation) <= self.max_length:
                raise InputError(
                    f"a context of {len(context)} tokens and a continuation of {len(continuation)}: allowed are 1 or "
                    f"more, and 1 to {self.max_length}"
                )
        keys = [_key(context, continuation) for context, continuation in pairs]
        waiting = {key: pair for key, pair in zip(keys, pairs, strict=True) if key not in self._scores}
        # Sequences of like length share a batch; the longest come first, so that what is too big fails at once.
        ordered = sorted(waiting, key=lambda key: -len(waiting[key][0]) - len(waiting[key][1]))
        for first in range(0, len(ordered), self.batch_size):
            batch = ordered[first : first + self.batch_size]
            self._scores.update(zip(batch, self._run([waiting[key] for key in batch]), strict=True))
        return [self._scores[key] for key in keys]

    @torch.inference_mode()
    def _run(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[LoopScores]:
        """Score one batch. Padding stands on the right, where causal attention never looks."""
        self.passes += 1
        sequences: list[list[int]] = []
        scored: list[tuple[int, int, int]] = []
        for number, (before, continuation) in enumerate(pairs):
            whole = [*before, *continuation][-(self.max_length + 1) :]
            sequences.append(whole[:-1])
            begin = len(whole) - len(continuation)
            scored += [(number, column - 1, whole[column]) for column in range(begin, len(whole))]
        longest = max(map(len, sequences))
        tokens = torch.tensor([sequence + [0] * (longest - len(sequence)) for sequence in sequences])
        context = self.model.encode(tokens.to(self.device))
        row, column, wanted = torch.tensor(scored, device=self.device).unbind(1)
        found: list[_TokenScores] = []

        def read(loop: int, state: Tensor) -> None:
            if loop in self.loops:
                found.append(_read(self.model.read(state, context)[row, column], self.model.head_weight, wanted))

        unroll(self.model, context, loops=self.loops[-1], visit=read)
        sums = torch.zeros(len(found), len(pairs), dtype=torch.float64, device=self.device)
        misses = torch.zeros_like(sums)
        for place, scores in enumerate(found):
            sums[place].index_add_(0, row, scores.logprobs.double())
            misses[place].index_add_(0, row, (~scores.greedy).double())
        logprobs, greedy = sums.T.tolist(), (misses == 0).T.tolist()
        return [LoopScores(logprobs=tuple(p), greedy=tuple(g)) for p, g in zip(logprobs, greedy, strict=True)]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Generated text, with the reported loop as `max_loops` unless the request says `num_loops`.

        A task's generation_kwargs may hold `until`, `max_gen_toks`, `do_sample`, `temperature`, `top_k`, `top_p`,
        `min_p`, `seed`, and the dials `num_loops`, `min_loops` and `exit` (an exit rule such as "hazard:0.6").

        Raises:
            ConfigError: for any other key.
        """
        together: dict[Sampling, list[int]] = {}
        for place, request in enumerate(requests):
            together.setdefault(self._sampling(request.args[1]), []).append(place)
        texts = [""] * len(requests)
        for sampling, places in together.items():
            room = max(1, self.max_length - sampling.max_tokens)
            for first in range(0, len(places), self.batch_size):
                batch = places[first : first + self.batch_size]
                prompts = [self.tok_encode(requests[place].args[0]) or [self.prefix_token_id] for place in batch]
                done = generate(self.model, [ids[-room:] for ids in prompts], sampling)
                for place, answer in zip(batch, done, strict=True):
                    texts[place] = answer.text or ""
                    self.cache_hook.add_partial("generate_until", requests[place].args, texts[place])
        return texts

    def _sampling(self, given: Mapping[str, Any]) -> Sampling:
        unknown = sorted(set(given) - set(_GENERATION))
        if unknown:
            raise ConfigError(f"generation_kwargs {', '.join(unknown)}: allowed are {', '.join(_GENERATION)}")
        until = given.get("until") or ()
        temperature = float(given.get("temperature") or 0.0)
        samples = given.get("do_sample", temperature > 0)
        return Sampling(
            max_tokens=given.get("max_gen_toks", 256),
            stop=tuple(stop for stop in ([until] if isinstance(until, str) else until) if stop),
            max_loops=given.get("num_loops", self.report),
            **{key: given[key] for key in _SAMPLING if key != "temperature" and given.get(key) is not None},
            temperature=(temperature or 1.0) if samples else 0.0,
        )


def evaluate_loops(
    model: object,
    tasks: Sequence[Any],
    *,
    loops: Sequence[int],
    batch_size: int = 8,
    tokenizer: Tokenizer | None = None,
    add_bos: bool = False,
    chat: bool = False,
    **options: Any,
) -> dict[int, Any]:
    """`lm_eval.simple_evaluate` at several loops; scored requests run through the model once for all of them.

    Generated text differs from loop to loop, so it is generated once for each.

    Args:
        model: see `LoopedEvalModel`, also for the arguments that follow `loops`.
        tasks: what `simple_evaluate` takes.
        options: its other arguments (`task_manager`, `limit`, `num_fewshot`, `apply_chat_template`, ...).

    Returns:
        Loop to what `simple_evaluate` returns.

    Raises:
        ConfigError: for an argument that would mix the loops up.
    """
    clash = sorted(set(options) & set(_RESERVED))
    if clash:
        raise ConfigError(f"evaluate_loops does not take {', '.join(clash)}: it passes one model and keeps its scores")
    scorer = LoopedEvalModel(model, loops=loops, batch_size=batch_size, tokenizer=tokenizer, add_bos=add_bos, chat=chat)
    return {loop: lm_eval.simple_evaluate(model=scorer.at(loop), tasks=list(tasks), **options) for loop in scorer.loops}


@dataclass(frozen=True, kw_only=True)
class _TokenScores:
    logprobs: Float[Tensor, " scored"]
    greedy: Tensor


def _read(
    hidden: Float[Tensor, "scored width"], head: Float[Tensor, "vocab width"], wanted: Int[Tensor, " scored"]
) -> _TokenScores:
    """Log-probability of each wanted token and whether it is the likeliest, a stretch of rows at a time."""
    logprobs, greedy = [], []
    for rows, targets in zip(torch.split(hidden, _HEAD_ROWS), torch.split(wanted, _HEAD_ROWS), strict=True):
        logits = F.linear(rows, head)
        wide = torch.log_softmax(logits, dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))
        logprobs.append(wide.gather(1, targets[:, None])[:, 0])
        greedy.append(logits.argmax(-1) == targets)
    return _TokenScores(logprobs=torch.cat(logprobs), greedy=torch.cat(greedy))


def _key(context: Sequence[int], continuation: Sequence[int]) -> bytes:
    """A request, short: thousands of long contexts need not stay in memory."""
    return hashlib.blake2b(json.dumps([list(context), list(continuation)]).encode(), digest_size=16).digest()


def _looped(model: object) -> LoopedLM:
    if isinstance(model, str | Path):
        return load(model)
    if hasattr(model, "get_base_model"):
        model = model.get_base_model()
    found = model if isinstance(model, LoopedLM) else getattr(model, "model", None)
    if not isinstance(found, LoopedLM):
        raise ConfigError(f"{type(model).__name__} is no looped model; give a LoopedLM, a folder or a hub id")
    return found
