"""`loopwise demo`: see what looping is, then watch a model learn it."""

from pathlib import Path
from typing import Annotated

import typer


def command(
    text: Annotated[
        str | None, typer.Option("--text", help="Learn from this file or folder instead of Python.")
    ] = None,
    folder: Annotated[Path, typer.Option("--folder", help="Where the trained models go; emptied first.")] = Path(
        "runs/demo"
    ),
    page: Annotated[Path, typer.Option("--page", help="The page to write.")] = Path("loopwise-demo.html"),
    seed: Annotated[int, typer.Option("--seed", help="Another seed, another run.")] = 0,
    quick: Annotated[
        bool, typer.Option("--quick", help="A few steps only: shows the machinery, learns nothing.")
    ] = False,
) -> None:
    """See what looping is, then watch a model learn it.

    A trained model that ships with the package; a tiny one that learns to follow pointers, one hop per loop; a
    language model that learns where to stop; and a page of it all. A few minutes on two cores, no network.
    """
    from rich.console import Console

    from loopwise.demo.story import DemoOptions, tell

    options = DemoOptions(corpus=text or "python", folder=folder, page=page, seed=seed)
    if quick:
        options = DemoOptions(corpus=text or "python", folder=folder, page=page, seed=seed, hop_steps=20, text_steps=20)
    tell(options, Console(highlight=False))
