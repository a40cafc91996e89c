r"""What compares two answers by algebra, inside a sandbox of its own.

Invariant: an answer is read by the grammar below, symbol by symbol, into objects of SymPy; no text of it is
ever handed to ``eval``, ``sympify`` or ``parse_expr``. What it costs is the sandbox's to bound, and the sizes
below keep most of that from happening.

The grammar takes LaTeX and plain notation alike: numbers, one-letter names, ``+ - * / ^ ** !``, implied
products, ``\frac \sqrt \binom``, common functions and constants, ``|x|``, ``\pm``, equations, tuples and
intervals, sets, and lists, whose order does not matter.

An answer that leaves work over is ``unfinished``, whatever it is worth: it says the question again. Numbers
are to be calculated (``2 + 2``, ``3^2`` and ``\sqrt 2 \sqrt 3`` are not) and like terms added up; functions
are those of the reference or their kin; and it is not much longer than the reference. Where the reference
itself leaves numbers to be calculated, an answer may.

This file is sent into sandboxes and runs there by itself, beside SymPy: it imports nothing else, and runs on
any Python from 3.9 on.
"""

from __future__ import annotations

import json
import re
import sys
from dataclasses import dataclass
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
_KIN = (
    {"root", "sqrt", "cbrt"},
    {*_ARCS, "cot", "sec", "csc", "sinh", "cosh", "tanh", "exp", "e", "E", "ln", "log"},
    {f"{arc}{name}" for arc in ("a", "arc") for name in _ARCS},
    {"abs", "Abs", "|"},
    {"floor"},
    {"ceil", "ceiling"},
    {"binom", "!"},
    {"pi"},
    {"i", "I"},
    {"infty", "oo", "inf"},
)
"""What stands in for each other: an answer may use what is kin to something of its reference."""
_FAMILY = {name: number for number, names in enumerate(_KIN) for name in names}
LEAVES, MORE_LEAVES = 2, 2
DIGITS, MORE_DIGITS = 2, 32
"""An answer's most numbers and names, and most digits: so many times the reference's, and so many more."""

_PRODUCT = {"*", "\\cdot", "\\times", "\\ast"}
_SIGNS = {*_PRODUCT, "\\frac", "\\cup", "\\div", "\\lvert", "\\rvert"}
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
        self.families: set[int] = set()
        self.unfinished = False

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
        value, terms = self.product(), 1
        while self.next in ("+", "-"):
            sign = 1 if self.take() == "+" else -1
            value, terms = number(value) + sign * number(self.product()), terms + 1
        if terms > 1:
            self.unfinished |= len(sympy.Add.make_args(value)) < terms
        self.depth -= 1
        return value

    def product(self) -> Any:
        value = self.signed()
        over, under = [value], []
        while True:
            if self.next in _PRODUCT:
                self.take()
                over.append(number(self.signed()))
                value = number(value) * over[-1]
            elif self.next in ("/", "\\div", ":"):
                self.take()
                under.append(number(self.signed()))
                value = number(value) / under[-1]
            elif self.begins():
                mixed = self.mixed(value)
                other = number(self.power())
                value = number(value) + other if mixed else number(value) * other
                over = [value] if mixed else [*over, other]
            else:
                self.unfinished |= left_over(over, under)
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
            value = self.known("!", sympy.factorial(small(number(value))))
        if self.next not in ("^", "**"):
            return value
        self.take()
        self.depth += 1
        if self.depth > DEEPEST:
            raise Unreadable("it is nested too deeply")
        exponent = self.signed()
        self.depth -= 1
        if number(exponent).is_Rational and not exponent.is_Integer:
            self.families.add(_FAMILY["root"])
        value = raised(number(value), exponent)
        self.unfinished |= bool(value.is_Rational)
        return value

    def known(self, name: str, value: Any) -> Any:
        """``value``, which a function or sign of that name made."""
        self.families.add(_FAMILY[name])
        self.unfinished |= bool(value.is_Rational)
        return value

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
            return self.known("|", sympy.Abs(value))
        name = token.lstrip("\\")
        if token in ("\\frac", "\\binom"):
            over, under = number(self.argument()), number(self.argument())
            if name == "binom":
                return self.known(name, sympy.binomial(small(over), under))
            self.unfinished |= left_over([over], [under])
            return over / under
        if token == "\\sqrt" and self.next == "[":
            self.take()
            root = number(self.sum())
            self.take("]")
            return self.known("root", raised(number(self.argument()), 1 / root))
        if name in _FUNCTIONS:
            return self.applied(name)
        if name in _CONSTANTS:
            return self.known(name, _CONSTANTS[name])
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
        return sympy.Symbol(name, real=True)

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
        return self.known(name, value if exponent is None else raised(value, exponent))

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


