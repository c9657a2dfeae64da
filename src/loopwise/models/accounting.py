"""What a looped language model weighs and costs, from its configuration alone.

    FLOPs(R loops) = F0 + R * Fr         F0: prelude, coda, head;  Fr: one loop
    bound(mean)    = (F0 + R * Fr) / (F0 + mean * Fr)

The bound is how much faster exits can make a machine that is limited by arithmetic (Schwethelm et al. 2026,
Continuous Depth Batching). A multiply-add counts as two; norms, rotations, softmax and the embedding lookup are left
out, as usual.
"""

from dataclasses import dataclass
from typing import Literal, get_args

from loopwise.errors import ConfigError
from loopwise.models.config import LoopedLMConfig

PlanePolicy = Literal["per_loop", "last_exited", "single"]
"""How many planes of keys and values a token keeps per core layer.

per_loop     one for each loop
last_exited  one for each loop it ran (readers beyond take the last)
single       one, overwritten by every loop
"""

PLANE_POLICIES: tuple[PlanePolicy, ...] = get_args(PlanePolicy)
_NORMS_PER_BLOCK = {"pre": 2, "post": 2, "branch": 2, "pre_branch": 4, "pre_post": 4}


@dataclass(frozen=True, kw_only=True)
class ParameterCount:
    """Numbers of parameters, part by part."""

    embedding: int
    """The embedding table."""
    prelude: int
    """Layers before the loop."""
    core: int
    """Layers inside the loop and the adapter before them."""
    coda: int
    """Layers after the loop."""
    norm: int
    """The final norm."""
    gate: int
    """The learned hazard."""
    head: int
    """The head; 0 when it is the embedding table."""

    @property
    def stored(self) -> int:
        """Distinct parameters, what a checkpoint holds."""
        return self.embedding + self.prelude + self.core + self.coda + self.norm + self.gate + self.head

    def unrolled(self, loops: int) -> int:
        """Parameters of the feed-forward network that does the same as `loops` loops."""
        return self.stored + (loops - 1) * self.core


@dataclass(frozen=True, kw_only=True)
class FlopCount:
    """Floating-point operations to run one token once, forward."""

    fixed: int
    """F0: prelude, coda and head."""
    per_loop: int
    """Fr: adapter, core and gate."""

    def total(self, loops: int | float) -> float:
        """Operations of one token that runs `loops` loops (a mean may be given)."""
        return float(self.fixed + loops * self.per_loop)

    def bound(self, loops: int, mean_loops: int | float) -> float:
        """How much less work tokens are that stop after `mean_loops` of `loops` loops."""
        return self.total(loops) / self.total(mean_loops)


def count_parameters(config: LoopedLMConfig) -> ParameterCount:
    """Parameters of each part."""
    block = _block_matrices(config) + _NORMS_PER_BLOCK[config.norm] * config.width
    keyed = (config.heads + config.kv_heads) * config.head_width
    block += keyed * (int(config.qk_bias) + int(config.qk_norm))
    table = config.vocab_size * config.width
    adapter = _adapter_matrix(config) + (config.width if config.injection == "adapter" and config.adapter_bias else 0)
    return ParameterCount(
        embedding=table,
        prelude=config.prelude_layers * block,
        core=config.core_layers * block + adapter,
        coda=config.coda_layers * block,
        norm=config.width,
        gate=config.width + 1 if config.gate else 0,
        head=0 if config.tied_head else table,
    )


def count_flops(config: LoopedLMConfig, *, context: int = 0) -> FlopCount:
    """Operations per token.

    Args:
        context: keys that each attention layer reads; 0 leaves attention scores out.
    """
    block = 2 * _block_matrices(config) + 4 * context * config.heads * config.head_width
    outside = config.prelude_layers + config.coda_layers
    return FlopCount(
        fixed=outside * block + 2 * config.vocab_size * config.width,
        per_loop=config.core_layers * block + 2 * _adapter_matrix(config) + (2 * config.width if config.gate else 0),
    )


def count_planes(policy: str, *, loops: int, mean_loops: int | float | None = None) -> float:
    """Planes of keys and values that a token keeps per core layer.

    Args:
        loops: most loops of the run.
        mean_loops: mean loops after which tokens stop; only `last_exited` keeps less for it. None means all.

    Raises:
        ConfigError: for an unknown policy or a mean that no run has.
    """
    if policy not in PLANE_POLICIES:
        raise ConfigError(f"policy={policy!r}: allowed are {', '.join(PLANE_POLICIES)}")
    mean = float(loops if mean_loops is None else mean_loops)
    if not 1 <= mean <= loops:
        raise ConfigError(f"mean_loops={mean}: allowed is 1 to loops={loops}")
    return {"per_loop": float(loops), "last_exited": mean, "single": 1.0}[policy]


def kv_bytes(
    config: LoopedLMConfig,
    policy: str,
    *,
    loops: int,
    bytes_per_number: int,
    mean_loops: int | float | None = None,
) -> float:
    """Bytes of keys and values that one token keeps, prelude and coda included.

    For `last_exited` this is what the planes themselves need; memory that comes in pages frees less.
    """
    layers = config.prelude_layers + config.coda_layers
    planes = layers + config.core_layers * count_planes(policy, loops=loops, mean_loops=mean_loops)
    return planes * 2.0 * config.kv_heads * config.head_width * bytes_per_number


def _block_matrices(config: LoopedLMConfig) -> int:
    projections = (2 * config.heads + 2 * config.kv_heads) * config.head_width
    return config.width * (projections + 3 * config.mlp_width)


def _adapter_matrix(config: LoopedLMConfig) -> int:
    return 2 * config.width * config.width if config.injection == "adapter" else 0
