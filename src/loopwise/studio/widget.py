"""The studio's strip of tinted tokens in a notebook: the same file of JavaScript, through anywidget.

from loopwise.studio.widget import strip
shown = strip(trace)          # the last line of a cell shows it
shown.threshold = 0.7         # re-tints it: a replay of recorded hazards
shown.selected                # the token that was clicked, -1 for none
"""

from importlib import resources
from typing import Any

from loopwise.errors import MissingExtraError
from loopwise.studio.glyphs import label, visible
from loopwise.trace import LoopTrace


def strip(trace: LoopTrace) -> Any:
    """A widget over a trace, with the traits `threshold` (None shows what was recorded), `selected` and `hovered`.

    Raises:
        MissingExtraError: anywidget is not installed.
        InputError: `threshold` is set on a trace without hazards, or beyond 0 to 1.
    """
    try:
        import anywidget
        import traitlets
    except ImportError:
        raise MissingExtraError("anywidget", "notebook") from None
    web = resources.files("loopwise.studio").joinpath("web")

    class LoopStrip(anywidget.AnyWidget):
        """The text of a trace, each token tinted by its loops."""

        _esm = web.joinpath("strip.js").read_text(encoding="utf-8")
        _css = web.joinpath("strip.css").read_text(encoding="utf-8")
        texts = traitlets.List(traitlets.Unicode()).tag(sync=True)
        labels = traitlets.List(traitlets.Unicode()).tag(sync=True)
        loops = traitlets.List(traitlets.Int()).tag(sync=True)
        faint = traitlets.List(traitlets.Int()).tag(sync=True)
        max = traitlets.Int(1).tag(sync=True)
        selected = traitlets.Int(-1).tag(sync=True)
        hovered = traitlets.Int(-1).tag(sync=True)
        threshold = traitlets.Float(None, allow_none=True)

        @traitlets.observe("threshold")
        def _tint(self, change: Any) -> None:
            chosen = trace.loops if change["new"] is None else trace.replay(change["new"])
            self.loops = chosen.tolist()

    return LoopStrip(
        texts=[visible(text) for text in trace.texts],
        labels=[label(text) for text in trace.texts],
        loops=trace.loops.tolist(),
        max=trace.max_loops,
    )
