"""Run the studio's server until it is interrupted."""

import importlib.util
import threading
import webbrowser
from collections.abc import Sequence

from loopwise.errors import ConfigError, MissingExtraError


def listen(paths: Sequence[str], *, host: str, port: int, policy: str, memory: str, browser: bool) -> None:
    """Open what `paths` name and serve the page on a loopback address.

    Args:
        port: 0 takes a free one.
        browser: whether to open the page in the user's browser.

    Raises:
        MissingExtraError: the extra `studio` is not installed.
        NotFoundError: something that is not there.
        ConfigError: an address that other machines reach, or one that cannot be had.
    """
    for package in ("fastapi", "uvicorn", "plotly"):
        if importlib.util.find_spec(package) is None:
            raise MissingExtraError(package, "studio")
    import uvicorn

    from loopwise.serve.run import bind
    from loopwise.serve.security import is_loopback
    from loopwise.studio.app import build_studio
    from loopwise.studio.library import Library

    if not is_loopback(host):
        raise ConfigError(
            f"--host {host}: the studio has no keys, so it listens on this machine alone; reach it from afar through "
            f"ssh -L {port}:127.0.0.1:{port}"
        )
    with bind(host, port) as listening:
        address = f"http://{f'[{host}]' if ':' in host else host}:{listening.getsockname()[1]}/"
        library = Library(paths, policy=policy, memory=memory)
        try:
            server = uvicorn.Server(uvicorn.Config(build_studio(library), log_level="warning", access_log=False))
            print(f"the studio is at {address}  (Ctrl-C ends it)", flush=True)
            if browser:
                threading.Timer(0.5, webbrowser.open, [address]).start()
            server.run(sockets=[listening])
        finally:
            library.close()
