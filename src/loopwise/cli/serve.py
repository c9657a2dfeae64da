"""`loopwise serve`: a model behind OpenAI's API, with a knob for loops."""

import json
import os
from typing import Annotated

import typer

from loopwise.errors import MissingExtraError

CONFIG = "loopwise.serve.settings:ServeConfig"
KEYS = "LOOPWISE_API_KEY"
"""Environment variable with API keys, separated by commas."""


def command(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Folder of a checkpoint, a run, or a hub id.")
    ] = "shipped",
    words: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Defaults and caps.", show_default=False)
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")] = 8000,
    memory: Annotated[str, typer.Option(help="Bytes for keys and values.")] = "4GiB",
    policy: Annotated[
        str,
        typer.Option(help="Which planes loops write and read: last_exited (leaving early saves work), per_loop, ..."),
    ] = "last_exited",
    speculate: Annotated[str, typer.Option(help="How drafts are made: auto, off, or a draft loop such as 2.")] = "auto",
    without_key: Annotated[
        bool, typer.Option("--without-key", help="Listen beyond this machine although there is no API key.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Say where it listens as one JSON object.")] = False,
) -> None:
    """Serve a model: /v1/chat/completions, /v1/completions, /v1/models, /health and /metrics.

    - `loopwise serve runs/mine exit=hazard:0.6 --memory 8GiB` for this machine alone

    - `LOOPWISE_API_KEY=... loopwise serve runs/mine --host 0.0.0.0 hosts=["my.machine"]` for others

    Requests say how much to think: `reasoning_effort` from none to max, or `"loop": {"max": 4, "rule": "hazard:0.6"}`.
    API keys come from the environment variable LOOPWISE_API_KEY, separated by commas. SIGTERM lets open answers end.
    """
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(str(error.name), "serve") from None
    from loopwise.cli.models import is_setting, load_model, note, read_settings
    from loopwise.serve.app import build_app
    from loopwise.serve.engine import build_engine
    from loopwise.serve.run import bind, make_server
    from loopwise.serve.security import check_bind, check_keys
    from loopwise.serve.service import Service
    from loopwise.serve.settings import ServeConfig

    settings = list(words or [])
    if is_setting(model):
        model, settings = "shipped", [model, *settings]
    config = read_settings(ServeConfig, settings)
    keys = check_keys([key.strip() for key in os.environ.get(KEYS, "").split(",") if key.strip()])
    check_bind(host, keys, without_key=without_key)
    loaded = load_model(model, dtype=config.dtype, device=config.device)
    engine = build_engine(loaded, config, memory=memory, policy=policy, speculate=speculate)
    service = Service(engine, config, name=model)
    app = build_app(service, keys=keys, hosts=hosts_of(host))
    listener = bind(host, port)
    bound = listener.getsockname()[1]
    url = f"http://{f'[{host}]' if ':' in host else host}:{bound}/v1"
    if as_json:
        typer.echo(json.dumps({"url": url, "model": service.name}))
    else:
        note(f"{service.name} at {url} (Ctrl-C ends it)")
        weight = loaded.embed.weight
        if weight.device.type == "cpu" and weight.element_size() == 2:
            note("a CPU multiplies the checkpoint's 16-bit numbers slowly; dtype=float32 is faster")
        if not keys:
            note(f"there is no API key: everybody who reaches {host} may ask; {KEYS} sets one")
    make_server(app, config).run(sockets=[listener])


def hosts_of(host: str) -> tuple[str, ...]:
    """What a Host header may name beside localhost when this address is bound: any address, where all are bound."""
    return ("*",) if host in ("0.0.0.0", "::") else (host,)
