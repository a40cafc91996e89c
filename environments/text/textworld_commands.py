"""What goes into TextWorld's interpreter, and what comes out of it.

Invariant: nothing reaches the interpreter but one plain command of the player's. Raw, a NUL byte makes it
hang or crash, ``save`` and ``script`` write files where the process stands, ``quit`` and ``restart`` end the
game behind TextWorld's back, and ``me, save`` or ``look then quit`` hide such a command in a harmless one.
"""

from __future__ import annotations

import re

LONGEST_COMMAND = 118
"""In characters; the games' own input buffer holds 119."""

_COMMAND = re.compile(r"[A-Za-z0-9' -]+")
_PROMPT = "\n>"
_MENU = re.compile(r"\s*Would you like to RESTART, RESTORE a saved game,[^\n]*\s*\Z")
_BLANK_LINES = re.compile(r"\n\s*\n")
_CENTRED = re.compile(r"^ +(?=\*\*\*)", re.MULTILINE)

_OUTSIDE = """
    quit q restart restore save undo again g oops o script transcript verify version brief normal short
    superbrief long verbose notify nouns pronouns score enable disable restrict test
"""
# Commands to the interpreter or to TextWorld's own instruments, not to the player. The games' dictionaries
# hold nine characters of a word, so that `superbriefly` is `superbrief` to them.
_OUTSIDE_WORDS = frozenset(word[:9] for word in _OUTSIDE.split())


def normal_form(action: str) -> str:
    """``action`` without surrounding white space and closing full stops."""
    return action.strip(" \t\r\n.")


def refusal(command: str) -> str | None:
    """Why ``command`` is not sent to the game, in words for the policy; ``None`` if it may be sent."""
    if not command:
        return "That was empty. Write one command, such as: look"
    if len(command) > LONGEST_COMMAND:
        return f"That is too long: a command has at most {LONGEST_COMMAND} characters. Nothing happened."
    if not _COMMAND.fullmatch(command):
        return (
            "That is not one command: use letters, digits, spaces, hyphens and apostrophes only, and one "
            "command a turn. Nothing happened."
        )
    words = command.lower().split()
    if "then" in words:
        return "That is more than one command: write one command a turn. Nothing happened."
    if words[0][:9] in _OUTSIDE_WORDS or words[0].startswith("tw-"):
        return f"{words[0]!r} is no command of this game. Nothing happened."
    return None


def clean(text: str) -> str:
    """What the game printed, without prompt, status line, closing menu and surplus blank lines."""
    end = text.rfind(_PROMPT)
    text = _MENU.sub("", text if end < 0 else text[:end])
    return _BLANK_LINES.sub("\n\n", _CENTRED.sub("", text)).strip()
