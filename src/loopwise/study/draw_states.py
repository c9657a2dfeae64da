"""Figures of what happens inside: convergence, recovery, lenses, trajectories, agreement, boards."""

from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from loopwise.study.convergence import KINDS, Convergence, ConvergenceMap, Recovery
from loopwise.study.faithfulness import Faithfulness
from loopwise.study.figures import INK, ORDERED, band, beyond, dress, go, line, panels, place, plain
from loopwise.study.grid import Grid
from loopwise.study.lens import Lens
from loopwise.study.trajectory import Trajectory

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

_PATHS = 60
"""Units whose paths are drawn."""


def convergence_figure(found: Convergence, recovery: Recovery | None = None) -> "Figure":
    """Steps, angles, distance to the end, and how a push fades."""
    titles = ["Size of steps", "Angle between successive steps", "Distance to the last state"]
    figure = panels([*titles, "After a push" if recovery is not None else "Norm of the state"])
    spots = [place(index, 2) for index in range(4)]
    trained, most = found.trained_loops[1], int(found.loops[-1])
    rows = [("change", found.change), ("cosine", found.cosine), ("distance", found.distance)]
    if recovery is None:
        rows.append(("norm", found.norm))
    for index, ((name, quartiles), spot) in enumerate(zip(rows, spots, strict=False)):
        # The last state's distance to itself is 0, which a logarithm cannot show.
        kept = quartiles[1] > 0 if name in ("change", "distance") else ~np.isnan(quartiles[1])
        band(figure, found.loops[kept], quartiles[0, kept], quartiles[2, kept], name=name, index=index, at=spot)
        line(figure, found.loops[kept], quartiles[1, kept], name=name, index=index, at=spot)
    if recovery is not None:
        low, middle, high = recovery.distance
        band(figure, recovery.loops, low, high, name="pushed", index=3, at=spots[3])
        line(figure, recovery.loops, middle, name="pushed", index=3, at=spots[3])
    for index, spot in enumerate(spots):
        beyond(figure, trained, most, at=spot, label=index == 0)
    figure.update_xaxes(title="loops", dtick=max(1, most // 8), range=[0.5, most + 0.5])
    for spot in (spots[0], spots[2]):
        figure.update_yaxes(type="log", dtick="D2", **spot)
    figure.update_yaxes(title="change / norm of the state", **spots[0])
    figure.update_yaxes(title="cosine (1: straight on, -1: back)", range=[-1.05, 1.05], **spots[1])
    figure.update_yaxes(title="distance / norm of the last", **spots[2])
    figure.update_yaxes(title="distance / norm" if recovery is not None else "norm", rangemode="tozero", **spots[3])
    ends = ", ".join(f"{100 * found.shares[kind]:.0f}% {kind}" for kind in KINDS)
    pushed = (
        f"; a push of {recovery.size:g} at loop {recovery.at} fades for {100 * recovery.recovered:.0f}%"
        if recovery
        else ""
    )
    return dress(
        figure,
        f"Where do the states go? {found.model}",
        note=f"{found.units:,} units after {most} loops: {ends} (tolerance {found.tolerance:g}){pushed}; "
        "medians, bands are quartiles, of whole states",
        legend=False,
    )


def map_figure(found: ConvergenceMap, *, model: str = "") -> "Figure":
    """Distance to the last state, token by loop, on a logarithmic colour scale."""
    figure = plain(height=max(420, 18 * len(found.tokens) + 160))
    with np.errstate(divide="ignore"):
        shown = np.log10(found.distance)
    # The last column is 0 by definition.
    figure.add_trace(
        go().Heatmap(
            x=found.depths[:-1],
            y=np.arange(len(found.tokens)),
            z=shown[:, :-1],
            colorscale=ORDERED,
            colorbar={"title": "distance to the<br>last state (log10)"},
            customdata=np.repeat(np.array(found.tokens, dtype=object)[:, None], len(found.depths) - 1, axis=1),
            hovertemplate="%{customdata}<br>depth %{x}<br>10^%{z:.2f}<extra></extra>",
        )
    )
    _token_axis(figure.update_yaxes, found.tokens)
    figure.update_yaxes(autorange="reversed", showgrid=False)
    figure.update_xaxes(title="loops (0 is the start state)", showgrid=False)
    dress(figure, f"Which tokens settle, and when? {model}", legend=False)
    figure.update_layout(margin={"l": 130})
    return figure


def lens_figure(found: Lens, *, most: int = 28) -> "Figure":
    """Loops by tokens through each lens: the likeliest next token, coloured by the probability of the final one."""
    count = min(len(found.tokens), most)
    wide = {"coda": "Coda lens: the model's own way to an answer", "logit": "Logit lens: the head on the bare state"}
    titles = [wide.get(kind, "The model's own readout (no coda: both lenses are this one)") for kind in found.lenses]
    figure = panels(titles, columns=1, height=max(220, 34 * len(found.loops) + 130))
    for row, kind in enumerate(found.lenses):
        texts = [[_short(found.vocabulary[int(token)], 6) for token in line_[:count, 0]] for line_ in found.top[row]]
        hover = [
            [
                "<br>".join(
                    f"{_shown(found.vocabulary[int(token)])}  {chance:.3f}"
                    for token, chance in zip(
                        found.top[row, loop, at], found.top_probability[row, loop, at], strict=True
                    )
                )
                for at in range(count)
            ]
            for loop in range(len(found.loops))
        ]
        figure.add_trace(
            go().Heatmap(
                x=np.arange(count),
                y=found.loops,
                z=found.final_probability[row, :, :count],
                zmin=0,
                zmax=1,
                colorscale=ORDERED,
                showscale=row == 0,
                colorbar={"title": "probability of<br>the final token"},
                text=texts,
                texttemplate="%{text}",
                textfont={"size": 9},
                customdata=hover,
                hovertemplate="loop %{y}<br>%{customdata}<extra>" + kind + "</extra>",
                xgap=1,
                ygap=1,
            ),
            row=row + 1,
            col=1,
        )
    figure.update_xaxes(
        tickmode="array",
        tickvals=list(range(count)),
        ticktext=[_short(text) for text in found.tokens[:count]],
        tickangle=-45,
        showgrid=False,
        title="text: each column is what comes after this token",
    )
    figure.update_yaxes(title="loops", dtick=1, autorange="reversed", showgrid=False)
    dress(
        figure,
        f"What would it say after each loop? {found.model}",
        note=f"cells: likeliest next token; colour: probability of what loop {found.trained_loops[1]} finds likeliest",
        legend=False,
    )
    return figure


def trajectory_figure(found: Trajectory) -> "Figure":
    """Paths in pairs of components with what they explain, beside diagnostics of the whole state."""
    shares = [f"{100 * share:.0f}%" for share in found.explained]
    pairs = [(first, first + 1) for first in range(0, min(found.paths.shape[-1] - 1, 4), 2)]
    titles = [f"Components {one + 1} and {two + 1}" for one, two in pairs]
    figure = panels([*titles, "Whole states: size of steps and angles", "Whole states: alike by type?"], height=380)
    chosen = np.linspace(0, found.units - 1, min(found.units, _PATHS)).astype(int)
    for index, (one, two) in enumerate(pairs):
        spot = place(index, 2)
        for unit in chosen:
            figure.add_trace(
                go().Scatter(
                    x=found.paths[:, unit, one],
                    y=found.paths[:, unit, two],
                    mode="lines",
                    line={"color": INK, "width": 0.5},
                    hoverinfo="skip",
                    showlegend=False,
                ),
                **spot,
            )
        figure.add_trace(
            go().Scatter(
                x=found.paths[:, chosen, one].T.ravel(),
                y=found.paths[:, chosen, two].T.ravel(),
                mode="markers",
                marker={
                    "color": np.tile(found.depths, len(chosen)),
                    "colorscale": ORDERED,
                    "size": 5,
                    "showscale": index == 0,
                    "colorbar": {"title": "loops", "x": 1.0, "len": 0.4, "y": 0.8},
                },
                showlegend=False,
                hovertemplate="loop %{marker.color}<extra></extra>",
            ),
            **spot,
        )
        figure.update_xaxes(title=f"component {one + 1} ({shares[one]} of the variance)", **spot)
        figure.update_yaxes(title=f"component {two + 1} ({shares[two]})", **spot)
    loops = found.depths[1:]
    steps, alike = place(len(pairs), 2), place(len(pairs) + 1, 2)
    line(figure, loops, found.change, name="step / norm", index=0, at=steps)
    line(figure, loops, found.cosine, name="cosine of successive steps", index=1, at=steps, dash="dash")
    line(figure, loops, found.within, name=f"same {found.kind}", index=2, at=alike)
    line(figure, loops, found.between, name=f"other {found.kind}", index=4, at=alike, dash="dash")
    for spot in (steps, alike):
        figure.update_xaxes(title="loops", dtick=max(1, len(loops) // 8), range=[0.5, len(loops) + 0.5], **spot)
    figure.update_yaxes(title="median over units", **steps)
    figure.update_yaxes(title="mean cosine about the mean", **alike)
    held = 100 * float(found.explained[: 2 * len(pairs)].sum())
    straight = float(np.nanmedian(found.straightness))
    dress(
        figure,
        f"How do states travel? {found.model}",
        note=f"{found.units:,} units, {len(chosen)} drawn; these components hold {held:.0f}% of the variance; median "
        f"straightness {straight:.2f}; same-type likeness by chance: p = {found.chance:.3f}",
    )
    figure.update_layout(legend={"orientation": "h", "y": -0.12, "yanchor": "top"}, margin={"b": 100})
    return figure


def faithfulness_figure(found: Faithfulness) -> "Figure":
    """Agreement between loops, what changes, and what linear probes read beforehand."""
    figure = panels(["Same answer at both loops", "What each loop changes", "Linear probes"], columns=3, height=420)
    spots = [place(index, 3) for index in range(3)]
    few = len(found.loops) <= 12
    heat: dict[str, Any] = {"colorscale": ORDERED, "zmin": 0, "zmax": 1, "xgap": 1, "ygap": 1}
    if few:
        heat |= {"texttemplate": "%{z:.2f}", "textfont": {"size": 10}}
    figure.add_trace(
        go().Heatmap(
            x=found.loops,
            y=found.loops,
            z=found.agreement,
            showscale=False,
            hovertemplate="loops %{y} and %{x}<br>agree on %{z:.3f}<extra></extra>",
            **heat,
        ),
        **spots[0],
    )
    for index, (name, values) in enumerate(
        (
            ("answer changed", found.changed),
            ("mended: wrong, now right", found.mended),
            ("spoiled: right, now wrong", found.spoiled),
        )
    ):
        line(figure, found.loops[1:], values[1:], name=name, index=index, at=spots[1])
    figure.add_trace(
        go().Heatmap(
            x=found.loops,
            y=found.depths,
            z=found.probe,
            colorbar={"title": "share", "len": 0.9},
            hovertemplate="state of loop %{y}, answer of loop %{x}<br>read rightly: %{z:.3f}<extra></extra>",
            **heat,
        ),
        **spots[2],
    )
    figure.update_xaxes(title="loop", showgrid=False, **spots[0])
    step = max(1, len(found.loops) // 8)
    figure.update_yaxes(title="loop", showgrid=False, autorange="reversed", dtick=step, **spots[0])
    figure.update_xaxes(title="loops", **spots[1])
    figure.update_yaxes(title="share of units", rangemode="tozero", **spots[1])
    figure.update_xaxes(title="answer of loop", showgrid=False, **spots[2])
    figure.update_yaxes(title="state after loop (0: start)", showgrid=False, autorange="reversed", **spots[2])
    figure.update_xaxes(dtick=step)
    figure.update_yaxes(dtick=step, **spots[2])
    dress(
        figure,
        f"Do later loops decide anything? {found.model}",
        note=f"{found.units:,} units; probes fitted to {found.trained_on:,} and tried on {found.held_out:,} of other "
        f"problems; the commonest answer alone is right for {found.baseline[-1]:.2f}",
    )
    figure.update_layout(legend={"orientation": "h", "y": -0.22, "yanchor": "top"}, height=580, margin={"b": 130})
    return figure


def grid_figure(found: Grid) -> "Figure":
    """The board loop by loop: answer, certainty and attention, to be played or stepped through."""
    marks = _marks(found)
    names = ["Answer (light: right)" if _digits(found) else "Answer (light: on the route)"]
    names += ["Probability of the answer"] if found.sure is not None else []
    names += ["Attention, mean of the heads"] if found.attention is not None else []
    across = len(names)
    figure = panels(names, columns=across, height=530)
    for index, trace in enumerate(_boards(found, 0, marks)):
        figure.add_trace(trace, **place(index, across))
    figure.frames = [
        go().Frame(data=_boards(found, loop, marks), name=str(int(found.loops[loop])), traces=list(range(across)))
        for loop in range(len(found.loops))
    ]
    for index in range(across):
        spot = place(index, across)
        figure.update_xaxes(showgrid=False, zeroline=False, showticklabels=False, constrain="domain", **spot)
        figure.update_yaxes(
            showgrid=False,
            zeroline=False,
            showticklabels=False,
            autorange="reversed",
            scaleanchor=f"x{index + 1 if index else ''}",
            constrain="domain",
            **spot,
        )
    still = {"frame": {"duration": 0, "redraw": True}, "mode": "immediate", "transition": {"duration": 0}}
    steps = [
        {
            "label": f"{loop}{' ✓' if right else ''}",
            "method": "animate",
            "args": [[str(int(loop))], still],
        }
        for loop, right in zip(found.loops, found.right, strict=True)
    ]
    play = still | {"frame": {"duration": 500, "redraw": True}, "fromcurrent": True}
    first = np.flatnonzero(found.right)
    said = (
        f"right from loop {found.loops[first[0]]} on"
        if len(first) and found.right[first[0] :].all()
        else ("right in between" if len(first) else "never right")
    )
    dress(
        figure,
        f"What does it see and say? {found.model}",
        note=f"one problem, {said}; ✓ marks loops that are right",
        legend=False,
    )
    figure.update_layout(
        # What is not asked, walls above all, is clear in the boards and shows this.
        plot_bgcolor="rgba(128,128,128,0.35)",
        margin={"b": 150},
        sliders=[{"steps": steps, "currentvalue": {"prefix": "loop "}, "pad": {"t": 30}, "x": 0.14, "len": 0.86}],
        updatemenus=[
            {
                "type": "buttons",
                "direction": "left",
                "x": 0.0,
                "y": -0.08,
                "xanchor": "left",
                "yanchor": "top",
                "buttons": [
                    {"label": "play", "method": "animate", "args": [None, play]},
                    {"label": "stop", "method": "animate", "args": [[None], still]},
                ],
            }
        ],
    )
    return figure


def _boards(found: Grid, loop: int, marks: list[list[list[str]]]) -> list[Any]:
    said = found.answer[loop]
    # Where there are more than two classes, colour says whether the one in the cell is right.
    shown = said.astype(np.float64) if not _digits(found) else (said == found.wanted).astype(np.float64)
    shown[said < 0] = np.nan
    boards = [_board(shown, text=marks[loop], zmin=0, zmax=1, hover="%{text} %{z}")]
    if found.sure is not None:
        boards.append(_board(found.sure[loop], zmin=0, zmax=1, hover="%{z:.3f}"))
    if found.attention is not None:
        mean = found.attention.mean(axis=1)
        boards.append(_board(mean[loop], zmin=0, zmax=float(mean.max()), hover="%{z:.4f}"))
    return boards


def _board(
    values: Float[np.ndarray, "lines columns"], *, hover: str, text: list[list[str]] | None = None, **options: Any
) -> Any:
    return go().Heatmap(
        z=values,
        colorscale=ORDERED,
        showscale=False,
        xgap=1,
        ygap=1,
        text=text,
        texttemplate="%{text}" if text is not None else None,
        hovertemplate=hover + "<extra></extra>",
        **options,
    )


def _marks(found: Grid) -> list[list[list[str]]]:
    """What stands in each cell: the given mark; else, of boards with more than two classes, the class said."""
    digits = _digits(found)
    return [
        [
            [
                ("" if mark == "#" else mark) or (f"{said}" if digits and said >= 0 else "")
                for mark, said in zip(marks, line_.tolist(), strict=True)
            ]
            for marks, line_ in zip(found.given, board, strict=True)
        ]
        for board in found.answer
    ]


def _digits(found: Grid) -> bool:
    """Whether cells hold one of several classes, and not a mark or none."""
    return int(found.wanted.max()) > 1


def _token_axis(update: Any, tokens: tuple[str, ...]) -> None:
    update(tickmode="array", tickvals=list(range(len(tokens))), ticktext=[_short(text) for text in tokens])


def _shown(text: str) -> str:
    """A token on one line, with its blanks to be seen, and no markup of its own."""
    seen = text.replace("\n", "⏎").replace("\t", "⇥").replace(" ", "␣")
    return seen.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;") or "∅"


def _short(text: str, most: int = 9) -> str:
    return _shown(text if len(text) <= most else text[: most - 1] + "…")
