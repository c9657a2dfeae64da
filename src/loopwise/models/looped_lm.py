"""The looped language model: one class for Ouro, Huginn, retrofitted Llamas and Universal Transformers.

Axes: B batch, T tokens, R loops, D width, V vocabulary, N rows; "..." is (B, T) or a flat list of rows.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from types import FunctionType
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Int32
from torch import Tensor, nn

from loopwise.errors import ConfigError, InputError
from loopwise.loops.drivers import Collect, unroll
from loopwise.loops.hazard import widen
from loopwise.loops.protocol import LoopFacts, LoopModel
from loopwise.memory.lockstep import LockstepMemory
from loopwise.models.config import LoopedLMConfig
from loopwise.models.scoring import score
from loopwise.nn.attention import Attention, CausalMemory, Memory, Plane
from loopwise.nn.block import Block, Stack
from loopwise.nn.gate import HazardGate
from loopwise.nn.kernels.causal import has_causal_kernel
from loopwise.nn.linear import WideLinear
from loopwise.nn.mlp import GatedMLP
from loopwise.nn.noise import truncated_normal
from loopwise.nn.norms import RMSNorm
from loopwise.nn.rotary import Rotary, rotary_tables

if TYPE_CHECKING:
    from loopwise.hub.family import Origin
    from loopwise.hub.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class LMContext:
    """Everything that is computed once per input."""

    injected: Float[Tensor, "... width"]
    """The prelude's output, e."""
    rotary: Rotary
    """Cosines and sines of the positions."""
    positions: Int[Tensor, "..."]
    """Position of each token, counting real tokens of its document from 0."""
    memory: Memory
    """Where keys and values are written and read."""
    real: Bool[Tensor, "batch tokens"] | None = None
    """False at padding; None when there is none."""
    mask: Bool[Tensor, "batch one tokens tokens"] | None = None
    """Which token may read which; None means plain causal."""


@dataclass(frozen=True, kw_only=True)
class LoopOutput:
    """The answer of one forward pass; the `loop_...` fields are None unless collected."""

    logits: Float[Tensor, "batch tokens vocab"]
    """Readout of the last loop."""
    loop_logits: Float[Tensor, "loops batch tokens vocab"] | None = None
    """Readout after each loop."""
    loop_states: Float[Tensor, "loops batch tokens width"] | None = None
    """State after each loop, as it is carried to the next."""
    loop_signals: Float[Tensor, "loops batch tokens"] | None = None
    """Hazard after each loop, a probability."""


