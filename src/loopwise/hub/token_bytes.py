"""How a vocabulary spells bytes: GPT-2's table of letters, or SentencePiece's `▁` and `<0x0A>`."""

import re
from dataclasses import dataclass
from typing import Any

from loopwise.errors import CheckpointError


def _letters() -> list[str]:
    """GPT-2's letter for each byte: itself where it prints, else the next free one from U+0100."""
    prints = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in prints]
    table = {byte: chr(byte) for byte in prints} | {byte: chr(256 + place) for place, byte in enumerate(others)}
    return [table[byte] for byte in range(256)]


BYTE_OF = {letter: byte for byte, letter in enumerate(_letters())}
"""The byte that each letter of a byte-level vocabulary stands for."""


@dataclass(frozen=True, kw_only=True)
class ByteDecoder:
    """How a vocabulary spells bytes: GPT-2's table of letters, or SentencePiece's `▁` and `<0x0A>`."""

    byte_level: bool
    """GPT-2's letters; otherwise SentencePiece's spelling."""
    byte_fallback: bool
    """`<0x0A>` is the byte 10."""
    strips_first_space: bool
    """A text's first space is the tokenizer's own and is not shown."""

    @classmethod
    def of(cls, decoder: dict[str, Any] | None) -> "ByteDecoder":
        """Reads the `decoder` of a tokenizer.json.

        Raises:
            CheckpointError: it is of neither kind.
        """
        steps = (decoder or {}).get("decoders") or [decoder or {}]
        kinds = {step.get("type"): step for step in steps}
        underscore = kinds.get("Replace", {}).get("pattern") == {"String": "▁"}
        if "ByteLevel" in kinds:
            return cls(byte_level=True, byte_fallback=False, strips_first_space=False)
        if underscore or "Metaspace" in kinds:
            metaspace_strips = kinds.get("Metaspace", {"prepend_scheme": "never"}).get("prepend_scheme") != "never"
            strips = "Strip" in kinds or metaspace_strips
            return cls(byte_level=False, byte_fallback="ByteFallback" in kinds, strips_first_space=strips)
        raise CheckpointError(
            f"tokenizer.json has a decoder of the kind {sorted(map(str, kinds))}; "
            "convert it to byte-level BPE or SentencePiece, the kinds that can be decoded byte by byte"
        )

    def token_bytes(self, token: str) -> bytes:
        """The bytes that a token of the vocabulary spells."""
        if self.byte_level:
            known = all(letter in BYTE_OF for letter in token)
            return bytes(BYTE_OF[letter] for letter in token) if known else token.encode()
        if self.byte_fallback and re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", token):
            return bytes([int(token[3:5], 16)])
        return token.replace("▁", " ").encode()
