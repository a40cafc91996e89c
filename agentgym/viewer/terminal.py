"""Untrusted text on a terminal.

Invariant: nothing that an environment, a tool or a policy wrote reaches the terminal as an escape sequence,
as a control or direction-changing character, or as markup. What would have acted is shown instead.
"""

from __future__ import annotations

import unicodedata

from rich.text import Text

# Joiners are format characters that real words and emoji are spelled with.
_KEPT = frozenset("\n\t\u200c\u200d")
_ACTING = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})


def printable(text: str) -> str:
    r"""``text`` with every character that a terminal would act on replaced by a picture or its code.

    Line feeds and tabs stay; CR LF becomes LF; ``ESC`` becomes ``␛``; direction marks, C1 controls and lone
    surrogates become ``\u202e`` and the like. The result can be encoded as UTF-8.
    """
    text = text.replace("\r\n", "\n")
    if all(line.isprintable() for line in text.split("\n")):
        return text
    return "".join(_shown(character) for character in text)


def untrusted(text: str, style: str = "", *, width: int | None = None) -> Text:
    """``text`` for rich: printable, never read as markup.

    Args:
        text: Anything.
        style: A rich style for all of it.
        width: Joined to one line of at most this many characters where given.
    """
    if width is not None:
        text = " ".join(text.split())
        if len(text) > width:
            text = text[: max(width - 1, 0)] + "…"
    return Text(printable(text), style=style)


def _shown(character: str) -> str:
    if character in _KEPT or unicodedata.category(character) not in _ACTING:
        return character
    code = ord(character)
    if code < 0x20:
        return chr(0x2400 + code)
    if code == 0x7F:
        return "␡"
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
