"""Run the studio's server until it is interrupted."""

import importlib.util
import socket
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
        ConfigError: the port is taken.
    """
    for package in ("fastapi", "uvicorn", "plotly"):
        if importlib.util.find_spec(package) is None:
            raise MissingExtraError(package, "studio")
    import uvicorn

    from loopwise.studio.app import build_studio
    from loopwise.studio.library import Library

    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((host, port))
        except OSError as error:
            raise ConfigError(f"--port {port}: {error.strerror}; type: --port 0 for a free one") from None
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
