"""Figures of one look: lines with bands over seeds, bars with whiskers."""

from collections.abc import Mapping, Sequence
from typing import Any

from _intervals import Interval, t_interval

from loopwise.errors import MissingExtraError

COLOURS = ("#1b4f9c", "#c8553d", "#2a9d70", "#8e5bb5", "#d19a1e", "#4a4a4a", "#3aa6c9", "#b03a77", "#7a8c2e", "#111111")


def figure(*, x: str, y: str, title: str = "", width: int = 760, height: int = 440) -> Any:
    """An empty figure with its axes named.

    Raises:
        MissingExtraError: plotly is not installed.
    """
    try:
        import plotly.graph_objects as go
    except ImportError:
        raise MissingExtraError("plotly", "study") from None
    made = go.Figure()
    made.update_layout(
        template="plotly_white",
        title={"text": title, "font": {"size": 15}},
        width=width,
        height=height,
        font={"family": "Helvetica, Arial, sans-serif", "size": 13},
        margin={"l": 70, "r": 20, "t": 50 if title else 20, "b": 60},
        legend={"bgcolor": "rgba(255,255,255,0.7)"},
    )
    made.update_xaxes(title=x)
    made.update_yaxes(title=y)
    return made


def panels(axes: Sequence[tuple[str, str]], *, width: int = 1300, height: int = 460) -> Any:
    """An empty figure of panels side by side, each with its (x, y) named; `add_line` draws in one of them.

    Raises:
        MissingExtraError: plotly is not installed.
    """
    made = figure(x="", y="", width=width, height=height)
    gap = 0.075
    share = (1 - gap * (len(axes) - 1)) / len(axes)
    for index, (x, y) in enumerate(axes, 1):
        domain = [(index - 1) * (share + gap), (index - 1) * (share + gap) + share]
        made.update_layout({f"xaxis{index}": {"title": {"text": x}, "domain": domain, "anchor": f"y{index}"}})
        made.update_layout({f"yaxis{index}": {"title": {"text": y}, "anchor": f"x{index}"}})
    made.update_layout(legend={"orientation": "h", "y": -0.2})
    return made


def legends_below(made: Any) -> None:
    """Give each panel a legend of its own, below it."""
    made.update_layout(margin={"b": 150})
    for number, axis in enumerate(made.select_xaxes(), 1):
        made.update_traces(legend=f"legend{number}", selector={"xaxis": axis.anchor.replace("y", "x")})
        place = {"x": axis.domain[0], "y": -0.2, "xanchor": "left", "yanchor": "top", "font": {"size": 11}}
        made.update_layout({f"legend{number}": place | {"orientation": "v"}})


def colour(index: int) -> str:
    """The colour of the series with this number."""
    return COLOURS[index % len(COLOURS)]


def add_line(
    made: Any,
    x: Sequence[float],
    seeds: Sequence[Sequence[float]],
    *,
    name: str,
    index: int,
    dash: str = "solid",
    panel: int = 1,
    mode: str = "lines+markers",
    legend: bool = True,
) -> None:
    """The mean over seeds, a row of `seeds` each, and the band from the least to the most of them."""
    place = {"xaxis": f"x{panel}", "yaxis": f"y{panel}"}
    columns = list(zip(*seeds, strict=True))
    shade = "rgba({},{},{},0.16)".format(*(int(colour(index)[i : i + 2], 16) for i in (1, 3, 5)))
    edges = [*map(max, columns), *reversed(list(map(min, columns)))]
    made.add_scatter(
        x=[*x, *reversed(x)],
        y=edges,
        fill="toself",
        fillcolor=shade,
        line={"width": 0},
        mode="lines",
        hoverinfo="skip",
        showlegend=False,
        **place,
    )
    made.add_scatter(
        x=list(x),
        y=[sum(column) / len(column) for column in columns],
        name=name,
        showlegend=legend,
        mode=mode,
        line={"color": colour(index), "width": 2, "dash": dash},
        marker={"size": 6},
        **place,
    )


def add_bars(made: Any, groups: Mapping[str, Sequence[float]], *, name: str, index: int) -> None:
    """One bar for each group with its values' mean, and every seed as a dot."""
    made.update_layout(barmode="group", scattermode="group")
    means: list[Interval] = [t_interval(values) for values in groups.values()]
    made.add_bar(
        x=list(groups),
        y=[m.mean for m in means],
        name=name,
        marker={"color": colour(index), "opacity": 0.75},
        offsetgroup=name,
    )
    made.add_scatter(
        x=[group for group, values in groups.items() for _ in values],
        y=[value for values in groups.values() for value in values],
        mode="markers",
        marker={"color": "#222", "size": 5},
        showlegend=False,
        offsetgroup=name,
    )
