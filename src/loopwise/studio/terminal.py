"""Text in the terminal, each token tinted by the loops it took, with a legend and what leaving early was worth.

Tints set foreground and background together, so they read the same on dark and light terminals; their lightness
falls steadily, so they read without colour vision. Without colours (NO_COLOR, a pipe, 16 colours) a token carries its
loops as a superscript; where that cannot be written either, only the legend speaks.
"""

from collections import Counter
from collections.abc import Sequence

from rich.console import Console
from rich.style import Style
from rich.text import Text

from loopwise.errors import InputError
from loopwise.studio.glyphs import visible

INK, PAPER = "color(16)", "color(231)"
TINTS = tuple(Style(color=INK, bgcolor=f"color({shade})") for shade in (230, 194, 151, 109, 73, 67)) + tuple(
    Style(color=PAPER, bgcolor=f"color({shade})") for shade in (61, 54)
)
GIVEN = Style(dim=True)
SUPERSCRIPTS = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")


class TokenPrinter:
    """Prints tokens as they come. Call `push` for each and `finish` once.

    Args:
        console: where to; its colour system and NO_COLOR decide how loops are shown.
        max_loops: R, the loops a token could have taken.
        policy: plane policy the text was made with. `last_exited` saves core work by leaving early; under `per_loop`
            an exited row runs on to fill its planes, and the legend says so; None claims nothing about work.
    """

    def __init__(self, console: Console, max_loops: int, *, policy: str | None = None) -> None:
        if max_loops < 1:
            raise InputError(f"max_loops is {max_loops}; it must be at least 1")
        self.console = console
        self.max_loops = max_loops
        self.policy = policy
        self.counts: Counter[int] = Counter()
        tinted = console.color_system in ("256", "truecolor") and not console.no_color
        self.tinted = tinted
        self._marks = not tinted and not console.options.ascii_only
        self._at_line_start = True

    def push(self, text: str, loops: int) -> None:
        """Print one token; `loops` is 0 for a token that was given. Control characters become visible."""
        if not 0 <= loops <= self.max_loops:
            raise InputError(f"a token took {loops} loops; it must lie between 0 and {self.max_loops}")
        self.counts[loops] += 1
        shown = visible(text).replace("\t", "→   ")
        if loops and not self.console.options.ascii_only:
            shown = shown.replace("\n", "↵\n")
        if shown:
            self._at_line_start = shown.endswith("\n")
        # The mark goes before trailing line ends, so that it stays beside the word it counts.
        body = shown.rstrip("\n")
        mark = str(loops).translate(SUPERSCRIPTS) if loops and self._marks else ""
        self._print(body + mark + shown[len(body) :], self._style(loops))

    def finish(self) -> None:
        """End the line and print the legend: tokens per loop, mean loops, and what leaving early was worth."""
        if not self._at_line_start:
            self.console.print()
        self.console.print()
        self.console.print(self._legend(), highlight=False)
        self.console.print(Text(self.summary()), style=Style(bold=True), highlight=False)

    def summary(self) -> str:
        """One line: mean loops of the tokens that a row emitted, and what that was worth under the plane policy."""
        ran = sum(count for loops, count in self.counts.items() if loops)
        if not ran:
            return "no token was generated"
        mean = sum(loops * count for loops, count in self.counts.items()) / ran
        line = f"mean {mean:.2f} of {self.max_loops} loops over {_plural(ran, 'token')}"
        fewer = f"{1 - mean / self.max_loops:.0%}"
        if self.policy == "last_exited":
            return f"{line}: {fewer} of the core's work saved"
        if self.policy == "per_loop":
            return f"{line} before answering; rows run on to fill their planes, so no core work is saved"
        return f"{line}: {fewer} fewer than full depth"

    def _legend(self) -> Text:
        legend = Text("tokens by loops")
        width = -(-self.max_loops // len(TINTS))
        for first in range(1, self.max_loops + 1, width):
            last = min(first + width - 1, self.max_loops)
            count = sum(self.counts[loops] for loops in range(first, last + 1))
            name = str(first) if first == last else f"{first}-{last}"
            legend.append("   ")
            if self.tinted:
                # No-break spaces keep a swatch and its count on one line.
                legend.append(f"\u00a0{name}\u00a0", self._style(last)).append(f"\u00a0{count}")
            else:
                legend.append(f"{name}: {count}")
        if self.counts[0]:
            legend.append("   given", GIVEN).append(f" {self.counts[0]}")
        return legend

    def _style(self, loops: int) -> Style:
        if not loops:
            return GIVEN
        if not self.tinted:
            return Style()
        width = -(-self.max_loops // len(TINTS))
        steps, step = -(-self.max_loops // width), (loops - 1) // width
        return TINTS[round(step * (len(TINTS) - 1) / max(steps - 1, 1))]

    def _print(self, text: str, style: Style) -> None:
        # Line ends stay untinted: a terminal would otherwise paint the rest of the line.
        for line in text.splitlines(keepends=True):
            body = line.rstrip("\n")
            fragment = Text(body, style) + Text(line[len(body) :])
            self.console.print(fragment, end="", soft_wrap=True, highlight=False)


def print_tinted(
    console: Console, texts: Sequence[str], loops: Sequence[int], max_loops: int, *, policy: str | None = None
) -> None:
    """Print a whole text token by token, then the legend. See `TokenPrinter` for the arguments.

    `texts` and `loops` have one entry per token; 0 loops marks a given token.
    """
    if len(texts) != len(loops):
        raise InputError(f"{len(texts)} texts came with {len(loops)} loop counts; give one for each token")
    printer = TokenPrinter(console, max_loops, policy=policy)
    for text, count in zip(texts, loops, strict=True):
        printer.push(text, int(count))
    printer.finish()


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
