"""Deep-Thinking networks: small convolutions, looped, that solve larger problems than they learned by looping longer.

    s0 = relu(P x)                                  P, and every layer here, a convolution of width 3 without bias
    s  = B2 B1 (W [s; x])                           once per loop; with `recall` the input is seen again at each
    B s = relu(s + V relu(U s))                     a residual block
    logits = H3 relu(H2 relu(H1 s))                 for each place: a bit of a sequence, a pixel of a picture

Schwarzschild et al. 2021 (arXiv 2106.04537) without recall, Bansal et al. 2022 (arXiv 2202.05826) with it and with
the progressive loss (`objectives/progressive.py`). Layers are those of the authors' code: in one dimension a relu
follows the recall layer and the head keeps the width, in two neither.

Axes: N samples, C channels, D width, K classes, places: (length,) or (height, width).
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from loopwise.errors import ConfigError, InputError
from loopwise.loops.hazard import widen
from loopwise.loops.protocol import LoopFacts, LoopModel

CERTAINTIES = ("mean", "least")

SURE = 30.0
"""Logit of class 0 where nothing is asked: a probability of 1 to 13 digits, and finite."""


@dataclass(frozen=True, kw_only=True)
class DeepThinkingConfig:
    """Shapes and choices of a `DeepThinking` network. The defaults are the paper's for mazes."""

    dimensions: int = 2
    """Axes of a sample: 1 for sequences (prefix sums), 2 for pictures (mazes)."""
    channels: int = 3
    """Numbers per place that come in, C."""
    classes: int = 2
    """Classes per place that go out, K."""
    width: int = 128
    """Numbers per place in the state, D (prefix sums: 400, mazes: 128, chess: 512)."""
    blocks: int = 2
    """Residual blocks in one loop."""
    recall: bool = True
    """Whether each loop sees the input again; without it what a loop destroys is gone."""
    head_widths: tuple[int, int] | None = None
    """Widths between the head's three layers; None: (32, 8) for pictures, (D, D // 2) for sequences."""
    certainty: str = "mean"
    """What of the places' confidences, the largest probability at each, makes a sample's certainty: `mean` (the
    authors', who sum them) or `least`, the least sure place, which says the same in small and in large samples."""
    trained_loops: tuple[int, int] = (1, 30)
    """Fewest and most loops of training."""

    def __post_init__(self) -> None:
        if self.dimensions not in (1, 2):
            raise ConfigError(f"dimensions={self.dimensions}: allowed are 1 for sequences and 2 for pictures")
        for name in ("channels", "width", "blocks"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: allowed is 1 or more")
        if self.classes < 2:
            raise ConfigError(f"classes={self.classes}: allowed is 2 or more")
        if min(self.heads) < 1:
            raise ConfigError(f"head_widths={self.heads}: allowed is 1 or more each; a width of 2 or more gives that")
        if self.certainty not in CERTAINTIES:
            raise ConfigError(f"certainty={self.certainty!r} is unknown; allowed are {', '.join(CERTAINTIES)}")

    @property
    def heads(self) -> tuple[int, int]:
        """Widths between the head's three layers."""
        if self.head_widths is not None:
            return self.head_widths
        return (32, 8) if self.dimensions == 2 else (self.width, self.width // 2)


@dataclass(frozen=True)
class DeepThinkingContext:
    """What is computed once for N samples."""

    inputs: Float[Tensor, "samples channels *places"]
    """The samples, for recall."""
    start: Float[Tensor, "samples width *places"]
    """The projected samples: the start state."""
    asked: Bool[Tensor, "samples *places"] | None
    """Places where an answer is asked; None: all."""


class DeepThinking(LoopModel):
    """A Deep-Thinking network. Its state is (N, D, places...), its unit the sample, its prediction (N, places..., K).

    The signal is a certainty made of the largest softmax probability at each place. Places that are not asked are
    answered with class 0 and count as sure (the authors set walls of mazes so).
    """

    def __init__(self, config: DeepThinkingConfig) -> None:
        super().__init__()
        self.config = config
        self.facts = LoopFacts(
            unit="sample",
            signal="certainty",
            signal_reads="prediction",
            anytime=True,
            trained_loops=config.trained_loops,
            random_start=False,
            loop_dependent=False,
            readout_mixes=False,
        )
        wide, narrow = config.heads
        self.projection = self._layer(config.channels, config.width)
        self.recall = self._layer(config.width + config.channels, config.width) if config.recall else None
        self.core = nn.ModuleList(self._layer(config.width, config.width) for _ in range(2 * config.blocks))
        self.head = nn.Sequential(
            self._layer(config.width, wide),
            nn.ReLU(),
            self._layer(wide, narrow),
            nn.ReLU(),
            self._layer(narrow, config.classes),
        )

    def _layer(self, channels: int, width: int) -> nn.Conv1d | nn.Conv2d:
        kind = nn.Conv1d if self.config.dimensions == 1 else nn.Conv2d
        return kind(channels, width, kernel_size=3, padding=1, bias=False)

    def encode(
        self,
        inputs: Float[Tensor, "..."],
        *,
        asked: Bool[Tensor, "..."] | None = None,
        **options: Any,
    ) -> DeepThinkingContext:
        """Project the samples.

        Args:
            inputs: one vector of C numbers per place, (N, C, places...).
            asked: (N, places...), True where an answer is asked, as in `targets != IGNORED`; None: everywhere.

        Raises:
            InputError: for another number of axes or channels, or a mask of another shape.
        """
        if options:
            raise TypeError(f"encode does not take {', '.join(options)}")
        config = self.config
        if inputs.dim() != 2 + config.dimensions or inputs.shape[1] != config.channels:
            places = ", ".join(("length",) if config.dimensions == 1 else ("height", "width"))
            raise InputError(
                f"inputs of shape {tuple(inputs.shape)}; this model takes (N, {config.channels}, {places})"
            )
        if asked is not None and asked.shape != inputs.shape[:1] + inputs.shape[2:]:
            raise InputError(
                f"asked of shape {tuple(asked.shape)}; give one per place, {tuple(inputs.shape[:1] + inputs.shape[2:])}"
            )
        return DeepThinkingContext(inputs=inputs, start=F.relu(self.projection(inputs)), asked=asked)

    def initial_state(self, context: DeepThinkingContext, start: Any = None) -> Float[Tensor, "samples width *places"]:
        """The projected samples, zeros for "zero", or the state that is given."""
        if start is None:
            return context.start
        if isinstance(start, Tensor):
            return start
        if start == "zero":
            return torch.zeros_like(context.start)
        raise ConfigError(f'start={start!r}: nothing is drawn here; allowed are "zero" or a state')

    def step(
        self, state: Float[Tensor, "samples width *places"], context: DeepThinkingContext, loop: int
    ) -> Float[Tensor, "samples width *places"]:
        if self.recall is not None:
            state = self.recall(torch.cat((state, context.inputs), dim=1))
            if self.config.dimensions == 1:
                state = F.relu(state)
        for block in range(self.config.blocks):
            inside = F.relu(self.core[2 * block](state))
            state = F.relu(state + self.core[2 * block + 1](inside))
        return state

    def readout(
        self, state: Float[Tensor, "samples width *places"], context: DeepThinkingContext
    ) -> Float[Tensor, "samples *places classes"]:
        logits: Tensor = self.head(state).movedim(1, -1)
        if context.asked is None:
            return logits
        sure = logits.new_tensor([SURE] + [0.0] * (self.config.classes - 1))
        return torch.where(context.asked.unsqueeze(-1), logits, sure)

    def signal(
        self, state: Float[Tensor, "samples width *places"], prediction: Float[Tensor, "samples *places classes"] | None
    ) -> Float[Tensor, " samples"]:
        if prediction is None:
            raise ValueError("a certainty is read from the prediction; facts.signal_reads says so")
        confidence = torch.softmax(widen(prediction), dim=-1).amax(-1).flatten(1)
        # Rounding may carry a mean of ones a hair above 1.
        return (confidence.mean(1) if self.config.certainty == "mean" else confidence.amin(1)).clamp(max=1)
