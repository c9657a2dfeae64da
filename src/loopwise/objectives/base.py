"""What an objective is: how many loops to run, what each token's loss weighs, and what the gate is taught.

The total loss of a micro-batch is

    sum over loops and tokens of weights * CE   (gradient into the language model; weights are constants)
    + gate_loss(CE as constants, hazards)       (gradient into the hazards)

whose value is the objective's (a term that both parts need for their gradients counts once in it). So the weights
are known before the head runs, and the logits never exist at once (see `head`).

Axes: R loops that are read out, B batch, T tokens.
"""

import dataclasses
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from loopwise.errors import ConfigError
from loopwise.loops.hazard import entropy, exit_distribution, mean_exit_loop


@dataclass(frozen=True, kw_only=True)
class LoopPlan:
    """How one micro-batch is unrolled."""

    loops: int
    """Loops to run."""
    backprop: int | None = None
    """The last so many loops carry gradient; None: all of them."""
    read: Literal["last", "all"] = "last"
    """Whether the head is applied after the last loop only, or after every loop."""

    def __post_init__(self) -> None:
        if self.loops < 1:
            raise ConfigError(f"loops={self.loops}; at least one loop must run, for example loops=4")
        if self.backprop is not None and not 1 <= self.backprop <= self.loops:
            raise ConfigError(
                f"backprop={self.backprop} of loops={self.loops}; give 1 to {self.loops}, or none for all"
            )

    @property
    def loops_read(self) -> range:
        """The loops, counted from 1, after which the head is applied: the first axis of losses and weights."""
        return range(self.loops if self.read == "last" else 1, self.loops + 1)


@dataclass(frozen=True, kw_only=True)
class ObjectiveInputs:
    """What an objective may look at in one micro-batch, besides the losses."""

    plan: LoopPlan
    """The plan that was carried out."""
    mask: Bool[Tensor, "batch tokens"]
    """True where a token's loss counts."""
    hazards: Float[Tensor, "loops batch tokens"] | None = None
    """The gate's probability of stopping after each loop that ran, with its gradient; None without a gate."""
    first_loop: Int[Tensor, "batch tokens"] | None = None
    """A token's loss counts at loop r only if r >= first_loop; None: at every loop."""
    progress: float = 0.0
    """Share of the stage's steps already done, 0 to 1: what schedules depend on."""

    @property
    def counted(self) -> Bool[Tensor, "loops batch tokens"]:
        """Whether a token's loss counts after a loop that is read."""
        if self.first_loop is None:
            return self.mask.expand(len(self.plan.loops_read), *self.mask.shape)
        loops = torch.tensor(list(self.plan.loops_read), device=self.mask.device)
        return self.mask & (loops[:, None, None] >= self.first_loop)

    @property
    def tokens_counted(self) -> Int[Tensor, ""]:
        """Tokens whose loss counts after at least one loop that is read; 1 if there is none."""
        return self.counted.any(0).sum().clamp_min(1)


@dataclass(frozen=True, kw_only=True)
class Objective(ABC):
    """A loss over loops. Each kind is a dataclass of its own settings; see `build_objective` for their names."""

    loops: int = 4
    """Loops to run in training."""

    name: ClassVar[str]
    """What the user types."""
    trains: ClassVar[Literal["model", "gate"]] = "model"
    """Whether everything learns, or the exit gate alone beside a frozen language model."""
    reads: ClassVar[Literal["last", "all"]] = "last"

    def __post_init__(self) -> None:
        self.plan(seed=0, step=0, micro=0)

    @property
    def needs_hazards(self) -> bool:
        """Whether the model must have an exit gate."""
        return False

    def __str__(self) -> str:
        """The short text that builds this objective again, without the settings left at their defaults."""
        settings = [
            f"{field.name}={getattr(self, field.name)}".replace("None", "none")
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != field.default or field.name in self.always_shown
        ]
        return self.name + (":" + ",".join(settings) if settings else "")

    always_shown: ClassVar[tuple[str, ...]] = ()
    """Settings that the short text names even at their default, because results cannot be read without them."""

    @abstractmethod
    def plan(self, *, seed: int, step: int, micro: int) -> LoopPlan:
        """How to unroll micro-batch `micro` of `step`: a function of these numbers alone, the same on every rank."""

    def weights(self, inputs: ObjectiveInputs) -> Float[Tensor, "loops batch tokens"] | None:
        """What each token's loss weighs, detached; the sum is 1, or 0 if nothing counts.

        By default all loops that are read weigh the same. None: the language model learns nothing.

        Raises:
            ConfigError: the objective needs hazards and the model has none.
        """
        return even_weights(inputs)

    def gate_loss(self, inputs: ObjectiveInputs, losses: Float[Tensor, "loops batch tokens"]) -> Float[Tensor, ""]:
        """The part whose gradient flows into the hazards alone; `losses` are constants. Zero by default."""
        return losses.new_zeros(())

    def metrics(self, inputs: ObjectiveInputs, losses: Float[Tensor, "loops batch tokens"]) -> dict[str, float]:
        """Figures for the log: mean loss (nats) by loop, and where the gate would leave.

        Keys: `loss_loop_3` for each loop at which any token counts; with hazards also `exit_loop` (mean exit loop),
        `exit_entropy` (nats) and `exit_first` (mean probability of leaving after loop 1). Reading them makes the
        host wait once, so ask only when logging.
        """
        counted = inputs.counted
        counts = counted.sum((1, 2))
        means = (losses * counted).sum((1, 2)).double() / counts.clamp_min(1)
        figures = {f"loss_loop_{loop}": mean for loop, mean in zip(inputs.plan.loops_read, means, strict=True)}
        if inputs.hazards is not None:
            tokens = inputs.mask.sum().clamp_min(1)
            hazards = inputs.hazards.detach().masked_fill(~inputs.mask, 0)
            leaving = exit_distribution(hazards).double()
            for name, values in (
                ("exit_loop", mean_exit_loop(leaving)),
                ("exit_entropy", entropy(leaving)),
                ("exit_first", leaving[0]),
            ):
                figures[name] = (values * inputs.mask).sum() / tokens
        kept = [True] * len(figures)
        kept[: len(means)] = (counts > 0).tolist()
        numbers = torch.stack(list(figures.values())).tolist()
        return {name: number for name, number, keep in zip(figures, numbers, kept, strict=True) if keep}

    def hazards(self, inputs: ObjectiveInputs) -> Float[Tensor, "loops batch tokens"]:
        """The model's hazards.

        Raises:
            ConfigError: the model has no exit gate.
        """
        if inputs.hazards is None:
            raise ConfigError(
                f"objective {self.name} needs a model with an exit gate and this one has none; "
                "choose last, every or random-depth, or build the model with a gate"
            )
        return inputs.hazards


def even_weights(inputs: ObjectiveInputs) -> Float[Tensor, "loops batch tokens"]:
    """Every token that counts weighs the same, shared evenly among the loops at which it counts."""
    counted = inputs.counted.double()
    return counted / counted.sum(0).clamp_min(1) / inputs.tokens_counted


def check_share(name: str, value: float) -> None:
    """Refuse a share of the training steps outside 0 to 1."""
    if not 0 <= value <= 1:
        raise ConfigError(f"{name}={value}; a share of the stage's steps, from 0 to 1, for example {name}=0.5")
