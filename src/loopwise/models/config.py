"""What a looped language model is made of. One configuration covers every family of language models we read."""

from dataclasses import dataclass
from typing import Literal, get_args

from loopwise.errors import ConfigError
from loopwise.nn.block import NORM_LAYOUTS, NormLayout
from loopwise.nn.rotary import RotaryLayout, RotaryScaling

Start = Literal["embeddings", "normal", "zeros"]
Injection = Literal["none", "add", "adapter"]


@dataclass(frozen=True, kw_only=True)
class LoopedLMConfig:
    """Shapes and choices of a `LoopedLM`.

    One norm, the final one, serves wherever `norm?` stands and is there or not by configuration:

        x  = embed(tokens) * embed_scale ;  e = prelude(x)
        s0 = e | normal | zeros
        s  = norm?( core( s | s + e | A[s; e] ) )          once per loop
        logits = head( norm?( coda( norm?(s) ) ) )
        hazard = sigmoid(w.n + b) in float32               n = s if the loop ends with the norm, else norm(s)
    """

    vocab_size: int
    """Rows of the embedding table."""
    width: int
    """Features of the state, D."""
    heads: int
    """Attention heads, H."""
    kv_heads: int
    """Key-value heads, G; equal to heads unless queries are grouped."""
    head_width: int
    """Features per head, K."""
    mlp_width: int
    """Features inside the gated MLP."""
    prelude_layers: int = 0
    """Layers before the loop."""
    core_layers: int
    """Layers inside the loop."""
    coda_layers: int = 0
    """Layers after the loop."""
    loops: int
    """Loops that run when nobody says otherwise."""
    trained_loops: tuple[int, int]
    """Fewest and most loops seen in training."""
    anytime: bool = False
    """Whether readouts before the last loop were trained."""
    max_positions: int
    """Longest context, in tokens."""

    norm: NormLayout = "pre"
    """Where each branch of a block is normalised."""
    norm_eps: float = 1e-6
    """Added to the mean square."""
    loop_norm: bool = False
    """Whether the final norm is applied at the end of every loop, and the normed state fed back (Ouro)."""
    coda_norm: bool = False
    """Whether the final norm is applied before the coda (Huginn)."""
    final_norm: bool = True
    """Whether the final norm is applied before the head."""

    rotary: RotaryLayout = "half"
    """Which coordinates rotate together."""
    rotary_base: float = 10_000.0
    """Base of the rotary frequencies."""
    rotary_scaling: RotaryScaling | None = None
    """Stretching of slow frequencies, if any."""
    qk_bias: bool = False
    """Whether queries and keys have a learned bias, added before rotation."""
    qk_norm: bool = False
    """Whether queries and keys are normalised over all heads together (OLMo-2)."""

    embed_scale: float = 1.0
    """Factor on the embeddings."""
    tied_head: bool = False
    """Whether the head is the embedding table."""
    start: Start = "embeddings"
    """The state before loop 1: the prelude's output, truncated normal noise, or zeros."""
    start_std: float = 1.0
    """Standard deviation of the normal start, before the cut at three of them."""
    start_seed: int = 0
    """Seed of the normal start when none is given; part of the model, not of sampling."""
    injection: Injection = "none"
    """How the prelude's output enters each loop: not, added, or through a linear map of [state; e]."""
    adapter_bias: bool = False
    """Whether that linear map has a bias."""
    gate: bool = False
    """Whether there is a learned hazard, sigmoid(w . normed state + b)."""

    def __post_init__(self) -> None:
        positive = ("vocab_size", "width", "heads", "kv_heads", "head_width", "mlp_width", "core_layers", "loops")
        for name in (*positive, "max_positions"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: allowed is 1 or more")
        for name in ("prelude_layers", "coda_layers"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}={getattr(self, name)}: allowed is 0 or more")
        for name, allowed in (
            ("norm", NORM_LAYOUTS),
            ("rotary", get_args(RotaryLayout)),
            ("start", get_args(Start)),
            ("injection", get_args(Injection)),
        ):
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name}={getattr(self, name)!r}: allowed are {', '.join(allowed)}")
        if self.heads % self.kv_heads:
            raise ConfigError(f"heads={self.heads}, kv_heads={self.kv_heads}: heads must be a multiple of kv_heads")
        if self.head_width % 2:
            raise ConfigError(f"head_width={self.head_width}: rotary positions need an even number")
        if self.start != "embeddings" and self.injection == "none":
            raise ConfigError(
                f"start={self.start!r}, injection='none': the tokens would never enter the loop; "
                "allowed are start='embeddings', or injection='add' or 'adapter'"
            )
        least, most = self.trained_loops
        if not 1 <= least <= most:
            raise ConfigError(f"trained_loops={self.trained_loops}: allowed is 1 <= fewest <= most")

    @property
    def layers(self) -> int:
        """Layers that are stored."""
        return self.prelude_layers + self.core_layers + self.coda_layers
