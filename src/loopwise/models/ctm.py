"""The Continuous Thought Machine (Darlow et al. 2025, arXiv 2505.05522): neurons with a past, read by their rhythm.

One tick, which is a loop here:

    q = query(S_action);  o = attention(q, features)       what the neurons' synchronisation asks for
    a = synapses([o; z])                                    pre-activations, one per neuron
    z_d = g_d(last M of a_d)                                each neuron's own model of its own past
    logits = head(S_out)                                    what their synchronisation says

Axes: N rows (samples), D neurons, M past pre-activations, P pairs, S places that are looked at.
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from loopwise.errors import ConfigError
from loopwise.loops.protocol import LoopFacts, LoopModel, tree_map
from loopwise.models.ctm_backbones import RotationPositions, build_backbone
from loopwise.models.ctm_config import CTMConfig
from loopwise.nn.cross_attention import CrossAttention, Memories
from loopwise.nn.neuron_models import NeuronModels
from loopwise.nn.synapses import GatedSynapse, UNetSynapse
from loopwise.nn.synchronisation import choose_neurons, pair_up, products, retention, synchronisation


@dataclass(frozen=True, kw_only=True)
class CTMContext:
    """Everything that is computed once per input."""

    memories: Memories
    """The features, as attention reads them."""
    out_retention: Float[Tensor, "rows out_pairs"]
    """exp(-r) of each pair that the answer reads, the same in every row."""
    action_retention: Float[Tensor, "rows action_pairs"]
    """The same for the pairs that attention reads."""


@dataclass(frozen=True, kw_only=True)
class CTMState:
    """What is carried from tick to tick. With pairing `none` the four accumulators are empty."""

    activity: Float[Tensor, "rows neurons"]
    """z: post-activations."""
    history: Float[Tensor, "rows neurons memory"]
    """The last M pre-activations, newest last."""
    out_total: Float[Tensor, "rows out_pairs"]
    """a: decayed sum of products, the present tick's in it."""
    out_weight: Float[Tensor, "rows out_pairs"]
    """b: decayed number of terms."""
    action_total: Float[Tensor, "rows action_pairs"]
    """The same for attention, which reads them before the neurons move: they end with the previous tick's products."""
    action_weight: Float[Tensor, "rows action_pairs"]


