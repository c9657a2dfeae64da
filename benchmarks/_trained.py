"""The demo's models in several seeds, for benchmarks to share: trained once, kept under runs/benchmarks.

A model that is there is not trained again, so a benchmark that was broken off goes on where it was.
"""

from dataclasses import replace
from pathlib import Path

from loopwise.demo.story import DemoOptions, hop_config, text_config
from loopwise.models.looped_lm import LoopedLM
from loopwise.train.config import StageConfig, TrainConfig
from loopwise.train.progress import Progress
from loopwise.train.run import train
from loopwise.train.setup import build_data
from loopwise.train.sources import PackedSource, PointerChasingSource

SEEDS = (0, 1, 2)
FOLDER = Path("runs/benchmarks")


def trained(config: TrainConfig) -> LoopedLM:
    """The model that this run makes, or has made."""
    return train(config, progress=Progress(every=60.0)).model


def source(config: TrainConfig, stage: int = 0) -> PackedSource | PointerChasingSource:
    """Where a stage of the run takes its batches from."""
    return build_data(config, cache=Path(config.run) / "data").source(stage)


def demo_hops(seed: int) -> TrainConfig:
    """The demo's pointer chasing, both stages."""
    return replace(hop_config(DemoOptions(seed=seed)), run=str(FOLDER / f"demo-hops-{seed}"))


def demo_text(seed: int) -> TrainConfig:
    """The demo's language model, both stages."""
    return text_config(DemoOptions(seed=seed))


def language_model(seed: int) -> TrainConfig:
    """Stage I of the demo's language model: every loop predicts, and the gate learns beside."""
    config = demo_text(seed)
    return replace(config, run=str(FOLDER / f"language-{seed}"), stages=config.stages[:1])


def with_gate(seed: int) -> TrainConfig:
    """Stage II of the demo's language model, on what stage I has made."""
    config, first = demo_text(seed), language_model(seed)
    trained(first)
    return replace(
        config,
        run=str(FOLDER / f"calibrated-{seed}"),
        stages=config.stages[1:],
        init=f"{first.run}/model",
        model=None,
        family=None,
        tokenizer=None,
    )


def control(seed: int, name: str, *, layers: int) -> TrainConfig:
    """As many tokens as stage I, one loop, `layers` times the layers, everything else the same."""
    config = language_model(seed)
    assert config.model is not None
    model = replace(
        config.model, core_layers=config.model.core_layers * layers, loops=1, trained_loops=(1, 1), gate=False
    )
    stage: StageConfig = replace(config.stages[0], name=name, objective="last:loops=1")
    return replace(
        config,
        run=str(FOLDER / f"{name}-{seed}"),
        model=model,
        stages=(stage,),
        family="loopwise",
        validation_loops=(1,),
    )


def follower(seed: int) -> TrainConfig:
    """Pointer chasing at every loop, the gate not taught."""
    config = demo_hops(seed)
    stage = replace(config.stages[0], objective="every:loops=4")
    return replace(config, run=str(FOLDER / f"hops-{seed}"), stages=(stage,))
