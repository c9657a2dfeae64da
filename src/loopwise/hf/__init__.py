"""The bridge to transformers, PEFT and lm-eval.

Importing it registers our families, so that `AutoConfig` and `AutoModelForCausalLM` read their folders and hub ids
with this package's code and none of the checkpoint's. Nothing else in Loopwise imports transformers' models.
"""

from transformers import AutoConfig, AutoModelForCausalLM

from loopwise.hf.cache import LoopedCache
from loopwise.hf.config import CONFIGS, HuginnRavenConfig, LoopedPreTrainedConfig, LoopwiseConfig, OuroConfig
from loopwise.hf.model import (
    MODELS,
    LoopedForCausalLM,
    LoopwiseForCausalLM,
    OuroForCausalLM,
    RavenForCausalLM,
    wrap,
)
from loopwise.hf.training import ObjectiveProgress

CORE_LINEAR = r"(.*\.)?core\.\d+\.(attention|mlp)\.branch\.(qkv|out|gate_up|down)"
"""`target_modules` for adapters on every matrix of the core, which all loops share."""


def register() -> None:
    """Make transformers' `Auto` classes know our families; importing this package has done it."""
    for family, config in CONFIGS.items():
        AutoConfig.register(family, config, exist_ok=True)
        AutoModelForCausalLM.register(config, MODELS[family], exist_ok=True)


register()

__all__ = [
    "CORE_LINEAR",
    "HuginnRavenConfig",
    "LoopedCache",
    "LoopedForCausalLM",
    "LoopedPreTrainedConfig",
    "LoopwiseConfig",
    "LoopwiseForCausalLM",
    "ObjectiveProgress",
    "OuroConfig",
    "OuroForCausalLM",
    "RavenForCausalLM",
    "register",
    "wrap",
]
