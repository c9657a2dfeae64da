"""`loopwise studio`: look at models, traces, runs and grids in the browser."""

from typing import Annotated

import typer


def command(
    what: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="WHAT", help="Checkpoints, run folders, trace files, grid files; default: the shipped model."
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.")] = 8517,
    policy: Annotated[
        str, typer.Option(help="What becomes of a token that stopped early: last_exited or per_loop.")
    ] = ("last_exited"),
    memory: Annotated[str, typer.Option(help="Keys and values of each model's engine at most.")] = "1GiB",
    browser: Annotated[bool, typer.Option(help="Open the page.")] = True,
) -> None:
    """Look between the loops: one page on this machine, for this machine.

    The text is tinted by loops while it is written; a token shows what each loop would have said; a threshold can be
    dragged; states, exits and quality against compute are drawn. Runs show how training went, and
    grids a maze tick by tick.
    """
    from loopwise.studio.listen import listen

    listen(what or [], host=host, port=port, policy=policy, memory=memory, browser=browser)
