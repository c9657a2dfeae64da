"""From what somebody asks for to a request that can be served: everything is checked before anything is queued."""

from collections.abc import Sequence

from loopwise.engine.answer import Answer
from loopwise.engine.checks import check_sampling, encode_prompt
from loopwise.engine.depth import PromptDepth
from loopwise.engine.request import Replay, Request, check_replay
from loopwise.engine.sampling import Sampling, check_vocabulary
from loopwise.errors import ConfigError, InputError
from loopwise.loops.exits import ExitRule
from loopwise.memory.paged import PagedMemory
from loopwise.models.looped_lm import LoopedLM


class Admission:
    """What one engine can serve.

    Args:
        budget: bytes for keys and values, as they were asked for.
        max_loops: most loops that a request may ask for.
        prompt_depth: whether prompts run every loop or obey the exit rule.
    """

    def __init__(
        self, model: LoopedLM, memory: PagedMemory, *, budget: int, max_loops: int, prompt_depth: PromptDepth
    ) -> None:
        self.budget = budget
        self._model = model
        self._memory = memory
        self._policy = memory.policy
        self._max_loops = max_loops
        self._prompt_depth = prompt_depth

    def request(
        self,
        prompt: str | Sequence[int],
        sampling: Sampling,
        *,
        sample: int = 0,
        replay: Replay | None = None,
        signals: bool = False,
        provisional: bool = False,
    ) -> Request:
        """A request, checked.

        Raises:
            ConfigError, InputError: as `Engine.submit`.
        """
        model = self._model
        if signals and model.facts.signal is None:
            raise ConfigError("signals=True: this model has no gate, so there is no signal to note; leave it out")
        checked = check_sampling(model, sampling, policy="per_loop", prompt_depth=self._prompt_depth)
        check_vocabulary(sampling, model.config.vocab_size)
        if checked.max_loops > self._max_loops:
            raise ConfigError(
                f"max_loops={checked.max_loops}: this engine has planes for {self._max_loops} loops; "
                f"make it with Engine(..., max_loops={checked.max_loops})"
            )
        ids = encode_prompt(model, prompt)
        room = min(sampling.max_tokens, model.config.max_positions - len(ids))
        self._check_room(len(ids), room, checked.max_loops)
        check_replay(
            *(replay, room, checked.max_loops, model.config.vocab_size),
            prompt=len(ids),
            exits=self._prompt_depth == "exit",
        )
        return Request(
            prompt=ids,
            sampling=sampling,
            rule=checked.rule,
            max_loops=checked.max_loops,
            answer=Answer.of(model, ids, sampling, room=room, sample=sample),
            replay=replay,
            drafts=self._may_draft(checked.rule),
            signals=signals,
            provisional=provisional,
        )

    def _may_draft(self, rule: ExitRule) -> bool:
        """Budgets need answers one after the other, and rules that read a coda need its final entries."""
        return not ("allowance" in rule.needs or ("logits" in rule.needs and len(self._model.coda)))

    def _check_room(self, prompt: int, answer: int, loops: int) -> None:
        """Refuse a request whose keys and values would not fit if it were alone."""
        layout, boundary = self._memory.layout, self._memory.boundary
        begun, pages = -(-prompt // layout.page), -(-(prompt + answer - 1) // layout.page)
        core = begun * len(self._policy.stored(loops, generated=False))
        core += (pages - begun) * len(self._policy.stored(loops, generated=True))
        if core > self._memory.core.pages or (boundary is not None and pages > boundary.pages):
            stored = len(self._policy.stored(self._max_loops, generated=False))
            groups = max(-(-core // stored), pages if boundary is not None else 0)
            needed = groups * layout.group_bytes(stored)
            raise InputError(
                f"prompt and answer of {prompt + answer} tokens need up to {needed} bytes of keys and values, and this "
                f"engine has {self.budget}; lower max_tokens, or make it with Engine(..., memory={needed})"
            )

    def identity(self, request: Request) -> object:
        """What changes the numbers of a prompt's pages, beside its tokens."""
        weights = tuple((parameter.data_ptr(), parameter._version) for parameter in self._model.parameters())
        start = request.sampling.start
        if start is None and self._model.facts.random_start:
            start = self._model.config.start_seed
        deep = bool(len(self._model.coda)) or self._policy.knows_depth
        numbers = (str(self._policy), hash(weights), start)
        if self._prompt_depth == "full":
            return *numbers, request.max_loops if deep else None
        forced = None if request.replay is None else (request.replay.prompt_loops, request.replay.loops)
        return *numbers, str(request.rule), request.sampling.min_loops, request.max_loops, forced
