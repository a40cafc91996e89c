r"""What compares two answers by algebra, inside a sandbox of its own.

Invariant: an answer is read by the grammar below, symbol by symbol, into objects of SymPy; no text of it is
ever handed to ``eval``, ``sympify`` or ``parse_expr``. What it costs is the sandbox's to bound, and the sizes
below keep most of that from happening.

The grammar takes LaTeX and plain notation alike: numbers, one-letter names, ``+ - * / ^ ** !``, implied
products, ``\frac \sqrt \binom``, common functions and constants, ``|x|``, ``\pm``, equations, tuples and
intervals, sets, and lists, whose order does not matter.

This file is sent into sandboxes and runs there by itself, beside SymPy: it imports nothing else, and runs on
any Python from 3.9 on.
"""

from __future__ import annotations

import json
import re
import sys
from typing import Any

import sympy

DEEPEST = 40
LARGEST = 10_000
"""Largest whole exponent, factorial and upper index of a binomial coefficient."""

_TOKEN = re.compile(
    r"(?a)"
    r"\s*(?:(\d+(?:\.\d+)?|\.\d+)|(\\[A-Za-z]+|\\[{}|])|([A-Za-z]+)|(\*\*|[-+*/^!,=()\[\]{}|_<>:]))"
)
_ARCS = ("sin", "cos", "tan")
_NAMED = (*_ARCS, "cot", "sec", "csc", "sinh", "cosh", "tanh", "exp", "floor", "sqrt", "cbrt", "ceiling")
_FUNCTIONS = {
    **{name: getattr(sympy, name) for name in _NAMED},
    **{f"{arc}{name}": getattr(sympy, f"a{name}") for arc in ("a", "arc") for name in _ARCS},
    **{"ln": sympy.log, "log": sympy.log, "abs": sympy.Abs, "Abs": sympy.Abs, "ceil": sympy.ceiling},
}
_CONSTANTS = {
    "pi": sympy.pi,
    "e": sympy.E,
    "E": sympy.E,
    "i": sympy.I,
    "I": sympy.I,
    "infty": sympy.oo,
    "oo": sympy.oo,
    "inf": sympy.oo,
}
_GREEK = {"alpha", "beta", "gamma", "delta", "theta", "lambda", "mu", "rho", "sigma", "tau", "phi", "omega"}
_PRODUCT = {"*", "\\cdot", "\\times", "\\ast"}
_CLOSES = {"(": ")]", "[": "])", "\\{": ("\\}",)}


class Unreadable(Exception):
    """A text that the grammar does not take."""


