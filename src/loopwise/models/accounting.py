"""What a looped language model weighs and costs, from its configuration alone.

    FLOPs(R loops) = F0 + R * Fr         F0: prelude, coda, head;  Fr: one loop
    bound(mean)    = (F0 + R * Fr) / (F0 + mean * Fr)

The bound is how much faster exits can make a machine that is limited by arithmetic (Schwethelm et al. 2026,
Continuous Depth Batching). A multiply-add counts as two; norms, rotations, softmax and the embedding lookup are left
out, as usual.
"""

from dataclasses import dataclass

from loopwise.errors import ConfigError
from loopwise.loops.planes import parse_policy
from loopwise.models.config import LoopedLMConfig

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


def count_planes(policy: str, *, loops: int, mean_loops: int | float | None = None, generated: bool = True) -> float:
    """Planes of keys and values that a token keeps per core layer under one of the policies of `loops/planes.py`.

    Args:
        loops: most loops of the run.
        mean_loops: mean loops after which tokens stop (`per_loop` fills all planes even so). Where loops share planes
            this is exact for tokens that all stop alike, and a bound for a mean. None means all.
        generated: a token of the answer; False for one of the prompt, which runs every loop.

    Raises:
        ConfigError: for an unknown policy or a mean that no run has.
    """
    declared = parse_policy(policy)
    mean = float(loops if mean_loops is None else mean_loops)
    if not 1 <= mean <= loops:
        raise ConfigError(f"mean_loops={mean}: allowed is 1 to loops={loops}")
    kept = float(declared.kept(loops, generated=generated))
    return kept if declared.fills or not generated else min(mean, kept)


def kv_bytes(
    config: LoopedLMConfig,
    policy: str,
    *,
    loops: int,
    bytes_per_number: int,
    mean_loops: int | float | None = None,
    generated: bool = True,
) -> float:
    """Bytes of keys and values that one token keeps, prelude and coda included; see `count_planes`.

    This is what the planes themselves need; memory that comes in pages frees less when tokens stop early.
    """
    layers = config.prelude_layers + config.coda_layers
    planes = layers + config.core_layers * count_planes(policy, loops=loops, mean_loops=mean_loops, generated=generated)
    return planes * 2.0 * config.kv_heads * config.head_width * bytes_per_number


def _block_matrices(config: LoopedLMConfig) -> int:
    projections = (2 * config.heads + 2 * config.kv_heads) * config.head_width
    return config.width * (projections + 3 * config.mlp_width)


def _adapter_matrix(config: LoopedLMConfig) -> int:
    return 2 * config.width * config.width if config.injection == "adapter" else 0
