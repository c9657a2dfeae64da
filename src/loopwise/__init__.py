"""Loopwise: models that think in loops.

The names below are imported when they are first used, so that `import loopwise` loads neither torch nor
transformers.
"""

import difflib
import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from loopwise.engine.engine import Engine as Engine
    from loopwise.engine.sampling import Sampling as Sampling
    from loopwise.engine.write import generate as generate
    from loopwise.hub.checkpoints import save as save
    from loopwise.hub.machines import load as load
    from loopwise.hub.tokenizer import Tokenizer as Tokenizer
    from loopwise.loops.drivers import run_until as run_until
    from loopwise.loops.drivers import segments as segments
    from loopwise.loops.drivers import unroll as unroll
    from loopwise.loops.exits import parse_rule as parse_rule
    from loopwise.models.config import LoopedLMConfig as LoopedLMConfig
    from loopwise.models.looped_lm import LoopedLM as LoopedLM
    from loopwise.trace import LoopTrace as LoopTrace

__version__ = "0.1.0"

_HOMES = {
    "Engine": "loopwise.engine.engine",
    "LoopTrace": "loopwise.trace",
    "LoopedLM": "loopwise.models.looped_lm",
    "LoopedLMConfig": "loopwise.models.config",
    "Sampling": "loopwise.engine.sampling",
    "Tokenizer": "loopwise.hub.tokenizer",
    "generate": "loopwise.engine.write",
    "load": "loopwise.hub.machines",
    "parse_rule": "loopwise.loops.exits",
    "run_until": "loopwise.loops.drivers",
    "save": "loopwise.hub.checkpoints",
    "segments": "loopwise.loops.drivers",
    "unroll": "loopwise.loops.drivers",
}


def __getattr__(name: str) -> object:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    near = difflib.get_close_matches(name, _HOMES, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else f"; it has {', '.join(_HOMES)}"
    raise AttributeError(f"module 'loopwise' has no attribute {name!r}{hint}", name=name)


def __dir__() -> list[str]:
    return [*globals(), *_HOMES]
