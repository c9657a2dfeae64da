"""Log-probabilities of an answer at the depths at which it was generated: differentiable, for reinforcement learning.

A generator records how many loops each token's row ran. Run again at exactly those depths, reading exactly those
planes, the model gives the generator's own log-probabilities, now with gradients; where a row stopped is held constant.

Axes: B batch, T tokens, G generated tokens, N rows, M generated tokens of the whole batch, D width, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from loopwise.errors import InputError
from loopwise.loops.drivers import check_loops
from loopwise.memory.dense import check_policy
from loopwise.memory.lockstep import LockstepMemory

if TYPE_CHECKING:
    from loopwise.models.looped_lm import LMContext, LoopedLM


def score(
    model: "LoopedLM",
    tokens: Int[Tensor, "*batch tokens"] | Sequence[int],
    loops: Int[Tensor, "*batch generated"] | Sequence[int],
    prompt_length: int | Int[Tensor, " batch"],
    *,
    policy: str = "per_loop",
    start_seed: int | Literal["zero"] | None = None,
    max_loops: int | None = None,
    prompt_loops: Int[Tensor, "*batch prompt"] | Sequence[int] | None = None,
    padding_mask: Bool[Tensor, "batch tokens"] | None = None,
) -> Float[Tensor, "*batch generated"]:
    """Raw log-probabilities (nats, in float32 or wider) of the generated tokens; see `LoopedLM.score`."""
    device = model.embed.weight.device
    tokens = torch.as_tensor(tokens, device=device)
    loops = torch.as_tensor(loops, device=device)
    prompt_loops = None if prompt_loops is None else torch.as_tensor(prompt_loops, device=device)
    for name, depths in (("loops", loops), ("prompt_loops", prompt_loops)):
        if depths is not None and depths.shape[:-1] != tokens.shape[:-1]:
            raise InputError(
                f"tokens are {list(tokens.shape)}, {name} {list(depths.shape)}: give both for the same sequences"
            )
    single = tokens.dim() == 1
    if single:
        tokens, loops = tokens[None], loops[None]
        prompt_loops = None if prompt_loops is None else prompt_loops[None]
    check_policy(policy)
    answers = _check(tokens, loops, prompt_length, max_loops, prompt_loops, padding_mask)
    check_loops(model, answers.max_loops)

    # The last token is read by nobody.
    mask = None if padding_mask is None else padding_mask[:, :-1]
    context = model.encode(tokens[:, :-1], padding_mask=mask)
    state = model.initial_state(context, start_seed)
    run = _run_filled if policy == "per_loop" else _run_skipped
    state = run(model, state, context, answers.exits)

    hidden = model.read(state, context)[answers.emits]
    logits = F.linear(hidden, model.head_weight)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    chosen = torch.log_softmax(wide, dim=-1).gather(-1, tokens[:, 1:][answers.emits][:, None])[:, 0]
    result = chosen.new_zeros(answers.made.shape).masked_scatter(answers.made, chosen)
    return result[0] if single else result


@dataclass(frozen=True, kw_only=True)
class _Answers:
    """Where the answers of a batch are."""

    max_loops: int
    exits: Int[Tensor, "batch rows"]
    """Loops that the row of each token but the last runs."""
    emits: Bool[Tensor, "batch rows"]
    """Which rows emitted a generated token, the one that follows them."""
    made: Bool[Tensor, "batch generated"]
    """Which entries of the result stand for a token."""


def _check(
    tokens: Int[Tensor, "batch tokens"],
    loops: Int[Tensor, "batch generated"],
    prompt_length: int | Int[Tensor, " batch"],
    max_loops: int | None,
    prompt_loops: Int[Tensor, "batch prompt"] | None,
    padding_mask: Bool[Tensor, "batch tokens"] | None,
) -> _Answers:
    real = torch.ones_like(tokens, dtype=torch.bool) if padding_mask is None else padding_mask
    prompts = torch.as_tensor(prompt_length, device=tokens.device).expand(len(tokens))
    made = real.sum(-1) - prompts
    if int(prompts.min()) < 1 or int(made.min()) < 1:
        raise InputError(
            f"prompt_length={prompts.tolist()} of {real.sum(-1).tolist()} tokens: allowed is 1 or more, and "
            "fewer than there are tokens"
        )
    if int(made.max()) != loops.shape[1]:
        raise InputError(
            f"loops has {loops.shape[1]} numbers for {int(made.max())} generated tokens; give one for each of them"
        )
    present = torch.arange(loops.shape[1], device=loops.device) < made[:, None]
    given = loops[present]
    if prompt_loops is not None:
        given = torch.cat([given, _of_prompts(prompt_loops, loops, prompts)])
    least, most = (int(bound) for bound in given.aminmax())
    deepest = most if max_loops is None else max_loops
    if least < 1 or most > deepest:
        raise InputError(f"loops from {least} to {most} were given: allowed are 1 to {deepest}")
    if prompt_loops is None and bool((loops[:, 0] != deepest).any()):
        raise InputError(
            f"loops begins with {loops[:, 0].tolist()}: the first token comes from the prompt, whose rows run "
            f"max_loops={deepest}; give prompt_loops= where prompts obeyed the exit rule"
        )
    # Which generated token comes after each row; prompts count up to it from below.
    after = real.cumsum(-1)[:, :-1] - prompts[:, None]
    emits = real[:, :-1] & (after >= 0) & (after < made[:, None])
    recorded = loops.gather(1, after.clamp(0, loops.shape[1] - 1))
    read: int | Tensor = deepest
    if prompt_loops is not None:
        read = prompt_loops.gather(1, (real.cumsum(-1)[:, :-1] - 1).clamp(0, prompt_loops.shape[1] - 1))
    # Padding, on either side, is never looked at.
    exits = torch.where(after < 0, read, torch.where(emits, recorded, 1))
    return _Answers(max_loops=deepest, exits=exits, emits=emits, made=present)


def _of_prompts(
    prompt_loops: Int[Tensor, "batch prompt"], loops: Int[Tensor, "batch generated"], prompts: Int[Tensor, " batch"]
) -> Int[Tensor, " positions"]:
    """The loops of all prompt positions, once they are seen to fit."""
    if prompt_loops.shape[1] != int(prompts.max()):
        raise InputError(
            f"prompt_loops has {prompt_loops.shape[1]} numbers for prompts of up to {int(prompts.max())} tokens; give "
            "one for each of them"
        )
    last = prompt_loops.gather(1, prompts[:, None] - 1)[:, 0]
    if bool((last != loops[:, 0]).any()):
        raise InputError(
            f"prompt_loops ends with {last.tolist()} and loops begins with {loops[:, 0].tolist()}: both are the loops "
            "of the prompt's last row"
        )
    inside = torch.arange(prompt_loops.shape[1], device=loops.device) < prompts[:, None]
    return prompt_loops[inside]


def _run_filled(
    model: "LoopedLM", state: Float[Tensor, "batch rows width"], context: "LMContext", exits: Int[Tensor, "batch rows"]
) -> Float[Tensor, "batch rows width"]:
    """States at the exits, where rows run on to write every plane."""
    final = state
    for loop in range(1, int(exits.max()) + 1):
        state = model.step(state, context, loop)
        final = torch.where((exits == loop)[..., None], state, final)
    return final


def _run_skipped(
    model: "LoopedLM", state: Float[Tensor, "batch rows width"], context: "LMContext", exits: Int[Tensor, "batch rows"]
) -> Float[Tensor, "batch rows width"]:
    """States at the exits, where a row stops there: the work of the others alone is done."""
    rows, opened = model.open_rows(state, context)
    if not isinstance(opened.memory, LockstepMemory):
        raise TypeError("rows of a language model share a LockstepMemory")
    opened = replace(opened, memory=_KeptMemory(opened.memory.mask, opened.memory.batch, opened.memory.token))
    running = torch.arange(len(rows), device=rows.device)
    left: list[Tensor] = []
    states: list[Tensor] = []
    depths = exits.flatten() if context.real is None else exits[context.real]
    for loop in range(1, int(depths.max()) + 1):
        rows = model.step(rows, opened, loop)
        stops = depths[running] == loop
        left.append(running[stops])
        states.append(rows[stops])
        stay = (~stops).nonzero()[:, 0]
        running = running[stay]
        if len(stay):
            rows, opened = model.keep_rows(rows, opened, stay)
    return model.close_rows(torch.cat(states)[torch.cat(left).argsort()], context)


class _KeptMemory(LockstepMemory):
    """Lock-step memory that never overwrites what it has shown: the backward pass looks at it again."""

    def keep(self, index: Int[Tensor, " kept"]) -> "_KeptMemory":
        return _KeptMemory(self.mask, self.batch[index], self.token[index], self.keys, self.values)

    def attend(
        self,
        layer: int,
        q: Float[Tensor, "rows heads head_width"],
        k: Float[Tensor, "rows kv_heads head_width"],
        v: Float[Tensor, "rows kv_heads head_width"],
    ) -> Float[Tensor, "rows heads head_width"]:
        for table in (self.keys, self.values):
            if layer in table:
                table[layer] = table[layer].clone()
        return super().attend(layer, q, k, v)
