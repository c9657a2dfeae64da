"""The look of every figure: axes that name their units, colours that all can tell apart, no page colour of its own.

Figures have a clear background and grey ink that stands out from white and from black alike, so that one figure serves
a light page and a dark one. Lines use the palette of Okabe and Ito (2008); quantities with an order use cividis
(Nuñez et al. 2018), which looks alike to people who confuse red and green.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Real

from loopwise.errors import MissingExtraError

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8B6FB0", "#7F7F7F")
"""Okabe and Ito without their yellow and black, which one of the two pages would swallow."""
INK = "#7a7a7a"
"""Contrast above 4 to white and to near-black."""
GRID = "rgba(128,128,128,0.22)"
ORDERED = "Cividis"
DASHES = ("solid", "dash", "dot", "dashdot")
_FONT = "system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif"


def go() -> Any:
    """plotly.graph_objects.

    Raises:
        MissingExtraError: plotly is not installed.
    """
    try:
        import plotly.graph_objects
    except ImportError:
        raise MissingExtraError("plotly", "study") from None
    return plotly.graph_objects


def panels(titles: Sequence[str], *, columns: int = 2, height: int = 340, **options: Any) -> "Figure":
    """An empty figure with a panel for each title, row by row."""
    go()
    from plotly.subplots import make_subplots

    across = min(columns, len(titles))
    down = -(-len(titles) // across)
    figure = make_subplots(
        rows=down,
        cols=across,
        subplot_titles=list(titles),
        horizontal_spacing=min(0.11, 0.5 / across),
        vertical_spacing=100 / (height * down),
        **options,
    )
    figure.update_layout(height=height * down + 110)
    figure.update_annotations(font={"size": 13, "color": INK})
    return figure


def plain(*, height: int = 440) -> "Figure":
    """An empty figure of one panel."""
    figure = go().Figure()
    figure.update_layout(height=height)
    return figure


def place(index: int, columns: int) -> dict[str, int]:
    """Row and column of a panel, as plotly counts them."""
    return {"row": index // columns + 1, "col": index % columns + 1}


def dress(figure: "Figure", title: str, *, note: str = "", legend: bool = True) -> "Figure":
    """Title, ink, grid and margins of a figure whose height is set."""
    told = f"<b>{title}</b>" + (f"<br><span style='font-size:12px'>{note}</span>" if note else "")
    figure.update_layout(
        title={
            "text": told,
            "x": 0.01,
            "xanchor": "left",
            "yref": "container",
            "y": 1 - 18 / figure.layout.height,
            "yanchor": "top",
            "font": {"size": 16},
        },
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": _FONT, "size": 12, "color": INK},
        colorway=list(PALETTE),
        margin={"l": 64, "r": 24, "t": 92 if note else 72, "b": 60},
        showlegend=legend,
        legend={"bgcolor": "rgba(0,0,0,0)", "font": {"size": 11}},
        hoverlabel={"font": {"family": _FONT, "size": 12}},
    )
    lines = {"gridcolor": GRID, "zerolinecolor": GRID, "linecolor": GRID, "title_standoff": 8}
    figure.update_xaxes(**lines)
    figure.update_yaxes(**lines)
    return figure


def colour(index: int) -> str:
    """The colour of the series with this number."""
    return PALETTE[index % len(PALETTE)]


def shade(index: int, opacity: float = 0.18) -> str:
    """The same, see-through."""
    red, green, blue = (int(colour(index)[at : at + 2], 16) for at in (1, 3, 5))
    return f"rgba({red},{green},{blue},{opacity})"


def line(
    figure: "Figure",
    x: Real[np.ndarray, " points"],
    y: Real[np.ndarray, " points"],
    *,
    name: str,
    index: int = 0,
    at: dict[str, int] | None = None,
    mode: str = "lines+markers",
    **options: Any,
) -> None:
    """One line in the colour of its number."""
    figure.add_trace(
        go().Scatter(
            x=x,
            y=y,
            name=name,
            mode=mode,
            legendgroup=options.pop("legendgroup", name),
            line={"color": colour(index), "width": 2, "dash": options.pop("dash", "solid")},
            marker={"color": colour(index), "size": options.pop("size", 6)},
            **options,
        ),
        **(at or {}),
    )


def band(
    figure: "Figure",
    x: Real[np.ndarray, " points"],
    low: Float[np.ndarray, " points"],
    high: Float[np.ndarray, " points"],
    *,
    name: str,
    index: int = 0,
    at: dict[str, int] | None = None,
) -> None:
    """The area between two lines; nothing where an end is NaN."""
    known = ~(np.isnan(low) | np.isnan(high))
    if not known.any():
        return
    figure.add_trace(
        go().Scatter(
            x=np.concatenate([x[known], x[known][::-1]]),
            y=np.concatenate([high[known], low[known][::-1]]),
            fill="toself",
            fillcolor=shade(index),
            line={"width": 0},
            mode="lines",
            hoverinfo="skip",
            name=name,
            legendgroup=name,
            showlegend=False,
        ),
        **(at or {}),
    )


def beyond(figure: "Figure", trained: int, most: int, *, at: dict[str, int] | None = None, label: bool = True) -> None:
    """Mark the loops that no training saw; nothing when there are none."""
    if most <= trained:
        return
    options: dict[str, Any] = {"annotation_text": "beyond training", "annotation_position": "top left"} if label else {}
    if label:
        options["annotation_font"] = {"size": 10, "color": INK}
    figure.add_vrect(
        x0=trained + 0.5,
        x1=most + 0.5,
        fillcolor=INK,
        opacity=0.1,
        line_width=0,
        layer="below",
        **options,
        **(at or {}),
    )