class LoopedLM(LoopModel):
    """A language model whose core is applied again and again. See `LoopedLMConfig` for the formula."""

    def __init__(self, config: LoopedLMConfig) -> None:
        super().__init__()
        self.config = config
        self.origin: Origin | None = None
        """Where the weights came from; `loopwise.save` writes the same family back."""
        self.tokenizer: Tokenizer | None = None
        """The tokenizer that was beside the weights."""
        self.facts = LoopFacts(
            unit="token",
            signal="hazard" if config.gate else None,
            anytime=config.anytime,
            trained_loops=config.trained_loops,
            random_start=config.start == "normal",
            loop_dependent=False,
            readout_mixes=config.coda_layers > 0,
        )
        self.embed = nn.Embedding(config.vocab_size, config.width)
        first_core = config.prelude_layers
        first_coda = first_core + config.core_layers
        self.prelude = Stack(self._block(layer) for layer in range(first_core))
        self.core = Stack(self._block(layer) for layer in range(first_core, first_coda))
        self.coda = Stack(self._block(layer) for layer in range(first_coda, config.layers))
        self.adapter = (
            nn.Linear(2 * config.width, config.width, bias=config.adapter_bias)
            if config.injection == "adapter"
            else None
        )
        self.norm = RMSNorm(config.width, config.norm_eps)
        self.gate = HazardGate(config.width) if config.gate else None
        self.head = None if config.tied_head else nn.Linear(config.width, config.vocab_size, bias=False)
        # A function, not a bound method: a deep copy would go on running the original's weights.
        self._compiled: Callable[[LoopedLM, Tensor, Tensor, Rotary, Plane], Tensor] | None = None

    def _block(self, layer: int) -> Block:
        config = self.config
        attention = Attention(
            layer=layer,
            width=config.width,
            heads=config.heads,
            kv_heads=config.kv_heads,
            head_width=config.head_width,
            rotary=config.rotary,
            qk_bias=config.qk_bias,
            qk_norm_eps=config.norm_eps if config.qk_norm else None,
        )
        mlp = GatedMLP(config.width, config.mlp_width)
        return Block(attention, mlp, config.norm, config.width, config.norm_eps)

    @property
    def head_weight(self) -> Float[Tensor, "vocab width"]:
        """The matrix that turns hidden features into logits."""
        return self.embed.weight if self.head is None else self.head.weight

    def compile_core(self) -> None:
        """Compile one loop (`torch.compile`) for whole sequences; loops over a growing memory stay eager.

        Loop indices stay outside, so the number of loops never recompiles.
        """
        # torch.compile allows a few graphs per code object and then gives up without a word; with one code object for
        # all, the second model of a process would already run out of them.
        loop = LoopedLM._loop
        self._compiled = torch.compile(FunctionType(loop.__code__.replace(), loop.__globals__, loop.__name__))
        for module in self.modules():
            if isinstance(module, WideLinear) and module.weight.requires_grad:
                module.turn_gradient()

    def encode(
        self,
        inputs: Int[Tensor, "..."],
        *,
        padding_mask: Bool[Tensor, "batch tokens"] | None = None,
        documents: Int[Tensor, "batch tokens"] | None = None,
        positions: Int[Tensor, "..."] | None = None,
        rotary: Rotary | None = None,
        memory: Memory | None = None,
        **options: Any,
    ) -> LMContext:
        """Embeddings and prelude.

        Args:
            inputs: token ids, (B, T), or (N,) when `positions` and `memory` are given.
            padding_mask: True where a token is real; padding may stand on either side.
            documents: a number per token; attention and positions stay within runs of equal numbers.
            positions: position of each token; by default counted from the two masks.
            rotary: tables of `positions`, where the caller has them; see the method `rotary`.
            memory: keys and values of a running generation; by default the sequence is seen whole.

        Raises:
            InputError: for an empty or too long input or a token id outside the vocabulary.
        """
        if options:
            raise TypeError(f"encode does not take {', '.join(options)}")
        if memory is not None and (padding_mask is not None or documents is not None):
            raise TypeError("a memory decides by itself what a token may read; it takes no padding_mask or documents")
        self._check_tokens(inputs, known_length=positions is None)
        mask = None
        if positions is None:
            positions = count_positions(inputs, padding_mask, documents)
        if memory is None:
            mask = attention_mask(inputs, padding_mask, documents)
            if padding_mask is None and has_causal_kernel(inputs.device, self.embed.weight.dtype):
                memory = CausalMemory(mask, document_starts(inputs, documents))
            else:
                memory = CausalMemory(mask if mask is None else self._added(mask))
        if rotary is None:
            rotary = self.rotary(positions)
        config = self.config
        x = self.embed(inputs)
        if config.embed_scale != 1.0:
            x = x * config.embed_scale
        if len(self.prelude):
            x = self.prelude(x, rotary, memory.plane(0))
        return LMContext(injected=x, rotary=rotary, positions=positions, memory=memory, real=padding_mask, mask=mask)

    def rotary(self, positions: Int[Tensor, "..."]) -> Rotary:
        """Cosines and sines of positions, as every layer uses them."""
        config = self.config
        return rotary_tables(
            positions, config.head_width, config.rotary_base, self.embed.weight.dtype, config.rotary_scaling
        )

    def _added(self, mask: Bool[Tensor, "batch one tokens tokens"]) -> Tensor:
        """The mask as every layer and loop would turn it into on a CPU: numbers to add to the scores."""
        dtype = self.embed.weight.dtype
        if mask.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
            return mask
        return torch.zeros(mask.shape, dtype=dtype).masked_fill_(~mask, float("-inf"))

    def _check_tokens(self, tokens: Tensor, *, known_length: bool) -> None:
        if tokens.numel() == 0:
            raise InputError("no tokens were given; a prompt needs at least one")
        if known_length and tokens.shape[-1] > self.config.max_positions:
            raise InputError(
                f"{tokens.shape[-1]} tokens were given; this model's context is {self.config.max_positions}: "
                "shorten the input"
            )
        if tokens.device.type == "cpu":
            least, most = map(int, tokens.aminmax())
            if least < 0 or most >= self.config.vocab_size:
                raise InputError(
                    f"token ids from {least} to {most} were given; allowed are 0 to {self.config.vocab_size - 1}"
                )

    def initial_state(
        self, context: LMContext, start: int | Literal["zero"] | Tensor | None = None
    ) -> Float[Tensor, "... width"]:
        """The state before loop 1.

        Args:
            start: None for the model's own; for random-start models also an int seed; "zero"; or a whole state.
        """
        if isinstance(start, Tensor):
            if start.shape != context.injected.shape:
                raise InputError(
                    f"a start state of shape {tuple(start.shape)} was given; needed is {tuple(context.injected.shape)}"
                )
            return start.to(context.injected)
        if start == "zero" or (start is None and self.config.start == "zeros"):
            return torch.zeros_like(context.injected)
        if self.config.start == "normal":
            if start is not None and not isinstance(start, int):
                raise ConfigError(f'start={start!r}: allowed are an int seed, "zero" or a tensor')
            return self.draw_start(context.positions, self.config.start_seed if start is None else start)
        if start is not None:
            raise ConfigError(
                f'start={start!r}: this model starts from {self.config.start}; allowed are "zero" or a tensor'
            )
        return context.injected

    def draw_start(
        self, positions: Int[Tensor, "..."], seed: int, samples: Int[Tensor, "..."] | None = None
    ) -> Float[Tensor, "... width"]:
        """Truncated normal noise, a function of (seed, position), and of `samples` where given (training draws)."""
        features = torch.arange(self.config.width, device=positions.device)
        places = positions[..., None] * self.config.width + features
        counters = (places,) if samples is None else (samples[..., None], places)
        return (truncated_normal(seed, "start", *counters) * self.config.start_std).to(self.embed.weight.dtype)

    def step(self, state: Float[Tensor, "... width"], context: LMContext, loop: int) -> Float[Tensor, "... width"]:
        plane, injected = context.memory.plane(loop), context.injected
        # Other planes hold Python state that changes with every loop: after a few graphs torch.compile would give up
        # without a word, for training too.
        if self._compiled is None or not isinstance(plane, CausalMemory):
            return self._loop(state, injected, context.rotary, plane)
        # The compiler looks at requires_grad, and each combination would be one more graph.
        if not torch.is_grad_enabled():
            state, injected = state.detach(), injected.detach()
        elif not state.requires_grad:
            state = state.detach().requires_grad_()
        return self._compiled(self, state, injected, context.rotary, plane)

    def _loop(self, state: Tensor, injected: Tensor, rotary: Rotary, plane: Plane) -> Tensor:
        if self.adapter is not None:
            state = self.adapter(torch.cat((state, injected), dim=-1))
        elif self.config.injection == "add":
            state = state + injected
        state = self.core(state, rotary, plane)
        return self.norm(state) if self.config.loop_norm else state

    def read(self, state: Float[Tensor, "... width"], context: LMContext) -> Float[Tensor, "... width"]:
        """Coda and norms: the hidden features that the head multiplies."""
        hidden = self.norm(state) if self.config.coda_norm else state
        if len(self.coda):
            hidden = self.coda(hidden, context.rotary, context.memory.plane(0))
        return self.norm(hidden) if self.config.final_norm else hidden

    def readout(self, state: Float[Tensor, "... width"], context: LMContext) -> Float[Tensor, "... vocab"]:
        return F.linear(self.read(state, context), self.head_weight)

    def hazard(self, state: Float[Tensor, "... width"]) -> Float[Tensor, "..."] | None:
        """Probability of stopping here, in float32 or wider (Ouro, eq. 3); None without a gate."""
        if self.gate is None:
            return None
        return self.gate.hazard(widen(state if self.config.loop_norm else self.norm(state)))

    def signal(self, state: Tensor, prediction: Tensor | None) -> Tensor | None:
        return self.hazard(state)

    def forward(
        self,
        tokens: Int[Tensor, "batch tokens"],
        *,
        loops: int | None = None,
        collect: Collection[Collect] = (),
        start: int | Literal["zero"] | Tensor | None = None,
        padding_mask: Bool[Tensor, "batch tokens"] | None = None,
        documents: Int[Tensor, "batch tokens"] | None = None,
    ) -> LoopOutput:
        """Run every token for `loops` loops (the model's own number when None). See `encode` for the masks."""
        context = self.encode(tokens, padding_mask=padding_mask, documents=documents)
        out = unroll(self, context, loops=self.config.loops if loops is None else loops, start=start, collect=collect)
        return LoopOutput(
            logits=self.readout(out.state, context) if out.logits is None else out.logits[-1],
            loop_logits=out.logits,
            loop_states=out.states,
            loop_signals=out.signals,
        )

    def score(
        self,
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
        """Log-probabilities of generated tokens at the depths they were generated at, with gradients.

        Raw log-softmax in nats, before temperature, penalty and bias, in float32 or wider. It equals what the
        generator reported; depths are constants.

        Args:
            tokens: prompt and answer, (T,) or (B, T).
            loops: loops of the row that emitted each generated token, as the generator records them, (G,) or (B, G);
                what stands beyond a shorter answer's end does not matter.
            prompt_length: real tokens of the prompt, for all sequences or each.
            policy: the generator's: "per_loop" (rows ran on to fill their planes) or "last_exited" (a reader at loop d
                finds loop min(d, e) of a token that stopped at e, and only loops up to e are run).
            start_seed: what the generator started from, in random-start models: a seed or "zero"; None for the model's
                own.
            max_loops: loops of prompt rows; None for the largest of `loops`, which is what emitted the first token.
            prompt_loops: loops of each prompt position, where the generator's prompts obeyed the exit rule, (P,) or
                (B, P); what stands beyond a shorter prompt's end does not matter.
            padding_mask: True where a token is real; padding may stand on either side.

        Returns:
            (G,) or (B, G); zero beyond a shorter answer's end.

        Raises:
            InputError: for lengths or loops that do not fit together.
            ConfigError: for an unknown policy, or a start that the model cannot take.
        """
        return score(
            self,
            tokens,
            loops,
            prompt_length,
            policy=policy,
            start_seed=start_seed,
            max_loops=max_loops,
            prompt_loops=prompt_loops,
            padding_mask=padding_mask,
        )

    def open_rows(self, state: Tensor, context: LMContext) -> tuple[Tensor, LMContext]:
        batch, token = _real(context).nonzero(as_tuple=True)
        sequences, tokens = context.positions.shape
        mask = context.mask
        if mask is None:
            mask = torch.ones(tokens, tokens, dtype=torch.bool, device=state.device).tril()[None, None]
        memory = LockstepMemory(mask[:, 0].expand(sequences, -1, -1), batch, token)
        opened = LMContext(
            injected=context.injected[batch, token],
            rotary=Rotary(*(table[batch, token] for table in context.rotary)),
            positions=context.positions[batch, token],
            memory=memory,
        )
        return state[batch, token], opened

    def keep_rows(self, state: Tensor, context: LMContext, index: Tensor) -> tuple[Tensor, LMContext]:
        if not isinstance(context.memory, LockstepMemory):
            raise TypeError("keep_rows needs a context from open_rows")
        return state[index], replace(
            context,
            injected=context.injected[index],
            rotary=Rotary(*(table[index] for table in context.rotary)),
            positions=context.positions[index],
            memory=context.memory.keep(index),
        )

    def close_rows(self, rows: Tensor, context: LMContext) -> Tensor:
        state = torch.zeros_like(context.injected)
        state[_real(context)] = rows
        return state

    def open_units(self, units: Tensor, context: LMContext) -> Tensor:
        whole = units.new_zeros(context.positions.shape)
        whole[_real(context)] = units
        return whole


def _real(context: LMContext) -> Bool[Tensor, "batch tokens"]:
    return torch.ones_like(context.positions, dtype=torch.bool) if context.real is None else context.real


def count_positions(
    tokens: Int[Tensor, "batch tokens"],
    padding_mask: Bool[Tensor, "batch tokens"] | None = None,
    documents: Int[Tensor, "batch tokens"] | None = None,
) -> Int[Tensor, "batch tokens"]:
    """Positions from 0, counting real tokens only, anew in every document."""
    real = torch.ones_like(tokens) if padding_mask is None else padding_mask.long()
    count = real.cumsum(-1)
    if documents is not None:
        before = torch.where(_begins(documents), count - real, 0).cummax(-1).values
        count = count - before
    return (count - 1).clamp(min=0)


def _begins(documents: Int[Tensor, "batch tokens"]) -> Bool[Tensor, "batch tokens"]:
    begins = torch.ones_like(documents, dtype=torch.bool)
    begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return begins


def document_starts(
    tokens: Int[Tensor, "batch tokens"], documents: Int[Tensor, "batch tokens"] | None = None
) -> Int32[Tensor, "batch tokens"]:
    """For each token the place where its document begins."""
    if documents is None:
        return torch.zeros(tokens.shape, dtype=torch.int32)
    places = torch.arange(tokens.shape[-1])
    return torch.where(_begins(documents), places, 0).cummax(-1).values.int()


def attention_mask(
    tokens: Int[Tensor, "batch tokens"],
    padding_mask: Bool[Tensor, "batch tokens"] | None = None,
    documents: Int[Tensor, "batch tokens"] | None = None,
) -> Bool[Tensor, "batch one tokens tokens"] | None:
    """True where a token may read another; None when plain causal attention says it all."""
    if padding_mask is None and documents is None:
        return None
    length = tokens.shape[-1]
    mask = torch.ones(length, length, dtype=torch.bool, device=tokens.device).tril().expand(len(tokens), -1, -1)
    if padding_mask is not None:
        mask = mask & padding_mask[:, None, :]
    if documents is not None:
        run = _begins(documents).cumsum(-1)
        mask = mask & (run[:, :, None] == run[:, None, :])
    # Padding reads itself: a row of softmax without any key would be NaN.
    return (mask | torch.eye(length, dtype=torch.bool, device=tokens.device))[:, None]


def need_language_model(model: LoopModel, *, instead: str) -> None:
    """Refuse a model that is no language model.

    Args:
        instead: what to type with such a one.

    Raises:
        ConfigError: when it is none.
    """
    if not isinstance(model, LoopedLM):
        raise ConfigError(f"a {type(model).__name__} is no language model, which is needed here; {instead}")


def initialise(model: LoopedLM, *, seed: int) -> None:
    """Draw every weight anew, as a function of the seed alone.

    Matrices are normal with variance 2/(5D); matrices that write to the residual stream, and norms that a branch ends
    with, are divided by the root of twice the unrolled depth (Takase et al. 2024, as Huginn uses it). Embeddings are
    drawn so that scaled they have unit size, tied ones so that the head has. The gate starts at zero: a hazard of one
    half everywhere.
    """
    config = model.config
    generator = torch.Generator().manual_seed(seed)
    depth = config.prelude_layers + config.core_layers * config.loops + config.coda_layers
    std = (2.0 / (5.0 * config.width)) ** 0.5
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            leaf = name.rsplit(".", 2)[-2:]
            if name.startswith("gate.") or leaf[-1] in ("bias", "qk_bias"):
                parameter.zero_()
            elif name.endswith("norm_out.weight") and config.norm in ("branch", "pre_branch"):
                # A normed branch ignores the size of its matrices: what it writes to the stream is this weight.
                parameter.fill_(1.0 / (2.0 * depth) ** 0.5)
            elif parameter.dim() == 1:
                parameter.fill_(1.0)
            else:
                size = std
                if name == "embed.weight":
                    size = config.width**-0.5 if config.tied_head else 1.0 / config.embed_scale
                elif leaf[0] in ("out", "down"):
                    size = std / (2.0 * depth) ** 0.5
                drawn = torch.randn(parameter.shape, generator=generator) * size
                parameter.copy_(drawn)
