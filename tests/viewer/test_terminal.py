"""Untrusted text: nothing that is printed may act on the terminal."""

from __future__ import annotations

import io
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from agentgym.viewer.terminal import printable, untrusted

ACTING = {"Cc", "Cf", "Cs", "Zl", "Zp"}


@given(st.text(alphabet=st.characters()))
def test_nothing_acting_is_left(text: str) -> None:
    shown = printable(text)
    left = {c for c in shown if unicodedata.category(c) in ACTING}
    assert left <= set("\n\t\u200c\u200d")
    shown.encode()


@given(st.text(alphabet=st.characters(categories=("L", "N", "P", "S", "Zs")) | st.sampled_from("\n\t")))
def test_harmless_text_is_left_alone(text: str) -> None:
    assert printable(text) == text
    assert printable(printable(text)) == text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[31mred\x1b[0m", "␛[31mred␛[0m"),
        ("\x1b]0;title\x07", "␛]0;title␇"),
        ("\x9b2J", "\\x9b2J"),
        ("over\rwritten\x08", "over␍written␈"),
        ("line\r\nline", "line\nline"),
        ("\u202egnirts\u2066", "\\u202egnirts\\u2066"),
        ("\ud800 \x7f", "\\ud800 ␡"),
        ("\U000e0041", "\\U000e0041"),
        ("👩\u200d🚀 né à", "👩\u200d🚀 né à"),
    ],
)
def test_what_would_act_is_shown(text: str, shown: str) -> None:
    assert printable(text) == shown


@given(st.text())
def test_rich_reads_no_markup_or_escape_in_it(text: str) -> None:
    out = io.StringIO()
    Console(file=out, force_terminal=True, color_system="truecolor", width=10_000).print(untrusted(text))
    assert "\x1b" not in out.getvalue()
    hostile = "[bold red]x[/] [link=http://h]:smile:[/link] "
    assert untrusted(hostile + text).plain == printable(hostile + text)


def test_one_line_of_a_width() -> None:
    assert untrusted("a\n b  c", width=20).plain == "a b c"
    assert untrusted("abcdef", width=4).plain == "abc…"