class _Reader:
    """Reads one answer."""

    def __init__(self, text: str) -> None:
        self.tokens: list[str] = []
        position = 0
        text = text.strip()
        while position < len(text):
            found = _TOKEN.match(text, position)
            if found is None:
                raise Unreadable(text[position : position + 20])
            self.tokens.append(next(part for part in found.groups() if part is not None))
            position = found.end()
        self.at = 0
        self.depth = 0
        self.bars = 0

    def whole(self) -> Any:
        """The answer: an expression, an equation, a sequence, or several of them."""
        items = [self.item()]
        while self.next in (",", "\\cup"):
            self.take()
            items.append(self.item())
        if self.next:
            raise Unreadable(self.next)
        return items[0] if len(items) == 1 else ("many", items)

    @property
    def next(self) -> str:
        return self.tokens[self.at] if self.at < len(self.tokens) else ""

    def take(self, wanted: str = "") -> str:
        token = self.next
        if not token or (wanted and token != wanted):
            raise Unreadable(token or "its end")
        self.at += 1
        return token

    def item(self) -> Any:
        left = self.sum()
        if self.next != "=":
            return left
        self.take()
        return ("equal", left, self.sum())

    def sum(self) -> Any:
        self.depth += 1
        if self.depth > DEEPEST:
            raise Unreadable("it is nested too deeply")
        value = self.product()
        while self.next in ("+", "-"):
            sign = 1 if self.take() == "+" else -1
            value = number(value) + sign * number(self.product())
        self.depth -= 1
        return value

    def product(self) -> Any:
        value = self.signed()
        while True:
            if self.next in _PRODUCT:
                self.take()
                value = number(value) * number(self.signed())
            elif self.next in ("/", "\\div", ":"):
                self.take()
                value = number(value) / number(self.signed())
            elif self.begins():
                mixed = self.mixed(value)
                other = number(self.power())
                value = number(value) + other if mixed else number(value) * other
            else:
                return value

    def mixed(self, value: Any) -> bool:
        """Whether a whole number and a fraction of such are one number, as in ``3 1/2`` set as a fraction."""
        told = "".join(self.tokens[self.at : self.at + 7])
        return self.tokens[self.at - 1] == str(value) and bool(re.fullmatch(r"\\frac\{\d+\}\{\d+\}", told))

    def begins(self) -> bool:
        """Whether a factor follows, as in ``2x``."""
        token = self.next
        if token == "|":
            return self.bars == 0
        return (
            token[:1].isalpha()
            or token in ("(", "{")
            or (token[:1] == "\\" and token[1:].isalpha() and (token not in ("\\cup", "\\div")))
        )

    def signed(self) -> Any:
        sign = 1
        while self.next in ("+", "-"):
            sign *= 1 if self.take() == "+" else -1
        value = self.power()
        return value if sign == 1 else -number(value)

    def power(self) -> Any:
        value = self.atom()
        while self.next == "!":
            self.take()
            value = sympy.factorial(small(number(value)))
        if self.next not in ("^", "**"):
            return value
        self.take()
        self.depth += 1
        if self.depth > DEEPEST:
            raise Unreadable("it is nested too deeply")
        exponent = self.signed()
        self.depth -= 1
        return raised(number(value), number(exponent))

    def atom(self) -> Any:
        token = self.take()
        if token[0].isdigit() or token[0] == ".":
            return sympy.Rational(token)
        if token == "{":
            value = self.sum()
            self.take("}")
            return value
        if token in _CLOSES:
            return self.sequence(token)
        if token in ("|", "\\|", "\\lvert"):
            self.bars += 1
            value = number(self.sum())
            self.take("\\rvert" if token == "\\lvert" else token)
            self.bars -= 1
            return sympy.Abs(value)
        name = token.lstrip("\\")
        if token in ("\\frac", "\\binom"):
            over, under = number(self.argument()), number(self.argument())
            return over / under if name == "frac" else sympy.binomial(small(over), under)
        if token == "\\sqrt" and self.next == "[":
            self.take()
            root = number(self.sum())
            self.take("]")
            return raised(number(self.argument()), 1 / root)
        if name in _FUNCTIONS:
            return self.applied(name)
        if name in _CONSTANTS:
            return _CONSTANTS[name]
        if name in _GREEK or (token == name and len(name) == 1):
            return self.symbol(name)
        if token == name and len(name) <= 3:  # a product, such as xy
            self.at -= 1
            self.tokens[self.at : self.at + 1] = list(name)
            return self.atom()
        raise Unreadable(token)

    def symbol(self, name: str) -> Any:
        if self.next == "_":
            self.take()
            braced = self.next == "{"
            name += "_" + (self.take() and self.take() if braced else self.take())
            if braced:
                self.take("}")
        return sympy.Symbol(name, positive=True)

    def argument(self) -> Any:
        if self.next == "{":
            return self.atom()
        return self.signed() if self.next in ("+", "-") else self.atom()

    def applied(self, name: str) -> Any:
        function, exponent, base = _FUNCTIONS[name], None, None
        while self.next in ("^", "_"):
            if self.take() == "^":
                exponent = number(self.argument())
            else:
                base = number(self.argument())
        value = number(self.argument())
        while self.next[:1].isalpha() and len(self.next) == 1 and name != "sqrt":  # sin 2x
            value *= number(self.power())
        value = function(value) if base is None else sympy.log(value) / sympy.log(base)
        return value if exponent is None else raised(value, exponent)

    def sequence(self, opened: str) -> Any:
        items = [] if self.next in _CLOSES[opened] else [self.item()]
        while self.next == ",":
            self.take()
            items.append(self.item())
        if self.next not in _CLOSES[opened] or not self.next:
            raise Unreadable(self.next or "its end")
        closed = self.take()
        if opened == "\\{":
            return ("many", items)
        if len(items) == 1 and opened + closed in ("()", "[]"):
            return items[0]
        return ("sequence", opened + closed, items)


def number(value: Any) -> Any:
    """``value``, if one can calculate with it."""
    if isinstance(value, tuple):
        raise Unreadable("one cannot calculate with that")
    return value


