"""What `generate` and `chat` share: their settings, the model, and an answer that is shown while it grows."""

import io
import json
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from rich.console import Console

from loopwise.configuration import build
from loopwise.engine.answer import Completion, Emission
from loopwise.engine.sampling import Sampling
from loopwise.engine.write import Writing
from loopwise.errors import ConfigError, LoopRangeWarning
from loopwise.hub.checkpoints import load
from loopwise.loops.exits import parse_rule
from loopwise.models.looped_lm import LoopedLM
from loopwise.studio.glyphs import visible
from loopwise.studio.terminal import TokenPrinter

Settings = TypeVar("Settings")


@dataclass(frozen=True, kw_only=True)
class TalkConfig(Sampling):
    """How to answer, and with what."""

    policy: Literal["per_loop", "last_exited"] | None = None
    """What becomes of a token that stopped early: last_exited (it runs no further loop: work is saved; the default
    beside an exit rule) or per_loop (it runs on to fill its planes: as it was trained, no work saved)."""
    prompt_depth: Literal["full", "exit"] = "full"
    """How deep prompts are read: full (every loop) or exit (a prompt's tokens stop where the exit rule stops them)."""
    dtype: Literal["float64", "float32", "bfloat16", "float16"] | None = None
    """Number type of the weights; none keeps the checkpoint's."""
    device: str = "cpu"
    """Where to run: cpu, cuda, cuda:1, mps."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.exit is not None:
            parse_rule(self.exit)


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(TalkConfig):
    """What to answer, how, and with what."""

    ids: tuple[int, ...] | None = None
    """The prompt as token ids, such as ids=1,2,3; for models without a tokenizer."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n > 1 and self.temperature == 0:
            raise ConfigError(f"n={self.n} would be equal at temperature=0; type: temperature=0.8")


@dataclass(frozen=True, kw_only=True)
class ChatConfig(TalkConfig):
    """How to answer, and with what."""

    max_tokens: int = 256
    """Tokens of one reply at most."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n != 1:
            raise ConfigError(f"n={self.n}: a chat has one reply; type: loopwise generate MODEL PROMPT n=2")


def read_settings(cls: type[Settings], words: Sequence[str]) -> Settings:
    """The settings that `key=value` words describe. Lists may be typed bare: ids=1,2,3 and stop=END.

    Raises:
        ConfigError: for an unknown key or a value that is not allowed.
    """
    return build(cls, None, [_with_brackets(word) for word in words])


def _with_brackets(word: str) -> str:
    key, _, text = word.partition("=")
    if key not in ("ids", "stop"):
        return word
    try:
        if isinstance(json.loads(text), list):
            return word
    except ValueError:
        pass
    return f"{key}=[{text}]" if key == "ids" else f"{key}={json.dumps([text])}"


def is_setting(word: str) -> bool:
    """Whether a word is meant as `key=value`."""
    return re.match(r"[A-Za-z_][\w.]*=", word) is not None


def load_model(name: str, *, dtype: str | None, device: str) -> LoopedLM:
    """The checkpoint, where and as the settings say.

    Raises:
        ConfigError: for a device that is not there.
        UserError: for a checkpoint that is not there or broken.
    """
    try:
        where = torch.device(device)
    except RuntimeError:
        raise ConfigError(f"device={device}: allowed are cpu, cuda, cuda:1, mps") from None
    there = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available()), "cpu": 1}
    if (where.index or 0) >= there.get(where.type, 0):
        found = ", ".join(f"{count} {kind}" for kind, count in there.items() if count)
        raise ConfigError(f"device={device}: there is no such device here (found {found}); type: device=cpu")
    return load(name, dtype=dtype, device=where)


class AnswerPrinter:
    """Shows an answer token by token on stdout: plain text, or tinted by loops with a legend."""

    def __init__(self, generation: Writing, *, show_loops: bool) -> None:
        self._tinted: TokenPrinter | None = None
        if show_loops:
            console = Console(highlight=False)
            self._tinted = TokenPrinter(console, generation.max_loops, policy=generation.policy)
        # A pipe gets the text as it is; a terminal must not obey it.
        self._show = visible if sys.stdout.isatty() else str
        self._last = ""

    def given(self, texts: Sequence[str]) -> None:
        """Show the end of the prompt before the answer, where loops are shown."""
        if self._tinted is None:
            return
        hidden = max(len(texts) - _SHOWN, 0)
        self._tinted.counts[0] += hidden
        for text in [f"… {texts[hidden]}", *texts[hidden + 1 :]] if hidden else texts:
            self._tinted.push(text, 0)

    def push(self, emission: Emission) -> None:
        """Show one token."""
        text = f"{emission.token} " if emission.text is None else emission.text
        self._last = text or self._last
        if self._tinted is not None:
            self._tinted.push(text, emission.loops)
        else:
            print(self._show(text), end="", flush=True)

    def finish(self, completion: Completion) -> None:
        """End the line; where loops are shown, say what they were worth."""
        if self._tinted is None:
            print(end="" if self._last.endswith("\n") else "\n", flush=True)
            return
        self._tinted.finish()
        if completion.tokens_per_second is not None:
            self._tinted.console.print(f"{completion.tokens_per_second:.3g} tokens/s", highlight=False)


_SHOWN = 64
"""Tokens of the prompt that are shown before a tinted answer."""


def run(generation: Writing, show: Callable[[Emission], None]) -> bool:
    """Generate to the end, or until the user interrupts: then what there is has been shown, and False is returned."""
    try:
        for emission in generation:
            show(emission)
    except KeyboardInterrupt:
        for emission in generation.held:
            show(emission)
        return False
    return True


def note(text: str) -> None:
    """Something about the answer that is not part of it."""
    print(text, file=sys.stderr, flush=True)


@contextmanager
def loops_known() -> Iterator[None]:
    """Within: nothing more about loops beyond the trained range; it has been said."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LoopRangeWarning)
        yield


def accept_any_text() -> None:
    """Let characters that stdout's encoding lacks show as `?` instead of ending the command."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
