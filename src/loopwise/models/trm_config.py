"""What a tiny recursive model is made of: TRM with attention or an MLP across places, and HRM."""

from dataclasses import dataclass
from typing import Literal, get_args

from loopwise.errors import ConfigError
from loopwise.nn.mixing import Mixing

Positions = Literal["rotary", "learned", "none"]
Window = Literal["step", "recursion", "all"]
Halts = Literal["positive", "over-continue"]


@dataclass(frozen=True, kw_only=True)
class TRMConfig:
    """Shapes and choices of a `TRM`.

    One loop is one segment of deep supervision: `cycles` times

        z <- f(z + y + x)     `inner_cycles` times
        y <- g(y + z)         once

    where x is the embedded puzzle, z the latent, y the answer, and g is f itself (TRM) or a network of its own (HRM).
    """

    vocab_size: int
    """Symbols that a place can hold; the same for puzzle and answer."""
    places: int
    """Length of a puzzle and of its answer."""
    width: int
    """Features of a place, D."""
    heads: int
    """Attention heads."""
    layers: int = 2
    """Layers of f."""
    answer_layers: int = 0
    """Layers of g, the answer's own network (HRM); 0: f serves both roles (TRM)."""
    mlp_width: int
    """Features inside the gated MLP."""
    mixing: Mixing = "attention"
    """How places see each other."""
    mixing_width: int = 0
    """Features inside the MLP across places; 0 with attention."""
    positions: Positions = "rotary"
    """How a place knows where it is; an MLP across places knows it by itself and takes "none"."""
    rotary_base: float = 10_000.0
    """Base of the rotary frequencies."""
    norm_eps: float = 1e-5
    """Added to the mean square."""
    cycles: int = 3
    """Recursions in a loop (H_cycles, the paper's T)."""
    inner_cycles: int = 6
    """Updates of the latent in a recursion (L_cycles, the paper's n)."""
    window: Window = "recursion"
    """Which updates of a loop carry gradient: "all", those of the last "recursion" (TRM), or the last "step" of
    the latent and of the answer alone (HRM)."""
    prefix: int = 1
    """Places put before the puzzle; the halting head reads the first. 0: it reads the puzzle's first place."""
    puzzles: int = 1
    """Kinds of puzzle with an embedding of their own, which fills the prefix."""
    puzzle_width: int = 0
    """Learned features of the prefix, at most prefix * width; the rest of it is zero."""
    halts: Halts = "positive"
    """What the signal is: the logit of halting (TRM), or what it is more than that of going on (HRM)."""
    trained_loops: tuple[int, int] = (1, 16)
    """Fewest and most loops seen in training."""

    def __post_init__(self) -> None:
        for name in (
            *("vocab_size", "places", "width", "heads", "layers", "mlp_width"),
            *("cycles", "inner_cycles", "puzzles"),
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: allowed is 1 or more")
        for name in ("answer_layers", "mixing_width", "prefix", "puzzle_width"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}={getattr(self, name)}: allowed is 0 or more")
        for name, allowed in (
            ("mixing", get_args(Mixing)),
            ("positions", get_args(Positions)),
            ("window", get_args(Window)),
            ("halts", get_args(Halts)),
        ):
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name}={getattr(self, name)!r}: allowed are {', '.join(allowed)}")
        if (self.mixing == "mlp") != (self.mixing_width > 0):
            raise ConfigError(
                f"mixing={self.mixing!r}, mixing_width={self.mixing_width}: give a width with 'mlp', and 0 otherwise"
            )
        if self.mixing == "mlp" and self.positions == "rotary":
            raise ConfigError("mixing='mlp' has nothing to rotate; give positions='none' or 'learned'")
        if self.width % self.heads or (self.mixing == "attention" and (self.width // self.heads) % 2):
            raise ConfigError(f"width={self.width}, heads={self.heads}: the width of a head must be whole and even")
        if self.puzzle_width > self.prefix * self.width:
            raise ConfigError(
                f"puzzle_width={self.puzzle_width} does not fit prefix={self.prefix} places of width={self.width}"
            )
        if self.puzzles > 1 and not self.puzzle_width:
            raise ConfigError(f"puzzles={self.puzzles} cannot be told apart with puzzle_width=0; give puzzle_width")
        least, most = self.trained_loops
        if not 1 <= least <= most:
            raise ConfigError(f"trained_loops={self.trained_loops}: allowed is 1 <= fewest <= most")