def small(value: Any) -> Any:
    """``value``, if it does not grow without bounds."""
    if value.is_number and not (abs(value) <= LARGEST):
        raise Unreadable("a number is too large")
    return value


def raised(base: Any, exponent: Any) -> Any:
    """A power, unless it is a number too large to write down."""
    if base.is_Rational and exponent.is_Rational:
        size = max(abs(base.p), base.q).bit_length()
        if abs(exponent) > LARGEST or size * abs(exponent) > 20 * LARGEST:
            raise Unreadable("a number is too large")
    elif exponent.is_number and abs(exponent.evalf(9)) > LARGEST:
        raise Unreadable("a number is too large")
    return base**exponent


def readings(text: str) -> Any:
    """What a text says; where it says plus or minus, both."""
    if "\\pm" in text or "\\mp" in text:
        first = _Reader(text.replace("\\pm", "+").replace("\\mp", "-")).whole()
        other = _Reader(text.replace("\\pm", "-").replace("\\mp", "+")).whole()
        return ("many", [*parts(first), *parts(other)])
    return _Reader(text).whole()


def parts(value: Any) -> list[Any]:
    """The members of several values, or the one."""
    return value[1] if isinstance(value, tuple) and value[0] == "many" else [value]


def same(left: Any, right: Any) -> bool:
    """Whether two readings mean the same."""
    kinds = [value[0] if isinstance(value, tuple) else "" for value in (left, right)]
    if kinds[0] != kinds[1]:
        # x = 5, where the other says 5.
        for one, other in ((left, right), (right, left)):
            if isinstance(one, tuple) and one[0] == "equal" and getattr(one[1], "is_Symbol", False):
                return same(one[2], other)
            if isinstance(one, tuple) and one[0] == "many" and len(one[1]) == 1:
                return same(one[1][0], other)
        return False
    if kinds[0] == "many":
        rest = list(right[1])
        for value in left[1]:
            found = next((n for n, other in enumerate(rest) if same(value, other)), None)
            if found is None:
                return False
            del rest[found]
        return not rest
    if kinds[0] == "sequence":
        return left[1] == right[1] and len(left[2]) == len(right[2]) and all(map(same, left[2], right[2]))
    if kinds[0] == "equal":
        if same(left[1], right[1]) and same(left[2], right[2]):
            return True
        ratio = sympy.simplify((number(left[1]) - number(left[2])) / (number(right[1]) - number(right[2])))
        return bool(ratio.is_number and ratio.is_finite and ratio != 0)
    return equal(left, right)


def equal(left: Any, right: Any) -> bool:
    """Whether two expressions are the same number, or the same function of their symbols."""
    if left == right:
        return True
    if not (left.is_finite is not False and right.is_finite is not False) or left.has(sympy.nan, sympy.zoo):
        return False
    if left.free_symbols != right.free_symbols and sympy.simplify(left - right).free_symbols:
        return False
    difference, symbols, near = left - right, sorted((left - right).free_symbols, key=str), 0
    for point in range(4):
        values = {symbol: sympy.Rational(7 + 3 * n + 5 * point, 11) for n, symbol in enumerate(symbols)}
        at = difference.subs(values).evalf(60, maxn=400)
        scale = 1 + abs(left.subs(values).evalf(15))
        if not (at.is_number and at.is_finite and scale.is_finite):
            continue
        if abs(at) > scale * sympy.Float("1e-40"):
            return False
        near += 1
        if not symbols:
            break
    return near == (4 if symbols else 1) or sympy.simplify(difference) == 0


def verdict(answer: str, reference: str) -> str:
    """``same``, ``different``, or which of the two cannot be read."""
    read = []
    for name, text in (("reference", reference), ("answer", answer)):
        try:
            read.append(readings(text))
        except (Unreadable, ArithmeticError, ValueError, TypeError, AttributeError, RecursionError):
            return f"unreadable {name}"
    try:
        return "same" if same(*read) else "different"
    except (Unreadable, ArithmeticError, ValueError, TypeError, AttributeError, RecursionError):
        return "different"


def main() -> None:
    """Say that SymPy is there, then compare the one pair that is asked about."""
    print("ready", flush=True)
    asked = json.loads(sys.stdin.readline())
    print(verdict(asked["answer"], asked["reference"]), flush=True)


if __name__ == "__main__":
    main()
