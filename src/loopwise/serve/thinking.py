"""Checkpoints that think aloud: text between <think> and </think> is told apart from the answer."""

from dataclasses import dataclass

from loopwise.hub.tokenizer import Tokenizer

OPEN, CLOSE = "<think>", "</think>"


@dataclass(frozen=True, kw_only=True)
class Markers:
    """How a tokenizer writes the two marks."""

    ids: dict[int, str]
    """Marks that are special tokens, which decoded text leaves out."""
    closing: tuple[int, ...]
    """What ends a thought that is over its budget."""


def markers_of(tokenizer: Tokenizer | None) -> Markers | None:
    """The marks of a checkpoint that thinks aloud; None for others: its chat template or its tokens tell."""
    if tokenizer is None:
        return None
    alone = {mark: tokenizer.encode(mark, parse_special=True) for mark in (OPEN, CLOSE)}
    single = all(len(ids) == 1 for ids in alone.values())
    template = tokenizer.chat_template or ""
    if not single and OPEN not in template and CLOSE not in template:
        return None
    special = {ids[0]: mark for mark, ids in alone.items() if len(ids) == 1 and tokenizer.is_special(ids[0])}
    closing = [*tokenizer.encode("\n"), *alone[CLOSE], *tokenizer.encode("\n\n")]
    return Markers(ids=special, closing=tuple(closing))


def begins_inside(tokenizer: Tokenizer, prompt: tuple[int, ...]) -> bool:
    """Whether a prompt has opened a thought already, as some templates do."""
    return tokenizer.decode(prompt[-16:], skip_special=False).rstrip().endswith(OPEN)


class Splitter:
    """Tells thought from answer while text comes piece by piece; the marks themselves are left out."""

    def __init__(self, *, inside: bool) -> None:
        self.inside = inside
        """Whether what comes now is thought."""
        self._begun = inside
        """Whether anything but space has come, after which a mark opens nothing."""
        self._fresh = inside
        """Whether spaces at the beginning of a part are still to be left out."""
        self._held = ""

    def awaits(self, mark: str) -> bool:
        """Whether this mark would open or close a thought now; elsewhere it is no more than its token's text."""
        return self.inside if mark == CLOSE else not self._begun

    def push(self, text: str, *, last: bool = False) -> tuple[str, str]:
        """What is certain now, as (thought, answer).

        Args:
            last: nothing follows, so nothing is held back.
        """
        held = self._held + text
        self._held = ""
        thought = ""
        if not self._begun:
            start = held.lstrip()
            if not last and (not start or OPEN.startswith(start)):
                self._held = held
                return "", ""
            self._begun = True
            if start.startswith(OPEN):
                self.inside = self._fresh = True
                held = start.removeprefix(OPEN)
        if self.inside:
            thought, mark, rest = held.partition(CLOSE)
            if not mark:
                if not last:
                    thought, self._held = _split_doubtful(thought)
                return self._trimmed(thought), ""
            thought = self._trimmed(thought)
            self.inside, self._fresh = False, True
            held = rest
        return thought, self._trimmed(held)

    def close(self) -> str:
        """End the thought from outside; what was held back of it is no mark, and is returned."""
        held = self._trimmed(self._held)
        self._begun, self.inside, self._fresh, self._held = True, False, True, ""
        return held

    def _trimmed(self, text: str) -> str:
        """The text without the empty lines that follow a mark."""
        if self._fresh:
            text = text.lstrip("\n")
            self._fresh = not text
        return text


def _split_doubtful(text: str) -> tuple[str, str]:
    """The text without its longest end with which the closing mark begins, and that end."""
    for length in range(min(len(CLOSE) - 1, len(text)), 0, -1):
        if CLOSE.startswith(text[-length:]):
            return text[:-length], text[-length:]
    return text, ""
