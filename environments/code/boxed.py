r"""A boxed answer, and the comparisons of answers that need no algebra.

Invariant: nothing here evaluates. An answer is cut out, its spelling made plain, and read as a fraction by
expressions that take digits and nothing else. Where the reference is a number, nothing but a number is the
same: what is left to be calculated may be the question itself. What that does not decide is left to a sandbox
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
_MIXED = re.compile(
    rf"(?P<sign>[+-]?)(?P<whole>{_DIGITS})(?: ?\\frac\{{(?P<over>[1-9]\d*)\}}\{{(?P<under>[1-9]\d*)\}}"
    r"| (?P<above>[1-9]\d*)/(?P<below>[1-9]\d*))",
    re.ASCII,
)
_NAMED = re.compile(r"\\?[A-Za-z]+(?:_\w|_\{\w+\})? ?= ?", re.ASCII)
_ENCLOSED = re.compile(r"(-?) ?(?:\\\{(.*)\\\}|\((.*)\)|\[(.*)\]|\{(.*)\})")
_QUOTIENT = re.compile(rf"\(?([+-]?{_DIGITS})\)? ?/ ?\(?([+-]?{_DIGITS})\)?", re.ASCII)
_WORDS = re.compile(r"[^\W\d_]{2,}(?: [^\W\d_]+)*")
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
    """The number that an answer in plain spelling is: an integer, a decimal, a fraction or a mixed number."""
    if (found := _MIXED.fullmatch(answer)) is not None:
        part = Fraction(int(found["over"] or found["above"]), int(found["under"] or found["below"]))
        if part < 1:
            value = int(found["whole"].replace(",", "")) + part
            return -value if found["sign"] == "-" else value
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


def given(answer: str) -> Fraction | None:
    """The number that an answer gives, as :func:`number` or named or enclosed: ``x = 5``, ``-(1/2)``."""
    if (named := _NAMED.match(answer)) is not None:
        answer = answer[named.end() :]
    if (found := _QUOTIENT.fullmatch(answer)) is not None:
        return number(f"{found[1]}/{found[2]}")
    if (found := _ENCLOSED.fullmatch(answer)) is not None:
        value = number(next(part for part in found.groups()[1:] if part is not None).strip())
        return None if value is None else -value if found[1] else value
    return number(answer)


def worded(answer: str) -> bool:
    """Whether an answer in plain spelling is words: it may still be read as names, such as ``xy``."""
    return _WORDS.fullmatch(answer) is not None


def same(answer: str, reference: str) -> bool | None:
    """Whether two answers are the same; ``None`` where it takes algebra to say.

    It takes none where the reference is a number: an answer is that number, written out, or wrong.
    """
    if len(answer) > LONGEST:
        return False
    left, right = plain(answer), plain(reference)
    if not left or left == right:
        return bool(left)
    if (wanted := number(right)) is not None:
        return given(left) == wanted
    if worded(left) and worded(right):
        return left.casefold() == right.casefold()
    return None