def left_over(over: list[Any], under: list[Any]) -> bool:
    """Whether a product leaves numbers to be multiplied: a fraction of whole numbers is one."""
    whole = all(part.is_Integer for part in over if getattr(part, "is_Rational", False))
    for parts in (over, under):
        rational = sum(getattr(part, "is_Rational", False) for part in parts)
        roots = sum(getattr(part, "is_Pow", False) and part.base.is_Rational for part in parts)
        if rational > 1 or roots > 1:
            return True
    return any(part.is_Rational and not (whole and part.is_Integer) for part in under)


@dataclass(frozen=True)
class Reading:
    """What a text says, and in what form.

    Attributes:
        value: An expression, or a tuple whose first item tells what it is.
        families: Of :data:`_KIN`, those of which it uses something.
        unfinished: Whether it leaves numbers to be calculated.
        leaves: How many numbers and names it has.
        digits: How many digits.
    """

    value: Any
    families: frozenset[int]
    unfinished: bool
    leaves: int
    digits: int


def readings(text: str) -> Reading:
    """What a text says; where it says plus or minus, both."""
    signs = (("+", "-"), ("-", "+")) if "\\pm" in text or "\\mp" in text else (("", ""),)
    readers = [_Reader(text.replace("\\pm", plus).replace("\\mp", minus)) for plus, minus in signs]
    values = [reader.whole() for reader in readers]
    names = [token for token in readers[0].tokens if token[-1].isalnum() and token not in _SIGNS]
    return Reading(
        values[0] if len(values) == 1 else ("many", [part for value in values for part in parts(value)]),
        frozenset().union(*(reader.families for reader in readers)),
        any(reader.unfinished for reader in readers),
        len(names),
        sum(character.isdigit() for character in text),
    )


def unfinished(answer: Reading, reference: Reading) -> bool:
    """Whether an answer leaves work over that its reference does not."""
    return (
        (answer.unfinished and not reference.unfinished)
        or not answer.families <= reference.families
        or answer.leaves > LEAVES * reference.leaves + MORE_LEAVES
        or answer.digits > DIGITS * reference.digits + MORE_DIGITS
    )


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
        if any(getattr(side[1], "is_Symbol", False) and number(side[2]).is_number for side in (left, right)):
            # It is solved: what it was solved from does not say so.
            return False
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
    if None not in (rational := [left.is_rational, right.is_rational]) and rational[0] != rational[1]:
        return False
    difference, symbols, near = left - right, sorted((left - right).free_symbols, key=str), 0
    for number_, (size, signs) in enumerate(_POINTS if symbols else _POINTS[:1]):
        values = {
            symbol: signs[n % 2] * size * sympy.Rational(7 + 3 * n + 5 * number_, 11)
            for n, symbol in enumerate(symbols)
        }
        if not (defined(left, values) and defined(right, values)):
            continue
        at = difference.subs(values).evalf(60, maxn=400)
        scale = 1 + abs(left.subs(values).evalf(15))
        if not (at.is_number and at.is_finite and scale.is_finite):
            continue
        if abs(at) > scale * sympy.Float("1e-40"):
            return False
        near += 1
    return near >= (3 if symbols else 1) or sympy.simplify(difference) == 0


_POINTS = (
    (sympy.Rational(1, 3), (1, 1)),
    (sympy.Rational(1, 20), (1, 1)),
    (sympy.Rational(1, 30), (1, 1)),
    (sympy.Rational(1, 40), (-1, 1)),
    (sympy.Integer(1), (-1, -1)),
    (sympy.Integer(9), (1, 1)),
    (sympy.Integer(7), (-1, 1)),
    (sympy.Integer(17), (1, -1)),
    (sympy.Integer(23), (1, 1)),
    (sympy.Integer(40), (1, 1)),
)
"""Sizes and signs of what symbols stand for: between 0 and 1, and beyond whatever an answer may turn at."""


def defined(expression: Any, values: Any) -> bool:
    """Whether roots and logarithms are real at a point: elsewhere, the rules for them do not hold."""
    for part in expression.atoms(sympy.Pow, sympy.log):
        if part.is_number or (part.is_Pow and part.exp.is_integer):
            continue
        if part.is_Pow and part.exp.subs(values).is_Integer:
            continue
        inside = part.args[0].subs(values)
        if inside.is_number and not inside.evalf(15).is_positive:
            return False
    return True


def verdict(answer: str, reference: str) -> str:
    """``same``, ``different``, ``unfinished``, or which of the two cannot be read."""
    read = []
    for name, text in (("reference", reference), ("answer", answer)):
        try:
            read.append(readings(text))
        except (Unreadable, ArithmeticError, ValueError, TypeError, AttributeError, RecursionError):
            return f"unreadable {name}"
    right, left = read
    if unfinished(left, right):
        return "unfinished"
    try:
        return "same" if same(left.value, right.value) else "different"
    except (Unreadable, ArithmeticError, ValueError, TypeError, AttributeError, RecursionError):
        return "different"


def main() -> None:
    """Say that SymPy is there, then compare the one pair that is asked about."""
    print("ready", flush=True)
    asked = json.loads(sys.stdin.readline())
    print(verdict(asked["answer"], asked["reference"]), flush=True)


if __name__ == "__main__":
    main()
