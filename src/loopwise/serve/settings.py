"""What a server allows, and how long it waits."""

from dataclasses import dataclass
from typing import Literal

from loopwise.errors import ConfigError
from loopwise.loops.exits import parse_rule


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """How to answer when a request does not say, and the caps of a request."""

    name: str | None = None
    """What clients call the model; none takes what was typed as MODEL."""
    plain: bool = False
    """Chat in lines of User: and Assistant:, for models without a chat template."""
    exit: str | None = None
    """Exit rule of requests that name neither an effort nor a rule, such as hazard:0.6; none runs every loop."""
    loops: int | None = None
    """Most loops of requests that name neither an effort nor loop.max; none means the model's own number."""
    max_loops: int | None = None
    """Most loops that a request may ask for; none means what the model was trained with. More than that needs
    "beyond_trained" in the request too."""
    seats: int = 64
    """Answers that are made at once."""
    chunk: int = 256
    """Prompt rows of one tick at most."""
    prompt_depth: Literal["full", "exit"] = "full"
    """How deep prompts are read: full (every loop) or exit (a prompt's tokens stop where the request's rule stops them,
    which saves work and changes answers)."""

    hosts: tuple[str, ...] = ()
    """Names beside localhost and the bound address that a Host or Origin header may carry."""
    body: int = 1 << 20
    """Bytes of a request's body at most."""
    headers: int = 16 << 10
    """Bytes of a request's line and headers at most."""
    depth: int = 32
    """How deep a body's JSON may be nested."""
    prompt: int | None = None
    """Tokens of a prompt at most; none means what the context holds."""
    max_tokens: int | None = None
    """Tokens that an answer may have at most; none means what the context holds."""
    choices: int = 32
    """Answers of one request at most: its prompts times n."""
    logprobs: int = 20
    """Likeliest tokens that may be asked for beside each chosen one."""
    stops: int = 16
    """Stop texts of one request at most."""
    biases: int = 1024
    """Tokens of a logit bias at most."""

    requests: int = 512
    """Requests that may be open at once; more are answered 429."""
    connections: int = 1024
    """Connections that may be open at once; more are answered 503."""
    backlog: int | None = None
    """Row-loops (tokens times loops, prompts included) that may be promised at once before requests are answered 429;
    none means twice what all seats could hold."""
    pace: float = 0.04
    """Seconds between two events of a stream at least; the first and the last do not wait. Faster tokens share one."""
    header_seconds: float = 10.0
    """How long a client may take to send its headers."""
    body_seconds: float = 30.0
    """How long a client may take to send its body."""
    stall_seconds: float = 60.0
    """How long a client may leave what it asked for unread."""
    request_seconds: float = 600.0
    """How long an answer may take."""
    idle_seconds: float = 30.0
    """How long a connection may stay open between two requests."""
    drain_seconds: float = 30.0
    """How long answers may go on after SIGTERM."""
    dtype: Literal["float64", "float32", "bfloat16", "float16"] | None = None
    """Number type of the weights; none keeps the checkpoint's."""
    device: str = "cpu"
    """Where to run: cpu, cuda, cuda:1, mps."""

    def __post_init__(self) -> None:
        if self.exit is not None:
            parse_rule(self.exit)
        whole = ("seats", "chunk", "body", "headers", "depth", "choices", "requests", "connections")
        optional = ("loops", "max_loops", "prompt", "max_tokens", "backlog")
        for name in (*whole, *optional):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}={value}: allowed is 1 or more")
        for name in ("logprobs", "stops", "biases"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}={getattr(self, name)}: allowed is 0 or more")
        if not 0 <= self.pace <= 1:
            raise ConfigError(f"pace={self.pace}: allowed is 0 to 1")
        for name in (
            "header_seconds",
            "body_seconds",
            "stall_seconds",
            "request_seconds",
            "idle_seconds",
            "drain_seconds",
        ):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name}={getattr(self, name)}: allowed is more than 0")
