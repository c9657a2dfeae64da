"""Small language models of experiments: k layers, looped or not, and how they are trained."""

from loopwise.models.config import LoopedLMConfig
from loopwise.train.fit import FitConfig
from loopwise.train.optimizers import OptimizerConfig
from loopwise.train.schedule import ScheduleConfig


def small_lm(
    *, vocab_size: int, width: int, layers: int, loops: int, length: int, prelude: int = 0, gate: bool = False
) -> LoopedLMConfig:
    """`layers` x `loops`: the plain pre-norm block of a Llama, heads of 16 features, head tied to the embeddings.

    With one loop this is a plain transformer, so layers and loops are all that differs between variants.
    """
    return LoopedLMConfig(
        vocab_size=vocab_size,
        width=width,
        heads=width // 16,
        kv_heads=width // 16,
        head_width=16,
        mlp_width=2 * width,
        prelude_layers=prelude,
        core_layers=layers,
        loops=loops,
        trained_loops=(1, loops),
        max_positions=length,
        tied_head=True,
        gate=gate,
    )


def recipe(steps: int, learning_rate: float) -> FitConfig:
    """Muon for the matrices, a short warmup, and the last third of the steps falling to zero."""
    return FitConfig(
        steps=steps,
        learning_rate=learning_rate,
        schedule=ScheduleConfig(warmup=max(1, steps // 20), decay=steps // 3),
        optimizer=OptimizerConfig(name="muon", betas=(0.9, 0.98), weight_decay=0.01),
        log_every=max(1, steps // 10),
        checkpoint_every=max(1, steps // 4),
    )


def layers_and_loops(variant: str) -> tuple[int, int]:
    """`2x3` means two layers, three loops."""
    layers, loops = variant.split("x")
    return int(layers), int(loops)
