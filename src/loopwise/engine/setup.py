"""What an engine is made of: its options, checked, and its parts, put together."""

from collections.abc import Callable
from dataclasses import dataclass

from loopwise.engine.admission import Admission
from loopwise.engine.answer import Emission
from loopwise.engine.core import Core
from loopwise.engine.costs import measure_ticks
from loopwise.engine.depth import PromptDepth, check_prompt_depth
from loopwise.engine.layout import layout_of
from loopwise.engine.request import Request
from loopwise.engine.runner import Runner
from loopwise.engine.scheduler import Scheduler
from loopwise.engine.speculation import Speculation, Speculator, parse_speculation, saved_speculation
from loopwise.errors import ConfigError
from loopwise.loops.planes import PlanePolicy, parse_policy
from loopwise.memory.paged import PagedMemory
from loopwise.memory.pages import parse_bytes
from loopwise.memory.prefix import PrefixCache
from loopwise.models.looped_lm import LoopedLM, need_language_model


@dataclass(frozen=True, kw_only=True)
class Options:
    """What `Engine` was asked for, seen to be possible and with every default filled in."""

    policy: PlanePolicy
    drafting: Speculation | None
    budget: int
    """Bytes for keys and values."""
    chunk: int
    """Prompt positions of one tick at most."""
    prefix_cache: bool
    seats: int
    rows: int
    max_loops: int
    prompt_depth: PromptDepth

    @classmethod
    def check(
        cls,
        model: LoopedLM,
        policy: str | PlanePolicy,
        *,
        speculate: str | Speculation | None,
        memory: int | str,
        chunk: int | None,
        prefix_cache: bool,
        seats: int,
        rows: int,
        max_loops: int | None,
        prompt_depth: str,
    ) -> "Options":
        """The arguments of `Engine`.

        Raises:
            ConfigError: an option that is not allowed, two that exclude each other, or a model that is no language
                model.
        """
        need_language_model(
            model, instead="to ask it, type: loopwise.run_until(model, model.encode(inputs), rule, max_loops=...)"
        )
        config, policy = model.config, parse_policy(policy)
        max_loops = max(config.loops, config.trained_loops[1]) if max_loops is None else max_loops
        for name, value in (("seats", seats), ("rows", rows), ("chunk", chunk), ("max_loops", max_loops)):
            if value is not None and value < 1:
                raise ConfigError(f"{name}={value}: allowed is 1 or more")
        if not policy.chunk_invariant and (chunk is not None or prefix_cache):
            raise ConfigError(
                f"policy={policy}: here a prompt's numbers depend on how it is cut, so it takes chunk=None and "
                f"prefix_cache=False; or type policy='{policy}:per_position', which is slow and does not"
            )
        if speculate == "auto":
            kept = saved_speculation(None if model.origin is None else model.origin.folder)
            speculate = (kept or "auto") if policy.speculates else "off"
        drafting = parse_speculation(speculate)
        if drafting is not None and not policy.speculates:
            raise ConfigError(
                f"speculate={speculate!r}: under policy={policy} a position waits for the one before it; "
                'type speculate="off", or policy="per_loop" or "last_exited"'
            )
        depth = check_prompt_depth(prompt_depth)
        if depth == "exit" and not policy.speculates:
            raise ConfigError(
                f"prompt_depth='exit': under policy={policy} later loops of a position change what others have "
                "read of it; type prompt_depth='full', or policy='last_exited' or 'per_loop'"
            )
        return cls(
            policy=policy,
            drafting=drafting,
            budget=parse_bytes(memory),
            chunk=chunk or config.max_positions,
            prefix_cache=prefix_cache and policy.chunk_invariant,
            seats=seats,
            rows=rows,
            max_loops=max_loops,
            prompt_depth=depth,
        )


def assemble(
    model: LoopedLM,
    options: Options,
    *,
    emit: Callable[[Request, list[Emission]], None],
    done: Callable[[Request], None],
) -> tuple[Core, Admission]:
    """The parts of one engine: what ticks, and what lets requests in.

    Args:
        emit: called with each request's certain tokens.
        done: called once for each request that is over.
    """

    def drop(request: Request, place: int) -> None:
        core.drop(request, place)

    memory = PagedMemory(
        *(layout_of(model), options.policy),
        planes=options.max_loops,
        budget=options.budget,
        seats=options.seats,
        device=model.embed.weight.device,
    )
    admission = Admission(
        *(model, memory),
        budget=options.budget,
        max_loops=options.max_loops,
        prompt_depth=options.prompt_depth,
    )
    runner = Runner(model, memory)
    prefix = PrefixCache(memory) if options.prefix_cache else None
    scheduler = Scheduler(
        *(memory, prefix),
        seats=options.seats,
        chunk=options.chunk,
        rows=options.rows,
        identity=admission.identity,
        drop=drop,
    )
    speculator = None
    if options.drafting is not None and options.max_loops > 1:
        speculator = Speculator(
            options.drafting, lambda: measure_ticks(runner.model, options.seats), model.config.loops
        )
    core = Core(
        *(runner, scheduler, prefix, speculator),
        depth=options.prompt_depth,
        identity=admission.identity,
        emit=emit,
        done=done,
    )
    return core, admission
