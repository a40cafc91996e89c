r"""A boxed answer, and the comparisons of answers that need no algebra.

Invariant: nothing here evaluates. An answer is cut out, its spelling made plain, and read as a fraction by
expressions that take digits and nothing else. What that does not decide is left to a sandbox
(:mod:`agentgym.environments.code.symbolic`).
"""

from __future__ import annotations

import re
from fractions import Fraction

LONGEST = 1_000
"""Characters of the longest answer that is compared."""

TAIL = 20_000
"""Characters of a text's end in which a box is looked for."""

BOXES = 8
"""Boxes that are tried, from the last one."""

_BOX = re.compile(r"\\f?box(?:ed)?\s*\{")
_DIGITS = r"(?:\d{1,3}(?:,\d{3})+|\d+)"
_NUMBER = rf"[+-]?{_DIGITS}(?:\.\d*)?|[+-]?\.\d+"
_PLAIN = re.compile(rf"(?P<number>{_NUMBER})(?:/(?P<under>[+-]?{_DIGITS}))?(?P<percent>%)?", re.ASCII)
_FRACTION = re.compile(
    rf"(?P<sign>[+-]?)\\frac\{{(?P<over>[+-]?{_DIGITS})\}}\{{(?P<under>[+-]?{_DIGITS})\}}", re.ASCII
)
_WORDS = re.compile(r"[A-Za-z]{2,}(?: [A-Za-z]+)*")
_PROSE = re.compile(r"(?=.*[A-Za-z]{4})[A-Za-z]+(?: [A-Za-z']+)+|[A-Za-z]{6,}|none")
_SPELLINGS = (
    (re.compile(r"\\(?:left|right|displaystyle|,|;|:|!| |quad\b|qquad\b)"), " "),
    (re.compile(r"\\[dtc]frac(?![A-Za-z])"), r"\\frac"),
    (re.compile(r"\\frac\s*(\d)\s*(\d)"), r"\\frac{\1}{\2}"),
    (re.compile(r"\\(?:text|mathrm|mathbf|textbf|operatorname)\s*\{([^{}]*)\}"), r"\1"),
    (re.compile(r"\\\$|\$|\\\(|\\\)|\\\[|\\\]"), ""),
    (re.compile(r"\\%"), "%"),
    (re.compile(r"\^\s*(?:\\circ|\{\s*\\circ\s*\})|\\degree|°"), ""),
    (re.compile(r"−|–"), "-"),
    (re.compile(r"\s+"), " "),
)


def boxed(text: str) -> str | None:
    r"""What the last ``\boxed{…}`` of a text holds; ``None`` where there is none that is closed and short."""
    text = text[-TAIL:]
    for found in list(_BOX.finditer(text))[: -BOXES - 1 : -1]:
        depth = 1
        for position in range(found.end(), min(len(text), found.end() + LONGEST + 1)):
            depth += (text[position] == "{") - (text[position] == "}")
            if depth == 0:
                return text[found.end() : position].strip()
    return None


def plain(answer: str) -> str:
    """An answer in plain spelling: no mathematics delimiters, sizes, text commands or units of angle."""
    for pattern, written in _SPELLINGS:
        answer = pattern.sub(written, answer)
    return answer.strip().rstrip(".").strip()


def number(answer: str) -> Fraction | None:
    """The number that an answer in plain spelling is, where it is an integer, a decimal or a fraction."""
    text = answer.replace(" ", "")
    if (found := _FRACTION.fullmatch(text)) is not None:
        over, under = (int(found[name].replace(",", "")) for name in ("over", "under"))
        return None if under == 0 else Fraction(over, under) * (-1 if found["sign"] == "-" else 1)
    if (found := _PLAIN.fullmatch(text)) is not None:
        under = int((found["under"] or "1").replace(",", ""))
        if under == 0:
            return None
        return Fraction(found["number"].replace(",", "")) / under / (100 if found["percent"] else 1)
    return None


def same(answer: str, reference: str) -> bool | None:
    """Whether two answers are the same; ``None`` where it takes algebra to say."""
    if len(answer) > LONGEST:
        return False
    left, right = plain(answer), plain(reference)
    if not left or left == right:
        return bool(left)
    one, other = number(left), number(right)
    if one is not None and other is not None:
        return one == other
    if _WORDS.fullmatch(left) and _WORDS.fullmatch(right):
        return left.casefold() == right.casefold()
    if other is not None and _PROSE.fullmatch(left):
        return False
    return None
