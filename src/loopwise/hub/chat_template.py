"""Chat templates whose special tokens come from the template alone, never from what a user wrote."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loopwise.errors import InputError

_ROLE = re.compile(r"[A-Za-z0-9_-]+")
_NONCHARACTERS = tuple(chr(code) for code in range(0xFDD0, 0xFDF0))


@dataclass(frozen=True, kw_only=True)
class Shield:
    """Stand-ins that keep messages apart from the template they pass through.

    While the template runs, the first character of each string in the messages that names a special token, or that
    could be the beginning of one, is a Unicode noncharacter. So the messages keep their length and their words, the
    template may trim and compare them, and no special token in its result begins inside a message.
    """

    strings: tuple[str, ...]
    """The special tokens' names."""
    stand_in: dict[str, str]
    """First character of a name -> the noncharacter that stands for it."""

    @classmethod
    def over(cls, strings: Iterable[str], messages: Sequence[Mapping[str, Any]], template: str) -> "Shield":
        """A shield of noncharacters that neither the messages nor the template use.

        Raises:
            InputError: the messages use up the noncharacters.
        """
        names = tuple(filter(None, strings))
        taken = set(template + json.dumps(messages, ensure_ascii=False, default=str))
        free = [mark for mark in _NONCHARACTERS if mark not in taken]
        first = sorted({name[0] for name in names})
        if len(first) > len(free):
            raise InputError("the chat messages hold Unicode noncharacters (U+FDD0 to U+FDEF); take them out")
        return cls(strings=names, stand_in=dict(zip(first, free, strict=False)))

    def cover(self, value: Any) -> Any:
        """The same messages with stand-ins in every string."""
        if isinstance(value, Mapping):
            return {key: self.cover(part) for key, part in value.items()}
        if isinstance(value, list | tuple):
            return [self.cover(part) for part in value]
        if not isinstance(value, str):
            return value
        places: set[int] = set()
        for name in self.strings:
            places |= {match.start() for match in re.finditer(f"(?={re.escape(name)})", value)}
            beginnings = range(1, min(len(name), len(value) + 1))
            places |= {len(value) - length for length in beginnings if value.endswith(name[:length])}
        return "".join(self.stand_in[letter] if place in places else letter for place, letter in enumerate(value))

    def used_in(self, text: str) -> bool:
        """Whether `text` holds a stand-in."""
        return any(mark in text for mark in self.stand_in.values())

    def restore(self, text: str) -> str:
        """`text` with the characters that the stand-ins stand for."""
        return text.translate({ord(mark): letter for letter, mark in self.stand_in.items()})


def render(
    template: str, messages: Sequence[Mapping[str, Any]], *, generation_prompt: bool, variables: Mapping[str, Any]
) -> str:
    """Runs a chat template in transformers' sandbox.

    Raises:
        InputError: a role is not a word, or the template refuses the messages.
    """
    import jinja2
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        rendered: Any = render_jinja_template(
            conversations=[[dict(message) for message in messages]],
            chat_template=template,
            add_generation_prompt=generation_prompt,
            **variables,
        )
    except (jinja2.TemplateError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"the chat template refused these messages: {reason}") from error
    return str(rendered[0][0])


def check_roles(messages: Sequence[Mapping[str, Any]]) -> None:
    """A role goes into the template's own markup (`<|user|>`), so it must be a plain word.

    Raises:
        InputError: there is no message, or a role is not a word.
    """
    if not messages:
        raise InputError('there is no chat message; give at least one, such as {"role": "user", "content": "Hello"}')
    for message in messages:
        role = message.get("role")
        if not isinstance(role, str) or not _ROLE.fullmatch(role):
            raise InputError(f"a chat message has the role {role!r}; give a word such as user, assistant or system")
