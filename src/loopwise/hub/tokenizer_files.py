"""What a checkpoint folder's files say about special ids and the chat template."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from loopwise.errors import CheckpointError, ConfigError


@dataclass(frozen=True, kw_only=True)
class SpecialIds:
    """The special token ids of one checkpoint; `None` where it has none."""

    bos: int | None = None
    """Written before a document."""
    eos: int | None = None
    """Written after a document, and the first of the ids that end a reply."""
    pad: int | None = None
    """Fills batches; always masked."""
    stop: tuple[int, ...] = ()
    """Every id that ends a reply: `eos` and the further ones of generation_config.json."""

    def __post_init__(self) -> None:
        for name in ("bos", "eos", "pad"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
                raise ConfigError(f"{name}_id={value!r} is not a token id; give a whole number from 0")
        if self.eos is not None and self.eos not in self.stop:
            object.__setattr__(self, "stop", (self.eos, *self.stop))


def read_text(path: Path) -> str:
    """Text of a UTF-8 file.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}; fetch the file again") from error


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where there is no file.

    Raises:
        CheckpointError: it is not a JSON object.
    """
    if not path.is_file():
        return {}
    try:
        content = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{path} is not JSON (line {error.lineno}); fetch the file again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is not a JSON object; fetch the file again")
    return content


def token_text(token: Any) -> str | None:
    """The text of a token as tokenizer_config.json writes it: a string, or an object with `content`."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def ids_in(
    name: str, files: Sequence[dict[str, Any]], settings: dict[str, Any], vocabulary: tokenizers.Tokenizer
) -> tuple[int, ...]:
    """The ids of special token `name` in the first file that gives any; several only for `eos`.

    Raises:
        CheckpointError: tokenizer_config.json names a token that the vocabulary lacks.
    """
    for file in files:
        value = file.get(f"{name}_token_id")
        if value is not None:
            return tuple(index for index in (value if isinstance(value, list) else [value]) if index != -1)
    token = token_text(settings.get(f"{name}_token"))
    if token is None:
        return ()
    index = vocabulary.token_to_id(token)
    if index is None:
        raise CheckpointError(
            f"tokenizer_config.json names {token!r} as {name}_token, which tokenizer.json lacks; pass {name}_id=…"
        )
    return (index,)


def template_in(folder: Path, settings: dict[str, Any]) -> str | None:
    """The folder's chat template: chat_template.jinja, else the one in tokenizer_config.json."""
    if (folder / "chat_template.jinja").is_file():
        return read_text(folder / "chat_template.jinja")
    template = settings.get("chat_template")
    if isinstance(template, list):
        named = [entry for entry in template if isinstance(entry, dict) and entry.get("name") == "default"]
        template = named[0].get("template") if named else None
    return template if isinstance(template, str) else None
