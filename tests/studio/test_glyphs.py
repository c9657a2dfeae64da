import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loopwise.studio.glyphs import label, visible


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain text", "plain text"),
        ("a\n\tb", "a\n\tb"),
        ("\x1b[31m\x00\x07\r", "␛[31m␀␇␍"),
        ("\x7f\x9b", "␡\ufffd"),
        ("\u202eevil", "‹U+202E›evil"),
        ("\ud800", "\ufffd"),
        ("a\u2028b", "a↵b"),
        ("né 日本 🙂", "né 日本 🙂"),
    ],
)
def test_visible(text: str, shown: str) -> None:
    assert visible(text) == shown


@pytest.mark.parametrize(
    ("text", "shown"),
    [("", "∅"), (" the", "␣the"), ("  ", "␣␣"), ("a b ", "a b␣"), ("\n    ", "↵␣␣␣␣"), ("\t", "⇥")],
)
def test_label(text: str, shown: str) -> None:
    assert label(text) == shown


@given(st.text(st.characters()))
def test_nothing_shown_can_act(text: str) -> None:
    for character in visible(text):
        assert character in "\n\t" or unicodedata.category(character) not in {"Cc", "Cs", "Zl", "Zp"}
    assert "\n" not in label(text)
    label(text).encode("utf-8")
