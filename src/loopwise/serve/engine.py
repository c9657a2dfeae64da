"""The engine that a server runs."""

from loopwise.engine.listening import ListeningEngine
from loopwise.engine.speculation import Speculation
from loopwise.loops.planes import parse_policy
from loopwise.models.looped_lm import LoopedLM
from loopwise.serve.settings import ServeConfig


def build_engine(
    model: LoopedLM,
    settings: ServeConfig,
    *,
    memory: int | str = "4GiB",
    policy: str,
    speculate: str | Speculation = "auto",
) -> ListeningEngine:
    """An engine for this model. Under policies whose numbers depend on how a prompt is cut, prompts are taken whole.

    Raises:
        ConfigError: an option that is not allowed.
    """
    whole = not parse_policy(policy).chunk_invariant
    return ListeningEngine(
        model,
        policy,
        speculate=speculate,
        memory=memory,
        chunk=None if whole else settings.chunk,
        prefix_cache=not whole,
        seats=settings.seats,
        max_loops=settings.max_loops,
        prompt_depth=settings.prompt_depth,
    )
