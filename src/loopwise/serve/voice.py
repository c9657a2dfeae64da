"""One answer on its way to one client: what has been said, and what each tick adds."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from loopwise.engine.answer import Emission
from loopwise.engine.sampling import Sampling
from loopwise.serve.effort import Knob
from loopwise.serve.thinking import Markers, Splitter


@dataclass(slots=True)
class Delta:
    """What one tick, or the end, adds to an answer."""

    index: int
    text: str = ""
    thought: str = ""
    emissions: Sequence[Emission] = ()
    """Tokens that are certain."""
    drafts: Sequence[Emission] = ()
    """Tokens that another may still replace."""
    finish: str | None = None
    """"stop" or "length", when nothing follows."""


@dataclass(kw_only=True)
class Voice:
    """One answer that is being made."""

    index: int
    """Its place among the request's choices."""
    prompt: tuple[int, ...]
    sampling: Sampling
    sample: int
    """Which of several answers to the same prompt it is."""
    knob: Knob
    room: int
    """Tokens it may have."""
    signals: bool = False
    drafts: bool = False
    markers: Markers | None = None
    splitter: Splitter | None = None
    """Where a checkpoint thinks aloud."""
    budget: int | None = None
    """Tokens of thought at most."""

    tokens: list[int] = field(default_factory=list)
    """What follows the prompt, a forced end of thought included."""
    loops: list[int] = field(default_factory=list)
    """Of the row that emitted each token; 0 for a forced one."""
    prompt_loops: tuple[int, ...] = ()
    """Of each of the prompt's positions, where prompts obey the exit rule."""
    thought: int = 0
    """Tokens of visible thought."""
    kv_bytes: int = 0
    """Bytes of keys and values held at its end."""
    finish: str | None = None

    @property
    def rest(self) -> int:
        """Tokens it may still have."""
        return self.room - len(self.tokens)

    @property
    def remaining(self) -> tuple[tuple[int, ...], Sampling]:
        """What the engine is to continue, and how: at first the prompt."""
        if not self.tokens:
            return self.prompt, self.sampling
        return self.prompt + tuple(self.tokens), replace(self.sampling, max_tokens=self.rest)

    @property
    def exhausted(self) -> bool:
        """Whether it is still thinking, and its budget is spent."""
        return (
            self.budget is not None
            and self.splitter is not None
            and self.splitter.inside
            and self.thought >= self.budget
        )

    def hear(self, emissions: Sequence[Emission], *, delta: Delta) -> None:
        """Take tokens; what they add is added to `delta`. Stops early when the thought's budget is spent."""
        if self.splitter is None and not self.drafts:
            self.tokens += [one.token for one in emissions]
            self.loops += [one.loops for one in emissions]
            delta.text += "".join([one.text or "" for one in emissions])
            delta.emissions = [*delta.emissions, *emissions] if delta.emissions else emissions
            return
        delta.drafts = [*delta.drafts, *(one for one in emissions if one.provisional)]
        for emission in emissions:
            if emission.provisional:
                continue
            self.tokens.append(emission.token)
            self.loops.append(emission.loops)
            delta.emissions = [*delta.emissions, emission]
            if self.splitter is None or self.markers is None:
                delta.text += emission.text or ""
                continue
            mark = self.markers.ids.get(emission.token)
            within = self.splitter.inside
            marks = mark is not None and self.splitter.awaits(mark)
            thought, text = self.splitter.push(mark if mark is not None and marks else emission.text or "")
            self.thought += within and self.splitter.inside
            delta.thought += thought
            delta.text += text
            if self.exhausted:
                return

    def close_thought(self, delta: Delta) -> None:
        """End the thought with the tokens that a model would end it with."""
        assert self.splitter is not None
        assert self.markers is not None
        delta.thought += self.splitter.close()
        forced = self.markers.closing[: self.rest]
        self.tokens += forced
        self.loops += [0] * len(forced)

    def end(self, reason: str, delta: Delta) -> None:
        """Nothing follows."""
        if self.splitter is not None:
            thought, text = self.splitter.push("", last=True)
            delta.thought += thought
            delta.text += text
        self.finish = delta.finish = reason
