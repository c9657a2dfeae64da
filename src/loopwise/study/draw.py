"""A figure for each answer: what `depth`, `exits`, `calibration` and `adaptivity` found."""

from typing import TYPE_CHECKING

import numpy as np

from loopwise.study.adaptivity import Adaptivity
from loopwise.study.calibration import Calibration
from loopwise.study.depth import DepthCurve
from loopwise.study.exit_curves import ExitCurves
from loopwise.study.figures import (
    DASHES,
    INK,
    ORDERED,
    band,
    beyond,
    colour,
    dress,
    go,
    line,
    panels,
    place,
)

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


def depth_figure(curve: DepthCurve) -> "Figure":
    """Accuracy and loss by loops, by operations and by measured seconds."""
    figure = panels(
        [
            "Accuracy by loops",
            "Loss by loops",
            "Loss by operations",
            "Loss by measured time",
        ]
    )
    trained, most = curve.trained_loops[1], int(curve.loops[-1])
    spots = [place(index, 2) for index in range(4)]
    band(figure, curve.loops, *curve.accuracy_band, name="accuracy", index=0, at=spots[0])
    line(figure, curve.loops, curve.accuracy, name="accuracy", index=0, at=spots[0])
    if not np.allclose(curve.share, curve.accuracy):
        line(figure, curve.loops, curve.share, name="places right", index=2, at=spots[0], dash="dot")
    seeds = len(curve.models)
    for row in curve.seed_loss if seeds > 1 else []:
        line(figure, curve.loops, row, name="one seed", index=7, at=spots[1], mode="lines", showlegend=False)
    for spot, x in zip(spots[1:], (curve.loops, curve.flops, 1e6 * curve.seconds), strict=True):
        band(figure, x, *curve.loss_band, name="loss", index=1, at=spot)
        line(
            figure,
            x,
            curve.loss,
            name="loss",
            index=1,
            at=spot,
            showlegend=False,
            customdata=curve.loops,
            hovertemplate="%{customdata} loops<br>%{x:.4g}<br>%{y:.4f} nats<extra></extra>",
        )
    for spot in spots[:2]:
        beyond(figure, trained, most, at=spot)
    figure.update_xaxes(title="loops", dtick=max(1, most // 8), range=[0.5, most + 0.5], row=1)
    figure.update_xaxes(title="floating-point operations per unit", **spots[2])
    figure.update_xaxes(title="microseconds per unit, batched", **spots[3])
    figure.update_yaxes(title="share of units right", **spots[0])
    for spot in spots[1:]:
        figure.update_yaxes(title="nats per unit", **spot)
    names = ", ".join(dict.fromkeys(curve.models))
    return dress(
        figure,
        f"Does thinking longer help? {names}",
        note=f"{curve.units:,} units{f' for each of {seeds} seeds' if seeds > 1 else ''}; bands: {curve.band}; "
        f"least loss at {curve.best} loops, trained up to {trained}",
        legend=not np.allclose(curve.share, curve.accuracy),
    )


def exits_figure(found: ExitCurves, *, cost: str = "loops") -> "Figure":
    """Every rule beside fixed depths, random mixing and the oracle.

    Args:
        cost: `loops`, `flops` or `kv_bytes`: what stands below.
    """
    figure = panels(["Accuracy", "Loss", "Better than random mixing by"], columns=3, height=420)
    spots = [place(index, 3) for index in range(3)]
    fixed = {"loops": found.loops, "flops": found.fixed_flops, "kv_bytes": found.fixed_kv_bytes}[cost]
    per_loop = np.interp  # costs are linear in loops, so an oracle's mean is placed by interpolation
    for spot, x, y in (
        (spots[0], per_loop(found.oracle_loops, found.loops, fixed), found.oracle_accuracy),
        (spots[1], per_loop(found.oracle_loss_loops, found.loops, fixed), found.oracle_loss),
    ):
        figure.add_trace(
            go().Scatter(
                x=x,
                y=y,
                name="oracle: knows every answer",
                legendgroup="oracle",
                mode="lines",
                line={"color": INK, "width": 1.5, "dash": "dot"},
                showlegend=spot is spots[0],
            ),
            **spot,
        )
    for spot, y in ((spots[0], found.fixed_accuracy), (spots[1], found.fixed_loss)):
        figure.add_trace(
            go().Scatter(
                x=fixed,
                y=y,
                name="fixed depths; between them, random mixing",
                legendgroup="fixed",
                mode="lines+markers",
                line={"color": INK, "width": 1.5},
                marker={"color": INK, "size": 8, "symbol": "square"},
                showlegend=spot is spots[0],
            ),
            **spot,
        )
    for index, curve in enumerate(found.curves):
        x = {"loops": curve.mean_loops, "flops": curve.flops, "kv_bytes": curve.kv_bytes}[cost]
        for spot, y in zip(spots, (curve.accuracy, curve.loss, curve.gain), strict=True):
            line(
                figure,
                x,
                y,
                name=curve.name + (" (reads predictions)" if curve.reads else ""),
                index=index,
                dash=DASHES[index // 4 % len(DASHES)],
                at=spot,
                size=4,
                showlegend=spot is spots[0],
                customdata=curve.rules,
                hovertemplate="%{customdata}<br>%{x:.4g}<br>%{y:.4f}<extra></extra>",
            )
    figure.add_hline(y=0, line={"color": INK, "width": 1}, row=1, col=3)
    axis = {"loops": "mean loops", "flops": "operations per unit", "kv_bytes": "bytes of keys and values per unit"}[
        cost
    ]
    figure.update_xaxes(title=axis)
    figure.update_yaxes(title="share of units right", **spots[0])
    figure.update_yaxes(title="nats per unit", **spots[1])
    figure.update_yaxes(title="nats below mixing at this cost" if cost == "loops" else "nats below mixing", **spots[2])
    dress(
        figure,
        f"What is an exit rule worth? {found.model}",
        note=f"{found.units:,} units, every threshold by replay of what was recorded (planes filled, as in training)",
    )
    figure.update_layout(legend={"orientation": "h", "y": -0.2, "yanchor": "top"}, height=600, margin={"b": 150})
    return figure


def calibration_figure(found: Calibration) -> "Figure":
    """Reliability by loop and at the exit, its summary by loop, and what foretells a failure."""
    figure = panels(["Reliability", "Calibration by loop", "What foretells a wrong answer"], columns=3, height=420)
    spots = [place(index, 3) for index in range(3)]
    ends = np.array([0.0, 1.0])
    figure.add_trace(
        go().Scatter(x=ends, y=ends, mode="lines", name="calibrated", line={"color": INK, "dash": "dot"}), **spots[0]
    )
    shown = sorted({0, len(found.loops) // 2, len(found.loops) - 1})
    for index, loop in enumerate(shown):
        each = found.by_loop[loop]
        line(
            figure,
            each.confidence,
            each.accuracy,
            name=f"loop {found.loops[loop]}",
            index=index,
            at=spots[0],
            customdata=each.count,
            hovertemplate="confidence %{x:.3f}<br>right %{y:.3f}<br>%{customdata} units<extra></extra>",
            connectgaps=True,
        )
    line(
        figure,
        found.at_exit.confidence,
        found.at_exit.accuracy,
        name=f"at the exit of {found.rule}",
        index=4,
        at=spots[0],
        dash="dash",
        connectgaps=True,
    )
    for index, (name, values) in enumerate(
        (("ECE, bins of equal width", found.ece), ("ECE, equal mass", found.ece_mass), ("Brier score", found.brier))
    ):
        line(figure, found.loops, values, name=name, index=index + 5, at=spots[1], dash=DASHES[index])
    for index, (name, row) in enumerate(zip(found.signals, found.auroc, strict=True)):
        line(figure, found.loops, row, name=name, index=index, at=spots[2], dash=DASHES[index // 4])
    figure.add_hline(y=0.5, line={"color": INK, "width": 1, "dash": "dot"}, row=1, col=3)
    figure.update_xaxes(title="confidence: probability of the answer", range=[0, 1], **spots[0])
    figure.update_yaxes(title="share right", range=[0, 1.02], **spots[0])
    for spot in spots[1:]:
        figure.update_xaxes(title="loops", dtick=max(1, len(found.loops) // 8), **spot)
    figure.update_yaxes(title="error (0 is perfect)", rangemode="tozero", **spots[1])
    figure.update_yaxes(title="AUROC (0.5 knows nothing)", **spots[2])
    dress(
        figure,
        f"Does it know when it is right? {found.model}",
        note=f"{found.units:,} units; at the exit of {found.rule} ({found.mean_exit:.2f} loops on average) the ECE is "
        f"{found.at_exit.ece:.3f}",
    )
    figure.update_layout(legend={"orientation": "h", "y": -0.2, "yanchor": "top"}, height=620, margin={"b": 170})
    return figure


def adaptivity_figure(found: Adaptivity) -> "Figure":
    """Loops used and needed by difficulty, and how often each count is used."""
    figure = panels(["Loops by difficulty", "Share of units by loops used"], height=400)
    left, right = place(0, 2), place(1, 2)
    band(
        figure,
        found.difficulty,
        found.mean_loops - 1.96 * found.error,
        found.mean_loops + 1.96 * found.error,
        name="loops used",
        index=0,
        at=left,
    )
    line(figure, found.difficulty, found.mean_loops, name="loops used", index=0, at=left)
    line(figure, found.difficulty, found.needed, name="loops needed", index=1, at=left, dash="dash")
    loops = np.arange(1, int(found.used.max()) + 1)
    edges = found.difficulty if len(found.difficulty) <= 20 and set(found.hardness) == set(found.difficulty) else None
    rows = (
        [np.bincount(found.used[found.hardness == kind], minlength=len(loops) + 1)[1:] for kind in edges]
        if edges is not None
        else [np.bincount(found.used, minlength=len(loops) + 1)[1:]]
    )
    heat = np.array([row / max(row.sum(), 1) for row in rows])
    if edges is not None:
        figure.add_trace(
            go().Heatmap(
                x=loops,
                y=found.difficulty,
                z=heat,
                zmin=0,
                zmax=1,
                colorscale=ORDERED,
                colorbar={"title": "share", "len": 0.8},
                xgap=1,
                ygap=1,
                hovertemplate="difficulty %{y}<br>%{x} loops<br>share %{z:.3f}<extra></extra>",
            ),
            **right,
        )
        figure.update_yaxes(title="difficulty", dtick=1 if len(edges) <= 12 else None, **right)
    else:
        figure.add_trace(go().Bar(x=loops, y=heat[0], marker={"color": colour(0)}, showlegend=False), **right)
        figure.update_yaxes(title="share of units", **right)
    figure.update_xaxes(title="difficulty, in the task's own unit", **left)
    figure.update_yaxes(title="mean loops", rangemode="tozero", **left)
    figure.update_xaxes(title="loops used", dtick=max(1, len(loops) // 8), **right)
    dress(
        figure,
        f"Are loops spent on what is hard? {found.model}",
        note=f"{found.rule} on {found.units:,} units: rank correlation of difficulty with loops used "
        f"{found.correlation}, with loops needed {found.correlation_needed}",
    )
    figure.update_layout(legend={"x": 0.02, "y": 0.98})
    return figure
