"""Text of an answer while it grows: whole characters only, and nothing that a stop text may still take back."""

from collections.abc import Sequence

from loopwise.hub.tokenizer import StreamDecoder, Tokenizer


class TextStream:
    """Turns tokens into text as they come.

    A token's text is held back while its end could be the beginning of a stop text; the texts given out, joined, are
    the decoded answer up to the stop text that is complete first.

    Args:
        stops: texts that end the answer; they are cut off.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()) -> None:
        self._decoder = StreamDecoder(tokenizer, continuation=True)
        self._stops = tuple(stops)
        self._held: list[str] = []
        self.stopped = False
        """Whether a stop text has come."""

    def push(self, token: int | None, *, last: bool = False) -> list[str]:
        """The texts that are certain now, one for each token from the oldest that was held back.

        Args:
            token: the next token; None for one that is not text (the end of the text).
            last: no token follows, so nothing is held back any longer.
        """
        text = "" if token is None else self._decoder.push(token)
        if not (self._stops or self._held or last):
            return [text]  # nothing can take it back
        self._held.append(text + self._decoder.flush() if last else text)
        joined = "".join(self._held)
        found = [(place + len(stop), place) for stop in self._stops if (place := joined.find(stop)) >= 0]
        self.stopped = bool(found)
        if last or self.stopped:
            return self._give(len(self._held), min(found)[1] if found else len(joined))
        certain = len(joined) - self._doubtful(joined)
        count = total = 0
        while count < len(self._held) and total + len(self._held[count]) <= certain:
            total += len(self._held[count])
            count += 1
        return self._give(count, total)

    @property
    def held(self) -> list[str]:
        """The texts that are held back, oldest first."""
        return list(self._held)

    def _give(self, count: int, length: int) -> list[str]:
        """The first `count` held texts, their joined text cut at `length`."""
        given: list[str] = []
        for text in self._held[:count]:
            given.append(text[:length])
            length -= len(given[-1])
        del self._held[:count]
        return given

    def _doubtful(self, text: str) -> int:
        """Length of the longest end of `text` with which a stop text begins."""
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                return length
        return 0