class CTM(LoopModel):
    """See `CTMConfig` for its parts. Everything random about a new one follows from `seed`."""

    out_pairs: Tensor
    action_pairs: Tensor

    def __init__(self, config: CTMConfig, *, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.facts = LoopFacts(
            unit="sample",
            signal="certainty",
            signal_reads="prediction",
            anytime=True,
            trained_loops=(1, config.ticks),
            random_start=False,
            loop_dependent=False,
            readout_mixes=False,
        )
        # A function, not a bound method: a deep copy would go on running the original's weights.
        self._compiled: Callable[[CTM, CTMState, CTMContext], CTMState] | None = None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self._build(config, np.random.Generator(np.random.Philox(seed)))

    def _build(self, config: CTMConfig, generator: np.random.Generator) -> None:
        neurons, dropout = config.neurons, config.dropout
        self.backbone = build_backbone(config)
        self.positions = RotationPositions(self.backbone.features) if config.positions == "rotation" else None
        self.features = nn.Sequential(nn.Linear(self.backbone.features, config.width), nn.LayerNorm(config.width))
        self.query = nn.Linear(config.action_size, config.width)
        self.attention = CrossAttention(config.width, config.heads, dropout=dropout)
        self.synapses: nn.Module = (
            GatedSynapse(config.width + neurons, neurons, dropout=dropout)
            if config.synapse_depth == 1
            else UNetSynapse(config.width + neurons, neurons, config.synapse_depth, dropout=dropout)
        )
        self.neuron_models = (
            None
            if config.neuron_models == "none"
            else NeuronModels(
                neurons,
                config.memory,
                config.neuron_hidden,
                norm=config.neuron_norm,
                dropout=dropout if config.neuron_dropout is None else config.neuron_dropout,
            )
        )
        start, past = neurons**-0.5, (neurons + config.memory) ** -0.5
        self.start_activity = nn.Parameter(torch.empty(neurons).uniform_(-start, start))
        # Without neuron models nobody reads the past, and a parameter that nothing reaches would be a lie.
        self.start_history = (
            nn.Parameter(torch.empty(neurons, config.memory).uniform_(-past, past))
            if config.neuron_models != "none"
            else None
        )
        for name, chosen, last in (("out", config.out_neurons, False), ("action", config.action_neurons, True)):
            sides = choose_neurons(
                config.pairing,
                neurons=neurons,
                chosen=chosen,
                last=last,
                self_pairs=config.self_pairs,
                generator=generator,
            )
            self.register_buffer(f"{name}_pairs", pair_up(config.pairing, sides))
        paired = config.pairing != "none"
        self.out_decay = nn.Parameter(torch.zeros(config.out_size)) if paired else None
        self.action_decay = nn.Parameter(torch.zeros(config.action_size)) if paired else None
        self.head = nn.Linear(config.out_size, (config.places or 1) * config.classes)

    def encode(self, inputs: Tensor, **options: Any) -> CTMContext:
        """Features of the inputs.

        Args:
            inputs: what the backbone takes: (N, channels, places...), (N, channels, Y, X), or (N, places) of +-1.

        Raises:
            InputError: when it is something else.
            ConfigError: for an option; a CTM has none.
        """
        if options:
            raise ConfigError(f"encode({', '.join(options)}): a CTM takes its inputs and no options")
        features = self.backbone(inputs)
        if self.positions is not None:
            features = features + self.positions(features)
        rows = features.shape[0]
        empty = features.new_zeros(0)
        kept = [empty if decay is None else retention(decay) for decay in (self.out_decay, self.action_decay)]
        return CTMContext(
            memories=self.attention.remember(self.features(features)),
            out_retention=kept[0].expand(rows, -1),
            action_retention=kept[1].expand(rows, -1),
        )

    def initial_state(self, context: CTMContext, start: Any = None) -> CTMState:
        """The learned start, or a state.

        Raises:
            ConfigError: for a seed or "zero": a CTM's start is learned.
        """
        if isinstance(start, CTMState):
            return start
        if start is not None:
            raise ConfigError(f"start={start!r}: a CTM's start is learned; leave start out, or give a CTMState")
        rows = context.out_retention.shape[0]
        activity = self.start_activity.expand(rows, -1)
        past = self.start_history
        history = activity.new_zeros(rows, self.config.neurons, 1) if past is None else past.expand(rows, -1, -1)
        # The authors begin the answer's sums before the first tick and those of attention within it.
        total = products(activity, self.out_pairs)
        nothing = activity.new_zeros(rows, self.action_pairs.shape[1])
        return CTMState(
            activity=activity,
            history=history,
            out_total=total,
            out_weight=torch.ones_like(total),
            action_total=nothing,
            action_weight=nothing,
        )

    def compile_step(self) -> None:
        """Compile a tick (`torch.compile`) for training; without gradients, where rows leave, it stays eager."""
        # A code object of its own: torch.compile allows a few graphs per code object and then gives up without a word.
        tick = CTM._tick
        self._compiled = torch.compile(FunctionType(tick.__code__.replace(), tick.__globals__, tick.__name__))

    def step(self, state: CTMState, context: CTMContext, loop: int) -> CTMState:
        if self._compiled is not None and torch.is_grad_enabled():
            return self._compiled(self, state, context)
        return self._tick(state, context)

    def _tick(self, state: CTMState, context: CTMContext) -> CTMState:
        action_total = context.action_retention * state.action_total + products(state.activity, self.action_pairs)
        action_weight = context.action_retention * state.action_weight + 1.0
        asked = self._asked(state.activity, action_total, action_weight)
        seen = self.attention(self.query(asked), context.memories)
        moved = self.synapses(torch.cat((seen, state.activity), dim=-1))
        # Neuron by neuron in memory, whatever order the axes have: see nn/neuron_models.py.
        by_neuron = state.history.permute(1, 2, 0)
        by_neuron = torch.cat((by_neuron[:, 1:], moved.t()[:, None]), dim=1)
        activity = by_neuron[:, -1].t() if self.neuron_models is None else self.neuron_models(by_neuron).t()
        return CTMState(
            activity=activity,
            history=by_neuron.permute(2, 0, 1),
            out_total=context.out_retention * state.out_total + products(activity, self.out_pairs),
            out_weight=context.out_retention * state.out_weight + 1.0,
            action_total=action_total,
            action_weight=action_weight,
        )

    def keep_rows(self, state: CTMState, context: CTMContext, index: Tensor) -> tuple[CTMState, CTMContext]:
        # The past stays neuron by neuron in memory; picked along its first axis, every later tick would copy it twice.
        # Of torch's ways to pick along a last axis, gather is several times the fastest on a CPU.
        by_neuron = state.history.permute(1, 2, 0)
        history = by_neuron.gather(2, index.expand(*by_neuron.shape[:2], -1)).permute(2, 0, 1)

        def pick(tensor: Tensor) -> Tensor:
            return tensor.index_select(0, index)

        kept = CTMState(
            activity=pick(state.activity),
            history=history,
            out_total=pick(state.out_total),
            out_weight=pick(state.out_weight),
            action_total=pick(state.action_total),
            action_weight=pick(state.action_weight),
        )
        return kept, tree_map(pick, context)

    def readout(self, state: CTMState, context: CTMContext) -> Float[Tensor, "rows *places classes"]:
        said = self.out_synchronisation(state)
        logits: Tensor = self.head(state.activity if said is None else said)
        places = self.config.places
        return logits if places is None else logits.view(len(logits), places, -1)

    def signal(self, state: CTMState, prediction: Tensor | None) -> Float[Tensor, " rows"]:
        """Certainty: 1 - entropy / log(classes), averaged over the places of an answer."""
        if prediction is None:
            raise ConfigError("certainty is read from a prediction; give readout(state, context)")
        return certainty(prediction)

    def out_synchronisation(self, state: CTMState) -> Float[Tensor, "rows out_pairs"] | None:
        """What the answer of this state is read from; None with pairing `none`."""
        return None if self.out_decay is None else synchronisation(state.out_total, state.out_weight)

    def action_synchronisation(self, state: CTMState) -> Float[Tensor, "rows action_pairs"] | None:
        """What the tick that ended with this state asked with; None with pairing `none`."""
        return None if self.action_decay is None else synchronisation(state.action_total, state.action_weight)

    def attention_weights(
        self, before: CTMState, after: CTMState, context: CTMContext
    ) -> Float[Tensor, "rows heads places"]:
        """Where the tick from `before` to `after` looked."""
        asked = self._asked(before.activity, after.action_total, after.action_weight)
        return self.attention.weights(self.query(asked), context.memories)

    def _asked(self, activity: Tensor, total: Tensor, weight: Tensor) -> Tensor:
        return activity if self.action_decay is None else synchronisation(total, weight)


def certainty(logits: Float[Tensor, "rows *places classes"]) -> Float[Tensor, " rows"]:
    """1 - normalised entropy of the predicted classes, averaged over places; in float32 or wider, 0 to 1."""
    chances = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(dim=-1)
    entropy = -(chances.exp() * chances).sum(dim=-1) / float(np.log(logits.shape[-1]))
    return (1.0 - entropy.flatten(1).mean(dim=-1) if entropy.dim() > 1 else 1.0 - entropy).clamp(0.0, 1.0)
