"""What somebody asks of a language model, seen to before anything runs: settings and prompts."""

import operator
from collections.abc import Sequence
from dataclasses import dataclass

from loopwise.engine.depth import PromptDepth, check_prompt_depth, check_rule_in_prompts
from loopwise.engine.sampling import Sampling
from loopwise.errors import ConfigError, InputError
from loopwise.loops.drivers import bind_rule
from loopwise.loops.exits import ExitRule
from loopwise.memory.dense import DensePolicy, check_policy
from loopwise.models.looped_lm import LoopedLM, need_language_model


@dataclass(frozen=True, kw_only=True)
class Checked:
    """Settings that this model can serve, with every default filled in."""

    rule: ExitRule
    policy: DensePolicy
    max_loops: int
    prompt_depth: PromptDepth


def check_sampling(
    model: LoopedLM, sampling: Sampling, *, policy: str | None = None, prompt_depth: str = "full"
) -> Checked:
    """See whether this model can serve these settings; nothing is run.

    Raises:
        ConfigError, InputError: as `generate` would.
    """
    need_language_model(
        model, instead="to ask it, type: loopwise.run_until(model, model.encode(inputs), rule, max_loops=...)"
    )
    max_loops = sampling.max_loops or model.config.loops
    if sampling.min_loops > max_loops:
        raise ConfigError(f"min_loops={sampling.min_loops}: allowed is 1 to max_loops={max_loops}")
    if sampling.stop and model.tokenizer is None:
        raise InputError(f"stop={sampling.stop} is text, but this checkpoint has no tokenizer.json; leave it out")
    if isinstance(sampling.start, int) and model.config.start != "normal":
        raise ConfigError(f'start={sampling.start}: this model starts from {model.config.start}; allowed is "zero"')
    rule = bind_rule(model, sampling.exit or f"fixed:{max_loops}", sequential=True)
    depth = check_prompt_depth(prompt_depth)
    if depth == "exit":
        check_rule_in_prompts(model, rule)
    return Checked(
        rule=rule,
        policy=check_policy(policy or ("last_exited" if sampling.exit else "per_loop")),
        max_loops=max_loops,
        prompt_depth=depth,
    )


def encode_prompt(model: LoopedLM, prompt: str | Sequence[int]) -> tuple[int, ...]:
    """A prompt as token ids that this model can read, with room for an answer.

    Raises:
        InputError: empty, too long, text without a tokenizer, or ids outside the vocabulary.
    """
    if isinstance(prompt, str):
        if model.tokenizer is None:
            raise InputError("the prompt is text, but this checkpoint has no tokenizer.json; give token ids")
        ids = tuple(model.tokenizer.encode(prompt, add_special=True))
    else:
        ids = _whole_numbers(prompt)
    if not ids:
        raise InputError("the prompt is empty; give at least one token")
    wrong = [token for token in ids if not 0 <= token < model.config.vocab_size]
    if wrong:
        raise InputError(
            f"token id {wrong[0]} is not in the model's vocabulary; ids run from 0 to {model.config.vocab_size - 1}"
        )
    if len(ids) >= model.config.max_positions:
        raise InputError(
            f"the prompt has {len(ids)} tokens; the context holds {model.config.max_positions}, one of them for the "
            "answer: shorten the prompt"
        )
    return ids


def _whole_numbers(prompt: Sequence[int]) -> tuple[int, ...]:
    try:
        given = tuple(prompt)
    except TypeError:
        raise InputError(
            f"{prompt!r} is no prompt: a prompt is a text or a list of token ids, and generate takes a list of "
            "prompts, such as [[1, 2, 3]]"
        ) from None
    ids = []
    for token in given:
        try:
            ids.append(operator.index(token))
        except TypeError:
            raise InputError(f"{token!r} is no token id; ids are whole numbers") from None
    return tuple(ids)
