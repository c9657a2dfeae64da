"""What a request may say. Every field that is not here is refused; of some only the value that changes nothing is here.

Numbers are checked as far as they can be without knowing the model; caps that a server sets are checked in `asked.py`.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
Count = Annotated[int, Field(ge=1, le=1_000_000_000)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Zero = Annotated[float, Field(ge=0, le=0)]
Text = Annotated[str, Field(max_length=1 << 20)]
Stop = Annotated[str, Field(min_length=1, max_length=1024)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]


class Wire(BaseModel):
    """A part of a request: nothing unknown, nothing converted, no NaN."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class LoopOptions(Wire):
    """How many loops tokens may run, and what is told of them. Goes before `reasoning_effort`, field by field."""

    max: Count | None = None
    """Most loops per token."""
    min: Count | None = None
    """Fewest loops per token."""
    rule: Annotated[str, Field(min_length=1, max_length=200)] | None = None
    """Exit rule, such as "hazard:0.6"; "off" runs every loop."""
    start: Seed | Literal["zero"] | None = None
    """Start state of random-start models: a seed or "zero"."""
    beyond_trained: bool = False
    """Allow more loops than the model saw in training."""
    tokens: bool = False
    """Tell the loops of each token."""
    signals: bool = False
    """Tell the model's signal (a hazard) after each loop of each token."""
    drafts: bool = False
    """Tell tokens too that another may still replace; while streaming."""


class StreamOptions(Wire):
    """What a stream tells beside the answer."""

    include_usage: bool = False


class PlainText(Wire):
    """The one response format there is."""

    type: Literal["text"]


class Asked(Wire):
    """What chat and completions have in common."""

    model: Annotated[str, Field(max_length=1000)]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=1024)] | None = None
    max_tokens: Count | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Count | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    seed: Seed | None = None
    stop: Stop | list[Stop] | None = None
    ignore_eos: bool | None = None
    reasoning_effort: Effort | None = None
    loop: LoopOptions | None = None

    frequency_penalty: Zero | None = None
    presence_penalty: Zero | None = None


class CompletionRequest(Asked):
    """The body of /v1/completions."""

    prompt: Text | list[Text] | list[TokenId] | list[list[TokenId]]
    logprobs: Annotated[int, Field(ge=0, le=1000)] | None = None
    best_of: Annotated[int, Field(ge=1, le=1)] | None = None
    echo: Literal[False] | None = None
    suffix: Literal[""] | None = None


class TextPart(Wire):
    """A piece of a message."""

    type: Literal["text"]
    text: Text


class Message(Wire):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[TextPart]

    refusal: None = None
    annotations: None = None
    audio: None = None
    function_call: None = None
    tool_calls: None = None
    name: None = None


class ChatRequest(Asked):
    """The body of /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=1000)] | None = None
    thinking_token_budget: Annotated[int, Field(ge=0, le=1_000_000_000)] | None = None

    response_format: PlainText | None = None
    modalities: Annotated[list[Literal["text"]], Field(min_length=1, max_length=1)] | None = None
    store: Literal[False] | None = None
    tools: Annotated[list[None], Field(max_length=0)] | None = None
    tool_choice: Literal["none"] | None = None
