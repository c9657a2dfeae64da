"""Model text made safe to show: every character that acts instead of appearing is replaced by a visible sign."""

import unicodedata

PICTURES = 0x2400
REPLACEMENT = "\ufffd"


def visible(text: str) -> str:
    """`text` with control characters, direction marks and lone surrogates made visible; newline and tab are kept."""
    return "".join(map(_sign, text))


def label(text: str) -> str:
    """`text` on one line, for a table or a tooltip: `↵` newline, `⇥` tab, `␣` outer space, `∅` nothing at all."""
    line = visible(text).replace("\n", "↵").replace("\t", "⇥")
    left, right = len(line) - len(line.lstrip(" ")), len(line) - len(line.rstrip(" "))
    if left == len(line):
        return "␣" * len(line) or "∅"
    return "␣" * left + line.strip(" ") + "␣" * right


def _sign(character: str) -> str:
    if character in "\n\t":
        return character
    category = unicodedata.category(character)
    if category == "Cc":
        return chr(PICTURES + ord(character)) if ord(character) < 32 else "␡" if character == "\x7f" else REPLACEMENT
    if category == "Cs":
        return REPLACEMENT
    if unicodedata.bidirectional(character) in {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}:
        return f"‹U+{ord(character):04X}›"
    return "↵" if category in {"Zl", "Zp"} else character
