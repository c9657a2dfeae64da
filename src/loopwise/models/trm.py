"""TRM, the tiny recursive model (Jolicoeur-Martineau 2025, arXiv 2510.04871), and HRM (Wang et al. 2025, arXiv
2506.21734) as a configuration of it.

A loop is one segment of deep supervision. Within it an answer y and a latent z take turns (see `TRMConfig`); both start
as one fixed vector at every place. After each loop the answer can be read out, and a halting head says whether
it is right, so samples that are sure of their answer leave the batch.

Axes: B batch, P places (prefix and puzzle), D width.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from loopwise.errors import ConfigError, InputError
from loopwise.loops.protocol import LoopFacts, LoopModel
from loopwise.models.trm_config import TRMConfig
from loopwise.nn.mixing import PostNormBlock
from loopwise.nn.rotary import Rotary, rotary_tables

HALT_BIAS = -5.0
"""The halting head starts almost silent (TinyRecursiveModels)."""


@dataclass(frozen=True, kw_only=True)
class TRMState:
    """What a loop hands to the next; collected states have their loops in front."""

    answer: Float[Tensor, "*loops batch places width"]
    """y in TRM's words, z_H in HRM's; the readout's and the halting head's source."""
    latent: Float[Tensor, "*loops batch places width"]
    """z in TRM's words, z_L in HRM's."""


@dataclass(frozen=True, kw_only=True)
class Update:
    """The state after one of the updates within a loop."""

    cycle: int
    """Recursion it belongs to, counted from 1."""
    of_answer: bool
    """Whether the answer was updated, and not the latent."""
    state: TRMState


class TRM(LoopModel):
    """One network that revises a latent and an answer in turns."""

    def __init__(self, config: TRMConfig) -> None:
        super().__init__()
        self.config = config
        self.facts = LoopFacts(
            unit="sample",
            signal="halt_logit",
            anytime=True,
            trained_loops=config.trained_loops,
            random_start=False,
            loop_dependent=False,
            readout_mixes=False,
        )
        places = config.prefix + config.places
        self.embeddings = nn.ModuleDict({"tokens": nn.Embedding(config.vocab_size, config.width)})
        if config.puzzle_width:
            self.embeddings["puzzles"] = nn.Embedding(config.puzzles, config.puzzle_width)
        if config.positions == "learned":
            self.embeddings["positions"] = nn.Embedding(places, config.width)
        self.latent_net = _stack(config, config.layers)
        self.answer_net = _stack(config, config.answer_layers) if config.answer_layers else None
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        self.halt_head = nn.Linear(config.width, 2)
        self.register_buffer("answer_start", torch.empty(config.width))
        self.register_buffer("latent_start", torch.empty(config.width))
        self.answer_start: Tensor
        self.latent_start: Tensor
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The authors' start: truncated normals of variance 1/inputs, puzzles at zero, the halting head silent."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                _draw(module.weight, module.in_features**-0.5)
        for name, embedding in self.embeddings.items():
            assert isinstance(embedding, nn.Embedding)
            if name == "puzzles":
                embedding.weight.zero_()
            else:
                _draw(embedding.weight, self.config.width**-0.5)
        self.halt_head.weight.zero_()
        self.halt_head.bias.fill_(HALT_BIAS)
        _draw(self.answer_start, 1.0)
        _draw(self.latent_start, 1.0)

    def encode(  # type: ignore[override]  # other options are mistakes, and Python says so
        self, inputs: Int[Tensor, "batch puzzle_places"], *, puzzles: Int[Tensor, " batch"] | None = None
    ) -> Float[Tensor, "batch places width"]:
        """Puzzles as vectors, with the prefix before them.

        Args:
            puzzles: which kind of puzzle each is; None: all of kind 0.

        Raises:
            InputError: puzzles of another length, or symbols or kinds that the model has not.
        """
        config = self.config
        if inputs.dim() != 2 or inputs.shape[1] != config.places:
            raise InputError(f"puzzles of shape {tuple(inputs.shape)}: allowed is (batch, {config.places})")
        if inputs.numel() and not 0 <= int(inputs.min()) <= int(inputs.max()) < config.vocab_size:
            raise InputError(
                f"symbols from {int(inputs.min())} to {int(inputs.max())}: allowed are 0 to {config.vocab_size - 1}"
            )
        if puzzles is not None and not config.puzzle_width:
            raise InputError("this model knows no kinds of puzzle (puzzle_width=0); leave `puzzles` out")
        if puzzles is None:
            puzzles = inputs.new_zeros(len(inputs))
        if puzzles.numel() and not 0 <= int(puzzles.min()) <= int(puzzles.max()) < config.puzzles:
            raise InputError(f"kinds up to {int(puzzles.max())}: allowed are 0 to {config.puzzles - 1}")
        embedded: Tensor = self.embeddings["tokens"](inputs)
        if config.prefix:
            before = embedded.new_zeros(len(inputs), config.prefix * config.width)
            if config.puzzle_width:
                kind = self.embeddings["puzzles"](puzzles)
                before = F.pad(kind, (0, config.prefix * config.width - config.puzzle_width))
            embedded = torch.cat((before.view(len(inputs), config.prefix, config.width), embedded), dim=1)
        if config.positions == "learned":
            # Halved, so that the sum of two embeddings has the variance of one.
            embedded = 0.5**0.5 * (embedded + self.embeddings["positions"].get_parameter("weight"))
        return embedded * math.sqrt(config.width)

    def initial_state(self, context: Float[Tensor, "batch places width"], start: Any = None) -> TRMState:
        """Two fixed vectors at every place, zeros for "zero", or the state that is given."""
        if isinstance(start, TRMState):
            return start
        if start == "zero":
            return TRMState(answer=torch.zeros_like(context), latent=torch.zeros_like(context))
        if start is not None:
            raise ConfigError(
                f'start={start!r}: this model starts the same way every time; give None, "zero" or a state'
            )
        return TRMState(answer=self.answer_start.expand_as(context), latent=self.latent_start.expand_as(context))

    def step(self, state: TRMState, context: Float[Tensor, "batch places width"], loop: int) -> TRMState:
        for update in self.updates(state, context):
            state = update.state
        return state

    def updates(self, state: TRMState, context: Float[Tensor, "batch places width"]) -> Iterator[Update]:
        """The updates within one loop, in order: the last state is what `step` returns."""
        config = self.config
        rotary = self._rotary(context)
        grad = torch.is_grad_enabled()
        left = config.cycles * (config.inner_cycles + 1)
        carrying = {"step": 2, "recursion": config.inner_cycles + 1, "all": left}[config.window]
        for cycle in range(1, config.cycles + 1):
            for inner in range(config.inner_cycles + 1):
                of_answer = inner == config.inner_cycles
                # Entered anew for each update: a generator must not leave its own mode to its caller.
                with torch.set_grad_enabled(grad and left <= carrying):
                    state = self._update(state, context, rotary, of_answer=of_answer)
                left -= 1
                yield Update(cycle=cycle, of_answer=of_answer, state=state)

    def _update(self, state: TRMState, context: Tensor, rotary: Rotary, *, of_answer: bool) -> TRMState:
        net = self.answer_net if of_answer and self.answer_net is not None else self.latent_net
        x = state.answer + state.latent if of_answer else state.latent + (state.answer + context)
        for block in net:
            x = block(x, rotary)
        return TRMState(answer=x, latent=state.latent) if of_answer else TRMState(answer=state.answer, latent=x)

    def readout(
        self, state: TRMState, context: Float[Tensor, "batch places width"]
    ) -> Float[Tensor, "batch puzzle_places vocab"]:
        """Logits of the symbol at each place of the puzzle."""
        logits: Tensor = self.head(state.answer[:, self.config.prefix :])
        return logits

    def signal(self, state: TRMState, prediction: Tensor | None) -> Float[Tensor, " batch"]:
        """Logit of "the answer is right"; above 0 the authors halt in training."""
        halt, go_on = self.halting(state).unbind(-1)
        return halt if self.config.halts == "positive" else halt - go_on

    def halting(self, state: TRMState) -> Float[Tensor, "batch 2"]:
        """Logits of halting and of going on, in float32 or wider. TRM never trains the second."""
        first = state.answer[:, 0]
        wide = torch.promote_types(first.dtype, torch.float32)
        return F.linear(first.to(wide), self.halt_head.weight.to(wide), self.halt_head.bias.to(wide))

    def _rotary(self, context: Tensor) -> Rotary:
        config = self.config
        positions = torch.arange(context.shape[1], device=context.device)
        if config.positions != "rotary":
            # An angle of zero turns nothing.
            positions = torch.zeros_like(positions)
        return rotary_tables(positions, config.width // config.heads, config.rotary_base, context.dtype)


def _stack(config: TRMConfig, layers: int) -> nn.ModuleList:
    return nn.ModuleList(
        PostNormBlock(
            mixing=config.mixing,
            places=config.prefix + config.places,
            width=config.width,
            heads=config.heads,
            mlp_width=config.mlp_width,
            mixing_width=config.mixing_width,
            eps=config.norm_eps,
        )
        for _ in range(layers)
    )


def _draw(tensor: Tensor, std: float) -> None:
    """Normal numbers cut at two of their own deviations and widened so that `std` is what is left."""
    wide = std / 0.8796256610342398
    nn.init.trunc_normal_(tensor, std=wide, a=-2 * wide, b=2 * wide)
